"""The user's own quantities and events: what each source says, and what one may say from a guide alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from toolkit.comparison.focus import Focus
from toolkit.comparison.metrics import metrics
from toolkit.comparison.sentences import LOCATIONS, WIDTHS, directions, probability
from toolkit.comparison.tables import metric_rows, quantity_verdicts
from toolkit.comparison.verdicts import Thresholds, Verdict, judge, more_draws
from toolkit.estimate import Estimate
from toolkit.influence import (
    RULE_OF_THREE,
    chain_error,
    effective_draws,
    independent_error,
    probability_error,
)
from toolkit.modelling.scalars import Scalars

FOCUS_COLUMNS = (
    "item", "event", "source", "mean", "mean_se", "low", "high", "probability", "probability_se",
    "difference", "difference_se", "verdict", "more_draws", "sentence",
)  # fmt: skip


def focus_table(
    items: Sequence[Focus],
    sources: Mapping[str, Scalars],
    than: str,
    thresholds: Thresholds,
    *,
    judged: Mapping[str, bool],
) -> pd.DataFrame:
    """One row for each item and source, the reference first.

    Columns: item, event, source; mean, mean_se, low and high (the central 90 % interval) of a quantity;
    probability and probability_se of an event; difference and difference_se, the event's probability under the guide
    minus that under the reference; verdict, on the guide; more_draws, how many times as many draws an undecided item
    needs; sentence, what one may say from the guide alone.

    Args:
        items: What was asked for.
        sources: Source name to scalars, `"reference"` among them if there is one.
        than: What the reference is called in a sentence.
        thresholds: What counts as right.
        judged: Guide name to whether its draws are judged. One that is not has an empty sentence: why, is said once, in
            the comparison's table of guides.
    """
    rows = []
    for item in items:
        drawn = {name: item.evaluate(source) for name, source in sources.items()}
        for name, values in drawn.items():
            autocorrelated = name == "reference"
            summary = _event(values, autocorrelated) if item.event else _interval(values, autocorrelated)
            difference = Estimate(np.nan, np.nan)
            if item.event and name != "reference" and "reference" in drawn:
                difference = _difference(drawn["reference"], values)
            verdict: Verdict | None = None
            sentence = ""
            if name != "reference" and judged[name] and item.event:
                verdict, sentence = _event_sentence(drawn["reference"], values, than, thresholds)
            elif name != "reference" and judged[name]:
                verdict, sentence = _interval_sentence(item, drawn["reference"], values, than, thresholds)
            needed = np.nan
            if verdict is Verdict.CANNOT_TELL:
                rest = (drawn["reference"], values, thresholds)
                needed = more_draws(difference, "probability", thresholds) if item.event else _needed(*rest)
            said = (verdict.value if verdict else "", needed, sentence)
            rows.append((item.text, item.event, name, *summary, *difference, *said))
        absent = [name for name in judged if name not in drawn]
        rows += [(item.text, item.event, name, *[np.nan] * 8, "", np.nan, "") for name in absent]
    return pd.DataFrame(rows, columns=list(FOCUS_COLUMNS))


def _interval(values: np.ndarray, autocorrelated: bool) -> tuple[float, ...]:
    low, high = np.quantile(values, [0.05, 0.95])
    error = chain_error(values) if autocorrelated else independent_error(values)
    return float(values.mean()), error, float(low), float(high), np.nan, np.nan


def _event(values: np.ndarray, autocorrelated: bool) -> tuple[float, ...]:
    return (*[np.nan] * 4, *_probability(values, autocorrelated))


def _probability(values: np.ndarray, autocorrelated: bool) -> Estimate:
    events = values.astype(float)
    if not autocorrelated:
        return Estimate(float(events.mean()), max(independent_error(events), RULE_OF_THREE / events.size))
    # An event that is never seen to change tells nothing of its autocorrelation: its draws are taken as they are.
    return Estimate(float(events.mean()), probability_error(values, effective_draws(events)))


def _difference(reference: np.ndarray, guide: np.ndarray) -> Estimate:
    """The event's probability under the guide minus that under the reference, with the error of both."""
    p, q = _probability(reference, autocorrelated=True), _probability(guide, autocorrelated=False)
    return Estimate(q.value - p.value, float(np.hypot(p.se, q.se)))


def _event_sentence(reference: np.ndarray, guide: np.ndarray, than: str, thresholds: Thresholds) -> tuple[Verdict, str]:
    p, q = _probability(reference, autocorrelated=True), _probability(guide, autocorrelated=False)
    difference, se = _difference(reference, guide)
    verdict = judge(difference, se, -thresholds.probability, thresholds.probability)
    beside = f"{probability(*q)} where {than} has {probability(*p)}"
    if verdict is Verdict.RIGHT:
        return verdict, f"may be reported from this guide alone: {beside}"
    if verdict is Verdict.WRONG:
        side = "high" if difference > 0 else "low"
        return verdict, f"would mislead: {beside}, too {side} by {probability(abs(difference), se)}"
    return verdict, f"cannot tell, more draws are needed: {beside}"


def _interval_sentence(
    item: Focus, reference: np.ndarray, guide: np.ndarray, than: str, thresholds: Thresholds
) -> tuple[Verdict | None, str]:
    compared = metrics(reference[:, :, None], guide.reshape(-1, 1))
    rows = metric_rows("", [item.text], compared, thresholds, judged=True)
    verdict = quantity_verdicts(rows).get(item.text)
    if verdict is None:
        return None, f"not judged: it does not vary under {than}"
    if not np.isfinite(rows.loc[rows["metric"] == "coverage_90", "value"]).all():
        return Verdict.CANNOT_TELL, "cannot tell: some of the guide's draws are infinite or NaN"
    # What is wrong is said first.
    decisive = rows[rows["verdict"] != ""].sort_values(
        "verdict", key=lambda verdicts: verdicts != Verdict.WRONG.value, kind="stable"
    )
    beside = ", ".join(
        _number(*row, than) for row in zip(decisive["metric"], decisive["value"], decisive["se"], strict=True)
    )
    if verdict is Verdict.RIGHT:
        return verdict, f"may be reported from this guide alone: {beside}"
    if verdict is Verdict.WRONG:
        return verdict, f"{' and '.join(directions(rows))}: {beside}"
    return verdict, f"cannot tell, more draws are needed: {beside}"


def _needed(reference: np.ndarray, guide: np.ndarray, thresholds: Thresholds) -> float:
    """How many times as many draws would decide every number of one quantity."""
    compared = metrics(reference[:, :, None], guide.reshape(-1, 1))
    return float(metric_rows("", ["item"], compared, thresholds, judged=True)["more_draws"].max())


def _number(metric: str, value: float, se: float, than: str) -> str:
    number = Estimate(value, se)
    if metric in LOCATIONS:
        return f"{'mean' if metric == 'shift' else 'median'} off by {number} sd"
    if metric in WIDTHS:
        return f"{'sd' if metric == 'sd_ratio' else '5 to 95 % spread'} {number} x {than}"
    return f"90 % interval holds {number} of {than}"
