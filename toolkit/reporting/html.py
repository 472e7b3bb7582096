"""The report as one HTML file that needs nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from toolkit.reporting.contents import Cell, Contents, Picture, Table, Text
from toolkit.reporting.figures.canvas import page_svg
from toolkit.reporting.palette import COLOURS, SHAPES

TEMPLATES = Path(__file__).parent / "templates"
_FIGURE_SPACE, _POINT_SPACE = "\u2007", "\u2008"


@cache
def environment() -> Environment:
    """Templates that escape all text for HTML; a name that is missing is an error."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=lambda name: (name or "").endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["breakable"] = _breakable
    made.filters["coded"] = _coded
    made.tests["table"] = lambda block: isinstance(block, Table)
    made.tests["picture"] = lambda block: isinstance(block, Picture)
    made.tests["text"] = lambda block: isinstance(block, Text)
    return made


def to_html(contents: Contents, drawings: Mapping[str, str]) -> str:
    """The report as HTML: figures, style and all inside.

    Args:
        contents: The report.
        drawings: Each picture's name to its SVG document.
    """

    def svg(picture: Picture) -> Markup:
        """The picture's SVG; matplotlib has escaped its text."""
        return Markup(page_svg(drawings[picture.name], picture.name, picture.alt))

    template = environment().get_template("report.html.j2")
    return template.render(report=contents, style=Markup(style()), padded=padded, shapes=SHAPES, svg=svg)


def _breakable(text: str) -> Markup:
    """Escaped text that may break inside a class name, before a bracket and at the chart of a guide's name."""
    return Markup(re.sub(r"(?<=[a-z])(?=[A-Z\[])|(?=@)|(?<=_)", "<wbr>", str(escape(text))))


def _coded(text: str) -> Markup:
    """Escaped text, in which what stands between two backticks is set as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def style() -> str:
    """The style sheet, with the palette's colours for light and dark pages."""
    light = "".join(f"--{c.name}:{c.light};" for c in COLOURS)
    dark = "".join(f"--{c.name}:{c.dark};" for c in COLOURS)
    colours = (
        f":root{{color-scheme:light dark;{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
    )
    return colours + (TEMPLATES / "report.css").read_text()


def padded(table: Table, index: int) -> list[tuple[str, str]]:
    """The (value, error) texts of a column, with spaces as wide as digits behind them so that decimals align."""
    cells: list[Cell] = [row[index] for row in table.rows]
    values = [cell.text for cell in cells]
    if not table.columns[index].numeric or not any(_is_number(value) for value in values):
        return [(cell.text, cell.error) for cell in cells]
    longest = max(_decimals(value) for value in values if _is_number(value))
    errors = max((_decimals(cell.error) for cell in cells if cell.error), default=0)
    out = []
    for cell in cells:
        if not _is_number(cell.text):
            out.append((cell.text, cell.error))
            continue
        value = cell.text + _spaces(longest - _decimals(cell.text), "." not in cell.text and longest > 0)
        error = cell.error
        if error:
            error += _spaces(errors - _decimals(error), "." not in error and errors > 0)
        out.append((value, error))
    return out


def _is_number(text: str) -> bool:
    return bool(text) and text.lstrip("−-")[:1].isdigit() and "[" not in text


def _decimals(text: str) -> int:
    return len(text.partition(".")[2]) if _is_number(text) else 0


def _spaces(count: int, point: bool) -> str:
    return (_POINT_SPACE if point else "") + _FIGURE_SPACE * count
