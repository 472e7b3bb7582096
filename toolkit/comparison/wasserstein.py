"""The Wasserstein-1 distance between two sets of draws of one scalar, with its error.

`arviz_stats.wasserstein` is not used: it thins both sides to 500 draws, adds the marginals up into one number and
gives no error. `scipy.stats.wasserstein_distance` gives the same value as here (a test holds the two together), but
its error needs the signed difference of the two distribution functions, which it does not give.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import ndtr


class Distance(NamedTuple):
    """A Wasserstein-1 distance in the scalar's own unit.

    Attributes:
        value: The integral of |F_p - F_q|.
        bias: By how much noise alone raises it, since noise adds to |F_p - F_q| wherever it is near zero.
        floor: Its expected value if both sets of draws came from one distribution.
        reference_influence: What each draw of p adds, (chain, draw).
        guide_influence: What each draw of q adds, in ascending order, (draws,).
    """

    value: float
    bias: float
    floor: float
    reference_influence: np.ndarray
    guide_influence: np.ndarray


def wasserstein(reference: np.ndarray, guide: np.ndarray, effective: float) -> Distance:
    """The distance between reference draws (chain, draw) and independent guide draws (draws,).

    The influence of a reference draw x is the integral of sign(F_p - F_q)(t) (1{x <= t} - F_p(t)) dt, that of a guide
    draw the same with the other sign and F_q: the derivative of the integral of |F_p - F_q| (van der Vaart 1998,
    chapter 20).

    Args:
        reference: Draws of p, (chain, draw).
        guide: Draws of q in ascending order, (draws,); independent, so that their order tells nothing.
        effective: Effective draws of the reference, for the bias and the floor.
    """
    order = np.argsort(reference, axis=None, kind="stable")
    ordered = reference.ravel()[order]
    # Where each reference draw falls among all draws in ascending order: cheaper than sorting them together.
    places = np.arange(ordered.size) + np.searchsorted(guide, ordered)
    of_reference = np.zeros(ordered.size + guide.size, dtype=bool)
    of_reference[places] = True
    draws = np.empty(of_reference.size)
    draws[of_reference], draws[~of_reference] = ordered, guide
    below = np.cumsum(of_reference)[:-1]
    cdf_p, cdf_q = below / reference.size, (np.arange(1, draws.size) - below) / guide.size
    widths = np.diff(draws)
    difference = cdf_p - cdf_q
    climbed = np.concatenate([[0.0], np.cumsum(np.sign(difference) * widths)])
    of_draws = np.empty(reference.size)
    of_draws[order] = -climbed[places]
    noise = np.sqrt(cdf_p * (1.0 - cdf_p) / effective + cdf_q * (1.0 - cdf_q) / guide.size)
    return Distance(
        value=float((np.abs(difference) * widths).sum()),
        bias=float((_folded_excess(difference, noise) * widths).sum()),
        floor=float(np.sqrt(2.0 / np.pi) * (noise * widths).sum()),
        reference_influence=of_draws.reshape(reference.shape),
        guide_influence=climbed[~of_reference],
    )


def _folded_excess(difference: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """E|d + noise N(0, 1)| - |d| at each point, with d^2 estimated by difference^2 - noise^2, or 0 below it."""
    safe = np.where(noise > 0, noise, 1.0)
    ratio = np.sqrt(np.maximum((difference / safe) ** 2 - 1.0, 0.0))
    return noise * (np.sqrt(2.0 / np.pi) * np.exp(-0.5 * ratio**2) - 2.0 * ratio * ndtr(-ratio))
