"""The report's section on predictions: what a guide's cost, and whether they hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from toolkit.comparison.replicated import LEFT_OUT
from toolkit.comparison.sides import NORMAL_SPREAD
from toolkit.comparison.verdicts import Thresholds, Verdict, judge
from toolkit.estimate import decimals
from toolkit.reporting.contents import Block, Cell, Column, Section, Table
from toolkit.reporting.figures.calibration import calibration
from toolkit.reporting.palette import Look
from toolkit.reporting.tables import NONE, minus, number, significant

_UNLIKELY = 0.025
"""A p-value as small, or as near to 1, is told, if with its error it is below twice that: one in twenty by chance."""

_HELD = (
    "Over at most 1,000 observations, with the error for as many others; the smaller line is the paired difference "
    "from the reference's, in sample, and how many could be left out; so in the next columns. Brier score: mean square "
    "of probability minus outcome, lower is better. Shares: how many observations lie in their central predictive "
    "intervals."
)
_MADE = (
    "Mean and central 90 % of data made anew; p is the probability that such data lie above what was observed: near 0 "
    "or 1, the model would hardly make these data; so in the next columns."
)


def predictions_section(
    predictions: Any, looks: Mapping[str, Look], against: str, limits: Thresholds, *, trusted: bool
) -> Section:
    """What predicting with each guide costs, leave-one-out, replicated data, calibration.

    Args:
        predictions: The comparison's `Predictions`.
        looks: How the guides are shown.
        against: What the reference is called.
        limits: What counts as right.
        trusted: Whether the reference passed its checks.
    """
    if predictions.problem:
        blocks: tuple[Block, ...] = (f"Left out: {predictions.problem}.",)
        return Section("predictions", "Does it matter for predictions?", blocks)
    found: list[Block] = []
    if not trusted:
        found.append("No verdict is given here: by draws that failed their checks, nothing below is to be relied on.")
    found.append(_scores(predictions.scores, looks, against, limits))
    total, some = predictions.scores[["observations", "looked_at"]].iloc[0]
    if some < total:
        found.append(f"{some:,} of {total:,} observations were looked at; they stand for all, which is in the errors.")
    found += _driven(predictions, against) if trusted else []
    picture = calibration(predictions, looks, against)
    if picture is not None:
        found += [picture, _held(predictions.calibration, looks, against)]
        found += _uncovered(predictions.calibration, against) if trusted else []
    if len(predictions.checks):
        found.append(_checks(predictions.checks, looks, against))
        found += [*_unlikely(predictions.checks), *_sums(predictions.checks, looks, against, limits)] if trusted else []
    return Section("predictions", "Does it matter for predictions?", tuple(found))


def _scores(scores: pd.DataFrame, looks: Mapping[str, Look], against: str, limits: Thresholds) -> Table:
    count = int(scores["observations"].iloc[0])
    columns = (
        Column("source", "The reference, and each guide.", numeric=False),
        Column(
            "nats lost",
            f"What predicting {count:,} new observations with the guide, at the same predictors, is expected to score "
            "below predicting with the reference, if the reference is right: KL(p || q) of the predictive "
            "distributions of single observations, added up.",
        ),
        Column(
            "in words",
            f"Its verdict: right if it surely loses at most {limits.elpd:g} nats (--threshold elpd={limits.elpd:g}). "
            "It speaks of observations one by one, not of their sums.",
            numeric=False,
        ),
        Column(
            "LOO (nats)",
            "Expected log predictive density of the posterior by leave-one-out (PSIS), from this source's draws, with "
            "its Monte Carlo error; a guide's draws are weighted to the posterior, so that all rows estimate one "
            "number. Below the reference's, what it would vary by for other data of this kind, how many observations "
            "moment matching mended, and of how many the weights cannot be trusted (k-hat above 0.7): then there is no "
            "error.",
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
        most = int(group["units"].max())
        for key in sources:
            if key not in by_source:
                cells.append(Cell(NONE))
                continue
            row = by_source[key]
            apart = number(row["difference"], row["difference_se"])
            own = key[0] == "reference" and key[1] != LEFT_OUT
            note = "" if own else f"{'+' if row['difference'] > 0 else ''}{apart.text}{_error(apart)}"
            if row["units"] < most:
                note += f"; {int(row['units']):,} of {most:,}"
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


def _driven(predictions: Any, against: str) -> list[str]:
    """What stands behind an effective number of parameters that is larger than their number."""
    row, each = predictions.scores.iloc[0], predictions.left_out
    error = row["p_loo_se"] if math.isfinite(row["p_loo_se"]) else 0.0
    if not row["p_loo"] - 2.0 * error > predictions.parameters > 0 or each.empty:
        return []
    worst = each.loc[each["elpd"].idxmin()]
    count, density = number(row["p_loo"], row["p_loo_se"]), number(worst["elpd"], worst["elpd_se"])
    return [
        f"p_loo, {count.text}{_error(count)}, is larger than the number of parameters, {predictions.parameters:,}: a "
        "sign of outliers, or of a model that does not fit (Vehtari, Gelman and Gabry 2017). "
        f"{against[:1].upper()}{against[1:]} expects observation {int(worst['unit'])} of {worst['site']} least, with a "
        f"log density of {density.text}{_error(density)} when it is left out; all are in the table left_out."
    ]


def _uncovered(table: pd.DataFrame, against: str) -> list[str]:
    """Where the reference's own left-out intervals hold surely more or fewer observations than they should."""
    told = []
    for _, row in table[(table["source"] == "reference") & (table["kind"] == LEFT_OUT)].iterrows():
        _, _, share = str(row["measure"]).partition("in the central ")
        nominal = float(share.rstrip("%")) / 100 if share else math.nan
        # By the error that the share would have if all were well, too: of few observations all may lie inside.
        expected = math.sqrt(nominal * (1.0 - nominal) / row["units"])
        if abs(row["value"] - nominal) > 3.0 * max(row["se"], expected):
            cell = number(row["value"], row["se"])
            way = "narrow" if row["value"] < nominal else "wide"
            told.append(
                f"Left out, {cell.text}{_error(cell)} of the observations of {row['site']} lie in {against}'s central "
                f"{share} intervals: the model's predictions are too {way}."
            )
    return told


def _sums(checks: pd.DataFrame, looks: Mapping[str, Look], against: str, limits: Thresholds) -> list[str]:
    """Guides whose replicated means spread surely more or less: what they say of single observations is not all."""
    told = []
    for _, row in checks[(checks["statistic"] == "mean") & checks["source"].isin(list(looks))].iterrows():
        if judge(row["sd_ratio"], row["sd_ratio_se"], *limits.sd_ratio, log=True) is Verdict.WRONG:
            cell = number(row["sd_ratio"], row["sd_ratio_se"])
            told.append(
                f"{row['source']}: the mean of {row['site']} in new data spreads {cell.text}{_error(cell)} times as "
                f"much as {against}'s. For sums and means of many observations it is not to be used."
            )
    return told


def _unlikely(checks: pd.DataFrame) -> list[str]:
    """What the model itself would hardly make, which is no guide's fault."""
    own = checks[checks["source"] == "reference"]
    tail = own["p_value"].clip(upper=1.0).map(lambda p: min(p, 1.0 - p))
    found = own[(tail < _UNLIKELY) & (tail + 2.0 * own["p_value_se"] < 2.0 * _UNLIKELY)]
    if found.empty:
        return []
    told = ", ".join(
        f"{row['statistic']} of {row['site']} (observed {_as_precise(row['observed'], found.loc[[i]])}, "
        f"expected {_as_precise(row['mean'], found.loc[[i]])})"
        for i, row in found.iterrows()
    )
    return [f"The model would hardly make these data: {told}. No guide and no NUTS can mend that."]
