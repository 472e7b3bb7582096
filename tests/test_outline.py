"""Autoguides are set up on an outline of the model: they must read of it what they would read of the model itself."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers

from toolkit import Dataset, Model
from toolkit.modelling.space import latent_space
from toolkit.variational import building
from toolkit.variational.building import build_guide
from toolkit.variational.guides import find_guide

ROWS, GROUPS = 6, 3


def everything(x: Any, group: Any, y: Any) -> None:
    """Sites whose support depends on another, simplices, triangles, plates within plates, deterministic sites."""
    low = numpyro.sample("low", dist.Normal(0, 1))
    high = numpyro.deterministic("high", low + 2)
    between = numpyro.sample("between", dist.Uniform(low, high))
    shares = numpyro.sample("shares", dist.Dirichlet(jnp.ones(4)))
    root = numpyro.sample("root", dist.LKJCholesky(3, 1.0))
    with numpyro.plate("groups", GROUPS, dim=-2):
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        with numpyro.plate("kinds", 2, dim=-1):
            effect = numpyro.sample("effect", dist.Normal(0.0, jnp.broadcast_to(scale, (GROUPS, 2))))
    total = numpyro.deterministic("total", effect.sum(-1))
    with numpyro.plate("rows", ROWS):
        loc = total[group] * x + between + shares[0] + root[2, 0]
        numpyro.sample("y", dist.Normal(loc, 1.0), obs=y)


@pytest.fixture(scope="module")
def model() -> Model:
    rng = np.random.default_rng(0)
    arrays = {"x": rng.standard_normal(ROWS), "group": np.arange(ROWS) % GROUPS, "y": rng.standard_normal(ROWS)}
    return Model(everything, Dataset("everything", arrays))


def on_the_model(monkeypatch: pytest.MonkeyPatch, model: Model, name: str, start: dict[str, Any]) -> Any:
    """The guide, set up as NumPyro does it."""
    monkeypatch.setattr(building, "_outline", lambda *given: None)
    return build_guide(model, find_guide(name), start)


@pytest.mark.parametrize("name", ["mean_field", "diagonal", "low_rank", "full_rank", "blocks", "coupled"])
def test_a_guide_on_an_outline_is_the_guide_on_the_model(
    model: Model, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = latent_space(model)
    start = space.unravel(np.random.default_rng(1).standard_normal(space.size))
    quick = build_guide(model, find_guide(name), start)
    slow = on_the_model(monkeypatch, model, name, start)
    assert list(quick._init_locs) == list(slow._init_locs)
    for site, value in slow._init_locs.items():
        np.testing.assert_allclose(quick._init_locs[site], value, rtol=1e-6, atol=1e-7)
    assert quick._prototype_frames == slow._prototype_frames
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):  # inside of NumPyro ranks differ
        params = {
            site: message["value"]
            for site, message in handlers.trace(handlers.seed(slow, 0)).get_trace(**model.arrays).items()
            if message["type"] == "param"
        }
        key = jax.random.key(2)
        draws = [guide.sample_posterior(key, params, sample_shape=(3,)) for guide in (quick, slow)]
        medians = [guide.median(params) for guide in (quick, slow)]
        traced = [
            handlers.trace(handlers.substitute(handlers.seed(guide, 3), params)).get_trace(**model.arrays)
            for guide in (quick, slow)
        ]
    for one, other in (draws, medians):
        assert one.keys() == other.keys()
        for site in other:
            np.testing.assert_allclose(one[site], other[site], rtol=1e-6, atol=1e-7)
    assert "total" in draws[0]
    one, other = traced
    assert one.keys() == other.keys()
    for site, message in other.items():
        np.testing.assert_allclose(one[site]["value"], message["value"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["map", "laplace"])
def test_a_guide_of_points_on_an_outline_is_the_guide_on_the_model(
    model: Model, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While they are fitted: where the parameters begin, and what is sampled there."""
    space = latent_space(model)
    start = space.unravel(np.random.default_rng(1).standard_normal(space.size))
    guides = build_guide(model, find_guide(name), start), on_the_model(monkeypatch, model, name, start)
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        one, other = (handlers.trace(handlers.seed(guide, 3)).get_trace(**model.arrays) for guide in guides)
        losses = [float(guide._loss_fn({"auto_loc": space.ravel(start)})) for guide in guides if name == "laplace"]
    assert list(one) == list(other)
    for site, message in other.items():
        assert one[site]["type"] == message["type"]
        np.testing.assert_allclose(one[site]["value"], message["value"], rtol=1e-6, atol=1e-7)
    assert np.ptp(losses) < 1e-6 if losses else name == "map"


def test_a_model_with_parameters_of_its_own_has_no_outline() -> None:
    def learned(y: Any) -> None:
        width = numpyro.param("width", 1.0)
        z = numpyro.sample("z", dist.Normal(0, width))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=y)

    assert building._outline(learned, {"y": np.array(0.5)}, {"z": np.zeros(())}) is None


def test_a_model_with_a_subsampled_plate_has_no_outline() -> None:
    def sampled(y: Any) -> None:
        z = numpyro.sample("z", dist.Normal(0, 1))
        with numpyro.plate("rows", len(y), subsample_size=2):
            numpyro.sample("y", dist.Normal(z, 1.0), obs=numpyro.subsample(y, 0))

    assert building._outline(sampled, {"y": np.arange(5.0)}, {"z": np.zeros(())}) is None


def test_an_outline_does_none_of_the_models_work(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def counted(x: Any, group: Any, y: Any) -> None:
        runs.append(isinstance(jnp.zeros(()) + 0, jax.core.Tracer))
        everything(x, group, y)

    space = latent_space(model)
    other = Model(counted, model.dataset)
    runs.clear()
    build_guide(other, find_guide("full_rank"), space.unravel(np.zeros(space.size)))
    assert runs
    assert all(runs)  # traced, never run operation by operation
