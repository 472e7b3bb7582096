"""Natural-gradient steps, full-rank and in families whose covariance is not free, against optima that are known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.optimize
from targets import divergence, five, pair, skewed, skewed_gap

from toolkit import Dataset, Model, Status, fit
from toolkit.variational import gaussian_fits
from toolkit.variational.certificates import SETS, Scope, estimate_gap
from toolkit.variational.density import LogDensity
from toolkit.variational.gaussians import Diagonal, Frame, LowRank, Member, Quadratic, Triangular
from toolkit.variational.projection import project
from toolkit.variational.solvers import natural
from toolkit.variational.solvers.natural import FullRank, Gaussian, averaged_steps
from toolkit.variational.solvers.projected import Fitted, Projected, best_member

KEY = jax.random.PRNGKey(0)
CORRELATION = 0.9
FAMILIES = {
    "mean_field": Diagonal,
    "low_rank": lambda frame: LowRank(frame, 1),
    "wide_low_rank": lambda frame: LowRank(frame, 1, dense=False),
    "blocks": lambda frame: Triangular(
        frame, np.array([3, 1, 0, 2, 4]), np.kron(np.eye(3), np.ones((2, 2)))[:5, :5].astype(bool)
    ),
    "full_rank": Triangular,
}


# -- steps ------------------------------------------------------------------------------------------------------------


def least(name: str) -> float:
    """The least KL in nats of a family to the Gaussian in five dimensions, by SciPy from several members."""
    _, loc, precision = five()
    family, target = FAMILIES[name](Frame.of(loc, precision)), Quadratic(loc, np.zeros(5), precision)

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = family.exact(x, family.undrawn(x), target)
        return -value, -gradient

    rng = np.random.default_rng(0)
    begins = [scale * rng.standard_normal(family.parameters) for scale in (0.0, 0.3, 0.3, 0.3)]
    found = [scipy.optimize.minimize(loss, begin, jac=True, method="BFGS", options={"gtol": 1e-8}) for begin in begins]
    best = min(found, key=lambda one: one.fun)
    return divergence(family.member(best.x), loc, precision)


def begun(name: str, loc: np.ndarray, precision: np.ndarray) -> tuple[Projected, Fitted]:
    """Steps in a family, and its best for a Gaussian to begin with."""
    frame = Frame.of(loc, precision)
    family = FAMILIES[name](frame)
    at = Fitted(frame, family, np.zeros(family.parameters), Quadratic(loc, np.zeros(len(loc)), precision))
    return Projected(five()[0], FAMILIES[name], family.base), at


@pytest.mark.parametrize("name", FAMILIES)
def test_steps_from_afar_find_the_best_of_each_family(name: str) -> None:
    """Far off, and with a unit for all coordinates, whose own are a hundred apart: the frame must be changed."""
    _, loc, precision = five()
    rule, at = begun(name, loc + 3 * np.diag(precision) ** -0.5, np.diag(np.full(5, 4.0)))
    ended = averaged_steps(rule, at, key=KEY, draws=1_024, tolerance=0.02)
    assert ended.arrived
    assert ended.at.frame is not at.frame
    lacks = divergence(ended.at.family.member(ended.at.x), loc, precision) - least(name)
    assert -1e-6 < lacks < 0.02
    assert ended.gap < 0.01


def test_steps_stay_where_log_p_is_the_quadratic_they_began_with() -> None:
    _, loc, precision = five()
    rule, at = begun("low_rank", loc, precision)
    at = replace(at, x=best_member(at.family, at.x, at.quadratic))
    ended = averaged_steps(rule, at, key=KEY, draws=64, tolerance=0.1)
    assert ended.arrived
    assert len(ended.course) == 7
    assert divergence(ended.at.family.member(ended.at.x), loc, precision) - least("low_rank") < 1e-3
    assert np.ptp(ended.course) < 1e-3  # no draw's noise is left


@pytest.mark.parametrize("failing", [(2, 7), (3, 4, 5)])
def test_projected_steps_recover_from_bad_batches(failing: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    _, loc, precision = five()
    rule, at = begun("low_rank", loc + 3 * np.diag(precision) ** -0.5, np.diag(np.diag(precision)))
    look, calls = rule.look, []

    def sometimes(at: Fitted, base: np.ndarray) -> Any:
        calls.append(len(base))
        found = look(at, base)
        return replace(found, elbo=-np.inf) if len(calls) in failing else found

    monkeypatch.setattr(rule, "look", sometimes)
    ended = averaged_steps(rule, at, key=KEY, draws=512, tolerance=0.02)
    assert ended.arrived
    assert np.isinf(ended.course).sum() == len(failing)
    assert divergence(ended.at.family.member(ended.at.x), loc, precision) - least("low_rank") < 0.02


def test_a_density_that_is_nowhere_finite_ends_steps_at_once() -> None:
    def nowhere(y: Any) -> None:
        z = numpyro.sample("z", dist.Normal(0, 1).expand([5]).to_event(1))
        numpyro.factor("never", -np.inf * (z @ z))

    _, loc, precision = five()
    _, at = begun("low_rank", loc, precision)
    rule = Projected(LogDensity(Model(nowhere, Dataset("none", {"y": np.array(0.0)}))), FAMILIES["low_rank"], 5)
    ended = averaged_steps(rule, at, key=KEY, draws=64, tolerance=0.1)
    assert not ended.arrived
    assert ended.elbo == -np.inf
    assert len(ended.course) == 1


@pytest.mark.parametrize("bend", [-5.0, -0.5, 30.0])
def test_a_step_keeps_the_curvature_positive_and_within_bounds(bend: float) -> None:
    """What few draws see of a curvature may be bent upwards: then the mean goes as far as the bound, and no further."""
    _, loc, precision = five()
    rule, at = begun("mean_field", loc, precision)
    root = np.linalg.cholesky(precision)
    turned = root @ np.diag([bend, 1.0, 1.0, 1.0, 1.0]) @ root.T
    seen = replace(rule.look(at, np.zeros((4, 5))), quadratic=Quadratic(loc, np.zeros(5), turned))
    end = rule.step(at, seen, 0.9)
    values = scipy.linalg.eigh(end.quadratic.precision, precision, eigvals_only=True)
    expected = np.clip(0.1 + 0.9 * bend, 0.1, 20.0)
    np.testing.assert_allclose(np.sort(values), np.sort([expected, 1, 1, 1, 1]), rtol=1e-8)


# -- fits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guide", ["mean_field", "full_rank"])
def test_natural_gradients_find_a_skewed_optimum_and_say_how_far_it_is(
    guide: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gaussian_fits, "can_be_pinned", lambda form, size: False)
    model, starts = skewed()
    fitted = fit(model, guide, key=KEY, starts=starts, solver="natural_gradient")
    assert fitted.status is Status.ARRIVED
    assert fitted.certificate.scope is Scope.ESTIMATE
    gap = skewed_gap(fitted)
    assert 0 <= gap < 0.05
    assert abs(fitted.certificate.gap.value - gap) < 5 * fitted.certificate.gap.se + 0.5 * gap


def factors(loadings: Any) -> None:
    """A Gaussian whose covariance is a diagonal plus columns, and a skewed coordinate."""
    size = loadings.shape[0]
    z = numpyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (size + 1,)))
    covariance = dist.LowRankMultivariateNormal(np.zeros(size), loadings, np.ones(size))
    numpyro.factor("density", covariance.log_prob(z[:size]) + dist.Gumbel(0.0, 1.0).log_prob(z[size]))


def test_low_rank_in_high_dimension_is_found_by_natural_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussian_fits, "FIXED_LIMIT", 30)
    loadings = np.random.default_rng(0).standard_normal((30, 5))
    model = Model(factors, Dataset("factors", {"loadings": loadings}))
    fitted = fit(model, "low_rank", key=KEY, starts=1)
    assert fitted.solver == "natural_gradient"
    assert "in 31 dimensions no affordable set of fixed draws pins a low-rank covariance" in fitted.why
    assert fitted.status is Status.ARRIVED
    assert fitted.certificate.scope is Scope.ESTIMATE
    # Of a Gumbel's log density z + exp(-z) the mean over N(m, s^2) is known, so the best is known: m = s^2 / 2, s = 1.
    best = -(0.5 + 1.0) + 0.5 * (1 + math.log(2 * math.pi))
    assert abs(fitted.elbo.value - best) < 0.05 + 5 * fitted.elbo.se
    assert fitted.params["auto_cov_factor"].shape == (31, 6)


def test_natural_gradients_stop_where_dense_matrices_do() -> None:
    model = Model(factors, Dataset("factors", {"loadings": np.ones((1_600, 1))}))
    with pytest.raises(ValueError, match=r"Expected at most 1,500 dimensions for solver 'natural_gradient'; got 1,601"):
        fit(model, "mean_field", key=KEY, starts=1, solver="natural_gradient")


def test_natural_gradient_steps_end_with_a_bound_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    bounded = fit(pair(CORRELATION), "full_rank", key=KEY, starts=2, solver="natural_gradient")
    assert bounded.solver == "natural_gradient"
    assert bounded.certificate.scope is not Scope.ESTIMATE
    monkeypatch.setattr(gaussian_fits, "FIXED_LIMIT", 1)
    fitted = fit(pair(CORRELATION), "full_rank", key=KEY, starts=2, solver="natural_gradient")
    assert fitted.certificate.scope is Scope.ESTIMATE
    assert fitted.certificate.words.startswith("estimate from 4 sets of")
    assert fitted.certificate.sets == SETS
    assert abs(fitted.elbo.value) < fitted.certificate.limit + 5 * fitted.elbo.se + 1e-6


def test_natural_gradients_keep_to_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussian_fits, "FIXED_LIMIT", 1)
    model, starts = skewed()
    starts = replace(starts, points=starts.points[:1])
    courses = {}
    for steps in (2, 5, 1_000):  # of 1,024 gradients each
        budget = starts.gradient_evaluations + 1_024 * steps
        fitted = fit(model, "full_rank", key=KEY, starts=starts, solver="natural_gradient", max_gradients=budget)
        courses[steps] = len(fitted.traces[0].steps)
    assert courses[2] == 2
    assert courses[5] == 5
    assert 5 < courses[1_000] < 100


def test_natural_gradient_steps_recover_from_a_bad_batch_far_out(monkeypatch: pytest.MonkeyPatch) -> None:
    density, loc, precision = five()
    begin = Gaussian(loc + 300 * np.diag(precision) ** -0.5, np.diag(np.diag(precision) ** -0.5), -np.inf)
    slope, calls = natural._slope, []

    def failing(density: LogDensity, loc: np.ndarray, factor: np.ndarray, base: np.ndarray) -> Any:
        calls.append(len(base))
        found = slope(density, loc, factor, base)
        return replace(found, elbo=-np.inf) if len(calls) in (2, 7) else found

    monkeypatch.setattr(natural, "_slope", failing)
    ended = natural.averaged_steps(FullRank(density), begin, key=KEY, draws=256, tolerance=0.01)
    assert len(calls) < 120
    assert ended.gap < 0.01
    np.testing.assert_allclose(ended.at.loc, loc, atol=0.05 * np.diag(precision).min() ** -0.5)
    np.testing.assert_allclose(ended.at.precision, precision, rtol=0.1, atol=0.1 * np.abs(precision).max())


# -- estimates of what is left ----------------------------------------------------------------------------------------


def displaced(precision: np.ndarray, *, bent: float, moved: float) -> tuple[np.ndarray, np.ndarray]:
    """A factor and a shift in five dimensions, so far from the target's as is said, in its own units."""
    root = np.linalg.cholesky(np.linalg.inv(precision))
    rng = np.random.default_rng(1)
    factor = root @ np.tril(np.eye(5) + bent * rng.standard_normal((5, 5)))
    return factor, root @ (moved * rng.standard_normal(5))


def test_the_decrement_of_a_displaced_gaussian_is_its_closed_form() -> None:
    density, loc, precision = five()
    factor, shift = displaced(precision, bent=0.15, moved=0.2)
    pulled = factor.T @ precision @ shift
    bent = np.eye(5) - factor.T @ precision @ factor
    expected = 0.5 * pulled @ pulled + 0.25 * (bent**2).sum()
    certificate = estimate_gap(
        FullRank(density), Gaussian(loc + shift, factor, math.nan), key=KEY, draws=2_048, sets=16
    )
    assert expected > 0.1
    assert abs(certificate.gap.value - expected) < 5 * certificate.gap.se
    assert certificate.gap.se < 0.05 * expected
    assert certificate.limit > expected
    assert certificate.scope is Scope.ESTIMATE


def test_near_the_optimum_the_decrement_is_the_gap() -> None:
    density, loc, precision = five()
    factor, shift = displaced(precision, bent=0.02, moved=0.02)
    lacks = divergence(Member(loc + shift, factor=factor), loc, precision)
    certificate = estimate_gap(
        FullRank(density), Gaussian(loc + shift, factor, math.nan), key=KEY, draws=2_048, sets=16
    )
    assert lacks > 1e-3
    assert abs(certificate.gap.value - lacks) < 0.1 * lacks


def test_the_decrement_at_the_optimum_of_a_gaussian_has_no_noise() -> None:
    density, loc, precision = five()
    factor = np.linalg.cholesky(np.linalg.inv(precision))
    certificate = estimate_gap(FullRank(density), Gaussian(loc, factor, math.nan), key=KEY, draws=64)
    assert abs(certificate.gap.value) < 1e-12
    assert certificate.sets == SETS


@pytest.mark.parametrize("name", FAMILIES)
def test_the_decrement_of_a_displaced_member_is_what_its_family_still_gains(name: str) -> None:
    density, loc, precision = five()
    family = FAMILIES[name](Frame.of(loc, precision))
    target = Quadratic(loc, np.zeros(5), precision)
    best = best_member(family, np.zeros(family.parameters), target)
    x = best + 0.03 * np.random.default_rng(3).standard_normal(family.parameters)
    lacks = divergence(family.member(x), loc, precision) - divergence(family.member(best), loc, precision)
    assert lacks > 1e-3
    at = Fitted(Frame.of(loc, precision), family, x, target)
    rule = Projected(density, FAMILIES[name], family.base)
    certificate = estimate_gap(rule, at, key=KEY, draws=2_048)
    assert certificate.gap.value == pytest.approx(lacks, rel=0.15)
    assert certificate.scope is Scope.ESTIMATE


def test_a_decrement_has_no_bias_of_noise() -> None:
    """At the best of a skewed target the squares of noisy gradients are positive, their products zero in the mean."""
    model, starts = skewed()
    fitted = fit(model, "mean_field", key=KEY, starts=starts, tolerance=0.01)
    density = LogDensity(model)
    loc, scale = np.asarray(fitted.params["z_auto_loc"]), np.asarray(fitted.params["z_auto_scale"])
    around = Quadratic(loc, np.zeros(3), np.diag(scale**-2))
    flat = Frame.of(loc, scale**-2)
    near = project(density, Diagonal(flat), Member(loc, scale), around, key=KEY, draws=16_384)
    frame = Frame.of(loc, near.precision)
    family = Diagonal(frame)
    at = Fitted(frame, family, family.near(Member(loc, scale)), near)
    rule = Projected(density, Diagonal, 3)
    few = estimate_gap(rule, at, key=KEY, draws=16, sets=200)
    assert abs(few.gap.value - skewed_gap(fitted)) < 4 * few.gap.se
    looks = [rule.look(at, np.random.default_rng(number).standard_normal((16, 3))) for number in range(50)]
    squares = [rule.decrement(at, look, look) for look in looks]
    assert np.mean(squares) > 10 * few.gap.se
