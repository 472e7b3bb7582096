"""Natural-gradient steps for a full-rank Gaussian, by the Bonnet and Price identities.

For q = N(m, P^-1) the ELBO's natural gradient needs two averages over q: of the gradient of log p, which moves the
location, and of its Hessian, whose negative is the precision that q should have. At a fixed point q is the family's
optimum. A few steps on common draws bring a Laplace approximation most of the way there, in any units.

Reference: Khan & Rue (2023), The Bayesian learning rule, section 3.2; Opper & Archambeau (2009), equations 5 and 6.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from toolkit.compilation import QUICK

_HESSIANS = 4_096  # Hessian columns that one step may cost, but for the least number of draws
_COLUMNS = 64
_FEW_GAIN = 0.02  # nats a dimension, below which a step on few draws fits those draws
_FRESH = 6  # averages over fresh draws that follow where draws are few


@dataclass(frozen=True)
class Gaussian:
    """N(loc, precision^-1) in unconstrained space, and its ELBO in nats on the draws that moved it or on fresh ones."""

    loc: np.ndarray
    precision: np.ndarray
    elbo: float


class Averages:
    """Averages of a log density, its gradient and its Hessian over a Gaussian, on antithetic draws.

    Args:
        log_density: Of one unconstrained vector and the model's arrays, in nats.
        arrays: The model's arrays.
        size: Of the vector.
        key: For the draws.

    Attributes:
        size: Of the vector.
        draws: How many.
        evaluations: Gradient evaluations so far; a column of a Hessian counts as one.
    """

    def __init__(self, log_density: Callable[[Any, Any], Any], arrays: Any, size: int, *, key: jax.Array) -> None:
        self.size, self.evaluations = size, 0
        self.draws = 2 * int(np.clip(_HESSIANS // (2 * size), 2, 64))
        self._key, self._arrays = key, arrays

        def one(point: Any, arrays: Any) -> tuple[Any, Any, Any]:
            # What the columns of the Hessian have in common is computed once, and compiled once.
            both = jax.value_and_grad(lambda z: log_density(z, arrays))
            (value, gradient), push = jax.linearize(both, jax.lax.optimization_barrier(point))
            columns = jax.lax.map(lambda tangent: push(tangent)[1], jnp.eye(size), batch_size=_COLUMNS)
            return value, gradient, columns

        def averages(loc: Any, factor: Any, noise: Any, draws: Any, arrays: Any) -> tuple[Any, Any, Any]:
            def add(number: Any, total: Any) -> Any:
                return jax.tree.map(jnp.add, total, one(loc + factor @ noise[number], arrays))

            zeros = (jnp.zeros(()), jnp.zeros(size), jnp.zeros((size, size)))
            total = jax.lax.fori_loop(0, draws, add, zeros)
            return jax.tree.map(lambda value: value / draws, total)

        shapes = (np.zeros(size), np.zeros((size, size)), self._noise(0), 1, arrays)
        self._averages = jax.jit(averages).lower(*shapes).compile(QUICK)

    def over(self, loc: np.ndarray, factor: np.ndarray, fresh: int = 0) -> tuple[float, np.ndarray, np.ndarray]:
        """Of log density, gradient and Hessian over N(loc, factor factor'), shapes (), (size,), (size, size).

        Args:
            loc: Shape (size,).
            factor: Shape (size, size).
            fresh: Which set of draws; 0 is the common one.
        """
        return self._of(loc, factor, self._noise(fresh), self.draws)

    def at(self, loc: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """The same three at one point, by the program that is compiled already."""
        return self._of(loc, np.zeros((self.size, self.size)), self._noise(0), 1)

    def _noise(self, fresh: int) -> np.ndarray:
        half = np.asarray(jax.random.normal(jax.random.fold_in(self._key, fresh), (self.draws // 2, self.size)))
        return np.concatenate([half, -half])

    def _of(
        self, loc: np.ndarray, factor: np.ndarray, noise: np.ndarray, draws: int
    ) -> tuple[float, np.ndarray, np.ndarray]:
        value, gradient, hessian = self._averages(loc, factor, noise, draws, self._arrays)
        self.evaluations += draws * self.size
        hessian = np.asarray(hessian)
        return float(value), np.asarray(gradient), (hessian + hessian.T) / 2


def natural_steps(averages: Averages, loc: np.ndarray, precision: np.ndarray, *, steps: int = 8) -> Gaussian:
    """The Gaussian after at most so many steps.

    On common draws each step is taken only if it raises the ELBO there. With fewer draws than dimensions that optimum
    fits the draws rather than the density: then the steps end early, and a running average over fresh draws follows.

    Args:
        averages: Of the log density to approximate.
        loc: Where to begin, shape (size,).
        precision: With which precision, shape (size, size), positive definite.
        steps: The most steps to take; they stop when the ELBO no longer rises by a hundredth of a nat.
    """
    few = averages.draws < averages.size
    elbo, gradient, hessian = _measured(averages, loc, precision)
    rate = 1.0
    if not np.isfinite(elbo):
        return Gaussian(loc, precision, -np.inf)
    for _ in range(steps):
        proposed = _blend(precision, -hessian, rate)
        if proposed is not None:
            moved = loc + rate * scipy.linalg.solve(proposed, gradient, assume_a="pos")
            new = _measured(averages, moved, proposed)
        if proposed is None or not new[0] > elbo:
            rate /= 3
            if rate < 0.01 or few:
                break
            continue
        gain, rate = new[0] - elbo, min(1.0, 2 * rate)
        loc, precision, (elbo, gradient, hessian) = moved, proposed, new
        if gain < (_FEW_GAIN * averages.size if few else 0.01):
            break
    return _averaged(averages, loc, precision) if few else Gaussian(loc, precision, elbo)


def _averaged(averages: Averages, loc: np.ndarray, precision: np.ndarray) -> Gaussian:
    """Steps on fresh draws at the rates 1/2, 1/3, ..., by which the precision is a mean over all of them.

    The Gaussian that was given comes back if the ELBO on yet other draws is no longer finite, or far lower.
    """
    given, before = (loc, precision), -np.inf
    for number in range(1, _FRESH + 1):
        elbo, gradient, hessian = _measured(averages, loc, precision, fresh=number)
        before = elbo if number == 1 else before
        proposed = _blend(precision, -hessian, 1 / (number + 1))
        if np.isfinite(elbo) and proposed is not None:
            precision = proposed
            loc = loc + scipy.linalg.solve(precision, gradient, assume_a="pos") / (number + 1)
    after, _, _ = _measured(averages, loc, precision, fresh=_FRESH + 1)
    if np.isfinite(after) and not after < before - _FEW_GAIN * averages.size:
        return Gaussian(loc, precision, after)
    return Gaussian(*given, before if np.isfinite(before) else -np.inf)


def _measured(
    averages: Averages, loc: np.ndarray, precision: np.ndarray, fresh: int = 0
) -> tuple[float, np.ndarray, np.ndarray]:
    """The Gaussian's ELBO in nats (NaN if anything is not finite), and the mean gradient and Hessian."""
    size = len(loc)
    lower = scipy.linalg.cholesky(precision, lower=True)
    factor = scipy.linalg.solve_triangular(lower, np.eye(size), lower=True).T  # factor @ factor.T = precision^-1
    value, gradient, hessian = averages.over(loc, factor, fresh)
    entropy = 0.5 * size * (1 + np.log(2 * np.pi)) - np.log(np.diag(lower)).sum()
    finite = np.isfinite(gradient).all() and np.isfinite(hessian).all()
    return (float(value + entropy) if finite else np.nan), gradient, hessian


def _blend(old: np.ndarray, new: np.ndarray, rate: float) -> np.ndarray | None:
    """The weighted mean of two precisions; None if it is not safely positive definite."""
    mixed = (1 - rate) * old + rate * new
    return mixed if is_safely_positive(mixed) else None


def is_safely_positive(matrix: np.ndarray) -> bool:
    """Whether a symmetric matrix, scaled to a unit diagonal, has no eigenvalue below 1e-8."""
    diagonal = np.diag(matrix)
    if not (np.isfinite(matrix).all() and (diagonal > 0).all()):
        return False
    scaled = matrix / np.sqrt(np.outer(diagonal, diagonal))
    try:
        # Cholesky's factorisation exists if and only if all eigenvalues are positive; it takes a tenth of their time.
        scipy.linalg.cholesky(scaled - 1e-8 * np.eye(len(matrix)), lower=True, check_finite=False)
    except scipy.linalg.LinAlgError:
        return False
    return True
