"""Tables of one source alone, and what the guides say to each other when there is no reference."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from toolkit.comparison.pairs import correlations
from toolkit.comparison.verdicts import Thresholds, Verdict, combine, judge
from toolkit.influence import chain_errors, independent_error
from toolkit.modelling.scalars import Scalars

QUANTITY_COLUMNS = (
    "source",
    "quantity",
    "title",
    "unit",
    "mean",
    "mean_se",
    "sd",
    "sd_se",
    *["q5", "q25", "q50", "q75", "q95"],
)
AGREEMENT_COLUMNS = ("quantity", "mean_smallest", "mean_largest", "sd_smallest", "sd_largest", "sentence")
_LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)


def summarise(name: str, source: Scalars) -> pd.DataFrame:
    """Mean, sd (each with its error) and quantiles of each scalar of one source.

    Draws of the reference are autocorrelated, those of a guide are independent.
    """
    # The draws of one scalar lie together: sorting and summing them costs less than with the scalars between them.
    draws = np.ascontiguousarray(np.moveaxis(source.values, -1, 0))
    together = draws.reshape(len(draws), draws.shape[1] * draws.shape[2])
    quantiles = np.quantile(together, _LEVELS, axis=1)
    errors = _chain_errors if name == "reference" else _independent_errors
    rows = []
    for i, quantity in enumerate(source.names):
        mean = draws[i].mean()
        square = np.square(draws[i] - mean)
        with np.errstate(invalid="ignore", divide="ignore"):
            sd = np.sqrt(square.sum() / (square.size - 1))
            mean_se, square_se = errors(draws[i], square)
            moments = (mean, mean_se, sd, square_se / (2.0 * sd))
        rows.append((name, quantity, source.titles[i], source.units[i], *moments, *quantiles[:, i]))
    return pd.DataFrame(rows, columns=list(QUANTITY_COLUMNS))


def _chain_errors(*series: np.ndarray) -> list[float]:
    return chain_errors(np.stack(series)).tolist()


def _independent_errors(*series: np.ndarray) -> list[float]:
    return [independent_error(one) for one in series]


def agreement(quantities: pd.DataFrame, thresholds: Thresholds) -> pd.DataFrame:
    """For each quantity, whether the guides agree with each other; shown where no reference can be trusted.

    Columns: quantity; mean_smallest, mean_largest, sd_smallest, sd_largest over the guides; sentence. Guides that
    agree may be wrong together, guides that disagree cannot all be right.
    """
    guides = quantities[quantities["source"] != "reference"]
    rows = []
    if guides["source"].nunique() > 1:
        for quantity, group in guides.groupby("quantity", sort=False):
            means, sds = group["mean"], group["sd"]
            sentence = _agreement_sentence(group, thresholds)
            rows.append((quantity, means.min(), means.max(), sds.min(), sds.max(), sentence))
    return pd.DataFrame(rows, columns=list(AGREEMENT_COLUMNS))


def _agreement_sentence(group: pd.DataFrame, thresholds: Thresholds) -> str:
    means, sds = group["mean"].to_numpy(), group["sd"].to_numpy()
    low, high = group.iloc[int(np.argmin(means))], group.iloc[int(np.argmax(means))]
    narrow, wide = group.iloc[int(np.argmin(sds))], group.iloc[int(np.argmax(sds))]
    if not (narrow["sd"] > 0 and np.isfinite(wide["sd"])):
        return "cannot tell: a guide has no spread or no finite one"
    spread = (high["mean"] - low["mean"]) / wide["sd"]
    spread_se = float(np.hypot(high["mean_se"], low["mean_se"]) / wide["sd"])
    ratio = narrow["sd"] / wide["sd"]
    ratio_se = float(ratio * np.hypot(narrow["sd_se"] / narrow["sd"], wide["sd_se"] / wide["sd"]))
    verdict = combine(
        [
            judge(spread, spread_se, -thresholds.shift, thresholds.shift),
            judge(ratio, ratio_se, *thresholds.sd_ratio, log=True),
        ]
    )
    words = {
        Verdict.RIGHT: "the guides agree",
        Verdict.WRONG: "the guides disagree",
        Verdict.CANNOT_TELL: "cannot tell whether the guides agree",
    }[verdict]
    return f"{words}: means {spread:.2f} sd apart, sds within a factor of {1 / ratio:.2f}"


def correlation_frames(samples: Mapping[str, np.ndarray], names: list[str]) -> dict[str, pd.DataFrame]:
    """Source name to its correlation matrix of the named scalars, from draws (draws, scalar)."""
    return {
        source: pd.DataFrame(correlations(draws), index=pd.Index(names), columns=pd.Index(names))
        for source, draws in samples.items()
    }
