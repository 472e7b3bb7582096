"""Base draws: standard normal numbers, spread evenly, from which a Gaussian family makes its draws."""

from __future__ import annotations

import math
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from scipy.special import betainc, gammaincinv, ndtri
from scipy.stats import qmc

_BITS = 30  # of a Sobol point's coordinate: SciPy's own choice
_EVEN = 2_000  # dimensions in which Sobol points are asked for
_KEPT_NUMBERS = 1 << 18  # in a net that is kept: one megabyte

type Key = jax.Array | tuple[int, ...]
"""A JAX key, or the numbers that it became: a key of JAX's own takes half a millisecond to split."""


def check_key(key: object) -> None:
    """Nothing, if it is one random key of JAX's, of either kind.

    Raises:
        ValueError: It is something else, such as a seed or several keys.
    """
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0
    older = isinstance(key, jax.Array | np.ndarray) and key.dtype == np.uint32 and key.ndim == 1
    if not (typed or older):
        raise ValueError(f"Expected a random key of JAX's; got {key!r}: write key=jax.random.key(0).")


def branch(key: Key, number: int) -> Key:
    """An independent key, one for each number from 0."""
    return (*_numbers(key), number + 1)  # to NumPy a zero at the end is as good as nothing


def generator(key: Key) -> np.random.Generator:
    """NumPy's generator for a key; the same key gives the same numbers."""
    return np.random.default_rng(_numbers(key))


def _numbers(key: Key) -> tuple[int, ...]:
    return key if isinstance(key, tuple) else tuple(np.asarray(jax.random.key_data(key), np.uint32).ravel().tolist())


def power_of_two(least: float) -> int:
    """The smallest power of two that is not below a number: how many Sobol points to take."""
    return 1 << max(0, math.ceil(math.log2(max(least, 1.0))))


def base_draws(count: int, size: int, *, key: Key) -> np.ndarray:
    """Standard normal numbers (count, size): scrambled Sobol points through the normal quantile.

    Each row alone is a standard normal draw; together they fill the space more evenly than independent ones, so that
    means over them err less. Another key gives an independent set: the points of one scrambled net, their bits
    turned by a random shift of its own (to scramble anew would take longer than a small model's gradients).

    Args:
        count: A power of two, which is what Sobol points are even at.
        size: Numbers in each draw; beyond 2,000 the draws are independent: no affordable number of points is even
            there, and a net takes longer than the gradients.
        key: Random key.

    Reference: L'Ecuyer & Lemieux (2002), Recent advances in randomized quasi-Monte Carlo methods, on digital shifts.
    """
    rng = generator(key)
    if size > _EVEN:
        return rng.standard_normal((count, size))
    net = _kept_net(count, size) if count * size <= _KEPT_NUMBERS else _net(count, size)
    shift = rng.integers(0, 1 << _BITS, size, dtype=np.uint32)
    # From the middle of each cell: a point of exactly zero would be a draw at minus infinity.
    return np.asarray(ndtri(((net ^ shift) + 0.5) / (1 << _BITS)))


def _net(count: int, size: int) -> np.ndarray:
    """Scrambled Sobol points as whole numbers of their resolution, (count, size)."""
    points = qmc.Sobol(size, bits=_BITS, rng=np.random.default_rng(0)).random(count)
    return (points * (1 << _BITS)).astype(np.uint32)


_kept_net = lru_cache(maxsize=32)(_net)


def mirrored_draws(count: int, size: int, *, key: Key) -> np.ndarray:
    """Base draws (count, size), the second half of them the first half's mirror images.

    In means over them all odd terms cancel: of what a slope or a curvature has beyond a quadratic log density, the
    third derivatives make no noise. Each row alone is a standard normal draw.

    Args:
        count: A power of two, at least two.
        size: Numbers in each draw.
        key: Random key.

    Reference: Hammersley & Morton (1956), A new Monte Carlo technique: antithetic variates.
    """
    half = base_draws(count // 2, size, key=key)
    return np.concatenate([half, -half])


def matched_draws(count: int, size: int, *, key: Key) -> np.ndarray:
    """Base draws (count, size) whose own mean is zero and whose own covariance is the identity, but for O(1 / count).

    Means of quadratics over a Gaussian's draws are then exact, whatever its location and factor: a maximum over
    Gaussians cannot be fitted to the first two moments of the draws, which is what a maximum over few draws would be
    fitted to first. A set whitened by its own covariance has rows that are a little too short to be normal; each row's
    length is therefore mapped from its own law, that of a Mahalanobis distance, to the normal's, so that each row alone
    is a standard normal draw (exactly, if the draws to begin with are independent): means stay unbiased.

    Args:
        count: A power of two. Below four times `size` only each coordinate's own mean and variance are matched, and its
            tails are shorter than the normal's by O(1 / count).
        size: Numbers in each draw.
        key: Random key.

    Reference: Gnanadesikan & Kettenring (1972), Robust estimates, residuals, and outlier detection with multiresponse
        data: the Mahalanobis distances from a normal sample's own mean and covariance are Beta distributed.
    """
    draws = base_draws(count, size, key=key)
    draws -= draws.mean(0)
    if count < 4 * size:
        return draws / draws.std(0)
    lower = scipy.linalg.cholesky(draws.T @ draws / count, lower=True)
    white = scipy.linalg.solve_triangular(lower, draws.T, lower=True).T
    squares = np.einsum("ni,ni->n", white, white)
    level = betainc(size / 2, (count - size - 1) / 2, np.minimum(squares / (count - 1), 1.0))
    lengths = np.sqrt(2 * gammaincinv(size / 2, np.minimum(level, 1 - 1e-15)) / squares)
    return white * lengths[:, None]
