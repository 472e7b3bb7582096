"""The report's section on predictions: what a guide's cost, and whether they hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from toolkit.comparison.replicated import LEFT_OUT
from toolkit.comparison.sides import NORMAL_SPREAD
from toolkit.estimate import decimals
from toolkit.reporting.contents import Block, Cell, Column, Section, Table
from toolkit.reporting.figures.calibration import calibration
from toolkit.reporting.palette import Look
from toolkit.reporting.tables import NONE, minus, number, significant

_UNLIKELY = 0.025
"""A p-value as small, or as near to 1, is told: as many as one in twenty are by chance."""

_HELD = (
    "Over at most 1,000 observations, with the error for as many others; the smaller line is the paired difference "
    "from the reference's, in sample; so in the next columns. Brier score: mean square of probability minus outcome, "
    "lower is better. Shares: how many observations lie in their central predictive intervals."
)
_MADE = (
    "Mean and central 90 % of data made anew; p is the probability that such data lie above what was observed: near 0 "
    "or 1, the model would hardly make these data; so in the next columns."
)


def predictions_section(predictions: Any, looks: Mapping[str, Look], against: str, *, trusted: bool) -> Section:
    """What predicting with each guide costs, leave-one-out, replicated data, calibration.

    Args:
        predictions: The comparison's `Predictions`.
        looks: How the guides are shown.
        against: What the reference is called.
        trusted: Whether the reference passed its checks.
    """
    if predictions.problem:
        blocks: tuple[Block, ...] = (f"Left out: {predictions.problem}.",)
        return Section("predictions", "Does it matter for predictions?", blocks)
    found: list[Block] = []
    if not trusted:
        found.append("No verdict is given here: by draws that failed their checks, nothing below is to be relied on.")
    found.append(_scores(predictions.scores, looks, against))
    total, some = predictions.scores[["observations", "looked_at"]].iloc[0]
    if some < total:
        found.append(f"{some:,} of {total:,} observations were looked at; they stand for all, which is in the errors.")
    picture = calibration(predictions, looks, against)
    if picture is not None:
        found += [picture, _held(predictions.calibration, looks, against)]
    if len(predictions.checks):
        found.append(_checks(predictions.checks, looks, against))
        found += _unlikely(predictions.checks, against) if trusted else []
    return Section("predictions", "Does it matter for predictions?", tuple(found))


def _scores(scores: pd.DataFrame, looks: Mapping[str, Look], against: str) -> Table:
    count = int(scores["observations"].iloc[0])
    columns = (
        Column("source", "The reference, and each guide.", numeric=False),
        Column(
            "nats lost",
            f"What predicting {count:,} new observations with the guide, at the same predictors, is expected to score "
            "below predicting with the reference, if the reference is right: KL(p || q) of the predictive "
            "distributions of single observations, added up.",
        ),
        Column("in words", "Its verdict: by how many nats predictions may be worse is a threshold.", numeric=False),
        Column(
            "LOO (nats)",
            "Expected log predictive density of the posterior by leave-one-out (PSIS), from this source's draws, with "
            "its Monte Carlo error; a guide's draws are weighted to the posterior, so that all rows estimate one "
            "number. Below the reference's, what it would vary by for other data of this kind.",
        ),
        Column("p_loo", "Effective number of parameters: by how much observations are predicted better when seen."),
    )
    rows = []
    for _, row in scores.iterrows():
        name = str(row["source"])
        own = name == "reference"
        place = looks[name].place if name in looks else None
        loss = Cell(NONE) if own else number(row["loss"], row["loss_se"])
        rows.append(
            (
                Cell(against if own else name, place=place),
                loss,
                Cell(str(row["sentence"] or row["problem"]) or NONE),
                number(row["loo"], row["loo_se"], note=_trust(row)),
                number(row["p_loo"], row["p_loo_se"]),
            )
        )
    return Table("What is lost by predicting with a guide", columns, tuple(rows))


def _trust(row: pd.Series) -> str:
    """What is to be known of a leave-one-out: why there is none, what of it cannot be trusted, how it would vary."""
    if row["loo_problem"]:
        return str(row["loo_problem"])
    told = []
    if row["source"] == "reference":
        told.append(f"± {significant(row['loo_data_se'], 2)} for other data")
    if row["matched"] > 0:
        told.append(f"{int(row['matched'])} by moment matching")
    if row["unreliable"] > 0:
        told.append(f"{int(row['unreliable']):,} of {int(row['looked_at']):,} cannot be trusted")
    return "; ".join(told)


def _held(table: pd.DataFrame, looks: Mapping[str, Look], against: str) -> Table:
    sources = [(source, kind) for source, kind in dict.fromkeys(zip(table["source"], table["kind"], strict=True))]
    columns = (
        Column("measure", "Of the observed site below it.", numeric=False),
        *(
            Column(
                (f"{against}, left out" if kind == LEFT_OUT else against) if source == "reference" else source,
                "" if i else _HELD,
            )
            for i, (source, kind) in enumerate(sources)
        ),
    )
    rows = []
    for (site, measure), group in table.groupby(["site", "measure"], sort=False):
        cells = [Cell(str(measure), note=str(site))]
        by_source = {(row["source"], row["kind"]): row for _, row in group.iterrows()}
        for key in sources:
            if key not in by_source:
                cells.append(Cell(NONE))
                continue
            row = by_source[key]
            apart = number(row["difference"], row["difference_se"])
            own = key[0] == "reference" and key[1] != LEFT_OUT
            note = "" if own else f"{'+' if row['difference'] > 0 else ''}{apart.text}{_error(apart)}"
            cells.append(number(row["value"], row["se"], note=note))
        rows.append(tuple(cells))
    return Table("Probabilities and intervals against what was observed", columns, tuple(rows))


def _error(cell: Cell) -> str:
    return f" ± {cell.error}" if cell.error else ""


def _checks(checks: pd.DataFrame, looks: Mapping[str, Look], against: str) -> Table:
    sources = [name for name in ("reference", *looks) if name in set(checks["source"])]
    columns = (
        Column("statistic", "Of all numbers of the observed site below it.", numeric=False),
        Column("observed", "In the data."),
        *(
            Column(
                against if source == "reference" else source,
                "" if i else _MADE,
                numeric=False,
            )
            for i, source in enumerate(sources)
        ),
    )
    rows = []
    for (site, statistic), group in checks.groupby(["site", "statistic"], sort=False):
        cells = [Cell(str(statistic), note=str(site)), Cell(_as_precise(group["observed"].iloc[0], group))]
        by_source = {row["source"]: row for _, row in group.iterrows()}
        for source in sources:
            row = by_source[source]
            mean, low, high = (_as_precise(row[end], group) for end in ("mean", "low", "high"))
            ends = f"{mean} [{low}, {high}]"
            chance = number(row["p_value"], row["p_value_se"])
            place = looks[source].place if source in looks else None
            cells.append(Cell(ends, note=f"p {chance.text}{_error(chance)}", place=place))
        rows.append(tuple(cells))
    return Table("Data made anew beside the observed", columns, tuple(rows))


def _as_precise(value: float, group: pd.DataFrame) -> str:
    """A number with as many decimals as a tenth of the spread of data made anew deserves."""
    spread = float((group["high"] - group["low"]).min()) / NORMAL_SPREAD
    places = decimals(spread / 10.0) if spread > 0 else 2
    return minus(f"{round(value, places) + 0.0:,.{places}f}")


def _unlikely(checks: pd.DataFrame, against: str) -> list[str]:
    """What the reference itself would hardly make, which is no guide's fault."""
    own = checks[checks["source"] == "reference"]
    tail = own["p_value"].clip(upper=1.0).map(lambda p: min(p, 1.0 - p)) + 2.0 * own["p_value_se"]
    found = own[tail < _UNLIKELY]
    if found.empty:
        return []
    told = ", ".join(
        f"{row['statistic']} of {row['site']} (observed {_as_precise(row['observed'], found.loc[[i]])}, "
        f"expected {_as_precise(row['mean'], found.loc[[i]])})"
        for i, row in found.iterrows()
    )
    return [f"{against[:1].upper()}{against[1:]} would hardly make these data: {told}. No guide mends a model."]
