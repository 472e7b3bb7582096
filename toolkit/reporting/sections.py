"""What stands below the first screen: one question for each section, with its figure and how to read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from toolkit.comparison.verdicts import Thresholds
from toolkit.modelling.model import Quantity
from toolkit.modelling.scalars import scalars
from toolkit.reporting.arrival import optima_sentences, solver_sentences, unclimbed_sentences, whose_sentences
from toolkit.reporting.contents import Block, Column, Section, Text
from toolkit.reporting.differences import worst_first
from toolkit.reporting.figures.forest import MOST_ROWS, forest, strip
from toolkit.reporting.figures.health import reference_health
from toolkit.reporting.figures.pairs import correlation_matrices, pair_contours
from toolkit.reporting.figures.scatter import shift_and_ratio
from toolkit.reporting.figures.traces import elbo_traces
from toolkit.reporting.palette import Look
from toolkit.reporting.tables import (
    agreement_table,
    corrections_table,
    fits_table,
    focus_sentences,
    pairs_table,
    seconds,
    worst_diagnostics,
)
from toolkit.sampling.diagnostics import EBFMI_LIMIT

_LACKS_REFERENCE = "Left out: there are no reference draws to compare with."
_LACKS_FITS = "Left out: no guide has draws to show."


def agreement(comparison: Any) -> Section | None:
    """What the guides agree on, where the reference cannot say who is right; None where it can."""
    if comparison.reference_ok or comparison.agreement.empty:
        return None
    told = comparison.agreement["sentence"].str.partition(":")[0].value_counts()
    counts = "; ".join(f"{text} on {count} of {len(comparison.agreement)} quantities" for text, count in told.items())
    return Section(
        "agreement", "What do the guides agree on?", (f"{_capital(counts)}.", agreement_table(comparison.agreement))
    )


def your_quantities(comparison: Any, looks: Mapping[str, Look]) -> Section | None:
    """The sentences on the user's own quantities; None without any."""
    table = focus_sentences(comparison.focus, looks)
    return Section("your-quantities", "What may be said of your quantities?", (table,)) if table else None


def which_quantities(
    study: Any, frame: pd.DataFrame, looks: Mapping[str, Look], limits: Thresholds, against: str
) -> Section:
    """The forest of the worst quantities, and a strip of all where there are many."""
    quantities = study.comparison.quantities
    blocks: list[Block] = []
    if set(quantities["source"]) - {"reference"}:
        order = worst_first(frame) or list(dict.fromkeys(quantities["quantity"]))
        total = quantities["quantity"].nunique()
        if total > MOST_ROWS:
            blocks.append(
                f"The {MOST_ROWS} quantities with the worst errors, of {total}; all are in the table quantities."
            )
        blocks.append(forest(quantities, order, looks, against))
        if total > MOST_ROWS and not frame.empty:
            compared = set(frame.index.get_level_values("guide"))
            shown = {name: look for name, look in looks.items() if name in compared}
            blocks.append(strip(frame, shown, limits, against))
    return Section("quantities", "Which quantities?", tuple(blocks) or (_LACKS_FITS,))


def how_wrong(frame: pd.DataFrame, looks: Mapping[str, Look], limits: Thresholds, against: str) -> Section:
    """Shift against sd ratio."""
    blocks = (shift_and_ratio(frame, looks, limits, against),) if not frame.empty else (_LACKS_REFERENCE,)
    return Section("how-wrong", "Too narrow or too wide, shifted which way?", blocks)


def which_relations(comparison: Any, looks: Mapping[str, Look], against: str) -> Section:
    """The worst pairs and the correlation matrices."""
    blocks: list[Block] = []
    if comparison.pairs.empty or "reference" not in comparison.correlations:
        one = comparison.quantities["quantity"].nunique() == 1
        blocks.append("Left out: with one quantity there are no pairs." if one else _LACKS_REFERENCE)
    else:
        blocks.append(pair_contours(comparison.pairs, comparison.sample, looks, against))
        known = [comparison.correlations[name] for name in looks if name in comparison.correlations]
        if any(matrix.notna().any(axis=None) for matrix in known):  # a point has none
            blocks.append(correlation_matrices(comparison.correlations, looks, against))
    return Section("relations", "Which relations are lost?", tuple(blocks))


def what_repairs(comparison: Any) -> Section | None:
    """The corrections, each judged like a guide; None where there are none."""
    table = corrections_table(comparison.corrections)
    if table is None:
        return None
    text = (
        "Weights by importance (Pareto-smoothed) bring a guide's draws nearer to the posterior where k-hat is at most "
        "0.7; resampling gives a thousand draws without weights. Linear response gives a mean field the correlations "
        "by which its means answer a tilt of the posterior. Each is judged like a guide."
    )
    return Section("repairs", "What would repair it?", (text, table))


def did_it_arrive(fits: Any, table: pd.DataFrame, looks: Mapping[str, Look], limits: Thresholds) -> Section:
    """The traces, how each fit ended, to which optima, and whose fault what is wrong is.

    Args:
        fits: The fits.
        table: The comparison's long table.
        looks: How the guides are shown.
        limits: What counted as right.
    """
    traced = [fit for fit in fits if fit.traces]
    blocks: list[Block] = [elbo_traces(traced, looks)] if traced else ["Left out: no fit kept a trace."]
    blocks += [fits_table(fits, looks), *solver_sentences(fits), *unclimbed_sentences(fits), *optima_sentences(fits)]
    return Section("arrival", "Did the fits arrive?", (*blocks, *whose_sentences(fits, table, limits)))


def reference_trusted(study: Any) -> Section:
    """The reference's checks."""
    reference = study.reference
    chart = f", in chart “{reference.chart}”" if reference.origin.startswith("NUTS") else ""
    blocks: list[Block] = [f"{_capital(reference.origin)}{chart}: {reference.status.value}."]
    blocks += [_capital(reason) for reason in reference.reasons]
    if reference.usable:
        table = reference.diagnostics
        if not table.empty and table["rhat"].notna().any():
            worst = str(table["rhat"].idxmax())
            # The worst may be a latent that is no quantity: every drawn site is looked through.
            named = scalars(study.model, reference.draws, tuple(Quantity(site) for site in reference.draws))
            blocks.append(reference_health(reference, worst, named.values[:, :, named.names.index(worst)]))
            blocks.append(worst_diagnostics(table))
        if reference.ebfmi is not None:
            energies = ", ".join(f"{value:.2f}" for value in np.asarray(reference.ebfmi))
            blocks.append(
                f"E-BFMI by chain: {energies} (below {EBFMI_LIMIT:g} the sampler explores the energy too slowly)."
                f"{_counted('Divergent transitions', reference.divergences)}"
                f"{_counted('Transitions at the largest tree depth', reference.tree_depth_hits)}"
            )
    else:
        blocks.append("There are no draws to show.")
    if reference.methods:
        blocks.append(reference.methods)
    return Section("reference", "Can the reference be trusted?", tuple(blocks))


def _counted(what: str, count: int | None) -> str:
    return "" if count is None else f" {what}: {count:,}."


def made_how(study: Any, files: Mapping[str, str]) -> Section:
    """Versions, seed, machine, command, seconds by stage, files."""
    data = study.model.dataset
    stages = {name: seconds(value) for name, value in study.stages.items()}
    stages["in all"] = seconds(sum(study.stages.values()))
    origin = {
        "dataset": data.name,
        "source": data.source,
        "licence": data.licence,
        "seed": str(study.seed),
        "machine": study.machine,
        **{f"version of {name}": version for name, version in study.versions.items()},
    }
    blocks: list[Block] = [Text("This command makes the report again", study.command)]
    resumed = getattr(study, "resumed", ())
    if resumed:
        blocks.append(f"Taken from the cache: {', '.join(resumed)}; their seconds are those of the first time.")
    blocks += list(getattr(study, "notes", ()))
    blocks.append(pairs_table("Data, machine, versions", _words("what", "value"), origin))
    blocks.append(pairs_table("Seconds by stage", (Column("stage", numeric=False), Column("wall clock")), stages))
    blocks.append(pairs_table("Files beside this report", _words("file", "holds"), files))
    return Section("made-how", "Made how?", tuple(blocks))


def _words(first: str, second: str) -> tuple[Column, Column]:
    return Column(first, numeric=False), Column(second, numeric=False)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
