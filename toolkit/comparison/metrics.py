"""How far one set of draws lies from another, scalar by scalar, each number with its error from both sides.

Reference draws p are (chain, draw, scalar) and autocorrelated; guide draws q are (draws, scalar) and independent.

| metric | is | se from |
|---|---|---|
| shift | (mean q - mean p) / sd p | means and sd, with their covariance (it matters where p is skewed) |
| sd_ratio | sd q / sd p | both sds, on the log scale |
| coverage_50, coverage_90 | mass that p gives to q's central 50 or 90 % interval | it and the interval's ends |
| wasserstein_1 | integral of |F_p - F_q| / sd p | both distribution functions, sd p, the bias of noise |
| median_shift | (median q - median p) / spread p | as shift, by quantiles; heavy tails only |
| spread_ratio | spread q / spread p | as sd_ratio, by quantiles; heavy tails only |

The spread is (q95 - q5) / 3.29: the sd, if the draws are normal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from arviz_stats.base import array_stats

from toolkit.comparison.influence import (
    chain_error,
    effective_draws,
    independent_error,
    level_step,
    ordered_quantiles,
    probability_error,
    quantile_influence,
)
from toolkit.comparison.wasserstein import wasserstein
from toolkit.estimate import Estimate

METRICS = ("shift", "sd_ratio", "coverage_50", "coverage_90", "wasserstein_1")
QUANTILE_METRICS = ("median_shift", "spread_ratio")
FLOOR = "wasserstein_1_floor"

# From n effective draws an sd has the relative error sqrt((excess kurtosis + 2) / 4n). At 10 and n = 400, the least
# that a reference may have, that is 0.09: no sd ratio could be told from the threshold of 0.1; and that error itself
# stands on the eighth moment. Simple real posteriors reach 12 to 20; normal 0, Laplace 3, exponential 6.
HEAVY_KURTOSIS = 10.0
# Distance of the 5 % and the 95 % quantile of a standard normal.
NORMAL_SPREAD = 3.2897072539029444
# A scalar whose sd is this small beside its size is a constant with rounding errors (a simplex of one element).
CONSTANT = 1e-12
# Log weights (nats) that differ by rounding errors alone.
EQUAL_WEIGHTS = 1e-8
_LEAST_DRAWS = 8  # in a chain, and of a guide: for errors that mean something
NAN = Estimate(float("nan"), float("nan"))


@dataclass(frozen=True, eq=False)
class Metrics:
    """The metrics of every scalar.

    Attributes:
        estimates: Metric to `Estimate` of two arrays (scalar,), value and se; NaN where a metric does not apply.
        judged: Which scalars vary under the reference, so that there is something to compare, (scalar,).
        heavy: Which scalars have tails too heavy for moments, so that `median_shift` and `spread_ratio` stand in
            for `shift` and `sd_ratio`, (scalar,).
        floor: What wasserstein_1 would be on average if nothing differed, in reference sd, (scalar,).
        effective: Effective draws of each reference mean, (scalar,).
    """

    estimates: Mapping[str, tuple[np.ndarray, np.ndarray]]
    judged: np.ndarray
    heavy: np.ndarray
    floor: np.ndarray
    effective: np.ndarray


@dataclass(frozen=True, eq=False)
class _Side:
    """One scalar's draws under one distribution, with what all metrics need."""

    draws: np.ndarray
    ordered: np.ndarray
    mean: float
    sd: float
    standard: np.ndarray

    @property
    def kurtosis(self) -> float:
        """Excess kurtosis."""
        return float(np.square(np.square(self.standard)).mean() - 3.0)


@dataclass(frozen=True, eq=False)
class Standard(_Side):
    """The reference's side of one scalar, which every guide is compared with."""

    effective: float


def prepare(reference: np.ndarray) -> list[Standard | None]:
    """What all guides' metrics need of the reference's draws (chain, draw, scalar); None for a scalar without spread.

    Raises:
        ValueError: The array has other axes, or too few draws.
    """
    if reference.ndim != 3 or reference.shape[1] < _LEAST_DRAWS:
        raise ValueError(
            f"Expected reference draws (chain, draw, scalar) with at least {_LEAST_DRAWS} draws in a chain, so that "
            f"errors can be given; got {reference.shape}."
        )
    prepared: list[Standard | None] = []
    for i in range(reference.shape[2]):
        # One scalar's draws are far apart in memory; everything runs over them many times.
        side = _side(np.ascontiguousarray(reference[:, :, i]))
        prepared.append(Standard(**vars(side), effective=effective_draws(side.draws)) if side else None)
    return prepared


def metrics(reference: np.ndarray | Sequence[Standard | None], guide: np.ndarray) -> Metrics:
    """Every metric of every scalar.

    Args:
        reference: Draws of p, (chain, draw, scalar), or what `prepare` made of them.
        guide: Independent draws of q, (draws, scalar).

    Raises:
        ValueError: The arrays have other axes, different numbers of scalars, or too few draws.
    """
    standards = prepare(reference) if isinstance(reference, np.ndarray) else reference
    count = len(standards)
    if guide.ndim != 2 or guide.shape[1] != count or guide.shape[0] < _LEAST_DRAWS:
        raise ValueError(
            f"Expected guide draws (draws, scalar) of the reference's {count} scalars, at least {_LEAST_DRAWS} draws; "
            f"got {guide.shape}."
        )
    judged, heavy = np.zeros(count, bool), np.zeros(count, bool)
    floor, effective = np.full(count, np.nan), np.full(count, np.nan)
    values = {name: np.full((2, count), np.nan) for name in (*METRICS, *QUANTILE_METRICS)}
    for i, p in enumerate(standards):
        guide_draws = np.ascontiguousarray(guide[:, i])
        judged[i] = p is not None
        if p is None or not np.isfinite(guide_draws).all():
            continue
        q = _side(guide_draws) or _point_mass(guide_draws)
        effective[i] = p.effective
        heavy[i] = max(p.kurtosis, q.kurtosis) > HEAVY_KURTOSIS
        row, floor[i] = _compared(p, q, heavy=heavy[i])
        for name, estimate in row.items():
            values[name][:, i] = estimate
    return Metrics({name: (array[0], array[1]) for name, array in values.items()}, judged, heavy, floor, effective)


def _compared(p: Standard, q: _Side, *, heavy: bool) -> tuple[dict[str, Estimate], float]:
    distance, floor = _wasserstein(p, q)
    row = {
        "shift": _shift(p, q),
        "sd_ratio": _sd_ratio(p, q),
        "coverage_50": _coverage(p, q, 0.5),
        "coverage_90": _coverage(p, q, 0.9),
        "wasserstein_1": distance,
    }
    return (row | _quantile_metrics(p, q) if heavy else row), floor


def _side(draws: np.ndarray) -> _Side | None:
    """The draws with their moments, or None if they do not vary or are not finite."""
    mean, sd = float(draws.mean()), float(draws.std(ddof=1))
    if not sd > CONSTANT * max(abs(mean), np.finfo(float).tiny) or not np.isfinite(sd):
        return None
    return _Side(draws, np.sort(draws, axis=None), mean, sd, (draws - mean) / sd)


def _point_mass(draws: np.ndarray) -> _Side:
    """A guide without spread, such as the posterior's mode."""
    return _Side(draws, np.sort(draws), float(draws.mean()), 0.0, np.zeros_like(draws))


def _combined(reference_influence: np.ndarray, guide_influence: np.ndarray) -> float:
    return float(np.hypot(chain_error(reference_influence), independent_error(guide_influence)))


def _shift(p: _Side, q: _Side) -> Estimate:
    value = (q.mean - p.mean) / p.sd
    influence = -p.standard - value * 0.5 * (p.standard**2 - 1.0)
    return Estimate(value, _combined(influence, (q.draws - q.mean) / p.sd))


def _sd_ratio(p: _Side, q: _Side) -> Estimate:
    value = q.sd / p.sd
    return Estimate(value, value * _combined(-0.5 * (p.standard**2 - 1.0), 0.5 * (q.standard**2 - 1.0)))


def _coverage(p: Standard, q: _Side, mass: float) -> Estimate:
    """The mass; p's error is that of an event, q's comes through the mass that its two uncertain ends carry."""
    levels = (0.5 * (1.0 - mass), 0.5 * (1.0 + mass))
    low, high = ordered_quantiles(q.ordered, levels)
    inside = (p.draws >= low) & (p.draws <= high)
    # With densities f, the low end moves the mass by s = f_p / f_q times the error of its level, the high end alike.
    # Of n draws, n u (1 - u) is the variance of how many lie below level u, n u (1 - v) the covariance with level v.
    of_low, of_high = (_density_ratio(p, q, level) for level in levels)
    u, v = levels
    variance = of_low**2 * u * (1 - u) + of_high**2 * v * (1 - v) - 2 * of_low * of_high * u * (1 - v)
    error = np.hypot(probability_error(inside, p.effective), np.sqrt(variance / q.ordered.size))
    return Estimate(float(inside.mean()), float(error))


def _density_ratio(p: _Side, q: _Side, level: float) -> float:
    """The density of p over that of q at q's quantile, from how p's mass moves with the quantile's level."""
    step = level_step(level, min(q.ordered.size, p.ordered.size))
    ends = ordered_quantiles(q.ordered, (level - step, level + step))
    below = np.searchsorted(p.ordered, ends, side="right") / p.ordered.size
    return float((below[1] - below[0]) / (2.0 * step))


def _wasserstein(p: Standard, q: _Side) -> tuple[Estimate, float]:
    distance = wasserstein(p.draws, q.ordered, p.effective)
    value = distance.value / p.sd
    influence = distance.reference_influence / p.sd - value * 0.5 * (p.standard**2 - 1.0)
    error = np.hypot(_combined(influence, distance.guide_influence / p.sd), distance.bias / p.sd)
    return Estimate(value, float(error)), distance.floor / p.sd


def _quantile_metrics(p: _Side, q: _Side) -> dict[str, Estimate]:
    """Location and width by quantiles, for tails under which moments have no usable error."""
    (p_low, p_median, p_high), (q_low, q_median, q_high) = (
        ordered_quantiles(s.ordered, (0.05, 0.5, 0.95)) for s in (p, q)
    )
    p_spread, q_spread = (p_high - p_low) / NORMAL_SPREAD, (q_high - q_low) / NORMAL_SPREAD
    if not p_spread > 0:
        return {"median_shift": NAN, "spread_ratio": NAN}
    p_relative, q_relative = _spread_influence(p) / p_spread, _spread_influence(q)
    shift, ratio = (q_median - p_median) / p_spread, q_spread / p_spread
    p_location = -quantile_influence(p.draws, p.ordered, 0.5) / p_spread - shift * p_relative
    q_location = quantile_influence(q.draws, q.ordered, 0.5) / p_spread
    return {
        "median_shift": Estimate(float(shift), _combined(p_location, q_location)),
        "spread_ratio": Estimate(float(ratio), _combined(ratio * p_relative, q_relative / p_spread)),
    }


def _spread_influence(side: _Side) -> np.ndarray:
    ends = (quantile_influence(side.draws, side.ordered, level) for level in (0.05, 0.95))
    low, high = ends
    return (high - low) / NORMAL_SPREAD


def khat(log_weights: np.ndarray) -> Estimate:
    """Pareto k-hat of importance weights log p(x, z) - log q(z) in nats, (draws,), by ArviZ's PSIS.

    The se comes from the four independent quarters of the draws, scaled by how many tail draws each fit uses. k-hat
    tells very bad from acceptable, not acceptable from good (METHODS 6): it is shown and decides nothing. NaN where the
    weights are all equal (q is p: there is no tail to fit), infinite, or fewer than 100.
    """
    weights = np.asarray(log_weights, dtype=float)
    weights = np.where(np.isnan(weights), -np.inf, weights)
    finite = weights[np.isfinite(weights)]
    if np.isposinf(weights).any() or finite.size < 100 or np.ptp(finite) < EQUAL_WEIGHTS:
        return NAN
    quarters = np.array([_khat(quarter) for quarter in np.array_split(finite, 4)])
    # PSIS fits the largest 3 sqrt(n) weights (Vehtari et al. 2024); k-hat's variance is one over those.
    tail = 3.0 * np.sqrt([finite.size / 4, finite.size])
    return Estimate(_khat(finite), float(quarters.std(ddof=1) * np.sqrt(tail[0] / tail[1])))


def _khat(log_weights: np.ndarray) -> float:
    # ArviZ takes log ratios with the sign of a log likelihood in leave-one-out: minus the log weights.
    return float(array_stats.psislw(-log_weights)[1])
