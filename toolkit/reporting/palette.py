"""Colours: one for each guide everywhere, black and grey for the reference, each with its form for dark pages.

Guides take the colours of Okabe & Ito (2008), which readers with any kind of colour vision tell apart; each has a
darker form for text on a white page and a lighter one for dark pages, so that text keeps a contrast of 4.5 (WCAG AA).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Colour:
    """A colour of figures and pages.

    Attributes:
        name: Its CSS custom property, without the leading dashes.
        light: On white; figure files use it, and it is how the colour is found again in a figure's SVG.
        dark: On the dark page.
    """

    name: str
    light: str
    dark: str


PAGE = Colour("page", "#ffffff", "#15171b")
INK = Colour("ink", "#1a1b1e", "#e9eaec")
SOFT = Colour("soft", "#585d65", "#a9afb8")
LINE = Colour("line", "#c9ccd1", "#454a52")
BAND = Colour("band", "#d6d9de", "#434851")
RIGHT = Colour("right", "#dfeadf", "#24382b")
DOTS = Colour("dots", "#8d9299", "#8e949d")
PLAIN = (PAGE, INK, SOFT, LINE, BAND, RIGHT, DOTS)

_MARKS = (
    ("#d55e00", "#e9772c"),
    ("#009e73", "#2ebd93"),
    ("#0072b2", "#4ba4e0"),
    ("#cc79a7", "#dc93ba"),
    ("#e69f00", "#e9ad2e"),
    ("#56b4e9", "#8accf2"),
)
_TEXTS = (
    ("#b04d00", "#f08a45"),
    ("#00734f", "#3fcca1"),
    ("#00639c", "#66b3e8"),
    ("#98436f", "#e3a3c5"),
    ("#855b00", "#efbb4d"),
    ("#1d6c9b", "#9bd4f5"),
)
MARKS = tuple(Colour(f"guide-{i}", *pair) for i, pair in enumerate(_MARKS))
TEXTS = tuple(Colour(f"guide-{i}-text", *pair) for i, pair in enumerate(_TEXTS))
SHAPES = ("o", "s", "^", "D", "v", "P")
COLOURS = (*PLAIN, *MARKS, *TEXTS)

# The default panel keeps its colours whatever else is compared, so that two reports can lie side by side.
_KNOWN = {"mean_field": 0, "low_rank": 1, "full_rank": 2}


@dataclass(frozen=True)
class Look:
    """How one guide is shown: its colour for marks, its colour for text, its marker, its place in the palette."""

    mark: Colour
    text: Colour
    shape: str
    place: int


def looks(guides: Sequence[str]) -> dict[str, Look]:
    """Guide name to how it is shown; a seventh guide repeats the first one's colour with another marker."""
    used = {_KNOWN[name] for name in guides if name in _KNOWN}
    free = iter([i for i in range(len(MARKS)) if i not in used])
    chosen = {}
    for count, name in enumerate(guides):
        place = _KNOWN[name] if name in _KNOWN else next(free, count % len(MARKS))
        shape = SHAPES[(place + count // len(MARKS)) % len(SHAPES)]
        chosen[name] = Look(MARKS[place], TEXTS[place], shape, place)
    return chosen
