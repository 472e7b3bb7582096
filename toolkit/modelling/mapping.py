"""A function of one draw, over many draws: compiled once for a model, in pieces that memory allows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import jax
import numpy as np

from toolkit.compilation import QUICK
from toolkit.modelling.model import Model

_BATCH = 64  # draws that are computed side by side
_BATCH_SCALARS = 2_000_000  # all sites counted, in one batch; 16 MB each
_PIECE = 1_000  # draws in one call of a program, whatever the number of draws is

_programs: WeakKeyDictionary[Model, dict[Any, Any]] = WeakKeyDictionary()


def over_draws(
    model: Model,
    name: tuple[Hashable, ...],
    one: Callable[[Any, Any, Any], Any],
    given: Any,
    shared: Mapping[str, Any],
    piece: int = _PIECE,
) -> Any:
    """The results of `one` for each row of `given`, by a program that serves every set of rows of the model.

    Args:
        model: The model.
        name: What the program is called: the same name means the same program.
        one: From a row, the model's arrays and what is shared to any tree of arrays.
        given: A tree of arrays with the rows along their first axis.
        shared: What all rows have in common, such as parameters; a program is of the names and shapes that it was
            compiled with.
        piece: Rows in one call.
    """
    scalars = sum(int(np.prod(site.shape)) for site in model.sites.values())
    batch = max(1, min(_BATCH, _BATCH_SCALARS // max(scalars, 1)))
    rows = len(jax.tree.leaves(given)[0])
    key = (
        *name,
        piece,
        *((part, np.shape(value), np.asarray(value).dtype.name) for part, value in sorted(shared.items())),
    )

    def many(given: Any, arrays: Any, shared: Any) -> Any:
        return jax.lax.map(lambda row: one(row, arrays, shared), given, batch_size=batch)

    # NumPyro's stick-breaking of several simplexes at once adds a vector to a matrix.
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        pieces = []
        for begin in range(0, rows, piece):
            part = jax.tree.map(lambda values, first=begin: _padded(values[first : first + piece], piece), given)
            programs = _programs.setdefault(model, {})
            if key not in programs:
                programs[key] = jax.jit(many).lower(part, model.arrays, dict(shared)).compile(QUICK)
            pieces.append(jax.device_get(programs[key](part, model.arrays, dict(shared))))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:rows], *pieces)


def _padded(values: np.ndarray, piece: int) -> np.ndarray:
    missing = piece - len(values)
    return np.concatenate([values, np.broadcast_to(values[:1], (missing, *values.shape[1:]))]) if missing else values
