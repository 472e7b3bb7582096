"""Shift against sd ratio: how far, which way, and how narrow each guide is on each quantity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Transform

from toolkit.comparison.verdicts import Thresholds
from toolkit.reporting.contents import Picture
from toolkit.reporting.figures.canvas import MANY_MARKS, blank, plain, ratio_axis, segments, shift_axis, styled, titled
from toolkit.reporting.palette import LINE, RIGHT, Look

_LABELLED = 3
_EDGE = 0.04  # of a panel's height: where dots without a place on the log scale lie


def overview(
    frame: pd.DataFrame, looks: Mapping[str, Look], thresholds: Thresholds, against: str, trusted: bool
) -> Picture:
    """The figure of the first screen: one panel for each guide, one dot for each quantity.

    Args:
        frame: From `differences`.
        looks: How the guides that can be compared are shown, in the order of the panels.
        thresholds: What counts as right.
        against: What the guides are compared with, such as `"NUTS"`.
        trusted: Whether the reference passed its checks.
    """
    columns = min(len(looks), 4)
    rows = math.ceil(len(looks) / columns)
    width = {1: 3.2, 2: 4.2}.get(columns, 4.6)
    with styled():
        figure, axes = blank(width, 0.75 + 1.75 * rows, rows, columns, sharex=True, sharey=True)
        _axes(axes[0, 0], frame, thresholds)
        if axes[0, 0].get_xscale() == "linear":
            # As many ticks as fit: matplotlib would first lay out the panels with the ticks of wider ones.
            most = {1: 7, 2: 4}.get(columns, 3)
            axes[0, 0].xaxis.set_major_locator(MaxNLocator(most, steps=[1, 2, 4, 5, 10], min_n_ticks=3))
        for panel, name in zip(axes.flat, looks, strict=False):
            _panel(panel, frame.xs(name), looks[name], thresholds)
            panel.set_title(titled(name, {1: 34, 2: 24, 3: 18}.get(columns, 13)), color=looks[name].text.light)
        for panel in axes.flat[len(looks) :]:
            panel.set_visible(False)
        figure.supylabel(f"sd ratio to {against} (log)", fontsize=9)
        figure.supxlabel(f"shift of the mean ({against} sd)", fontsize=9)
    reading = "One dot a quantity: right inside the shaded region, too narrow below it, too wide above."
    if not trusted:
        reading = (
            f"One dot for each quantity. {against} failed its checks: distances from it are not errors of a guide."
        )
    return Picture("overview", figure, f"Shift against sd ratio. {finding(frame, thresholds)}", reading)


def shift_and_ratio(frame: pd.DataFrame, looks: Mapping[str, Look], thresholds: Thresholds, against: str) -> Picture:
    """The same with Monte Carlo errors and the names of the worst, one larger panel for each guide."""
    columns = min(len(looks), 3)
    rows = math.ceil(len(looks) / columns)
    with styled():
        figure, axes = blank(
            3.3 * columns + 0.6 * (columns == 1), 0.5 + 3.5 * rows, rows, columns, sharex=True, sharey=True
        )
        _axes(axes[0, 0], frame, thresholds)
        for panel, name in zip(axes.flat, looks, strict=False):
            own = frame.xs(name)
            _panel(panel, own, looks[name], thresholds, bars=True)
            panel.set_title(titled(name, 34), color=looks[name].text.light, pad=44)
            _number_worst(panel, own, looks[name])
            panel.tick_params(labelbottom=True, labelleft=True)
        for panel in axes.flat[len(looks) :]:
            panel.set_visible(False)
        figure.supylabel(f"sd ratio to {against} (log)", fontsize=9)
        figure.supxlabel(f"shift of the mean ({against} sd)", fontsize=9)
    reading = (
        f"Left and right: the guide's mean against {against}'s, in its sd. Up and down: the guide's sd divided by "
        f"{against}'s. Numbers name the worst. "
        "Bars are 95 % Monte Carlo intervals; where one crosses the edge of the shaded region, the draws cannot tell."
    )
    return Picture(
        "shift_and_sd_ratio", figure, f"Shift and sd ratio with errors. {finding(frame, thresholds)}", reading
    )


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


def _panel(axes: Axes, own: Any, look: Look, thresholds: Thresholds, *, bars: bool = False) -> None:
    low, high = thresholds.sd_ratio
    axes.add_patch(
        Rectangle((-thresholds.shift, low), 2 * thresholds.shift, high - low, facecolor=RIGHT.light, edgecolor="none")
    )
    axes.axhline(1, color=LINE.light, linewidth=0.7, zorder=1)
    axes.axvline(0, color=LINE.light, linewidth=0.7, zorder=1)
    many = len(own) > MANY_MARKS // 3
    if bars:
        _error_bars(axes, own, color=look.mark.light, alpha=0.45 if not many else 0.15, rasterized=many)
    zero = (own["ratio"] == 0).to_numpy()
    # No log scale has a place for 0: such dots lie along the lower edge.
    places = (
        (own[~zero], own.loc[~zero, "ratio"], axes.transData),
        (own[zero], np.full(zero.sum(), _EDGE), _along(axes)),
    )
    for rows, height, transform in places:
        axes.plot(
            rows["shift"],
            height,
            look.shape,
            color=look.mark.light,
            markersize=4.2 if not many else 3,
            markeredgewidth=0,
            alpha=0.85 if not many else 0.5,
            rasterized=many,
            transform=transform,
        )
    if zero.any():
        axes.text(0.03, 2.2 * _EDGE, "sd ratio 0:", transform=axes.transAxes, fontsize=8, color=look.text.light)


def _along(axes: Axes) -> Transform:
    """Shifts across, and shares of the panel's height up."""
    return axes.get_xaxis_transform()


def _error_bars(axes: Axes, own: Any, **options: Any) -> None:
    """95 % intervals of shift and ratio; the ratio's on the log scale."""
    shift, ratio = own["shift"].to_numpy(), own["ratio"].to_numpy()
    reach = 1.96 * own["shift_se"].to_numpy()
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # a point mass has a ratio of 0 and no bar
        factor = np.exp(1.96 * own["ratio_se"].to_numpy() / ratio)
    segments(axes, (shift - reach, ratio), (shift + reach, ratio), linewidth=0.6, **options)
    segments(axes, (shift, ratio / factor), (shift, ratio * factor), linewidth=0.6, **options)


def _axes(axes: Axes, frame: pd.DataFrame, thresholds: Thresholds) -> None:
    shift_axis(axes, frame["shift"].to_numpy(), thresholds.shift)
    ratio_axis(axes, frame["ratio"].to_numpy())


def _number_worst(axes: Axes, own: Any, look: Look) -> None:
    """Numbers beside the worst dots, and their names above the panel, where they lie on no other dot."""
    worst = own[own["error"] > 1].sort_values("error", ascending=False).head(_LABELLED)
    names = [f"{i}  {plain(str(name), 36)}" for i, name in enumerate(worst.index, start=1)]
    names += [""] * (_LABELLED - len(names))
    if len(worst) == 0:
        names[0] = "no dot outside the region"
    axes.text(0, 1.03, "\n".join(names), transform=axes.transAxes, va="bottom", fontsize=8, linespacing=1.35)
    for i, (shift, ratio) in enumerate(zip(worst["shift"], worst["ratio"], strict=True), start=1):
        axes.annotate(
            str(i),
            (shift, ratio if ratio > 0 else _EDGE),
            (5, 4),
            xycoords="data" if ratio > 0 else _along(axes),
            textcoords="offset points",
            fontsize=8,
            fontweight="bold",
            color=look.text.light,
        )
