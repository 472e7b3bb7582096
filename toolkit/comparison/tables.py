"""From arrays of metrics to the long table, the verdict of each quantity, and the worst of each guide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from toolkit.comparison.metrics import METRICS, QUANTILE_METRICS, Metrics
from toolkit.comparison.verdicts import (
    Thresholds,
    Verdict,
    combine,
    interval,
    is_ratio,
    judge_rows,
    more_draws,
    simultaneous_z,
)
from toolkit.estimate import Estimate

TABLE_COLUMNS = ("guide", "quantity", "metric", "value", "se", "verdict", "more_draws")
PAIR_COLUMNS = ("guide", "quantity_a", "quantity_b", "reference", "guide_value", "difference", "se")
# What the quantity's verdict stands on; with heavy tails, quantiles take the place of moments.
DECIDE, HEAVY_DECIDE = ("shift", "sd_ratio", "coverage_90"), (*QUANTILE_METRICS, "coverage_90")


def metric_rows(
    guide: str, names: Sequence[str], metrics: Metrics, thresholds: Thresholds, *, judged: bool
) -> pd.DataFrame:
    """One guide's rows of the long table.

    Args:
        guide: Its name.
        names: The scalars' names.
        metrics: Their metrics.
        thresholds: What counts as right.
        judged: Whether verdicts may be given; if not, every verdict is the empty string.
    """
    labels: list[tuple[str, str]] = []
    estimates: list[Estimate] = []
    decides: list[str] = []
    for i, name in enumerate(names):
        heavy = bool(metrics.heavy[i])
        for metric in (*METRICS, *QUANTILE_METRICS) if heavy else METRICS:
            value, se = metrics.estimates[metric]
            labels.append((name, metric))
            estimates.append(Estimate(float(value[i]), float(se[i])))
            decisive = judged and metrics.judged[i] and metric in (HEAVY_DECIDE if heavy else DECIDE)
            decides.append(metric if decisive else "")
    verdicts = judge_rows(estimates, decides, thresholds)
    count = sum(verdict is not None for verdict in verdicts)
    rows = [
        (
            guide,
            *label,
            *estimate,
            verdict.value if verdict else "",
            _more_draws(estimate, metric, verdict, thresholds, count),
        )
        for label, estimate, metric, verdict in zip(labels, estimates, decides, verdicts, strict=True)
    ]
    return pd.DataFrame(rows, columns=list(TABLE_COLUMNS))


def _more_draws(estimate: Estimate, metric: str, verdict: Verdict | None, thresholds: Thresholds, count: int) -> float:
    """How many times as many draws an undecided row needs; NaN for any other."""
    return more_draws(estimate, metric, thresholds, count) if verdict is Verdict.CANNOT_TELL else np.nan


def quantity_verdicts(rows: pd.DataFrame) -> dict[str, Verdict]:
    """Each judged quantity of one guide's rows with its verdict over the metrics that decide."""
    decisive = rows[rows["verdict"] != ""]
    found: dict[str, list[Verdict]] = {}
    for name, verdict in zip(decisive["quantity"], decisive["verdict"], strict=True):
        found.setdefault(str(name), []).append(Verdict(verdict))
    return {name: combine(verdicts) for name, verdicts in found.items()}


def worst(rows: pd.DataFrame) -> dict[str, float | str]:
    """The largest error of each kind over one guide's quantities, with its se and whose it is.

    It is a maximum over noise: with many quantities it is above 0 although nothing differs. `_least` and `_most` are
    the ends of an interval for the true worst, from intervals that hold for all quantities at once with 95 %
    (`verdicts.simultaneous_z`). Quantities with heavy tails have no moments to take part with.
    """
    heavy = set(rows.loc[rows["metric"].isin(QUANTILE_METRICS), "quantity"])
    moments = rows[~rows["quantity"].isin(heavy)]
    result: dict[str, float | str] = {}
    row: dict[Any, Any]
    for metric, own, distance in (
        ("shift", moments, np.abs),
        ("sd_ratio", moments, lambda v: np.abs(np.log(np.maximum(v, np.finfo(float).tiny)))),
        ("coverage_90", rows, lambda v: np.abs(v - 0.9)),
    ):
        candidates = own[own["metric"] == metric].dropna(subset=["value"])
        if candidates.empty:
            row = {"value": np.nan, "se": np.nan, "quantity": "", "least": np.nan, "most": np.nan}
        else:
            row = candidates.iloc[int(np.argmax(distance(candidates["value"].to_numpy())))].to_dict()
            row |= dict(zip(("least", "most"), _range_of_worst(candidates, metric), strict=True))
        result |= {
            f"worst_{metric}_least": row["least"],
            f"worst_{metric}_most": row["most"],
            f"worst_{metric}": row["value"],
            f"worst_{metric}_se": row["se"],
            f"worst_{metric}_quantity": row["quantity"],
        }
    return result


def _range_of_worst(candidates: pd.DataFrame, metric: str) -> tuple[float, float]:
    """Between what the error that is truly the largest lies, as a distance from 0, from a ratio of 1 (its log) or 0.9.

    One of the quantities is at least so far off as the largest of the near ends, none further than the largest of the
    far ones.
    """
    centre, z = {"shift": 0.0, "sd_ratio": 0.0, "coverage_90": 0.9}[metric], simultaneous_z(len(candidates))
    ends = np.array(
        [
            interval(value, se, log=is_ratio(metric), z=z)
            for value, se in zip(candidates["value"], candidates["se"], strict=True)
        ]
    )
    if is_ratio(metric):
        ends = np.log(np.maximum(ends, np.finfo(float).tiny))
    apart = ends - centre
    near = np.where(apart[:, 0] * apart[:, 1] > 0, np.abs(apart).min(axis=1), 0.0)
    return float(near.max()), float(np.abs(apart).max())


def join(frames: Sequence[pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
    """The frames below one another; an empty frame of these columns if there are none."""
    filled = [frame for frame in frames if len(frame)]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=list(columns))
