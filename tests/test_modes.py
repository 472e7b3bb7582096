"""Several modes and switched labels are told for what they are, and only where they are."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from targets import two_clusters, two_means

import models
from toolkit import Dataset, Model, Status, as_reference, reference

KEY = jax.random.PRNGKey(0)
TARGETS = models.load("gaussian_target")


def test_nuts_that_sits_in_two_modes_is_told() -> None:
    model = TARGETS.model(target="two_modes", dimensions=2, separation=20.0)
    drawn = reference(model, key=KEY, chains=6, warmup=300, draws=500, force=True)
    assert drawn.status is Status.RHAT
    text = " ".join(drawn.reasons)
    assert "each agree with themselves and not with each other: z[" in text
    assert "The posterior has several modes, and these chains do not tell how much of it lies in each." in text
    assert "labels have switched" not in text


def test_switched_labels_are_told_with_what_to_declare() -> None:
    model = replace(two_means(two_clusters(8.0)), labels=None)
    drawn = reference(model, key=KEY, chains=6, warmup=300, draws=500)
    assert drawn.status is Status.RHAT
    assert (
        "In another order of the 2 elements of 'means' the chains agree: its labels have switched." in drawn.reasons[-1]
    )
    assert "Labels({'means': -1, ...}, by='means', count=2)" in drawn.reasons[-1]
    declared = reference(two_means(two_clusters(8.0)), key=KEY, chains=6, warmup=300, draws=500)
    assert declared.status is Status.PASSED, declared.reasons


def one(y: Any = None) -> None:
    numpyro.sample("m", dist.Normal(0.0, 10.0).expand([3]).to_event(1))
    numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ("stuck", False),  # one chain has not moved at all
        ("drifting", False),  # no chain agrees with itself
        ("near", False),  # they disagree, and what lies between them was visited
        ("modes", True),
    ],
)
def test_only_chains_that_agree_with_themselves_are_modes(shape: str, told: bool) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((4, 1_000, 3))
    if shape == "stuck":
        values[2] = values[2, :1]
    elif shape == "drifting":
        values += np.linspace(0, 20, 1_000)[None, :, None] * np.array([1.0, -1.0, 0.5, 2.0])[:, None, None]
    else:
        values[1, :, 1] += {"near": 1.0, "modes": 9.0}[shape]
    found = as_reference({"m": values}, Model(one, Dataset("one", {"y": np.array(0.0)})))
    assert found.status is Status.RHAT
    sentences = [text for text in found.reasons if "agree with themselves" in text]
    assert bool(sentences) is told
    if shape == "stuck":
        assert "Chain 3 has hardly moved: in half of all scalars its sd is below 5% of the other chains'" in " ".join(
            found.reasons
        )
    if told:
        assert sentences[0].startswith("Chains 1, 3 and 4 and Chain 2 each agree")
        assert "m[1] lies near" in sentences[0]
