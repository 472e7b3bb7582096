"""The report as Markdown, for a repository or an issue."""

from __future__ import annotations

import re

from toolkit.reporting.contents import Cell, Contents, Table
from toolkit.reporting.html import environment

_SPECIAL = re.compile(r"([\\`*<>|#~])")


def to_markdown(contents: Contents) -> str:
    """The same contents as the HTML, with figures as links to the files beside it."""
    made = environment().overlay()
    made.filters["md"] = escaped
    made.filters["coded_md"] = _coded
    made.globals["table"] = table_text
    text = made.get_template("report.md.j2").render(report=contents)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def escaped(text: str) -> str:
    """Text in which nothing is read as Markdown or HTML."""
    return _SPECIAL.sub(r"\\\1", text.replace("&", "&amp;").replace("\n", " "))


def _coded(text: str) -> str:
    """The same, but for what stands between two backticks, which stays code."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if number % 2 else escaped(part) for number, part in enumerate(parts))


def table_text(table: Table) -> str:
    """A table in GitHub's form; numbers to the right, the worst of a column in bold."""
    head = " | ".join(escaped(column.title) for column in table.columns)
    rule = " | ".join("---:" if column.numeric else "---" for column in table.columns)
    rows = [" | ".join(_cell(cell) for cell in row) for row in table.rows]
    return "\n".join(f"| {line} |" for line in (head, rule, *rows))


def _cell(cell: Cell) -> str:
    text = escaped(f"{cell.text} ± {cell.error}" if cell.error else cell.text)
    text = f"**{text}**" if cell.marked else text
    return f"{text}<br>{escaped(cell.note)}" if cell.note else text
