"""Which chain a model has: along which axis each step depends on its neighbours and on shared coordinates alone.

A plate over time, a `scan` or a random walk gives a site an axis along which its values follow one another. For each
axis of a latent site's unconstrained value, and for one step back, two, ..., the Hessian of log p is read off as if it
had that chain's pattern, from a few products of Hessian and vector, as many as a block has coordinates times three:
blocks that are three apart do not meet (Curtis, Powell & Reid 1974, On the estimation of sparse Jacobian matrices).
Then the matrix that was read is tried: its product with a random vector must be the Hessian's own. One entry outside of
the pattern, and it is not, but for an accident of probability zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.infer.util import potential_energy

from toolkit.compilation import QUICK
from toolkit.modelling.model import Model
from toolkit.modelling.sites import trace_sites
from toolkit.modelling.space import Space, latent_space
from toolkit.variational.chains import Chain, Pattern, times

_TRIES = 20
_RADIUS = 1.0  # of the box in unconstrained space in which Hessians are looked at
_POINTS = 2  # where one has a dependence at rest, another may not
_ROUNDING = 1e6  # of the machine's precision: what second derivatives of sums over thousands of rows lose
_LAGS = 4  # steps back, at most
_LEAST_STEPS = 4  # of what is worth the name of a chain
_MOST_PRODUCTS = 300  # of Hessian and vector, to read a matrix: beyond, a chain is no cheaper than a dense matrix


def find_chain(model: Model, chart: str | None = None, *, along: str | None = None) -> Chain:
    """The chain along which a model's posterior is Markov given its shared coordinates.

    Args:
        model: The model.
        chart: Which chart; the model's own choice if None.
        along: A plate, or a site along whose first axis the chain runs; the longest that holds if None.

    Returns:
        The chain; one without blocks, with a note, where there is none.

    Raises:
        ValueError: The chart is unknown, or `along` names neither a plate around a latent site nor a latent site.
    """
    with jax.enable_x64(True):
        return chain_of_program(model.bound(chart), (), model.arrays, latent_space(model, chart), along)


def chain_of_program(
    program: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    space: Space,
    along: str | None = None,
) -> Chain:
    """The chain of a NumPyro program, see `find_chain`."""
    axes = _axes(program, args, kwargs, space, along)
    note = f"no latent site has an axis of {_LEAST_STEPS} steps or more"
    products: Products | None = None
    for chain in _candidates(space, axes):
        note = "along no axis does a step depend on its neighbours and the shared coordinates alone"
        products = products or _hessian_products(program, args, kwargs, space)
        if _holds(products, chain):
            return chain
    return Chain((), 0, tuple(range(space.size)), note=note)


def pattern_products(chain: Chain) -> np.ndarray:
    """The vectors (products, size) whose products with a Hessian of the chain's pattern tell all of its entries.

    Reference: Curtis, Powell & Reid (1974), On the estimation of sparse Jacobian matrices.
    """
    shared = len(chain.shared)
    probes = np.zeros((3 * chain.block + shared, chain.places))
    local = probes[:, : len(chain.coordinates)].reshape(len(probes), chain.blocks, chain.block)
    for third in range(3):
        for place in range(chain.block):
            local[third * chain.block + place, third::3, place] = 1.0
    probes[3 * chain.block :, len(chain.coordinates) :] = np.eye(shared)
    return np.asarray(chain.from_places(jnp.asarray(probes)))


def pattern_from(chain: Chain, products: Any) -> Pattern:
    """The matrix, from its products (products, size) with the vectors of `pattern_products`; one in the padding."""
    local, shared = chain.split(chain.into_places(products))
    block, blocks = chain.block, chain.blocks
    coloured = local[: 3 * block].reshape(3, block, blocks, block)  # third, column, block of the row, row
    here = np.arange(blocks)
    diagonal = jnp.swapaxes(coloured[here % 3, :, here], 1, 2)
    below = jnp.swapaxes(coloured[here % 3, :, np.minimum(here + 1, blocks - 1)], 1, 2).at[-1].set(0.0)
    side = jnp.swapaxes(local[3 * block :], 0, 1)
    corner = shared[3 * block :]
    diagonal = (diagonal + jnp.swapaxes(diagonal, 1, 2)) / 2
    filled = jnp.asarray(chain.padded[:, :, None] * np.eye(block))
    return Pattern(diagonal + filled, below, side, (corner + corner.T) / 2)


Products = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Products (n, size) of the Hessian at a point (size,) with vectors (n, size)."""


def _axes(
    program: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], space: Space, along: str | None
) -> list[tuple[str, dict[str, int]]]:
    """What a chain may lie along, the longest first: in words, and the axis of each site that goes with it."""
    sites = trace_sites(functools.partial(program, *args), kwargs)
    names = dict[tuple[str, int], int]()  # of an axis, by site and place, from its length
    plates = dict[int, str]()
    for name, shape in zip(space.names, space.shapes, strict=True):
        batch = len(sites[name].shape) - sites[name].event_dims
        for plate, size, axis in sites[name].plates:
            if batch + axis < len(shape) and shape[batch + axis] == size:
                names[name, batch + axis] = size
                plates.setdefault(size, plate)
        if shape:
            names.setdefault((name, 0), shape[0])
    lengths = sorted({size for size in names.values() if size >= _LEAST_STEPS}, reverse=True)
    if along is not None:
        if along not in (*plates.values(), *space.names):
            known = ", ".join(dict.fromkeys([*plates.values(), *space.names]))
            raise ValueError(f"Expected along to be one of {known}; got '{along}'.")
        lengths = [size for size in lengths if plates.get(size) == along or names.get((along, 0)) == size]
    found = []
    for size in lengths:
        members = dict[str, int]()
        for (name, axis), length in names.items():
            if length == size:
                members.setdefault(name, axis)
        words = f"'{plates[size]}'" if size in plates else "the first axis"
        found.append((words, members))
        found += [(words, {name: axis}) for name, axis in members.items() if len(members) > 1]
    return found


def _candidates(space: Space, axes: list[tuple[str, dict[str, int]]]) -> Iterator[Chain]:
    """Chains along each axis, one step back, then two, ..., that are cheap enough to be read."""
    where = space.unravel(np.arange(space.size))
    for words, members in axes:
        rows = [np.moveaxis(where[name], axis, 0) for name, axis in members.items()]
        steps = np.concatenate([row.reshape(len(row), -1) for row in rows], axis=1)
        shared = tuple(np.setdiff1d(np.arange(space.size), steps).tolist())
        for lag in range(1, _LAGS + 1):
            block = lag * steps.shape[1]
            if 3 * block + len(shared) > _MOST_PRODUCTS or len(steps) < _LEAST_STEPS * lag:
                break
            missing = -len(steps) % lag
            padded = np.concatenate([np.full((missing, steps.shape[1]), -1), steps])
            yield Chain(tuple(padded.ravel().tolist()), block, shared, tuple(members), words, lag)


def _hessian_products(
    program: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], space: Space
) -> Products:
    """Of the log density at an unconstrained vector, compiled in the precision that is set."""
    given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(given)):
        raise ValueError(
            "Expected the model's arrays when the guide looks for its chain; got values that JAX is tracing: "
            "call the guide, or `svi.init`, once outside of `jax.jit`, or give chain=find_chain(model)."
        )
    arrays = {name: value for name, value in given.items() if hasattr(value, "dtype")}

    def log_density(vector: Any, arrays: Any) -> Any:
        filled = {**given, **arrays}
        positional, named = tuple(filled[i] for i in range(len(args))), {name: filled[name] for name in kwargs}
        return -potential_energy(handlers.seed(program, rng_seed=0), positional, named, space.unravel(vector))

    dtype = jnp.result_type(float)

    def product(point: Any, vector: Any, arrays: Any) -> Any:
        return jax.jvp(lambda at: jax.grad(log_density)(at, arrays), (point,), (vector,))[1]

    with handlers.block():
        compiled = jax.jit(product).lower(*2 * (np.zeros(space.size, dtype),), arrays).compile(QUICK)

    def products(point: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        return np.stack([np.asarray(compiled(point.astype(dtype), row.astype(dtype), arrays)) for row in vectors])

    return products


def _holds(products: Products, chain: Chain) -> bool:
    """Whether the Hessian has the chain's pattern, at points drawn at random, always the same ones."""
    probes, generator = pattern_products(chain), np.random.default_rng(0)
    looked = 0
    for number in range(_TRIES):
        point = generator.uniform(-1, 1, chain.size) * _RADIUS * 0.7**number
        vector = generator.standard_normal(chain.size)
        seen = products(point, np.concatenate([probes, vector[None]]))
        if not np.isfinite(seen).all():
            continue
        read = pattern_from(chain, jnp.asarray(seen[:-1]))
        told, scale = (
            np.asarray(chain.from_places(chain.joined(*times(matrix, *chain.split(chain.into_places(along))))))
            for matrix, along in (
                (read, jnp.asarray(vector)),
                (Pattern(*map(jnp.abs, read)), jnp.abs(jnp.asarray(vector))),
            )
        )
        most = _ROUNDING * np.finfo(seen.dtype).eps * (scale + np.abs(seen[-1]))
        if (np.abs(told - seen[-1]) > most).any():
            return False
        looked += 1
        if looked == _POINTS:
            return True
    return looked > 0
