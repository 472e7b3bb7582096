"""Gaussian guides with structure: full within blocks, and between blocks only what shared coordinates explain.

A draw is z = loc + L eps. In an order of the coordinates that puts the shared ones first, L is lower-triangular and
zero outside a pattern: dense among the shared, full within each local block and, where blocks are `coupled`, with a
column of every shared coordinate in every block:

    L = [ S          ]      shared (population means, scales, ...)
        [ A1 D1      ]      block 1 (the intercept and slope of county 1)
        [ A2    D2   ]      block 2
        [ A3       D3]      block 3

**What `coupled` can express.** Given the shared z_0, and so eps_0, block i is loc_i + Ai eps_0 + Di eps_i, and each
block has an eps_i of its own: the blocks are independent given the shared coordinates, with a mean linear in them.
Conversely, if they are, the Schur complement of the shared block in the covariance is block-diagonal, and so is its
Cholesky factor: every such Gaussian has this pattern. Hence the family is that of Tan & Nott (2018), whose Cholesky
factor is the *precision's*, with the locals first (inverted and with the order reversed, theirs is the one above),
and the branch family q(z_0) prod_i q(z_i | z_0) of Agrawal & Domke (2021) with Gaussian branches. Where the
model has this independence, a Gaussian posterior lies in the family. The family `blocks` leaves the A out: its blocks
are independent of the shared coordinates, too.

**What is shared.** Plates (and axes named by `infer={"event_dims": [...]}`) say which coordinates belong to one unit,
but not whether units are independent once the data are seen: regression coefficients in a plate are not. So it is
tried: a plate makes blocks only if log p's gradient within each of its units stays the same when all the other units
move, and the same holds between the units of different plates. All else is shared. Sites that lie in several such
plates go with the one with the most coordinates: with classes in schools that is the school, whose block then holds
its own effect and those of all its classes, which are independent of each other only given the school's.

References:
    Tan & Nott (2018), Gaussian variational approximation with sparse precision matrices, Statistics and Computing 28,
        259-275.
    Agrawal & Domke (2021), Amortized variational inference for simple hierarchical models, NeurIPS 34.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import ndtri
from numpyro import handlers
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.transforms import ComposeTransform, LowerCholeskyAffine, PermuteTransform, Transform
from numpyro.infer.autoguide import AutoContinuous
from numpyro.infer.initialization import init_to_uniform
from numpyro.infer.util import potential_energy
from numpyro.primitives import Messenger

from toolkit.compilation import QUICK
from toolkit.modelling.model import Model
from toolkit.modelling.sites import DETERMINISTIC, LATENT, Site, trace_sites
from toolkit.variational.space import Space, latent_space

if TYPE_CHECKING:
    from toolkit.variational.guides import Guide

Gradient = Callable[[np.ndarray], Any]
Plate = tuple[str, int]  # name and size: an axis of another length is another plate

BLOCKS, COUPLED = "blocks", "coupled"
_TRIES = 20
_RADIUS = 1.0  # of the box in unconstrained space in which gradients are compared


# -- the pattern ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Blocks of one size and origin.

    Attributes:
        count: How many.
        size: Coordinates in each.
        sites: Whose coordinates they are.
        plate: What they lie along; empty where sites were named, or left on their own.
    """

    count: int
    size: int
    sites: tuple[str, ...]
    plate: str = ""

    @property
    def words(self) -> str:
        """Such as "85 blocks of 2 along 'county' (alpha, beta)"."""
        sites = f" ({', '.join(self.sites)})"
        if not self.plate and self.size == 1 and self.count > 1:
            return f"{self.count:,} coordinates each on its own{sites}"
        blocks = f"{self.count:,} block{'' if self.count == 1 else 's'} of {self.size:,}"
        return blocks + (f" along '{self.plate}'" if self.plate else "") + sites


@dataclass(frozen=True)
class Blocks:
    """Where the Cholesky factor of a Gaussian may differ from zero; hashable.

    Attributes:
        order: `order[k]` is the unconstrained coordinate at place k: the shared ones, then block after block.
        shared: How many coordinates, the first of `order`, form the shared block.
        runs: The blocks that follow.
        coupled: Whether every block also has the columns of the shared coordinates.
        note: Why it is so, for the report, where nothing but shared coordinates was found or nothing could be tried.

    Raises:
        ValueError: `order` is no permutation, or shared coordinates and blocks do not add up to it.
    """

    order: tuple[int, ...]
    shared: int
    runs: tuple[Run, ...] = ()
    coupled: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(self.size)):
            raise ValueError(f"Expected order to hold each of 0, ..., {self.size - 1} once; got {self.order}.")
        held = self.shared + sum(run.count * run.size for run in self.runs)
        if held != self.size or self.shared < 0:
            raise ValueError(f"Expected shared coordinates and blocks to add up to {self.size}; got {held}.")

    @property
    def size(self) -> int:
        """How many unconstrained coordinates there are."""
        return len(self.order)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the blocks after the shared one."""
        return tuple(itertools.chain.from_iterable((run.size,) * run.count for run in self.runs))

    @property
    def places(self) -> np.ndarray:
        """The inverse of `order`, (size,): the place of each coordinate."""
        return np.argsort(self.order)

    @functools.cached_property
    def pattern(self) -> np.ndarray:
        """Which entries of the factor may differ from zero, bool (size, size), with rows and columns in `order`."""
        number = np.repeat(np.arange(len(self.sizes) + 1), (self.shared, *self.sizes))
        allowed = number[:, None] == number[None, :]
        if self.coupled:
            allowed[:, : self.shared] = True
        pattern = np.tril(allowed)
        pattern.flags.writeable = False
        return pattern

    @property
    def full(self) -> bool:
        """Whether nothing is left out: the family is that of the full-rank Gaussian."""
        return int(self.pattern.sum()) == self.size * (self.size + 1) // 2

    @property
    def words(self) -> str:
        """A sentence for the report, without a full stop."""
        shared = f"{self.shared:,} shared coordinate{'' if self.shared == 1 else 's'}"
        if not self.runs:
            return f"{shared} in one full block, as in full rank" + (f": {self.note}" if self.note else "")
        parts = [run.words for run in self.runs]
        if self.shared:
            parts.append(f"{shared} {'coupled to all' if self.coupled else 'in a block of their own'}")
        return "; ".join([*parts, self.note] if self.note else parts)


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
        ValueError: The chart is unknown, or `along` names no plate around a latent site.
    """
    program = model.bound(chart)
    with jax.enable_x64(True):
        found = _found(program, (), model.arrays, latent_space(model, chart), along, gradient)
    return replace(found, coupled=coupled)


def named_blocks(model: Model, groups: Sequence[Sequence[str]], chart: str | None = None) -> Blocks:
    """Blocks of the sites that are named together, each a full Gaussian; every other coordinate is on its own.

    A group of one site is a full Gaussian over that site: so all that lies between a mean field and full rank by
    sites can be said, and nothing correlates that was not named.

    Raises:
        ValueError: The chart is unknown, or a group is empty or names an unknown site or one that is named already.
    """
    return _grouped(latent_space(model, chart), groups)


def _grouped(space: Space, groups: Sequence[Sequence[str]]) -> Blocks:
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


# -- finding the blocks -----------------------------------------------------------------------------------------------


def _found(
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
        return Blocks(tuple(range(space.size)), space.size, note="no latent site lies in a plate")
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
    """Whose gradient changes when other coordinates move between two points drawn at random, always the same.

    Coordinates that are independent given all others have mixed derivatives of zero everywhere; dependent ones have
    them at random points but for accidents of probability zero.
    """

    def __init__(self, gradient: Gradient, size: int, radius: float) -> None:
        self._gradient = gradient
        self._here, self._there = np.random.default_rng(0).uniform(-radius, radius, (2, size))
        self._slope = self._at(self._here)
        # Rounding is far below the root of the machine's precision; so weak a dependence is no loss.
        scale = np.abs(self._slope) + np.abs(self._at(self._there) - self._slope)
        self._least = np.sqrt(np.finfo(self._slope.dtype).eps) * scale

    def changed(self, moved: np.ndarray) -> np.ndarray:
        """Bool (size,).

        Raises:
            FloatingPointError: The gradient is not finite.
        """
        slope = self._at(np.where(moved, self._there, self._here))
        return np.abs(slope - self._slope) > self._least

    def _at(self, point: np.ndarray) -> np.ndarray:
        slope = np.asarray(self._gradient(point))
        if not np.isfinite(slope).all():
            raise FloatingPointError
        return slope


def _gradient(program: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], space: Space) -> Gradient:
    """Of the log density at an unconstrained vector, compiled in the precision that is set."""
    given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(given)):
        raise ValueError(
            "Expected the model's arrays when the guide looks for its blocks; got values that JAX is tracing: "
            "call the guide, or `svi.init`, once outside of `jax.jit`, or give structure=plate_blocks(model)."
        )
    arrays = {name: value for name, value in given.items() if hasattr(value, "dtype")}

    def log_density(vector: Any, arrays: Any) -> Any:
        filled = {**given, **arrays}
        positional, named = tuple(filled[i] for i in range(len(args))), {name: filled[name] for name in kwargs}
        return -potential_energy(handlers.seed(program, rng_seed=0), positional, named, space.unravel(vector))

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


# -- the guide --------------------------------------------------------------------------------------------------------


class BlockNormal(dist.Distribution):
    """The multivariate normal whose Cholesky factor is lower-triangular in an order of the coordinates.

    Args:
        loc: In the vector's own order, (size,).
        scale_tril: The factor with rows and columns in `order`, (size, size).
        order: `order[k]` is the coordinate at place k.
        validate_args: Whether NumPyro checks the arguments.
    """

    arg_constraints = {"loc": constraints.real_vector, "scale_tril": constraints.lower_cholesky}
    support = constraints.real_vector
    reparametrized_params = ["loc", "scale_tril"]
    pytree_aux_fields = ("order",)

    def __init__(self, loc: Any, scale_tril: Any, order: tuple[int, ...], *, validate_args: bool | None = None) -> None:
        self.loc, self.scale_tril, self.order = loc, scale_tril, order
        super().__init__((), jnp.shape(loc), validate_args=validate_args)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        """Draws, `(*sample_shape, size)`."""
        noise = jax.random.normal(key, (*sample_shape, *self.event_shape), jnp.result_type(self.loc))
        ordered = noise @ self.scale_tril.T
        return self._broadcast(self.loc, ordered) + ordered[..., np.argsort(self.order)]

    @dist.util.validate_sample
    def log_prob(self, value: Any, intermediates: Any = None) -> Any:
        """In nats, `(...)` for values `(..., size)`, in O(size^2) each."""
        size = self.event_shape[0]
        centred = (value - self._broadcast(self.loc, value))[..., np.asarray(self.order)]
        white = solve_triangular(self.scale_tril, centred.reshape(-1, size).T, lower=True)
        squares = jnp.sum(jnp.square(white), axis=0).reshape(centred.shape[:-1])
        return -0.5 * (squares + size * np.log(2 * np.pi)) - jnp.log(jnp.diagonal(self.scale_tril)).sum()

    @property
    def mean(self) -> Any:
        """Shape (size,)."""
        return self.loc

    @property
    def variance(self) -> Any:
        """Shape (size,)."""
        return jnp.square(self.scale_tril).sum(-1)[np.argsort(self.order)]

    @property
    def covariance_matrix(self) -> Any:
        """Shape (size, size)."""
        places = np.argsort(self.order)
        return (self.scale_tril @ self.scale_tril.T)[places[:, None], places[None, :]]

    @staticmethod
    def _broadcast(loc: Any, like: Any) -> Any:
        return jnp.broadcast_to(loc, jnp.broadcast_shapes(jnp.shape(like), jnp.shape(loc)))


class AutoBlockNormal(AutoContinuous):
    """NumPyro's guide for a multivariate normal with blocks; this module's text says which.

    Its parameters are `<prefix>_loc`, (size,) in NumPyro's order of the unconstrained coordinates, and
    `<prefix>_scale_tril`, the Cholesky factor (size, size) with rows and columns in `blocks.order`. Under SVI only the
    entries inside the pattern are free, scaled as AutoMultivariateNormal's are. A solver of one's own may write the
    two directly (`params_from`); what it leaves outside of the pattern is not read and has no gradient.

    Usage::

        guide = AutoBlockNormal(model)  # blocks from the model's plates, shared coordinates coupled to all
        svi = SVI(model, guide, ...)

    Args:
        model: A NumPyro callable.
        structure: `"coupled"` (shared coordinates coupled to all blocks; the default), `"blocks"` (not coupled), or
            blocks found before, as by `plate_blocks`.
        groups: Sites to be named together instead (`named_blocks`); everything else is then on its own.
        along: The plates whose units are the blocks, where they are not to be found by trial (`plate_blocks`).
        prefix: Of the names of parameters.
        init_loc_fn: NumPyro's strategy for the first location.
        init_scale: The first sd of every coordinate, in unconstrained units.

    Attributes:
        blocks: The structure in use, once the guide has seen the model.

    Raises:
        ValueError: Structure, groups or plates are not as above, or do not fit the model when the guide first sees it.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        structure: str | Blocks | None = None,
        *,
        groups: Sequence[Sequence[str]] | None = None,
        along: Sequence[str] | None = None,
        prefix: str = "auto",
        init_loc_fn: Callable[..., Any] = init_to_uniform,
        init_scale: float = 0.1,
    ) -> None:
        if init_scale <= 0:
            raise ValueError(f"Expected init_scale above 0; got {init_scale}.")
        if not (structure is None or isinstance(structure, Blocks) or structure in (BLOCKS, COUPLED)):
            raise ValueError(f"Expected structure to be '{BLOCKS}', '{COUPLED}' or a Blocks; got {structure!r}.")
        if groups is not None and (structure is not None or along is not None):
            raise ValueError("Expected groups or else structure and along; got both: leave one out.")
        if along is not None and isinstance(structure, Blocks):
            raise ValueError("Expected along or a Blocks; got both: give along to plate_blocks.")
        self.structure = COUPLED if structure is None else structure
        self.groups, self.along, self._init_scale = groups, along, init_scale
        # Whoever masks `model` while the guide is set up leaves the density to be looked at here.
        self._program = model
        super().__init__(model, prefix=prefix, init_loc_fn=init_loc_fn)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        space = Space(tuple(self._init_locs), tuple(jnp.shape(value) for value in self._init_locs.values()))
        if self.groups is not None:
            self.blocks = _grouped(space, self.groups)
        elif isinstance(self.structure, Blocks):
            self.blocks = self.structure
        else:
            found = _found(self._program, args, kwargs, space, self.along)
            self.blocks = replace(found, coupled=self.structure == COUPLED)
        if self.blocks.size != space.size:
            raise ValueError(
                f"Expected blocks of this model's {space.size} unconstrained coordinates; got blocks of "
                f"{self.blocks.size}: make them for the model and chart that the guide looks at."
            )

    def _get_posterior(self) -> BlockNormal:
        loc = numpyro.param(f"{self.prefix}_loc", self._init_latent)
        scale_tril = numpyro.param(
            f"{self.prefix}_scale_tril",
            self._init_scale * jnp.identity(self.blocks.size, jnp.result_type(self._init_latent)),
            constraint=_BlockCholesky(self.blocks),
        )
        return self._normal(loc, scale_tril)

    def _normal(self, loc: Any, scale_tril: Any) -> BlockNormal:
        return BlockNormal(loc, jnp.where(self.blocks.pattern, scale_tril, 0.0), self.blocks.order)

    def get_base_dist(self) -> dist.Distribution:
        """Independent standard normals, one for each place in `blocks.order`."""
        return dist.Normal(jnp.zeros(self.blocks.size), 1).to_event(1)

    def get_transform(self, params: Mapping[str, Any]) -> Transform:
        """From standard normals in `blocks.order` to unconstrained values in NumPyro's order."""
        posterior = self.get_posterior(params)
        ordered = LowerCholeskyAffine(posterior.loc[np.asarray(self.blocks.order)], posterior.scale_tril)
        return ComposeTransform([ordered, PermuteTransform(jnp.asarray(self.blocks.places))])

    def get_posterior(self, params: Mapping[str, Any]) -> BlockNormal:
        """The multivariate normal of an unconstrained vector in NumPyro's order."""
        return self._normal(params[f"{self.prefix}_loc"], params[f"{self.prefix}_scale_tril"])

    def median(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Site name to the posterior median of each coordinate."""
        return self._unpack_and_constrain(params[f"{self.prefix}_loc"], params)

    def quantiles(self, params: Mapping[str, Any], quantiles: Any) -> dict[str, Any]:
        """Site name to quantiles of each coordinate, `(*shape of quantiles, ...)`."""
        posterior = self.get_posterior(params)
        apart = jnp.multiply.outer(ndtri(jnp.asarray(quantiles, posterior.loc.dtype)), jnp.sqrt(posterior.variance))
        return self._unpack_and_constrain(jnp.broadcast_to(posterior.loc, apart.shape) + apart, params)


def params_from(guide: AutoBlockNormal, loc: Any, factor: Any) -> dict[str, Any]:
    """The guide's parameters for a location (size,) and a Cholesky factor (size, size) in `guide.blocks.order`.

    Raises:
        ValueError: A shape is wrong, the factor has an entry outside of the pattern, or its diagonal is not positive.
    """
    size, values = guide.blocks.size, np.asarray(factor)
    if np.shape(loc) != (size,) or values.shape != (size, size):
        raise ValueError(f"Expected shapes ({size},) and ({size}, {size}); got {np.shape(loc)} and {values.shape}.")
    if values[~guide.blocks.pattern].any():
        raise ValueError(
            "Expected a factor that is zero outside of the pattern: bring it into the order of the blocks."
        )
    if not (np.diag(values) > 0).all():
        raise ValueError(f"Expected a factor with a positive diagonal; its least entry is {np.diag(values).min():g}.")
    return {f"{guide.prefix}_loc": loc, f"{guide.prefix}_scale_tril": factor}


def gaussian_from(guide: AutoBlockNormal, params: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Location (size,) and Cholesky factor (size, size) in `guide.blocks.order`: the inverse of `params_from`."""
    posterior = guide.get_posterior(params)
    return np.asarray(posterior.loc), np.asarray(posterior.scale_tril)


class _BlockCholesky(constraints.Constraint):
    """Lower-triangular with a positive diagonal, and zero outside of a pattern."""

    event_dim = 2

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks

    def __call__(self, x: Any) -> Any:
        outside = jnp.where(self.blocks.pattern, 0.0, x)
        return (outside == 0).all((-2, -1)) & (jnp.diagonal(x, axis1=-2, axis2=-1) > 0).all(-1)

    def feasible_like(self, prototype: Any) -> Any:
        return jnp.broadcast_to(jnp.identity(self.blocks.size), jnp.shape(prototype))

    def tree_flatten(self) -> Any:
        return (), ((), {"blocks": self.blocks})

    def eq(self, other: object, static: bool = False) -> Any:
        return isinstance(other, _BlockCholesky) and self.blocks == other.blocks


class _BlockCholeskyTransform(Transform):
    """From the free entries, those below the diagonal and then the diagonal's, to a factor with a pattern.

    As in NumPyro's `ScaledUnitLowerCholeskyTransform`: diag(softplus(d)) (I + strictly lower).
    """

    domain = constraints.real_vector

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks

    @property
    def codomain(self) -> _BlockCholesky:
        return _BlockCholesky(self.blocks)

    @property
    def _below(self) -> tuple[np.ndarray, ...]:
        return np.nonzero(np.tril(self.blocks.pattern, -1))

    def __call__(self, x: Any) -> Any:
        size, (rows, columns) = self.blocks.size, self._below
        unit = jnp.broadcast_to(jnp.identity(size, x.dtype), (*x.shape[:-1], size, size))
        unit = unit.at[..., rows, columns].set(x[..., :-size])
        return unit * jax.nn.softplus(x[..., -size:])[..., None]

    def _inverse(self, y: Any) -> Any:
        rows, columns = self._below
        diagonal = jnp.diagonal(y, axis1=-2, axis2=-1)
        # softplus^-1(d) = log(e^d - 1), which must not overflow
        free = diagonal + jnp.log(-jnp.expm1(-diagonal))
        return jnp.concatenate([(y / diagonal[..., None])[..., rows, columns], free], axis=-1)

    def log_abs_det_jacobian(self, x: Any, y: Any, intermediates: Any = None) -> Any:
        in_row = np.tril(self.blocks.pattern, -1).sum(1)
        diagonal = jnp.diagonal(y, axis1=-2, axis2=-1)
        scaled = jnp.broadcast_to(jnp.asarray(in_row, y.dtype), diagonal.shape) * jnp.log(diagonal)
        return (scaled + jax.nn.log_sigmoid(x[..., -self.blocks.size :])).sum(-1)

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-1], self.blocks.size, self.blocks.size)

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-2], int(self.blocks.pattern.sum()))

    def tree_flatten(self) -> Any:
        return (), ((), {"blocks": self.blocks})

    def eq(self, other: object, static: bool = False) -> Any:
        return isinstance(other, _BlockCholeskyTransform) and self.blocks == other.blocks


@biject_to.register(_BlockCholesky)
def _to_block_cholesky(constraint: _BlockCholesky) -> _BlockCholeskyTransform:
    return _BlockCholeskyTransform(constraint.blocks)


# -- families by name -------------------------------------------------------------------------------------------------


def structured_guides() -> tuple[Guide, Guide]:
    """The families `blocks` and `coupled`, over the blocks that a model's plates make."""
    from toolkit.variational.guides import Guide  # whose table of guides holds these two

    smaller = ("mean_field", "diagonal")
    label = AutoBlockNormal.__name__
    return (
        Guide(BLOCKS, functools.partial(AutoBlockNormal, structure=BLOCKS), smaller, label=label),
        Guide(COUPLED, functools.partial(AutoBlockNormal, structure=COUPLED), (BLOCKS, *smaller), label=label),
    )


def block_guide(name: str, groups: Sequence[Sequence[str]]) -> Guide:
    """The family that is a full Gaussian over the sites named together and factorised otherwise (`named_blocks`).

    Args:
        name: What the report calls it.
        groups: Such as `[("alpha", "beta"), ("sigma",)]`: latent sites by their names in the guide's chart.
    """
    from toolkit.variational.guides import Guide

    build = functools.partial(AutoBlockNormal, groups=tuple(tuple(group) for group in groups))
    return Guide(name, build, ("mean_field", "diagonal"), label=AutoBlockNormal.__name__)
