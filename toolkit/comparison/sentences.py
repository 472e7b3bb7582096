"""The words of a verdict on one guide. Every word comes from an interval, and has its number beside it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from toolkit.comparison.verdicts import Thresholds, Verdict, beyond_reach, interval, simultaneous_z
from toolkit.estimate import Estimate, decimals, rounded
from toolkit.variational.certificates import Certificate, Scope
from toolkit.variational.forward_kl import MOMENTS

LOCATIONS, WIDTHS = ("shift", "median_shift"), ("sd_ratio", "spread_ratio")
_MOST_TIMES = 50  # as many draws: nobody draws more to learn on which side of a threshold a number lies
_BY_DENSITY = ("AutoDelta", "AutoLaplaceApproximation")  # which sit at a mode
NARROW, WIDE, UP, DOWN = "too narrow", "too wide", "shifted up", "shifted down"


def climbs(fit: Any) -> bool:
    """Whether what was fitted raised the ELBO; False for an algorithm that seeks something else."""
    return bool(getattr(fit.guide, "climbs", True))


def seeks_elbo(fit: Any) -> bool:
    """Whether a high ELBO was the aim; False for moments that were matched and for a mode of the density as well."""
    by_density = not getattr(fit, "has_density", True) or getattr(fit.guide, "label", "") in _BY_DENSITY
    return climbs(fit) and not (fit.usable and by_density)


def ended(fit: Any) -> str:
    """How a fit ended, as the sentence that a reader sees."""
    return fit.status.sentence(climbs=seeks_elbo(fit))


def sampled(fit: Any) -> bool:
    """Whether what was fitted took moments of draws, whose own error is in it."""
    return bool(getattr(fit, "solver", "") == MOMENTS)


def directions(rows: pd.DataFrame) -> list[str]:
    """What is wrong with one quantity, in words, from its rows of the table.

    A mass that is off is told as a width only where neither shift nor sd ratio is wrong and so explains it.
    """
    wrong = rows[rows["verdict"] == Verdict.WRONG.value]
    words = []
    for metric, value in zip(wrong["metric"], wrong["value"], strict=True):
        if metric in WIDTHS:
            words.append(NARROW if value < 1.0 else WIDE)
        elif metric in LOCATIONS:
            words.append(UP if value > 0.0 else DOWN)
    if not words and (wrong["metric"] == "coverage_90").any():
        mass = float(wrong.loc[wrong["metric"] == "coverage_90", "value"].iloc[0])
        words.append(NARROW if mass < 0.9 else WIDE)
    return words


def guide_sentence(rows: pd.DataFrame, quantities: dict[str, Verdict], than: str) -> str:
    """The sentence for the first screen.

    Args:
        rows: One guide's rows of the table.
        quantities: The verdict of each quantity that was judged.
        than: What the guide is compared with, such as `"NUTS"`.
    """
    count = len(quantities)
    if not count:
        return "not judged: no quantity varies under the reference"
    wrong = [name for name, verdict in quantities.items() if verdict is Verdict.WRONG]
    unknown = [name for name, verdict in quantities.items() if verdict is Verdict.CANNOT_TELL]
    if wrong:
        return _wrong_sentence(rows, wrong, count, than)
    if unknown:
        some = f"{len(unknown)} of {count}"
        if _not_finite(rows, unknown):
            return f"cannot tell: infinite or NaN draws of {some} quantities"
        known = f"none of {count} is wrong, {_some_right(count - len(unknown))}; " if len(unknown) < count else ""
        return f"cannot tell: {known}{some} need{'s' if len(unknown) == 1 else ''} more draws ({how_many_more(rows)})"
    return f"yes: {_all(count)} right ({_room(rows, than)})"


def how_many_more(rows: pd.DataFrame) -> str:
    """How many times as many draws would decide the undecided quantities, if the numbers stayed where they are."""
    open_rows = rows[rows["verdict"] == Verdict.CANNOT_TELL.value]
    needed = open_rows.groupby("quantity")["more_draws"].max().to_numpy(dtype=float)
    within = needed[needed <= _MOST_TIMES]
    if not within.size:
        return f"over {_MOST_TIMES} times as many"
    times = f"about {max(2, math.ceil(within.max()))} times as many"
    return times if within.size == needed.size else f"{times} would decide {within.size} of them"


def _some_right(count: int) -> str:
    return f"{count} {'is' if count == 1 else 'are'} right"


def _all(count: int) -> str:
    return {1: "the only quantity is", 2: "both quantities are"}.get(count, f"all {count} quantities are")


def _not_finite(rows: pd.DataFrame, names: list[str]) -> bool:
    return bool(rows[rows["quantity"].isin(names) & (rows["metric"] == "coverage_90")]["value"].isna().all())


def _room(rows: pd.DataFrame, than: str) -> str:
    """How large the errors of right quantities may be: simultaneous 95 % limits over all that decide."""
    decisive = rows[rows["verdict"] != ""]
    shifts, ratios = (decisive[decisive["metric"].isin(metrics)] for metrics in (LOCATIONS, WIDTHS))
    z = simultaneous_z(len(shifts) + len(ratios))
    shift = float((shifts["value"].abs() + z * shifts["se"]).max())
    ends = [interval(v, s, log=True, z=z) for v, s in zip(ratios["value"], ratios["se"], strict=True)]
    low, high = min(e[0] for e in ends), max(e[1] for e in ends)
    return f"shifts below {shift:.2f} sd, sds {low:.2f} to {high:.2f} x {than}, at once with 95 %"


def _wrong_sentence(rows: pd.DataFrame, wrong: list[str], count: int, than: str) -> str:
    by_quantity = dict(list(rows.groupby("quantity", sort=False)))
    words = {name: directions(by_quantity[name]) for name in wrong}
    parts = []
    for word in (NARROW, WIDE, UP, DOWN):
        names = [name for name in wrong if word in words[name]]
        if names:
            parts.append((len(names), f"{len(names)} of {count} {_group(rows, names, word, than)}"))
    parts.sort(key=lambda part: -part[0])
    return f"no: {'; '.join(text for _, text in parts)}{_rest(rows, words)}"


def _group(rows: pd.DataFrame, names: list[str], word: str, than: str) -> str:
    """What is wrong with all these quantities, the range of the error, and the worst of them."""
    widths = word in (NARROW, WIDE)
    own = rows[rows["quantity"].isin(names)]
    of_kind = own[own["metric"].isin(WIDTHS if widths else LOCATIONS) & (own["verdict"] == Verdict.WRONG.value)]
    if of_kind.empty:
        mass = own[(own["metric"] == "coverage_90") & (own["verdict"] == Verdict.WRONG.value)]
        worst = mass.iloc[int(np.argmax(np.abs(mass["value"].to_numpy() - 0.9)))]
        number = Estimate(worst["value"], worst["se"])
        return f"{word} (the 90 % interval of {worst['quantity']} holds {number} of {than})"
    values = of_kind["value"].to_numpy()
    if widths and (values == 0).all():
        return f"{'has' if len(names) == 1 else 'have'} no spread at all: the guide is a point there"
    low, high = of_kind.iloc[int(np.argmin(values))], of_kind.iloc[int(np.argmax(values))]
    worst = low if word in (NARROW, DOWN) else high
    measure = _measure(of_kind["metric"], widths)
    unit = f" x {than}" if widths else " sd"
    if len(names) == 1:
        return f"{word}: {worst['quantity']} ({measure}{Estimate(worst['value'], worst['se'])}{unit})"
    numbers = " to ".join(dict.fromkeys(rounded(row["value"], row["se"])[0] for row in (low, high)))
    return f"{word} ({measure}{numbers}{unit}), worst {worst['quantity']}"


def _measure(metrics: pd.Series, widths: bool) -> str:
    if widths:
        return "sd " if (metrics == "sd_ratio").any() else "5 to 95 % spread "
    return "by "


def _rest(rows: pd.DataFrame, words: dict[str, list[str]]) -> str:
    """What is not wrong: the means or the widths, if all of them are right."""
    said = {word for group in words.values() for word in group}
    for metrics, named, text in ((LOCATIONS, {UP, DOWN}, "the means are"), (WIDTHS, {NARROW, WIDE}, "the sds are")):
        own = rows[rows["metric"].isin(metrics) & (rows["verdict"] != "")]
        if not (said & named) and len(own):
            right = int((own["verdict"] == Verdict.RIGHT.value).sum())
            if right == len(own):
                return f"; {text} right"
            return f"; {text} right for {right} of {len(own)}, cannot tell for the others"
    return ""


def probability(value: float, se: float) -> str:
    """A probability with its error; never more decimals than four."""
    if not math.isfinite(se) or se <= 0:
        return f"{value:.3g}"
    places = min(decimals(se), 4)
    return f"{value:.{places}f} ± {se:.{places}f}"


def at_most(nats: float) -> str:
    """An upper limit as text: two digits, three decimals at the most, rounded up so that it stays a limit."""
    if not math.isfinite(nats):
        return "no finite limit"
    nats = max(nats, 0.001)
    places = min(max(1 - math.floor(math.log10(nats)), 0), 3)
    # Less a millionth, so that 0.07, which no float is, stays 0.07.
    return f"{math.ceil(nats * 10**places * (1 - 1e-6)) / 10**places:,.{places}f}"


def whose(
    rows: pd.DataFrame,
    certificate: Certificate | None,
    thresholds: Thresholds,
    *,
    climbs: bool = True,
    sampled: bool = False,
) -> str:
    """Whether what is wrong with a guide is the family's or may be the optimiser's; empty if nothing is wrong.

    Args:
        rows: The guide's rows of the table.
        certificate: How far the family's best may lie above the fit; None if that is not known.
        thresholds: What counted as right.
        climbs: Whether the fit raised the ELBO: else the optimiser has no share.
        sampled: Whether the fit took moments of draws: else their error has no share.
    """
    wrong = rows[rows["verdict"] == Verdict.WRONG.value]
    names = set(wrong["quantity"])
    if not names:
        return ""
    widths = wrong.loc[wrong["metric"].isin(WIDTHS), "value"]
    if len(widths) and (widths == 0).all():
        moved = (
            ""
            if wrong.loc[wrong["metric"].isin(LOCATIONS)].empty
            else ("; where the point lies is its aim's, a maximum of the density, which moves with the coordinates")
        )
        return f"that there is no spread is the family's, whose members are points{moved}"
    if not climbs:
        drawn = " or its draws', whose own error is told with how it was fitted," if sampled else ","
        return f"its algorithm does not climb the ELBO: what is wrong is its approximation's{drawn} and no optimiser's"
    if certificate is None or not math.isfinite(certificate.limit):
        return "whether the family's or the optimiser's is not known: there is no certificate"
    limit = certificate.limit
    # Coverage is moved by mean and sd, and nothing is claimed of it alone.
    numbers = wrong[wrong["metric"] != "coverage_90"]
    parts = zip(numbers["quantity"], numbers["value"], numbers["se"], numbers["metric"], strict=True)
    unclear = {name for name, value, se, metric in parts if not beyond_reach(value, se, metric, limit, thresholds)}
    certain = set(numbers["quantity"]) - unclear
    told = "is estimated to have left" if certificate.scope is Scope.ESTIMATE else "left"
    left = f"the optimiser {told} at most {at_most(limit)} nats"
    left += "" if certificate.scope is Scope.ESTIMATE else f" ({certificate.scope.value})"
    if certain == names:
        return f"{left}: near a Gaussian posterior, all that is wrong is the family's"
    if not certain:
        return f"{left}, which may explain what is wrong: the family's or the optimiser's is not known"
    return (
        f"{left}: near a Gaussian posterior, {len(certain)} of the {len(names)} wrong are the family's, the others may "
        "in part be the optimiser's"
    )
