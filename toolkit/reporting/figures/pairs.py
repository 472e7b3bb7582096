"""Relations between quantities: contours over the reference's draws, and correlation matrices side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from scipy.ndimage import gaussian_filter

from toolkit.modelling.scalars import Scalars
from toolkit.reporting.contents import Picture
from toolkit.reporting.figures.canvas import blank, plain, styled
from toolkit.reporting.palette import DOTS, INK, SOFT, Look

MOST_PAIRS = 6
_DOTS_SHOWN, _CELLS = 250, 72
_MATRICES = 4  # of guides, beside the reference's: more are too small to read
# Sky blue and orange of the same palette, clear in the middle, so that white and dark pages both show through.
_SIGNED = LinearSegmentedColormap.from_list(
    "signed", [(0.0, (0.20, 0.56, 0.80, 1.0)), (0.5, (0.5, 0.5, 0.5, 0.0)), (1.0, (0.90, 0.56, 0.0, 1.0))]
)


def worst_pairs(pairs: pd.DataFrame) -> list[tuple[str, str]]:
    """The pairs whose correlation some guide gets most wrong, each quantity at most twice, so that they differ."""
    chosen: list[tuple[str, str]] = []
    uses: dict[str, int] = {}
    for row in pairs.reindex(pairs["difference"].abs().sort_values(ascending=False, kind="stable").index).itertuples():
        pair = (str(row.quantity_a), str(row.quantity_b))
        if pair in chosen or any(uses.get(name, 0) >= 2 for name in pair):
            continue
        chosen.append(pair)
        for name in pair:
            uses[name] = uses.get(name, 0) + 1
        if len(chosen) == MOST_PAIRS:
            break
    return chosen


def pair_contours(
    pairs: pd.DataFrame, sample: Mapping[str, Scalars], looks: Mapping[str, Look], against: str
) -> Picture:
    """Draws of the reference as dots with each guide's 50 % and 90 % contours, for the worst pairs.

    Contours are those of a binned kernel density of the draws (Gaussian, Scott's bandwidth), at the levels that
    hold half and nine tenths of its mass.
    """
    chosen = worst_pairs(pairs)
    columns = min(len(chosen), 3)
    rows = math.ceil(len(chosen) / columns)
    guides = [name for name in looks if name in sample]
    with styled():
        figure, grid = blank(3.05 * columns, 0.3 + 2.75 * rows, rows, columns)
        for axes, (a, b) in zip(grid.flat, chosen, strict=False):
            _pair(axes, a, b, sample, guides, looks)
        for axes in grid.flat[len(chosen) :]:
            axes.set_visible(False)
        handles = [Line2D([], [], marker=".", linestyle="", color=DOTS.light, label=f"{against} draws")]
        handles += [Line2D([], [], color=looks[name].mark.light, label=name) for name in guides]
        figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), 5), fontsize=8.5)
    worst = pairs.iloc[int(pairs["difference"].abs().to_numpy().argmax())]
    shown = "worst pair" if len(chosen) == 1 else f"{len(chosen)} worst pairs"
    alt = (
        f"The {shown}. The largest error of a correlation: {worst['quantity_a']} with {worst['quantity_b']}, "
        f"{worst['reference']:.2f} for {against} and {worst['guide_value']:.2f} for {worst['guide']}."
    )
    reading = (
        f"Dots are {against}'s draws. Of each guide the inner contour holds half of its draws, the "
        "outer one nine tenths "
        "(kernel density, Scott's bandwidth); a guide that is right draws its contours around the "
        "cloud, as tilted and as wide."
    )
    return Picture("worst_pairs", figure, alt, reading)


def _pair(
    axes: Axes, a: str, b: str, sample: Mapping[str, Scalars], guides: Sequence[str], looks: Mapping[str, Look]
) -> None:
    if "reference" in sample:
        x, y = _columns(sample["reference"], a, b)
        every = max(1, math.ceil(x.size / _DOTS_SHOWN))
        axes.plot(x[::every], y[::every], ".", color=DOTS.light, markersize=3.2, markeredgewidth=0, alpha=0.7)
    for name in guides:
        _contours(axes, *_columns(sample[name], a, b), looks[name])
    axes.set_xlabel(plain(a, 30), fontsize=8.5)
    axes.set_ylabel(plain(b, 30), fontsize=8.5)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_locator(MaxNLocator(4))


def _columns(source: Scalars, a: str, b: str) -> tuple[np.ndarray, np.ndarray]:
    values = source.values.reshape(-1, len(source.names))
    x, y = values[:, source.names.index(a)], values[:, source.names.index(b)]
    finite = np.isfinite(x) & np.isfinite(y)
    return x[finite], y[finite]


def _contours(axes: Axes, x: np.ndarray, y: np.ndarray, look: Look) -> None:
    if x.size < 20 or np.ptp(x) == 0 or np.ptp(y) == 0:  # a point mass has no contour
        axes.plot(x[:1], y[:1], look.shape, color=look.mark.light, markersize=5)
        return
    density, xs, ys = binned_density(x, y)
    levels = mass_levels(density, (0.9, 0.5))
    if levels[1] > levels[0]:
        axes.contour(xs, ys, density, levels=levels, colors=[look.mark.light], linewidths=[1.1, 1.6])


def binned_density(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A kernel density on a grid `(y, x)` with the grid's axes; Scott's bandwidth n^(-1/6) along the principal axes.

    The counts are smoothed in whitened coordinates and read back on the grid of x and y, so that a narrow ridge is
    not blurred across.
    """
    points = np.stack([x, y])
    centre = points.mean(1, keepdims=True)
    variances, directions = np.linalg.eigh(np.cov(points))
    scales = np.sqrt(np.maximum(variances, variances.max() * 1e-8))
    white = (directions.T @ (points - centre)) / scales[:, None]
    reach = np.abs(white).max() + 1.0
    edges = np.linspace(-reach, reach, 2 * _CELLS + 1)
    counts = np.histogram2d(white[0], white[1], bins=(edges, edges))[0]
    smooth = gaussian_filter(counts, x.size ** (-1 / 6) / (edges[1] - edges[0]), mode="constant")
    room = [0.12 * np.ptp(values) for values in (x, y)]
    xs = np.linspace(x.min() - room[0], x.max() + room[0], 2 * _CELLS)
    ys = np.linspace(y.min() - room[1], y.max() + room[1], 2 * _CELLS)
    mesh = np.stack(np.meshgrid(xs, ys)).reshape(2, -1)
    place = ((directions.T @ (mesh - centre)) / scales[:, None] + reach) / (edges[1] - edges[0]) - 0.5
    return _bilinear(smooth, place).reshape(ys.size, xs.size), xs, ys


def _bilinear(grid: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Values of a grid at fractional indices `(2, points)`; zero outside."""
    padded = np.pad(grid, 1)
    place = np.clip(place + 1, 0, np.array(padded.shape)[:, None] - 1.001)
    i, j = place.astype(int)
    u, v = place - np.floor(place)
    upper = padded[i, j] * (1 - v) + padded[i, j + 1] * v
    lower = padded[i + 1, j] * (1 - v) + padded[i + 1, j + 1] * v
    return upper * (1 - u) + lower * u


def mass_levels(density: np.ndarray, masses: Sequence[float]) -> list[float]:
    """The densities above which these shares of the mass lie."""
    falling = np.sort(density.ravel())[::-1]
    held = np.cumsum(falling)
    return [float(falling[min(np.searchsorted(held, mass * held[-1]), falling.size - 1)]) for mass in masses]


def correlation_matrices(correlations: Mapping[str, pd.DataFrame], looks: Mapping[str, Look], against: str) -> Picture:
    """Correlation matrices of the reference and each guide; below each guide its difference from the reference."""
    # A point has no correlations.
    guides = [name for name in looks if name in correlations and correlations[name].notna().any(axis=None)]
    reference = correlations["reference"]
    worst = {name: (correlations[name] - reference).abs().max().max() for name in guides}
    chosen = sorted(guides, key=lambda name: -worst[name])[:_MATRICES]
    shown = len(chosen)
    with styled():
        figure, grid = blank(0.7 + 2.2 * (shown + 1), 4.9, 2, shown + 1)
        image = _matrix(grid[0, 0], reference, plain(against), None)
        _names(grid[1, 0], reference)
        for column, name in enumerate((name for name in guides if name in chosen), start=1):
            _matrix(grid[0, column], correlations[name], plain(name), looks[name])
            difference = correlations[name] - reference
            _matrix(grid[1, column], difference, f"largest {worst[name]:.2f}", None)
        grid[1, 1].set_ylabel("guide − reference", color=SOFT.light)
        bar = figure.colorbar(image, ax=grid, shrink=0.6, aspect=30, pad=0.02, ticks=[-1, -0.5, 0, 0.5, 1])
        bar.ax.set_yticklabels(["−1", "−0.5", "0", "0.5", "1"])
        bar.set_label("correlation, and difference of correlations")
        bar.outline.set_visible(False)
    errors = "; ".join(f"{name} {value:.2f}" for name, value in worst.items())
    alt = f"Correlations of {len(reference)} quantities; the largest error: {errors}."
    reading = (
        "Above: each pair's correlation, orange positive, blue negative. Below: the guide's minus "
        f"{against}'s; empty is right. "
        f"Rows and columns are the same {len(reference)} quantities everywhere, in the order of the "
        "table correlations_reference."
    )
    if shown < len(guides):
        reading += f" Drawn are the {shown} guides of {len(guides)} with the largest errors; all have their table."
    return Picture("correlations", figure, alt, reading)


def _matrix(axes: Axes, matrix: pd.DataFrame, title: str, look: Look | None) -> Any:
    image = axes.imshow(matrix.to_numpy(), cmap=_SIGNED, vmin=-1, vmax=1, interpolation="nearest", aspect="equal")
    axes.set_title(title, fontsize=9, color=look.text.light if look else INK.light)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(True)
    return image


def _names(axes: Axes, matrix: pd.DataFrame) -> None:
    """The empty place below the reference names the rows, from the top."""
    axes.set_axis_off()
    names = [plain(str(name), 26) for name in matrix.index]
    most = 9
    lines = [f"{i + 1}  {name}" for i, name in enumerate(names[:most])]
    lines += [f"… {len(names) - most} more"] if len(names) > most else []
    axes.text(0, 1, "Rows from the top", transform=axes.transAxes, va="top", fontsize=8.5, fontweight="bold")
    axes.text(
        0, 0.88, "\n".join(lines), transform=axes.transAxes, va="top", fontsize=8, color=SOFT.light, linespacing=1.4
    )
