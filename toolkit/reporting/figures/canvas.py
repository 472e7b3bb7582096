"""Blank figures in the report's style, and what becomes of them: one drawing as SVG for page and file, and a PNG.

Drawing is most of what a report costs, and a layout costs about as much as a drawing: so each figure is laid out and
drawn as SVG once, the page and the SVG file share that drawing, and the PNG takes over its layout.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from toolkit.reporting.palette import COLOURS, PAGE

_STYLE = Path(__file__).parent.parent / "templates" / "report.mplstyle"
# Above this many marks a layer of dots becomes an image inside the SVG, so that a page stays small.
MANY_MARKS = 600
_PIXELS = 170
_GEOMETRY, _FINER = re.compile(r' (?:d|x|y)="[^"]*"'), re.compile(r"(?<=\.\d\d)\d+")
# Two thirds of the time of the default level, for files that are larger by an eighth.
_COMPRESSION = 3


@contextmanager
def styled() -> Iterator[None]:
    """Run with the report's style and matplotlib's defaults, whatever the user's own settings are."""
    with mpl.rc_context(_settings()):
        yield


@cache
def _settings() -> dict[Any, Any]:
    settings = dict(mpl.rc_params_from_file(_STYLE, use_default_template=True))
    settings.pop("backend", None)
    return settings


def blank(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure of so many inches with its axes `(rows, columns)`; to be called inside `styled`."""
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def drawn(figure: Figure) -> str:
    """The figure as an SVG document on no ground, the same text for the same figure; its layout is settled by this."""
    buffer, own = io.StringIO(), figure.get_dpi()
    with _drawing():
        # What is an image inside the SVG has the PNG's resolution.
        figure.set_dpi(_PIXELS)
        try:
            # Figure.savefig would lay out with one renderer and draw with another, which measures every text again.
            FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
        finally:
            figure.set_dpi(own)
        figure.set_layout_engine("none")
    # A hundredth of a point is finer than any screen; matplotlib writes millionths.
    return _GEOMETRY.sub(lambda found: _FINER.sub("", found.group()), buffer.getvalue())


def page_svg(drawing: str, name: str, alt: str) -> str:
    """The drawing as an SVG element for a page: colours by the page's custom properties, ids of its own, alt text."""
    text = drawing[drawing.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\s*<g id="figure_\d+">', "<g>", text, count=1)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\1{name}-", text)
    for colour in COLOURS:
        text = re.sub(f"{colour.light}(?![0-9a-f])", f"var(--{colour.name})", text, flags=re.IGNORECASE)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", text)
    text = re.sub(r"\n\s*", "\n", re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL))
    box = re.search(r'viewBox="0 0 (\S+) \S+"', text)
    assert box, "matplotlib states the size of its drawings"
    width = float(box.group(1)) * 96 / 72
    opening = f'<svg role="img" aria-label="{_attribute(alt)}" style="width: {width:.0f}px" '
    return opening + box.group() + text[text.index(">") :]


def file_svg(drawing: str) -> bytes:
    """The drawing as an SVG file on white."""
    # The ground is the first patch of the figure.
    return drawing.replace("fill: none", f"fill: {PAGE.light}", 1).encode()


def file_png(figure: Figure) -> bytes:
    """The figure as a PNG file on white."""
    buffer = io.BytesIO()
    with _drawing():
        figure.savefig(
            buffer,
            format="png",
            metadata={"Software": None},
            facecolor=PAGE.light,
            dpi=_PIXELS,
            pil_kwargs={"compress_level": _COMPRESSION},
        )
    return buffer.getvalue()


@contextmanager
def _drawing() -> Iterator[None]:
    with styled(), warnings.catch_warnings():
        # A label in a script that the font lacks is drawn as boxes in the PNG and right on the page.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")


def plain(text: str, most: int = 34) -> str:
    """A name for a figure: cut in its middle if long, and never read as mathematics."""
    if len(text) > most:
        text = text[: most // 2 - 1] + "…" + text[-(most - most // 2) :]
    return text.replace("$", r"\$")


def titled(text: str, most: int) -> str:
    """A guide's name above a panel, in lines of at most so many characters where it can be broken: at a _ or an @."""
    lines = [""]
    for piece in re.split(r"(?<=_)|(?=@)", text):
        if lines[-1] and len(lines[-1] + piece) > most:
            lines.append("")
        lines[-1] += piece
    return "\n".join(plain(line) for line in lines)


def segments(axes: Axes, starts: Sequence[Any], ends: Sequence[Any], **options: Any) -> None:
    """Straight lines from starts to ends, each the (x, y) of all lines, on axes whose scales and limits are set.

    What `Axes.hlines`, `vlines` and `errorbar` draw, sooner: the scales are applied here to all ends at once, and not
    line by line in each drawing.
    """
    corners = np.stack([np.broadcast_arrays(*starts), np.broadcast_arrays(*ends)]).astype(float).transpose(2, 0, 1)
    scaled = axes.transScale.transform(corners.reshape(-1, 2)).reshape(corners.shape)
    lines = LineCollection(list(scaled), transform=axes.transLimits + axes.transAxes, **options)
    axes.add_collection(lines, autolim=False)


_MOST_EXTREME = (1e-6, 1e6)  # a fit that has run off may be beyond, and is not what the others are to be seen beside
_RATIOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0)
_NEAR_ONE = (0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.4)


def ratio_axis(axes: Axes, values: Sequence[float] | np.ndarray, *, vertical: bool = True) -> None:
    """A log axis for ratios, wide enough for the values and for 0.8 to 1.25, with ticks that a reader can say."""
    finite = np.asarray([v for v in np.ravel(values) if np.isfinite(v) and v > 0] or [1.0])
    finite = np.clip(finite, *_MOST_EXTREME)
    low, high = min(finite.min() / 1.12, 0.8), max(finite.max() * 1.12, 1.25)
    decades = [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    ticks = [t for t in _RATIOS if low <= t <= high] if _RATIOS[0] <= low and high <= _RATIOS[-1] else decades
    if len(ticks) < 3:
        ticks = [t for t in _NEAR_ONE if low <= t <= high]
    while len(ticks) > 7:
        ticks = [t for i, t in enumerate(ticks) if i % 2 == ticks.index(1.0) % 2]
    axis = axes.yaxis if vertical else axes.xaxis
    (axes.set_yscale if vertical else axes.set_xscale)("log")
    (axes.set_ylim if vertical else axes.set_xlim)(low, high)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def shift_axis(axes: Axes, values: Sequence[float] | np.ndarray, least: float) -> None:
    """A symmetric axis for shifts; beyond 3 sd it turns logarithmic on both sides of ±1 sd."""
    finite = np.abs([v for v in np.ravel(values) if np.isfinite(v)] or [0.0])
    reach = max(float(finite.max()) * 1.15, 2.2 * least)
    if reach > 3.0:
        axes.set_xscale("symlog", linthresh=1.0, linscale=1.0)
        ticks = [t for t in (1.0, 10.0, 100.0, 1_000.0, 10_000.0) if t <= reach]
        axes.xaxis.set_major_locator(FixedLocator([-t for t in ticks[::-1]] + [0.0] + ticks))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))
    axes.set_xlim(-reach, reach)
