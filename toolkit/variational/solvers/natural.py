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

_HESSIANS = 4_096  # Hessian columns that one step may cost, but for the least number of draws
_COLUMNS = 64


@dataclass(frozen=True)
class Gaussian:
    """N(loc, precision^-1) in unconstrained space, its ELBO in nats on the draws that moved it, and the work done."""

    loc: np.ndarray
    precision: np.ndarray
    elbo: float
    gradient_evaluations: int


def natural_steps(
    log_density: Callable[[Any, Any], Any],
    arrays: Any,
    loc: np.ndarray,
    precision: np.ndarray,
    *,
    key: jax.Array,
    steps: int = 8,
) -> Gaussian:
    """The Gaussian after at most so many steps, each taken only if it raises the ELBO on common draws.

    Args:
        log_density: Of one unconstrained vector and the model's arrays, in nats.
        arrays: The model's arrays.
        loc: Where to begin, shape (size,).
        precision: With which precision, shape (size, size), positive definite.
        key: For the draws, which come in antithetic pairs.
        steps: The most steps to take; they stop when the ELBO no longer rises by a hundredth of a nat.
    """
    size = len(loc)
    pairs = int(np.clip(_HESSIANS // (2 * size), 2, 64))
    noise = np.asarray(jax.random.normal(key, (pairs, size)))
    noise = np.concatenate([noise, -noise])

    @jax.jit
    def averages(loc: Any, factor: Any, arrays: Any) -> tuple[Any, Any, Any]:
        def one(noise: Any) -> tuple[Any, Any, Any]:
            point = loc + factor @ noise
            gradient = jax.grad(lambda z: log_density(z, arrays))
            columns = jax.lax.map(
                lambda tangent: jax.jvp(gradient, (point,), (tangent,))[1], jnp.eye(size), batch_size=_COLUMNS
            )
            return log_density(point, arrays), gradient(point), columns

        def add(total: Any, noise: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, one(noise)), None

        zeros = (jnp.zeros(()), jnp.zeros(size), jnp.zeros((size, size)))
        total, _ = jax.lax.scan(add, zeros, noise)
        return jax.tree.map(lambda value: value / len(noise), total)

    def measured(loc: np.ndarray, precision: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        lower = scipy.linalg.cholesky(precision, lower=True)
        factor = scipy.linalg.solve_triangular(lower, np.eye(size), lower=True).T  # factor @ factor.T = precision^-1
        value, gradient, hessian = (np.asarray(part) for part in averages(loc, factor, arrays))
        entropy = 0.5 * size * (1 + np.log(2 * np.pi)) - np.log(np.diag(lower)).sum()
        elbo = float(value + entropy)
        return (elbo if np.isfinite(gradient).all() and np.isfinite(hessian).all() else np.nan), gradient, hessian

    elbo, gradient, hessian = measured(loc, precision)
    evaluations, rate = len(noise) * size, 1.0
    if not np.isfinite(elbo):
        return Gaussian(loc, precision, -np.inf, evaluations)
    for _ in range(steps):
        proposed = _blend(precision, -(hessian + hessian.T) / 2, rate)
        if proposed is not None:
            moved = loc + rate * scipy.linalg.solve(proposed, gradient, assume_a="pos")
            new = measured(moved, proposed)
            evaluations += len(noise) * size
        if proposed is None or not new[0] > elbo:
            rate /= 3
            if rate < 0.01:
                break
            continue
        gain, rate = new[0] - elbo, min(1.0, 2 * rate)
        loc, precision, (elbo, gradient, hessian) = moved, proposed, new
        if gain < 0.01:
            break
    return Gaussian(loc, precision, elbo, evaluations)


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
