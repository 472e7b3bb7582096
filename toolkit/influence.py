"""Monte Carlo errors of functionals of two sets of draws, by their influence functions.

A metric T(p, q) moves, to first order, by the mean of an influence series over the draws of p plus another over the
draws of q. The errors of means, sds and quantiles and all covariances between them are in those two series, so that
one rule serves every metric: the Monte Carlo error of each series' mean, autocorrelation included on the reference's
side (van der Vaart 1998, *Asymptotic Statistics*, sections 20.1 and 21.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpyro as numpyro  # before any ArviZ package, whose lazy NumPyro would else be another one
from arviz_stats.base import array_stats

# A draw's error is not zero where an event was seen in none or all of n draws: 95 % limit 3 / n, over 1.96
# (the rule of three, Hanley & Lippman-Hand 1983).
RULE_OF_THREE = 3.0 / 1.96


def effective_draws(series: np.ndarray) -> float:
    """How many independent draws would give the mean of `series` (chain, draw) the error that it has."""
    scale = series.std()
    if not scale > 0:
        return float(series.size)
    # ArviZ takes a range below 1e-15 for a constant; posterior sds are of any size, so the series is scaled first.
    return float(array_stats.ess((series - series.mean()) / scale, chain_axis=0, draw_axis=1, method="mean"))


def chain_error(series: np.ndarray) -> float:
    """The Monte Carlo standard error of the mean of `series` (chain, draw), autocorrelation included."""
    return float(chain_errors(series[None])[0])


def chain_errors(series: np.ndarray) -> np.ndarray:
    """`chain_error` of several series (series, chain, draw) at once, (series,)."""
    scales = np.empty(series.shape[0])
    # ArviZ takes a range below 1e-15 for a constant, as in `effective_draws`.
    scaled = np.empty(series.shape)
    for i, one in enumerate(series):
        centred = one - one.mean()
        scales[i] = np.sqrt(np.square(centred).mean())
        scaled[i] = centred / scales[i] if scales[i] > 0 else 0.0
    errors = np.where(np.isfinite(scales), 0.0, np.nan)
    varying = np.flatnonzero(scales > 0)
    if varying.size:
        chosen = scaled if varying.size == scales.size else scaled[varying]
        errors[varying] = array_stats.mcse(chosen, chain_axis=1, draw_axis=2, method="mean") * scales[varying]
    return errors


def independent_error(series: np.ndarray) -> float:
    """The standard error of the mean of independent draws."""
    return float(series.std(ddof=1) / np.sqrt(series.size)) if series.size > 1 else float("nan")


def tail_index(series: np.ndarray) -> float:
    """The Pareto index of the upper tail of a series (chain, draw), by ArviZ; minus infinity where it has none.

    The mean is infinite where it is above 1, and above 0.7 no number of draws at hand tells it (Vehtari, Simpson,
    Gelman, Yao & Gabry 2024, Pareto smoothed importance sampling, section 3.2).
    """
    if not np.ptp(series) > 0:
        return -np.inf
    try:
        return float(array_stats.pareto_khat(series, chain_axis=0, draw_axis=1, tail="right"))
    except ValueError:  # too few draws to have a tail, or all of it the same
        return -np.inf


def probability_error(events: np.ndarray, effective: float) -> float:
    """The standard error of an event's probability from autocorrelated draws (chain, draw).

    Args:
        events: Booleans, (chain, draw).
        effective: Effective draws of the variable behind the event; an event that never changes shows none itself.
    """
    return max(chain_error(events.astype(float)), least_probability_error(effective))


def least_probability_error(effective: float) -> float:
    """The rule of three's error: an event that no draw shows has a probability near 0, not of exactly 0."""
    return RULE_OF_THREE / effective


TAIL_LIMIT = 0.7
"""Of a Pareto tail index, for weights and for means (Vehtari, Simpson, Gelman, Yao & Gabry 2024, section 3.2)."""


def level_step(level: float, draws: int) -> float:
    """How far a quantile's level is moved to see a slope: two of its own errors, and never over the end."""
    return float(min(2.0 * np.sqrt(level * (1.0 - level) / draws), 0.5 * level, 0.5 * (1.0 - level)))


def ordered_quantiles(ordered: np.ndarray, levels: Sequence[float]) -> list[float]:
    """Quantiles of sorted draws, linear between neighbours as `numpy.quantile` has them, without its sorting again."""
    places = [level * (ordered.size - 1) for level in levels]
    below = [min(int(place), ordered.size - 2) for place in places]
    return [
        float(ordered[i] + (place - i) * (ordered[i + 1] - ordered[i])) for i, place in zip(below, places, strict=True)
    ]


def quantile_influence(series: np.ndarray, ordered: np.ndarray, level: float) -> np.ndarray:
    """The influence of each draw on the quantile at `level`; `ordered` holds the same draws sorted."""
    step = level_step(level, min(ordered.size, 1_000))
    low, at, high = ordered_quantiles(ordered, [level - step, level, level + step])
    return (level - (series <= at)) * (high - low) / (2.0 * step)
