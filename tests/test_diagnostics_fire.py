"""What is wrong with a posterior or with its draws is a sentence of the report, whatever noticed it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from targets import line, two_clusters, two_means

import models
from toolkit import Dataset, Model, Study, as_reference, render, study
from toolkit.reporting.reports import Report

TARGETS = models.load("gaussian_target")


def unknown(model: Model) -> Model:
    """The model as if its posterior were not known, so that NUTS draws."""
    return replace(model, exact=None, log_evidence=None)


def separable(x: Any, y: Any = None) -> None:
    slope = numpyro.sample("slope", dist.ImproperUniform(dist.constraints.real, (), ()))
    with numpyro.plate("row", x.shape[0]):
        numpyro.sample("y", dist.BernoulliLogits(slope * x), obs=y)


def only_the_sum(y: Any = None) -> None:
    a = numpyro.sample("a", dist.ImproperUniform(dist.constraints.real, (), ()))
    b = numpyro.sample("b", dist.ImproperUniform(dist.constraints.real, (), ()))
    numpyro.sample("y", dist.Normal(a + b, 1.0), obs=y)


def stuck(model: Model) -> Any:
    rng = np.random.default_rng(0)
    draws = {name: rng.normal(size=(4, 500)) for name in ("a", "b")}
    for values in draws.values():
        values[2] = values[2, :1]
    return as_reference(draws, model)


SIGNS = np.array([-2.0, -1.0, 1.0, 2.0])
CASES: dict[str, tuple[Callable[[], Study], tuple[str, ...]]] = {
    "a funnel": (
        lambda: study(
            unknown(TARGETS.model(target="funnel", dimensions=4)), guides=["mean_field@plain"], chart="plain", draws=300
        ),
        (
            "No verdict: ",
            "heavy tails or a funnel; try another chart",
            "in another chart (noncentred)",
            "chart='noncentred'",
        ),
    ),
    "two modes": (
        lambda: study(
            unknown(TARGETS.model(target="two_modes", dimensions=2, separation=20.0)),
            guides=["mean_field"],
            chains=6,
            warmup=200,
            draws=300,
        ),
        ("No verdict: the chains disagree", "The posterior has several modes"),
    ),
    "switched labels": (
        lambda: study(
            replace(two_means(two_clusters(8.0)), labels=None), guides=["mean_field"], chains=6, warmup=200, draws=300
        ),
        ("No verdict: the chains disagree", "its labels have switched"),
    ),
    "tails heavier than any Gaussian's": (
        lambda: study(TARGETS.model(target="cauchy", dimensions=1), guides=["mean_field"]),
        ("mean_field: KL(p || q) is divergent: it grows with the draws, since the guide's tails are too light.",),
    ),
    "a posterior that is not there": (
        lambda: study(
            Model(separable, Dataset("separable", {"x": SIGNS, "y": (SIGNS > 0).astype(int)})),
            guides=["mean_field"],
            warmup=100,
            draws=100,
        ),
        ("No verdict:", "the posterior may be improper", "Give slope a proper prior"),
    ),
    "parameters of which only the sum is known": (
        lambda: study(
            Model(only_the_sum, Dataset("sum", {"y": np.array(1.0)})), guides=["mean_field"], warmup=100, draws=100
        ),
        ("No verdict:", "the density is the same all along a line: the posterior is improper"),
    ),
    "a NUTS run cut short": (
        lambda: study(line(), guides=["mean_field"], warmup=30, draws=40),
        ("No verdict: ", "The bulk ESS is", "draw more", "Run NUTS longer"),
    ),
    "a chain that is stuck": (
        lambda: study(line(), guides=["mean_field"], against=stuck(line())),
        (
            "No verdict: the chains disagree",
            "Chain 3 has hardly moved",
            "by draws that failed their checks, nothing below is to be relied on",
        ),
    ),
}


_LONG = ("a funnel", "switched labels", "tails heavier than any Gaussian's", "a posterior that is not there")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in _LONG else ()) for case in CASES]
)
def test_the_reports_sentence_appears(case: str) -> None:
    made, sentences = CASES[case]
    report: Report = render(made())
    for sentence in sentences:
        assert sentence in report.markdown.replace("\\|", "|"), sentence


def test_where_nothing_is_wrong_none_of_them_appears() -> None:
    told = {sentence for _, sentences in CASES.values() for sentence in sentences}
    text = render(study(line(), guides=["mean_field"])).markdown.replace("\\|", "|")
    assert not [sentence for sentence in told if sentence in text]
