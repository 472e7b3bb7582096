"""Blank figures in the report's style, and what becomes of them: SVG for a page, SVG and PNG files."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from toolkit.reporting.palette import COLOURS, PAGE

_STYLE = Path(__file__).parent.parent / "templates" / "report.mplstyle"
# Above this many marks a layer of dots becomes an image inside the SVG, so that a page stays small.
MANY_MARKS = 600
_PIXELS = 170


@contextmanager
def styled() -> Iterator[None]:
    """Run with the report's style and matplotlib's defaults, whatever the user's own settings are."""
    settings = dict(mpl.rc_params_from_file(_STYLE, use_default_template=True))
    settings.pop("backend", None)
    with mpl.rc_context(settings):
        yield


def blank(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure of so many inches with its axes `(rows, columns)`; to be called inside `styled`."""
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def page_svg(figure: Figure, name: str, alt: str) -> str:
    """The figure as an SVG element for a page: colours by the page's custom properties, ids of its own, alt text."""
    text = _saved(figure, "svg").decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\s*<g id="figure_\d+">', "<g>", text, count=1)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\1{name}-", text)
    for colour in COLOURS:
        text = re.sub(f"{colour.light}(?![0-9a-f])", f"var(--{colour.name})", text, flags=re.IGNORECASE)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", text)
    text = re.sub(r"\n\s*", "\n", re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL))
    width = figure.get_size_inches()[0] * 96
    opening = f'<svg role="img" aria-label="{_attribute(alt)}" style="width: {width:.0f}px" '
    box = re.search(r'viewBox="[^"]*"', text)
    return opening + (box.group() if box else "") + text[text.index(">") :]


def file_svg(figure: Figure) -> bytes:
    """The figure as an SVG file on white; the same bytes for the same figure."""
    return _saved(figure, "svg", facecolor=PAGE.light)


def file_png(figure: Figure) -> bytes:
    """The figure as a PNG file on white."""
    return _saved(figure, "png", facecolor=PAGE.light, dpi=_PIXELS)


def _saved(figure: Figure, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if form == "svg" else {"Software": None}
    with styled(), warnings.catch_warnings():
        # A label in a script that the font lacks is drawn as boxes in the PNG and right on the page.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(buffer, format=form, metadata=metadata, **({"dpi": _PIXELS} | options))
    return buffer.getvalue()


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")


def plain(text: str, most: int = 34) -> str:
    """A name for a figure: cut in its middle if long, and never read as mathematics."""
    if len(text) > most:
        text = text[: most // 2 - 1] + "…" + text[-(most - most // 2) :]
    return text.replace("$", r"\$")


_RATIOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0)


def ratio_axis(axes: Axes, values: Sequence[float] | np.ndarray, *, vertical: bool = True) -> None:
    """A log axis for ratios, wide enough for the values and for 0.8 to 1.25, with ticks that a reader can say."""
    finite = np.asarray([v for v in np.ravel(values) if np.isfinite(v) and v > 0] or [1.0])
    low = max(min(finite.min() / 1.12, 0.8), 0.005)
    high = min(max(finite.max() * 1.12, 1.25), 200.0)
    ticks = [t for t in _RATIOS if low <= t <= high]
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
