"""How far one set of draws lies from another, scalar by scalar, each number with its error from both sides.

Reference draws p are (chain, draw, scalar) and autocorrelated; guide draws q are (draws, scalar) and independent.

| metric | is | se from |
|---|---|---|
| shift | (mean q - mean p) / sd p | means and sd, with their covariance (it matters where p is skewed) |
| sd_ratio | sd q / sd p | both sds, on the log scale |
| coverage_50, coverage_90 | mass that p gives to q's central 50 or 90 % interval | it and the interval's ends |
| wasserstein_1 | integral of |F_p - F_q| / sd p | both distribution functions, sd p, the bias of noise |
| cdf_difference | largest |F_p - F_q|: no event "at most x" has probabilities further apart | the draws below that x |
| median_shift | (median q - median p) / spread p | as shift, by quantiles; heavy tails only |
| spread_ratio | spread q / spread p | as sd_ratio, by quantiles; heavy tails only |

The spread is (q95 - q5) / 3.29: the sd, if the draws are normal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from arviz_stats.base import array_stats

from toolkit.comparison.sides import LEAST_DRAWS, Side, Standard, guide_side, prepare, spread_influence, spread_of
from toolkit.comparison.wasserstein import Distance, wasserstein
from toolkit.estimate import Estimate
from toolkit.influence import (
    chain_errors,
    least_probability_error,
    level_step,
    ordered_quantiles,
    quantile_influence,
)

METRICS = ("shift", "sd_ratio", "coverage_50", "coverage_90", "wasserstein_1", "cdf_difference")
QUANTILE_METRICS = ("median_shift", "spread_ratio")
FLOOR = "wasserstein_1_floor"

# From n effective draws an sd has the relative error sqrt((excess kurtosis + 2) / 4n). At 10 and n = 400, the least
# that a reference may have, that is 0.09: no sd ratio could be told from the threshold of 0.1; and that error itself
# stands on the eighth moment. Simple real posteriors reach 12 to 20; normal 0, Laplace 3, exponential 6.
HEAVY_KURTOSIS = 10.0
# Log weights (nats) that differ by rounding errors alone.
EQUAL_WEIGHTS = 1e-8
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


class _Part(NamedTuple):
    """A metric before its errors of both sides are put together.

    Attributes:
        value: The metric.
        influence: What each draw of the reference adds to it, (chain, draw).
        guide_error: Its error from the guide's draws.
        least: What its error from the reference's draws is at least.
    """

    value: float
    influence: np.ndarray
    guide_error: float
    least: float = 0.0


def metrics(
    reference: np.ndarray | Sequence[Standard | None], guide: np.ndarray, multiplicity: np.ndarray | None = None
) -> Metrics:
    """Every metric of every scalar.

    Args:
        reference: Draws of p, (chain, draw, scalar), or what `prepare` made of them.
        guide: Draws of q, (draws, scalar), independent unless told otherwise.
        multiplicity: By how much each draw of q counts in errors, (draws,), where they repeat or carry weights: with
            weights w that add up to 1, and a draw repeated about w n times, that many.

    Raises:
        ValueError: The arrays have other axes, different numbers of scalars, or too few draws.
    """
    standards = prepare(reference) if isinstance(reference, np.ndarray) else reference
    count = len(standards)
    if guide.ndim != 2 or guide.shape[1] != count or guide.shape[0] < LEAST_DRAWS:
        raise ValueError(
            f"Expected guide draws (draws, scalar) of the reference's {count} scalars, at least {LEAST_DRAWS} draws; "
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
        q = guide_side(guide_draws, multiplicity)
        effective[i] = p.effective
        heavy[i] = max(p.kurtosis, q.kurtosis) > HEAVY_KURTOSIS
        row, floor[i] = _compared(p, q, heavy=heavy[i])
        for name, estimate in row.items():
            values[name][:, i] = estimate
    return Metrics({name: (array[0], array[1]) for name, array in values.items()}, judged, heavy, floor, effective)


def _compared(p: Standard, q: Side, *, heavy: bool) -> tuple[dict[str, Estimate], float]:
    distance = wasserstein(p.ordered, q.ordered, p.effective, q.independent)
    whole = {"sd_ratio": _sd_ratio(p, q)}
    parts = {
        "shift": _shift(p, q),
        "coverage_50": _coverage(p, q, 0.5),
        "coverage_90": _coverage(p, q, 0.9),
        "wasserstein_1": _wasserstein(p, q, distance),
        "cdf_difference": _cdf_difference(p, q, distance),
    }
    if heavy and p.quantiles.spread > 0:
        whole["spread_ratio"] = _spread_ratio(p, q)
        parts["median_shift"] = _median_shift(p, q)
    # All at once: what one call costs beside the computing is a tenth of it.
    errors = chain_errors(np.stack([part.influence for part in parts.values()]))
    for (name, part), error in zip(parts.items(), errors.tolist(), strict=True):
        whole[name] = Estimate(part.value, float(np.hypot(max(error, part.least), part.guide_error)))
    return whole, distance.floor / p.sd


def _shift(p: Standard, q: Side) -> _Part:
    value = (q.mean - p.mean) / p.sd
    return _Part(value, -p.standard - value * p.log_sd_influence, q.error(q.draws) / p.sd)


def _sd_ratio(p: Side, q: Side) -> Estimate:
    value = q.sd / p.sd
    return Estimate(value, value * float(np.hypot(p.log_sd_error, q.log_sd_error)))


def _coverage(p: Standard, q: Side, mass: float) -> _Part:
    """The mass; p's error is that of an event, q's comes through the mass that its two uncertain ends carry."""
    levels = (0.5 * (1.0 - mass), 0.5 * (1.0 + mass))
    low, high = ordered_quantiles(q.ordered, levels)
    inside = ((p.draws >= low) & (p.draws <= high)).astype(float)
    # With densities f, the low end moves the mass by s = f_p / f_q times the error of its level, the high end alike.
    # Of n draws, n u (1 - u) is the variance of how many lie below level u, n u (1 - v) the covariance with level v.
    of_low, of_high = (_density_ratio(p, q, level) for level in levels)
    u, v = levels
    variance = of_low**2 * u * (1 - u) + of_high**2 * v * (1 - v) - 2 * of_low * of_high * u * (1 - v)
    guide_error = float(np.sqrt(variance / q.independent))
    if q.multiplicity is not None:
        moved = of_high * (v - (q.draws <= high)) - of_low * (u - (q.draws <= low))
        guide_error = q.error(moved)
    return _Part(float(inside.mean()), inside, guide_error, least=least_probability_error(p.effective))


def _density_ratio(p: Side, q: Side, level: float) -> float:
    """The density of p over that of q at q's quantile, from how p's mass moves with the quantile's level."""
    step = level_step(level, min(q.ordered.size, p.ordered.size))
    ends = ordered_quantiles(q.ordered, (level - step, level + step))
    below = np.searchsorted(p.ordered, ends, side="right") / p.ordered.size
    return float((below[1] - below[0]) / (2.0 * step))


def _wasserstein(p: Standard, q: Side, distance: Distance) -> _Part:
    value = distance.value / p.sd
    influence = np.empty(p.draws.size)
    influence[p.order] = distance.reference_influence / p.sd
    influence = influence.reshape(p.draws.shape) - value * p.log_sd_influence
    guide_error = float(np.hypot(q.error(distance.guide_influence, ascending=True), distance.bias) / p.sd)
    return _Part(value, influence, guide_error)


def _cdf_difference(p: Standard, q: Side, distance: Distance) -> _Part:
    """The largest difference; its error is that of the two probabilities there, as if the place were known."""
    below = (p.draws <= distance.largest_at).astype(float)
    of_guide = (q.draws <= distance.largest_at).astype(float)
    return _Part(abs(distance.largest), below, q.error(of_guide), least=least_probability_error(p.effective))


def _median_shift(p: Standard, q: Side) -> _Part:
    median = ordered_quantiles(q.ordered, [0.5])[0]
    value = (median - p.quantiles.median) / p.quantiles.spread
    influence = -p.quantiles.median_influence / p.quantiles.spread - value * p.quantiles.log_spread_influence
    guide_error = q.error(quantile_influence(q.draws, q.ordered, 0.5)) / p.quantiles.spread
    return _Part(value, influence, guide_error)


def _spread_ratio(p: Standard, q: Side) -> Estimate:
    value = spread_of(q.ordered) / p.quantiles.spread
    guide_error = q.error(spread_influence(q)) / p.quantiles.spread
    return Estimate(value, float(np.hypot(value * p.quantiles.log_spread_error, guide_error)))


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
