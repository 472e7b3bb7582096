"""The Wasserstein-1 distance between two sets of draws of one scalar, with its error.

`arviz_stats.wasserstein` is not used: it thins both sides to 500 draws, adds the marginals up into one number and
gives no error. `scipy.stats.wasserstein_distance` gives the same value as here (a test holds the two together), but
its error needs the signed difference of the two distribution functions, which it does not give.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import erfc

# Where the distribution functions differ by this many times the noise, noise adds less than 1e-18 of itself.
_FAR = 9.0


class Distance(NamedTuple):
    """A Wasserstein-1 distance in the scalar's own unit.

    Attributes:
        value: The integral of |F_p - F_q|.
        bias: By how much noise alone raises it, since noise adds to |F_p - F_q| wherever it is near zero.
        floor: Its expected value if both sets of draws came from one distribution.
        reference_influence: What each draw of p adds, in ascending order of the draws.
        guide_influence: What each draw of q adds, in ascending order of the draws.
        largest: The largest difference F_p - F_q, with its sign: Kolmogorov and Smirnov's distance.
        largest_at: Where it lies: the largest draw that is counted by both distribution functions.
    """

    value: float
    bias: float
    floor: float
    reference_influence: np.ndarray
    guide_influence: np.ndarray
    largest: float
    largest_at: float


def wasserstein(
    reference: np.ndarray, guide: np.ndarray, effective: float, effective_guide: float | None = None
) -> Distance:
    """The distance between reference draws and independent guide draws, both (draws,) in ascending order.

    The influence of a reference draw x is the integral of sign(F_p - F_q)(t) (1{x <= t} - F_p(t)) dt, that of a guide
    draw the same with the other sign and F_q: the derivative of the integral of |F_p - F_q| (van der Vaart 1998,
    chapter 20).

    Args:
        reference: Draws of p, all chains together.
        guide: Draws of q.
        effective: Effective draws of the reference, for the bias and the floor.
        effective_guide: Those of the guide; all if None.
    """
    both = np.concatenate([reference, guide])
    # The stable sort finds the two ascending runs and merges them, which is cheaper than to sort or to search.
    order = np.argsort(both, kind="stable")
    draws, of_reference = both[order], order < reference.size
    below = np.cumsum(of_reference[:-1])
    cdf_p, cdf_q = below / reference.size, (np.arange(1, draws.size) - below) / guide.size
    widths, difference = np.diff(draws), cdf_p - cdf_q
    signed_widths = np.sign(difference) * widths
    climbed = np.zeros(draws.size)
    np.cumsum(signed_widths, out=climbed[1:])
    variance = cdf_p * (1.0 - cdf_p) / effective + cdf_q * (1.0 - cdf_q) / (effective_guide or guide.size)
    noise = np.sqrt(variance) * widths
    furthest = int(np.argmax(np.abs(np.where(widths > 0.0, difference, 0.0))))  # between equal draws nothing ends
    # Integer indices, because numpy reads an array several times faster by them than by a mask.
    return Distance(
        value=float((difference * signed_widths).sum()),
        bias=_folded_excess(difference, variance, noise),
        floor=float(np.sqrt(2.0 / np.pi) * noise.sum()),
        reference_influence=-climbed[np.flatnonzero(of_reference)],
        guide_influence=climbed[np.flatnonzero(~of_reference)],
        largest=float(difference[furthest]),
        largest_at=float(draws[furthest]),
    )


def _folded_excess(difference: np.ndarray, variance: np.ndarray, noise: np.ndarray) -> float:
    """The integral of E|d + s N(0, 1)| - |d|, with d^2 estimated by difference^2 - s^2, or 0 below it.

    Args:
        difference: F_p - F_q on each interval.
        variance: Its variance s^2.
        noise: s times the interval's width.
    """
    square = np.square(difference)
    near = square <= variance
    # The two special functions cost as much as everything else: only where neither of the limits is exact.
    between = np.flatnonzero((square < _FAR**2 * variance) & ~near)
    half = 0.5 * (square[between] / variance[between] - 1.0)
    # With r the ratio of |d| to s: 2 (normal density at r) - 2 r (normal mass above r), where half = r^2 / 2.
    excess = np.sqrt(2.0 / np.pi) * np.exp(-half) - np.sqrt(2.0 * half) * erfc(np.sqrt(half))
    return float(np.sqrt(2.0 / np.pi) * (near * noise).sum() + (excess * noise[between]).sum())
