"""Coordinate ascent: rates, arrival, falls and budgets on quadratics, whose every answer is known."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from toolkit import Dataset, Guide, Model, Scope, Status, fit
from toolkit.variational.coordinate_ascent import CoordinateAscent, State, Update, ascend, remaining
from toolkit.variational.stationary import what_moving_gains

LINEAR = np.array([1.0, -2.0])


def quadratic(correlation: float) -> tuple[np.ndarray, np.ndarray]:
    """The precision of two coordinates, of different units, and where the density is highest."""
    units = np.array([1.0, 20.0])
    precision = units[:, None] * np.array([[1.0, correlation], [correlation, 1.0]]) * units
    return precision, np.linalg.solve(precision, LINEAR)


def updates_of(precision: np.ndarray) -> dict[str, Update]:
    def one(j: int) -> Update:
        def update(state: State) -> State:
            loc = state["loc"].copy()
            loc[j] += (LINEAR[j] - precision[j] @ loc) / precision[j, j]
            return {"loc": loc}

        return update

    return {"first": one(0), "second": one(1)}


def elbo_of(precision: np.ndarray) -> object:
    return lambda state: float(LINEAR @ state["loc"] - 0.5 * state["loc"] @ precision @ state["loc"])


def started(correlation: float, **options: object) -> tuple[object, float]:
    precision, best = quadratic(correlation)
    settings = {"tolerance": 1e-3, "max_sweeps": 100_000} | options
    start = {"loc": np.array([3.0, -1.0])}
    ended = ascend(updates_of(precision), elbo_of(precision), start, **settings)  # type: ignore[arg-type]
    return ended, float(LINEAR @ best - 0.5 * best @ precision @ best)


@pytest.mark.parametrize("correlation", [0.3, 0.9, 0.99])
def test_a_sweep_leaves_the_fourth_power_of_the_correlation(correlation: float) -> None:
    """Each coordinate's error shrinks by the correlation, twice a sweep, and nats go with its square."""
    ended, best = started(correlation, tolerance=1e-9)
    short = best - ended.trace.elbo[:12]
    short = short[short > 1e-9]
    np.testing.assert_allclose(short[1:] / short[:-1], correlation**4, rtol=1e-4)


@pytest.mark.parametrize("correlation", [0.0, 0.9, 0.99, 0.9999])
def test_slow_convergence_is_not_taken_for_arrival(correlation: float) -> None:
    ended, best = started(correlation)
    assert ended.status is Status.ARRIVED
    assert best - ended.elbo < 1e-3
    assert (np.diff(ended.trace.elbo) >= -1e-9).all()
    assert ended.left == pytest.approx(best - ended.elbo, rel=0.05, abs=1e-9)


def test_a_small_gain_alone_would_have_stopped_it_short() -> None:
    ended, best = started(0.9999)
    gains = np.diff(ended.trace.elbo) / np.diff(ended.trace.steps)
    first = int(np.argmax(gains < 1e-3))  # the tolerance
    assert best - ended.trace.elbo[first] > 1.0


def test_gains_that_halve_leave_what_the_last_one_was() -> None:
    assert remaining([2.0**-k for k in range(12)]) == pytest.approx(2.0**-11)
    assert remaining([1.0] * 12) == math.inf
    assert remaining([1.0, 0.5]) == math.inf
    assert remaining([1.0, 0.0, 0.0, 0.0], 1e-14) == pytest.approx(1e-14)


@pytest.mark.parametrize(("correlation", "sweeps"), [(0.999, 40), (0.99, 151), (0.99, 155), (0.99, 158)])
def test_the_budget_ends_it_with_what_is_left(correlation: float, sweeps: int) -> None:
    """Of the last sweep, whether or not it was one after which it is asked."""
    ended, best = started(correlation, max_sweeps=sweeps, tolerance=1e-12)
    assert (ended.status, ended.sweeps) == (Status.BUDGET, sweeps)
    assert ended.left == pytest.approx(best - ended.elbo, rel=0.05)


def test_an_update_that_lowers_the_elbo_is_named() -> None:
    precision, _ = quadratic(0.5)
    wrong = updates_of(precision) | {"second": lambda state: {"loc": state["loc"] + np.array([0.0, 0.1])}}
    start = {"loc": np.zeros(2)}
    with pytest.raises(ValueError, match=r"that of factor 'second' lowered it by .* nats in sweep 1"):
        ascend(wrong, elbo_of(precision), start, tolerance=1e-3, max_sweeps=10)  # type: ignore[arg-type]


def test_a_wrong_update_that_another_makes_good_is_named() -> None:
    """It goes as far below the best as to lose nats, and the other wins more: the sweep as a whole raises the ELBO."""
    precision = np.array([[1.0, 0.9], [0.9, 1.0]])
    right = updates_of(precision)
    wrong = right | {"first": lambda s: {"loc": right["first"](s)["loc"] - np.array([1.0, 0.0])}}
    elbo, start = elbo_of(precision), {"loc": np.array([17.4, -17.66])}
    swept = wrong["second"](wrong["first"](start))
    assert elbo(swept) > elbo(start)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"that of factor 'first' lowered it by .* nats in sweep 1:"):
        ascend(wrong, elbo, start, tolerance=1e-3, max_sweeps=1_000)  # type: ignore[arg-type]


def test_a_best_that_is_passed_is_disproved() -> None:
    precision, best = quadratic(0.9)
    elbo = elbo_of(precision)
    claimed = elbo({"loc": best}) - 0.5  # type: ignore[operator]
    with pytest.raises(ValueError, match="Expected no ELBO above the family's best, which is claimed to be"):
        started(0.9, left=lambda state: claimed - elbo(state))  # type: ignore[operator]


def test_an_elbo_that_is_no_number_is_a_status() -> None:
    broken = {"only": lambda state: {"loc": state["loc"] + 1}}
    ended = ascend(
        broken, lambda s: math.nan if s["loc"] > 2 else float(s["loc"]), {"loc": np.array(0.0)}, tolerance=0.1,
        max_sweeps=10,
    )  # fmt: skip
    assert (ended.status, ended.message, float(ended.state["loc"])) == (Status.DIVERGED, "in sweep 3", 2.0)


ERRORS = {
    "no factor": ({}, "Expected at least one factor"),
    "not there": ({"a": lambda state: {"loc": state["sd"]}}, "factor 'a' reads; it has loc, and not 'sd'"),
    "no parameters": ({"a": lambda state: state["loc"]}, "factor 'a' to give parameters by name; got (ndarray|float)"),
    "parameter": ({"a": lambda state: {"scale": state["loc"]}}, "factor 'a' to give parameters .* it gives scale"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_misuse_gets_its_sentence(case: str) -> None:
    updates, text = ERRORS[case]
    with pytest.raises(ValueError, match=text):
        ascend(updates, lambda _: 0.0, {"loc": np.zeros(1)}, tolerance=0.1, max_sweeps=5)


def level(y: object) -> None:
    """Two coordinates of which the sum is observed: their correlation is minus a half."""
    z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    numpyro.sample("y", dist.Normal(z.sum(), 1.0), obs=y)


Y = 1.5
PRECISION = np.eye(2) + 1.0
PULL = np.array([Y, Y])


def program(_fn: object) -> object:
    def guide(y: object) -> None:
        numpyro.sample("z", dist.Normal(numpyro.param("loc", jnp.zeros(2)), 2**-0.5).to_event(1))

    return guide


def closed(state: State) -> float:
    loc = state["loc"]
    constant = -1.5 * math.log(2 * math.pi) - 0.5 * Y**2 + 1 + math.log(2 * math.pi) - 0.5 * math.log(4)
    return constant + float(PULL @ loc - 0.5 * loc @ PRECISION @ loc) - 0.5 * 2


def solver(elbo: object = closed, **options: object) -> CoordinateAscent:
    def one(j: int) -> Update:
        return lambda s: {"loc": s["loc"] + np.eye(2)[j] * (PULL[j] - PRECISION[j] @ s["loc"]) / PRECISION[j, j]}

    return CoordinateAscent({"0": one(0), "1": one(1)}, elbo, {"loc": np.zeros(2)}, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(level, Dataset("sum", {"y": np.array(Y)}), log_concave=True)


def test_without_the_family_s_best_there_is_no_certificate_and_a_reason(model: Model) -> None:
    fitted = fit(model, Guide("cavi", program, solve=solver()), key=jax.random.key(0))
    assert (fitted.status, fitted.certificate, fitted.solver) == (Status.ARRIVED, None, "coordinate_ascent")
    assert "may have several optima" in fitted.why
    np.testing.assert_allclose(fitted.params["loc"], np.linalg.solve(PRECISION, PULL), atol=0.02)
    mean_field = fit(model, "mean_field", key=jax.random.key(0))
    assert fitted.elbo is not None
    assert mean_field.elbo is not None
    assert fitted.elbo.se == 0
    assert fitted.elbo.value == pytest.approx(mean_field.elbo.value, abs=2e-3 + 5 * mean_field.elbo.se)


def test_with_it_the_certificate_is_exact_and_global(model: Model) -> None:
    best = closed({"loc": np.linalg.solve(PRECISION, PULL)})
    guide = Guide("cavi", program, solve=solver(left=lambda state: best - closed(state)))
    fitted = fit(model, guide, key=jax.random.key(0), max_gradients=2)
    assert fitted.status is Status.BUDGET
    assert fitted.message.startswith("after 2 sweeps, with about")
    assert fitted.certificate is not None
    assert fitted.certificate.scope is Scope.GLOBAL
    assert fitted.certificate.words == "global bound, in closed form"
    assert fitted.elbo is not None
    assert fitted.certificate.gap.value == pytest.approx(best - fitted.elbo.value, abs=1e-12)
    assert fitted.certificate.gap.value > 1e-4


def test_a_wrong_elbo_is_found_out_by_draws(model: Model) -> None:
    guide = Guide("cavi", program, solve=solver(lambda state: closed(state) + 0.3))
    with pytest.raises(ValueError, match="ELBO that 'cavi' has in closed form to be the one on fresh draws"):
        fit(model, guide, key=jax.random.key(0))


def test_an_update_that_stops_short_of_the_best_is_found_out(model: Model) -> None:
    """It raises the ELBO wherever it changes anything, so that no fall tells of it."""
    right = solver()
    wrong = replace(right, updates={**right.updates, "0": lambda s: {"loc": np.array([0.4, s["loc"][1]])}})
    ended = ascend(wrong.updates, closed, wrong.start, tolerance=0.1, max_sweeps=1_000)
    assert ended.status is Status.ARRIVED
    with pytest.raises(
        ValueError, match=r"moving 'loc' alone raised the ELBO by 0\.00562 nats: check the formula of its"
    ):
        fit(model, Guide("cavi", program, solve=wrong), key=jax.random.key(0))


def test_what_moving_gains_keeps_to_supports() -> None:
    """A scale and probabilities at their best, and half as far from it."""

    def guide() -> None:
        numpyro.param("scale", 1.0, constraint=dist.constraints.positive)
        numpyro.param("weights", jnp.array([0.5, 0.5]), constraint=dist.constraints.simplex)

    def elbo(state: State) -> float:
        assert state["scale"] > 0
        assert state["weights"].sum() == pytest.approx(1.0)
        heights = np.log(state["scale"]) - state["scale"] / 2 + (np.array([0.2, 0.8]) * np.log(state["weights"])).sum()
        return float(heights)

    best = {"scale": np.array(2.0), "weights": np.array([0.2, 0.8])}
    assert what_moving_gains(guide, {}, best, elbo, best) == pytest.approx({"scale": 0.0, "weights": 0.0}, abs=1e-12)
    begin = {"scale": np.array(1.0), "weights": np.array([0.5, 0.5])}
    assert list(what_moving_gains(guide, {}, begin, elbo, ["scale"])) == ["scale"]
    short = what_moving_gains(guide, {}, begin, elbo, begin)
    away = elbo(best) - elbo({**best, "weights": np.array([0.5, 0.5])})
    assert 0.5 * (elbo(best) - elbo({**best, "scale": np.array(1.0)})) < short["scale"] < 0.2
    assert 0.5 * away < short["weights"] <= away


def test_an_elbo_that_fails_where_a_parameter_may_be_asks_for_its_constraint() -> None:
    def guide() -> None:
        numpyro.param("sd", 1e-4)

    with pytest.raises(ValueError, match=r"give 'sd' its constraint in the program"):
        what_moving_gains(guide, {}, {"sd": np.array(1e-4)}, lambda state: math.log(state["sd"]), ["sd"])


def test_the_updates_hold_for_one_model(model: Model) -> None:
    def seen(x: object) -> None:
        numpyro.sample("x", dist.Normal(numpyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    other = Model(seen, Dataset("x", {"x": np.array(Y)}), name="other")
    with pytest.raises(ValueError, match="takes the arrays of model 'other', which are x; got one that takes y"):
        fit(other, Guide("cavi", program, solve=solver()), key=jax.random.key(0))


def test_the_program_has_the_start_s_parameters(model: Model) -> None:
    other = replace(solver(), start={"loc": np.zeros(2), "scale": np.ones(2)})
    with pytest.raises(ValueError, match="parameters of the guide's program, loc; got loc, scale"):
        fit(model, Guide("cavi", program, solve=other), key=jax.random.key(0))


def test_an_update_that_gives_no_number_is_named(model: Model) -> None:
    wrong = replace(solver(), updates={**solver().updates, "1": lambda s: {"loc": s["loc"] * np.nan}})
    fitted = fit(model, Guide("cavi", program, solve=wrong), key=jax.random.key(0))
    assert (fitted.status, fitted.message) == (Status.DIVERGED, "in sweep 1, by the update of factor '1'")


def test_the_updates_hold_for_one_chart(model: Model) -> None:
    guide = Guide("cavi", program, solve=solver(chart="rotated"))
    with pytest.raises(ValueError, match="Expected chart 'rotated', for which .* got 'plain'"):
        fit(model, guide, key=jax.random.key(0))
