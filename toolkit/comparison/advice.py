"""What to do next, in sentences: which guide to report, what to try where none is right, what to run."""

from __future__ import annotations

import math

import pandas as pd

from toolkit.comparison.sentences import LOCATIONS
from toolkit.comparison.verdicts import Thresholds, Verdict, Z, is_ratio, simultaneous_z
from toolkit.modelling.check import index_past_its_array
from toolkit.modelling.model import Model

# What a family that is too narrow may be replaced by, cheapest first.
_LADDER = ("mean_field", "low_rank", "full_rank", "iaf")


def advise(
    model: Model,
    guides: pd.DataFrame,
    table: pd.DataFrame,
    thresholds: Thresholds,
    reference_problem: str,
    reference_seconds: float,
) -> tuple[str, ...]:
    """The next steps, the most important first.

    Args:
        model: The model compared.
        guides: The comparison's table of guides.
        table: The comparison's long table.
        thresholds: What counted as right.
        reference_problem: Why the reference gives no verdict; empty if it does.
        reference_seconds: What NUTS cost; NaN if the reference is not NUTS's, or unknown.
    """
    sentences = []
    if reference_problem:
        # JAX takes an array's last entry for what lies beyond it: no longer run and no chart mends that.
        mend = index_past_its_array(model) or _repair_reference(model)
        sentences.append(f"No guide can be judged yet: {reference_problem}. {mend}")
    right = guides[guides["verdict"] == Verdict.RIGHT.value]
    unknown = guides[guides["verdict"] == Verdict.CANNOT_TELL.value]
    wrong = guides[guides["verdict"] == Verdict.WRONG.value]
    if len(right):
        sentences.append(_report(right, reference_seconds))
    elif len(unknown):
        sentences.append(_draw_more(unknown.sort_values("seconds").iloc[0], table, thresholds))
    elif len(wrong):
        sentences.append("Report the reference's intervals: no guide that was judged is right in every quantity.")
        sentences.append(_try(model, guides))
    sentences += [_means_only(str(name), table) for name in wrong.index if _means_right(str(name), table)]
    return (*sentences, *_fit_better(guides))


def _fit_better(guides: pd.DataFrame) -> list[str]:
    """What to do for fits that used up their budget, or of which it is not known how far from the best they are."""
    status, wrong = guides["status"], guides["verdict"] == Verdict.WRONG.value
    late = _names(guides[status == "BUDGET"])
    few = _names(guides[status == "TOO_FEW_DRAWS"])
    unproven = _names(guides[(status == "UNPROVEN") & wrong])
    sentences = []
    if late:
        sentences.append(f"Give {late} a larger budget (`--max-gradients`): it was used up before the fit had arrived.")
    if few:
        sentences.append(
            "Ask whether the posterior is proper and whether its density has edges: else draws seldom run out, as they "
            f"did for {few}. If all is well, fit it with `--solver svi`, which gives no certificate, or take a smaller "
            "family."
        )
    if unproven:
        sentences.append(
            f"Before the family of {unproven} is blamed, a larger budget (`--max-gradients`): how much the optimiser "
            "left is not known to the tolerance."
        )
    return sentences


def _names(guides: pd.DataFrame) -> str:
    return ", ".join(str(name) for name in guides.index)


def _report(right: pd.DataFrame, reference_seconds: float) -> str:
    cheapest = right.sort_values("seconds").iloc[0]
    saved = ""
    if math.isfinite(reference_seconds) and reference_seconds > 0 and cheapest["seconds"] > 0:
        saved = f" It took {cheapest['seconds']:.3g} s, NUTS {reference_seconds:.3g} s"
        saved += "." if cheapest["seconds"] < reference_seconds else ": here NUTS is the quicker of the two."
    count = cheapest["quantities"]
    found = "its only quantity is right" if count == 1 else f"all {count} of its quantities are right"
    return f"Report {cheapest.name}'s intervals: {found}.{saved}"


def _draw_more(guide: pd.Series, table: pd.DataFrame, thresholds: Thresholds) -> str:
    """Which multiple of the draws would settle every undecided number, if the values stay where they are."""
    rows = table[(table["guide"] == guide.name) & (table["verdict"] == Verdict.CANNOT_TELL.value)]
    factors = []
    for metric, value, se in zip(rows["metric"], rows["value"], rows["se"], strict=True):
        low, high = thresholds.limits(str(metric)) or (math.nan, math.nan)
        if is_ratio(str(metric)) and value > 0:
            value, se, low, high = math.log(value), se / value, math.log(low), math.log(high)
        margin = min(abs(value - low), abs(high - value))
        factors.append((Z * se / margin) ** 2 if margin > 0 and math.isfinite(se) else math.inf)
    factor = max(factors, default=math.inf)
    text = f"about {max(2, math.ceil(factor))} times as many" if factor <= 50 else "over 50 times as many"
    return (
        f"Draw more from the reference: {guide['cannot_tell']} of {guide['quantities']} quantities of {guide.name} "
        f"are undecided; {text} draws would decide them if the numbers stay where they are."
    )


def _try(model: Model, guides: pd.DataFrame) -> str:
    """A richer family that has not been fitted, or the same families in another chart."""
    tried = {str(name).partition("@")[0] for name in guides.index}
    highest = max((i for i, name in enumerate(_LADDER) if name in tried), default=-1)
    untried = [name for name in _LADDER[highest + 1 :] if name not in tried]
    if untried:
        return f"Next, a family that can express more: {_with_guide(untried[0])}."
    names = {str(name) for name in guides.index}
    charts = [chart for chart in model.charts if chart != model.chart and f"full_rank@{chart}" not in names]
    if charts:
        return f"Next, another chart of the same posterior: {_with_guide(f'full_rank@{charts[0]}')}."
    return "Next, write the model in other coordinates (non-centred, rotated, log scale): no richer family is left."


def _with_guide(guide: str) -> str:
    """How to fit one more guide; only the user knows the data and the options that the study was called with."""
    return f"the same study with `--guides {guide}`"


def _repair_reference(model: Model) -> str:
    others = [chart for chart in model.charts if chart != model.chart]
    chart = f", in another chart ({', '.join(others)})" if others else ", or write the model in other coordinates"
    flat = model.flat_priors
    proper = f"Give {', '.join(flat)} a proper prior, since with a flat one the posterior may be improper; or r"
    return f"{proper if flat else 'R'}un NUTS longer{chart}; until then read where the guides agree and disagree."


def _means_right(guide: str, table: pd.DataFrame) -> bool:
    own = _judged_locations(guide, table)
    return bool(len(own)) and bool((own["verdict"] == Verdict.RIGHT.value).all())


def _means_only(guide: str, table: pd.DataFrame) -> str:
    own = _judged_locations(guide, table)
    largest = float((own["value"].abs() + simultaneous_z(len(own)) * own["se"]).max())
    return f"{guide} may be used for means (all within {largest:.2g} sd), not for intervals or probabilities."


def _judged_locations(guide: str, table: pd.DataFrame) -> pd.DataFrame:
    """The guide's rows of shifts that decide: of means, or of medians where tails are heavy."""
    return table[(table["guide"] == guide) & table["metric"].isin(LOCATIONS) & (table["verdict"] != "")]
