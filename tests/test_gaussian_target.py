"""The known targets: densities, draws and evidence against SciPy and quadrature."""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from models import gaussian_target as targets
from toolkit import Dataset, Model, check, fit, reference

DRAWS = 40_000


def scipy_density(target: str, white: np.ndarray, log_scale: float) -> float:
    """The log density at a point of whitened space, L^-1 (z - loc), with respect to that space's own volume."""
    unit, origin = np.eye(len(white)), np.zeros(len(white))
    if target in ("student_t", "cauchy"):
        return float(scipy.stats.multivariate_t(origin, unit, df=1 if target == "cauchy" else 4).logpdf(white))
    if target == "two_modes":
        ends = [scipy.stats.multivariate_normal(sign * 4 * unit[0], unit).logpdf(white) for sign in (1, -1)]
        return float(np.logaddexp(*ends) - np.log(2))
    if target == "funnel":
        own = scipy.stats.multivariate_normal(origin, np.exp(log_scale) * unit).logpdf(white)
        return float(own + scipy.stats.norm(0, 3).logpdf(log_scale))
    return float(scipy.stats.multivariate_normal(origin, unit).logpdf(white))


@pytest.mark.parametrize("target", targets.TARGETS)
def test_the_density_is_the_one_written_down(target: str) -> None:
    data = targets.simulate(jax.random.key(1), dimensions=4, correlation=0.7)
    model = targets.model(data, target=target).in_chart("plain")
    loc, factor = data.arrays["loc"], data.arrays["scale_tril"]
    point = model.start(jax.random.key(2), model.arrays)
    white = np.array([0.3, -1.0, 0.2, 2.0])
    point["z"] = loc + factor @ white
    expected = scipy_density(target, white, float(point.get("log_scale", 0.0)))
    expected += -7.5 - np.linalg.slogdet(factor)[1]
    assert float(model.log_density(point, model.arrays)) == pytest.approx(expected, rel=1e-10)


def evidence(target: str) -> float:
    """By quadrature in one dimension, in the target's own units."""
    data = targets.simulate(jax.random.key(1), dimensions=1, correlation=0.0)
    model = targets.model(data, target=target)
    loc, scale = float(data.arrays["loc"][0]), float(data.arrays["scale_tril"][0, 0])
    # The substitution of tan brings the Cauchy's tails to a bounded interval.
    angles = np.linspace(-np.pi / 2, np.pi / 2, 40_003)[1:-1]
    z = loc + scale * np.tan(angles)
    log_density = jax.vmap(lambda one: model.log_density({"z": one[None]}, model.arrays))(z)
    return float(np.log(scipy.integrate.simpson(np.exp(log_density) * scale / np.cos(angles) ** 2, x=angles)))


@pytest.mark.parametrize("target", [name for name in targets.TARGETS if name != "funnel"])
def test_the_evidence_is_the_integral_of_the_density(target: str) -> None:
    assert evidence(target) == pytest.approx(-7.5, abs=1e-3)
    assert targets.model(target=target).log_evidence == -7.5


@pytest.mark.parametrize("target", targets.TARGETS)
def test_draws_are_draws_of_the_target(target: str) -> None:
    """Along every direction of whitened space, draws have the margin that the target says."""
    data = targets.simulate(jax.random.key(1), dimensions=3, correlation=0.9)
    model = targets.model(data, target=target)
    assert model.exact is not None
    drawn = {name: np.asarray(value) for name, value in model.exact(jax.random.key(5), DRAWS).items()}
    white = np.linalg.solve(data.arrays["scale_tril"], (drawn["z"] - data.arrays["loc"]).T).T
    if target == "funnel":
        white = np.column_stack([drawn["log_scale"] / 3, white / np.exp(0.5 * drawn["log_scale"])[:, None]])
    laws = {"student_t": scipy.stats.t(4), "cauchy": scipy.stats.cauchy()}
    for i, series in enumerate(white.T):
        law = laws.get(target, scipy.stats.norm())
        if target == "two_modes" and i == 0:
            series = np.where(series > 0, series - 4, series + 4)  # 8 apart: a draw is in the mode whose sign it has
        assert scipy.stats.kstest(series, law.cdf).pvalue > 1e-4
    correlations = scipy.stats.spearmanr(white).statistic
    assert (np.abs(correlations[np.triu_indices(white.shape[1], 1)]) < 5 / np.sqrt(DRAWS)).all()


def test_a_mode_s_share_of_the_draws_is_its_weight() -> None:
    model = targets.model(target="two_modes", weight=0.2, dimensions=2, correlation=0.0)
    assert model.exact is not None
    share = (np.asarray(model.exact(jax.random.key(0), DRAWS)["z"])[:, 0] > 0).mean()
    assert abs(share - 0.2) < 5 * np.sqrt(0.16 / DRAWS)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9, 0.99, 0.999])
def test_the_mean_field_lacks_half_the_log_of_one_minus_the_squared_correlation(correlation: float) -> None:
    fitted = fit(targets.model(dimensions=2, correlation=correlation), "mean_field", key=jax.random.PRNGKey(0))
    assert fitted.elbo is not None
    assert fitted.gap_limit is not None
    lacking = -7.5 - fitted.elbo.value + 0.5 * np.log(1 - correlation**2)
    assert -5 * fitted.elbo.se < lacking < fitted.gap_limit + 5 * fitted.elbo.se


def test_of_two_modes_a_gaussian_lacks_the_log_of_its_weight() -> None:
    model = targets.model(target="two_modes", weight=0.25, dimensions=3, separation=12.0)
    fitted = fit(model, "full_rank", key=jax.random.PRNGKey(0))
    assert fitted.elbo is not None
    best = max(optimum.value for optimum in fitted.optima)
    assert min(abs(-7.5 - best - gap) for gap in (-np.log(0.25), -np.log(0.75))) < 0.1


def test_every_guide_is_exact_on_the_funnel_without_its_neck() -> None:
    fitted = fit(targets.model(target="funnel", dimensions=4), "mean_field", key=jax.random.PRNGKey(0))
    assert fitted.elbo is not None
    assert abs(fitted.elbo.value + 7.5) < 0.1 + 5 * fitted.elbo.se


@pytest.mark.parametrize("target", targets.TARGETS)
def test_the_ladder_is_climbed_and_the_reference_is_exact(target: str) -> None:
    model = targets.model(target=target, dimensions=2)
    assert all(rung.passed for rung in check(model))
    drawn = reference(model, key=jax.random.PRNGKey(0), draws=100)
    assert drawn.status.name == "EXACT"
    assert drawn.draws["z"].shape == (4, 100, 2)


def test_simulate_draws_units_and_a_truth() -> None:
    first, again, other = (targets.simulate(jax.random.key(k), dimensions=7) for k in (0, 0, 1))
    np.testing.assert_array_equal(first.arrays["loc"], again.arrays["loc"])
    assert not np.array_equal(first.arrays["loc"], other.arrays["loc"])
    units = np.sqrt(np.diag(first.arrays["scale_tril"] @ first.arrays["scale_tril"].T))
    np.testing.assert_allclose(np.sort(units), np.geomspace(1e-3, 1e3, 7), rtol=1e-6)
    white = np.linalg.solve(first.arrays["scale_tril"], first.truth["z"] - first.arrays["loc"])
    assert (np.abs(white) < 5).all()


def _data(loc: Any, factor: Any, evidence: Any = 0.0) -> Dataset:
    return Dataset(
        "mine", {"loc": np.asarray(loc), "scale_tril": np.asarray(factor), "log_evidence": np.array(evidence)}
    )


ERRORS: dict[str, tuple[Callable[[], Model | Dataset], str]] = {
    "target": (lambda: targets.model(target="banana"), "one of normal, student_t, cauchy, two_modes, funnel; got 'ban"),
    "df": (lambda: targets.model(df=3.0), "df with target 'student_t' alone; got it with 'normal'"),
    "low df": (lambda: targets.model(target="student_t", df=0.0), "df above 0; got 0"),
    "separation": (lambda: targets.model(target="two_modes", separation=-1.0), "separation above 0; got -1"),
    "weight": (lambda: targets.model(target="two_modes", weight=1.0), "weight between 0 and 1; got 1"),
    "both": (lambda: targets.model(targets.dataset(), dimensions=3), "Expected a dataset, or dimensions"),
    "dimensions": (lambda: targets.model(dimensions=0), "at least 1 dimension; got 0"),
    "correlation": (lambda: targets.dataset(dimensions=3, correlation=-0.5), "above -0.5 and below 1; got -0.5"),
    "lacks": (lambda: targets.model(Dataset("mine", {"loc": np.zeros(2)})), "it lacks scale_tril, log_evidence"),
    "shapes": (lambda: targets.model(_data(np.zeros(2), np.eye(3))), "got shapes (2,), (3, 3) and ()"),
    "upper": (lambda: targets.model(_data(np.zeros(2), np.ones((2, 2)))), "lower triangular with a positive diagonal"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_misuse_gets_its_sentence(case: str) -> None:
    call, text = ERRORS[case]
    with pytest.raises(ValueError, match=re.escape(text)):
        call()
