"""Numbers as text, rounded by their errors, and the small tables that the report is read by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from toolkit.comparison.sentences import ended
from toolkit.estimate import decimals, rounded
from toolkit.reporting.arrival import GAP, OPTIMA, gap_cell, no_optimum, optima_cell
from toolkit.reporting.contents import Cell, Column, Table
from toolkit.reporting.palette import Look
from toolkit.sampling.diagnostics import rounded_rhat

NONE = "–"
_POINT = 1e-9  # of a mean: a smaller error is that of sums over equal draws
SHARED = (
    "Guides of one chart share the search for starts and the density's compiled programs. A study pays for them once "
    "(“starts” among the seconds by stage); each guide's seconds count them in full, as if it had been fitted alone."
)


def minus(text: str) -> str:
    """The text with a true minus sign in front of negative numbers, as wide as a plus."""
    return text.replace("-", "−", 1) if text.startswith("-") else text


def number(value: float, se: float = math.nan, *, marked: bool = False, note: str = "") -> Cell:
    """A cell with a value rounded by its error; a dash where there is none."""
    if not math.isfinite(value):
        return Cell(NONE if math.isnan(value) else minus(f"{value}"), note=note)
    text, error = rounded(value, se)
    return Cell(minus(text), error, marked, note)


def significant(value: float, digits: int = 3) -> str:
    """A number without an error, with so many significant digits and thousands apart."""
    if not math.isfinite(value):
        return NONE
    if value and abs(value) >= 10**digits:
        return minus(f"{value:,.0f}")
    return minus(f"{value:.{digits}g}")


def seconds(value: float) -> str:
    """Seconds with one decimal below ten, none above a hundred."""
    return NONE if not math.isfinite(value) else f"{value:.1f} s" if value < 100 else f"{value:,.0f} s"


def bytes_in_words(count: int) -> str:
    """A size in the largest unit that keeps it above one."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B" if count else NONE


_GUIDE_COLUMNS = (
    Column("guide", "The family, with NumPyro's class below it.", numeric=False),
    Column(
        "ELBO (nats)",
        "Evidence lower bound on fresh draws; higher is better. The lowest is marked. A fit that had no optimum to go "
        "to has a dash here and in what follows: such numbers would say when it was stopped.",
    ),
    GAP,
    Column(
        "worst shift (sd)",
        "Guide's mean minus the reference's, in reference sd, of the quantity where that is largest; 0 is right. A "
        "worst of many is a maximum over noise: below it, between what the shift lies that is truly the largest (95 %, "
        "over all quantities at once); so in the next two columns.",
    ),
    Column("worst sd ratio", "Guide's sd divided by the reference's, of the quantity where that is furthest from 1."),
    Column(
        "worst coverage",
        "Mass of the reference inside the guide's central 90 % interval, of the quantity furthest from 0.90.",
    ),
    Column(
        "k-hat",
        "Pareto tail index of the importance weights from guide to posterior. Above 0.7 they cannot "
        "repair the guide; "
        "no verdict leans on it.",
    ),
    Column(
        "seconds",
        f"Wall-clock time of the fit, compilation included. {SHARED}",
    ),
)


_WORST_TITLES = ("worst shift (sd)", "worst sd ratio", "worst coverage")


def guides_table(
    guides: pd.DataFrame, fits: Sequence[Any], looks: Mapping[str, Look], against: str, trusted: bool
) -> Table:
    """The table of the first screen: guides by (ELBO, gap, worst shift, sd ratio, coverage, k-hat, seconds).

    What is compared with a reference that is not `trusted` is shown, and none of it is marked as the worst.
    """
    with np.errstate(divide="ignore"):  # a point mass has a ratio of 0
        width = np.abs(np.log(guides["worst_sd_ratio"].to_numpy(dtype=float)))
    badness = pd.DataFrame(
        {
            "elbo": -guides["elbo"],
            "worst_shift": guides["worst_shift"].abs(),
            "worst_sd_ratio": width,
            "worst_coverage_90": (guides["worst_coverage_90"] - 0.9).abs(),
            "khat": guides["khat"],
            "seconds": guides["seconds"],
        }
    ).astype(float)
    worst = {metric: badness[metric].idxmax() for metric in badness if badness[metric].notna().sum() > 1}
    if not trusted:
        worst = {metric: guide for metric, guide in worst.items() if not str(metric).startswith("worst_")}
    gaps = {fit.guide.name: gap_cell(fit) for fit in fits}
    why = {fit.guide.name: no_optimum(fit) for fit in fits}
    rows = []
    for name, row in guides.iterrows():
        title = str(row["title"])
        head = Cell(str(name), note=title[len(str(name)) :].strip(" ()"), place=looks[str(name)].place)
        cells = [head]
        for metric in ("elbo", "worst_shift", "worst_sd_ratio", "worst_coverage_90", "khat"):
            marked = worst.get(metric) == name
            # The reason stands where the first number would.
            note = why[str(name)] if metric == "elbo" else _worst_note(row, metric)
            cells.append(number(row[metric], row[f"{metric}_se"], marked=marked, note=note))
            if metric == "elbo":
                cells.append(gaps[str(name)])
        time = f"{row['seconds']:.1f}" if math.isfinite(row["seconds"]) else NONE
        cells.append(Cell(time, marked=worst.get("seconds") == name))
        rows.append(tuple(cells))
    return Table(f"Every guide against {against}", _GUIDE_COLUMNS, tuple(rows))


def _worst_note(row: pd.Series, metric: str) -> str:
    """Whose the worst is, and between what the error lies that is truly the largest."""
    name = str(row.get(f"{metric}_quantity", "") or "")
    least, most = (row.get(f"{metric}_{end}", math.nan) for end in ("least", "most"))
    if not name or not (math.isfinite(least) and math.isfinite(most)):
        return name
    if metric == "worst_sd_ratio":
        sign = -1.0 if row[metric] < 1.0 else 1.0
        low, high = sorted((math.exp(sign * least), math.exp(sign * most)))
    elif metric == "worst_coverage_90":
        sign = -1.0 if row[metric] < 0.9 else 1.0
        low, high = sorted((max(0.9 + sign * least, 0.0), min(max(0.9 + sign * most, 0.0), 1.0)))
    else:
        sign = -1.0 if row[metric] < 0.0 else 1.0
        low, high = sorted((sign * least, sign * most))
    return f"{minus(f'{low + 0.0:.2f}')} to {minus(f'{high + 0.0:.2f}')}, {name}"


def corrections_table(corrections: pd.DataFrame) -> Table | None:
    """The corrections: verdict in words, and their worst errors; None without any."""
    if corrections.empty:
        return None
    columns = (
        Column("correction", "The guide, and what was done to it.", numeric=False),
        Column("in words", "Its verdict, by the same rules as a guide's.", numeric=False),
        *(column for column in _GUIDE_COLUMNS if column.title in _WORST_TITLES),
    )
    rows = []
    for name, row in corrections.iterrows():
        worst = [
            number(row[metric], row[f"{metric}_se"], note=_worst_note(row, metric))
            for metric in ("worst_shift", "worst_sd_ratio", "worst_coverage_90")
        ]
        rows.append((Cell(str(name), note=str(row["title"]).partition(", ")[2]), Cell(str(row["sentence"])), *worst))
    return Table("Corrections, each judged like a guide", columns, tuple(rows))


def focus_table(focus: pd.DataFrame, looks: Mapping[str, Look], against: str, trusted: bool) -> Table | None:
    """The user's own quantities: one row each, the reference first and each guide beside it; None without any.

    A guide that is not judged has a dash for its words where others have some; the reason is told with its verdict.
    """
    if focus.empty:
        return None
    present = list(dict.fromkeys(focus["source"]))
    sources = [s for s in ("reference", *looks) if s in present]
    judged = bool((focus["sentence"].fillna("") != "").any())
    columns = [Column("quantity", "As it was asked for; P(…) is the probability of an event.", numeric=False)]
    for source in sources:
        columns.append(
            Column(
                f"{against}{'' if trusted else ' (failed its checks)'}" if source == "reference" else source,
                "Mean and central 90 % interval; for an event its probability. The error is Monte Carlo's.",
                numeric=False,
            )
        )
    rows = []
    for item, group in focus.groupby("item", sort=False):
        by_source = {row["source"]: row for _, row in group.iterrows()}
        event = bool(group["event"].iloc[0])
        cells = [Cell(f"P({item})" if event else str(item))]
        for source in sources:
            place = looks[source].place if source in looks else None
            cells.append(_focus_cell(by_source[source], place, judged) if source in by_source else Cell(NONE))
        rows.append(tuple(cells))
    return Table("Your quantities", tuple(columns), tuple(rows))


def _focus_cell(row: pd.Series, place: int | None, judged: bool) -> Cell:
    # The first words decide; the whole sentence stands in its own section.
    sentence = str(row["sentence"] or "").partition(":")[0] or (NONE if judged and place is not None else "")
    if row["event"]:
        cell = number(row["probability"], row["probability_se"])
        return Cell(cell.text, cell.error, note=sentence, place=place)
    if not math.isfinite(row["mean"]):
        return Cell(NONE, note=sentence, place=place)
    # The ends of an interval are less certain than its middle: one decimal fewer than the mean's error allows.
    places = max(0, decimals(row["mean_se"]) - 1)
    form = f".{places}f" if row["mean_se"] > _POINT * abs(row["mean"]) else ".3g"  # of a point the error is rounding
    low, high, mean = (minus(f"{row[column]:z{form}}") for column in ("low", "high", "mean"))
    return Cell(f"{mean} [{low}, {high}]", note=sentence, place=place)


def focus_sentences(focus: pd.DataFrame, looks: Mapping[str, Look]) -> Table | None:
    """What one may say of the user's own quantities from each guide alone; None where nothing is said."""
    said = focus[focus["sentence"].fillna("").astype(str) != ""]
    if said.empty:
        return None
    columns = (Column("quantity", numeric=False), Column("guide", numeric=False), Column("in words", numeric=False))
    rows = [
        (
            Cell(f"P({row['item']})" if row["event"] else str(row["item"])),
            Cell(str(row["source"]), place=looks[row["source"]].place if row["source"] in looks else None),
            Cell(str(row["sentence"])),
        )
        for _, row in said.sort_values("item", kind="stable", key=_first_seen).iterrows()
    ]
    return Table("Your quantities, guide by guide", columns, tuple(rows), explained=False)


def _first_seen(items: pd.Series) -> pd.Series:
    return pd.Series(pd.factorize(items)[0], index=items.index)


def agreement_table(agreement: pd.DataFrame, most: int = 20) -> Table:
    """What the guides say to each other, for the quantities on which they differ most."""
    distance = (agreement["mean_largest"] - agreement["mean_smallest"]) / agreement["sd_largest"]
    shown = agreement.loc[distance.sort_values(ascending=False, kind="stable").index].head(most)
    columns = (
        Column("quantity", "The scalar, by its site and label.", numeric=False),
        Column("smallest mean", "Over the guides."),
        Column("largest mean", "Over the guides."),
        Column("smallest sd", "Over the guides."),
        Column("largest sd", "Over the guides."),
        Column(
            "in words",
            "Guides that agree may be wrong together; guides that disagree cannot all be right.",
            numeric=False,
        ),
    )
    numbers = ("mean_smallest", "mean_largest", "sd_smallest", "sd_largest")
    rows = [
        (Cell(str(row["quantity"])), *(Cell(significant(row[c])) for c in numbers), Cell(str(row["sentence"])))
        for _, row in shown.iterrows()
    ]
    caption = f"The {len(shown)} quantities of {len(agreement)} on which the guides differ most"
    return Table(caption, columns, tuple(rows))


def worst_diagnostics(diagnostics: pd.DataFrame, most: int = 5) -> Table:
    """R-hat and ESS of the quantities that the chains know least about."""
    order = diagnostics["rhat"].rank(ascending=False) + diagnostics[["ess_bulk", "ess_tail"]].min(axis=1).rank()
    shown = diagnostics.loc[order.sort_values(kind="stable").index].head(most)
    columns = (
        Column("quantity", "The scalar, by its site and label.", numeric=False),
        Column("R-hat", "Spread between chains over spread within; at most 1.01 (Vehtari et al. 2021)."),
        Column("bulk ESS", "Independent draws that would know the centre as well; at least 400."),
        Column("tail ESS", "The same for the 5 % and 95 % quantiles; at least 400."),
    )
    rows = [
        (
            Cell(str(name)),
            Cell(rounded_rhat(row["rhat"]) if math.isfinite(row["rhat"]) else NONE),
            Cell(_whole(row["ess_bulk"])),
            Cell(_whole(row["ess_tail"])),
        )
        for name, row in shown.iterrows()
    ]
    return Table(f"The {len(shown)} worst of {len(diagnostics)} quantities", columns, tuple(rows))


def _whole(draws: float) -> str:
    """Effective draws as a whole number, rounded down: what is below a limit is not to look as if it reached it."""
    return f"{math.floor(draws):,}" if math.isfinite(draws) else NONE


def sites_table(model: Any) -> Table:
    """The model's sites in program order: kind, distribution, shape, dims."""
    columns = (
        Column("site", "NumPyro's name.", numeric=False),
        Column(
            "kind",
            "Latent: inferred. Observed: data. Deterministic: computed. Factor: a term of the log density.",
            numeric=False,
        ),
        Column("distribution", "Its prior, or for an observed site its likelihood.", numeric=False),
        Column("shape", "Of one value.", numeric=False),
        Column("dims", "The names of its axes.", numeric=False),
    )
    rows = [
        (
            Cell(site.name),
            Cell(site.kind),
            Cell(site.distribution or NONE),
            Cell(" × ".join(map(str, site.shape)) or "scalar"),
            Cell(", ".join(model.dims(site.name)) or NONE),
        )
        for site in model.sites.values()
    ]
    return Table(f"The {len(rows)} sites of the model", columns, tuple(rows))


def fits_table(fits: Sequence[Any], looks: Mapping[str, Look]) -> Table:
    """How each fit ended and what it cost."""
    columns = (
        Column("guide", "The family.", numeric=False),
        Column("how it ended", "The fit's status.", numeric=False),
        GAP,
        OPTIMA,
        Column("compile (s)", f"Tracing and compiling. {SHARED}"),
        Column("run (s)", "Searching for starts, optimising and measuring; the search is shared, as above."),
        Column("gradients", "Evaluations of the log density's gradient, those of the shared search counted."),
        Column("peak memory", "Largest compiled program with its arrays."),
        Column("invalid steps", "Steps skipped because something was NaN or infinite."),
    )
    rows = []
    for fit in fits:
        how = ended(fit) + (f" ({fit.message})" if fit.message else "")
        rows.append(
            (
                Cell(fit.guide.name, place=looks[fit.guide.name].place),
                Cell(how),
                gap_cell(fit, long=True),
                optima_cell(fit),
                Cell(f"{fit.cost.compile_seconds:.1f}"),
                Cell(f"{fit.cost.run_seconds:.1f}"),
                Cell(f"{fit.cost.gradient_evaluations:,}"),
                Cell(bytes_in_words(fit.cost.peak_bytes)),
                Cell(f"{fit.invalid_steps:,}"),
            )
        )
    return Table("The fits", columns, tuple(rows))


def pairs_table(caption: str, heads: tuple[Column, Column], rows: Mapping[str, str]) -> Table:
    """A table of two columns."""
    return Table(caption, heads, tuple((Cell(name), Cell(value)) for name, value in rows.items()), explained=False)
