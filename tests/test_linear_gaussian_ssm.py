"""The linear-Gaussian state space: Kalman against dense matrices, the Nile's known figures, simulation, misuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from scipy.optimize import minimize

import models
from models._kalman import KalmanSmoother
from toolkit import Dataset, check, fit, reference

SSM = models.load("linear_gaussian_ssm")
STEPS = 40
COEFFICIENTS = [(1.0,), (0.9,), (1.2, -0.3), (0.5, 0.2, 0.1)]


def dense(smoother: KalmanSmoother) -> tuple[np.ndarray, np.ndarray]:
    """The precision of the levels given the data, and the covariance of the data."""
    apart = np.eye(smoother.steps)
    for back, coefficient in enumerate(smoother.coefficients, 1):
        apart -= coefficient * np.eye(smoother.steps, k=-back)
    news = np.r_[smoother.initial_sd, np.full(smoother.steps - 1, smoother.level_sd)] ** -2.0
    prior = apart.T @ (news[:, None] * apart)
    seen = np.eye(smoother.steps) * smoother.observation_sd**2
    return prior + np.linalg.inv(seen), np.linalg.inv(prior) + seen


@pytest.mark.parametrize("coefficients", COEFFICIENTS, ids=str)
def test_kalman_is_the_dense_gaussian(coefficients: tuple[float, ...]) -> None:
    smoother = KalmanSmoother(STEPS, coefficients, 0.5, 2.0, 1.0)
    y = np.random.default_rng(0).normal(size=STEPS)
    precision, of_data = dense(smoother)
    covariance = np.linalg.inv(precision)
    np.testing.assert_allclose(smoother.mean(y), covariance @ y, atol=1e-12)
    np.testing.assert_allclose(smoother.variance, np.diag(covariance), atol=1e-12)
    evidence = -0.5 * (y @ np.linalg.solve(of_data, y) + np.linalg.slogdet(2 * np.pi * of_data)[1])
    assert smoother.log_evidence(y) == pytest.approx(evidence)
    drawn = smoother.draw(jax.random.key(0), 20_000, y)
    sds = np.sqrt(np.diag(covariance))
    assert (np.abs(drawn.mean(0) - covariance @ y) < 5 * sds / 20_000**0.5).all()
    reach = np.sqrt((np.outer(sds, sds) ** 2 + covariance**2) / 20_000)
    assert (np.abs(np.cov(drawn.T) - covariance) < 5 * reach).all()


def test_the_nile_s_scales_are_those_of_maximum_likelihood() -> None:
    """Durbin & Koopman (2012), section 2.10.3: variances 15,099 and 1,469 where the first level is diffuse."""
    y = SSM.flows()["volume"].to_numpy(float)

    def loss(logs: np.ndarray) -> float:
        observation, level = np.exp(logs)
        # Of all but the first year, which a diffuse start takes for itself.
        smoother = KalmanSmoother(len(y), (1.0,), level, 1e5, observation)
        return -smoother.log_evidence(y - y.mean())

    found = np.exp(minimize(loss, np.log([100.0, 50.0]), method="Nelder-Mead").x)
    np.testing.assert_allclose(found**2, [15_099, 1_469.1], rtol=2e-3)
    np.testing.assert_allclose([SSM.OBSERVATION_SD, SSM.LEVEL_SD], found, rtol=2e-3)


def test_the_callable_s_density_is_the_exact_posterior_and_evidence() -> None:
    """Log p(x, z) - log p(z | x) is the log evidence wherever it is looked at."""
    bound = SSM.model()
    drawn = bound.exact(jax.random.key(1), 5)["level"] if bound.exact else np.empty(0)
    smoother = KalmanSmoother(100, (1.0,), SSM.LEVEL_SD, SSM.INITIAL_SD, SSM.OBSERVATION_SD)
    precision, _ = dense(smoother)
    apart = drawn - SSM.MEAN - smoother.mean(bound.dataset.arrays["y"] - SSM.MEAN)
    log_posterior = 0.5 * np.linalg.slogdet(precision / (2 * np.pi))[1] - 0.5 * np.einsum(
        "ni,ij,nj->n", apart, precision, apart
    )
    log_joint = [float(bound.log_density({"level": level}, bound.arrays)) for level in drawn]
    np.testing.assert_allclose(log_joint - log_posterior, bound.log_evidence, rtol=1e-10)


def test_a_mean_field_lacks_the_known_amount_and_has_the_precision_s_diagonal() -> None:
    bound = SSM.model()
    precision, _ = dense(KalmanSmoother(100, (1.0,), SSM.LEVEL_SD, SSM.INITIAL_SD, SSM.OBSERVATION_SD))
    lacking = 0.5 * (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1])
    fitted = fit(bound, "mean_field", key=jax.random.key(0))
    assert fitted.elbo is not None
    assert bound.log_evidence is not None
    limit = fitted.gap_limit or 0.0
    assert abs(bound.log_evidence - fitted.elbo.value - lacking) < 5 * fitted.elbo.se + limit
    np.testing.assert_allclose(fitted.params["level_auto_scale"], np.diag(precision) ** -0.5, rtol=0.02)


@pytest.mark.slow
def test_nuts_is_right_on_the_exact_posterior() -> None:
    bound = SSM.model(SSM.simulate(jax.random.key(2), steps=30))
    nuts = reference(bound, key=jax.random.key(3), chains=4, warmup=500, draws=1_000, force=True)
    assert nuts.status.ok
    smoother = KalmanSmoother(30, (1.0,), SSM.LEVEL_SD, SSM.INITIAL_SD, SSM.OBSERVATION_SD)
    mean = SSM.MEAN + smoother.mean(bound.dataset.arrays["y"] - SSM.MEAN)
    drawn, ess = nuts.draws["level"], nuts.diagnostics.loc[[f"level[{t}]" for t in range(1, 31)], "ess_bulk"]
    assert (np.abs(drawn.mean((0, 1)) - mean) < 5 * np.sqrt(smoother.variance / ess.to_numpy())).all()


@pytest.mark.parametrize("scales", SSM.SCALES)
def test_simulated_data_have_their_truth(scales: str) -> None:
    data = SSM.simulate(jax.random.key(4), steps=50, scales=scales, coefficients=(0.8,))
    truth = data.truth
    assert truth["level"].shape == (50,)
    assert float(truth["average"]) == pytest.approx(truth["level"].mean())
    assert float(truth["total_change"]) == pytest.approx(truth["level"][-1] - truth["level"][0])
    assert set(truth) - {"level", "average", "total_change"} == (
        {"observation_sd", "level_sd"} if scales == "unknown" else set()
    )
    bound = SSM.model(data, scales=scales, coefficients=(0.8,))
    assert all(rung.passed for rung in check(bound))
    assert (bound.exact is None) == (scales == "unknown")


def test_with_known_scales_it_says_that_it_is_log_concave() -> None:
    assert SSM.model().log_concave
    assert not SSM.model(scales="unknown").log_concave


MISUSE: dict[str, tuple[Callable[[], Any], str]] = {
    "scales": (lambda: SSM.model(scales="guessed"), "Expected scales to be one of known, unknown; got 'guessed'"),
    "coefficients": (lambda: SSM.model(coefficients=()), "Expected coefficients to be finite numbers, at least one"),
    "not numbers": (lambda: SSM.model(coefficients="1.0"), "Expected coefficients to be finite numbers"),
    "sd": (lambda: SSM.model(level_sd=0.0), "Expected level_sd above 0; got 0.0"),
    "steps": (lambda: SSM.simulate(jax.random.key(0), steps=1), "Expected at least 2 steps of time; got 1"),
    "no y": (lambda: SSM.model(Dataset("d", {"x": np.ones(3)})), "Expected an array y in dataset 'd'; got x"),
    "shape": (
        lambda: SSM.model(Dataset("d", {"y": np.ones((3, 2))})),
        r"Expected y as \(time,\) with at least 2 steps",
    ),
    "missing": (
        lambda: SSM.model(Dataset("d", {"y": np.array([1.0, np.nan])})),
        "Expected finite numbers in data array 'y'; got 1 NaN or infinite of 2",
    ),
    "static": (
        lambda: SSM.model(Dataset("d", {"y": np.ones(3)}, static={"steps": 4})),
        "Expected static steps to be the length of y, 3; got 4",
    ),
}


@pytest.mark.parametrize(("call", "text"), MISUSE.values(), ids=MISUSE)
def test_misuse_is_told(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()
