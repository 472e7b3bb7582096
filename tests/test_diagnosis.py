"""A fit diagnosed without a reference: short chains find what is wrong, by how much at least; what they cannot see."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest
from targets import line, two_clusters, two_means
from typer.testing import CliRunner

import models
from toolkit import Fit, Model, Status, Thresholds, Verdict, compare, diagnose, fit, reference
from toolkit.cli import app
from toolkit.comparison.diagnosis import RECORD, Diagnosis, _sentence, predicted_verdicts, vsbc
from toolkit.modelling.points import points
from toolkit.variational.short_chains import short_chains

KEY = jax.random.PRNGKey(0)
TARGETS, REGRESSION = models.load("gaussian_target"), models.load("conjugate_regression")


def diagnosed(model: Model, guide: str, **options: Any) -> Diagnosis:
    return diagnose(fit(model, guide, key=KEY), key=jax.random.PRNGKey(1), **options)


# -- short chains -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guide", ["mean_field", "full_rank"])
def test_chains_that_begin_at_a_fit_end_at_the_posterior(guide: str) -> None:
    """In units from 0.001 to 1,000, from a guide that is too narrow by the known amount and from one that is right."""
    data = TARGETS.simulate(KEY, dimensions=5, correlation=0.95)
    model = TARGETS.model(data)
    moved = short_chains(fit(model, guide, key=KEY), key=jax.random.PRNGKey(2))
    white = np.linalg.solve(data.arrays["scale_tril"], (moved.end - data.arrays["loc"]).T).T
    error = 5 / math.sqrt(len(white))
    assert np.abs(white.mean(axis=0)).max() < error
    assert np.abs(np.cov(white.T) - np.eye(5)).max() < 1.5 * error
    assert 0.5 < moved.acceptance.mean() < 0.99
    assert moved.uneven < 0.01
    begun = np.linalg.solve(data.arrays["scale_tril"], (moved.start - data.arrays["loc"]).T).T
    assert bool(np.abs(np.cov(begun.T) - np.eye(5)).max() < 1.5 * error) is (guide == "full_rank")


@pytest.mark.slow
def test_chains_leave_the_posterior_as_it_is() -> None:
    """Begun at exact draws of a skewed posterior, they end at draws of it."""
    model = REGRESSION.model()
    assert model.exact is not None
    exact = {name: np.asarray(v) for name, v in model.exact(KEY, 2_000).items()}

    class Exact(Fit):
        def draw(self, key: Any, draws: int, sites: Any = None) -> Any:
            return exact

    fitted = fit(model, "full_rank", key=KEY)
    moved = short_chains(Exact(**vars(fitted)), key=jax.random.PRNGKey(3), transitions=20)
    begun = points(model, exact).vectors
    np.testing.assert_allclose(moved.start, begun)
    sd = begun.std(axis=0)
    assert (np.abs(moved.end - begun) > 1e-6).any(axis=1).mean() > 0.99
    assert np.abs((moved.end.mean(axis=0) - begun.mean(axis=0)) / sd).max() < 5 * math.sqrt(2 / 2_000)
    assert np.abs(np.log(moved.end.std(axis=0) / sd)).max() < 5 * math.sqrt(1 / 2_000)


# -- the diagnosis ----------------------------------------------------------------------------------------------------


def test_a_mean_field_is_found_too_narrow_by_at_least_what_is_true() -> None:
    found = diagnosed(TARGETS.model(dimensions=3, correlation=0.9), "mean_field")
    assert found.verdict is Verdict.WRONG
    assert found.sentence.startswith("no: 3 of 3 too narrow")
    assert (found.forgotten < 0.1).all()
    precision = np.linalg.inv(0.1 * np.eye(3) + 0.9)
    true = -0.5 * math.log(precision[0, 0])  # of log sd, against a truth of sd 1
    rows = found.table[found.table["metric"] == "sd_ratio"]
    assert ((rows["least"] > 0.8 * abs(true)) & (rows["least"] < abs(true))).all()


def test_an_exact_guide_is_predicted_to_be_right() -> None:
    found = diagnosed(TARGETS.model(dimensions=3, correlation=0.9), "full_rank")
    assert found.verdict is Verdict.RIGHT
    assert set(predicted_verdicts(found).values()) == {Verdict.RIGHT}
    assert found.table["least"].dropna().max() < 0.05
    assert any(text.startswith("arrival: ") and "at most" in text for text in found.evidence)


def test_what_has_not_been_forgotten_is_not_predicted_right() -> None:
    found = diagnosed(TARGETS.model(dimensions=3, correlation=0.9), "full_rank")
    still = replace(found, forgotten=found.forgotten + 0.5)
    assert Verdict.RIGHT not in predicted_verdicts(still).values()
    said = _sentence(still.fit, still.table, predicted_verdicts(still), still.forgotten, 0.0)
    assert "in 3 of 3 quantities they have not forgotten where they began" in said


@pytest.mark.parametrize("guide", ["mean_field", "full_rank"])
@pytest.mark.slow
def test_in_the_neck_of_a_funnel_nothing_is_predicted(guide: str) -> None:
    """There chains move single numbers the wrong way, long after they have forgotten where they began."""
    model = TARGETS.model(target="funnel", dimensions=1).in_chart("plain")
    found = diagnosed(model, guide)
    assert found.uneven > 0.02
    assert found.verdict is Verdict.CANNOT_TELL
    assert (
        found.sentence
        == "cannot tell: short chains do not mix here, as in the neck of a funnel; another chart may help"
    )
    assert found.table["least"].isna().all()
    assert set(predicted_verdicts(found).values()) == {Verdict.CANNOT_TELL}
    assert diagnosed(TARGETS.model(target="funnel", dimensions=1), guide).uneven < 0.02  # in its other chart


@pytest.mark.slow
def test_under_heavy_tails_what_is_certain_is_less_than_the_truth() -> None:
    model = TARGETS.model(target="cauchy", dimensions=2)
    fitted = fit(model, "full_rank", key=KEY)
    found = diagnose(fitted, key=KEY)
    assert found.verdict is Verdict.WRONG
    truth = compare(model, reference(model, key=KEY, draws=5_000), [fitted], key=KEY).table
    for quantity in ("z[1]", "z[2]"):
        rows = [t[(t["quantity"] == quantity) & (t["metric"] == "spread_ratio")].iloc[0] for t in (found.table, truth)]
        assert rows[0]["least"] < abs(math.log(rows[1]["value"])) + 3 * rows[1]["se"] / rows[1]["value"]


def test_a_point_has_nothing_to_be_judged() -> None:
    assert diagnosed(line(), "map").sentence.startswith("nothing can be said: it is a point")


def test_another_mode_is_not_seen_and_that_is_said() -> None:
    found = diagnosed(TARGETS.model(target="two_modes", dimensions=2, separation=20.0), "full_rank")
    assert found.verdict is Verdict.RIGHT  # of the mode that it sits on: no chain leaves it
    assert "a mode to which none of them went is not seen" in " ".join(found.evidence)
    fitted = fit(TARGETS.model(target="two_modes", dimensions=2, separation=20.0), "full_rank", key=KEY)
    assert found.optima == len(fitted.optima)


def test_switched_labels_are_matched_before_anything_is_judged() -> None:
    found = diagnosed(two_means(two_clusters(6.0)), "full_rank")
    assert found.verdict is Verdict.RIGHT, found.sentence


def test_a_fit_that_has_not_arrived_is_never_predicted_right() -> None:
    fitted = fit(TARGETS.model(dimensions=2), "full_rank", key=KEY)
    found = diagnose(replace(fitted, status=Status.BUDGET), key=KEY)
    assert found.verdict is Verdict.CANNOT_TELL
    assert found.sentence.startswith("cannot tell: nothing is wrong where short chains went, but the optimiser used up")
    nothing = diagnose(Fit(fitted.guide, fitted.model, Status.FAILED, "an error"), key=KEY)
    assert nothing.verdict is None
    assert nothing.sentence == "nothing can be said: an error stopped it (an error)"
    assert predicted_verdicts(nothing) == {}


def test_thresholds_are_the_user_s() -> None:
    loose = Thresholds(sd_ratio=(0.2, 5.0), coverage_90=(0.05, 0.99), shift=0.5)
    assert diagnosed(TARGETS.model(dimensions=2), "mean_field", thresholds=loose).verdict is Verdict.RIGHT


@pytest.mark.parametrize("options", [{"chains": 10}, {"transitions": 9}])
def test_too_little_is_misuse(options: dict[str, int]) -> None:
    fitted = fit(line(), "mean_field", key=KEY)
    with pytest.raises(ValueError, match="Expected at least 32 chains of at least 10 transitions; got"):
        diagnose(fitted, key=KEY, **options)


# -- calibration over simulated data ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_vsbc_is_numpyro_s_with_holm_s_correction() -> None:
    fitted = fit(line(), "mean_field", key=KEY)
    found = vsbc(fitted, 20, key=KEY)
    assert found["quantity"].tolist() == ["a", "b"]
    assert found["p_value"].between(0, 1).all()
    assert not found["fallen"].any()
    with pytest.raises(ValueError, match="Expected a model that can draw its data for VSBC; nothing is observed"):
        vsbc(fit(TARGETS.model(dimensions=2), "mean_field", key=KEY), 20, key=KEY)


def test_the_record_is_that_of_the_table() -> None:
    table = pd.read_csv(Path(__file__).parent.parent / "benchmarks" / "predictions.csv")
    fits = table.groupby(["posterior", "seed", "guide"])[["predicted", "by_reference"]].agg(
        lambda own: "wrong" if "wrong" in set(own) else "right" if set(own) == {"right"} else "cannot tell"
    )
    for verdict, record in RECORD.items():
        own = fits[(fits["predicted"] == verdict) & fits["by_reference"].isin(["right", "wrong"])]
        assert record == (len(own), int((own["by_reference"] == verdict).sum()))
    said = diagnosed(line(), "full_rank").sentence
    assert f"of {RECORD['right'].predicted} fits to known posteriors that were predicted right" in said


def test_the_command_predicts_without_nuts(tmp_path: Any) -> None:
    out = tmp_path / "more" / "numbers.csv"
    result = CliRunner().invoke(
        app,
        [
            "check-fit",
            "gaussian_target",
            "--option",
            "dimensions=2",
            "--guides",
            "mean_field,full_rank",
            "--out",
            str(out),
        ],
    )
    assert result.exit_code == 0, result.output
    assert "mean_field     no: 2 of 2 too narrow" in result.output
    assert "full_rank      yes: both quantities are right" in result.output
    assert out.read_text().startswith("guide,quantity,metric,value,se,verdict,more_draws,least")
    wrong = CliRunner().invoke(app, ["check-fit", "gaussian_target", "--threshold", "shift"])
    assert wrong.exit_code == 2
