"""The few quantities that a user cares for, written as text: scalars, contrasts and events; parsed, never evaluated.

    item       = sum [ ("<" | ">" | "<=" | ">=") sum ]
    sum        = product { ("+" | "-") product }
    product    = factor { ("*" | "/") factor }
    factor     = "-" factor | number | scalar | "(" sum ")"
    scalar     = site [ "[" label { "," label } "]" ]

A label is one of the dataset's coords, written as it is (spaces, brackets in pairs and all), or a 0-based position.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from toolkit.modelling.model import Model
from toolkit.modelling.scalars import Scalars, scalars

_ARITHMETIC: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
_COMPARISONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_NAME = re.compile(r"[^\W\d][\w.]*")
# More labels than this are not listed in an error.
_LISTED = 12


@dataclass(frozen=True)
class Node:
    """A number (`value`), a scalar (`name`), or an operation on `parts`; exactly one of the three."""

    value: float | None = None
    name: str = ""
    operation: str = ""
    parts: tuple[Node, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The scalars below, in the order of the text."""
        return (self.name,) if self.name else tuple(name for part in self.parts for name in part.names)

    def evaluate(self, columns: dict[str, np.ndarray]) -> np.ndarray:
        """The value of each draw; division by zero gives infinite values or NaN, as in NumPy."""
        if self.value is not None:
            return np.asarray(self.value)
        if self.name:
            return columns[self.name]
        parts = [part.evaluate(columns) for part in self.parts]
        if len(parts) == 1:
            return -parts[0]
        with np.errstate(divide="ignore", invalid="ignore"):
            return {**_ARITHMETIC, **_COMPARISONS}[self.operation](parts[0], parts[1])


@dataclass(frozen=True)
class Focus:
    """One quantity or event that the user asked for.

    Attributes:
        text: As it was written.
        event: Whether it is an event, whose probability is asked for.
        names: The scalars that it is made of.
        root: The parsed expression.
    """

    text: str
    event: bool
    names: tuple[str, ...]
    root: Node

    def evaluate(self, source: Scalars) -> np.ndarray:
        """The item's value in each draw, (chain, draw); booleans for an event."""
        columns = {name: source.values[:, :, source.names.index(name)] for name in self.names}
        return np.asarray(self.root.evaluate(columns))


def parse_focus(text: str, model: Model) -> Focus:
    """The focus that a text asks for.

    Args:
        text: Such as `"beta[worst area]"`, `"beta[a] - beta[b]"`, `"theta[0, 2] > 0"`.
        model: Whose quantities and coords the names and labels come from.

    Raises:
        ValueError: The text does not follow the grammar, or names a site or a label that the model does not have.
    """
    parser = _Parser(text, model)
    root = parser.item()
    if not root.names:
        raise ValueError(f"Expected a focus that names a quantity, one of {', '.join(parser.sites)}; got '{text}'.")
    return Focus(text.strip(), root.operation in _COMPARISONS, tuple(dict.fromkeys(root.names)), root)


class _Parser:
    """Recursive descent over one text; `place` is where the unread rest begins."""

    def __init__(self, text: str, model: Model) -> None:
        self.text, self.model, self.place = text, model, 0
        self.sites = tuple(quantity.site for quantity in model.quantities)
        # Names exactly as in every table, from the function that makes them.
        empty = {site: np.zeros((1, 1, *model.sites[site].shape)) for site in self.sites}
        named = scalars(model, empty)
        self.scalars = {site: [n for n, s in zip(named.names, named.sites, strict=True) if s == site] for site in empty}

    def item(self) -> Node:
        root = self.sum()
        for symbol in _COMPARISONS:
            if self.take(symbol):
                root = Node(operation=symbol, parts=(root, self.sum()))
                break
        if self.rest():
            if any(self.rest().startswith(symbol) for symbol in _COMPARISONS):
                self.fail("one comparison at most")
            self.fail("an operator (+ - * / < > <= >=) or the end")
        return root

    def sum(self) -> Node:
        return self.chain("+-", self.product)

    def product(self) -> Node:
        return self.chain("*/", self.factor)

    def chain(self, symbols: str, part: Callable[[], Node]) -> Node:
        node = part()
        while self.rest()[:1] and self.rest()[0] in symbols:
            symbol = self.rest()[0]
            self.take(symbol)
            node = Node(operation=symbol, parts=(node, part()))
        return node

    def factor(self) -> Node:
        if self.take("-"):
            return Node(operation="-", parts=(self.factor(),))
        if self.take("("):
            node = self.sum()
            if not self.take(")"):
                self.fail("a closing ')'")
            return node
        if number := _NUMBER.match(self.rest()):
            self.take(number.group())
            return Node(value=float(number.group()))
        return Node(name=self.scalar())

    def scalar(self) -> str:
        rest = self.rest()
        # The longest site name that the text goes on with, so that names may hold any character.
        known = [s for s in self.sites if rest.startswith(s) and not re.match(r"\w", rest[len(s) : len(s) + 1])]
        if known:
            site = max(known, key=len)
        elif name := _NAME.match(rest):
            self.unknown(name.group(), self.sites, "a quantity")
        else:
            self.fail("a number, a quantity or '('")
        self.take(site)
        if self.rest().startswith("["):
            return self.labelled(site, self.bracket())
        if self.scalars[site] != [site]:
            self.fail(f"labels for '{site}', one of {_listed(self.scalars[site])},")
        return site

    def bracket(self) -> str:
        """The text between the bracket that comes next and the one that closes it."""
        start, depth = self.place, 0
        for end in range(start, len(self.text)):
            depth += {"[": 1, "]": -1}.get(self.text[end], 0)
            if depth == 0:
                self.place = end + 1
                return self.text[start + 1 : end]
        return self.fail("a closing ']'")

    def labelled(self, site: str, inside: str) -> str:
        """The scalar's name, from labels as they stand in tables, or else label by label."""
        shape = self.model.sites[site].shape
        if not shape:
            raise ValueError(f"Expected no labels for '{site}', which is one number; got '{site}[{inside}]'.")
        inside = " ".join(inside.split())
        for name in self.scalars[site]:
            if name == f"{site}[{inside}]":
                return name
        parts = [part.strip() for part in inside.split(",")]
        if len(parts) != len(shape):
            raise ValueError(
                f"Expected {len(shape)} label{'s' if len(shape) > 1 else ''} for '{site}' "
                f"({', '.join(self.model.dims(site))}); got '{site}[{inside}]': one of {_listed(self.scalars[site])}."
            )
        index = [
            self.position(site, dim, size, label)
            for dim, size, label in zip(self.model.dims(site), shape, parts, strict=True)
        ]
        return self.scalars[site][int(np.ravel_multi_index(index, shape))]

    def position(self, site: str, dim: str, size: int, label: str) -> int:
        labels = [str(value) for value in self.model.dataset.coords.get(dim, range(size))]
        if label in labels:
            return labels.index(label)
        # A position stands in for a label only where no label could be meant by it.
        if label.isdigit() and int(label) < size and not any(known.lstrip("-").isdigit() for known in labels):
            return int(label)
        return self.unknown(label, labels, f"a label of '{site}' along '{dim}'")

    def unknown(self, name: str, known: list[str] | tuple[str, ...], what: str) -> int:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
        hint = f": did you mean {' or '.join(map(repr, close))}?" if close else "."
        raise ValueError(f"Expected {what}, one of {_listed(known)}; got '{name}'{hint}")

    def rest(self) -> str:
        """What is left of the text, without leading spaces."""
        while self.place < len(self.text) and self.text[self.place].isspace():
            self.place += 1
        return self.text[self.place :]

    def take(self, symbol: str) -> bool:
        found = self.rest().startswith(symbol)
        self.place += len(symbol) * found
        return found

    def fail(self, expected: str) -> str:
        got = f"'{self.rest()}'" if self.rest() else "the end"
        raise ValueError(f"Expected {expected} at position {self.place + 1} of '{self.text}'; got {got}.")


def _listed(names: list[str] | tuple[str, ...]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
