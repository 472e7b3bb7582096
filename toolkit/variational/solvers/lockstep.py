"""L-BFGS for several searches side by side: each round evaluates one point of every search, in one batch.

Unless data are tall, a log density at eight points costs less than at one point eight times, and a step's algebra for
eight searches about as much as for one. No search knows of the others: their points share a batch and nothing else.
Where a search has ended the others go on without it.

Reference: Nocedal & Wright (2006), Numerical optimization, section 7.2, in the compact form of Byrd, Nocedal & Schnabel
(1994), Representations of quasi-Newton matrices and their use in limited memory methods, theorem 2.2, which takes a
dozen array operations where the two loops take a hundred; a line search that brackets the weak Wolfe conditions by
parabolas within and by steps four times as long beyond; near a minimum, where rounding hides the decrease, the
approximate ones of Hager & Zhang (2005), A new conjugate gradient method, section 4.
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
        while len(searches.numbers) and rounds < max_rounds:
            searches.advance()
            rounds += 1
    return searches.minima(rounds)


class _Searches:
    """The searches that are under way; a row of each array is one of them, until it has ended.

    Args:
        losses: Losses and gradients at points.
        begin: Points, (searches, size).
        decrease: When an iteration ends a search,
        gradient: and which gradient does.

    Attributes:
        numbers: Which searches these are, (live,).
        ends: The lowest points so far of all searches, (searches, size); up to date for those that have ended.
        end_losses: There, (searches,).
    """

    _ROWS = (
        *("numbers", "x", "loss", "gradient", "steps", "bends", "known", "direction", "slope"),
        *("inverse", "squared", "length", "short", "long", "trials", "low", "low_loss", "low_gradient"),
    )

    def __init__(self, losses: Losses, begin: np.ndarray, decrease: float, gradient: float) -> None:
        count, size = begin.shape
        memory = min(_MEMORY, max(size, 5))
        self.evaluate, self.decrease, self.least_gradient = losses, decrease, gradient
        self.numbers = np.arange(count)
        self.x = np.array(begin, dtype=float)
        self.loss, self.gradient = _walled(losses, self.x)
        self.ends, self.end_losses = self.x.copy(), self.loss.copy()
        # Pairs of steps and bends (changes of the gradient), each over the root of their product; the latest one last.
        self.steps, self.bends = np.zeros((count, memory, size)), np.zeros((count, memory, size))
        # Of the pairs: the inverse of the upper triangle of step . bend, whose diagonal is one, and bend . bend.
        self.inverse, self.squared = np.tile(np.eye(memory), (count, 1, 1)), np.zeros((count, memory, memory))
        self.known, self.trials = np.zeros(count, bool), np.zeros(count, int)
        self.direction, self.slope = np.zeros((count, size)), np.zeros(count)
        self.length, self.short, self.long = np.zeros(count), np.zeros(count), np.full(count, np.inf)
        # The farthest point of each line search that was low enough.
        self.low, self.low_loss, self.low_gradient = self.x, self.loss, self.gradient
        self._keep(np.isfinite(self.loss) & (np.abs(self.gradient).max(1) > gradient))
        self._set_out(np.ones(len(self.numbers), bool))

    def advance(self) -> None:
        """One trial point of each search, in one batch."""
        x = self.x + self.length[:, None] * self.direction
        loss, gradient = _walled(self.evaluate, x)
        there = np.vecdot(gradient, self.direction)
        lower = loss <= self.loss + _DECREASE * self.length * self.slope
        # Where rounding hides a decrease, slopes tell it.
        level = loss <= self.loss + _ROUNDING * np.abs(self.loss)
        lower |= level & (there <= (2 * _DECREASE - 1) * self.slope)
        enough = lower & ((there >= _CURVATURE * self.slope) | (np.abs(x).max(1) > _FAR))
        if enough.all():
            self.low, self.low_loss, self.low_gradient = x, loss, gradient
            self._accept(enough)
            return
        self.low = np.where(lower[:, None], x, self.low)
        self.low_loss = np.where(lower, loss, self.low_loss)
        self.low_gradient = np.where(lower[:, None], gradient, self.low_gradient)
        self._narrow(~enough, lower, loss)
        tired = ~enough & (self.trials >= _TRIALS)
        lost = tired & (self.short == 0)
        self._accept(enough | (tired & ~lost), lost)

    def _narrow(self, going: np.ndarray, lower: np.ndarray, loss: np.ndarray) -> None:
        """The next trial of line searches that go on: between one that was too short and one that was too long."""
        length = self.length
        self.trials = self.trials + going
        self.short = np.where(going & lower, length, self.short)
        self.long = np.where(going & ~lower, length, self.long)
        short, long = self.short, self.long
        # The parabola through the first loss, its slope and the loss at the end.
        parabola = -self.slope * length**2 / (2 * (loss - self.loss - self.slope * length))
        inner = np.where(short == 0, np.clip(parabola, 0.1 * long, 0.5 * long), (short + long) / 2)
        inner = np.where(np.isfinite(loss) | lower, inner, short + _INWARD * (long - short))
        self.length = np.where(going, np.where(np.isfinite(long), inner, _FURTHER * length), length)

    def _accept(self, found: np.ndarray, lost: np.ndarray | None = None) -> None:
        """The end of line searches: at points that were low enough, or nowhere, and the next directions."""
        rows = slice(None) if found.all() else np.flatnonzero(found)
        x, loss, gradient = self.low[rows], self.low_loss[rows], self.low_gradient[rows]
        step, bend = x - self.x[rows], gradient - self.gradient[rows]
        before = self.loss[rows]
        small = before - loss <= self.decrease * np.maximum(np.maximum(np.abs(before), np.abs(loss)), 1.0)
        product = np.vecdot(step, bend)
        known = np.isfinite(product) & (product > np.finfo(float).eps * np.vecdot(bend, bend))
        self._remember(rows, step, bend, product, known)
        if isinstance(rows, slice):
            self.x, self.loss, self.gradient = x, loss, gradient
        else:
            self.x[rows], self.loss[rows], self.gradient[rows] = x, loss, gradient
        ended = np.zeros(len(self.x), bool)
        ended[rows] = small | (np.abs(gradient).max(1) <= self.least_gradient) | (np.abs(x).max(1) > _FAR)
        if lost is not None and lost.any():
            ended |= lost & ~self.known
            self._forget(lost)  # what was remembered may have misled: once more, straight down
            found = found | lost
        if ended.any():
            self._write(ended)
            self._keep(~ended)
            found = found[~ended]
        self._set_out(found)

    def minima(self, rounds: int) -> Minima:
        """Where all searches are after so many rounds."""
        self._write(np.ones(len(self.numbers), bool))
        ended = np.ones(len(self.ends), bool)
        ended[self.numbers] = False
        return Minima(self.ends, self.end_losses, ended, rounds)

    def _write(self, rows: np.ndarray) -> None:
        numbers = self.numbers[rows]
        self.ends[numbers], self.end_losses[numbers] = self.x[rows], self.loss[rows]

    def _remember(
        self, rows: slice | np.ndarray, step: np.ndarray, bend: np.ndarray, product: np.ndarray, known: np.ndarray
    ) -> None:
        kept = rows if isinstance(rows, slice) and known.all() else np.arange(len(self.x))[rows][known]
        root = np.sqrt(product[known])[:, None]
        for table, pair in ((self.steps, step), (self.bends, bend)):
            table[kept, :-1] = table[kept, 1:]
            table[kept, -1] = pair[known] / root
        latest = self.bends[kept, -1, :, None]
        self.squared[kept, :-1, :-1] = self.squared[kept, 1:, 1:]
        self.squared[kept, :, -1] = self.squared[kept, -1] = (self.bends[kept] @ latest)[..., 0]
        # A triangle's inverse without its first row and column is the inverse of the triangle without them.
        beside = (self.steps[kept, :-1] @ latest)[..., 0]
        self.inverse[kept, :-1, :-1] = self.inverse[kept, 1:, 1:]
        self.inverse[kept, :-1, -1] = -(self.inverse[kept, :-1, :-1] @ beside[..., None])[..., 0]
        self.known[kept] = True

    def _forget(self, rows: np.ndarray) -> None:
        self.known[rows] = False
        self.steps[rows] = self.bends[rows] = self.squared[rows] = 0.0
        self.inverse[rows] = np.eye(self.inverse.shape[1])

    def _keep(self, going: np.ndarray) -> None:
        for name in self._ROWS:
            setattr(self, name, getattr(self, name)[going])

    def _set_out(self, found: np.ndarray) -> None:
        """Directions, and the first length to try."""
        if not found.any():
            return
        rows = slice(None) if found.all() else np.flatnonzero(found)
        gradient = self.gradient[rows]
        direction = self._quasi_newton(rows, gradient)
        slope = np.vecdot(direction, gradient)
        uphill = ~(slope < 0)  # rounding, after pairs of steps of many decades
        if uphill.any():
            direction[uphill] = -gradient[uphill]
            slope[uphill] = -np.vecdot(gradient[uphill], gradient[uphill])
            self._forget(np.arange(len(self.x))[rows][uphill])
        self.direction[rows], self.slope[rows] = direction, slope
        first = np.minimum(1.0, 1 / np.sqrt(np.vecdot(direction, direction)))
        self.length[rows] = np.where(self.known[rows], 1.0, first)
        self.trials[rows], self.short[rows], self.long[rows] = 0, 0.0, np.inf

    def _quasi_newton(self, rows: slice | np.ndarray, gradient: np.ndarray) -> np.ndarray:
        """Minus the gradient times the inverse Hessian that the pairs make of a multiple of the identity.

        Pairs that are not there are zero, and add nothing.
        """
        steps, bends, inverse, squared = self.steps[rows], self.bends[rows], self.inverse[rows], self.squared[rows]
        last = squared[:, -1, -1, None, None]
        scale = np.divide(1.0, last, out=np.ones_like(last), where=last > 0)
        column = gradient[..., None]
        first = inverse @ (steps @ column)
        second = inverse.mT @ (first + scale * (squared @ first - bends @ column))
        return (scale * (bends.mT @ first - column) - steps.mT @ second)[..., 0]


def _walled(losses: Losses, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Losses and gradients; infinite, with no gradient, where one of them is not finite, and very far out."""
    found, gradients = losses(np.clip(x, -_NOWHERE, _NOWHERE))
    sound = np.isfinite(found) & np.isfinite(gradients).all(1) & (np.abs(x) <= _NOWHERE).all(1)
    return np.where(sound, found, np.inf), np.where(sound[:, None], gradients, 0.0)
