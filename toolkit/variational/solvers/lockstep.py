"""L-BFGS for several searches side by side: each round evaluates one point of every search, in one batch.

Unless data are tall, a log density at eight points costs less than at one point eight times, and a step's algebra for
eight searches about as much as for one. No search knows of the others: their points share a batch and nothing else.
Where a search has ended the others go on without it.

Reference: Nocedal & Wright (2006), Numerical optimization, algorithm 7.4, with a line search that brackets the weak
Wolfe conditions by halving and doubling; near a minimum, where rounding hides the decrease, the approximate ones of
Hager & Zhang (2005), A new conjugate gradient method, section 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Losses = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

_MEMORY = 20  # pairs of steps that are remembered
_ROUNDS = 500
_DECREASE, _CURVATURE = 1e-4, 0.9  # of the Wolfe conditions
_ROUNDING = 1e-14  # of a loss
_TRIALS = 40  # of a line search
_INWARD = 0.1  # of a step that met a wall
_FURTHER = 4.0
_FAR, _NOWHERE = 1e10, 1e12  # coordinates beyond which a search has run off, and beyond which no point is tried


@dataclass(frozen=True)
class Minima:
    """Where searches ended.

    Attributes:
        x: Points, (searches, size).
        losses: There, (searches,); infinite where a search began at an invalid point.
        ended: Which searches came to an end by themselves, (searches,).
        rounds: Batches that were evaluated.
    """

    x: np.ndarray
    losses: np.ndarray
    ended: np.ndarray
    rounds: int


def minimise_each(
    losses: Losses, begin: np.ndarray, *, decrease: float = 1e-10, gradient: float = 1e-6, max_rounds: int = _ROUNDS
) -> Minima:
    """Local minima near each of several points.

    Args:
        losses: Losses (n,) and their gradients (n, size) at points (n, size); where one of them is not finite there
            is a wall, which a line search turns away from.
        begin: Points, (searches, size).
        decrease: A search ends when an iteration lowers its loss by less than this part of it (of one, where the loss
            is less than that),
        gradient: or when no component of the gradient is above this.
        max_rounds: The most batches; searches that are still under way are left where they are.
    """
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # a run-off ends where numbers do
        searches = _Searches(losses, begin, decrease, gradient)
        rounds = 1
        while searches.live.any() and rounds < max_rounds:
            searches.advance()
            rounds += 1
    return Minima(searches.x, searches.loss, ~searches.live, rounds)


class _Searches:
    """The state of all searches; a row of each array is one search."""

    def __init__(self, losses: Losses, begin: np.ndarray, decrease: float, gradient: float) -> None:
        count, size = begin.shape
        memory = min(_MEMORY, max(size, 5))
        self.evaluate, self.decrease, self.least_gradient = losses, decrease, gradient
        self.x = np.array(begin, dtype=float)
        self.loss, self.gradient = _walled(losses, self.x)
        self.steps, self.bends = np.zeros((count, memory, size)), np.zeros((count, memory, size))
        self.inverse = np.zeros((count, memory))  # 1 / (step . bend); zero where no pair is remembered
        self.pairs, self.trials = np.zeros(count, int), np.zeros(count, int)
        self.direction, self.slope = np.zeros((count, size)), np.zeros(count)
        self.length, self.short, self.long = np.zeros(count), np.zeros(count), np.full(count, np.inf)
        # The farthest point of each line search that was low enough.
        self.low, self.low_loss, self.low_gradient = self.x.copy(), self.loss.copy(), self.gradient.copy()
        self.live = np.isfinite(self.loss) & (np.abs(self.gradient).max(1) > gradient)
        self._set_out(np.flatnonzero(self.live))

    def advance(self) -> None:
        """One trial point of each live search, in one batch."""
        rows = np.flatnonzero(self.live)
        x = self.x[rows] + self.length[rows, None] * self.direction[rows]
        loss, gradient = _walled(self.evaluate, x)
        before, slope, length = self.loss[rows], self.slope[rows], self.length[rows]
        there = np.einsum("ni,ni->n", gradient, self.direction[rows])
        lower = loss <= before + _DECREASE * length * slope
        # Where rounding hides a decrease, slopes tell it.
        level = loss <= before + _ROUNDING * np.abs(before)
        lower |= level & (there <= (2 * _DECREASE - 1) * slope)
        kept = rows[lower]
        self.low[kept], self.low_loss[kept], self.low_gradient[kept] = x[lower], loss[lower], gradient[lower]
        enough = lower & ((there >= _CURVATURE * slope) | (np.abs(x).max(1) > _FAR))
        self._narrow(rows[~enough], length[~enough], lower[~enough], loss[~enough])
        tired = self.trials[rows] >= _TRIALS
        self._give_up(rows[tired & (self.short[rows] == 0)])
        self._accept(rows[enough | (tired & (self.short[rows] > 0))])

    def _narrow(self, rows: np.ndarray, length: np.ndarray, lower: np.ndarray, loss: np.ndarray) -> None:
        """The next trial of line searches that go on: between one that was too short and one that was too long."""
        self.trials[rows] += 1
        self.short[rows] = np.where(lower, length, self.short[rows])
        self.long[rows] = np.where(lower, self.long[rows], length)
        short, long = self.short[rows], self.long[rows]
        # The parabola through the first loss, its slope and the loss at the end.
        parabola = -self.slope[rows] * length**2 / (2 * (loss - self.loss[rows] - self.slope[rows] * length))
        inner = np.where(short == 0, np.clip(parabola, 0.1 * long, 0.5 * long), (short + long) / 2)
        inner = np.where(np.isfinite(loss) | lower, inner, short + _INWARD * (long - short))
        self.length[rows] = np.where(np.isfinite(long), inner, _FURTHER * length)

    def _give_up(self, rows: np.ndarray) -> None:
        """The end of line searches that found nothing lower: once more, straight down, or of the search."""
        again = self.pairs[rows] > 0  # what was remembered may have misled
        self.live[rows[~again]] = False
        self._forget(rows[again])
        self._set_out(rows[again])

    def _accept(self, rows: np.ndarray) -> None:
        """The end of line searches at the points that were low enough, and the next direction."""
        if not len(rows):
            return
        x, loss, gradient = self.low[rows], self.low_loss[rows], self.low_gradient[rows]
        step, bend = x - self.x[rows], gradient - self.gradient[rows]
        fallen = self.loss[rows] - loss
        small = fallen <= self.decrease * np.maximum(np.maximum(np.abs(self.loss[rows]), np.abs(loss)), 1.0)
        self.x[rows], self.loss[rows], self.gradient[rows] = x, loss, gradient
        product = np.einsum("ni,ni->n", step, bend)
        known = product > np.finfo(float).eps * np.einsum("ni,ni->n", bend, bend)
        kept = rows[known]
        for table, pair in ((self.steps, step), (self.bends, bend)):
            table[kept, :-1] = table[kept, 1:]
            table[kept, -1] = pair[known]
        self.inverse[kept, :-1] = self.inverse[kept, 1:]
        self.inverse[kept, -1] = 1 / product[known]
        self.pairs[kept] = np.minimum(self.pairs[kept] + 1, self.inverse.shape[1])
        ended = small | (np.abs(gradient).max(1) <= self.least_gradient) | (np.abs(x).max(1) > _FAR)
        self.live[rows[ended]] = False
        self._set_out(rows[~ended])

    def _forget(self, rows: np.ndarray) -> None:
        self.inverse[rows], self.pairs[rows] = 0.0, 0

    def _set_out(self, rows: np.ndarray) -> None:
        """Directions by the two loops of L-BFGS, and the first length to try."""
        if not len(rows):
            return
        direction = -self.gradient[rows]
        steps, bends, inverse = self.steps[rows], self.bends[rows], self.inverse[rows]
        oldest = inverse.shape[1] - int(self.pairs[rows].max())
        weights = np.zeros_like(inverse)
        for pair in range(inverse.shape[1] - 1, oldest - 1, -1):
            weights[:, pair] = inverse[:, pair] * np.einsum("ni,ni->n", steps[:, pair], direction)
            direction -= weights[:, pair, None] * bends[:, pair]
        known = self.pairs[rows] > 0
        bend = np.einsum("ni,ni->n", bends[:, -1], bends[:, -1])
        direction[known] /= (inverse[known, -1] * bend[known])[:, None]
        for pair in range(oldest, inverse.shape[1]):
            other = inverse[:, pair] * np.einsum("ni,ni->n", bends[:, pair], direction)
            direction += (weights[:, pair] - other)[:, None] * steps[:, pair]
        slope = np.einsum("ni,ni->n", direction, self.gradient[rows])
        uphill = ~(slope < 0)  # rounding, after pairs of steps of many decades
        direction[uphill] = -self.gradient[rows[uphill]]
        slope[uphill] = -np.einsum("ni,ni->n", direction[uphill], direction[uphill])
        self._forget(rows[uphill])
        self.direction[rows], self.slope[rows] = direction, slope
        first = self.pairs[rows] == 0
        self.length[rows] = np.where(first, np.minimum(1.0, 1 / np.linalg.norm(direction, axis=1)), 1.0)
        self.trials[rows], self.short[rows], self.long[rows] = 0, 0.0, np.inf


def _walled(losses: Losses, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Losses and gradients; infinite, with no gradient, where one of them is not finite, and very far out."""
    found, gradients = losses(np.clip(x, -_NOWHERE, _NOWHERE))
    sound = np.isfinite(found) & np.isfinite(gradients).all(1) & (np.abs(x) <= _NOWHERE).all(1)
    return np.where(sound, found, np.inf), np.where(sound[:, None], gradients, 0.0)
