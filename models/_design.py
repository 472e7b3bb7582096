"""From a data frame and a formula to the arrays of a hierarchical regression, with a sentence for each misuse."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from formulae import design_matrices

from models._columns import FORMULA_ERRORS, checked_columns, described
from toolkit import Dataset

LIKELIHOODS = ("gaussian", "poisson", "bernoulli")


@dataclass(frozen=True)
class Grouping:
    """A grouping factor and the columns whose effects vary over its groups.

    Attributes:
        name: The factor's name in the formula, such as `"county"`.
        groups: How many groups there are.
        columns: The varying columns, `"Intercept"` among them where it varies.
        means: For each column the index of the common effect that is the mean of its effects, or -1 for a mean of 0.
    """

    name: str
    groups: int
    columns: tuple[str, ...]
    means: tuple[int, ...]


def design(
    frame: pd.DataFrame,
    formula: str,
    likelihood: str = "gaussian",
    *,
    allow_single_rows: bool = False,
    name: str = "",
    source: str = "not stated",
    licence: str = "not stated",
) -> Dataset:
    """The arrays, sizes, labels and prior scales that a formula asks of a data frame.

    The columns enter as they are: nothing is centred or standardised unless the formula says so
    (`center(x)`, `scale(x)`). Text columns become indicators of all but the first level.

    Args:
        frame: One row for each observation.
        formula: As in lme4, `"y ~ x + (x | group)"`; several grouping terms and `offset(x)` are understood.
        likelihood: `"gaussian"`, `"poisson"` (log link) or `"bernoulli"` (logit link).
        allow_single_rows: Whether a group with one row may have a slope of its own, which then is informed by
            the other groups alone.
        name: Name of the dataset; the response's if empty.
        source: Where the data comes from.
        licence: What may be done with it.

    Returns:
        A dataset with arrays `common` (row, effect), `varying` (row, column: those of all groupings side by side),
        `group` (row, grouping; integers), `offset` (row,), the prior's `prior_loc` and `prior_scale` (effect,),
        `sd_scale` (column,) and `sigma_scale` (), and `response` (row,).

    Raises:
        ValueError: Formula, likelihood or a column is not as expected; the message says what to do.
    """
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"Expected likelihood to be one of {', '.join(LIKELIHOODS)}; got '{likelihood}'.")
    if not isinstance(frame, pd.DataFrame):  # misuse is a ValueError everywhere in elbowroom
        raise ValueError(  # noqa: TRY004
            f"Expected a pandas DataFrame; got {type(frame).__name__}: wrap it as pandas.DataFrame(...)."
        )
    used = checked_columns(frame, described(formula), formula)
    try:
        matrices = design_matrices(formula, used, na_action="error")
    except FORMULA_ERRORS as error:
        raise ValueError(f"Expected a formula that fits the data; '{formula}' stops with: {error}.") from error
    response = _checked_response(matrices.response, likelihood)
    labels, common, offset = _common_effects(matrices.common, formula)
    parts = _grouped(matrices.group, labels, common)
    for part in parts:
        _check_groups(part, likelihood, allow_single_rows)
    arrays = {
        "common": common,
        "varying": np.hstack([part.columns for part in parts]),
        "group": np.stack([part.codes for part in parts], axis=1).astype(np.int32),
        "offset": offset,
        "response": response,
    }
    coords = {"effect": labels}
    for part in parts:
        coords |= effect_coords(part.grouping, part.labels)
    return Dataset(
        name or str(matrices.response.name),
        arrays | _prior_scales(arrays, labels, likelihood),
        static={"groupings": tuple(part.grouping for part in parts), "likelihood": likelihood, "correlated": False},
        coords=coords,
        source=source,
        licence=licence,
    )


def _checked_response(response: Any, likelihood: str) -> np.ndarray:
    values = np.asarray(response.design_matrix)
    if values.ndim != 1 or values.dtype.kind not in "biuf":
        raise ValueError(f"Expected a numeric response; '{response.name}' is {response.kind}: convert it to numbers.")
    values = values.astype(float)
    if likelihood == "poisson" and ((values < 0) | (values != values.round())).any():
        raise ValueError(
            f"Expected counts 0, 1, 2, ... in response '{response.name}' for 'poisson'; got other numbers."
        )
    if likelihood == "bernoulli" and not np.isin(values, (0, 1)).all():
        raise ValueError(f"Expected only 0 and 1 in response '{response.name}' for 'bernoulli'; got other numbers.")
    if np.ptp(values) == 0:
        raise ValueError(f"Expected response '{response.name}' to vary; every row has {values[0]:g}.")
    return values if likelihood == "gaussian" else values.astype(np.int32)


def _common_effects(common: Any, formula: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels (effect,), columns (row, effect) and the sum of the offsets (row,)."""
    terms = [] if common is None else list(common.terms.values())
    effects = [term for term in terms if term.kind != "offset"]
    if not effects:
        raise ValueError(f"Expected at least one common effect, such as the intercept; the formula is '{formula}'.")
    values = np.hstack([_columns(term.data) for term in effects])
    labels = np.array([label for term in effects for label in term.labels])
    constant = [str(label) for label, column in zip(labels, values.T, strict=True) if np.ptp(column) == 0]
    constant = [label for label in constant if label != "Intercept"]
    if constant:
        raise ValueError(f"Expected column '{constant[0]}' to vary; it is constant: leave it out of the formula.")
    offset = sum((np.asarray(term.data, float) for term in terms if term.kind == "offset"), np.zeros(len(values)))
    return labels, values, offset


def _varying_columns(terms: Iterable[Any]) -> tuple[tuple[str, ...], np.ndarray]:
    columns = [("Intercept",) if term.kind == "intercept" else tuple(term.expr.labels) for term in terms]
    return sum(columns, ()), np.hstack([_columns(term.expr.data) for term in terms])


def _columns(values: Any) -> np.ndarray:
    array = np.asarray(values, float)
    return array[:, None] if array.ndim == 1 else array


def _groups(term: Any) -> tuple[np.ndarray, np.ndarray]:
    """The group of each row as an integer, and the labels of the groups that have rows."""
    occupied, codes = np.unique(_columns(term.factor.data).argmax(axis=1), return_inverse=True)
    return codes, np.array(term.groups)[occupied]


@dataclass(frozen=True, eq=False)
class _Part:
    """A grouping with the values of its columns (row, column), each row's group and the groups' labels."""

    grouping: Grouping
    columns: np.ndarray
    codes: np.ndarray
    labels: np.ndarray


def _grouped(group: Any, labels: np.ndarray, common: np.ndarray) -> list[_Part]:
    """One part for each grouping factor, in the formula's order; terms of the same factor are put together."""
    factors: dict[str, list[Any]] = {}
    for term in group.terms.values():
        factors.setdefault(term.factor.name, []).append(term)
    parts: list[_Part] = []
    for name, terms in factors.items():
        columns, values = _varying_columns(terms)
        codes, groups = _groups(terms[0])
        taken = {index for part in parts for index in part.grouping.means}
        means = _means(columns, values, labels, common, taken)
        parts.append(_Part(Grouping(name, len(groups), columns, means), values, codes, groups))
    return parts


def _check_groups(part: _Part, likelihood: str, allow_single_rows: bool) -> None:
    factor, groups, rows = part.grouping.name, part.labels, np.bincount(part.codes)
    if len(groups) < 2:
        raise ValueError(f"Expected at least 2 groups in '{factor}'; got 1: leave the grouping term out.")
    if rows.max() == 1 and likelihood != "poisson":
        raise ValueError(
            f"Expected groups of rows in '{factor}'; every row is a group of its own: group by another column."
        )
    single = groups[rows == 1]
    if len(single) and part.grouping.columns != ("Intercept",) and not allow_single_rows:
        raise ValueError(
            f"Expected at least 2 rows in each group of '{factor}', whose slopes vary; got 1 row in {len(single)} of "
            f"{len(groups)}, such as '{single[0]}': merge or drop them, let only the intercept vary, (1 | {factor}), "
            "or set allow_single_rows=True to let them take their slopes from the other groups."
        )


def _means(
    columns: tuple[str, ...], values: np.ndarray, labels: np.ndarray, common: np.ndarray, taken: set[int]
) -> tuple[int, ...]:
    """The common effect behind each varying column; each serves as a mean once, so that it is added once."""
    found = []
    for column, x in zip(columns, values.T, strict=True):
        same = np.flatnonzero(labels == column)
        fits = len(same) == 1 and int(same[0]) not in taken and np.array_equal(common[:, same[0]], x)
        found.append(int(same[0]) if fits else -1)
    return tuple(found)


def effect_coords(grouping: Grouping, groups: np.ndarray) -> dict[str, np.ndarray]:
    """Labels of the dimensions that a grouping brings: its groups, its varying columns and their pairs."""
    name, columns = grouping.name, grouping.columns
    pairs = [f"{columns[j]}:{columns[i]}" for i in range(len(columns)) for j in range(i)]
    coords = {name: groups, f"{name}_term": np.array(columns)}
    return coords | ({f"{name}_pair": np.array(pairs)} if pairs else {})


def _prior_scales(arrays: Mapping[str, np.ndarray], labels: np.ndarray, likelihood: str) -> dict[str, np.ndarray]:
    """Prior locations and scales in the units of the data; see the module's docstring for what they mean."""
    common, varying = arrays["common"], arrays["varying"]
    shifted = arrays["response"] - (arrays["offset"] if likelihood == "gaussian" else 0.0)
    unit = float(shifted.std()) if likelihood == "gaussian" else 1.0
    slope = labels != "Intercept"
    spread = np.where(slope, common.std(axis=0), 1.0)
    scale = 2.5 * unit / spread
    loc = np.zeros(len(labels))
    if not slope.all():
        far = np.where(slope, common.mean(axis=0) / spread, 0.0)
        scale = np.where(slope, scale, scale * np.sqrt(1 + (far**2).sum()))
        loc = np.where(slope, 0.0, _typical(shifted, arrays["offset"], likelihood))
    varying_spread = varying.std(axis=0)
    return {
        "prior_loc": loc,
        "prior_scale": scale,
        "sd_scale": unit / np.where(varying_spread > 0, varying_spread, 1.0),
        "sigma_scale": np.array(unit),
    }


def _typical(response: np.ndarray, offset: np.ndarray, likelihood: str) -> float:
    """The intercept that the mean of the response alone would give."""
    mean = float(response.mean())
    if likelihood == "gaussian":
        return mean
    if likelihood == "poisson":
        return float(np.log(mean / np.exp(offset).mean()))
    return float(np.log(mean / (1 - mean)))
