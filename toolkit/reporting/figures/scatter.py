"""Shift against sd ratio: how far, which way, and how narrow each guide is on each quantity."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from toolkit.comparison.verdicts import Thresholds
from toolkit.reporting.contents import Picture
from toolkit.reporting.figures.canvas import MANY_MARKS, blank, plain, ratio_axis, shift_axis, styled
from toolkit.reporting.palette import LINE, RIGHT, SOFT, Look

_LABELLED = 3


def overview(frame: pd.DataFrame, looks: Mapping[str, Look], thresholds: Thresholds, against: str) -> Picture:
    """The figure of the first screen: one panel for each guide, one dot for each quantity.

    Args:
        frame: From `differences`.
        looks: How the guides that can be compared are shown, in the order of the panels.
        thresholds: What counts as right.
        against: What the guides are compared with, such as `"NUTS"`.
    """
    columns = min(len(looks), 4)
    rows = math.ceil(len(looks) / columns)
    width = {1: 3.4, 2: 4.4}.get(columns, 4.9)
    with styled():
        figure, axes = blank(width, 0.75 + 2.3 * rows, rows, columns, sharex=True, sharey=True)
        for panel, name in zip(axes.flat, looks, strict=False):
            _panel(panel, frame.loc[name], looks[name], thresholds)
            panel.set_title(plain(name), color=looks[name].text.light)
        for panel in axes.flat[len(looks) :]:
            panel.set_visible(False)
        _axes(axes[0, 0], frame, thresholds)
        figure.supylabel(f"sd ratio to {against} (log)", fontsize=9)
        figure.supxlabel(f"shift of the mean ({against} sd)", fontsize=9)
    reading = (
        "One dot for each quantity. Inside the shaded region a quantity counts as right; "
        "below it the guide is too narrow, above too wide, left or right of it shifted."
    )
    return Picture("overview", figure, f"Shift against sd ratio. {finding(frame, thresholds)}", reading)


def shift_and_ratio(frame: pd.DataFrame, looks: Mapping[str, Look], thresholds: Thresholds, against: str) -> Picture:
    """The same with Monte Carlo errors and the names of the worst, one larger panel for each guide."""
    columns = min(len(looks), 2)
    rows = math.ceil(len(looks) / columns)
    with styled():
        figure, axes = blank(4.6 * columns, 0.45 + 3.0 * rows, rows, columns, sharex=True, sharey=True)
        for panel, name in zip(axes.flat, looks, strict=False):
            own = frame.loc[name]
            _panel(panel, own, looks[name], thresholds, bars=True)
            panel.set_title(plain(name), color=looks[name].text.light)
            panel.tick_params(labelbottom=True, labelleft=True)
        for panel in axes.flat[len(looks) :]:
            panel.set_visible(False)
        _axes(axes[0, 0], frame, thresholds)
        for panel, name in zip(axes.flat, looks, strict=False):
            _name_worst(panel, frame.loc[name])
        figure.supylabel(f"sd ratio to {against} (log)", fontsize=9)
        figure.supxlabel(f"shift of the mean ({against} sd)", fontsize=9)
    reading = (
        f"Left and right: the guide's mean against {against}'s, in its sd. Up and down: the guide's sd divided by {against}'s. "
        "Bars are 95 % Monte Carlo intervals; where one crosses the edge of the shaded region, the draws cannot tell."
    )
    return Picture("shift_and_sd_ratio", figure, f"Shift and sd ratio with errors. {finding(frame, thresholds)}", reading)


def finding(frame: pd.DataFrame, thresholds: Thresholds) -> str:
    """What the dots show, guide by guide, in words."""
    parts = []
    for name, own in frame.groupby(level="guide", sort=False):
        low, high = own["ratio"].min(), own["ratio"].max()
        inside = int((own["error"] <= 1).sum())
        parts.append(
            f"{name}: {inside} of {len(own)} dots inside the region of right, sd ratios {low:.2f} to {high:.2f}, "
            f"largest shift {own['shift'].abs().max():.2f} sd"
        )
    low, high = thresholds.sd_ratio
    return "; ".join(parts) + f". The region is |shift| up to {thresholds.shift:g} sd and ratios {low:g} to {high:g}."


def _panel(axes: Axes, own: pd.DataFrame, look: Look, thresholds: Thresholds, *, bars: bool = False) -> None:
    low, high = thresholds.sd_ratio
    axes.add_patch(
        Rectangle((-thresholds.shift, low), 2 * thresholds.shift, high - low, facecolor=RIGHT.light, edgecolor="none")
    )
    axes.axhline(1, color=LINE.light, linewidth=0.7, zorder=1)
    axes.axvline(0, color=LINE.light, linewidth=0.7, zorder=1)
    many = len(own) > MANY_MARKS // 3
    if bars:
        ratio_error = 1.96 * own["ratio_se"] / own["ratio"]
        factor = np.exp(ratio_error)
        axes.errorbar(
            own["shift"],
            own["ratio"],
            xerr=1.96 * own["shift_se"],
            yerr=[own["ratio"] * (1 - 1 / factor), own["ratio"] * (factor - 1)],
            fmt="none",
            ecolor=look.mark.light,
            elinewidth=0.6,
            alpha=0.45 if not many else 0.15,
            rasterized=many,
        )
    axes.plot(
        own["shift"],
        own["ratio"],
        look.shape,
        color=look.mark.light,
        markersize=4.2 if not many else 3,
        markeredgewidth=0,
        alpha=0.85 if not many else 0.5,
        rasterized=many,
    )


def _axes(axes: Axes, frame: pd.DataFrame, thresholds: Thresholds) -> None:
    shift_axis(axes, frame["shift"].to_numpy(), thresholds.shift)
    ratio_axis(axes, frame["ratio"].to_numpy())


def _name_worst(axes: Axes, own: pd.DataFrame) -> None:
    """Names beside the worst dots, on the side that has room, spread so that no two lie on each other."""
    worst = own[own["error"] > 1].sort_values("error", ascending=False).head(_LABELLED)
    to_display, back = axes.transData.transform, axes.transAxes.inverted().transform
    axes.figure.draw_without_rendering()
    spots = [(back(to_display((row["shift"], row["ratio"]))), name) for name, row in worst.iterrows()]
    taken: dict[bool, list[float]] = {True: [], False: []}
    for (x, y), name in sorted(spots, key=lambda spot: spot[0][1]):
        right = x < 0.5
        height = max([float(y), *(other + 0.065 for other in taken[right])])
        taken[right].append(height)
        axes.annotate(
            plain(str(name), 26),
            (x, y),
            (x + (0.03 if right else -0.03), height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            ha="left" if right else "right",
            va="center",
            fontsize=8,
            color=SOFT.light,
            annotation_clip=False,
        )
