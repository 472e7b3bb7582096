"""Natural-gradient steps, full-rank and in families whose covariance is not free, against optima that are known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.linalg
import scipy.optimize
from targets import divergence, five, pair, skewed, skewed_best, skewed_elbo, skewed_gap

from toolkit import Dataset, Model, Status, fit
from toolkit.modelling.space import latent_space
from toolkit.variational import gaussian_fits, gaussian_optima, gaussian_proofs
from toolkit.variational.autoguides import GaussianForm
from toolkit.variational.building import build_guide
from toolkit.variational.certificates import SETS, Scope, estimate_gap
from toolkit.variational.density import LogDensity
from toolkit.variational.fitting import choose_solver
from toolkit.variational.gaussians import Diagonal, Frame, LowRank, Member, Quadratic, Triangular
from toolkit.variational.guides import find_guide
from toolkit.variational.projection import project
from toolkit.variational.solvers import natural
from toolkit.variational.solvers.natural import FullRank, Gaussian, Taken, averaged_steps
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
    assert ended.at is at
    np.testing.assert_array_equal(ended.course, [-np.inf])


@pytest.mark.parametrize("bend", [-5.0, -0.5, 60.0])
def test_a_step_keeps_the_curvature_positive_and_within_bounds(bend: float) -> None:
    """What few draws see of a curvature may be bent upwards: then the mean goes as far as the bound, and no further."""
    _, loc, precision = five()
    rule, at = begun("mean_field", loc, precision)
    root = np.linalg.cholesky(precision)
    turned = root @ np.diag([bend, 1.0, 1.0, 1.0, 1.0]) @ root.T
    seen = replace(rule.look(at, np.zeros((4, 5))), quadratic=Quadratic(loc, np.zeros(5), turned))
    for rate in (1 / 3, 1 / 100):
        end = rule.step(at, seen, rate)
        values = scipy.linalg.eigh(end.quadratic.precision, precision, eigvals_only=True)
        expected = np.clip(1 + rate * (bend - 1), 0.6, 8.0)
        np.testing.assert_allclose(np.sort(values), np.sort([expected, 1, 1, 1, 1]), rtol=1e-8)
    assert expected == 1 + (bend - 1) / 100, "at small rates no bound acts, so that noise averages out"


@pytest.mark.parametrize("exchanged", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_product_of_a_step_and_a_gradient_is_by_the_inverse_curvature(name: str, exchanged: bool) -> None:
    """Half of g' H^-1 h, with g what moved the step, and h a gradient at its end, whatever frame that is in."""
    _, loc, precision = five()
    rule, at = begun(name, loc, precision)
    at = replace(at, x=best_member(at.family, at.x, at.quadratic))
    rng = np.random.default_rng(2)

    def seen(at: Fitted, size: float) -> Any:
        """A slope whose quadratic is a little off, in all that it has."""
        noise = np.linalg.cholesky(precision) @ rng.standard_normal((5, 6)) * size
        bent = noise[:, :5] @ np.linalg.cholesky(precision).T
        near = Quadratic(loc, noise[:, 5], precision + (bent + bent.T) / 2)
        gradient = at.family.exact(at.x, at.family.undrawn(at.x), near)[1]
        return replace(rule.look(at, np.zeros((4, at.family.base))), quadratic=near, gradient=gradient)

    first, rate = seen(at, 0.02), 0.1
    end = rule.step(at, first, rate)
    if exchanged:
        other = FAMILIES[name](Frame.of(loc, 2 * precision))
        end = replace(end, family=other, x=other.near(end.family.undrawn(end.x)))
    second = seen(end, 0.02)
    here = second.gradient if not exchanged else None
    if here is None:  # the same gradient in the first frame's parameters
        back = at.family.near(end.family.undrawn(end.x))
        here = at.family.exact(back, at.family.undrawn(back), second.quadratic)[1]
    hessian = np.stack(
        [
            (
                at.family.exact(at.x - step, at.family.undrawn(at.x - step), at.quadratic)[1]
                - at.family.exact(at.x + step, at.family.undrawn(at.x + step), at.quadratic)[1]
            )
            / 2e-5
            for step in 1e-5 * np.eye(at.family.parameters)
        ]
    )
    expected = 0.5 * here @ np.linalg.lstsq(hessian, first.gradient, rcond=1e-6)[0]
    size = 0.5 * first.gradient @ np.linalg.lstsq(hessian, first.gradient, rcond=1e-6)[0]
    assert abs(rule.product(Taken(at, first, rate, end), second) - expected) < 0.1 * size


class Recorded(Projected):
    """Steps on a skewed target by a mean field, and the true gap of each member that was looked at."""

    def __init__(self) -> None:
        super().__init__(LogDensity(skewed()[0]), Diagonal, 3)
        self.gaps: list[float] = []

    def look(self, at: Fitted, base: np.ndarray) -> Any:
        """The slope, and a record of the gap."""
        member = at.family.member(at.x)
        with np.errstate(over="ignore"):
            self.gaps.append(skewed_best("mean_field") - skewed_elbo(member.loc, np.diag(member.scale)))
        return super().look(at, base)


def wide_start() -> Fitted:
    frame = Frame.of(np.zeros(3), np.eye(3))
    return Fitted(frame, Diagonal(frame), np.zeros(6), Quadratic(np.zeros(3), np.zeros(3), np.eye(3)))


@pytest.mark.slow
def test_rates_fall_so_that_the_mean_over_steps_gets_ever_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(natural, "_ENOUGH", -math.inf)

    def ended(steps: int, seed: int) -> float:
        rule = Recorded()
        averaged_steps(rule, wide_start(), key=jax.random.PRNGKey(seed), draws=32, tolerance=0.1, most=steps)
        return rule.gaps[-1]

    early, late = (np.mean([ended(steps, seed) for seed in range(8)]) for steps in (20, 200))
    assert late < early / 4  # ten times the draws; at a constant rate noise would keep it where it was


def independent(shape: Any) -> None:
    """Log-gamma densities, one for each coordinate."""
    z = numpyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (shape.shape[0],)))
    numpyro.factor("density", (shape * z - jnp.exp(z)).sum())


@pytest.mark.slow
def test_the_gap_that_steps_tell_is_a_mean_of_those_along_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once what a later iterate shares of the earlier noise is put back, which is as large as the gap itself."""
    monkeypatch.setattr(natural, "_ENOUGH", -math.inf)
    shape = np.full(100, 2.0)
    density = LogDensity(Model(independent, Dataset("independent", {"shape": shape})))
    frame = Frame.of(np.full(100, math.log(2) - 0.25), np.diag(shape))  # the best one
    best = Fitted(frame, Diagonal(frame), np.zeros(200), Quadratic(frame.loc, np.zeros(100), frame.precision))

    def gap(at: Fitted) -> float:
        """In closed form: the mean of exp(z) over a Gaussian is known."""
        member = at.family.member(at.x)
        elbos = [
            (shape * one.loc - np.exp(one.loc + one.scale**2 / 2) + np.log(one.scale)).sum()
            for one in (Member(frame.loc, shape**-0.5), member)
        ]
        return float(elbos[0] - elbos[1])

    found, true, shares = [], [], []
    for seed in range(24):
        rule = Projected(density, Diagonal, 100)
        look, product = rule.look, rule.product
        gaps, squares = [], []

        def looking(at: Fitted, base: np.ndarray, look: Any = look, gaps: list[float] = gaps) -> Any:
            gaps.append(gap(at))
            return look(at, base)

        def taking(taken: Any, slope: Any, product: Any = product, squares: list[float] = squares) -> float:
            value = product(taken, slope)
            if slope is taken.slope:
                squares.append(taken.rate * value)
            return value

        monkeypatch.setattr(rule, "look", looking)
        monkeypatch.setattr(rule, "product", taking)
        ended = averaged_steps(rule, best, key=jax.random.PRNGKey(seed), draws=128, tolerance=0.1, most=40)
        half = ended.near // 2
        found.append(ended.gap)
        true.append(np.mean(gaps[-half - 1 : -1]))  # each product speaks of the member before
        shares.append(np.mean(squares[-half:]))
    error = 4 * np.std(np.array(found) - true) / len(found) ** 0.5
    assert error < 0.5 * np.mean(shares)
    # To second order: where the target is skewed its own curvature is not quite that of its projection.
    assert abs(np.mean(found) - np.mean(true)) < error + 0.2 * np.mean(shares)


def test_a_step_that_lowers_the_elbo_is_taken_again_at_half_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    rule, rates = Recorded(), []
    step = rule.step

    def leaping(at: Fitted, slope: Any, rate: float) -> Fitted:
        rates.append(rate)
        end = step(at, slope, rate)
        return replace(end, x=end.x + 1.5) if len(rates) in (3, 4) else end

    monkeypatch.setattr(rule, "step", leaping)
    ended = averaged_steps(rule, wide_start(), key=KEY, draws=1_024, tolerance=0.02)
    assert ended.arrived
    assert rule.gaps[3] > 1 + rule.gaps[2]
    assert rule.gaps[4] > 1 + rule.gaps[2]
    assert rates[3] == rates[2] / 2
    assert rates[4] == rates[2] / 4
    assert rule.gaps[-1] < 0.02


def test_steps_that_rounding_leaves_no_gaussian_for_are_shorter_or_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(above: float) -> tuple[natural.Averaged[Fitted], list[float]]:
        rule, rates = Recorded(), []
        step = rule.step

        def singular(at: Fitted, slope: Any, rate: float) -> Fitted:
            rates.append(rate)
            if rate > above:
                raise np.linalg.LinAlgError("singular")
            return step(at, slope, rate)

        monkeypatch.setattr(rule, "step", singular)
        return averaged_steps(rule, wide_start(), key=KEY, draws=256, tolerance=0.02), rates

    ended, rates = broken(0.1)
    assert ended.arrived
    assert rates[:2] == [1 / 3, 1 / 12]
    ended, _ = broken(0.0)
    assert not ended.arrived
    assert len(ended.course) == 1
    assert ended.gap == np.inf


def test_where_no_shorter_step_helps_the_place_it_set_out_from_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    rule, begin = Recorded(), wide_start()
    look = rule.look

    def finite_at_first(at: Fitted, base: np.ndarray) -> Any:
        found = look(at, base)
        return found if len(rule.gaps) == 1 else replace(found, elbo=-math.inf)

    monkeypatch.setattr(rule, "look", finite_at_first)
    ended = averaged_steps(rule, begin, key=KEY, draws=256, tolerance=0.02, near=50)
    assert ended.at is begin
    assert not ended.arrived
    assert 5 < len(ended.course) < 20


def test_when_steps_run_out_the_last_member_that_was_looked_at_is_returned() -> None:
    rule = Recorded()
    ended = averaged_steps(rule, wide_start(), key=KEY, draws=256, tolerance=1e-9, most=7)
    member = ended.at.family.member(ended.at.x)
    assert skewed_best("mean_field") - skewed_elbo(member.loc, np.diag(member.scale)) == rule.gaps[-1]
    assert len(ended.course) == 7
    assert not ended.arrived


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
    monkeypatch.setattr(gaussian_fits, "MOST_PARAMETERS", 200)
    loadings = np.random.default_rng(0).standard_normal((30, 5))
    model = Model(factors, Dataset("factors", {"loadings": loadings}))
    fitted = fit(model, "low_rank", key=KEY, starts=1)
    assert fitted.solver == "natural_gradient"
    assert "no affordable set of fixed draws pins 248 parameters in 31 dimensions" in fitted.why
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
    monkeypatch.setattr(gaussian_fits, "can_be_pinned", lambda form, size: False)
    fitted = fit(pair(CORRELATION), "full_rank", key=KEY, starts=2, solver="natural_gradient")
    assert fitted.certificate.scope is Scope.ESTIMATE
    assert fitted.certificate.words.startswith("estimate from 4 sets of")
    assert fitted.certificate.sets == SETS
    assert abs(fitted.elbo.value) < fitted.certificate.limit + 5 * fitted.elbo.se + 1e-6


@pytest.mark.parametrize("guide", ["mean_field", "full_rank"])
def test_natural_gradients_keep_to_the_budget_and_some_of_it_for_an_estimate(
    guide: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gaussian_fits, "can_be_pinned", lambda form, size: False)
    model, starts = skewed()
    starts = replace(starts, points=starts.points[:1])
    courses = {}
    for steps in (2, 5, 1_000):  # of 1,024 gradients each; 512 are kept back for a look, 1,024 for an estimate
        budget = starts.gradient_evaluations + 1_024 * steps + 1_536
        fitted = fit(model, guide, key=KEY, starts=starts, solver="natural_gradient", max_gradients=budget)
        courses[steps] = len(fitted.traces[0].steps)
        assert fitted.certificate.scope is Scope.ESTIMATE
        if steps < 1_000:
            assert fitted.status is Status.UNPROVEN
            assert f"{steps} natural-gradient steps were taken, for which the budget was used up" in fitted.message
    assert courses[2] == 2
    assert courses[5] == 5
    assert 5 < courses[1_000] < 100


def test_steps_go_on_where_the_estimate_of_what_is_left_is_too_high(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussian_fits, "can_be_pinned", lambda form, size: False)
    estimate, calls = gaussian_proofs.estimate_gap, []

    def higher_at_first(rule: Any, at: Any, **settings: Any) -> Any:
        calls.append(at)
        found = estimate(rule, at, **settings)
        return replace(found, limit=1.0) if len(calls) < 3 else found

    monkeypatch.setattr(gaussian_proofs, "estimate_gap", higher_at_first)
    model, starts = skewed()
    fitted = fit(model, "mean_field", key=KEY, starts=starts, solver="natural_gradient")
    assert fitted.status is Status.ARRIVED
    assert len(calls) == 3
    gaps = [
        skewed_best("mean_field") - skewed_elbo(member.loc, np.diag(member.scale))
        for member in (at.family.member(at.x) for at in calls)
    ]
    assert gaps[2] < gaps[0]
    assert len(fitted.traces[0].steps) == len(fitted.traces[0].elbo) > 21


def test_further_steps_go_on_from_the_mean_and_a_lower_end_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussian_fits, "can_be_pinned", lambda form, size: False)
    estimate, stepped, near = gaussian_proofs.estimate_gap, gaussian_proofs.take_steps, []

    def lower_at_last(*args: Any, **settings: Any) -> Any:
        near.append(settings.get("near", 0))
        found = stepped(*args, **settings)
        return replace(found, x=found.x + 1.0) if len(near) == 3 else found

    def high(*args: Any, **settings: Any) -> Any:
        return replace(estimate(*args, **settings), limit=1.0)

    for module in (gaussian_optima, gaussian_proofs):
        monkeypatch.setattr(module, "take_steps", lower_at_last)
    monkeypatch.setattr(gaussian_proofs, "estimate_gap", high)
    model, starts = skewed()
    starts = replace(starts, points=starts.points[:1])
    fitted = fit(model, "mean_field", key=KEY, starts=starts, solver="natural_gradient")
    assert near[0] == 0
    assert 0 < near[1] < near[2]
    assert len(near) == 3
    assert fitted.status is Status.UNPROVEN
    assert "more of them did not raise the ELBO" in fitted.message
    assert skewed_gap(fitted) < 0.01


@pytest.mark.parametrize("guide", ["low_rank_2", "low_rank", "full_rank", "mean_field"])
def test_the_solver_goes_by_how_many_parameters_draws_must_pin(guide: str) -> None:
    model = Model(factors, Dataset("factors", {"loadings": np.ones((319, 1))}))
    space = latent_space(model, model.chart)
    guide = find_guide(guide)
    built = build_guide(model, guide, space.unravel(np.zeros(space.size)))
    solver, why = choose_solver(model, guide, built, space)
    if guide.name in ("low_rank", "full_rank"):
        assert solver == "natural_gradient"
        count = {"low_rank": 320 * (2 + 18), "full_rank": 320 * 323 // 2}[guide.name]
        assert why == f"no affordable set of fixed draws pins {count:,} parameters in 320 dimensions"
    else:
        assert solver == "fixed_draws"


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
    certificate = estimate_gap(FullRank(density), Gaussian(loc + shift, factor), key=KEY, draws=2_048, sets=16)
    assert expected > 0.1
    assert abs(certificate.gap.value - expected) < 5 * certificate.gap.se
    assert certificate.gap.se < 0.05 * expected
    assert certificate.limit > expected
    assert certificate.scope is Scope.ESTIMATE


def test_near_the_optimum_the_decrement_is_the_gap() -> None:
    density, loc, precision = five()
    factor, shift = displaced(precision, bent=0.02, moved=0.02)
    lacks = divergence(Member(loc + shift, factor=factor), loc, precision)
    certificate = estimate_gap(FullRank(density), Gaussian(loc + shift, factor), key=KEY, draws=2_048, sets=16)
    assert lacks > 1e-3
    assert abs(certificate.gap.value - lacks) < 0.1 * lacks


def test_the_decrement_at_the_optimum_of_a_gaussian_has_no_noise() -> None:
    density, loc, precision = five()
    factor = np.linalg.cholesky(np.linalg.inv(precision))
    certificate = estimate_gap(FullRank(density), Gaussian(loc, factor), key=KEY, draws=64)
    assert abs(certificate.gap.value) < 1e-12
    assert certificate.sets == SETS


@pytest.mark.parametrize("name", FAMILIES)
def test_the_decrement_of_a_displaced_member_is_what_its_family_still_gains(name: str) -> None:
    density, loc, precision = five()
    frame = Frame.of(loc, precision)
    family, target = FAMILIES[name](frame), Quadratic(loc, np.zeros(5), precision)
    best = best_member(family, np.zeros(family.parameters), target)
    x = best + 0.01 * np.random.default_rng(3).standard_normal(family.parameters)
    lacks = divergence(family.member(x), loc, precision) - divergence(family.member(best), loc, precision)
    assert lacks > 1e-4
    certificate = estimate_gap(
        Projected(density, FAMILIES[name], family.base), Fitted(frame, family, x, target), key=KEY, draws=2_048
    )
    assert abs(certificate.gap.value - lacks) < 0.05 * lacks + 5 * certificate.gap.se
    assert certificate.limit >= certificate.gap.value
    assert certificate.scope is Scope.ESTIMATE


def test_where_the_curvature_is_bent_upwards_nothing_is_said_of_what_is_left() -> None:
    density, loc, precision = five()
    frame = Frame.of(loc, precision)
    family = LowRank(frame, 1)
    # A mean field whose columns are all but none: a saddle, from which every column leads upwards.
    saddle = family.near(Member(loc, np.diag(precision) ** -0.5, np.full((5, 1), 0.01)))
    at = Fitted(frame, family, saddle, Quadratic(loc, np.zeros(5), precision))
    certificate = estimate_gap(Projected(density, FAMILIES["low_rank"], family.base), at, key=KEY, draws=256)
    assert certificate.limit == math.inf
    assert certificate.gap.value == math.inf


@pytest.mark.parametrize("guide", ["mean_field", "full_rank"])
def test_draws_without_a_finite_density_leave_no_estimate(guide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cliff, which every second draw or so is beyond: no gap is known, and none is not zero."""

    def cliff(y: Any) -> None:
        z = numpyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (3,)))
        numpyro.factor("density", -0.5 * z @ z + jnp.where((z < -2.5).any(), -jnp.inf, 0.0))

    monkeypatch.setattr(gaussian_fits, "can_be_pinned", lambda form, size: False)
    density = LogDensity(Model(cliff, Dataset("cliff", {"y": np.array(0.0)})))
    frame = Frame.of(np.zeros(3), np.eye(3))
    if guide == "full_rank":
        certificate = estimate_gap(FullRank(density), Gaussian(frame.loc, np.eye(3)), key=KEY, draws=256)
    else:
        at = Fitted(frame, Diagonal(frame), np.zeros(6), Quadratic(frame.loc, np.zeros(3), np.eye(3)))
        certificate = estimate_gap(Projected(density, Diagonal, 3), at, key=KEY, draws=256)
    assert certificate.limit == math.inf
    model = Model(cliff, Dataset("cliff", {"y": np.array(0.0)}))
    for seed in range(3):
        fitted = fit(model, guide, key=jax.random.PRNGKey(seed), starts=2, solver="natural_gradient")
        assert fitted.status is not Status.ARRIVED


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


def test_a_member_that_rounding_has_made_singular_is_no_place_to_look_from() -> None:
    _, loc, precision = five()
    rule, at = begun("low_rank", loc, precision)
    at = replace(at, x=at.x + np.r_[np.zeros(10), np.full(5, 1e12)])
    assert rule.look(at, np.zeros((4, 5))).elbo == -math.inf


@pytest.mark.parametrize("bent", [1.0, -1.0])
def test_a_member_sets_out_with_the_curvature_around_it_or_its_own(bent: float) -> None:
    form = GaussianForm(FAMILIES["low_rank"], dict, lambda params: params["member"], concave=False)
    _, loc, precision = five()
    scale = np.diag(precision) ** -0.5
    family = FAMILIES["low_rank"](Frame.of(loc, precision))
    member = family.member(family.near(Member(loc, scale, np.full((5, 1), 0.3))))
    matrix = precision + np.diag(precision) * np.diag([0, 0, bent - 1, 0, 0])
    begun = gaussian_optima.at_rest(form, member, Quadratic(loc, np.ones(5), matrix))
    expected = matrix if bent > 0 else np.linalg.inv(member.covariance())
    np.testing.assert_allclose(begun.quadratic.precision, expected, rtol=1e-8)
    np.testing.assert_allclose(begun.family.member(begun.x).covariance(), member.covariance(), rtol=1e-8)
    np.testing.assert_allclose(begun.quadratic.gradient, np.ones(5) if bent > 0 else np.zeros(5))
    whole = gaussian_optima.at_rest(replace(form, full=True), member, Quadratic(loc, np.ones(5), matrix))
    np.testing.assert_allclose(whole.factor @ whole.factor.T, member.covariance(), rtol=1e-8)
    assert not np.triu(whole.factor, 1).any()
