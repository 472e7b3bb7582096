"""One scalar's draws under one distribution, with all that every metric needs of them, computed once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from toolkit.influence import (
    chain_error,
    effective_draws,
    independent_error,
    ordered_quantiles,
    quantile_influence,
)

# Distance of the 5 % and the 95 % quantile of a standard normal.
NORMAL_SPREAD = 3.2897072539029444
# A scalar whose sd is this small beside its size is a constant with rounding errors (a simplex of one element).
CONSTANT = 1e-12
LEAST_DRAWS = 8  # in a chain, and of a guide: for errors that mean something


@dataclass(frozen=True, eq=False)
class Side:
    """One scalar's draws under one distribution, with what all metrics need.

    Attributes:
        draws: In the order in which they were drawn, (chain, draw) or (draws,).
        ordered: All of them in ascending order, (draws,).
        mean: Their mean.
        sd: Their sd.
        kurtosis: Their excess kurtosis.
        log_sd_error: The error of log sd.
        multiplicity: By how much each draw's own variance counts in an error, (draws,), where draws repeat or carry
            weights; None if they are independent.
    """

    draws: np.ndarray
    ordered: np.ndarray
    mean: float
    sd: float
    kurtosis: float
    log_sd_error: float
    multiplicity: np.ndarray | None = field(default=None, kw_only=True)

    def error(self, series: np.ndarray, *, ascending: bool = False) -> float:
        """The standard error of the mean of a series over these draws, in their order or in ascending order."""
        if self.multiplicity is None:
            return independent_error(series)
        multiplicity = self.multiplicity[np.argsort(self.draws)] if ascending else self.multiplicity
        return float(np.sqrt((multiplicity * np.square(series - series.mean())).sum()) / series.size)

    @property
    def independent(self) -> float:
        """How many independent draws these are, by Kish's number."""
        return self.ordered.size / (1.0 if self.multiplicity is None else float(self.multiplicity.mean()))


class _Quantiles(NamedTuple):
    """Location and width of the reference by quantiles.

    Attributes:
        median: The median.
        spread: (q95 - q5) / 3.29, the sd of normal draws; 0 if nearly all draws are equal.
        median_influence: What each draw adds to the median, (chain, draw).
        log_spread_influence: What each draw adds to log spread, (chain, draw).
        log_spread_error: The error of log spread.
    """

    median: float
    spread: float
    median_influence: np.ndarray
    log_spread_influence: np.ndarray
    log_spread_error: float


@dataclass(frozen=True, eq=False)
class Standard(Side):
    """The reference's side of one scalar, which every guide is compared with.

    Attributes:
        order: Where each of `ordered` stands in `draws` without its axes, (draws,).
        standard: What each draw adds to the mean, in sd, (chain, draw).
        log_sd_influence: What each draw adds to log sd, (chain, draw).
        effective: Effective draws of the mean.
    """

    order: np.ndarray
    standard: np.ndarray
    log_sd_influence: np.ndarray
    effective: float

    @cached_property
    def quantiles(self) -> _Quantiles:
        """What stands in for the moments where tails are heavy; computed when first asked for, as most are not."""
        spread = spread_of(self.ordered)
        with np.errstate(divide="ignore", invalid="ignore"):
            influence = np.divide(spread_influence(self), spread)
        return _Quantiles(
            median=ordered_quantiles(self.ordered, [0.5])[0],
            spread=spread,
            median_influence=quantile_influence(self.draws, self.ordered, 0.5),
            log_spread_influence=influence,
            log_spread_error=chain_error(influence) if spread > 0 else float("nan"),
        )


def prepare(reference: np.ndarray) -> list[Standard | None]:
    """What all guides' metrics need of the reference's draws (chain, draw, scalar); None for a scalar without spread.

    Raises:
        ValueError: The array has other axes, or too few draws.
    """
    if reference.ndim != 3 or reference.shape[1] < LEAST_DRAWS:
        raise ValueError(
            f"Expected reference draws (chain, draw, scalar) with at least {LEAST_DRAWS} draws in a chain, so that "
            f"errors can be given; got {reference.shape}."
        )
    return [_standard(np.ascontiguousarray(reference[:, :, i])) for i in range(reference.shape[2])]


def _moments(draws: np.ndarray) -> tuple[float, float] | None:
    """The mean and the sd of draws, or None if they do not vary or are not finite."""
    mean, sd = float(draws.mean()), float(draws.std(ddof=1))
    varies = sd > CONSTANT * max(abs(mean), np.finfo(float).tiny) and np.isfinite(sd)
    return (mean, sd) if varies else None


def _standard(draws: np.ndarray) -> Standard | None:
    moments = _moments(draws)
    if moments is None:
        return None
    mean, sd = moments
    order = np.argsort(draws, axis=None)
    standard = (draws - mean) / sd
    square = np.square(standard)
    influence = 0.5 * (square - 1.0)
    return Standard(
        draws=draws,
        ordered=draws.ravel()[order],
        mean=mean,
        sd=sd,
        kurtosis=_kurtosis(square),
        log_sd_error=chain_error(influence),
        order=order,
        standard=standard,
        log_sd_influence=influence,
        effective=effective_draws(draws),
    )


def guide_side(draws: np.ndarray, multiplicity: np.ndarray | None = None) -> Side:
    """What the metrics need of a guide's finite draws (draws,) of one scalar."""
    moments, ordered = _moments(draws), np.sort(draws)
    if moments is None:
        # A guide without spread, such as the posterior's mode: the kurtosis, of nothing, is not to count as heavy.
        return Side(draws, ordered, float(draws.mean()), sd=0.0, kurtosis=-3.0, log_sd_error=0.0)
    mean, sd = moments
    square = np.square((draws - mean) / sd)
    side = Side(draws, ordered, mean, sd, _kurtosis(square), 0.0, multiplicity=multiplicity)
    return replace(side, log_sd_error=0.5 * side.error(square))


def _kurtosis(square: np.ndarray) -> float:
    """Excess kurtosis, from the squared distance of each draw from the mean, in sd."""
    return float(np.square(square).mean() - 3.0)


def spread_of(ordered: np.ndarray) -> float:
    """(q95 - q5) / 3.29 of draws in ascending order: the sd, if the draws are normal."""
    low, high = ordered_quantiles(ordered, (0.05, 0.95))
    return (high - low) / NORMAL_SPREAD


def spread_influence(side: Side) -> np.ndarray:
    """What each draw adds to the spread, in the shape of the draws."""
    low, high = (quantile_influence(side.draws, side.ordered, level) for level in (0.05, 0.95))
    return (high - low) / NORMAL_SPREAD
