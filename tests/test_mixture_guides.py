"""Mixtures of Gaussians: modes and their weights, the families inside, the bound, names, misuse."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from numpyro import handlers
from targets import line, pair

import models
from toolkit import Fit, Status, fit
from toolkit.estimate import Estimate
from toolkit.storage import Storage
from toolkit.variational.building import build_guide
from toolkit.variational.certificates import Scope
from toolkit.variational.density import LogDensity
from toolkit.variational.guides import GUIDES, find_guide
from toolkit.variational.keeping import keep_fit, kept_fit
from toolkit.variational.mixture_climbs import Mixture, StratifiedELBO, ascend
from toolkit.variational.mixture_guides import AutoMixtureNormal
from toolkit.variational.nesting import contains
from toolkit.variational.starts import find_starts

KEY = jax.random.PRNGKey(0)
TARGETS = models.load("gaussian_target")
EVIDENCE = TARGETS.LOG_EVIDENCE


@pytest.fixture(scope="module")
def unequal() -> dict[str, Fit]:
    model = TARGETS.model(target="two_modes", dimensions=2, correlation=0.5, weight=0.7)
    full = fit(model, "full_rank", key=KEY)
    return {"full_rank": full, "mixture": fit(model, "mixture", key=KEY, smaller=[full])}


def test_two_modes_have_their_weights_and_nothing_is_lacking(unequal: dict[str, Fit]) -> None:
    full, mixture = unequal["full_rank"], unequal["mixture"]
    assert mixture.status is Status.ARRIVED
    np.testing.assert_allclose(mixture.params["auto_weights"], [0.7, 0.3], atol=2e-3)
    assert abs(mixture.elbo.value - EVIDENCE) < 5 * mixture.elbo.se + mixture.gap_limit
    assert mixture.gap_limit < 0.01
    assert abs(EVIDENCE - full.elbo.value - math.log(1 / 0.7)) < 5 * full.elbo.se + full.gap_limit
    draws = mixture.draw(KEY, 4_000)["z"][:, 0]
    assert abs((draws > 0).mean() - 0.7) < 5 * math.sqrt(0.21 / 4_000) + 2e-3


@pytest.mark.slow
def test_equal_modes_in_ten_dimensions() -> None:
    mixture = fit(TARGETS.model(target="two_modes"), "mixture", key=KEY)
    np.testing.assert_allclose(mixture.params["auto_weights"], [0.5, 0.5], atol=5e-3)
    assert abs(mixture.elbo.value - EVIDENCE) < 0.05


def test_draws_and_density_agree(unequal: dict[str, Fit]) -> None:
    mixture = unequal["mixture"]
    draws, weights = mixture.draw(KEY, 500, ("z",)), mixture.log_weights(KEY, 500)
    np.testing.assert_allclose(mixture.log_weights_at(draws), weights, atol=1e-9)
    parts = [mixture.params[f"auto_{name}"] for name in ("weights", "locs", "scale_trils")]
    density = sum(
        weight * scipy.stats.multivariate_normal(loc, root @ root.T).pdf(draws["z"])
        for weight, loc, root in zip(*parts, strict=True)
    )
    np.testing.assert_allclose(mixture.log_density(draws), np.log(density), atol=1e-9)


def test_the_weights_of_draws_are_level_where_nothing_is_lacking(unequal: dict[str, Fit]) -> None:
    weights = unequal["mixture"].fresh_log_weights
    assert weights is not None
    assert weights.std() < 0.02
    assert unequal["full_rank"].fresh_log_weights is not None


def test_a_gaussian_posterior_leaves_the_mixture_a_gaussian() -> None:
    model = pair()
    full = fit(model, "full_rank", key=KEY)
    mixture = fit(model, "mixture", key=KEY, smaller=[full])
    assert mixture.status is Status.ARRIVED
    assert mixture.gap_limit < 0.05
    assert abs(mixture.elbo.value - full.elbo.value) < 0.01


@pytest.mark.slow
def test_what_draws_can_be_fitted_to_is_no_gain() -> None:
    """In ten dimensions climbs of two components gain 0.03 nats on their draws, and lose 0.02 on others."""
    mixture = fit(TARGETS.model(), "mixture", key=KEY)
    assert mixture.status is Status.ARRIVED
    assert mixture.gap_limit < 0.01
    assert abs(mixture.elbo.value - EVIDENCE) < 5 * mixture.elbo.se + 0.001


def test_one_component_is_the_full_rank_gaussian(unequal: dict[str, Fit]) -> None:
    full = unequal["full_rank"]
    single = fit(full.model, "mixture_1", key=KEY, smaller=[full])
    assert single.params["auto_weights"].shape == (1,)
    assert abs(single.elbo.value - full.elbo.value) < 0.01
    assert single.why.endswith("it has 1 component, of weight 1")


def test_the_same_key_gives_the_same_fit_and_the_panel_spares_a_gaussian(unequal: dict[str, Fit]) -> None:
    full, mixture = unequal["full_rank"], unequal["mixture"]
    again = fit(full.model, "mixture", key=KEY, smaller=[full])
    np.testing.assert_array_equal(again.params["auto_locs"], mixture.params["auto_locs"])
    alone = fit(full.model, "mixture", key=KEY)
    assert alone.cost.gradient_evaluations > mixture.cost.gradient_evaluations
    assert abs(alone.elbo.value - mixture.elbo.value) < 0.01


def test_the_slope_is_that_of_the_elbo() -> None:
    model = TARGETS.model(target="two_modes", dimensions=2, correlation=0.5, separation=2.0)
    roots = np.stack([np.eye(2), np.array([[0.8, 0.0], [0.3, 1.2]])])
    around = Mixture(np.log([0.4, 0.6]), np.array([[1.0, 0.3], [-0.5, 0.0]]), roots)
    objective = StratifiedELBO(LogDensity(model), around, 256, key=(1,))
    x = 0.3 * np.random.default_rng(0).standard_normal(objective.parameters)
    _, slope = objective(x)
    for number, step in enumerate(1e-5 * np.eye(len(x))):
        apart = (objective(x + step)[0] - objective(x - step)[0]) / 2e-5
        assert slope[number] == pytest.approx(apart, abs=1e-6)


def test_the_stratified_elbo_is_that_of_the_guide() -> None:
    model = TARGETS.model(target="student_t", dimensions=2)
    roots = np.stack([np.eye(2), np.array([[0.8, 0.0], [0.3, 1.2]])])
    around = Mixture(np.log([0.4, 0.6]), np.array([[1.0, 0.3], [-0.5, 0.0]]), roots)
    objective = StratifiedELBO(LogDensity(model), around, 4_096, key=(1,))
    start = {"z": np.zeros(2)}
    built = build_guide(model, GUIDES["mixture"], start)
    drawn = Fit(GUIDES["mixture"], model, Status.ARRIVED, autoguide=built, params=around.params(), start=start)
    expected = Estimate.of_mean(drawn.log_weights(KEY, 20_000))
    assert abs(objective(np.zeros(objective.parameters))[0] - expected.value) < 5 * math.sqrt(2) * expected.se


def test_a_climb_that_is_cut_short_says_so() -> None:
    model = TARGETS.model(target="two_modes", dimensions=2, separation=3.0)
    around = Mixture(np.log([0.9, 0.1]), np.array([[3.0, 0.0], [-3.0, 1.0]]), np.stack([np.eye(2), np.eye(2)]))
    objective = StratifiedELBO(LogDensity(model), around, 256, key=(1,))
    short, whole = (ascend(objective, residual=1e-3, max_evaluations=count) for count in (3, 200))
    assert not short.arrived
    assert short.left > 1e-3
    assert whole.arrived
    assert whole.elbo > short.elbo > short.begun


@pytest.fixture(scope="module")
def heavy() -> Fit:
    return fit(TARGETS.model(target="student_t", dimensions=2), "full_rank", key=KEY)


def test_what_a_longer_climb_gains_is_within_the_limit(heavy: Fit) -> None:
    """Components that overlap: a climb that ended at its first small slope left five times the limit."""
    mixture = fit(heavy.model, "mixture_3", key=KEY, smaller=[heavy])
    assert mixture.certificate is not None
    assert mixture.certificate.scope is Scope.LOCAL
    parts = [np.asarray(mixture.params[f"auto_{name}"]) for name in ("weights", "locs", "scale_trils")]
    found, density = Mixture(np.log(parts[0]), *parts[1:]), LogDensity(heavy.model)
    objective = StratifiedELBO(density, found, 512, key=(99,))
    end = ascend(objective, residual=1e-8)
    gains = []
    for number in range(4):
        pair = [StratifiedELBO(density, one, 512, key=(number,)) for one in (found, objective.mixture(end.x))]
        before, after = (one(np.zeros(objective.parameters))[0] for one in pair)
        gains.append(after - before)
    gain = Estimate.of_mean(np.array(gains))
    assert gain.value - 5 * gain.se < mixture.gap_limit


@pytest.mark.parametrize("name", ["mixture", "mixture_4"])
@pytest.mark.parametrize("budget", [500, 1_000, 10_000, 60_000])
def test_it_keeps_to_its_budget(unequal: dict[str, Fit], name: str, budget: int) -> None:
    full = unequal["full_rank"]
    short = fit(full.model, name, key=KEY, smaller=[full], starts=2, max_gradients=budget)
    assert short.cost.gradient_evaluations <= budget
    if budget < 60_000 or name == "mixture_4":
        assert short.status is Status.BUDGET
        assert short.message.startswith("no bound: of the budget ")
        assert "which do not suffice" in short.message
    assert short.elbo.value > full.elbo.value - 5 * math.hypot(short.elbo.se, full.elbo.se)


def test_places_without_a_component_are_counted() -> None:
    model = TARGETS.model(target="two_modes", dimensions=2, correlation=0.5, weight=0.99995)
    mixture = fit(model, "mixture", key=KEY)
    assert "led to 2 places, of which 1 holds less than 0.0001 and gets no component, and it has 2" in mixture.why


def test_a_place_is_dropped_only_once_it_has_been_climbed_to() -> None:
    """A start whose own ELBO is far too low, beside the panel's Gaussian whose ELBO is not."""
    model = TARGETS.model(target="two_modes", dimensions=2, correlation=0.5, weight=0.7)
    starts = find_starts(model, key=KEY)
    assert len(starts.points) == 2
    rough = replace(starts.points[1], loc=starts.points[1].loc + 1.0, elbo=starts.points[1].elbo - 20.0)
    mixture = fit(model, "mixture", key=KEY, starts=replace(starts, points=(starts.points[0], rough)))
    np.testing.assert_allclose(mixture.params["auto_weights"], [0.7, 0.3], atol=2e-3)
    assert "led to 2 places, and it has 2" in mixture.why


@pytest.mark.slow
def test_a_skewed_posterior_gains_by_each_component() -> None:
    model = line()
    names = ("full_rank", "mixture", "mixture_3")
    fits = {name: fit(model, name, key=KEY, starts=2) for name in names}
    for smaller, larger in pairwise(names):
        assert fits[larger].elbo.value > fits[smaller].elbo.value - 3 * fits[larger].elbo.se - 0.1


def test_a_kept_mixture_draws_the_same(tmp_path: object, unequal: dict[str, Fit]) -> None:
    mixture = unequal["mixture"]
    keep_fit(Storage(tmp_path), "mixture", mixture)
    again = kept_fit(Storage(tmp_path), "mixture", mixture.model, mixture.guide)
    assert again is not None
    np.testing.assert_array_equal(again.draw(KEY, 20)["z"], mixture.draw(KEY, 20)["z"])
    assert again.gap_limit == mixture.gap_limit
    assert find_guide("mixture_3").is_named


def test_what_it_contains() -> None:
    model = pair()
    full, two, three, any_number = (find_guide(name) for name in ("full_rank", "mixture_2", "mixture_3", "mixture"))
    for mixture in (two, three, any_number):
        assert contains(mixture, full, model)
        assert not contains(full, mixture, model)
    assert contains(three, two, model)
    assert not contains(two, three, model)
    assert not contains(any_number, two, model)
    assert not contains(three, find_guide("full_rank@other"), model)


def test_misuse_is_told() -> None:
    model = pair()
    with pytest.raises(ValueError, match="mixture_<components> or low_rank_<columns>; got 'mixture_0'"):
        fit(model, "mixture_0", key=KEY)
    with pytest.raises(ValueError, match="Expected at most 50 components of a mixture; got 60"):
        fit(model, "mixture_60", key=KEY, starts=1)
    with pytest.raises(ValueError, match="'auto' for 'mixture', which has an algorithm of its own; got 'svi'"):
        fit(model, "mixture", key=KEY, solver="svi")
    with pytest.raises(ValueError, match="Expected at least one component; got 0"):
        AutoMixtureNormal(model.fn, components=0)
    with pytest.raises(ValueError, match="Expected init_scale above 0; got 0"):
        AutoMixtureNormal(model.fn, init_scale=0.0)


@pytest.mark.slow
def test_the_guide_works_on_its_own() -> None:
    model = pair()
    built = build_guide(model, GUIDES["mixture"], {"z": np.zeros(2)})
    with handlers.seed(rng_seed=0):
        trace = handlers.trace(built).get_trace(**model.arrays)
    params = {name: site["value"] for name, site in trace.items() if site["type"] == "param"}
    assert {name: value.shape for name, value in params.items()} == {
        "auto_weights": (2,),
        "auto_locs": (2, 2),
        "auto_scale_trils": (2, 2, 2),
    }
    with jax.numpy_rank_promotion("allow"):  # NumPyro's own draws of many rely on it
        drawn = built.sample_posterior(KEY, params, sample_shape=(5,))
        densities = built.get_posterior(params).log_prob(drawn["z"])
    assert drawn["z"].shape == (5, 2)
    assert bool(jnp.isfinite(densities).all())
