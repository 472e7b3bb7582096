"""Intervals side by side: the reference as a grey band, each guide on it; and a strip of all quantities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from toolkit.comparison.verdicts import Thresholds
from toolkit.estimate import decimals
from toolkit.reporting.contents import Picture
from toolkit.reporting.figures.canvas import blank, plain, ratio_axis, styled
from toolkit.reporting.palette import BAND, INK, LINE, RIGHT, SOFT, Look

MOST_ROWS = 20


def forest(quantities: pd.DataFrame, order: Sequence[str], looks: Mapping[str, Look], against: str) -> Picture:
    """90 % intervals (thin) and 50 % intervals (thick) of the worst quantities, in units of the reference's sd.

    Args:
        quantities: The comparison's table of means, sds and quantiles.
        order: Quantities, the worst first; the first 20 are shown.
        looks: How the guides are shown.
        against: What the grey band is, such as `"NUTS"`; the first source in the table is the band.
    """
    shown = list(order[:MOST_ROWS])
    sources = list(dict.fromkeys(quantities["source"]))
    base = "reference" if "reference" in sources else sources[0]
    values: Any = quantities.set_index(["source", "quantity"])
    guides = [name for name in looks if name in sources and name != base]
    with styled():
        figure, grid = blank(8.6, 0.95 + 0.17 * len(shown) * (1 + 0.42 * len(guides)))
        axes = grid[0, 0]
        for row, name in enumerate(shown):
            _row(axes, row, name, values, base, guides, looks)
        _dress(axes, [values.loc[(base, name)] for name in shown], shown, against)
        handles = [
            axes.plot([], [], look.shape, color=look.mark.light, markersize=5, label=name)[0]
            for name, look in looks.items()
            if name in guides
        ]
        band = Rectangle((0, 0), 1, 1, facecolor=BAND.light, label=against)
        figure.legend(handles=[band, *handles], loc="outside upper left", ncols=min(len(handles) + 1, 5), fontsize=8.5)
    alt = _alt(values, base, shown, guides, against)
    reading = (
        f"The grey band is {against}'s 90 % interval, its darker line the median. Each guide's 90 % "
        "interval is thin, its 50 % "
        "interval thick; a guide that is right fills the band from end to end. Rows are sorted by the worst error."
    )
    return Picture("forest", figure, alt, reading)


def _row(
    axes: Axes,
    row: int,
    name: str,
    values: Any,
    base: str,
    guides: Sequence[str],
    looks: Mapping[str, Look],
) -> None:
    own = values.loc[(base, name)]
    scale = own["sd"] if np.isfinite(own["sd"]) and own["sd"] > 0 else 1.0

    def place(value: float) -> float:
        return float((value - own["mean"]) / scale)

    axes.add_patch(
        Rectangle((place(own["q5"]), row - 0.42), place(own["q95"]) - place(own["q5"]), 0.84, facecolor=BAND.light)
    )
    axes.plot([place(own["q50"])] * 2, [row - 0.42, row + 0.42], color=SOFT.light, linewidth=1)
    step = 0.72 / max(len(guides), 1)
    for i, guide in enumerate(guides):
        if (guide, name) not in values.index:
            continue
        it, height, colour = values.loc[(guide, name)], row - 0.36 + step * (i + 0.5), looks[guide].mark.light
        axes.plot([place(it["q5"]), place(it["q95"])], [height] * 2, color=colour, linewidth=1)
        axes.plot([place(it["q25"]), place(it["q75"])], [height] * 2, color=colour, linewidth=2.6)
        axes.plot(place(it["q50"]), height, looks[guide].shape, color=colour, markersize=3.4, markeredgewidth=0)


def _dress(axes: Axes, rows: Sequence[pd.Series], shown: Sequence[str], against: str) -> None:
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_yticks(range(len(shown)), [plain(name) for name in shown])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"distance from {against}'s mean ({against} sd)")
    axes.margins(x=0.02)
    axes.spines["left"].set_visible(False)
    low, high = axes.get_xlim()
    if high - low > 40:  # a guide that is far off would press everything else into a line
        axes.set_xscale("symlog", linthresh=3.0)
    axes.grid(axis="x")
    right = axes.secondary_yaxis("right")
    texts = [_in_units(row) for row in rows]
    right.set_yticks(range(len(shown)), [plain(text.strip(), 48) for text in texts])
    right.tick_params(axis="y", length=0, labelcolor=SOFT.light, labelsize=8)
    right.spines["right"].set_visible(False)


def _in_units(row: pd.Series) -> str:
    """Median and 90 % interval in the quantity's unit, with the decimals that a tenth of its sd deserves."""
    places = decimals(row["sd"] / 10)
    median, low, high = (f"{round(row[q], places) + 0.0:.{places}f}".replace("-", "−") for q in ("q50", "q5", "q95"))
    return f"{median} [{low}, {high}] {row['unit']}"


def _alt(values: Any, base: str, shown: Sequence[str], guides: Sequence[str], against: str) -> str:
    said = []
    for guide in guides:
        widths = [
            (values.loc[(guide, q), "q95"] - values.loc[(guide, q), "q5"])
            / (values.loc[(base, q), "q95"] - values.loc[(base, q), "q5"])
            for q in shown
            if (guide, q) in values.index and values.loc[(base, q), "q95"] > values.loc[(base, q), "q5"]
        ]
        if widths:
            said.append(f"{guide}'s are {min(widths):.2f} to {max(widths):.2f} times as wide")
    return f"90 % intervals of {len(shown)} quantities against {against}'s: {'; '.join(said) or 'no guide to show'}."


def strip(frame: pd.DataFrame, looks: Mapping[str, Look], thresholds: Thresholds, against: str) -> Picture:
    """The sd ratio of every quantity as a mark on one line for each guide."""
    with styled():
        figure, grid = blank(8.6, 0.75 + 0.4 * len(looks))
        axes = grid[0, 0]
        axes.axvspan(*thresholds.sd_ratio, color=RIGHT.light)
        axes.axvline(1, color=LINE.light, linewidth=0.7)
        for row, (name, look) in enumerate(looks.items()):
            own = frame.loc[name]["ratio"].to_numpy()
            axes.vlines(
                own, row - 0.32, row + 0.32, color=look.mark.light, linewidth=1, alpha=0.6, rasterized=own.size > 300
            )
        ratio_axis(axes, frame["ratio"].to_numpy(), vertical=False)
        axes.set_ylim(len(looks) - 0.45, -0.55)
        axes.set_yticks(range(len(looks)), [plain(name) for name in looks])
        for label, look in zip(axes.get_yticklabels(), looks.values(), strict=True):
            label.set_color(look.text.light)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"sd ratio to {against} (log)", color=INK.light)
    ranges = [
        f"{n} {g['ratio'].min():.2f} to {g['ratio'].max():.2f}" for n, g in frame.groupby(level="guide", sort=False)
    ]
    count = frame.index.get_level_values("quantity").nunique()
    alt = f"Sd ratios of all {count} quantities: {'; '.join(ranges)}."
    return Picture(
        "all_sd_ratios", figure, alt, f"One mark for each of all {count} quantities; shaded is what counts as right."
    )
