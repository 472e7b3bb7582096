"""Estimators of a gradient of E_q[f] as arithmetic on three things known of each draw, and how much they vary.

Of each draw z of q, whose parameters are a vector, are known: the value f(z), the score, which is the gradient of log
q(z) with z held, and the path's gradient, of f along the draw as it moves with the parameters. Every estimator is a
mean of these, without bias. How much it varies is measured on independent estimates, in batches: whatever is computed
from means and variances has its standard error from leaving out one batch at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from toolkit.estimate import Estimate

SCORE, BASELINE, CONTROL_VARIATE = "score", "score_baseline", "score_control_variate"
REPARAMETERISED, STICK_THE_LANDING = "reparameterised", "stick_the_landing"
ESTIMATORS = (SCORE, BASELINE, CONTROL_VARIATE, REPARAMETERISED, STICK_THE_LANDING)
NEED_SCORE = frozenset({SCORE, BASELINE, CONTROL_VARIATE, STICK_THE_LANDING})
NEED_PATH = frozenset({REPARAMETERISED, STICK_THE_LANDING})
NEED_OTHERS = frozenset({BASELINE, CONTROL_VARIATE})  # at least two draws
BATCHES = 40


@dataclass(frozen=True)
class Pieces:
    """What is known of draws, which come in groups of one gradient each.

    Attributes:
        value: f, (group, draw).
        score: Gradient of log q at the draw, (group, draw, parameter); None where it cannot be had.
        path: Gradient of f along the draw, (group, draw, parameter); None where it cannot be had.
    """

    value: np.ndarray
    score: np.ndarray | None
    path: np.ndarray | None


def score_function(pieces: Pieces) -> np.ndarray:
    """The mean of f times the score, (group, parameter).

    Reference: Ranganath, Gerrish & Blei (2014), Black box variational inference, equation 3.
    """
    value, score = _scored(pieces)
    return np.asarray((value[..., None] * score).mean(1))


def score_with_baseline(pieces: Pieces) -> np.ndarray:
    """The same with f minus the mean of the other draws' f: the sample covariance of f and score, (group, parameter).

    The other draws are independent of this one, whose score has mean zero, so that no bias comes in.

    Reference: Kool, van Hoof & Welling (2019), Buy 4 REINFORCE samples, get a baseline for free!
    """
    value, score = _scored(pieces)
    if value.shape[1] < 2:
        raise ValueError("Expected at least 2 draws behind a gradient, so that others give the baseline; got 1.")
    others = (value.sum(1, keepdims=True) - value) / (value.shape[1] - 1)
    return np.asarray(((value - others)[..., None] * score).mean(1))


def score_with_control_variate(pieces: Pieces) -> np.ndarray:
    """The same with f minus the best constant, one for each parameter, as the other draws tell it, (group, parameter).

    The score, of mean zero, is the control variate; its best coefficient is Cov(f s, s) / Var(s) = E[f s^2] / E[s^2].
    Taken from the draws that it is used on, as in the reference, it would bring in a bias.

    Reference: Ranganath, Gerrish & Blei (2014), Black box variational inference, section 3.2.
    """
    value, score = _scored(pieces)
    squares = np.square(score)
    weighted = value[..., None] * squares
    above = weighted.sum(1, keepdims=True) - weighted
    below = squares.sum(1, keepdims=True) - squares
    best = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    return np.asarray(((value[..., None] - best) * score).mean(1))


def reparameterised(pieces: Pieces) -> np.ndarray:
    """The mean of the path's gradient, (group, parameter).

    Reference: Mohamed, Rosca, Figurnov & Mnih (2020), Monte Carlo gradient estimation in machine learning, section 5.
    """
    return np.asarray(_path(pieces).mean(1))


def stick_the_landing(pieces: Pieces) -> np.ndarray:
    """The path's gradient of log p - log q with q's own parameters held in log q, (group, parameter).

    What is left out is the score, which has mean zero; the path's gradient contains it with a minus.

    Reference: Roeder, Wu & Duvenaud (2017), Sticking the landing, section 3.
    """
    _, score = _scored(pieces)
    return np.asarray((_path(pieces) + score).mean(1))


def _scored(pieces: Pieces) -> tuple[np.ndarray, np.ndarray]:
    """Value and score, for estimators that need both."""
    if pieces.score is None:
        raise ValueError("Expected pieces with a score, which this estimator needs; they have none.")
    return pieces.value, pieces.score


def _path(pieces: Pieces) -> np.ndarray:
    """The path's gradient, for estimators that need it."""
    if pieces.path is None:
        raise ValueError("Expected pieces with a path's gradient, which this estimator needs; they have none.")
    return pieces.path


_RULES: Mapping[str, Callable[[Pieces], np.ndarray]] = {
    SCORE: score_function,
    BASELINE: score_with_baseline,
    CONTROL_VARIATE: score_with_control_variate,
    REPARAMETERISED: reparameterised,
    STICK_THE_LANDING: stick_the_landing,
}


def estimates_of(name: str, pieces: Pieces) -> np.ndarray:
    """Independent gradients by the estimator of that name, (group, parameter)."""
    return _RULES[name](pieces)


@dataclass
class Sums:
    """Sums over independent estimates of one gradient, batch by batch.

    They are of differences from the first batch's mean, so that squares lose no digits to the mean.
    """

    centre: np.ndarray
    counts: list[int] = field(default_factory=list)
    first: list[np.ndarray] = field(default_factory=list)
    second: list[np.ndarray] = field(default_factory=list)

    def add(self, estimates: np.ndarray) -> None:
        """One more batch of estimates, (estimate, parameter)."""
        apart = estimates - self.centre
        self.counts.append(len(apart))
        self.first.append(apart.sum(0))
        self.second.append(np.square(apart).sum(0))

    def _left(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Count, first and second sums: of all batches (1, ...), then of all but one (batch, ...)."""
        parts = np.array(self.counts, float)[:, None], np.stack(self.first), np.stack(self.second)
        sums = tuple(part.sum(0, keepdims=True) for part in parts)
        yield sums[0], sums[1], sums[2]
        yield sums[0] - parts[0], sums[1] - parts[1], sums[2] - parts[2]

    def moments(self) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Mean and variance of an estimate, (1, parameter) by all batches and (batch, parameter) by all but one."""
        found = []
        for count, first, second in self._left():
            variance = np.maximum(second - first**2 / count, 0.0) / (count - 1)
            found.append((self.centre + first / count, variance))
        return found[0], found[1]

    @property
    def estimates(self) -> int:
        """How many."""
        return sum(self.counts)


def add_batch(into: dict[tuple[str, int], Sums], pieces: Pieces, draws: tuple[int, ...], estimators: set[str]) -> None:
    """One batch of every estimator that can be had, for every number of draws.

    Args:
        into: By estimator and draws.
        pieces: Rows of as many draws as the largest number; smaller ones take each row in several parts.
        draws: How many draws one gradient is estimated from.
        estimators: Which.
    """
    for count in draws:
        regrouped = _regrouped(pieces, count)
        for name in ESTIMATORS:
            if name in estimators and (count > 1 or name not in NEED_OTHERS):
                estimates = _RULES[name](regrouped)
                if (name, count) not in into:
                    into[name, count] = Sums(estimates.mean(0))
                into[name, count].add(estimates)


def _regrouped(pieces: Pieces, count: int) -> Pieces:
    """The same draws in groups of another number; what is left of a row is left out."""
    rows, most = pieces.value.shape
    whole = most // count * count

    def regroup(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else values[:, :whole].reshape(rows * whole // count, count, *values.shape[2:])

    value = regroup(pieces.value)
    assert value is not None
    return Pieces(value, regroup(pieces.score), regroup(pieces.path))


def by_leaving_out(value: float, left_out: np.ndarray) -> Estimate:
    """A number with its standard error from what it would be without each batch in turn, (batch,).

    Reference: Efron & Stein (1981), The jackknife estimate of variance.
    """
    return Estimate(float(value), float(leave_out_error(left_out)))


def leave_out_error(left_out: np.ndarray) -> np.ndarray:
    """The jackknife's standard error, (...), of numbers known without each batch in turn, (batch, ...)."""
    count = len(left_out)
    return np.asarray(np.sqrt((count - 1) / count * np.square(left_out - left_out.mean(0)).sum(0)))
