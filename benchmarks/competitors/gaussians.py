"""Gaussians in unconstrained space, and their ELBO by one estimator, whoever fitted them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

DRAWS = 200_000
_BATCH = 10_000
_PILOT = 4_000  # draws behind a control variate, which are not averaged
_AT_ONCE = 100
_SE = 0.01  # in nats: a tenth of the tolerance that decides whether a solver has arrived


@dataclass(frozen=True)
class Space:
    """A model's latent sites as one vector in unconstrained space, in the order in which the program has them."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of_model(cls, model: Any) -> Space:
        """The space of the model in its own chart."""
        with jax.enable_x64(True):
            point = model.start(jax.random.PRNGKey(0), model.arrays)
        return cls(tuple(point), tuple(tuple(jnp.shape(value)) for value in point.values()))

    @property
    def size(self) -> int:
        """How many coordinates there are."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def slices(self) -> dict[str, slice]:
        """Site name to its place in the vector."""
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])
        begins = [0, *ends[:-1]]
        return {name: slice(int(a), int(b)) for name, a, b in zip(self.names, begins, ends, strict=True)}

    def unravel(self, vector: Any) -> dict[str, Any]:
        """Site name to value."""
        slices = self.slices
        return {name: vector[slices[name]].reshape(shape) for name, shape in zip(self.names, self.shapes, strict=True)}

    def order(self, sites: list[tuple[str, int]]) -> np.ndarray:
        """For each coordinate, its place in a vector that has the sites `(name, size)` in another order.

        Raises:
            ValueError: The other vector does not hold the same sites in the same sizes.
        """
        own = {name: math.prod(shape) for name, shape in zip(self.names, self.shapes, strict=True)}
        if dict(sites) != own or len(sites) != len(own):
            raise ValueError(f"Expected the sites {own}; got {sites}: give the program the model's names and shapes.")
        begins = dict(zip([name for name, _ in sites], np.cumsum([0, *(size for _, size in sites)])[:-1], strict=True))
        return np.concatenate([begins[name] + np.arange(own[name]) for name in self.names])


@dataclass(frozen=True, eq=False)
class Gaussian:
    """N(loc, factor factor'), with log |det factor|; shapes (size,) and (size, size)."""

    loc: np.ndarray
    factor: np.ndarray
    log_determinant: float

    @classmethod
    def of_scales(cls, loc: Any, scales: Any) -> Gaussian:
        """Independent coordinates with these standard deviations."""
        scales = np.asarray(scales, float)
        return cls(np.asarray(loc, float), np.diag(scales), float(np.log(np.abs(scales)).sum()))

    @classmethod
    def of_factor(cls, loc: Any, factor: Any) -> Gaussian:
        """A covariance by its lower Cholesky factor."""
        factor = np.tril(np.asarray(factor, float))
        return cls(np.asarray(loc, float), factor, float(np.log(np.abs(np.diag(factor))).sum()))

    @classmethod
    def of_low_rank(cls, loc: Any, scales: Any, columns: Any) -> Gaussian:
        """Covariance S (I + W W') S with S = diag(scales) and W = columns."""
        scales, columns = np.asarray(scales, float), np.asarray(columns, float)
        inner = np.eye(len(scales)) + columns @ columns.T
        if not (np.isfinite(inner).all() and np.isfinite(scales).all()):
            return cls(np.asarray(loc, float), inner, math.nan)
        return cls.of_factor(loc, scales[:, None] * np.linalg.cholesky(inner))

    @classmethod
    def of_covariance(cls, loc: Any, covariance: Any) -> Gaussian:
        """A covariance in full.

        Raises:
            numpy.linalg.LinAlgError: It is finite and not positive definite.
        """
        covariance = np.asarray(covariance, float)
        if not np.isfinite(covariance).all():
            return cls(np.asarray(loc, float), covariance, math.nan)
        scales = np.sqrt(np.diag(covariance))
        # Scaled first: posterior sds of 0.001 and 1,000 stand side by side in one matrix.
        factor = np.linalg.cholesky(covariance / np.outer(scales, scales))
        return cls.of_factor(loc, scales[:, None] * factor)

    def reordered(self, order: np.ndarray) -> Gaussian:
        """The same Gaussian with coordinate `order[i]` at place i."""
        return replace(self, loc=self.loc[order], factor=self.factor[order])

    @property
    def is_finite(self) -> bool:
        """Whether every parameter is."""
        return bool(
            np.isfinite(self.loc).all() and np.isfinite(self.factor).all() and np.isfinite(self.log_determinant)
        )


@dataclass(frozen=True)
class Elbo:
    """An ELBO in nats with its Monte Carlo standard error; minus infinity where a draw has no density."""

    value: float
    se: float
    draws: int


def measurer(model: Any, space: Space, *, draws: int = DRAWS, seed: int = 0) -> Callable[[Gaussian], Elbo]:
    """A function that measures the ELBO of a Gaussian on draws common to all Gaussians.

    Float64, log q in closed form at the draws, until the standard error is 0.01 nats or the draws are used up. A
    quadratic of the draws' noise is taken out, whose mean is known whatever the Gaussian. It comes from other draws, so
    that the mean stays as it is and only the error shrinks.

    Args:
        model: A `toolkit.Model`.
        space: Its unconstrained space.
        draws: At most so many, in batches of 10,000.
        seed: Of the draws; not the solvers' seed.
    """

    def log_weight(noise: Any, parameters: Any, arrays: Any) -> Any:
        loc, factor, log_determinant = parameters
        log_q = -0.5 * noise @ noise - 0.5 * space.size * jnp.log(2 * jnp.pi) - log_determinant
        return model.log_density(space.unravel(loc + factor @ noise), arrays) - log_q

    def quadratic(key: Any, parameters: Any, arrays: Any) -> tuple[Any, Any]:
        # By Stein's identities its slope is the mean gradient, its bend the mean of the gradient times the noise.
        noise = jax.random.normal(key, (_PILOT, space.size))
        of_noise = jax.value_and_grad(lambda one: log_weight(one, parameters, arrays))
        values, gradients = jax.lax.map(of_noise, noise, batch_size=_AT_ONCE // 4)  # they take more memory
        slope, bend = gradients.mean(axis=0), noise.T @ gradients / _PILOT
        bend = (bend + bend.T) / 2
        left = values - noise @ slope - 0.5 * ((noise @ bend) * noise).sum(axis=1)
        # Where gradients are so large, or missing, that it would add noise (NaN compares as false), there is none.
        helps = left.std() < values.std()
        return jnp.where(helps, slope, 0.0), jnp.where(helps, bend, 0.0)

    def terms(key: Any, parameters: Any, known: Any, arrays: Any) -> Any:
        slope, bend = known

        def one(noise: Any) -> Any:
            taken_out = noise @ slope + 0.5 * (noise @ bend @ noise - jnp.trace(bend))
            return log_weight(noise, parameters, arrays) - taken_out

        return jax.lax.map(one, jax.random.normal(key, (_BATCH, space.size)), batch_size=_AT_ONCE)

    fitted, compiled = jax.jit(quadratic), jax.jit(terms)

    def measure(gaussian: Gaussian) -> Elbo:
        if not gaussian.is_finite:
            return Elbo(-math.inf, math.nan, 0)
        parameters = gaussian.loc, gaussian.factor, gaussian.log_determinant
        pieces: list[np.ndarray] = []
        with jax.enable_x64(True):
            pilot, root = jax.random.split(jax.random.PRNGKey(seed))
            known = fitted(pilot, parameters, model.arrays)
            for number in range(max(1, draws // _BATCH)):
                key = jax.random.fold_in(root, number)
                pieces.append(np.asarray(compiled(key, parameters, known, model.arrays)))
                if not np.isfinite(pieces[-1]).all():
                    # NaN or infinite at one draw in ten thousand: there is mass where the density is not.
                    return Elbo(-math.inf, math.nan, len(pieces) * _BATCH)
                values = np.concatenate(pieces)
                se = float(values.std(ddof=1) / math.sqrt(len(values)))
                if len(pieces) > 1 and se <= _SE:
                    break
        return Elbo(float(values.mean()), se, len(values))

    return measure
