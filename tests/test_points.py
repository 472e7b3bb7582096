"""Draws looked at in a chart: back to where they came from, with the chart's own density."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import biject_to
from numpyro.infer.reparam import (
    CircularReparam,
    ExplicitReparam,
    HaarReparam,
    LocScaleReparam,
    Reparam,
    TransformReparam,
)

import models
from toolkit import Dataset, Model, fit
from toolkit.modelling.points import log_density_at, points
from toolkit.modelling.space import latent_space

DRAWS = 7


def varied(group: Any, y: Any = None) -> None:
    """A hierarchy whose sites can be moved in every way that NumPyro has for real and positive ones."""
    centre = numpyro.sample("centre", dist.Normal(0.0, 2.0))
    spread = numpyro.sample("spread", dist.HalfNormal(1.0))
    log_normal = dist.TransformedDistribution(dist.Normal(centre, 0.5), dist.transforms.ExpTransform())
    level = numpyro.sample("level", log_normal)
    shares = numpyro.sample("shares", dist.Dirichlet(jnp.ones(3)))
    with numpyro.plate("groups", 4):
        effect = numpyro.sample("effect", dist.StudentT(5.0, centre, spread))
    with numpyro.plate("rows", group.shape[0]):
        numpyro.sample("y", dist.Normal(level * effect[group] + shares[0], 0.5), obs=y)


CHARTS: dict[str, Mapping[str, Reparam]] = {
    "noncentred": {"effect": LocScaleReparam(0.0, shape_params=["df"])},
    "between": {"effect": LocScaleReparam(0.3, shape_params=["df"])},
    "logs": {"level": TransformReparam()},
    "all": {"effect": LocScaleReparam(0.0, shape_params=["df"]), "level": TransformReparam()},
    "explicit": {"level": ExplicitReparam(dist.transforms.ExpTransform().inv)},
    "learned": {"effect": LocScaleReparam(shape_params=["df"])},
}


@pytest.fixture(scope="module")
def model() -> Model:
    rng = np.random.default_rng(0)
    data = Dataset("varied", {"group": np.arange(12) % 4, "y": rng.normal(size=12)})
    return Model(varied, data, charts=CHARTS)


def started(model: Model, chart: str, params: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Points of a chart, unconstrained, and the plain latents that they give, `(draws, ...)` each."""
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.PRNGKey(3), DRAWS)
        z = jax.vmap(lambda key: model.start(key, model.arrays, chart=chart))(keys)
        sites = jax.vmap(lambda one: model.constrain(one, model.arrays, params, chart=chart))(z)
    plain = {name: np.asarray(sites[name]) for name in model.latents}
    return {name: np.asarray(value) for name, value in z.items()}, plain


def own_density(model: Model, chart: str, z: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.asarray(jax.vmap(lambda one: model.log_density(one, model.arrays, chart))(z))


@pytest.mark.parametrize("chart", ["plain", "noncentred", "between", "logs", "explicit", "all"])
def test_points_are_where_the_draws_came_from_with_their_density(model: Model, chart: str) -> None:
    z, plain = started(model, chart, {})
    found = points(model, plain, chart)
    space = latent_space(model, chart)
    assert set(found.latents) == set(space.names)
    flat = np.concatenate([z[name].reshape(DRAWS, -1) for name in space.names], axis=1)
    np.testing.assert_allclose(found.vectors, flat, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.log_density, own_density(model, chart, z), rtol=1e-9)
    np.testing.assert_allclose(log_density_at(model, flat, chart), found.log_density, rtol=1e-9)
    sites = jax.vmap(lambda one: model.values(one, model.arrays, chart=chart))(found.latents)
    for name, values in plain.items():
        np.testing.assert_allclose(sites[name], values, rtol=1e-9)


def test_a_learned_chart_is_taken_where_it_was_left(model: Model) -> None:
    params = {"effect_centered": np.array(0.7)}
    z, plain = started(model, "learned", params)
    found = points(model, plain, "learned", params)
    np.testing.assert_allclose(found.latents["effect_decentered"], z["effect_decentered"], rtol=1e-9)


@pytest.mark.parametrize("chart", ["noncentred", "logs"])
def test_charts_differ_by_their_jacobian_alone(model: Model, chart: str) -> None:
    """Density times volume is one in every chart; at two draws, ratios of densities therefore differ by volumes'."""
    _, plain = started(model, chart, {})
    here, there = points(model, plain, "plain"), points(model, plain, chart)
    expected = {
        "noncentred": 4 * np.log(plain["spread"]),  # four effects divided by the spread
        "logs": np.zeros(DRAWS),  # a positive site's unconstrained coordinate is its logarithm already
    }[chart]
    np.testing.assert_allclose(there.log_density - here.log_density, expected, rtol=1e-9, atol=1e-9)


def test_the_likelihood_and_the_jacobian_are_parts_of_the_density(model: Model) -> None:
    _, plain = started(model, "plain", {})
    found = points(model, plain, "plain")
    prior = dist.Normal(0.0, 2.0).log_prob(plain["centre"]) + dist.HalfNormal(1.0).log_prob(plain["spread"])
    prior += dist.LogNormal(plain["centre"], 0.5).log_prob(plain["level"]) + np.log(2.0)  # of three shares
    effects = dist.StudentT(5.0, plain["centre"][:, None], plain["spread"][:, None])
    prior += effects.log_prob(plain["effect"]).sum(-1)
    np.testing.assert_allclose(
        found.log_density, found.log_likelihood + np.asarray(prior) + found.log_jacobian, rtol=1e-9
    )
    simplex = biject_to(dist.constraints.simplex)
    shares = jax.vmap(lambda x: simplex.log_abs_det_jacobian(simplex.inv(x), x))(plain["shares"])
    np.testing.assert_allclose(
        found.log_jacobian, np.log(plain["spread"]) + np.log(plain["level"]) + np.asarray(shares), rtol=1e-9
    )


@pytest.mark.parametrize(
    ("name", "options", "chart"),
    [
        pytest.param("collinear_logistic", {"prior": "horseshoe"}, "rotated", marks=pytest.mark.slow),
        ("collinear_logistic", {}, "rotated"),
        ("conjugate_regression", {}, "rotated"),
        ("hierarchical_regression", {}, "noncentred"),
        ("gaussian_target", {"target": "funnel"}, "noncentred"),
        pytest.param("lda", {}, "plain", marks=pytest.mark.slow),
        pytest.param("lda", {}, "normal", marks=pytest.mark.slow),
        pytest.param("poisson_glm", {}, "plain", marks=pytest.mark.slow),
    ],
)
def test_curated_charts_can_be_looked_at(name: str, options: dict[str, Any], chart: str) -> None:
    module = models.load(name)
    curated = module.model(module.simulate(jax.random.PRNGKey(0)), **options)
    # NumPyro's stick-breaking of several simplexes adds a vector to a matrix.
    with jax.numpy_rank_promotion("allow"):
        z, plain = started(curated, chart, {})
        expected = own_density(curated, chart, z)
    # Looked at from draws, values have passed through constrained space and back.
    np.testing.assert_allclose(points(curated, plain, chart).log_density, expected, rtol=1e-6)


def angle(y: Any = None) -> None:
    direction = numpyro.sample("direction", dist.VonMises(0.0, 1.0))
    numpyro.sample("y", dist.Normal(direction, 1.0), obs=y)


class Squared(Reparam):
    def __call__(self, name: str, fn: Any, obs: Any) -> tuple[None, Any]:
        base = numpyro.sample(f"{name}_root", dist.HalfNormal(1.0))
        return None, base**2


class Halves(Reparam):
    def __call__(self, name: str, fn: Any, obs: Any) -> tuple[None, Any]:
        first, second = (numpyro.sample(f"{name}_{part}", dist.Exponential(2.0)) for part in ("a", "b"))
        return None, first + second


def positive(y: Any = None) -> None:
    scale = numpyro.sample("scale", dist.Exponential(1.0))
    numpyro.sample("y", dist.Normal(0.0, scale), obs=y)


ONE = Dataset("one", {"y": np.array(0.3)})


@pytest.mark.parametrize(("reparam", "text"), [(Squared(), "Squared is neither"), (Halves(), "Halves has 2")])
def test_a_chart_without_an_inverse_is_told(reparam: Reparam, text: str) -> None:
    model = Model(positive, ONE, charts={"other": {"scale": reparam}})
    with pytest.raises(ValueError, match=text):
        points(model, {"scale": np.array([0.5, 1.0])}, "other")


def test_a_circle_is_cut_open() -> None:
    model = Model(angle, ONE, charts={"open": {"direction": CircularReparam()}})
    angles = np.array([0.5, -3.0])
    found = points(model, {"direction": angles}, "open")
    np.testing.assert_allclose(found.latents["direction_unwrapped"], angles)
    expected = dist.VonMises(0.0, 1.0).log_prob(angles) + dist.Normal(angles, 1.0).log_prob(0.3)
    np.testing.assert_allclose(found.log_density, expected)


def test_a_series_can_be_looked_at_by_its_frequencies() -> None:
    def series(y: Any = None) -> None:
        steps = numpyro.sample("steps", dist.Normal(0.0, 1.0).expand([8]).to_event(1))
        numpyro.sample("y", dist.Normal(steps.cumsum(), 0.5).to_event(1), obs=y)

    model = Model(series, Dataset("eight", {"y": np.arange(8.0)}), charts={"waves": {"steps": HaarReparam()}})
    z, plain = started(model, "waves", {})
    found = points(model, plain, "waves")
    np.testing.assert_allclose(found.latents["steps_haar"], z["steps_haar"], rtol=1e-9)
    np.testing.assert_allclose(found.log_density, points(model, plain, "plain").log_density, rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "guide"),
    [
        ("hierarchical_regression", "mean_field"),
        pytest.param("hierarchical_regression", "full_rank@noncentred", marks=pytest.mark.slow),
        ("conjugate_regression", "low_rank@rotated"),
        pytest.param("conjugate_regression", "laplace", marks=pytest.mark.slow),
        pytest.param("conjugate_regression", "iaf", marks=pytest.mark.slow),
    ],
)
def test_weights_at_a_fits_own_draws_are_its_weights(name: str, guide: str) -> None:
    module = models.load(name)
    model = module.model(module.simulate(jax.random.PRNGKey(0)))
    key = jax.random.PRNGKey(4)
    fitted = fit(model, guide, key=key, max_gradients=20_000)
    drawn = fitted.draw(key, 20, model.latents)
    np.testing.assert_allclose(fitted.log_weights_at(drawn), fitted.log_weights(key, 20), atol=1e-6)


def test_missing_latents_are_named(model: Model) -> None:
    with pytest.raises(ValueError, match="they lack spread, level, shares, effect and hold centre"):
        points(model, {"centre": np.zeros(3)})
