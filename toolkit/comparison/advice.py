"""What to do next, in sentences: which guide to report, what to try where none is right, what to run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pandas as pd

from toolkit.comparison.overall import Overall
from toolkit.comparison.sentences import LOCATIONS, how_many_more
from toolkit.comparison.verdicts import Verdict, simultaneous_z
from toolkit.estimate import Estimate
from toolkit.modelling.check import index_past_its_array
from toolkit.modelling.model import Model
from toolkit.variational.block_search import plate_blocks
from toolkit.variational.chain_search import find_chain

# What a family that is too narrow may be replaced by, cheapest first.
_LADDER = ("mean_field", "blocks", "chain", "low_rank", "full_rank", "mixture", "iaf")
_EXPRESS = {
    "blocks": "a guide with blocks that the model's own structure names",
    "chain": "a Gaussian along the chain that the model has, at a cost linear in its length",
    "low_rank": "a family with a few directions of correlation",
    "full_rank": "a family with every correlation",
    "mixture": "a mixture of Gaussians, for several modes or tails",
    "iaf": "a flow, which bends",
}
_RICHEST = "full_rank"
_OWN_ALGORITHM = ("chain", "mixture")  # which looks at no chart with parameters, and is no case for another solver
_STRUCTURED: dict[str, Callable[[Model], bool]] = {
    "blocks": lambda model: bool(plate_blocks(model).runs),
    "chain": lambda model: (chain := find_chain(model)).blocks > 0 and chain.saves,
}
"""Whether a model has the structure that a guide is for."""


def advise(
    model: Model,
    guides: pd.DataFrame,
    table: pd.DataFrame,
    whole: Overall,
    corrections: pd.DataFrame,
    scores: pd.DataFrame,
    reference_problem: str,
    reference_chart: str,
    reference_seconds: float,
    reference_failed: bool,
    reference_modes: bool,
    longer_helps: bool,
) -> tuple[str, ...]:
    """The next steps, the most important first.

    Args:
        model: The model compared.
        guides: The comparison's table of guides.
        table: The comparison's long table.
        whole: The study's verdict.
        corrections: The comparison's table of corrections.
        scores: What predicting with each guide costs.
        reference_problem: Why the reference gives no verdict; empty if it does.
        reference_chart: The chart that NUTS ran in.
        reference_seconds: What NUTS cost; NaN if the reference is not NUTS's, or unknown.
        reference_failed: Whether the problem is its checks, or that it has no draws.
        reference_modes: Whether its chains are stuck or sit in different modes.
        longer_helps: Whether longer chains may mend what it failed.
    """
    sentences = []
    if reference_problem:
        # JAX takes an array's last entry for what lies beyond it: no longer run and no chart mends that.
        mend = index_past_its_array(model) or (
            _repair_reference(model, reference_chart, reference_modes, longer_helps)
            if reference_failed
            else "Until then read where the guides agree and disagree."
        )
        sentences.append(f"No guide can be judged yet: {reference_problem}. {mend}")
    wrong = guides[guides["verdict"] == Verdict.WRONG.value]
    rows = {str(name): row for name, row in guides.iterrows()}
    if whole.verdict is Verdict.RIGHT:
        sentences.append(_report(rows[whole.guide], reference_seconds))
    elif whole.verdict is Verdict.CANNOT_TELL:
        unknown = [rows[name] for name, verdict in whole.chosen.items() if verdict is Verdict.CANNOT_TELL]
        sentences.append(_draw_more(min(unknown, key=lambda row: row["seconds"]), table))
    elif whole.verdict is Verdict.WRONG:
        sentences.append("Report the reference's intervals: no guide that was judged is right in what was asked for.")
        sentences.append(_try(model, guides, corrections))
    sentences += [_means_only(str(name), table) for name in wrong.index if _means_right(str(name), table)]
    sentences += _to_predict(guides, scores, whole)
    return (*sentences, *_fit_better(guides))


def _fit_better(guides: pd.DataFrame) -> list[str]:
    """What to do for fits that used up their budget, or of which it is not known how far from the best they are."""
    status, wrong = guides["status"], guides["verdict"] == Verdict.WRONG.value
    late = _names(guides[status == "BUDGET"])
    own = guides.index.str.partition("@").get_level_values(0).str.replace(r"_\d+$", "", regex=True).isin(_OWN_ALGORITHM)
    few = _names(guides[(status == "TOO_FEW_DRAWS") & ~own])
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


def _report(cheapest: pd.Series, reference_seconds: float) -> str:
    saved = ""
    if math.isfinite(reference_seconds) and reference_seconds > 0 and cheapest["seconds"] > 0:
        saved = f" It took {cheapest['seconds']:.3g} s, NUTS {reference_seconds:.3g} s"
        saved += "." if cheapest["seconds"] < reference_seconds else ": here NUTS is the quicker of the two."
    count, right = cheapest["quantities"], cheapest["right"]
    found = "its only quantity is right" if count == 1 else f"all {count} of its quantities are right"
    if right < count:
        counts = {"right": right, "wrong": cheapest["wrong"], "undecided": cheapest["cannot_tell"]}
        told = ", ".join(
            f"{number} {'is' if number == 1 else 'are'} {word}" for word, number in counts.items() if number
        )
        return (
            f"Report what you asked for from {cheapest.name}: it is right in that. Of {count} "
            f"{'quantity' if count == 1 else 'quantities'} in all, {told}.{saved}"
        )
    return f"Report {cheapest.name}'s intervals: {found}.{saved}"


def _draw_more(guide: pd.Series, table: pd.DataFrame) -> str:
    """Which multiple of the draws would settle what is undecided, if the values stay where they are."""
    own = table[table["guide"] == guide.name]
    if not guide["cannot_tell"]:
        return f"Draw more from the reference: the draws are too few to judge {guide.name} in what you asked for."
    more = how_many_more(own)
    settled = f"{more} draws would decide them" if "would decide" not in more else f"{more}"
    return (
        f"Draw more from the reference: {guide['cannot_tell']} of {guide['quantities']} quantities of {guide.name} "
        f"are undecided; {settled} if the numbers stay where they are."
    )


def _try(model: Model, guides: pd.DataFrame, corrections: pd.DataFrame) -> str:
    """What may be right where nothing that was fitted is, the cheapest first."""
    names = {str(name) for name in guides.index}
    tried = {name.partition("@")[0] for name in names}
    highest = max((i for i, name in enumerate(_LADDER) if name in tried), default=-1)
    steps = [
        f"another chart of the same posterior ({_with_guide(f'{_RICHEST}@{chart}')})"
        for chart in model.charts
        if chart != model.chart and f"{_RICHEST}@{chart}" not in names
    ][:1]
    richer = (
        name for name in _LADDER[highest + 1 :] if name not in tried and name in _EXPRESS and _applies(name, model)
    )
    steps += [f"{_EXPRESS[name]} ({_with_guide(name)})" for name in itertools.islice(richer, 2)]
    mended = [(str(name), row) for name, row in corrections.iterrows() if row["verdict"] and not row["wrong"]]
    if mended:
        name, row = max(mended, key=lambda pair: pair[1]["right"])
        found = "all" if row["right"] == row["quantities"] else f"{row['right']} (and wrong in none)"
        steps.append(f"{row['title']}, which is right in {found} of {row['quantities']} quantities ({name} below)")
    if not steps:
        return "Next, write the model in other coordinates (non-centred, rotated, log scale): no richer family is left."
    charts = "" if len(model.charts) > 1 else " Other coordinates, such as non-centred ones, may do as much."
    return f"Next, in this order: {'; '.join(steps)}. NUTS stays the answer until one of them is right.{charts}"


def _applies(name: str, model: Model) -> bool:
    """Whether a guide of that name can be fitted to the model, and has what it is for."""
    if name in _OWN_ALGORITHM and model.parameters(model.chart):
        return False
    return name not in _STRUCTURED or _STRUCTURED[name](model)


def _with_guide(guide: str) -> str:
    """How to fit one more guide; only the user knows the data and the options that the study was called with."""
    return f"`--guides {guide}`"


def _repair_reference(model: Model, tried: str, modes: bool, longer_helps: bool) -> str:
    others = [chart for chart in model.charts if model.charts[chart] != model.charts[tried]]
    named = f" ({', '.join(others)})" if others else ""
    chart = "another chart" if others else "other coordinates"
    until = "; until then read where the guides agree and disagree."
    if modes:
        return (
            "Longer chains mend that only where they cross: its reasons say whether one is stuck, labels have switched "
            f"or there are several modes, and what to do; `mixture` ({_with_guide('mixture')}) weighs the modes that "
            f"starts lead to{until}"
        )
    flat = model.flat_priors
    proper = (
        f"Give {', '.join(flat)} a proper prior, since with a flat one the posterior may be improper; or "
        if flat
        else ""
    )
    if not longer_helps:
        how = f"run NUTS in {chart}{named}" if others else f"write the model in {chart}, such as non-centred ones"
        return _sentence(f"{proper}{how}: what a chain hardly enters, a longer one hardly enters either{until}")
    how = f"in {chart}{named}" if others else f"or write the model in {chart}"
    return _sentence(f"{proper}run NUTS longer, {how}{until}")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _means_right(guide: str, table: pd.DataFrame) -> bool:
    own = _judged_locations(guide, table)
    return bool(len(own)) and bool((own["verdict"] == Verdict.RIGHT.value).all())


def _means_only(guide: str, table: pd.DataFrame) -> str:
    own = _judged_locations(guide, table)
    largest = float((own["value"].abs() + simultaneous_z(len(own)) * own["se"]).max())
    what = "means" if (own["metric"] == "shift").all() else "medians" if (own["metric"] != "shift").all() else "centres"
    return f"{guide} may be used for {what} (all within {largest:.2g} sd), not for all intervals and probabilities."


def _to_predict(guides: pd.DataFrame, scores: pd.DataFrame, whole: Overall) -> list[str]:
    """The cheapest guide whose predictions are right, unless it is the one to report anyway."""
    right = scores[scores["verdict"] == Verdict.RIGHT.value]
    if right.empty:
        return []
    cheapest = min(right.to_dict("records"), key=lambda row: guides.loc[row["source"], "seconds"])
    if cheapest["source"] == whole.guide:
        return []
    lost = Estimate(cheapest["loss"], cheapest["loss_se"])
    return [
        f"To predict single observations at the same predictors {cheapest['source']} will do: {lost} nats lost over "
        f"{cheapest['observations']:,} observations."
    ]


def _judged_locations(guide: str, table: pd.DataFrame) -> pd.DataFrame:
    """The guide's rows of shifts that decide: of means, or of medians where tails are heavy."""
    return table[(table["guide"] == guide) & table["metric"].isin(LOCATIONS) & (table["verdict"] != "")]
