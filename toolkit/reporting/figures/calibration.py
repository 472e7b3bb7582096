"""Whether predictive probabilities and intervals hold: reliability curves, and ranks of what was observed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy.optimize import isotonic_regression

from toolkit.comparison.replicated import IN_SAMPLE, LEFT_OUT
from toolkit.reporting.contents import Picture
from toolkit.reporting.figures.canvas import blank, plain, styled
from toolkit.reporting.palette import BAND, DOTS, INK, SOFT, Look

_MOST_PANELS = 4
_MADE = 200  # sets of outcomes for a band
_TIES = 9  # decimals to which probabilities are told apart


def calibration(predictions: Any, looks: Mapping[str, Look], against: str) -> Picture | None:
    """One panel for each observed site; None where nothing was looked at.

    Args:
        predictions: The comparison's `Predictions`.
        looks: How the guides are shown.
        against: What the reference is called.
    """
    table = predictions.observations
    if table.empty:
        return None
    every = list(dict.fromkeys(table["site"]))
    sites = every[:_MOST_PANELS]
    brier = set(predictions.calibration.loc[predictions.calibration["measure"] == "Brier score", "site"])
    with styled():
        columns = min(len(sites), 2)
        rows = math.ceil(len(sites) / columns)
        figure, grid = blank(4.6 * columns, 0.2 + 3.3 * rows, rows, columns)
        for axes, site in zip(grid.flat, sites, strict=False):
            own = table[table["site"] == site]
            (_reliability if site in brier else _ranks)(axes, own, looks, against)
            axes.set_title(plain(site, 40))
        for axes in grid.flat[len(sites) :]:
            axes.set_visible(False)
        grid.flat[0].legend(fontsize=7.5, handlelength=2.4)
    readings = [f"The first {len(sites)} of {len(every)} observed sites."] if len(every) > len(sites) else []
    if brier & set(sites):
        readings.append(
            "Reliability: among observations with a predicted probability, how often the event came (isotonic "
            "regression: Dimitriadis, Gneiting and Jordan 2021); the diagonal is right, and 95 % of curves would lie "
            f"in the grey band point by point if {against}'s left-out probabilities were."
        )
    if set(sites) - brier:
        readings.append(
            "Ranks: the share of observations whose predictive rank lies below a value, less that value. Left out, the "
            "line stays in the grey band with 95 % if the model is right; below it on the left and above on the right, "
            "predictions are too wide, the other way round too narrow. In sample a model knows each observation "
            "already, so that its line says less; it shows whether a guide differs."
        )
    return Picture("calibration", figure, _alt(predictions.calibration, sites, against), " ".join(readings))


def _lines(own: pd.DataFrame, looks: Mapping[str, Look], against: str) -> list[tuple[pd.DataFrame, dict[str, Any]]]:
    """Each source's rows with the look of its line: the reference in sample lies broad below all others."""
    of_reference = own[own["source"] == "reference"]
    inside, outside = (of_reference[of_reference["kind"] == kind] for kind in (IN_SAMPLE, LEFT_OUT))
    lines = [(inside, {"color": DOTS.light, "linewidth": 3.2, "label": f"{against}, {IN_SAMPLE}"})]
    for name, look in looks.items():
        rows = own[own["source"] == name]
        if len(rows):
            lines.append((rows, {"color": look.mark.light, "linewidth": 1.2, "label": plain(name, 26)}))
    if len(outside):
        style = {"color": INK.light, "linewidth": 1.1, "linestyle": "--", "label": f"{against}, {LEFT_OUT}"}
        lines.append((outside, style))
    return lines


def _best(own: pd.DataFrame) -> pd.DataFrame:
    """The reference's left-out rows, or its others where there are none."""
    rows = own[own["source"] == "reference"]
    out = rows[rows["kind"] == LEFT_OUT]
    return out if len(out) else rows


def _reliability(axes: Axes, own: pd.DataFrame, looks: Mapping[str, Look], against: str) -> None:
    points = np.linspace(0, 1, 201)
    chance = _best(own)["value"].to_numpy()
    rng = np.random.default_rng(0)
    made = [_fitted(chance, rng.uniform(size=chance.size) < chance) for _ in range(_MADE)]
    low, high = np.quantile([np.interp(points, *curve) for curve in made], [0.025, 0.975], axis=0)
    axes.fill_between(points, low, high, color=BAND.light, linewidth=0)
    axes.plot([0, 1], [0, 1], color=SOFT.light, linewidth=0.7)
    for rows, style in _lines(own, looks, against):
        axes.plot(*_fitted(rows["value"].to_numpy(), rows["observed"].to_numpy()), **style)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axes.set_xlabel("predicted probability of 1")
    axes.set_ylabel("observed frequency of 1")


def _fitted(chance: np.ndarray, outcomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The frequencies of outcomes that rise with their probabilities, equal probabilities taken together."""
    values, which, counts = np.unique(chance.round(_TIES), return_inverse=True, return_counts=True)
    means = np.bincount(which, outcomes.astype(float)) / counts
    return values, isotonic_regression(means, weights=counts.astype(float)).x


def _ranks(axes: Axes, own: pd.DataFrame, looks: Mapping[str, Look], against: str) -> None:
    """The distribution function of ranks less the diagonal, in Dvoretzky, Kiefer and Wolfowitz's band."""
    points = np.linspace(0, 1, 201)
    # The numbers of one observation rise and fall together: it counts once.
    band = math.sqrt(math.log(2 / 0.05) / (2 * _best(own)["unit"].nunique()))
    axes.fill_between([0, 1], -band, band, color=BAND.light, linewidth=0)
    reach = band
    for rows, style in _lines(own, looks, against):
        ranks = np.sort(rows["value"].to_numpy())
        difference = np.searchsorted(ranks, points, side="right") / ranks.size - points
        reach = max(reach, float(np.abs(difference).max()))
        axes.plot(points, difference, **style)
    axes.set(xlim=(0, 1), ylim=(-1.3 * reach, 1.3 * reach))
    axes.set_xlabel("predictive rank of what was observed")
    axes.set_ylabel("share of observations below − rank")


def _alt(table: pd.DataFrame, sites: list[str], against: str) -> str:
    rows = table[table["site"].isin(sites)]
    said = []
    for (site, measure), group in rows.groupby(["site", "measure"], sort=False):
        values = ", ".join(
            f"{against if row['source'] == 'reference' else row['source']} {row['kind']} {row['value']:.3g}"
            for _, row in group.iterrows()
        )
        said.append(f"{site}, {measure}: {values}")
    return f"Calibration of predictions. {'; '.join(said)}."
