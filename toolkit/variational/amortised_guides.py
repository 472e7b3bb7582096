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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax.scipy.linalg import solve_triangular
from numpyro.distributions import constraints

from toolkit.modelling.space import Space
from toolkit.variational.block_guides import COUPLED, AutoBlockNormal
from toolkit.variational.block_normals import BlockNormal
from toolkit.variational.blocks import Blocks
from toolkit.variational.unit_summaries import Units, UnitSummaries

HIDDEN = 2
"""Units of the hidden layer, unless asked for otherwise."""

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
        layer = jnp.tanh(features @ inner.reshape(hidden, outputs).T + threshold)
        return constant + gain * features + layer @ outer.reshape(hidden, outputs)

    def parts(self, given: Any) -> tuple[Any, Any, Any]:
        """d (units, size), T (units, size, size) and K (units, size, shared), from what it gives."""
        size, rows_columns = self.size, np.tril_indices(self.size, -1)
        ends = np.cumsum([size, size, len(rows_columns[0])])
        shift, log_diagonal, below, slope = jnp.split(given, ends, axis=1)
        triangle = jnp.exp(log_diagonal / _ROOT_2)[..., None] * jnp.eye(size)
        triangle = triangle.at[:, rows_columns[0], rows_columns[1]].set(below)
        return shift, triangle, slope.reshape(-1, size, self.shared)


class AutoAmortisedNormal(AutoBlockNormal):
    """NumPyro's guide for a multivariate normal with amortised branches (this file says which).

    Its free parameters are `<prefix>_loc` and `<prefix>_scale_tril` of the shared coordinates, in the order of
    `blocks`, and `<prefix>_weights`, of all runs of units. Beside them stand constants, which have no gradient, so that
    draws and densities need no derivative of the model: `<prefix>_reference_loc`, `<prefix>_reference_tril` and
    `<prefix>_reference_units`, r, R and where the search for the units' modes begins; and for each run
    `<prefix>_units_<run>`, what is known of its units, and `<prefix>_features_<run>`, by which their features are
    standardised.

    Args:
        model: A NumPyro callable.
        hidden: Units of the network's hidden layer.
        along: The plates whose units are amortised over, where they are not to be found by trial (`plate_blocks`).
        structure: Blocks found before, instead.
        options: Others of `AutoBlockNormal`.

    Attributes:
        blocks: The structure in use, once the guide has seen the model.
        branches: For each run of blocks its function.

    Raises:
        ValueError: `hidden` is negative, or what `AutoBlockNormal` raises.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        hidden: int = HIDDEN,
        along: Sequence[str] | None = None,
        structure: Blocks | None = None,
        **options: Any,
    ) -> None:
        if hidden < 0:
            raise ValueError(f"Expected hidden to be 0 or more; got {hidden}.")
        self.hidden = hidden
        super().__init__(model, structure or COUPLED, along=along, **options)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        space = Space(tuple(self._init_locs), tuple(jnp.shape(value) for value in self._init_locs.values()))
        self.branches = tuple(Branch(run.size, self.blocks.shared, self.hidden) for run in self.blocks.runs)
        self.summaries = UnitSummaries(self._program, args, kwargs, space, self.blocks)
        self._began = None

    @property
    def words(self) -> str:
        """What the report says of the family, without a full stop."""
        if not self.branches:
            return self.blocks.words
        shared = self.blocks.shared
        free = shared + shared * (shared + 1) // 2 + sum(branch.weights for branch in self.branches)
        network = f"a network with {self.hidden} hidden units beside it" if self.hidden else "no network"
        return (
            f"{self.blocks.words}; each branch by one function of its unit's mode and curvature, constants and gains and "
            f"{network}: {free:,} parameters for any number of units"
        )

    def constants_at(self, vector: np.ndarray, scale_tril: np.ndarray) -> dict[str, np.ndarray]:
        """The parameters that are not free, for the units of the data that the guide was set up on.

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
        found = {f"{self.prefix}_reference_{part}": np.asarray(value) for part, value in reference.items()}
        summed = self.summaries.at(reference["loc"], reference["tril"], reference["units"])
        for run, (units, local) in enumerate(zip(summed, self.summaries.split(reference["units"]), strict=True)):
            found[f"{self.prefix}_units_{run}"] = np.concatenate([units.packed, units.features(local)], axis=1)
            name = f"{self.prefix}_features_{run}"
            found[name] = np.asarray(features[name]) if features is not None else _standard(units, local)
        return found

    def place(self, loc: Any, scale_tril: Any, weights: Any, constants: Mapping[str, Any]) -> tuple[Any, Any]:
        """Location (size,) and Cholesky factor (size, size), both in the order of the blocks."""
        size, shared = self.blocks.size, self.blocks.shared
        factor = jnp.zeros((size, size)).at[:shared, :shared].set(jnp.tril(scale_tril))
        reference = constants[f"{self.prefix}_reference_tril"]
        away = solve_triangular(reference, loc - constants[f"{self.prefix}_reference_loc"], lower=True)
        relative = solve_triangular(reference, jnp.tril(scale_tril), lower=True)
        locs, begin = [loc], shared
        pieces = jnp.split(weights, np.cumsum([branch.weights for branch in self.branches])[:-1])
        for run, branch in enumerate(self.branches):
            units, standard = (constants[f"{self.prefix}_{name}_{run}"] for name in ("units", "features"))
            k = branch.size
            centre, spread, slope, features = jnp.split(
                units, np.cumsum([k, k * k, k * shared]), axis=1
            )
            spread, slope = spread.reshape(-1, k, k), slope.reshape(-1, k, shared)
            shift, triangle, more = branch.parts(branch(pieces[run], (features - standard[0]) * standard[1]))
            white = slope @ away + shift
            locs.append((centre + jnp.einsum("nij,nj->ni", spread, white)).ravel())
            rows = begin + np.arange(len(units) * k)
            factor = factor.at[rows, :shared].set((spread @ (slope @ relative + more)).reshape(-1, shared))
            own = rows.reshape(-1, k)
            factor = factor.at[own[:, :, None], own[:, None, :]].set(spread @ triangle)
            begin = rows[-1] + 1
        return jnp.concatenate(locs), factor

    @functools.cached_property
    def begin(self) -> np.ndarray:
        """First weights, of all runs: those at which every branch is what the unit's summary says."""
        return np.concatenate([np.empty(0), *(branch.begin(run) for run, branch in enumerate(self.branches))])

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
        names = [f"{prefix}_reference_{part}" for part in ("loc", "tril", "units")]
        names += [f"{prefix}_{name}_{run}" for run in range(len(self.branches)) for name in ("units", "features")]
        constants = {
            name: jax.lax.stop_gradient(numpyro.param(name, lambda _, name=name: jnp.asarray(self._first[name])))
            for name in names
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
        return self._placed(*(params[f"{self.prefix}_{name}"] for name in ("loc", "scale_tril", "weights")), params)

    def _placed(self, loc: Any, scale_tril: Any, weights: Any, constants: Mapping[str, Any]) -> BlockNormal:
        ordered, factor = self.place(loc, scale_tril, weights, constants)
        return BlockNormal(ordered[np.asarray(self.blocks.places)], factor, self.blocks.order)

    def median(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Site name to the posterior median of each coordinate."""
        return self._unpack_and_constrain(self.get_posterior(params).loc, params)


def _standard(units: Units, reference: np.ndarray) -> np.ndarray:
    """Mean and one over the sd of each feature, (2, features); zero for one that is the same in all units."""
    features = units.features(reference)
    mean, sd = features.mean(0), features.std(0)
    differs = sd > 1e-9 * np.maximum(np.abs(mean), 1.0)
    return np.stack([mean, np.divide(1.0, sd, out=np.zeros_like(sd), where=differs)])
