"""The Gaussian mixture of penguins: its density, expectation maximisation, labels, and what a point lacks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.optimize
from numpyro.infer.util import log_density
from scipy import stats

import models
from models._mixture_em import Mixture, PseudoData
from toolkit import Dataset, Fit, Model, Status, compare, fit, reference
from toolkit.comparison.gaps import POINT
from toolkit.comparison.sentences import whose
from toolkit.modelling.check import check
from toolkit.modelling.space import latent_space
from toolkit.reporting.arrival import optima_sentences
from toolkit.variational.coordinate_ascent import State, ascend
from toolkit.variational.expectation_maximisation import ExpectationMaximisation
from toolkit.variational.own_solvers import Problem

gm = models.load("gaussian_mixture")
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model() -> Model:
    return gm.model()


@pytest.fixture(scope="module")
def three() -> Model:
    return gm.model(gm.dataset("bill length", "bill depth"), components=3)


@pytest.fixture(scope="module")
def climbed(model: Model) -> Fit:
    return fit(model, "em", key=KEY, tolerance=1e-6)


def state_of(fitted: Fit) -> State:
    return {name.removesuffix("_auto_loc"): np.asarray(value) for name, value in fitted.params.items()}


def somewhere(seed: int, components: int, features: int) -> State:
    rng = np.random.default_rng(seed)
    return {
        "weights": rng.dirichlet(np.full(components, 3.0)),
        "means": rng.normal(size=(components, features)),
        "variances": rng.uniform(0.2, 2.0, (components, features)),
    }


# The model


def test_the_data_are_the_published_ones() -> None:
    birds = gm.penguins()
    assert birds["species"].value_counts().to_dict() == {"Adelie": 151, "Gentoo": 123, "Chinstrap": 68}
    # Means of palmerpenguins' own documentation, by species, in mm.
    assert birds.groupby("species")["flipper length"].mean().round(1).tolist() == [190.0, 195.8, 217.2]
    x = gm.dataset("bill depth", "flipper length").arrays["x"]
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(x.std(axis=0), 1, atol=1e-12)
    assert birds["flipper length"].std(ddof=0) == pytest.approx(14.0, abs=0.05)


def test_it_can_be_studied(model: Model) -> None:
    assert model.dims("means") == ("component", "feature")
    assert all(rung.passed for rung in check(model))


@pytest.mark.parametrize("components", [2, 3])
def test_the_density_is_the_mixture_s_with_its_priors(components: int) -> None:
    """Against SciPy's densities, term by term."""
    x = gm.dataset("bill length", "bill depth").arrays["x"]
    bound = gm.model(gm.dataset("bill length", "bill depth"), components=components)
    state = somewhere(components, components, 2)
    w, m, v = state["weights"], state["means"], state["variances"]
    prior = stats.dirichlet.logpdf(w, np.full(components, 2.0))
    prior += stats.invgamma.logpdf(v, 2.0, scale=1 / components).sum()
    prior += stats.norm.logpdf(m, 0, np.sqrt(v / 0.01)).sum()
    likelihood = sum(w[k] * stats.norm.pdf(x, m[k], np.sqrt(v[k])).prod(axis=1) for k in range(components))
    expected = prior + np.log(likelihood).sum()
    assert float(log_density(bound.bound(), (), bound.arrays, state)[0]) == pytest.approx(expected, rel=1e-12)
    assert gm.mixture(x, components).log_density(state) == pytest.approx(expected, rel=1e-12)


def test_simulated_data_have_their_truth() -> None:
    data = gm.simulate(KEY, rows=4_000, features=2, components=3, distance=6.0)
    bound = gm.model(data, components=3, starts=5)
    found = fit(bound, "em", key=KEY)
    drawn = {name: values[None] for name, values in found.draw(KEY, 1).items()}
    ordered = bound.labels.relabel(drawn, data.truth["means"]) if bound.labels else {}
    for name, scale in (("means", 1.0), ("sds", 0.5**0.5)):
        # A component has n w rows; its mean and its sd are known to sd / sqrt(n w) and that over sqrt(2).
        error = scale * data.truth["sds"] / np.sqrt(4_000 * data.truth["weights"])[:, None]
        assert (np.abs(ordered[name][0, 0] - data.truth[name]) < 5 * error).all(), name
    assert data.truth["weights"].sum() == pytest.approx(1)


DATA = np.random.default_rng(0).normal(size=(20, 2))
ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "feature": (lambda: gm.dataset("wing"), "Expected features among bill length, .*; got wing."),
    "twice": (lambda: gm.dataset("body mass", "body mass"), "Expected each feature once; got body mass, body mass"),
    "components": (lambda: gm.model(components=1), "Expected at least 2 components; got 1"),
    "concentration": (lambda: gm.model(concentration=0.5), "Expected a concentration of at least 1; got 0.5"),
    "starts": (lambda: gm.model(starts=0), "Expected at least 1 start; got 0"),
    "no x": (lambda: gm.model(Dataset("mine", {"y": DATA})), "Expected an array 'x' in dataset 'mine'; it has y"),
    "shape": (lambda: gm.model(Dataset("mine", {"x": DATA[:, 0]})), r"Expected x as \(row, feature\); got shape \(20,"),
    "few rows": (lambda: gm.model(Dataset("mine", {"x": DATA[:3]}), components=4), "at least as many rows as comp"),
    "raw": (
        lambda: gm.model(Dataset("mine", {"x": DATA + [0.0, 190.0]})),
        "Expected standardised features.*; feature 2 of 2 has mean 190 and sd",
    ),
    "rows": (lambda: gm.simulate(KEY, rows=1), "at least 2 rows and components and 1 feature; got 1 rows"),
    "distance": (lambda: gm.simulate(KEY, distance=0.0), "Expected a distance above 0; got 0.0"),
    "chart": (
        lambda: fit(gm.model(), dataclasses.replace(gm.model().guides[0], chart="other"), key=KEY),
        "chart",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_misuse_gets_its_sentence(case: str) -> None:
    call, text = ERRORS[case]
    with pytest.raises(ValueError, match=text):
        call()


# Expectation maximisation: laws


@pytest.mark.parametrize("components", [2, 4])
def test_the_e_step_touches_the_density_and_no_other_assignments_do(components: int) -> None:
    """F = log p(x, z) - KL(r || p(h | x, z)): equal at the E step, lower by the divergence elsewhere."""
    x = gm.dataset("bill length", "bill depth").arrays["x"]
    mixture, state = gm.mixture(x, components), somewhere(1, components, 2)
    exact = mixture.expect(state)["assignments"]
    evidence = mixture.log_density(state)
    assert mixture.free_energy({**state, "assignments": exact}) == pytest.approx(evidence, rel=1e-12)
    other = np.random.default_rng(2).dirichlet(np.ones(components), len(x))
    divergence = (other * np.log(other / exact)).sum()
    assert mixture.free_energy({**state, "assignments": other}) == pytest.approx(evidence - divergence, rel=1e-10)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_m_step_is_the_best_given_the_assignments(seed: int) -> None:
    """The free energy's slope is zero there, and every step elsewhere sinks: it is a maximum."""
    x = gm.dataset("bill length", "bill depth").arrays["x"]
    mixture = gm.mixture(x, 3)
    state = somewhere(seed, 3, 2)
    state |= mixture.expect(state)
    best = state | mixture.maximise(state)
    rng, top = np.random.default_rng(seed), mixture.free_energy(best)
    assert top > mixture.free_energy(state)
    for size in (1e-5, 1e-2):
        for _ in range(20):
            moved = best | {
                "weights": best["weights"] * np.exp(size * rng.normal(size=3)),
                "means": best["means"] + size * rng.normal(size=(3, 2)),
                "variances": best["variances"] * np.exp(size * rng.normal(size=(3, 2))),
            }
            moved["weights"] /= moved["weights"].sum()
            assert mixture.free_energy(moved) < top


def test_no_iteration_lowers_the_density(three: Model) -> None:
    """Dempster, Laird & Rubin's theorem 1, from several starts; by the density, which EM itself does not compute."""
    mixture, rng = gm.mixture(three.arrays["x"], 3), np.random.default_rng(0)
    for _ in range(5):
        state, heights = mixture.begin(rng), []
        for _ in range(60):
            heights.append(mixture.log_density(state))
            state |= mixture.expect(state)
            state |= mixture.maximise(state)
        assert (np.diff(heights) > -1e-10 * np.abs(heights[1:])).all()


def unconstrained(vector: np.ndarray, components: int, features: int) -> State:
    """A state from log ratios of weights, means and log variances."""
    ratios = np.r_[vector[: components - 1], 0.0]
    rest = vector[components - 1 :].reshape(2, components, features)
    weights = np.exp(ratios - ratios.max())
    return {"weights": weights / weights.sum(), "means": rest[0], "variances": np.exp(rest[1])}


def vector_of(state: State) -> np.ndarray:
    ratios = np.log(state["weights"][:-1] / state["weights"][-1])
    return np.r_[ratios, state["means"].ravel(), np.log(state["variances"]).ravel()]


@pytest.mark.parametrize("components", [2, 3])
def test_its_fixed_point_is_a_maximum_of_the_density(components: int) -> None:
    """Direct maximisation of the same density from beside it gains nothing and stays where it is."""
    x = gm.dataset("bill length", "bill depth").arrays["x"]
    bound = gm.model(gm.dataset("bill length", "bill depth"), components=components, starts=5)
    found = fit(bound, "em", key=KEY, tolerance=1e-8)
    mixture, state = gm.mixture(x, components), state_of(found)
    start = vector_of(state) + 0.05 * np.random.default_rng(0).normal(size=components * 5 - 1)

    def loss(vector: np.ndarray) -> float:
        return -mixture.log_density(unconstrained(vector, components, 2))

    direct = scipy.optimize.minimize(loss, start, method="BFGS", options={"gtol": 1e-5})
    assert loss(start) > -found.optima[0].value + 0.1
    assert -direct.fun == pytest.approx(found.optima[0].value, abs=1e-6)
    np.testing.assert_allclose(direct.x, vector_of(state), atol=1e-3)


def test_with_flat_priors_it_is_maximum_likelihood() -> None:
    """Against direct maximisation of the likelihood, without any prior."""
    x = gm.dataset().arrays["x"]
    mixture = Mixture(x, 2)
    assert mixture.prior == PseudoData()
    begun = mixture.begin(np.random.default_rng(0))
    ended = ascend(
        {"m": mixture.maximise, "e": mixture.expect},
        mixture.free_energy,
        begun | mixture.expect(begun),
        tolerance=1e-8,
        max_sweeps=10_000,
    )
    assert ended.status is Status.ARRIVED

    def loss(vector: np.ndarray) -> float:
        w, m, v = unconstrained(vector, 2, 1).values()
        return -float(np.log(sum(w[k] * stats.norm.pdf(x[:, 0], m[k, 0], v[k, 0] ** 0.5) for k in (0, 1))).sum())

    direct = scipy.optimize.minimize(loss, vector_of(ended.state) + 0.1, method="BFGS", options={"gtol": 1e-5})
    assert ended.elbo == pytest.approx(-direct.fun, abs=1e-6)
    np.testing.assert_allclose(direct.x, vector_of(ended.state), atol=1e-3)


def test_without_a_prior_on_variances_the_likelihood_has_no_bound() -> None:
    """A component that shrinks onto one row; the model's own density falls there."""
    x = gm.dataset().arrays["x"]
    heights: dict[bool, list[float]] = {True: [], False: []}
    for sd in (1e-2, 1e-8, 1e-32):
        state = {
            "weights": np.array([0.5, 0.5]),
            "means": np.array([x[0], [0.0]]),
            "variances": np.array([[sd**2], [1.0]]),
        }
        for flat in heights:
            heights[flat].append((Mixture(x, 2) if flat else gm.mixture(x, 2)).log_density(state))
    assert np.diff(heights[True]).min() > 10
    assert np.diff(heights[False]).max() < -10


# As a guide


@pytest.mark.slow
def test_it_is_numpyro_s_map_in_constrained_space(model: Model, climbed: Fit) -> None:
    """AutoDelta climbs the density of the constrained sites: the same point, by gradients."""
    point = fit(model, "map", key=KEY, tolerance=1e-4)
    assert (climbed.status, point.status) == (Status.ARRIVED, Status.ARRIVED)
    assert point.optima[0].value == pytest.approx(climbed.optima[0].value, abs=1e-4)
    ours, numpyros = state_of(climbed), state_of(point)
    order = np.argsort(ours["means"][:, 0]), np.argsort(numpyros["means"][:, 0])
    for name in ours:
        np.testing.assert_allclose(ours[name][order[0]], numpyros[name][order[1]], atol=2e-3)


@pytest.mark.slow
def test_laplace_sits_at_another_point(model: Model, climbed: Fit) -> None:
    """At the mode of the unconstrained density, which has the Jacobian in it: point estimates depend on the chart.

    The density of a log variance is that of the variance times the variance, so that the mode moves to larger ones.
    """
    laplace = fit(model, "laplace", key=KEY, tolerance=1e-4)
    assert laplace.status is Status.ARRIVED

    def up_to_constant(vector: Any) -> Any:
        constrained = model.constrain(latent_space(model).unravel(vector), model.arrays)
        plain = {name: constrained[name] for name in model.latents}
        jacobian = jnp.log(plain["variances"]).sum() + jnp.log(plain["weights"]).sum()
        return log_density(model.bound(), (), model.arrays, plain)[0] + jacobian

    mode = jnp.asarray(laplace.params["auto_loc"])
    assert float(jnp.abs(jax.grad(up_to_constant)(mode)).max()) < 0.05
    wide = laplace.draw(KEY, 4_000, ("variances",))["variances"].mean(axis=0)
    assert wide.sum() > state_of(climbed)["variances"].sum()


def test_a_point_has_draws_and_no_density(climbed: Fit) -> None:
    drawn = climbed.draw(KEY, 100)
    assert climbed.usable
    assert not climbed.has_density
    assert climbed.elbo is None
    for name, value in state_of(climbed).items():
        assert (drawn[name] == value).all()
    np.testing.assert_allclose(drawn["sds"], np.sqrt(drawn["variances"]))
    with pytest.raises(ValueError, match="Expected a family with a density; 'em' is a point mass"):
        climbed.log_weights(KEY, 10)


def test_several_starts_find_several_optima_and_the_best_is_kept(three: Model) -> None:
    found = fit(three, "em", key=KEY)
    assert sum(found.reached) == 20
    assert len(found.optima) == len(found.reached) == len(found.traces) > 1
    assert found.optima[0] == max(found.optima)
    assert found.message.startswith(
        f"the best of {len(found.optima)} distinct optima, to which {found.reached[0]} of 20"
    )
    (told,) = optima_sentences([found])
    assert "(log density −863.5 and " in told
    assert "their heights do not say" in told
    again = fit(three, "em", key=KEY)
    assert again.optima == found.optima


def test_orders_of_labels_are_one_optimum(model: Model, climbed: Fit) -> None:
    assert climbed.reached == (20,)
    solve = model.guides[0].solve
    first = solve._ascend(state_of(climbed), 1e-6, 1_000)
    turned = {name: values[::-1] for name, values in state_of(climbed).items()}
    second = solve._ascend(turned, 1e-6, 1_000)
    assert solve._same(first, second, model.labels, 1e-6)
    assert not solve._same(first, second, None, 1e-6)


def test_a_saddle_is_left(model: Model, climbed: Fit) -> None:
    """Both components at one place: every step stands still there, and no difference of theirs ever grows."""
    mixture, solve = gm.mixture(model.arrays["x"], 2), model.guides[0].solve
    together = {"weights": np.full(2, 0.5), "means": np.zeros((2, 1)), "variances": np.ones((2, 1))}
    stuck = solve._ascend(together, 1e-6, 10_000)
    assert stuck.status is Status.ARRIVED
    assert stuck.elbo < climbed.optima[0].value - 10
    starts = iter([together, mixture.begin(np.random.default_rng(0))])
    patient = dataclasses.replace(solve, begin=lambda rng: next(starts), starts=1)
    found = patient(Problem(model, "plain", latent_space(model), None, KEY, 1e-6, 100_000))
    assert found.optima[0] == pytest.approx(climbed.optima[0].value, abs=1e-6)
    assert (np.diff(found.trace.steps) > 0).all() if found.trace else False


def test_a_budget_that_is_used_up_is_told(model: Model) -> None:
    found = fit(model, "em", key=KEY, max_gradients=60)
    assert found.status is Status.BUDGET
    assert found.usable
    assert found.message.startswith("20 of 20 starts had not arrived when the budget was used up; the highest of them ")
    assert found.message.endswith(f" after 1 sweep, of {found.cost.gradient_evaluations} in all")
    assert (found.optima, found.reached) == ((), ())


def test_what_the_budget_cut_short_is_no_optimum(model: Model, climbed: Fit) -> None:
    found = fit(model, "em", key=KEY, max_gradients=1_300)
    assert 0 < sum(found.reached) < 20
    assert found.status is Status.ARRIVED
    assert found.optima[0].value == pytest.approx(climbed.optima[0].value, abs=0.01)
    assert f"{20 - sum(found.reached)} had not arrived when the budget was used up" in found.message


def test_a_wrong_step_is_told_by_its_name(model: Model) -> None:
    mixture = gm.mixture(model.arrays["x"], 2)

    def wrong(state: State) -> State:
        return {**mixture.maximise(state), "variances": 2 * mixture.maximise(state)["variances"]}

    solve = ExpectationMaximisation(mixture.expect, wrong, mixture.free_energy, mixture.begin, starts=1)
    with pytest.raises(ValueError, match="factor 'maximise' lowered it"):
        fit(model, dataclasses.replace(model.guides[0], solve=solve), key=KEY)


def test_slow_gains_behind_fast_ones_are_waited_for() -> None:
    """Two parts of an error, one of a thousand nats halved in a sweep, one of a nat that shrinks by a tenth."""
    ended = ascend(
        {"both": lambda s: {"fast": s["fast"] / 30, "slow": s["slow"] * 0.97}},
        lambda s: -float(1e3 * s["fast"] + 0.05 * s["slow"]),
        {"fast": np.array(1.0), "slow": np.array(1.0)},
        tolerance=0.1,
        max_sweeps=1_000,
    )
    assert ended.status is Status.ARRIVED
    assert -ended.elbo < 2e-3


# Against the posterior


@pytest.fixture(scope="module")
def drawn(model: Model) -> Any:
    return reference(model, key=KEY)


@pytest.mark.slow
def test_nuts_passes_from_dispersed_starts(drawn: Any) -> None:
    assert drawn.status is Status.PASSED, drawn.reasons


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_nuts_passes_with_other_seeds_and_its_posterior_is_the_same(model: Model, drawn: Any, seed: int) -> None:
    other = reference(model, key=jax.random.key(seed))
    assert other.status is Status.PASSED, other.reasons
    matched = model.labels.relabel(other.draws, drawn.draws["means"].mean(axis=(0, 1))) if model.labels else {}
    for name in ("weights", "means", "sds"):
        ours, others = drawn.draws[name], matched[name]
        # Effective draws are 2,000 at least, of 4,000.
        error = np.hypot(ours.std(axis=(0, 1)), others.std(axis=(0, 1))) / 2_000**0.5
        assert (np.abs(ours.mean(axis=(0, 1)) - others.mean(axis=(0, 1))) < 5 * error).all(), name


@pytest.fixture(scope="module")
def compared(model: Model, climbed: Fit, drawn: Any) -> Any:
    mean_field = fit(model, "mean_field", key=KEY)
    return compare(model, drawn, [climbed, mean_field], key=jax.random.key(1))


@pytest.mark.slow
def test_a_point_is_told_for_what_it_is(compared: Any, climbed: Fit) -> None:
    row = compared.guides.loc["em"]
    assert row["verdict"] == "wrong"
    assert "6 of 6 have no spread at all: the guide is a point there" in row["sentence"]
    assert (row["worst_sd_ratio"], row["worst_coverage_90"]) == (0.0, 0.0)
    own = compared.table[compared.table["guide"] == "em"]
    said = whose(own, None, compared.thresholds, climbs=False)
    assert said.startswith("that there is no spread is the family's, whose members are points; where the point lies")
    scores = compared.predictions.scores.set_index("source")
    assert scores.loc["em", "loo_problem"] == "a point has no density, which leave-one-out by its draws needs"


def test_without_entropy_a_point_has_the_highest_energy(compared: Any) -> None:
    parts = compared.gaps.table.set_index("guide")
    assert parts.loc["em", "problem"] == POINT
    assert parts.loc["em", "entropy"] == -math.inf
    assert parts.loc["em", "kl_to_prior"] == math.inf
    assert parts.loc["em", "energy"] > parts.loc["mean_field", "energy"] + 1
    assert parts.loc["mean_field", "elbo"] == pytest.approx(
        parts.loc["mean_field", ["energy", "entropy"]].sum(), abs=1e-9
    )
    assert math.isnan(parts.loc["em", "elbo"])
    assert parts.loc["mean_field", "labels"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_point_predicts_one_bird_and_not_the_mean_of_many(compared: Any) -> None:
    """The mean of n new birds varies by the birds and by their unknown mean, as much again: a point has half of it."""
    scores = compared.predictions.scores.set_index("source")
    assert scores.loc["em", "verdict"] == "right"
    checks = compared.predictions.checks.set_index(["statistic", "source"])
    width = (checks["high"] - checks["low"]).loc["mean"]
    # 2,000 replicates: each width has a relative error of about 0.03.
    assert width["em"] / width["reference"] == pytest.approx(0.5**0.5, abs=5 * 0.03)
    assert width["em"] / width["reference"] < 0.85


@pytest.mark.slow
def test_chains_in_different_modes_are_no_posterior(three: Model) -> None:
    drawn = reference(three, key=KEY)
    assert drawn.status is Status.RHAT
    assert any("several modes" in reason for reason in drawn.reasons)


@pytest.mark.slow
def test_a_report_of_a_point_alone_reads(tmp_path: Path) -> None:
    from toolkit import study

    done = study(gm.model(), guides=["em"], chains=2, warmup=300, draws=600)
    text = (done.write(tmp_path).parent / "report.md").read_text(encoding="utf-8")
    assert "nan" not in text.replace("NaN", "").split("What is the model?")[0]
    assert "em: a point has no density: its entropy and ELBO are minus infinity" in text
    assert "For a mode (em) it is the log density that rises" in text
    assert isinstance(done.comparison.table, pd.DataFrame)
