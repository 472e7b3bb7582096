"""Flows: they begin at the best Gaussian, never end below it, gain where it bends, and know their density."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.reparam import LocScaleReparam
from targets import pair

from toolkit import Dataset, Fit, Guide, Model, Status, fit
from toolkit.estimate import Estimate
from toolkit.storage import Storage
from toolkit.variational.building import build_guide
from toolkit.variational.flow_guides import AutoBNAF, AutoFlow, AutoIAF
from toolkit.variational.guides import GUIDES, block_guide, find_guide
from toolkit.variational.keeping import keep_fit, kept_fit
from toolkit.variational.nesting import check_nesting, contains

KEY = jax.random.PRNGKey(0)
FLOWS = ("iaf", "bnaf")


@pytest.fixture(autouse=True)
def _as_numpyro_has_them() -> Iterator[None]:
    """NumPyro's networks rely on broadcasting over ranks."""
    with jax.numpy_rank_promotion("allow"):
        yield


def banana(nothing: object) -> None:
    bend = numpyro.sample("bend", dist.Normal(0.0, 1.0))
    numpyro.sample("z", dist.Normal(bend**2, 0.5))
    numpyro.factor("none_observed", 0.0 * jnp.sum(nothing))


BANANA = Model(banana, Dataset("none", {"nothing": np.zeros(1)}), log_evidence=0.0)


@pytest.fixture(scope="module")
def full() -> Fit:
    return fit(BANANA, "full_rank", key=KEY)


@pytest.fixture(scope="module")
def iaf(full: Fit) -> Fit:
    with jax.numpy_rank_promotion("allow"):
        return fit(BANANA, "iaf", key=KEY, smaller=[full])


def begun(name: str, size: int = 3) -> tuple[AutoFlow, dict[str, object], Model]:
    """A flow as it begins, on a target of some dimensions."""

    def target(nothing: object) -> None:
        numpyro.sample("z", dist.Normal(jnp.zeros(size), 1.0).to_event(1))
        numpyro.factor("none_observed", 0.0 * jnp.sum(nothing))

    model = Model(target, Dataset("none", {"nothing": np.zeros(1)}))
    built = build_guide(model, GUIDES[name], {"z": np.arange(1.0, size + 1)})
    with handlers.seed(rng_seed=0):
        trace = handlers.trace(built).get_trace(**model.arrays)
    return built, {name: site["value"] for name, site in trace.items() if site["type"] == "param"}, model


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOWS)
def test_it_begins_at_the_affine_map(name: str) -> None:
    built, params, _ = begun(name)
    root = np.array([[2.0, 0, 0], [0.5, 1.0, 0], [-0.3, 0.2, 0.7]])
    params |= {"auto_loc": np.array([1.0, 2.0, 3.0]), "auto_scale_tril": root}
    eps = np.asarray(jax.random.normal(KEY, (50, 3)))
    moved = moved_by(built, params, eps)
    expected = params["auto_loc"] + eps @ root.T
    # Exactly for the IAF; for the BNAF up to its gate, which is all but closed and cannot be closed.
    assert np.abs(moved - expected).max() < {"iaf": 1e-12, "bnaf": 0.5}[name]
    if name == "bnaf":
        shut = {key: _shut(value) if "arn" in key else value for key, value in params.items()}
        assert np.abs(moved_by(built, shut, eps) - expected).max() < 1e-4


def moved_by(built: AutoFlow, params: dict[str, object], eps: np.ndarray) -> np.ndarray:
    """Where base draws (draws, size) are moved to."""
    return np.asarray(jax.jit(jax.vmap(lambda one: built.get_transform(params)(one)))(eps))


def _shut(network: list) -> list:
    return [*network[:-1], jnp.asarray(-15.0)]


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.slow
def test_bent_by_any_weights_its_density_is_that_of_its_draws(name: str) -> None:
    built, params, _ = begun(name)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: leaf + 0.5 * rng.standard_normal(np.shape(leaf)), params)
    params["auto_scale_tril"] = np.tril(params["auto_scale_tril"]) + 2 * np.eye(3)
    if name == "bnaf":
        params["auto_arn__0$params"] = [*params["auto_arn__0$params"][:-1], jnp.asarray(2.0)]

    def both(one: jax.Array) -> tuple[jax.Array, jax.Array]:
        transform = built.get_transform(params)
        by_change = dist.Normal(0, 1).log_prob(one).sum() - jnp.linalg.slogdet(jax.jacfwd(transform)(one))[1]
        return built.get_posterior(params).log_prob(transform(one)), by_change

    found, by_change = jax.jit(jax.vmap(both))(np.asarray(jax.random.normal(KEY, (40, 3))))
    np.testing.assert_allclose(found, by_change, atol=1e-6)


@pytest.mark.slow
def test_an_inverse_settles_in_single_precision_and_row_by_row() -> None:
    def target() -> None:
        numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))

    with jax.enable_x64(False):
        built = AutoBNAF(target, hidden_factors=[2])
        with handlers.seed(rng_seed=0):
            trace = handlers.trace(built).get_trace()
        params = {name: site["value"] for name, site in trace.items() if site["type"] == "param"}
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
        params["auto_arn__0$params"] = [*params["auto_arn__0$params"][:-1], jnp.asarray(2.0, jnp.float32)]
        moved = 3 * jax.random.normal(KEY, (50, 2), jnp.float32)
        moved = moved.at[:3].set(jnp.array([[jnp.inf, 0.0], [jnp.nan, 0.0], [1e6, -1e6]], jnp.float32))
        found = jax.jit(lambda at: built.get_posterior(params).log_prob(at))(moved)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(np.isnan(found), np.arange(50) < 2)


def test_a_flow_bends_where_a_gaussian_cannot(full: Fit, iaf: Fit) -> None:
    assert iaf.status is Status.ARRIVED
    assert full.elbo.value < -0.5
    assert -0.1 < iaf.elbo.value < 5 * iaf.elbo.se
    assert abs(iaf.draw(KEY, 4_000)["z"].mean() - 1.0) < 5 * math.sqrt(2.25 / 4_000) + 0.1
    assert "it begins at the best Gaussian" in iaf.why


@pytest.mark.slow
def test_so_does_the_other_flow_whose_density_is_found_by_iteration(full: Fit) -> None:
    bnaf = fit(BANANA, "bnaf", key=KEY, smaller=[full])
    assert bnaf.status is Status.ARRIVED
    assert -0.1 < bnaf.elbo.value < 5 * bnaf.elbo.se
    np.testing.assert_allclose(bnaf.log_weights_at(bnaf.draw(KEY, 200)), bnaf.log_weights(KEY, 200), atol=1e-6)


@pytest.mark.slow
def test_its_weights_at_its_own_draws_are_its_weights(iaf: Fit) -> None:
    np.testing.assert_allclose(iaf.log_weights_at(iaf.draw(KEY, 200)), iaf.log_weights(KEY, 200), atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOWS)
def test_on_a_gaussian_it_stays_there(name: str) -> None:
    model = pair()
    full = fit(model, "full_rank", key=KEY)
    flow = fit(model, name, key=KEY, smaller=[full])
    assert flow.status is Status.ARRIVED
    assert check_nesting([full, flow])[1].status is Status.ARRIVED
    assert abs(flow.elbo.value - full.elbo.value) < 0.02


def test_a_budget_too_small_for_a_round_leaves_the_gaussian(full: Fit) -> None:
    short = fit(BANANA, "iaf", key=KEY, smaller=[full], max_gradients=10_000)
    assert short.status is Status.BUDGET
    assert abs(short.elbo.value - full.elbo.value) < 5 * math.hypot(short.elbo.se, full.elbo.se)


@pytest.mark.slow
def test_in_a_chart_with_parameters_it_begins_with_the_gaussian_s() -> None:
    def groups(y: object = None) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        with numpyro.plate("group", 3):
            effect = numpyro.sample("effect", dist.Normal(mu, 1.0))
            numpyro.sample("y", dist.Normal(effect, 1.0), obs=y)

    charts = {"learned": {"effect": LocScaleReparam(None)}}
    model = Model(groups, Dataset("three", {"y": np.array([0.0, 1.0, 3.0])}), charts=charts, chart="learned")
    full = fit(model, "full_rank", key=KEY, starts=1, max_gradients=2_000)  # no step is paid for: one can be set
    at = replace(full, params=full.params | {"effect_centered": np.array(0.8)}, status=Status.ARRIVED)
    flow = fit(model, "iaf", key=KEY, starts=1, smaller=[at], max_gradients=10)
    assert flow.params["effect_centered"] == pytest.approx(0.8)
    expected = Estimate.of_mean(at.log_weights(KEY, 4_000))
    assert abs(flow.elbo.value - expected.value) < 5 * math.hypot(flow.elbo.se, expected.se)


@pytest.mark.slow
def test_the_same_key_gives_the_same_fit(full: Fit, iaf: Fit) -> None:
    again = fit(BANANA, "iaf", key=KEY, smaller=[full])
    for one, other in zip(jax.tree.leaves(again.params), jax.tree.leaves(iaf.params), strict=True):
        np.testing.assert_array_equal(one, other)


def test_without_an_optimum_for_the_gaussian_there_is_none_for_the_flow(full: Fit) -> None:
    lost = replace(full, status=Status.IMPROPER, message="along z", params={})
    flow = fit(BANANA, "iaf", key=KEY, smaller=[lost])
    assert flow.status is Status.IMPROPER
    assert flow.message == "at the Gaussian at which it would begin: along z"
    assert not flow.usable


def test_a_kept_flow_draws_the_same(tmp_path: object, iaf: Fit) -> None:
    keep_fit(Storage(tmp_path), "flow", iaf)
    again = kept_fit(Storage(tmp_path), "flow", iaf.model, iaf.guide)
    assert again is not None
    np.testing.assert_array_equal(again.draw(KEY, 20)["z"], iaf.draw(KEY, 20)["z"])


def test_what_flows_contain() -> None:
    model = pair()
    inside = [find_guide(name) for name in ("full_rank", "coupled", "low_rank", "mean_field", "laplace")]
    for name in FLOWS:
        for smaller in (*inside, block_guide("mine", [("z",)])):
            assert contains(find_guide(name), smaller, model)
            assert not contains(smaller, find_guide(name), model)
        assert not contains(find_guide(name), find_guide("mixture"), model)


def test_below_the_gaussian_it_has_not_arrived(full: Fit) -> None:
    low = Fit(GUIDES["iaf"], BANANA, Status.ARRIVED, elbo=Estimate(full.elbo.value - 1.0, 0.01))
    _, marked = check_nesting([full, low])
    assert marked.status is Status.BELOW_SMALLER_FAMILY
    assert marked.message.endswith("nats below full_rank, which it contains")


@pytest.mark.parametrize("kind", [AutoIAF, AutoBNAF])
def test_misuse_is_told(kind: type[AutoGuide]) -> None:
    def one(nothing: object) -> None:
        numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.factor("none_observed", 0.0 * jnp.sum(nothing))

    with pytest.raises(ValueError, match="Expected at least one layer; got num_flows=0"):
        kind(one, num_flows=0)
    with pytest.raises(ValueError, match="Expected init_scale above 0; got 0"):
        kind(one, init_scale=0.0)
    with pytest.raises(ValueError, match="at least 2 unconstrained coordinates for Auto.*got 1: take full_rank"):
        fit(Model(one, Dataset("none", {"nothing": np.zeros(1)})), Guide("mine", kind), key=KEY, starts=1)
