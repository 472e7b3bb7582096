"""Gaussian guides whose branches are amortised: q(z_0) prod_i N(z_i | z_0), each branch a function of its unit's data.

The family `coupled` (`toolkit.variational.blocks`) has free numbers for every unit. Here one function f_w, the same for
all units, gives them from a summary h_i of the unit's own data, so that the number of parameters does not grow with
the units, and a unit that was not there has a branch as well (`carried`):

    z_0 = m + S e_0,        z_i = u_i + D_i ( W_i R^-1 (z_0 - r) + d_i + K_i e_0 + T_i e_i ),       e standard normal,
    (d_i, T_i, K_i) = f_w(h_i).

**The summary** (`toolkit.variational.unit_summaries`) is h_i = (u_i, D_i, W_i): the branch that is best if the unit's
coordinates are Gaussian given the shared ones and these are N(r, R R'), a reference that is held. It has a closed form
in the unit's curvature, which needs no choice of features and knows no rows: a likelihood that is a factor does, too.
So f_w = (0, I, 0) is the posterior itself where log p is quadratic, and f_w has to learn only what h_i does not know:
how q(z_0) differs from the reference, and what is not Gaussian in a unit. No unit is fitted for itself.

**The function** is, for each number that it gives, a constant, its own feature times a gain, and a network with one
hidden layer over all features. Features are h_i without units of measure (`Units.features`), standardised by their
mean and sd over the units that the guide was set up on; one in which these do not differ counts for nothing.

As every member is a Gaussian with the pattern of `coupled`, that family contains this one; what it lacks to it is the
amortisation gap (Cremer, Li & Duvenaud 2018), and it is zero where some f of the unit's data gives the best branch
(Margossian & Blei 2024).

References:
    Agrawal & Domke (2021), Amortized variational inference for simple hierarchical models, NeurIPS 34.
    Cremer, Li & Duvenaud (2018), Inference suboptimality in variational autoencoders, ICML.
    Margossian & Blei (2024), Amortized variational inference: when and why?, UAI.
    Marino, Yue & Mandt (2018), Iterative amortized inference, ICML: encoders that see gradients instead of data.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax.scipy.linalg import solve_triangular
from numpyro.distributions import constraints
from numpyro.infer.initialization import init_to_uniform

from toolkit.variational.block_guides import COUPLED, AutoBlockNormal
from toolkit.variational.block_normals import BlockNormal
from toolkit.variational.blocks import Blocks
from toolkit.variational.gaussians import DENSE_LIMIT
from toolkit.variational.unit_summaries import Units, UnitSummaries, members

HIDDEN = 2
"""Units of the hidden layer, unless asked for otherwise."""

FREE = ("loc", "scale_tril", "weights")
"""Parameters that are fitted; the others are what is known of the units."""

_ROOT_2 = float(np.sqrt(2.0))  # a log scale's curvature is 2: in these units it is 1


@dataclass(frozen=True)
class Branch:
    """The function from the summaries of units of one size to their branches.

    Attributes:
        size: Coordinates of a unit.
        shared: Shared coordinates.
        hidden: Of the network's one layer; none leaves constants and gains.
    """

    size: int
    shared: int
    hidden: int

    @property
    def outputs(self) -> int:
        """Numbers that it gives for a unit, and features that it is given."""
        return 2 * self.size + self.size * (self.size - 1) // 2 + self.size * self.shared

    @property
    def weights(self) -> int:
        """How many parameters it has, for any number of units."""
        return 2 * self.outputs + self.hidden * (2 * self.outputs + 1)

    def begin(self, seed: int) -> np.ndarray:
        """Weights (weights,) with which it gives (0, I, 0), from which a gradient leads on."""
        weights = np.zeros(self.weights)
        inner = slice(2 * self.outputs, 2 * self.outputs + self.hidden * self.outputs)
        rng = np.random.default_rng(seed)
        weights[inner] = rng.standard_normal(self.hidden * self.outputs) / np.sqrt(self.outputs)
        return weights

    def __call__(self, weights: Any, features: Any) -> Any:
        """What it gives for features (units, outputs): in working units in which log q's curvature is about one."""
        outputs, hidden = self.outputs, self.hidden
        constant, gain, inner, threshold, outer = jnp.split(
            weights, np.cumsum([outputs, outputs, hidden * outputs, hidden])
        )
        layer = jnp.tanh(features @ inner.reshape(hidden, outputs).T + threshold[None])
        return constant[None] + gain[None] * features + layer @ outer.reshape(hidden, outputs)

    def parts(self, given: Any) -> tuple[Any, Any, Any]:
        """The shift d (units, size), T (units, size, size) and K (units, size, shared), from what it gives."""
        size, rows_columns = self.size, np.tril_indices(self.size, -1)
        ends = np.cumsum([size, size, len(rows_columns[0])])
        shift, log_diagonal, below, slope = jnp.split(given, ends, axis=1)
        triangle = jnp.exp(log_diagonal / _ROOT_2)[..., None] * jnp.eye(size)[None]
        triangle = triangle.at[:, rows_columns[0], rows_columns[1]].set(below)
        return shift, triangle, slope.reshape(len(given), size, self.shared)


@dataclass(frozen=True)
class Layout:
    """The shape of the family, all that its programs are compiled for; hashable.

    Attributes:
        shared: Shared coordinates.
        branches: For each run of blocks its function.
        counts: And how many units it has.
    """

    shared: int
    branches: tuple[Branch, ...]
    counts: tuple[int, ...]

    @property
    def size(self) -> int:
        """Unconstrained coordinates."""
        return self.shared + sum(branch.size * count for branch, count in zip(self.branches, self.counts, strict=True))

    @property
    def weights(self) -> int:
        """Of all runs."""
        return sum(branch.weights for branch in self.branches)

    @property
    def constants(self) -> tuple[str, ...]:
        """Names of what is held: the reference's parts, and for each run what is known of its units.

        That is the units, what standardises features, and what the search for the units' modes has left.
        """
        runs = range(len(self.branches))
        reference = tuple(f"reference_{part}" for part in ("loc", "tril", "units"))
        return (*reference, *(f"{name}_{run}" for run in runs for name in ("units", "features", "units_left")))

    def split(self, weights: Any) -> list[Any]:
        """The weights of each run."""
        begins = np.cumsum([0, *(branch.weights for branch in self.branches)])
        return [weights[begins[run] : begins[run + 1]] for run in range(len(self.branches))]

    def features(self, run: int, constants: Mapping[str, Any]) -> Any:
        """What the function of a run is given, standardised, (units, features)."""
        standard = constants[f"features_{run}"]
        raw = constants[f"units_{run}"][:, -self.branches[run].outputs :]
        return (raw - standard[:1]) * standard[1:]

    def place(self, loc: Any, scale_tril: Any, weights: Any, constants: Mapping[str, Any]) -> tuple[Any, Any]:
        """Location (size,) and Cholesky factor (size, size), both in the order of the blocks."""
        shared, reference = self.shared, constants["reference_tril"]
        factor = jnp.zeros((self.size, self.size), jnp.result_type(loc)).at[:shared, :shared].set(jnp.tril(scale_tril))
        away = solve_triangular(reference, loc - constants["reference_loc"], lower=True)
        relative = solve_triangular(reference, jnp.tril(scale_tril), lower=True)
        locs, begin = [loc], shared
        for run, (branch, own) in enumerate(zip(self.branches, self.split(weights), strict=True)):
            k = branch.size
            units = constants[f"units_{run}"]
            centre, spread, slope = (
                units[:, a:b] for a, b in itertools.pairwise(np.cumsum([0, k, k * k, k * shared]).tolist())
            )
            spread, slope = spread.reshape(len(units), k, k), slope.reshape(len(units), k, shared)
            shift, triangle, more = branch.parts(branch(own, self.features(run, constants)))
            white = jnp.einsum("nks,s->nk", slope, away) + shift
            locs.append((centre + jnp.einsum("nij,nj->ni", spread, white)).ravel())
            coupled = jnp.einsum("nij,njs->nis", spread, jnp.einsum("nks,st->nkt", slope, relative) + more)
            rows = begin + np.arange(len(units) * k).reshape(-1, k)
            factor = factor.at[rows, :shared].set(coupled)
            factor = factor.at[rows[:, :, None], rows[:, None, :]].set(jnp.einsum("nij,njk->nik", spread, triangle))
            begin += rows.size
        return jnp.concatenate(locs), factor


class AutoAmortisedNormal(AutoBlockNormal):
    """NumPyro's guide for a multivariate normal with amortised branches (this file says which).

    Its free parameters are `<prefix>_loc` and `<prefix>_scale_tril` of the shared coordinates, in the order of
    `blocks`, and `<prefix>_weights`, of all runs of units. Beside them stand constants, which have no gradient, so that
    draws and densities need no derivative of the model: `<prefix>_reference_loc`, `<prefix>_reference_tril` and
    `<prefix>_reference_units`, r, R and where the search for the units' modes begins; and for each run
    `<prefix>_units_<run>`, what is known of its units, `<prefix>_features_<run>`, by which their features are
    standardised, and `<prefix>_units_left_<run>`, the nats that another step towards its mode promised each unit.

    Args:
        model: A NumPyro callable.
        hidden: Units of the network's hidden layer.
        along: The plates whose units are amortised over, where they are not to be found by trial (`plate_blocks`).
        structure: Blocks found before, instead; shared coordinates are coupled to them whatever they say.
        like: Another such guide, set up on other data of the same model, instead: the units are those along its plates.
        prefix: Of the names of parameters.
        init_loc_fn: NumPyro's strategy for the first location.
        init_scale: The first sd of every coordinate, in unconstrained units.

    Attributes:
        blocks: The structure in use, once the guide has seen the model.
        layout: How many units there are, and their function.

    Raises:
        ValueError: `hidden` is negative, the structure is none or given twice, or what `AutoBlockNormal` raises; when
            the guide first sees the model: it has too many dimensions, or not the structure of `like`.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        hidden: int = HIDDEN,
        along: Sequence[str] | None = None,
        structure: Blocks | None = None,
        like: AutoAmortisedNormal | None = None,
        prefix: str = "auto",
        init_loc_fn: Callable[..., Any] = init_to_uniform,
        init_scale: float = 0.1,
    ) -> None:
        if hidden < 0:
            raise ValueError(f"Expected hidden to be 0 or more; got {hidden}.")
        if not (structure is None or isinstance(structure, Blocks)):
            raise ValueError(
                "Expected structure to be a Blocks, since branches are coupled to all that is shared; got "
                f"{structure!r}: take AutoBlockNormal for other structures."
            )
        if like is not None:
            if not (structure is None and along is None):
                raise ValueError("Expected like, or else structure or along; got both: leave one out.")
            plates = [run.plate for run in like.blocks.runs]
            structure, along = (None, plates or None) if all(plates) else (like.blocks, None)
        self.hidden, self.like = hidden, like
        super().__init__(
            model, structure or COUPLED, along=along, prefix=prefix, init_loc_fn=init_loc_fn, init_scale=init_scale
        )

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._setup_prototype(*args, **kwargs)
        except ValueError as error:
            if self.like is None:
                raise
            raise ValueError(
                f"Expected other data of the model that was fitted, with {self.like.blocks.words}; got a model without "
                "these plates: a fit is carried to the same model only."
            ) from error
        space = self._space
        if space.size > DENSE_LIMIT:
            raise ValueError(
                f"Expected at most {DENSE_LIMIT:,} dimensions for amortised branches, whose Cholesky factor is kept "
                f"whole; got {space.size:,}: take low_rank."
            )
        self.blocks = replace(self.blocks, coupled=True)
        if self.like is not None:
            self._require_like(self.like)
        runs, shared = self.blocks.runs, self.blocks.shared
        branches = tuple(Branch(run.size, shared, self.hidden) for run in runs)
        self.layout = Layout(shared, branches, tuple(run.count for run in runs))
        self.summaries = UnitSummaries(self._program, args, kwargs, space, self.blocks)
        self._began: dict[str, np.ndarray] | None = None

    @property
    def coordinates(self) -> list[str]:
        """What each shared coordinate is, and each of the first unit along every plate, in the order of the blocks."""
        where = self._space.unravel(np.arange(self._space.size))
        names = {
            int(number): name + (f"[{', '.join(map(str, place))}]" if place else "")
            for name, numbers in where.items()
            for place, number in np.ndenumerate(numbers)
        }
        sites = [name for name, numbers in where.items() for _ in range(numbers.size)]
        support = {name: _of_one(self.prototype_trace[name]["fn"].support) for name in self._space.names}
        shared = [f"{names[k]} in {support[sites[k]]}" for k in self.blocks.order[: self.blocks.shared]]
        # A unit's support may depend on its data.
        return shared + [
            f"{names[k]} of each unit along '{run.plate}', in {type(support[sites[k]]).__name__}"
            for run, own in zip(self.blocks.runs, members(self.blocks), strict=True)
            for k in own[0]
        ]

    def _require_like(self, other: AutoAmortisedNormal) -> None:
        """Nothing, if parameters of the other guide mean the same in this one."""
        pairs = itertools.zip_longest(other.coordinates, self.coordinates, fillvalue="nothing more")
        for number, (there, here) in enumerate(pairs, 1):
            if there != here:
                raise ValueError(
                    f"Expected a model with the structure of the fit, {other.blocks.words}, whose coordinate {number} "
                    f"is {there}; got {self.blocks.words}, and {here}: carry a fit to data of its own model and chart."
                )

    @property
    def words(self) -> str:
        """What the report says of the family, without a full stop."""
        if not self.layout.branches:
            return self.blocks.words
        shared = self.blocks.shared
        free = shared + shared * (shared + 1) // 2 + self.layout.weights
        network = f"a network with {self.hidden} hidden units" if self.hidden else "no network"
        return (
            f"{self.blocks.words}; each branch by one function of its unit's mode and curvature (constants, "
            f"gains, {network}): {free:,} parameters for any number of units"
        )

    def constants_at(self, vector: np.ndarray, scale_tril: np.ndarray) -> dict[str, np.ndarray]:
        """The parameters that are not free, without the prefix, for the units of the data that the guide was set up on.

        Args:
            vector: An unconstrained point, (size,): the reference's location, and where units are looked for.
            scale_tril: The reference's Cholesky factor, (shared, shared).
        """
        loc, locals_ = self.summaries.around(np.asarray(vector, float))
        return self.constants({"loc": loc, "tril": np.asarray(scale_tril, float), "units": locals_})

    def constants(
        self, reference: Mapping[str, np.ndarray], features: Mapping[str, Any] | None = None
    ) -> dict[str, np.ndarray]:
        """The same for a reference by its parts `loc`, `tril` and `units`.

        Args:
            reference: Its parts.
            features: Constants of another guide, by whose units features are standardised; by these units' own if None.
        """
        found = {f"reference_{part}": np.asarray(value) for part, value in reference.items()}
        summed = self.summaries.at(reference["loc"], reference["tril"], reference["units"])
        for run, (units, local) in enumerate(zip(summed, self.summaries.split(reference["units"]), strict=True)):
            found[f"units_{run}"] = np.concatenate([units.packed, units.features(local)], axis=1)
            found[f"units_left_{run}"] = units.left
            name = f"features_{run}"
            found[name] = np.asarray(features[name]) if features is not None else _standard(units, local)
        return found

    @functools.cached_property
    def begin(self) -> np.ndarray:
        """First weights, of all runs: those at which every branch is what the unit's summary says."""
        return np.concatenate([np.empty(0), *(branch.begin(run) for run, branch in enumerate(self.layout.branches))])

    def _get_posterior(self) -> BlockNormal:
        prefix, shared = self.prefix, self.blocks.shared
        own = np.array(self.blocks.order[:shared], dtype=int)
        loc = numpyro.param(f"{prefix}_loc", lambda _: jnp.asarray(self._init_latent)[own])
        scale_tril = numpyro.param(
            f"{prefix}_scale_tril",
            lambda _: self._init_scale * jnp.identity(shared, jnp.result_type(self._init_latent)),
            constraint=constraints.lower_cholesky,
        )
        weights = numpyro.param(f"{prefix}_weights", lambda _: jnp.asarray(self.begin))
        constants = {
            name: jax.lax.stop_gradient(
                numpyro.param(f"{prefix}_{name}", lambda _, name=name: jnp.asarray(self._first[name]))
            )
            for name in self.layout.constants
        }
        return self._placed(loc, scale_tril, weights, constants)

    @property
    def _first(self) -> dict[str, np.ndarray]:
        """The constants at the place where the guide begins."""
        if self._began is None:
            scale_tril = self._init_scale * np.eye(self.blocks.shared)
            self._began = self.constants_at(np.asarray(self._init_latent, float), scale_tril)
        return self._began

    def get_posterior(self, params: Mapping[str, Any]) -> BlockNormal:
        """The multivariate normal of an unconstrained vector in NumPyro's order."""
        loc, scale_tril, weights = (params[f"{self.prefix}_{name}"] for name in FREE)
        return self._placed(loc, scale_tril, weights, self.constants_of(params))

    def constants_of(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Of the guide's parameters those that are not free, without the prefix."""
        return {name: params[f"{self.prefix}_{name}"] for name in self.layout.constants}

    def _placed(self, loc: Any, scale_tril: Any, weights: Any, constants: Mapping[str, Any]) -> BlockNormal:
        ordered, factor = self.layout.place(loc, scale_tril, weights, constants)
        return BlockNormal(ordered[np.asarray(self.blocks.places)], factor, self.blocks.order)

    def median(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Site name to the posterior median of each coordinate."""
        return self._unpack_and_constrain(self.get_posterior(params).loc, params)


def _of_one(support: Any) -> Any:
    """The constraint of one event, without the shells that say how many axes it has."""
    while isinstance(support, type(constraints.independent(constraints.real, 1))):
        support = support.base_constraint
    return support


def _standard(units: Units, reference: np.ndarray) -> np.ndarray:
    """Mean and one over the sd of each feature, (2, features); zero for one that is the same in all units."""
    features = units.features(reference)
    mean, sd = features.mean(0), features.std(0)
    differs = sd > 1e-9 * np.maximum(np.abs(mean), 1.0)
    return np.stack([mean, np.divide(1.0, sd, out=np.zeros_like(sd), where=differs)])
