"""What may repair a guide: its draws reweighted or resampled by importance, a mean field's linear-response covariances.

Each correction is an approximation of its own, judged like a guide, and named after the guide that it corrects.

| name | is | judged if |
|---|---|---|
| `<guide>+psis` | the guide's draws with Pareto-smoothed importance weights | k-hat is at most 0.7 |
| `<guide>+sir` | 1,000 of the guide's draws, resampled by these weights | k-hat is at most 0.7 |
| `<guide>+lr` | a Gaussian with the mean field's means and linear-response covariances | the Hessian is positive |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import numpy as np
from arviz_stats.base import array_stats

from toolkit.comparison.metrics import EQUAL_WEIGHTS
from toolkit.comparison.sources import Approximation, Reweighable, key_for
from toolkit.cost import Cost
from toolkit.estimate import Estimate
from toolkit.influence import TAIL_LIMIT
from toolkit.status import Status
from toolkit.variational.fits import Fit
from toolkit.variational.linear_response import linear_response, responds

RESAMPLED = 1_000
"""As many as Pathfinder gives (Zhang, Carpenter, Gelman & Vehtari 2022), of ten times as many, so that few repeat."""

_DRAWS = 10_000


@dataclass(frozen=True)
class CorrectedName:
    """What tables call a correction."""

    name: str
    title: str


@dataclass(frozen=True, eq=False)
class _Weighed:
    """A guide's draws with their smoothed importance weights, made when they are first asked for.

    Attributes:
        fit: The guide's fit.
        key: The draws' random key.
    """

    fit: Reweighable
    key: jax.Array

    @cached_property
    def smoothed(self) -> tuple[np.ndarray, float]:
        """The smoothed weights, adding up to 1, and k-hat."""
        try:
            log_weights = np.asarray(self.fit.log_weights(self.key, _DRAWS), dtype=float)
        except (ValueError, TypeError, ArithmeticError, RuntimeError):
            log_weights = np.full(_DRAWS, -np.inf)  # a user's own approximation whose weights fail has none
        finite = np.isfinite(log_weights)
        if not finite.any():
            return np.full(_DRAWS, 1.0 / _DRAWS), math.inf
        if np.ptp(log_weights[finite]) < EQUAL_WEIGHTS:
            return finite / finite.sum(), -math.inf  # q is p: there is no tail to smooth
        # ArviZ takes log ratios with the sign of a log likelihood in leave-one-out: minus the log weights.
        smoothed, khat = array_stats.psislw(-np.where(finite, log_weights, -np.inf))
        weights = np.exp(smoothed - smoothed.max())
        return weights / weights.sum(), float(khat)

    def draw(self, sites: tuple[str, ...] | None) -> dict[str, np.ndarray]:
        """The draws that the weights belong to."""
        return {name: np.asarray(values) for name, values in self.fit.draw(self.key, _DRAWS, sites).items()}


@dataclass(frozen=True, eq=False)
class Reweighted:
    """A guide's draws brought nearer to the posterior by importance weights; it has what `Approximation` lists.

    Attributes:
        weighed: The guide's draws and weights.
        resampled: Whether a thousand are resampled; else all are reweighted.
    """

    weighed: _Weighed
    resampled: bool
    elbo: Estimate | None = None
    fresh_log_weights: np.ndarray | None = None

    @property
    def of(self) -> str:
        """The guide that it corrects."""
        return self.weighed.fit.guide.name

    @property
    def guide(self) -> CorrectedName:
        """Its name."""
        kind, title = ("sir", "importance-resampled") if self.resampled else ("psis", "importance-weighted")
        return CorrectedName(f"{self.of}+{kind}", f"{self.of}, {title}")

    @property
    def khat(self) -> float:
        """The Pareto tail index of the weights; minus infinity where they are all equal."""
        return self.weighed.smoothed[1]

    @property
    def status(self) -> Status:
        """The guide's own, or WEIGHTS where these cannot be trusted."""
        return self.weighed.fit.status if self.usable else Status.WEIGHTS

    @property
    def message(self) -> str:
        """Why the weights cannot be trusted; empty if they can."""
        if self.khat <= TAIL_LIMIT:
            return ""
        return f"k-hat {self.khat:.2f}, limit {TAIL_LIMIT}" if math.isfinite(self.khat) else "none of them is finite"

    @property
    def cost(self) -> Cost:
        """The guide's, since nothing comes of it without that."""
        return self.weighed.fit.cost

    @property
    def usable(self) -> bool:
        """Whether its weights can be trusted."""
        return self.weighed.fit.usable and self.khat <= TAIL_LIMIT

    def chosen(self, key: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        """Which of the guide's draws are taken, and the multiplicity of each for errors: see `metrics.metrics`."""
        weights, _ = self.weighed.smoothed
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
        # Each weight becomes so many equal draws: systematic resampling adds next to no noise of its own.
        count = RESAMPLED if self.resampled else weights.size
        places = (np.arange(count) + rng.random()) / count
        taken = np.minimum(np.searchsorted(np.cumsum(weights), places), weights.size - 1)
        repeated = np.bincount(taken, minlength=weights.size)[taken].astype(float)
        # What was resampled has its own variance and that of the weighted draws among which it was chosen.
        return taken, repeated + weights[taken] * count if self.resampled else repeated

    def draw(self, key: jax.Array, draws: int, sites: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
        """Draws of the sites asked for; how many of them there are, is this correction's own affair."""
        taken, _ = self.chosen(key)
        return {name: values[taken] for name, values in self.weighed.draw(sites).items()}


def corrections(fits: Sequence[Approximation], *, key: jax.Array) -> tuple[Reweighted | Fit, ...]:
    """The corrections of every fit that has what they need: a density for weights, a factorised Gaussian for the other.

    Args:
        fits: The guides' fits.
        key: Random key.
    """
    made: list[Reweighted | Fit] = []
    for fit in fits:
        if not (fit.usable and fit.status.ok and fit.fresh_log_weights is not None):
            continue
        own = key_for(key, fit.guide.name)
        if isinstance(fit, Reweighable):
            weighed = _Weighed(fit, own)
            made += [Reweighted(weighed, resampled=resampled) for resampled in (False, True)]
        if isinstance(fit, Fit) and responds(fit):
            made.append(linear_response(fit, key=own))
    return tuple(made)
