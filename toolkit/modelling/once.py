"""What a model's program says of itself, found out once: to trace it takes milliseconds, a small fit not many more."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from toolkit.modelling.model import Model


class _OfAChart[T](Protocol):
    def __call__(self, model: Any, chart: str | None = None) -> T: ...


def once_a_chart[T](found_out: Callable[[Any, str], T]) -> _OfAChart[T]:
    """A function of a model and a chart (the model's own choice if None) that runs once for each of these.

    Models are frozen, and what is found out must follow from their program and the shapes of their data.
    """
    known: WeakKeyDictionary[Model, dict[str, T]] = WeakKeyDictionary()

    @wraps(found_out)
    def remembered(model: Model, chart: str | None = None) -> T:
        answers, chart = known.setdefault(model, {}), model.chart if chart is None else chart
        if chart not in answers:
            answers[chart] = found_out(model, chart)
        return answers[chart]

    return remembered
