"""Which chain a model has: along which axis each step depends on its neighbours and on shared coordinates alone.

A plate over time, a `scan` or a random walk gives a site an axis along which its values follow one another. For each
axis of a latent site's unconstrained value, and for one step back, two, ..., the Hessian of log p is read off as if it
had that chain's pattern, from a few products of Hessian and vector, as many as a block has coordinates times three:
blocks that are three apart do not meet (Curtis, Powell & Reid 1974, On the estimation of sparse Jacobian matrices).
Then the matrix that was read is tried: its product with a random vector must be the Hessian's own. One entry outside of
the pattern, and it is not, but for an accident of probability zero. What is seen so is the Hessian at a few points: a
dependence that is at rest there, as where log p is in pieces, may be missed; gradients at more points look for those.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers

from toolkit.compilation import QUICK
from toolkit.modelling.model import Model
from toolkit.modelling.sites import trace_sites
from toolkit.modelling.space import Space, latent_space
from toolkit.variational.block_search import log_density_of_program
from toolkit.variational.chains import Chain, Pattern, times

_TRIES = 20
_RADIUS = 1.0  # of the box in unconstrained space in which Hessians are looked at
_POINTS = 2  # where one has a dependence at rest, another may not
_ROUNDING = 1e6  # of the machine's precision: what second derivatives of sums over thousands of rows lose
_MOVES, _SHARE = 6, 0.2  # sets of blocks that are moved, and the share of blocks in each
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
    note = (
        f"along any axis three blocks and the shared coordinates are more than {_MOST_PRODUCTS} coordinates"
        if axes
        else f"no latent site has an axis of {_LEAST_STEPS} steps or more"
    )
    products: Products | None = None
    for chain in _candidates(space, axes):
        note = "along no axis that was tried does a step depend on its neighbours and the shared coordinates alone"
        products = products or _hessian_products(program, args, kwargs, space)
        holds = _holds(products, chain)
        if holds is None:
            note = f"its Hessian is finite at fewer than {_POINTS} of {_TRIES} points around the origin"
            break
        if holds:
            return chain
    return Chain((), 0, tuple(range(space.size)), note=note)


def check_chain(
    program: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], space: Space, chain: Chain
) -> None:
    """Whether a NumPyro program has a chain that was not found in it; nothing is said where no Hessian is finite.

    Raises:
        ValueError: The chain is of another number of coordinates, or the posterior is not Markov along it.
    """
    if chain.size != space.size:
        raise ValueError(
            f"Expected a chain of this model's {space.size} unconstrained coordinates; got one of {chain.size}: find "
            "it for the model and chart that the guide looks at."
        )
    if chain.blocks and _holds(_hessian_products(program, args, kwargs, space), chain) is False:
        raise ValueError(
            "Expected a chain along which each block depends on its neighbours and the shared coordinates alone; got "
            f"{chain.words}, where blocks depend on others too: leave `chain` out, and it is looked for."
        )


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


Products = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""The gradient at a point (size,), and products (n, size) of the Hessian there with vectors (n, size)."""


def _axes(
    program: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], space: Space, along: str | None
) -> list[tuple[str, dict[str, int]]]:
    """What a chain may lie along, the longest first: in words, and the axis of each site that goes with it.

    All axes of one length go together; then those of one plate, and those of one length that no plate names; then each
    axis is tried alone.
    """
    sites = trace_sites(functools.partial(program, *args), kwargs)
    together, as_long = dict[tuple[str, int], dict[str, int]](), dict[int, dict[str, int]]()
    alone = list[tuple[int, str, int]]()
    for name, shape in zip(space.names, space.shapes, strict=True):
        batch = len(sites[name].shape) - sites[name].event_dims
        plates = {batch + axis: plate for plate, size, axis in sites[name].plates if shape[batch + axis] == size}
        for axis, size in enumerate(shape):
            if size >= _LEAST_STEPS:
                together.setdefault((plates.get(axis, ""), size), {}).setdefault(name, axis)
                as_long.setdefault(size, {}).setdefault(name, axis)
                alone.append((size, name, axis))
    if along is not None:
        known = dict.fromkeys([*(plate for plate, _ in together if plate), *space.names])
        if along not in known:
            raise ValueError(f"Expected along to be one of {', '.join(known)}; got '{along}'.")
    found = [
        (size, f"'{plate}'" if plate else _ordinal(members), members) for (plate, size), members in together.items()
    ]
    # Such as a random walk, and noise of each of its steps in a plate.
    found += [(size, _ordinal(every), every) for size, every in as_long.items() if every not in together.values()]
    found += [(size, _ordinal({name: axis}), {name: axis}) for size, name, axis in alone]
    found.sort(key=lambda one: -one[0] * len(one[2]))
    if along in space.names:
        return [(words, members) for _, words, members in found if members.get(along) == 0]
    if along is None:
        return [(words, members) for _, words, members in found]
    # With a plate go the other axes of its length, if they hold together.
    inside = [(size, members) for size, words, members in found if words == f"'{along}'"]
    return [
        (f"'{along}'", members)
        for size, _, members in found
        if any(size == length and own.items() <= members.items() for length, own in inside)
    ]


def _ordinal(members: Mapping[str, int]) -> str:
    """Such as "the first axis"; "an axis" where it is not the same one of all sites."""
    places = set(members.values())
    names = ("the first axis", "the second axis", "the third axis")
    return names[places.pop()] if len(places) == 1 and max(members.values()) < len(names) else "an axis"


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
    log_density, arrays = log_density_of_program(program, args, kwargs, space)
    dtype = jnp.result_type(float)

    def product(point: Any, vector: Any, arrays: Any) -> Any:
        return jax.jvp(lambda at: jax.grad(log_density)(at, arrays), (point,), (vector,))

    with handlers.block():
        compiled = jax.jit(product).lower(*2 * (np.zeros(space.size, dtype),), arrays).compile(QUICK)

    def products(point: np.ndarray, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = [compiled(point.astype(dtype), row.astype(dtype), arrays) for row in vectors]
        return np.asarray(found[0][0]), np.stack([np.asarray(product) for _, product in found])

    return products


def _holds(products: Products, chain: Chain) -> bool | None:
    """Whether the Hessian has the chain's pattern at points drawn at random; None where it is not finite at them.

    Where log p has kinks the Hessian does not see all. So gradients are compared as well, between points at which some
    blocks lie elsewhere: those of blocks that are no neighbours must stay the same.
    """
    probes, generator = pattern_products(chain), np.random.default_rng(0)
    looked = 0
    for number in range(_TRIES):
        point = generator.uniform(-1, 1, chain.size) * _RADIUS * 0.7**number
        vector = generator.standard_normal(chain.size)
        slope, seen = products(point, np.concatenate([probes, vector[None]]))
        if not (np.isfinite(seen).all() and np.isfinite(slope).all()):
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
        if (np.abs(told - seen[-1]) > most).any() or _reaches_far(products, chain, point, slope, generator):
            return False
        looked += 1
        if looked == _POINTS:
            return True
    return None


def _reaches_far(
    products: Products, chain: Chain, point: np.ndarray, slope: np.ndarray, generator: np.random.Generator
) -> bool:
    """Whether moving some blocks changes the gradient of others that are no neighbours of theirs."""
    for _ in range(_MOVES):
        moved = generator.random(chain.blocks) < _SHARE
        near = moved | np.append(moved[1:], False) | np.append(False, moved[:-1])
        steps = np.where(moved[:, None], generator.uniform(-1, 1, (chain.blocks, chain.block)), 0.0)
        local = np.asarray(chain.from_places(jnp.append(jnp.asarray(steps).ravel(), jnp.zeros(len(chain.shared)))))
        there, _ = products(point + local, np.zeros((1, chain.size)))
        far = np.repeat(~near, chain.block)
        changed = np.asarray(chain.split(chain.into_places(jnp.asarray(there - slope)))[0]).ravel()
        size = np.asarray(chain.split(chain.into_places(jnp.asarray(np.abs(there) + np.abs(slope))))[0]).ravel()
        least = _ROUNDING * np.finfo(slope.dtype).eps * (size + np.abs(slope).max())
        if np.isfinite(there).all() and (np.abs(changed) > least)[far].any():
            return True
    return False
