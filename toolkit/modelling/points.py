"""Draws of a model's latent sites looked at in a chart: as points of unconstrained space, with their densities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer.reparam import ExplicitReparam, Reparam, TransformReparam, UnitJacobianReparam
from numpyro.infer.util import compute_log_probs

from toolkit.modelling.mapping import over_draws
from toolkit.modelling.model import Model
from toolkit.modelling.sites import FACTOR, OBSERVED, improper_start
from toolkit.modelling.space import latent_space

_ROUNDING = 1e-6  # of a site's value: by less than that, a chart's inverse may miss it


@dataclass(frozen=True, eq=False)
class Points:
    """Draws in a chart.

    Attributes:
        latents: The chart's latent sites in constrained space, `(draws, ...)` each.
        vectors: The same in unconstrained space, in program order, `(draws, coordinate)`.
        log_density: Log p(x, z) in unconstrained space, the Jacobian included, `(draws,)`, in nats.
        log_likelihood: Log p(x | z): of what is observed, and of factors, `(draws,)`, in nats.
        log_jacobian: Log of the volume of constrained space for a unit of unconstrained space, `(draws,)`.
    """

    latents: dict[str, np.ndarray]
    vectors: np.ndarray
    log_density: np.ndarray
    log_likelihood: np.ndarray
    log_jacobian: np.ndarray


def points(
    model: Model, draws: Mapping[str, Any], chart: str | None = None, params: Mapping[str, Any] | None = None
) -> Points:
    """The points of a chart at which the latent sites have given values.

    Args:
        model: The model.
        draws: The latent sites of the model as it is written (the plain chart), in constrained space, `(draws, ...)`
            each; further sites are ignored.
        chart: Which chart; the model's own if None.
        params: Values of the parameters that the callable itself has in that chart.

    Raises:
        ValueError: A latent site is missing, or the chart has a reparameteriser of which no inverse is known: neither
            is its value an affine function of one base site, nor does it have a method `inverse`.
    """
    chart = model.chart if chart is None else chart
    given = _plain(model, draws)

    def one(latents: Any, arrays: Any, params: Any) -> tuple[Any, ...]:
        moved, miss = _moved(model, latents, arrays, params, chart)
        return (*_looked_at(model, moved, arrays, params, chart), miss)

    found = over_draws(model, ("points", chart), one, given, _own_params(model, chart, params))
    latents, vectors, log_density, log_likelihood, log_jacobian, miss = found
    for name, missed in miss.items():
        if not (missed <= _ROUNDING).all():
            raise ValueError(_without_inverse(name, model.charts[chart][name]))
    return Points(latents, vectors, log_density, log_likelihood, log_jacobian)


def log_density_at(model: Model, vectors: np.ndarray, chart: str | None = None) -> np.ndarray:
    """Log p(x, z) in a chart's unconstrained space, the Jacobian included, at vectors `(draws, coordinate)`."""
    space = latent_space(model, chart)

    def one(vector: Any, arrays: Any, _params: Any) -> Any:
        return model.log_density(space.unravel(vector), arrays, chart)

    chart = model.chart if chart is None else chart
    return np.asarray(over_draws(model, ("log density", chart), one, np.asarray(vectors, float), {}))


def sites_at(
    model: Model,
    vectors: np.ndarray,
    sites: tuple[str, ...],
    chart: str | None = None,
    params: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """Sites in constrained space at vectors of a chart's unconstrained space, `(draws, ...)` each.

    Args:
        model: The model.
        vectors: Points, `(draws, coordinate)`.
        sites: Latent or deterministic ones.
        chart: Which chart; the model's own if None.
        params: Values of the parameters that the callable itself has in that chart.
    """
    space = latent_space(model, chart)
    chart = model.chart if chart is None else chart
    own = _own_params(model, chart, params)

    def one(vector: Any, arrays: Any, params: Any) -> Any:
        values = model.constrain(space.unravel(vector), arrays, params, chart=chart)
        return {site: values[site] for site in sites}

    found = over_draws(model, ("sites", sites, chart), one, np.asarray(vectors, float), own)
    return {site: np.asarray(values) for site, values in found.items()}


def _own_params(model: Model, chart: str, params: Mapping[str, Any] | None) -> dict[str, np.ndarray]:
    """Of all parameters of a fit, those that the callable itself has in a chart."""
    return {name: np.asarray(value, float) for name, value in (params or {}).items() if name in model.parameters(chart)}


def _plain(model: Model, draws: Mapping[str, Any]) -> dict[str, np.ndarray]:
    missing = [name for name in model.latents if name not in draws]
    if missing:
        raise ValueError(
            f"Expected draws of every latent of model '{model.name}'; they lack {', '.join(missing)} and hold "
            f"{', '.join(draws) or 'nothing'}."
        )
    return {name: np.asarray(draws[name], float) for name in model.latents}


def _moved(
    model: Model, latents: Mapping[str, Any], arrays: Mapping[str, Any], params: Mapping[str, Any], chart: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One draw's latents in a chart, and by how much, relatively, what each gives back misses."""
    program = handlers.substitute(model.bound("plain"), data=dict(latents))
    with handlers.block(), handlers.trace() as trace:
        handlers.seed(program, rng_seed=0)(**arrays)
    moved: dict[str, Any] = {}
    misses: dict[str, Any] = {}
    for name in latents:
        moved |= _bases(name, trace[name]["fn"], latents[name], model.charts[chart], params, misses)
    return moved, misses


def _bases(
    name: str, fn: Any, value: Any, config: Mapping[str, Reparam], params: Mapping[str, Any], misses: dict[str, Any]
) -> dict[str, Any]:
    """The base sites that give a site its value, by name; the site itself where the chart leaves it alone."""
    if name not in config:
        return {name: value}
    reparam = config[name]

    def made(bases: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = {**params, **bases}

        def chosen(message: Mapping[str, Any]) -> Any:
            # Where a base site is flat nothing can be drawn, and any value will do as long as none is given.
            return given[message["name"]] if message["name"] in given else improper_start(message)

        with (
            handlers.block(),
            handlers.trace() as trace,
            handlers.substitute(substitute_fn=chosen),
            handlers.seed(rng_seed=0),
        ):
            _, placed = reparam(name, fn, None)
        latent = {key: s for key, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}
        return placed, latent

    placed, sites = made({})
    if not sites:
        return {name: value}  # fully centred: the site is its own base
    if len(sites) > 1 or placed is None:
        raise ValueError(
            f"Expected the chart's reparameteriser of site '{name}' to have one base site; "
            f"{type(reparam).__name__} has {len(sites)}: draws cannot be looked at in this chart."
        )
    ((base, site),) = sites.items()
    if hasattr(reparam, "inverse"):
        found = reparam.inverse(fn, value)
    elif isinstance(reparam, TransformReparam):
        found = _untransformed(fn, value)
    elif isinstance(reparam, ExplicitReparam):
        found = reparam.transform(value)
    elif isinstance(reparam, UnitJacobianReparam):
        found = reparam.transform(biject_to(fn.support).inv(value))
    else:
        if jnp.shape(placed) != jnp.shape(site["value"]):
            raise ValueError(_without_inverse(name, reparam))
        found = _affine_inverse(lambda b: made({base: b})[0], value)
    back = made({base: found})[0]
    misses[name] = (jnp.abs(back - value) / (1.0 + jnp.abs(value))).max()
    return _bases(base, site["fn"], found, config, params, misses)


def _without_inverse(name: str, reparam: Reparam) -> str:
    return (
        f"Expected a reparameteriser of site '{name}' that can be inverted (an affine function of the base site's "
        f"elements, or one with a method inverse(fn, value)); {type(reparam).__name__} is neither: draws cannot be "
        "looked at in this chart."
    )


def _untransformed(fn: Any, value: Any) -> Any:
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution):
        fn = fn.base_dist
    for transform in reversed(fn.transforms):
        value = transform.inv(value)
    return value


def _affine_inverse(place: Any, value: Any) -> Any:
    """Where an affine function has a value: element by element (as where a location and scale are taken off)."""
    origin = jnp.zeros(jnp.shape(value))
    at_origin, slope = jax.jvp(place, (origin,), (jnp.ones(origin.shape),))
    return (value - at_origin) / slope


def _looked_at(
    model: Model, latents: Mapping[str, Any], arrays: Mapping[str, Any], params: Mapping[str, Any], chart: str
) -> tuple[Any, ...]:
    """One draw's latents, vector, log density, log likelihood and log Jacobian in a chart."""
    seeded = handlers.seed(model.bound(chart), rng_seed=0)
    densities, trace = compute_log_probs(seeded, (), dict(arrays), {**params, **latents})
    pieces, log_jacobian = [], jnp.zeros(())
    for name in latent_space(model, chart).names:
        transform = biject_to(trace[name]["fn"].support)
        unconstrained = transform.inv(latents[name])
        log_jacobian += transform.log_abs_det_jacobian(unconstrained, latents[name]).sum()
        pieces.append(jnp.ravel(unconstrained))
    seen = [name for name, site in model.sites.items() if site.kind in (OBSERVED, FACTOR)]
    log_likelihood = sum((densities[name] for name in seen if name in densities), jnp.zeros(()))
    log_density = sum(densities.values(), jnp.zeros(())) + log_jacobian
    return dict(latents), jnp.concatenate(pieces), log_density, log_likelihood, log_jacobian
