"""What a model observes, one by one: log likelihoods and replicates of every observation, at draws of the latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.distributions import constraints

from toolkit.modelling.mapping import over_draws
from toolkit.modelling.model import Model
from toolkit.modelling.sites import Site

PIECE = 500
"""Draws in one call of a program, at most."""

_AT_ONCE = 20_000_000  # numbers in one call of a program: 160 MB


@dataclass(frozen=True, eq=False)
class Observed:
    """The data of one observed site.

    Attributes:
        site: The site.
        values: What was observed, one number for each that the site's distribution makes.
        seen: Which of these are data; the others are masked, and their values say nothing.
        units: How many observations the site has: elements of its log density's shape, masked ones included.
    """

    site: Site
    values: np.ndarray
    seen: np.ndarray
    units: int

    @property
    def size(self) -> int:
        """Numbers in an observation: more than one for a vector, such as a document's counts."""
        return self.values.size // max(self.units, 1)

    @property
    def places(self) -> np.ndarray:
        """The observations of which something was seen, as places in the flattened shape of the log density."""
        return np.flatnonzero(self.seen.reshape(self.units, -1).any(axis=1))

    @property
    def kind(self) -> str:
        """`"binary"` for 0 and 1 alone, `"label"` for categories, `"count"` for other whole numbers, else `"real"`."""
        if not self.site.discrete:
            return "real"
        if self.site.distribution.startswith("Categorical"):
            return "label"
        return "binary" if self.site.support == type(constraints.boolean).__name__ else "count"


def observed(model: Model) -> dict[str, Observed]:
    """The data of every observed site, by its name; empty where the likelihood is a factor."""

    def sites(arrays: Any) -> dict[str, Any]:
        start = model.start(jax.random.PRNGKey(0), arrays, chart="plain")
        latents = model.constrain(start, arrays, chart="plain")
        return _observing(model, {name: latents[name] for name in model.latents}, arrays)

    def data(arrays: Any) -> dict[str, Any]:
        found = {}
        for name, site in sites(arrays).items():
            shape = _log_prob(site).shape + site["fn"].event_shape
            found[name] = jnp.broadcast_to(site["value"], shape), jnp.broadcast_to(seen_by(site["fn"]), shape)
        return found

    with jax.enable_x64(True):
        shapes = jax.eval_shape(lambda arrays: {n: _log_prob(s) for n, s in sites(arrays).items()}, model.arrays)
        # What of the program only leads to latents is left out by the compiler.
        found = jax.device_get(jax.jit(data)(model.arrays))
    return {
        name: Observed(model.sites[name], values, seen, int(np.prod(shapes[name].shape, dtype=int)))
        for name, (values, seen) in found.items()
    }


def seen_by(fn: Any) -> Any:
    """Which numbers of a distribution's value count, in a shape that broadcasts to the value's."""
    shells = dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution
    seen = jnp.ones((), bool)
    while isinstance(fn, shells):
        if isinstance(fn, dist.MaskedDistribution):
            mask = jnp.asarray(fn._mask)
            seen = seen & mask.reshape(mask.shape + (1,) * fn.event_dim)
        fn = fn.base_dist
    return seen


def log_likelihoods(
    model: Model,
    draws: Mapping[str, np.ndarray],
    chosen: Mapping[str, np.ndarray],
    outcomes: Mapping[str, np.ndarray] | None = None,
) -> np.ndarray:
    """Log p(y_i | z, what was observed before it) of the chosen observations, `(draws, chosen)`, in nats.

    Args:
        model: The model.
        draws: Its latent sites as it is written (the plain chart), in constrained space, `(draws, ...)` each.
        chosen: Site to the places of observations in its flattened batch shape; they follow one another.
        outcomes: Other values of these sites, in their shapes, of which the density is asked for; the data if None.
    """

    def one(latents: Any, arrays: Any, outcomes: Any) -> Any:
        sites = _observing(model, latents, arrays)
        found = [_log_prob(sites[name], outcomes.get(name)).ravel()[places] for name, places in chosen.items()]
        return jnp.concatenate(found)

    name = ("log likelihoods", *((site, places.tobytes()) for site, places in chosen.items()))
    found = over_draws(model, name, one, _latents(model, draws), dict(outcomes or {}), _piece(model))
    return np.asarray(found)


def replicates(model: Model, draws: Mapping[str, np.ndarray], key: jax.Array) -> dict[str, np.ndarray]:
    """Data as the model would make them anew at each draw, site to `(draws, *shape)`.

    Where observations depend on earlier ones, as in an autoregression, each replicate follows what was observed.

    Args:
        model: The model.
        draws: Its latent sites as it is written (the plain chart), in constrained space, `(draws, ...)` each.
        key: Random key.
    """

    def one(given: Any, arrays: Any, _params: Any) -> dict[str, Any]:
        key, latents = given
        sites = _observing(model, latents, arrays)
        return {
            name: _wide(_broadcast(site).sample(jax.random.fold_in(key, i)), site["value"])
            for i, (name, site) in enumerate(sites.items())
        }

    rows = len(next(iter(draws.values())))
    keys = np.asarray(jax.random.key_data(jax.random.split(key, rows)))
    # In a piece of just so many rows: to make data may cost more than all else, and none is made in vain.
    return dict(over_draws(model, ("replicates",), one, (keys, _latents(model, draws)), {}, min(rows, _piece(model))))


def _latents(model: Model, draws: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {site: np.asarray(draws[site], float) for site in model.latents}


def _piece(model: Model) -> int:
    scalars = sum(int(np.prod(model.sites[site].shape)) for site in model.observed)
    return max(1, min(PIECE, _AT_ONCE // max(scalars, 1)))


def _observing(model: Model, latents: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The observed sites of one run of the plain chart at given latents, in program order."""
    program = handlers.substitute(model.bound("plain"), data=dict(latents))
    with handlers.block(), handlers.trace() as trace:
        handlers.seed(program, rng_seed=0)(**arrays)
    return {name: trace[name] for name in model.observed}


def _broadcast(site: Mapping[str, Any]) -> Any:
    """A site's distribution with one value for each observed, where one distribution stands for all of them."""
    fn, shape = site["fn"], jnp.shape(site["value"])
    return fn.expand(jnp.broadcast_shapes(fn.batch_shape, shape[: len(shape) - fn.event_dim]))


def _wide(made: Any, value: Any) -> Any:
    """New data in a type that holds them: whole numbers under a normal likelihood have replicates that are not."""
    return made.astype(jnp.promote_types(made.dtype, jnp.result_type(value)))


def _log_prob(site: Mapping[str, Any], outcome: Any = None) -> Any:
    return jnp.asarray(site["fn"].log_prob(site["value"] if outcome is None else outcome))
