"""What a report says, before it is HTML or Markdown: both are made from the same `Contents`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Column:
    """A column of a table: its head, what it means, and whether it holds numbers."""

    title: str
    meaning: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class Cell:
    """An entry of a table.

    Attributes:
        text: The value.
        error: Its standard error, or the empty string.
        marked: Whether it is the worst of its column.
        note: A second, smaller line.
        place: The palette's place of the guide that the cell names, or None.
    """

    text: str
    error: str = ""
    marked: bool = False
    note: str = ""
    place: int | None = None


@dataclass(frozen=True)
class Table:
    """A small table that is read; the first cell of each row is its head.

    Attributes:
        caption: What it shows.
        columns: The columns.
        rows: The cells, row by row.
        explained: Whether the text below the table says what its columns mean.
    """

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    explained: bool = True


@dataclass(frozen=True)
class Picture:
    """A figure with what it shows and how to read it.

    Attributes:
        name: Its file's name.
        figure: The matplotlib figure.
        alt: Its finding, for readers who do not see it.
        reading: One sentence on how to read it.
    """

    name: str
    figure: Any
    alt: str
    reading: str


@dataclass(frozen=True)
class Text:
    """Text set as it is: the model in tilde notation, source code, the command."""

    title: str
    text: str
    folded: bool = False


Block = str | Table | Picture | Text


@dataclass(frozen=True)
class Section:
    """One question with what answers it: paragraphs, tables and figures, in the order of reading."""

    anchor: str
    question: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Answer:
    """A guide's verdict on the first screen.

    Attributes:
        name: The guide's name.
        place: The palette's place of the guide.
        verdict: `"right"`, `"wrong"`, `"cannot tell"`, or empty where none is given.
        sentence: The verdict in words.
        time: The seconds, and how they compare with the reference's.
        whose: Whether what is wrong is the family's or may be the optimiser's; empty if nothing is wrong.
    """

    name: str
    place: int
    verdict: str
    sentence: str
    time: str
    whose: str = ""


@dataclass(frozen=True)
class Contents:
    """A whole report.

    Attributes:
        title: The model's title.
        facts: Dataset, seed, machine, seconds, version.
        question: What the model is asked; may be empty.
        warning: Why there are no verdicts, or empty; `reasons` are its details.
        overall: The study's verdict in a sentence.
        answers: The verdicts.
        health: The reference in one line.
        focus: The user's own quantities, or None.
        guides: One table of all guides.
        room: How much room there is below the log evidence, and whose; None where nothing is known of it.
        overview: The figure that says most, or None where nothing can be compared.
        next_steps: Sentences on what to do.
        commands: What to run next: with another seed, or, where the reference failed, what may mend it.
        sections: What stands below the first screen.
    """

    title: str
    facts: tuple[str, ...]
    question: str
    warning: str
    reasons: tuple[str, ...]
    overall: str
    answers: tuple[Answer, ...]
    health: str
    focus: Table | None
    guides: Table
    room: Picture | None
    overview: Picture | None
    next_steps: tuple[str, ...]
    commands: tuple[str, ...]
    sections: tuple[Section, ...] = field(default=())

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """Every figure, in the order of reading."""
        inside = [block for section in self.sections for block in section.blocks if isinstance(block, Picture)]
        return (*(picture for picture in (self.room, self.overview) if picture), *inside)
