"""Which blocks a model has: those that its plates make, or those of sites that are named together.

Plates (and axes named by `infer={"event_dims": [...]}`) say which coordinates belong to one unit, but not whether units
are independent once the data are seen: regression coefficients in a plate are not. So it is tried: a plate makes blocks
only if log p's gradient within each of its units stays the same when all the other units move, and the same holds
between the units of different plates. All else is shared. Sites that lie in several such plates go with the one with
the most coordinates: with classes in schools that is the school, whose block then holds its own effect and those of all
its classes, which are independent of each other only given the school's.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.infer.util import potential_energy
from numpyro.primitives import Messenger

from toolkit.compilation import QUICK
from toolkit.modelling.model import Model
from toolkit.modelling.sites import DETERMINISTIC, LATENT, Site, trace_sites
from toolkit.modelling.space import Space, latent_space
from toolkit.variational.blocks import Blocks, Run

Gradient = Callable[[np.ndarray], Any]
Plate = tuple[str, int]  # name and size: an axis of another length is another plate

_TRIES = 20
_RADIUS = 1.0  # of the box in unconstrained space in which gradients are compared
_PAIRS = 2  # of points: where one has a dependence at rest, another may not
_ROUNDING = 1e3  # of the machine's precision: sums over thousands of rows lose no more


def plate_blocks(
    model: Model,
    chart: str | None = None,
    *,
    coupled: bool = True,
    along: Sequence[str] | None = None,
    gradient: Gradient | None = None,
) -> Blocks:
    """The blocks that a model's plates make, in float64: one for each unit that is independent of the others.

    Args:
        model: The model.
        chart: Which chart; the model's own choice if None.
        coupled: Whether the shared coordinates are coupled to all blocks.
        along: The plates to take, as they stand and the first one first; those along which the posterior is
            independent given the shared coordinates, as tried by the density's gradient, if None.
        gradient: Of log p(x, z) at an unconstrained vector (size,), if it is compiled already.

    Raises:
        ValueError: The chart is unknown, `along` is a string, or it names no plate around a latent site.
    """
    program = model.bound(chart)
    with jax.enable_x64(True):
        found = blocks_of_program(program, (), model.arrays, latent_space(model, chart), along, gradient)
    return replace(found, coupled=coupled)


def named_blocks(model: Model, groups: Sequence[Sequence[str]], chart: str | None = None) -> Blocks:
    """Blocks of the sites that are named together, each a full Gaussian; every other coordinate is on its own.

    A group of one site is a full Gaussian over that site: so all that lies between a mean field and full rank by
    sites can be said, and nothing correlates that was not named.

    Raises:
        ValueError: The chart is unknown, or a group is empty or names an unknown site or one that is named already.
    """
    return grouped_blocks(latent_space(model, chart), groups)


def grouped_blocks(space: Space, groups: Sequence[Sequence[str]]) -> Blocks:
    """Blocks of the sites of a space that are named together, as by `named_blocks`."""
    if isinstance(groups, str) or any(isinstance(group, str) for group in groups):
        text = next(group for group in ([groups] if isinstance(groups, str) else groups) if isinstance(group, str))
        raise ValueError(f"Expected each group to be a sequence of site names; got '{text}': write ('{text}',).")
    if not all(groups):
        raise ValueError("Expected at least one site in each group; got an empty group.")
    named = Counter(itertools.chain.from_iterable(groups))
    for name, count in named.items():
        if name not in space.names:
            raise ValueError(f"Expected groups to name latent sites, of {', '.join(space.names)}; got '{name}'.")
        if count > 1:
            raise ValueError(f"Expected each site once, in one group; got '{name}' {count} times.")
    where = space.unravel(np.arange(space.size))
    runs, order = [], list[int]()
    for group in groups:
        members = sorted(itertools.chain.from_iterable(where[name].ravel().tolist() for name in group))
        runs.append(Run(1, len(members), tuple(name for name in space.names if name in group)))
        order.extend(members)
    alone = tuple(name for name in space.names if name not in named)
    if alone:
        rest = [coordinate for name in alone for coordinate in where[name].ravel().tolist()]
        runs.append(Run(len(rest), 1, alone))
        order.extend(rest)
    return Blocks(tuple(order), 0, tuple(runs))


def blocks_of_program(
    program: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    space: Space,
    along: Sequence[str] | None = None,
    gradient: Gradient | None = None,
) -> Blocks:
    """The blocks of a NumPyro program, not coupled."""
    axes = _axes(program, args, kwargs, space)
    plates = _ordered(space, axes, along)
    if not plates:
        single = any(axes.values())
        note = "a plate of one unit makes no blocks" if single else "no latent site lies in a plate"
        return Blocks(tuple(range(space.size)), space.size, note=note)
    if along is not None:
        return _laid_out(space, axes, _assigned(space, axes, plates, None))
    gradient = gradient or _gradient(program, args, kwargs, space)
    for number in range(_TRIES):
        try:
            probe = _Probe(gradient, space.size, _RADIUS * 0.7**number)
            assigned = _assigned(space, axes, plates, probe)
        except FloatingPointError:
            continue
        names = ", ".join(f"'{name}'" for name, _ in plates)
        return _laid_out(space, axes, assigned, f"what lies along {names} is not independent given the rest")
    note = "plates taken as they stand, since no point with a finite gradient was found to try them"
    return replace(_laid_out(space, axes, _assigned(space, axes, plates, None)), note=note)


def _axes(
    program: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], space: Space
) -> dict[str, dict[Plate, int]]:
    """For each latent site the named axes of its unconstrained value, outermost first, and where they are.

    Batch axes keep their places when a value is unconstrained; an event axis counts only if its length is the same
    (a simplex loses one, and its coordinates are no longer its shares).
    """
    sites = trace_sites(functools.partial(program, *args), kwargs)
    written = program
    while isinstance(written, Messenger):  # an effect handler, such as one that reparameterises: what is inside?
        written = written.fn
    before = sites if written is program else trace_sites(functools.partial(written, *args), kwargs)
    axes: dict[str, dict[Plate, int]] = {}
    for name, shape in zip(space.names, space.shapes, strict=True):
        site = sites[name]
        batch = len(site.shape) - site.event_dims
        axes[name] = {(plate, size): batch + axis for plate, size, axis in site.plates}
        if len(shape) == len(site.shape):
            for i, dim in enumerate(_event_names(site, sites, before), batch):
                if shape[i] == site.shape[i]:
                    axes[name].setdefault((dim, shape[i]), i)
    return axes


def _event_names(site: Site, sites: Mapping[str, Site], before: Mapping[str, Site]) -> tuple[str, ...]:
    """The site's own, or those of the site that it was reparameterised from, which NumPyro does not hand on."""
    if site.event_names:
        return site.event_names
    for origin in before.values():
        now = sites.get(origin.name)
        replaced = origin.kind == LATENT and now is not None and now.kind == DETERMINISTIC
        if replaced and site.name.startswith(f"{origin.name}_") and site.shape == origin.shape:
            return origin.event_names
    return ()


def _ordered(space: Space, axes: Mapping[str, Mapping[Plate, int]], along: Sequence[str] | None) -> list[Plate]:
    """The plates around latent sites, in the order in which sites are given to them."""
    if isinstance(along, str):
        raise ValueError(  # noqa: TRY004 - misuse is a ValueError everywhere
            f"Expected along to be a sequence of plate names; got '{along}': write ('{along}',)."
        )
    coordinates = Counter[Plate]()
    for name, shape in zip(space.names, space.shapes, strict=True):
        for plate in axes[name]:
            coordinates[plate] += int(np.prod(shape))
    if along is not None:
        known = sorted({name for name, _ in coordinates})
        for name in along:
            if name not in known:
                offered = f"one of {', '.join(known)}" if known else "and there is none"
                raise ValueError(f"Expected along to name plates around latent sites, {offered}; got '{name}'.")
        return [plate for name in along for plate in sorted(coordinates) if plate[0] == name]
    # Of two plates around the same coordinates, the longer one makes the smaller blocks.
    several = [plate for plate in coordinates if plate[1] > 1]
    return sorted(several, key=lambda plate: (-coordinates[plate], -plate[1], plate[0]))


def _assigned(
    space: Space, axes: Mapping[str, Mapping[Plate, int]], plates: Sequence[Plate], probe: _Probe | None
) -> dict[Plate, tuple[str, ...]]:
    """The sites that lie in blocks along each plate; those in none are shared. Without a probe all plates hold."""
    assigned: dict[Plate, tuple[str, ...]] = {}
    local = np.zeros(space.size, dtype=bool)
    for plate in plates:
        taken = set(itertools.chain.from_iterable(assigned.values()))
        sites = tuple(name for name in space.names if plate in axes[name] and name not in taken)
        if not sites:
            continue
        index = _index(space, axes, plate, sites)
        if probe is None or _is_independent(probe, index, local):
            assigned[plate] = sites
            local |= index >= 0
    return assigned


def _index(space: Space, axes: Mapping[str, Mapping[Plate, int]], plate: Plate, sites: Sequence[str]) -> np.ndarray:
    """Which unit of a plate each coordinate belongs to, (size,); -1 for those of other sites."""
    pieces = []
    for name, shape in zip(space.names, space.shapes, strict=True):
        if name not in sites:
            pieces.append(np.full(int(np.prod(shape)), -1))
            continue
        axis = axes[name][plate]
        along = np.arange(plate[1]).reshape([-1 if i == axis else 1 for i in range(len(shape))])
        pieces.append(np.broadcast_to(along, shape).ravel())
    return np.concatenate(pieces)


def _is_independent(probe: _Probe, index: np.ndarray, others: np.ndarray) -> bool:
    """Whether no unit's gradient changes when other units move, nor that of other local coordinates."""
    inside = index >= 0
    if (probe.changed(inside) & others).any():
        return False
    # Any two units differ in a binary digit of their number: moved by digits, each pair is looked at.
    for digit in range(int(index.max()).bit_length()):
        moved = inside & ((index >> digit) % 2 == 1)
        if (probe.changed(moved) & inside & ~moved).any():
            return False
    return True


class _Probe:
    """Whose gradient changes when other coordinates move between two points drawn at random, always the same ones.

    Coordinates that are independent given all others have mixed derivatives of zero everywhere. Dependent ones differ
    from that at random points but for accidents of probability zero, where the density is analytic. One in pieces
    (where, clip, relu) may have a dependence at rest there; so a second pair of points is asked as well.
    """

    def __init__(self, gradient: Gradient, size: int, radius: float) -> None:
        self._gradient = gradient
        self._pairs = np.random.default_rng(0).uniform(-radius, radius, (_PAIRS, 2, size))
        self._slopes = np.stack([self._at(here) for here, _ in self._pairs])
        # Just above rounding: in raw units the likelihood's gradient may be 1e8 times that of a prior which couples.
        scales = np.abs(self._slopes) + np.abs(np.stack([self._at(there) for _, there in self._pairs]) - self._slopes)
        self._least = _ROUNDING * np.finfo(self._slopes.dtype).eps * scales

    def changed(self, moved: np.ndarray) -> np.ndarray:
        """Bool (size,).

        Raises:
            FloatingPointError: The gradient is not finite.
        """
        slopes = np.stack([self._at(np.where(moved, there, here)) for here, there in self._pairs])
        return (np.abs(slopes - self._slopes) > self._least).any(0)

    def _at(self, point: np.ndarray) -> np.ndarray:
        slope = np.asarray(self._gradient(point))
        if not np.isfinite(slope).all():
            raise FloatingPointError
        return slope


def log_density_of_program(
    program: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], space: Space
) -> tuple[Callable[[Any, Any], Any], dict[Any, Any]]:
    """Log p(x, z) as a function of an unconstrained vector (size,) and arrays, and the arrays.

    Raises:
        ValueError: JAX is tracing the program's arguments.
    """
    given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(given)):
        raise ValueError(
            "Expected the model's arrays when the guide looks for its structure; got values that JAX is tracing: call "
            "the guide, or `svi.init`, once outside of `jax.jit`, or give it what plate_blocks or find_chain found."
        )
    arrays = {name: value for name, value in given.items() if hasattr(value, "dtype")}

    def log_density(vector: Any, arrays: Any) -> Any:
        filled = {**given, **arrays}
        positional, named = tuple(filled[i] for i in range(len(args))), {name: filled[name] for name in kwargs}
        return -potential_energy(handlers.seed(program, rng_seed=0), positional, named, space.unravel(vector))

    return log_density, arrays


def _gradient(program: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], space: Space) -> Gradient:
    """Of the log density at an unconstrained vector, compiled in the precision that is set."""
    log_density, arrays = log_density_of_program(program, args, kwargs, space)
    dtype = jnp.result_type(float)
    with handlers.block():
        compiled = jax.jit(jax.grad(log_density)).lower(np.zeros(space.size, dtype), arrays).compile(QUICK)
    return lambda vector: compiled(vector.astype(dtype), arrays)


def _laid_out(
    space: Space,
    axes: Mapping[str, Mapping[Plate, int]],
    assigned: Mapping[Plate, tuple[str, ...]],
    note: str = "",
) -> Blocks:
    """The blocks along each plate, after the shared coordinates; the note stands if there are no others."""
    runs, order, local = [], list[int](), np.zeros(space.size, dtype=bool)
    for plate, sites in assigned.items():
        index = _index(space, axes, plate, sites)
        members = np.flatnonzero(index >= 0)
        order += members[np.argsort(index[members], kind="stable")].tolist()
        runs.append(Run(plate[1], len(members) // plate[1], sites, plate[0]))
        local |= index >= 0
    shared = np.flatnonzero(~local).tolist()
    return Blocks((*shared, *order), len(shared), tuple(runs), note="" if runs else note)
