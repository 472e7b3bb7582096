"""A number with its Monte Carlo standard error."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Estimate(NamedTuple):
    """A value and its Monte Carlo standard error `se`, in the same unit (0 where it is exact)."""

    value: float
    se: float

    @classmethod
    def of_mean(cls, draws: ArrayLike) -> Estimate:
        """The mean of independent draws, with sd / sqrt(n) as its standard error."""
        values = np.asarray(draws, dtype=float).ravel()
        if values.size < 2:
            raise ValueError(f"Expected at least 2 draws to give a mean its error; got {values.size}.")
        with np.errstate(over="ignore"):  # a run-off's squares are no numbers, and its error is infinite
            return cls(float(values.mean()), float(values.std(ddof=1) / math.sqrt(values.size)))

    def __str__(self) -> str:
        value, se = rounded(self.value, self.se)
        return f"{value} ± {se}" if se else value


_EXACT = 1e-10  # of a number: an error below it says how sums and differences are rounded and nothing more


def decimals(se: float) -> int:
    """How many decimals a number with this standard error deserves: up to the error's first digit."""
    if not math.isfinite(se) or se <= 0:
        return 2
    # An error that begins with 1 keeps a second digit, else rounding would change it by up to a half.
    exponent = math.floor(math.log10(se))
    return max(0, -exponent + (1 if se / 10.0**exponent < 1.95 else 0))


def rounded(value: float, se: float) -> tuple[str, str]:
    """Value and standard error as text, both rounded to the error's own size; no error, or rounding's, gives ''."""
    if not math.isfinite(value):
        return ("not finite", "")
    if not math.isfinite(se) or se <= _EXACT * abs(value):
        return (f"{value:z.4f}" if 0 < se < math.inf else f"{value:.4g}", "")
    places = decimals(se)
    return (f"{value:z.{places}f}", f"{se:.{places}f}")
