"""Quantities taken apart into their scalars, each with the name that tables and the focus grammar use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from toolkit.modelling.model import Model, Quantity


@dataclass(frozen=True, eq=False)
class Scalars:
    """Draws of every scalar of every quantity, with names that stay the same over sources.

    Attributes:
        names: `site`, `site[label]` or `site[label, label]`, one for each scalar.
        values: The draws, `(chain, draw, scalar)`, float64. From `scalars`, the draws of one scalar lie together in
            memory, because comparisons run over one scalar at a time.
        sites: The site that each scalar belongs to.
        titles: The quantity's title with the same bracket, for figures and tables.
        units: The quantity's unit, or the empty string.
    """

    names: tuple[str, ...]
    values: np.ndarray
    sites: tuple[str, ...]
    titles: tuple[str, ...]
    units: tuple[str, ...]


def scalars(model: Model, draws: Mapping[str, np.ndarray], quantities: Sequence[Quantity] | None = None) -> Scalars:
    """Every scalar of every quantity, in the order of `model.quantities` and row-major within a site.

    A bracket holds the dataset's coords of the site's dims, or 0-based positions where it has none.

    Args:
        model: Whose quantities, dims and coords name the scalars.
        draws: Site name to `(chain, draw, ...)`; sites that are no quantity are left out.
        quantities: Others than the model's.

    Raises:
        ValueError: A quantity's site is missing from the draws, or has another shape than in the model.
    """
    names: list[str] = []
    titles: list[str] = []
    units: list[str] = []
    sites: list[str] = []
    columns = [np.empty((*_sample(draws), 0))]
    for quantity in model.quantities if quantities is None else quantities:
        brackets = _brackets(model, quantity.site)
        columns.append(_columns(model, quantity.site, draws))
        names += [quantity.site + bracket for bracket in brackets]
        titles += [quantity.title + bracket for bracket in brackets]
        sites += [quantity.site] * len(brackets)
        units += [quantity.unit] * len(brackets)
    return Scalars(tuple(names), _joined(columns), tuple(sites), tuple(titles), tuple(units))


def _joined(columns: Sequence[np.ndarray]) -> np.ndarray:
    """The columns (chain, draw, scalar) side by side, the draws of one scalar together in memory."""
    joined = np.empty((sum(column.shape[2] for column in columns), *columns[0].shape[:2]))
    np.concatenate([np.moveaxis(column, -1, 0) for column in columns], out=joined)
    return np.moveaxis(joined, 0, -1)


def _brackets(model: Model, site: str) -> list[str]:
    """What follows the site's name for each of its scalars; one empty string for a scalar site."""
    shape = model.sites[site].shape
    if not shape:
        return [""]
    axes = [
        [str(label) for label in model.dataset.coords.get(dim, np.arange(size))]
        for dim, size in zip(model.dims(site), shape, strict=True)
    ]
    return [f"[{', '.join(axis[i] for axis, i in zip(axes, index, strict=True))}]" for index in np.ndindex(*shape)]


def _columns(model: Model, site: str, draws: Mapping[str, np.ndarray]) -> np.ndarray:
    if site not in draws:
        raise ValueError(f"Expected draws of quantity '{site}'; got draws of {', '.join(draws) or 'nothing'}.")
    values = np.asarray(draws[site], dtype=np.float64)
    shape = model.sites[site].shape
    if values.ndim < 2 or values.shape[2:] != shape:
        raise ValueError(
            f"Expected draws of '{site}' shaped (chain, draw{''.join(f', {n}' for n in shape)}); got {values.shape}."
        )
    return values.reshape(*values.shape[:2], -1)


def _sample(draws: Mapping[str, np.ndarray]) -> tuple[int, ...]:
    return next((np.shape(values)[:2] for values in draws.values()), (0, 0))
