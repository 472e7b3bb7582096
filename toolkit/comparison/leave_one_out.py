"""Leave-one-out predictive densities from draws of any approximation, with their Monte Carlo errors.

The density of an observation that was left out is an average over draws with importance weights 1 / p(y_i | z), times
p(x, z) / q(z) where draws of a guide are to stand for the posterior's. The weights are Pareto-smoothed by ArviZ
(Vehtari, Gelman & Gabry 2017, Practical Bayesian model evaluation; Magnusson, Andersen, Jonasson & Vehtari 2019,
Bayesian leave-one-out cross-validation for large data, section 2.2 for the second factor, which ArviZ's
`loo_approximate_posterior` has). The second factor is smoothed once, and the first only where it makes the weights
clearly less even: with ten thousand observations that is the difference between seconds and minutes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from arviz_stats.base import array_stats
from scipy.special import logsumexp

from toolkit.influence import TAIL_LIMIT, chain_error, independent_error

# Kish's number of weighted draws over that of draws from which on weights are too even for a tail to matter; an index
# fitted to them says nothing.
_EVEN = 0.9
_AT_ONCE = 4_000_000  # weights at once: 32 MB


@dataclass(frozen=True, eq=False)
class LeaveOneOut:
    """What one set of draws says of observations that it was made without.

    Attributes:
        elpd: Log density of each observation when it is left out, (observation,), in nats.
        lpd: Its log density when it is not, (observation,), in nats.
        khat: Pareto tail index of each observation's weights; minus infinity where these are nearly even.
        log_weights: The normalised weights of the observations that were to be kept, (draw, kept).
        influence: What each draw adds to the sum of `elpd`, (chain, draw) or (draw,).
        seen_influence: What it adds to the sum of `lpd`.
        errors: The Monte Carlo error of each of `elpd` as if the draws were independent, (observation,); NaN where
            it is infinite.
        own_error: The part of the sum's error that has nothing to do with these draws.
    """

    elpd: np.ndarray
    lpd: np.ndarray
    khat: np.ndarray
    log_weights: np.ndarray
    influence: np.ndarray
    seen_influence: np.ndarray
    errors: np.ndarray
    own_error: float = 0.0

    @property
    def unreliable(self) -> np.ndarray:
        """Which observations have weights that cannot be trusted, (observation,)."""
        return ~(self.khat <= khat_limit(self.influence.size))

    @property
    def error(self) -> float:
        """The Monte Carlo error of the sum of `elpd`: all observations are computed from the same draws."""
        return self._error(self.influence)

    @property
    def optimism_error(self) -> float:
        """The Monte Carlo error of the sum of `lpd` minus that of `elpd`."""
        return self._error(self.seen_influence - self.influence)

    def _error(self, influence: np.ndarray) -> float:
        drawn = chain_error(influence) if influence.ndim == 2 else independent_error(influence)
        return math.hypot(drawn, self.own_error)


def khat_limit(draws: int) -> float:
    """Up to which tail index so many draws can be trusted.

    Reference: Vehtari, Simpson, Gelman, Yao & Gabry (2024), Pareto smoothed importance sampling, section 3.2.
    """
    return min(1.0 - 1.0 / math.log10(max(draws, 11)), TAIL_LIMIT)


def leave_one_out(
    log_likelihoods: np.ndarray,
    shape: tuple[int, ...],
    *,
    log_ratios: np.ndarray | None = None,
    keep: np.ndarray | None = None,
    scales: np.ndarray | None = None,
) -> LeaveOneOut:
    """The leave-one-out densities of all observations.

    Args:
        log_likelihoods: Log p(y_i | z), (draw, observation), in nats; not finite where a draw rules it out.
        shape: (chain, draw) of autocorrelated draws, or (draw,) of independent ones.
        log_ratios: Log p(x, z) - log q(z) of each draw, (draw,), where the draws are to stand for the posterior's.
        keep: Observations whose weights are wanted later.
        scales: How many observations each stands for in the sums whose errors are told; 1 if None.
    """
    draws, count = log_likelihoods.shape
    elpd, lpd, khat = np.full(count, -np.inf), np.full(count, -np.inf), np.full(count, -np.inf)
    kept = np.empty((draws, 0 if keep is None else keep.size))
    place = np.full(count, -1)
    if keep is not None:
        place[keep] = np.arange(keep.size)
    influence, seen_influence, errors = np.zeros(draws), np.zeros(draws), np.full(count, np.nan)
    whole, base = smoothed((np.zeros(draws) if log_ratios is None else log_ratios)[:, None], 1.0)
    even = _EVEN * kish(whole)[0]
    step = max(1, _AT_ONCE // draws)
    for begin in range(0, count, step):
        part = slice(begin, min(begin + step, count))
        possible = np.isfinite(log_likelihoods[:, part]).all(axis=0)
        given = np.where(possible, log_likelihoods[:, part], 0.0)
        log_weights, khat[part] = smoothed(whole - given, even)
        lpd[part] = logsumexp(whole + given, axis=0)
        elpd[part] = logsumexp(log_weights + given, axis=0)
        # A ratio of two weighted means: each draw moves the upper by its share, and the lower by its weight.
        share = np.ones(given.shape[1]) if scales is None else scales[part]
        moved = np.exp(log_weights) * np.expm1(given - elpd[part])
        influence += draws * moved @ share
        errors[part] = np.where(possible, np.sqrt(np.square(moved).sum(axis=0)), np.nan)
        seen_influence += draws * (np.exp(whole) * np.expm1(given - lpd[part])) @ share
        # Under a draw that rules an observation out, its weight is infinite.
        elpd[part][~possible], khat[part][~possible] = -np.inf, np.inf
        lpd[part][~possible] = logsumexp(whole + log_likelihoods[:, part][:, ~possible], axis=0)
        wanted = place[part]
        kept[:, wanted[wanted >= 0]] = log_weights[:, wanted >= 0]
    return LeaveOneOut(
        elpd,
        lpd,
        np.maximum(khat, base),
        kept,
        influence.reshape(shape),
        seen_influence.reshape(shape),
        errors,
    )


def kish(log_weights: np.ndarray) -> np.ndarray:
    """How many equal weights have as much spread, over how many there are; of normalised weights (draw, ...)."""
    return np.asarray(1.0 / (np.exp(2.0 * log_weights).sum(axis=0) * len(log_weights)))


def smoothed(log_ratios: np.ndarray, even: float) -> tuple[np.ndarray, np.ndarray]:
    """Normalised log weights (draw, observation), smoothed where they are less even than that, and tail indices."""
    log_weights = log_ratios - logsumexp(log_ratios, axis=0)
    khat = np.full(log_weights.shape[1], -np.inf)
    for i in np.flatnonzero(~(kish(log_weights) >= even)):
        try:
            # ArviZ takes log ratios with the sign of a log likelihood: minus the log weights.
            values, khat[i] = array_stats.psislw(-log_ratios[:, i])
        except ValueError:
            continue  # the largest weights are all the same: there is no tail to smooth
        log_weights[:, i] = values - logsumexp(values)
    return log_weights, khat
