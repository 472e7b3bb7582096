"""Normalising constant, mean and variance of a Gaussian times a likelihood of one scalar, for many at once.

The trapezoidal rule converges exponentially for smooth functions that fall off on both sides (Trefethen & Weideman
2014, The exponentially convergent trapezoidal rule, SIAM Review 56(3), section 5), whatever their shape. Gauss-Hermite
nodes, which stand where a Gaussian of the cavity's or of the mode's width would want them, are too sparse for a
logistic likelihood under a wide cavity, which makes half a Gaussian with an edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from toolkit.variational.linear_predictor import ROWS

_DROP = 36.0  # nats below the highest density, beyond which all is left out: 2e-16 of it
_LOOKS = 80  # at a range, until it is neither too narrow nor too wide
_FILLED = 0.6  # of a range, at least, holds what is not left out: nodes then lie less than one sd apart
_AGREE = 1e-9  # between a rule and the one with half the nodes; the error left is about its square
_MOST_NODES = 2**11

LogLikelihood = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Tilted:
    """Gaussians times likelihoods, `(observation,)` each.

    Attributes:
        log_constant: Log of the integral of Normal(s; mean, variance) times the likelihood, in nats.
        mean: Of the product.
        variance: Of the product.
        valid: Whether these are numbers.
        miss: By how much the last doubling of the nodes moved them, in sds and nats: a kink makes it large.
        low: Below, the product is left out.
        high: Above, the product is left out.
        nodes: Evaluations of every likelihood.
    """

    log_constant: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    valid: np.ndarray
    miss: float
    low: np.ndarray
    high: np.ndarray
    nodes: int


def tilted_moments(
    log_likelihood: LogLikelihood, mean: np.ndarray, variance: np.ndarray, low: np.ndarray, high: np.ndarray
) -> Tilted:
    """The moments of Normal(s; mean, variance) times exp(log likelihood), one for each observation.

    Args:
        log_likelihood: From `(row, observation)` to nats in that shape; NaN where it is undefined, which must not be
            where the product counts.
        mean: Of the Gaussians.
        variance: Of the Gaussians, positive.
        low: Where to begin to look for the product; any finite value will do, and a near one saves time.
        high: The same from above, larger than `low`.
    """

    def log_product(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with np.errstate(over="ignore"):
            gaussian = -0.5 * (places - mean) ** 2 / variance - 0.5 * np.log(2 * math.pi * variance)
        likelihood = log_likelihood(places)
        undefined = np.isnan(likelihood)
        return np.where(undefined, -np.inf, gaussian + likelihood), undefined

    low, high, places, density, cut, looks = _ranges(log_product, low, high)
    nodes, top = ROWS * looks, density.max(0)
    rule = _Rule(places[density.argmax(0), np.arange(len(mean))], top)
    rule.add(places, density, ends=True)
    count = ROWS - 1
    found, miss = rule.moments((high - low) / count), np.full(len(mean), np.inf)
    while count < _MOST_NODES and not (miss <= _AGREE).all():
        step = (high - low) / count
        # The range's ends are below what counts, so that half weights there would change nothing.
        for first in range(0, count, ROWS - 1):
            between = np.arange(first, min(first + ROWS - 1, count)) + 0.5
            middle = low + between[:, None] * step
            rule.add(middle, log_product(middle)[0])
        nodes, count = nodes + count, 2 * count
        before, found = found, rule.moments((high - low) / count)
        with np.errstate(invalid="ignore", divide="ignore"):
            changes = np.abs(
                [
                    found[0] - before[0],
                    (found[1] - before[1]) / np.sqrt(found[2]),
                    np.log(found[2] / before[2]),
                ]
            )
        known = np.isfinite(changes).all(0)
        miss = np.where(known, changes.max(0), 0.0)  # what is no number is told apart below
    log_constant, centre, spread = found
    valid = ~cut & np.isfinite(log_constant) & np.isfinite(centre) & np.isfinite(spread) & (spread > 0)
    return Tilted(log_constant, centre, spread, valid, float(miss.max(initial=0.0)), low, high, nodes)


def _ranges(
    log_product: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """Ranges that hold all that counts and little else; their nodes, the log density there, what is cut, the looks.

    Cut is a product that still counts beside a place where the likelihood is undefined.
    """
    columns, last = np.arange(len(low)), ROWS - 1
    looks = 0
    while True:
        looks += 1
        places = low + np.linspace(0.0, 1.0, ROWS)[:, None] * (high - low)
        density, undefined = log_product(places)
        counts = density > density.max(0) - _DROP
        first, final = counts.argmax(0), last - counts[::-1].argmax(0)
        below, above = (first == 0) & counts[0], (final == last) & counts[last]
        # A plain of minus infinities says nothing: look further on both sides.
        blind = ~np.isfinite(density.max(0))
        loose = ~(below | above | blind) & (final - first < _FILLED * last)
        if looks == _LOOKS or not (below | above | blind | loose).any():
            break
        width = high - low
        tight_low, tight_high = places[np.maximum(first - 1, 0), columns], places[np.minimum(final + 1, last), columns]
        low = np.where(below | blind, low - width, np.where(loose, tight_low, low))
        high = np.where(above | blind, high + width, np.where(loose, tight_high, high))
    beside = (counts[1:] & undefined[:-1]) | (counts[:-1] & undefined[1:])
    return low, high, places, density, beside.any(0), looks


class _Rule:
    """Sums over nodes, which can be added to: of the density, and of it times the place and its square."""

    def __init__(self, centre: np.ndarray, top: np.ndarray) -> None:
        self.centre, self.top = centre, np.where(np.isfinite(top), top, 0.0)
        self.sums = np.zeros((3, len(centre)))

    def add(self, places: np.ndarray, density: np.ndarray, *, ends: bool = False) -> None:
        """Nodes `(node, observation)` with their log density; the first and last are a range's ends if so said."""
        with np.errstate(over="ignore", invalid="ignore"):
            weights, away = np.exp(density - self.top), places - self.centre
        if ends:
            weights[[0, -1]] *= 0.5
        self.sums += np.stack([weights.sum(0), (weights * away).sum(0), (weights * away**2).sum(0)])

    def moments(self, step: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Log of the integral, mean and variance, by the nodes so far, which lie so far apart."""
        with np.errstate(invalid="ignore", divide="ignore"):
            whole, first, second = self.sums
            mean = first / whole
            return self.top + np.log(step * whole), self.centre + mean, second / whole - mean**2
