"""Data: named arrays with their coordinates, their source and, where simulated, the truth."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike


@dataclass(frozen=True, eq=False)
class Dataset:
    """The data that a model is conditioned on.

    Arrays and static values are handed to the model's callable by name. Arrays may change without a new
    compilation; static values (sizes, flags, strings) are part of what is compiled.

    Attributes:
        name: A short name for machines and titles, such as `"breast_cancer"`.
        arrays: Argument name to array. Must be numeric and finite.
        static: Argument name to a hashable value that decides shapes or structure.
        coords: Dimension (plate) name to labels, one for each element.
        truth: Site name to the value that generated the data; empty for real data.
        source: Where the data comes from, for the report.
        licence: What may be done with it.

    Raises:
        ValueError: An array is not numeric, or holds NaN or infinite values, or a name is both array and static.
    """

    name: str
    arrays: Mapping[str, np.ndarray]
    static: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    coords: Mapping[str, np.ndarray] = field(default_factory=dict, kw_only=True)
    truth: Mapping[str, np.ndarray] = field(default_factory=dict, kw_only=True)
    source: str = field(default="not stated", kw_only=True)
    licence: str = field(default="not stated", kw_only=True)

    def __post_init__(self) -> None:
        both = sorted(set(self.arrays) & set(self.static))
        if both:
            raise ValueError(
                f"Expected each name once; got {both} among both arrays and static values of '{self.name}'."
            )
        arrays = {name: _numeric(name, values) for name, values in self.arrays.items()}
        object.__setattr__(self, "arrays", arrays)
        object.__setattr__(self, "static", dict(self.static))
        object.__setattr__(self, "coords", {name: np.asarray(labels) for name, labels in self.coords.items()})
        object.__setattr__(self, "truth", {name: np.asarray(value) for name, value in self.truth.items()})


def _numeric(name: str, values: ArrayLike) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(
            f"Expected numbers in data array '{name}'; got dtype {array.dtype}: code text as integers, "
            "with the labels as coords."
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise ValueError(
            f"Expected finite numbers in data array '{name}'; got {bad} NaN or infinite of {array.size}: "
            "drop those rows or fill them in before the fit."
        )
    return array


def read_dataset(path: str | Path, fn: Callable[..., Any], static: Mapping[str, Any] | None = None) -> Dataset:
    """The arguments of `fn` that a file holds, as a `Dataset`.

    A CSV gives one array a column, by the column's name; a text column becomes integer codes whose sorted
    labels are its coords. An NPZ gives its arrays as they are. What `fn` does not ask for is left out.

    Args:
        path: A `.csv` or `.npz` file.
        fn: The NumPyro callable whose argument names select the columns.
        static: Further arguments, not from the file.

    Raises:
        ValueError: The file is not there, not readable, of another kind, or lacks an argument of `fn`.
    """
    path, static = Path(path), dict(static or {})
    if not path.is_file():
        raise ValueError(f"Expected a data file at '{path}'; found none: check the path.")
    if path.suffix not in {".csv", ".npz"}:
        raise ValueError(f"Expected a .csv or .npz data file; got '{path.name}'.")
    try:
        columns = _csv_columns(path) if path.suffix == ".csv" else read_npz(path)
    except (OSError, ValueError) as error:  # pandas' own errors of parsing are among the latter
        raise ValueError(f"Expected a readable {path.suffix} file; '{path}' is not: {error}") from error
    parameters = [
        p for p in signature(fn).parameters.values() if p.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    ]
    missing = [
        p.name for p in parameters if p.name not in columns and p.name not in static and p.default is Parameter.empty
    ]
    if missing:
        raise ValueError(
            f"Expected data for the argument{'s' if len(missing) > 1 else ''} {', '.join(map(repr, missing))} of "
            f"'{getattr(fn, '__name__', 'the model')}'; '{path.name}' holds "
            f"{', '.join(map(repr, columns)) or 'nothing'}: add the column, or give what is no data as an "
            "option (on the command line --option name=value)."
        )
    arrays, coords = {}, {}
    for parameter in parameters:
        if parameter.name in columns and parameter.name not in static:
            values = columns[parameter.name]
            if values.dtype.kind in "biuf":
                arrays[parameter.name] = values
            else:
                arrays[parameter.name], coords[parameter.name] = _codes(parameter.name, values)
    return Dataset(path.stem, arrays, static=static, coords=coords, source=path.name)


def _csv_columns(path: Path) -> dict[str, np.ndarray]:
    return {str(name): column.to_numpy() for name, column in pd.read_csv(path).items()}


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an NPZ file by name.

    Raises:
        ValueError: It is not a whole NPZ file, or holds Python objects.
    """
    with path.open("rb") as file:
        try:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.ndarray):
                return {name: loaded[name] for name in loaded.files}
        except (EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"it is no whole NPZ archive ({error})") from error
    raise ValueError("it holds a single array without a name: write it with numpy.savez(file, name=array)")


def _codes(name: str, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    missing = pd.isna(values)
    if missing.any():
        raise ValueError(
            f"Expected a value in every row of the text column '{name}'; got {int(missing.sum())} empty: "
            "drop those rows or fill them in before the fit."
        )
    labels, codes = np.unique(values.astype(str), return_inverse=True)
    return codes, labels
