"""Intervals side by side: the reference as a grey band, each guide on it; and a strip of all quantities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.patches import Rectangle

from toolkit.comparison.verdicts import Thresholds
from toolkit.estimate import decimals
from toolkit.reporting.contents import Picture
from toolkit.reporting.figures.canvas import blank, plain, ratio_axis, segments, styled
from toolkit.reporting.palette import BAND, INK, LINE, RIGHT, SOFT, Look

MOST_ROWS = 20
_QUANTILES = ("q5", "q25", "q50", "q75", "q95")


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
    by_source = {source: own.set_index("quantity").reindex(shown) for source, own in quantities.groupby("source")}
    own = by_source[base]
    guides = [name for name in looks if name in sources and name != base]
    with styled():
        figure, grid = blank(8.6, 0.95 + 0.17 * len(shown) * (1 + 0.42 * len(guides)))
        axes = grid[0, 0]
        _bands(axes, _placed(own, own))
        step = 0.72 / max(len(guides), 1)
        for i, name in enumerate(guides):
            _intervals(axes, step * (i + 0.5) - 0.36, _placed(by_source[name], own), looks[name])
        _dress(axes, own, against)
        handles = [
            axes.plot([], [], look.shape, color=look.mark.light, markersize=5, label=name)[0]
            for name, look in looks.items()
            if name in guides
        ]
        band = Rectangle((0, 0), 1, 1, facecolor=BAND.light, label=against)
        figure.legend(handles=[band, *handles], loc="outside upper left", ncols=min(len(handles) + 1, 5), fontsize=8.5)
    alt = _alt(own, {name: by_source[name] for name in guides}, against)
    reading = (
        f"The grey band is {against}'s 90 % interval, its darker line the median. Each guide's 90 % "
        "interval is thin, its 50 % "
        "interval thick; a guide that is right fills the band from end to end. Rows are sorted by the worst error."
    )
    return Picture("forest", figure, alt, reading)


def _placed(values: pd.DataFrame, own: pd.DataFrame) -> pd.DataFrame:
    """Quantiles, row by row, as distances from the reference's mean in its sd; NaN where the source has none."""
    scale = own["sd"].where(np.isfinite(own["sd"]) & (own["sd"] > 0), 1.0)
    return values[list(_QUANTILES)].sub(own["mean"], axis=0).div(scale, axis=0)


# One collection holds the lines or bands of all rows: an artist for each would cost more than all else in the figure.
def _bands(axes: Axes, at: pd.DataFrame) -> None:
    """The reference's 90 % intervals with their medians."""
    rows = np.arange(len(at))
    bands = [
        Rectangle((low, row - 0.42), high - low, 0.84) for row, low, high in zip(rows, at["q5"], at["q95"], strict=True)
    ]
    axes.add_collection(PatchCollection(bands, facecolor=BAND.light))
    axes.vlines(at["q50"], rows - 0.42, rows + 0.42, color=SOFT.light, linewidth=1)


def _intervals(axes: Axes, below: float, at: pd.DataFrame, look: Look) -> None:
    """A guide's intervals and medians, so far below the middle of each row."""
    heights, colour = np.arange(len(at)) + below, look.mark.light
    axes.hlines(heights, at["q5"], at["q95"], color=colour, linewidth=1)
    axes.hlines(heights, at["q25"], at["q75"], color=colour, linewidth=2.6)
    axes.plot(at["q50"], heights, look.shape, color=colour, markersize=3.4, markeredgewidth=0)


def _dress(axes: Axes, own: pd.DataFrame, against: str) -> None:
    shown = [str(name) for name in own.index]
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
    texts = [_in_units(row) for _, row in own.iterrows()]
    right.set_yticks(range(len(shown)), [plain(text.strip(), 48) for text in texts])
    right.tick_params(axis="y", length=0, labelcolor=SOFT.light, labelsize=8)
    right.spines["right"].set_visible(False)


def _in_units(row: pd.Series) -> str:
    """Median and 90 % interval in the quantity's unit, with the decimals that a tenth of its sd deserves."""
    places = decimals(row["sd"] / 10)
    median, low, high = (f"{round(row[q], places) + 0.0:.{places}f}".replace("-", "−") for q in ("q50", "q5", "q95"))
    return f"{median} [{low}, {high}] {row['unit']}"


def _alt(own: pd.DataFrame, guides: Mapping[str, pd.DataFrame], against: str) -> str:
    width = own["q95"] - own["q5"]
    said = []
    for name, values in guides.items():
        widths = ((values["q95"] - values["q5"]) / width)[width > 0].dropna()
        if len(widths):
            said.append(f"{name}'s are {widths.min():.2f} to {widths.max():.2f} times as wide")
    return f"90 % intervals of {len(own)} quantities against {against}'s: {'; '.join(said) or 'no guide to show'}."


def strip(frame: pd.DataFrame, looks: Mapping[str, Look], thresholds: Thresholds, against: str) -> Picture:
    """The sd ratio of every quantity as a mark on one line for each guide."""
    with styled():
        figure, grid = blank(8.6, 0.75 + 0.4 * len(looks))
        axes = grid[0, 0]
        ratio_axis(axes, frame["ratio"].to_numpy(), vertical=False)
        axes.set_ylim(len(looks) - 0.45, -0.55)
        axes.axvspan(*thresholds.sd_ratio, color=RIGHT.light)
        axes.axvline(1, color=LINE.light, linewidth=0.7)
        for row, (name, look) in enumerate(looks.items()):
            own = frame.loc[name]["ratio"].to_numpy()
            segments(
                axes,
                (own, row - 0.32),
                (own, row + 0.32),
                color=look.mark.light,
                linewidth=1,
                alpha=0.6,
                rasterized=own.size > 300,
            )
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
