"""Corrections of guides: right where theory says that they repair, refused where they cannot, with errors that hold."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from targets import line

import models
from toolkit import Fit, Model, Status, compare, fit, reference, study
from toolkit.comparison.comparisons import Comparison
from toolkit.comparison.corrections import RESAMPLED, Reweighted, corrections
from toolkit.comparison.metrics import metrics
from toolkit.modelling.space import latent_space
from toolkit.reporting.sections import what_repairs
from toolkit.variational.autoguides import gaussian_form
from toolkit.variational.linear_response import MOST_DIMENSIONS, linear_response

KEY = jax.random.PRNGKey(0)
TARGETS, REGRESSION = models.load("gaussian_target"), models.load("conjugate_regression")


def compared(model: Model, *guides: str, draws: int = 2_500) -> tuple[Comparison, list[Fit]]:
    fits = [fit(model, guide, key=KEY) for guide in guides]
    drawn = reference(model, key=KEY, draws=draws)
    return compare(model, drawn, fits, key=KEY, corrections=corrections(fits, key=KEY)), fits


def covariance_of(fitted: Fit) -> np.ndarray:
    form = gaussian_form(fitted.autoguide, latent_space(fitted.model, fitted.chart))
    assert form is not None
    return form.member(fitted.params).covariance()


# -- linear response --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correlation", [0.0, 0.9, 0.999])
def test_linear_response_is_exact_for_a_gaussian_in_any_units(correlation: float) -> None:
    data = TARGETS.simulate(KEY, dimensions=5, correlation=correlation)
    made = linear_response(fit(TARGETS.model(data), "mean_field", key=KEY), key=KEY)
    factor = data.arrays["scale_tril"]
    units = np.sqrt(np.diag(factor @ factor.T))
    found = covariance_of(made) / np.outer(units, units)
    np.testing.assert_allclose(found, factor @ factor.T / np.outer(units, units), rtol=1e-3, atol=1e-4)
    assert made.guide.name == "mean_field+lr"
    assert made.status is Status.ARRIVED
    assert made.certificate is None


def test_linear_response_repairs_most_of_a_logistic_regression() -> None:
    """Its sds were found within a few hundredths of the truth where the mean field's are too narrow by half."""
    module = models.load("collinear_logistic")
    model = module.model(module.simulate(jax.random.PRNGKey(1), rows=200, features=4, correlation=0.9))
    fitted, full = (fit(model, guide, key=KEY) for guide in ("mean_field", "full_rank"))
    wanted = np.sqrt(np.diag(covariance_of(full)))
    narrow = np.sqrt(np.diag(covariance_of(fitted))) / wanted
    repaired = np.sqrt(np.diag(covariance_of(linear_response(fitted, key=KEY)))) / wanted
    assert narrow[1:].max() < 0.7
    assert np.abs(np.log(repaired)).max() < 0.1


@pytest.mark.slow
def test_what_linear_response_cannot_correct_is_told() -> None:
    model = TARGETS.model(dimensions=2)
    with pytest.raises(ValueError, match="Expected a factorised Gaussian; 'full_rank' is none"):
        linear_response(fit(model, "full_rank", key=KEY), key=KEY)
    fitted = fit(model, "mean_field", key=KEY)
    with pytest.raises(ValueError, match="Expected a fit that has an optimum"):
        linear_response(replace(fitted, status=Status.UNBOUNDED), key=KEY)
    large = TARGETS.model(dimensions=MOST_DIMENSIONS + 1, correlation=0.0)
    with pytest.raises(ValueError, match="at most 200 dimensions; got 201"):
        linear_response(fit(large, "mean_field", key=KEY), key=KEY)


def test_a_fit_far_from_an_optimum_has_no_linear_response() -> None:
    """Between two modes the density bends upwards, and no covariance answers a tilt."""
    model = TARGETS.model(target="two_modes", dimensions=2, correlation=0.0)
    fitted = fit(model, "mean_field", key=KEY)
    params = {**fitted.params, "z_auto_loc": np.zeros(2), "z_auto_scale": np.full(2, 0.3)}
    made = linear_response(replace(fitted, params=params), key=KEY)
    assert made.status is Status.FAILED
    assert "no covariance's inverse" in made.message
    assert not made.usable


# -- importance weights -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_weights_repair_what_is_too_wide_or_skewed() -> None:
    """Full rank's noise is too narrow on a conjugate regression; weighted, it is not wrong."""
    found, _ = compared(REGRESSION.model(), "full_rank")
    assert found.guides.loc["full_rank", "verdict"] == "wrong"
    row = found.corrections.loc["full_rank+psis"]
    assert row["wrong"] == 0
    assert row["of"] == "full_rank"
    assert row["right"] >= 5


@pytest.mark.slow
def test_weights_that_cannot_repair_are_not_judged_and_say_why() -> None:
    found, _ = compared(REGRESSION.model(), "mean_field")
    for name in ("mean_field+psis", "mean_field+sir"):
        row = found.corrections.loc[name]
        assert (row["status"], row["verdict"]) == ("WEIGHTS", "")
        assert row["sentence"].startswith(
            "not judged: its importance weights rest on few draws and cannot repair it (k-hat"
        )
    section = what_repairs(found)
    assert section is not None
    assert "What would repair it?" in section.question


def test_equal_weights_change_nothing() -> None:
    fitted = fit(TARGETS.model(dimensions=2, correlation=0.0), "full_rank", key=KEY)
    plain, resampled, *_ = corrections([fitted], key=KEY)
    assert isinstance(plain, Reweighted)
    assert plain.khat == -math.inf or plain.khat < 0.7
    assert plain.chosen(KEY)[1].mean() < 1.01
    drawn = resampled.draw(KEY, 5, ("z",))["z"]
    assert drawn.shape == (RESAMPLED, 2)
    assert len(np.unique(drawn, axis=0)) > 0.99 * RESAMPLED  # one in ten of them, so that none repeats


@pytest.mark.parametrize("resampled", [False, True])
@pytest.mark.slow
def test_weights_bring_too_narrow_a_guide_to_the_posterior(resampled: bool) -> None:
    """Where some weights are large, draws repeat: taken only once each, they would stay near the guide."""
    model = TARGETS.model(dimensions=1, correlation=0.0)
    fitted = fit(model, "full_rank", key=KEY)
    narrow = replace(fitted, params={**fitted.params, "auto_scale_tril": fitted.params["auto_scale_tril"] / 1.5})
    assert model.exact is not None
    exact = np.asarray(model.exact(KEY, 40_000)["z"]).reshape(4, 10_000, 1)
    ratios = []
    for seed in range(10):
        made = corrections([narrow], key=jax.random.PRNGKey(seed))[int(resampled)]
        assert isinstance(made, Reweighted)
        assert 0.3 < made.khat < 0.7
        found = metrics(exact, made.draw(KEY, 0, ("z",))["z"], made.chosen(KEY)[1]).estimates["sd_ratio"]
        ratios.append((found[0][0], found[1][0]))
    values, errors = np.array(ratios).T
    assert values.mean() > 0.94  # smoothing leaves a little
    assert (np.abs(values - 1) < 5 * errors).all()


def test_weights_that_fail_are_a_row_and_no_crash() -> None:
    model = TARGETS.model(dimensions=2)
    fitted = fit(model, "full_rank", key=KEY)

    class Broken(Fit):
        def log_weights(self, key: Any, draws: int) -> np.ndarray:
            raise ValueError("no weights today")

    broken = Broken(**{name: value for name, value in vars(fitted).items() if not name.startswith("_")})
    found = compare(model, reference(model, key=KEY), [broken], key=KEY, corrections=corrections([broken], key=KEY))
    assert "none of them is finite" in found.corrections.loc["full_rank+psis", "sentence"]


@pytest.mark.parametrize("resampled", [False, True])
@pytest.mark.slow
def test_errors_of_weighted_draws_are_as_large_as_their_spread(resampled: bool) -> None:
    """Over keys, numbers of a known target scatter as their errors say; the guide is too wide, so that weights vary."""
    model = TARGETS.model(dimensions=2, correlation=0.5)
    fitted = fit(model, "full_rank", key=KEY)
    fitted = replace(fitted, params={**fitted.params, "auto_scale_tril": 1.5 * fitted.params["auto_scale_tril"]})
    assert model.exact is not None
    scores: dict[str, list[float]] = {"shift": [], "sd_ratio": [], "coverage_90": []}
    for seed in range(80):
        key = jax.random.PRNGKey(seed)
        made = corrections([fitted], key=key)[int(resampled)]
        assert isinstance(made, Reweighted)
        exact = np.asarray(model.exact(jax.random.fold_in(key, 9), 8_000)["z"]).reshape(4, 2_000, 2)
        found = metrics(exact, made.draw(key, 0, ("z",))["z"], made.chosen(key)[1])
        for name, expected in (("shift", 0.0), ("sd_ratio", 1.0), ("coverage_90", 0.9)):
            value, se = found.estimates[name]
            scores[name].append(float((value[0] - expected) / se[0]))
    for name, own in scores.items():
        assert abs(np.mean(own)) < 5 / math.sqrt(len(own)), name
        assert np.std(own) < 1 + 5 / math.sqrt(2 * len(own)), name
        # Systematic resampling errs less than independent draws, which the errors reckon with.
        assert np.std(own) > (0.3 if resampled else 1 - 5 / math.sqrt(2 * len(own))), name


def test_draws_that_repeat_have_larger_errors() -> None:
    rng = np.random.default_rng(0)
    reference_draws, guide = rng.standard_normal((4, 50_000, 1)), rng.standard_normal((1_250, 1))
    fourfold = np.repeat(guide, 4, axis=0)
    few, repeated = metrics(reference_draws, guide), metrics(reference_draws, fourfold, np.full(5_000, 4.0))
    for name in ("shift", "sd_ratio", "coverage_90", "wasserstein_1", "cdf_difference"):
        assert repeated.estimates[name][1][0] == pytest.approx(few.estimates[name][1][0], rel=0.2), name


# -- in a study -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_study_has_a_row_for_each_correction() -> None:
    done = study(REGRESSION.model(), guides=["mean_field", "full_rank"])
    names = ["mean_field+psis", "mean_field+sir", "mean_field+lr", "full_rank+psis", "full_rank+sir"]
    assert done.comparison.corrections.index.tolist() == names
    assert any("full_rank, importance-weighted" in text for text in done.comparison.advice)


def test_only_what_has_a_density_is_corrected() -> None:
    fitted = fit(line(), "map", key=KEY)
    assert corrections([fitted], key=KEY) == ()
    failed: Any = Fit(fitted.guide, fitted.model, Status.FAILED)
    assert corrections([failed], key=KEY) == ()
    assert what_repairs(compared(line(), "map")[0]) is None
