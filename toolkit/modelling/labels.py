"""Labels that may switch: which sites carry them, and how draws are brought to one labelling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment


@dataclass(frozen=True)
class Labels:
    """Exchangeable labels of a model, such as the topics of a topic model.

    Attributes:
        axes: Site name to the axis that carries the label, counted from the end (-1 is the last).
        by: The site whose rows are matched; each label's values are compared by their squared distance.
        count: How many labels there are; the posterior has `count!` equal copies.

    Raises:
        ValueError: `by` is not among `axes`, an axis is not counted from the end, or there are no two labels.
    """

    axes: Mapping[str, int]
    by: str
    count: int

    def __post_init__(self) -> None:
        if self.by not in self.axes:
            raise ValueError(f"Expected labels to be matched by one of {sorted(self.axes)}; got '{self.by}'.")
        forward = sorted(site for site, axis in self.axes.items() if axis >= 0)
        if forward:
            raise ValueError(f"Expected axes counted from the end (-1 is the last); got others for {forward}.")
        if self.count < 2:
            raise ValueError(f"Expected at least 2 labels; got {self.count}.")

    @property
    def log_copies(self) -> float:
        """log(count!): what a fit that sits on one labelling lacks in log evidence, in nats."""
        return math.lgamma(self.count + 1)

    def relabel(self, draws: Mapping[str, np.ndarray], anchor: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The same draws, each permuted to the labelling nearest to one anchor.

        Args:
            draws: Site name to `(chain, draw, ...)`. Sites without labels pass through.
            anchor: The value of the site `by` to match, without sample dimensions; if not given, it is found
                from the draws: the last draw of the first chain, then twice the mean of what was relabelled to it.

        Raises:
            ValueError: The site `by` is not among the draws, or a site's axis does not hold `count` labels.
        """
        if self.by not in draws:
            raise ValueError(f"Expected draws of site '{self.by}' to match labels by; got {sorted(draws)}.")
        self._check_axes(draws)
        rows = np.moveaxis(np.asarray(draws[self.by]), self.axes[self.by], 2)
        rows = rows.reshape(*rows.shape[:3], -1)
        if anchor is None:
            target = rows[0, -1]
            for _ in range(2):
                order = _assignments(rows, target)
                target = np.take_along_axis(rows, order[..., None], axis=2).mean(axis=(0, 1))
        else:
            target = np.moveaxis(np.asarray(anchor), self.axes[self.by], 0)
            target = target.reshape(self.count, -1)
        order = _assignments(rows, target)
        return {
            site: _permuted(np.asarray(values), order, self.axes[site]) if site in self.axes else np.asarray(values)
            for site, values in draws.items()
        }

    def orders(self, values: np.ndarray, anchor: np.ndarray) -> np.ndarray:
        """For each draw of the site `by`, `(draws, ...)`, which of its labels stands at each place of the anchor.

        Args:
            values: Draws of the site `by`, `(draws, ...)`.
            anchor: A value of that site.

        Returns:
            Label numbers, `(draws, count)`: 0, 1, 2, ... for a draw that has the anchor's labelling already.
        """
        axis = self.axes[self.by]
        rows = np.moveaxis(np.asarray(values)[None], axis, 2)
        target = np.moveaxis(np.asarray(anchor), axis, 0).reshape(self.count, -1)
        return _assignments(rows.reshape(*rows.shape[:3], -1), target)[0]

    def permuted(self, values: Mapping[str, np.ndarray], order: Sequence[int]) -> dict[str, np.ndarray]:
        """One draw's values with the labels in another order; sites without labels pass through.

        Raises:
            ValueError: A site's axis does not hold `count` labels.
        """
        for site, axis in self.axes.items():
            shape = np.shape(values[site]) if site in values else None
            if shape is not None and (len(shape) + axis < 0 or shape[axis] != self.count):
                raise ValueError(f"Expected {self.count} labels on axis {axis} of site '{site}'; got shape {shape}.")
        return {
            site: np.take(value, np.asarray(order), axis=self.axes[site]) if site in self.axes else value
            for site, value in values.items()
        }

    def _check_axes(self, draws: Mapping[str, np.ndarray]) -> None:
        for site, axis in self.axes.items():
            shape = np.shape(draws[site]) if site in draws else None
            if shape is not None and (len(shape) + axis < 2 or shape[axis] != self.count):
                raise ValueError(
                    f"Expected draws of '{site}' as (chain, draw, ...) with {self.count} labels on axis {axis}; "
                    f"got shape {shape}."
                )


def _assignments(rows: np.ndarray, target: np.ndarray) -> np.ndarray:
    """For each draw, which of its labels stands at each place of the target; shape (chain, draw, label)."""
    # Squared distances summed over a whole assignment differ by their cross terms alone.
    cost = -target @ np.swapaxes(rows, -1, -2)
    order = np.empty(rows.shape[:3], dtype=int)
    for index in np.ndindex(rows.shape[:2]):
        order[index] = linear_sum_assignment(cost[index])[1]
    return order


def _permuted(values: np.ndarray, order: np.ndarray, axis: int) -> np.ndarray:
    moved = np.moveaxis(values, axis, 2)
    index = order.reshape(order.shape + (1,) * (moved.ndim - 3))
    return np.moveaxis(np.take_along_axis(moved, index, axis=2), 2, axis)
