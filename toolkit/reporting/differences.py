"""The comparison's long table turned into one row for each guide and quantity, with one number to sort by."""

from __future__ import annotations

import numpy as np
import pandas as pd

from toolkit.comparison.tables import quantity_verdicts
from toolkit.comparison.verdicts import Thresholds

COLUMNS = ("shift", "shift_se", "ratio", "ratio_se", "error", "verdict")


def differences(table: pd.DataFrame, thresholds: Thresholds) -> pd.DataFrame:
    """Shift, sd ratio and their errors by (guide, quantity), in the order of the table.

    Where moments have no usable error (heavy tails), the comparison holds `median_shift` and `spread_ratio` beside
    `shift` and `sd_ratio`, and decides by them; they take the place of the moments here.

    Columns: shift, shift_se (reference sd); ratio, ratio_se; error: the larger of |shift| and |log ratio|, each
    divided by the threshold on its side up to which it counts as right, so that 1 is the limit; verdict: of the
    quantity.
    """
    if table.empty:
        return pd.DataFrame(columns=list(COLUMNS), index=pd.MultiIndex.from_tuples([], names=["guide", "quantity"]))
    wide = table.pivot_table(
        index=["guide", "quantity"], columns="metric", values=["value", "se"], aggfunc="first", sort=False
    )
    parts = {}
    for name, metrics in (("shift", ("median_shift", "shift")), ("ratio", ("spread_ratio", "sd_ratio"))):
        for column, suffix in (("value", ""), ("se", "_se")):
            parts[name + suffix] = _first(wide, [(column, metric) for metric in metrics])
    frame = pd.DataFrame(parts, index=wide.index)
    low, high = thresholds.sd_ratio
    with np.errstate(divide="ignore", invalid="ignore"):
        width = np.log(frame["ratio"]) / np.log(np.where(frame["ratio"] < 1, low, high))
    frame["error"] = np.fmax(frame["shift"].abs() / thresholds.shift, width)
    verdicts = {
        (guide, quantity): verdict.value
        for guide, rows in table.groupby("guide", sort=False)
        for quantity, verdict in quantity_verdicts(rows).items()
    }
    frame["verdict"] = [verdicts.get(key, "") for key in frame.index]
    return frame


def _first(wide: pd.DataFrame, keys: list[tuple[str, str]]) -> pd.Series:
    """The first of these columns that has a value, row by row."""
    found = pd.Series(np.nan, index=wide.index)
    for key in keys:
        if key in wide:
            found = found.fillna(wide[key])
    return found


def worst_first(frame: pd.DataFrame) -> list[str]:
    """Quantities by the largest error that any guide makes on them, largest first."""
    if frame.empty:
        return []
    return list(frame["error"].groupby("quantity", sort=False).max().sort_values(ascending=False, kind="stable").index)
