"""Bridge sampling: a ratio of normalising constants from draws of both distributions.

Reference: Meng & Wong (1996), Simulating ratios of normalizing constants via a simple identity: a theoretical
    exploration, Statistica Sinica 6, section 3; errors with autocorrelation after Fruehwirth-Schnatter (2004),
    Estimating marginal likelihoods for mixture and Markov switching models using bridge sampling techniques,
    Econometrics Journal 7, section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

from toolkit.estimate import Estimate
from toolkit.influence import chain_error, effective_draws, independent_error

_LEAST_EFFECTIVE = 100.0
"""Terms that either mean must count as: below, its error (above 0.1 nats) is itself not known. See `Bridge.problem`."""


@dataclass(frozen=True, eq=False)
class Bridge:
    """The log of a normalising constant, by a bridge.

    Attributes:
        estimate: Log Z in nats, with its error from both sides.
        influence: What each draw of p adds to it beyond the mean, `(chain, draw)`, in nats.
        own_error: The part of the error that comes from the draws of q, in nats.
        effective: How many equal terms each mean is as good as: of the draws of p, of those of q.
    """

    estimate: Estimate
    influence: np.ndarray
    own_error: float
    effective: tuple[float, float]

    @property
    def problem(self) -> str:
        """Why the estimate cannot be trusted; empty if it can.

        Each mean is of terms between 0 and a bound, so that its variance is finite; but where p and q hardly meet, a
        few draws make up nearly all of it, those that would make up the rest have not been drawn, and value and error
        are both too small. (On N(0, I) in 500 dimensions with 4,000 draws, the error was 7 nats where 1 was reported.)
        """
        least, side = min(zip(self.effective, ("the reference's draws", "its own draws"), strict=True))
        if least >= _LEAST_EFFECTIVE:
            return ""
        return f"it hardly meets the posterior: {side} count as {least:.2g} (at least {_LEAST_EFFECTIVE:g} are needed)"


def bridge(at_reference: np.ndarray, at_own: np.ndarray) -> Bridge:
    """Log Z of p(z) / Z, from log ratios at draws of p and at draws of a normalised q.

    Args:
        at_reference: Log p(z) - log q(z) at draws of p, `(chain, draw)`, in nats.
        at_own: The same at independent draws of q, `(draws,)`; minus infinity where p vanishes.

    Raises:
        ValueError: A ratio at the reference's draws is not finite, or none at q's is.
    """
    at_own = np.where(np.isnan(at_own), -np.inf, at_own)
    if not np.isfinite(at_reference).all() or not np.isfinite(at_own).any() or np.isposinf(at_own).any():
        raise ValueError("Expected finite log ratios at the reference's draws, and some at the proposal's own.")
    # The optimal bridge weighs both sides by how many independent draws they are worth.
    weight = math.log(effective_draws(at_reference) / at_own.size)

    def sides(log_z: float) -> tuple[np.ndarray, np.ndarray]:
        return expit(log_z - at_reference - weight), expit(at_own + weight - log_z)

    def excess(log_z: float) -> float:
        of_p, of_q = sides(log_z)
        return math.exp(weight) * float(of_p.mean()) - float(of_q.mean())

    # One side rises from zero and the other falls to zero, so that they meet once.
    finite = at_own[np.isfinite(at_own)]
    low = min(at_reference.min(), finite.min()) + min(weight, 0.0) - 50.0
    high = max(at_reference.max(), finite.max()) + max(weight, 0.0) + 50.0
    log_z = float(brentq(excess, low, high, xtol=1e-12, rtol=8.9e-16))
    of_p, of_q = sides(log_z)
    mean_p, mean_q = float(of_p.mean()), float(of_q.mean())
    if not min(mean_p, mean_q) > 0.0:  # hundreds of nats apart: all terms of a side are 0 in floating point
        return Bridge(Estimate(log_z, math.inf), np.zeros(at_reference.shape), math.inf, (0.0, 0.0))
    error_p, error_q = chain_error(of_p) / mean_p, independent_error(of_q) / mean_q
    return Bridge(
        Estimate(log_z, float(math.hypot(error_p, error_q))),
        influence=1.0 - of_p / mean_p,
        own_error=error_q,
        effective=(_effective(of_p, error_p), _effective(of_q, error_q)),
    )


def _effective(terms: np.ndarray, relative_error: float) -> float:
    """As how many equal terms a mean may count, by their sizes and by its error, whichever is less."""
    by_size = float(terms.sum() ** 2 / np.square(terms).sum())
    return min(by_size, relative_error**-2) if relative_error > 0 else by_size
