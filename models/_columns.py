"""What a formula asks of a data frame, and whether its columns can give it; a sentence for each that cannot."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from formulae import model_description
from formulae.parser import ParseError
from formulae.resolver import ResolverError
from formulae.scanner import ScanError
from formulae.terms.call_resolver import CallResolverError

RESERVED = ("beta", "effect", "response", "row", "sigma")
FORMULA_ERRORS = (ParseError, ScanError, ResolverError, CallResolverError, ValueError, TypeError, KeyError, NameError)
_EXAMPLE = "write it like 'y ~ x + (x | group)'"


def described(formula: str) -> Any:
    """The parsed formula, as formulae has it.

    Raises:
        ValueError: It does not parse, or has no response or no grouping term.
    """
    if not isinstance(formula, str):
        raise ValueError(f"Expected the formula as text; got {type(formula).__name__}: {_EXAMPLE}.")  # noqa: TRY004
    try:
        description = model_description(formula)
    except FORMULA_ERRORS as error:
        raise ValueError(f"Expected a formula; '{formula}' does not parse ({error}): {_EXAMPLE}.") from error
    if description.response is None:
        raise ValueError(f"Expected a response and a '~' in the formula; got '{formula}': {_EXAMPLE}.")
    if not description.group_terms:
        raise ValueError(f"Expected a grouping term in parentheses in the formula; got '{formula}': {_EXAMPLE}.")
    return description


def checked_columns(frame: pd.DataFrame, description: Any, formula: str) -> pd.DataFrame:
    """The columns that the formula uses, with booleans as 0 and 1.

    Raises:
        ValueError: A column is missing, incomplete, of a wrong type, or bears a name of the model.
    """
    names = sorted(str(name) for name in description.var_names)
    missing = [name for name in names if name not in frame.columns]
    if missing:
        have = ", ".join(map(str, frame.columns))
        raise ValueError(
            f"Expected columns {', '.join(map(repr, missing))} for '{formula}'; the data frame has {have}."
        )
    factors = {name for term in description.group_terms for name in term.factor.var_names}
    clash = sorted(factors & set(RESERVED))
    if clash:
        raise ValueError(f"Expected a grouping column not called '{clash[0]}', a name of the model: rename the column.")
    if len(frame) < 3:
        raise ValueError(f"Expected at least 3 rows; got {len(frame)}.")
    return pd.DataFrame({name: _checked_column(frame[name], name, name in factors) for name in names})


def _checked_column(column: pd.Series, name: str, groups: bool) -> pd.Series:
    numeric = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_complex_dtype(column)
    bad = int(column.isna().sum())
    if numeric:
        bad += int(np.isinf(column.to_numpy(float, na_value=np.nan)).sum())
    if bad:
        raise ValueError(
            f"Expected a finite value in every row of column '{name}'; got {bad} missing or infinite of {len(column)}: "
            "drop those rows or fill them in before the fit."
        )
    if pd.api.types.is_bool_dtype(column):
        return column.astype(np.int8)
    if numeric:
        if groups and bool((column != column.round()).any()):
            raise ValueError(
                f"Expected whole numbers or text in grouping column '{name}'; got fractions: bin it first."
            )
        return column.astype(np.int64) if groups else column
    text = isinstance(column.dtype, pd.CategoricalDtype) or all(isinstance(value, str) for value in column)
    if not text:
        raise ValueError(f"Expected numbers or text in column '{name}'; got dtype {column.dtype}: convert it first.")
    if not groups:
        _check_text(column.astype(str), name)
    return column.cat.remove_unused_categories() if isinstance(column.dtype, pd.CategoricalDtype) else column


def _check_text(column: pd.Series, name: str) -> None:
    if pd.to_numeric(column, errors="coerce").notna().all():
        raise ValueError(f"Expected numbers in column '{name}'; got numbers written as text: use pandas.to_numeric.")
    if column.nunique() > len(column) / 2:
        raise ValueError(
            f"Expected numbers, or text with few levels, in column '{name}'; got {column.nunique()} different texts in "
            f"{len(column)} rows: convert it to numbers or leave it out."
        )
