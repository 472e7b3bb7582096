"""The verb `compare`: what differs between a reference and every fit, and what one may say of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pandas as pd
import xarray as xr

from toolkit.comparison import trees
from toolkit.comparison.advice import advise
from toolkit.comparison.corrections import Reweighted
from toolkit.comparison.focus import parse_focus
from toolkit.comparison.focus_tables import focus_table
from toolkit.comparison.gaps import Gaps, gaps
from toolkit.comparison.metrics import NAN, Metrics, Standard, khat, metrics, prepare
from toolkit.comparison.overall import Overall, overall
from toolkit.comparison.pairs import worst_pairs
from toolkit.comparison.predictions import Predictions, predictions
from toolkit.comparison.sentences import ended, guide_sentence
from toolkit.comparison.sources import (
    Approximation,
    guide_draws,
    key_for,
    labelling,
    sites_to_draw,
    thinned,
    to_scalars,
)
from toolkit.comparison.summaries import QUANTITY_COLUMNS, agreement, correlation_frames, summarise
from toolkit.comparison.tables import (
    PAIR_COLUMNS,
    TABLE_COLUMNS,
    join,
    metric_rows,
    quantity_verdicts,
    worst,
)
from toolkit.comparison.verdicts import Thresholds, Verdict, combine
from toolkit.estimate import Estimate
from toolkit.modelling.model import Model
from toolkit.modelling.scalars import Scalars, scalars
from toolkit.progress import Progress, silent
from toolkit.sampling.references import Reference
from toolkit.status import Status
from toolkit.variational.fits import Fit

# A correlation matrix with more rows cannot be read in a figure.
_MATRIX_SCALARS = 60


@dataclass(frozen=True, eq=False)
class Comparison:
    """What differs between the reference and each guide, every number with its error.

    Attributes:
        table: Long table: guide, quantity, metric (see `metrics`), value, se, verdict (`right`, `wrong`,
            `cannot tell`, or empty where a metric decides nothing or nothing may be judged), more_draws (where it
            cannot tell: how many times as many draws would, if the number stayed where it is). Quantities with heavy
            tails have two more rows, `median_shift` and `spread_ratio`, that decide in place of `shift` and `sd_ratio`.
        guides: One row for each fit, failed ones too, by guide name: title, status (the `Status`'s name), verdict,
            sentence (for the first screen); quantities (how many were judged), right, wrong, cannot_tell (counts);
            elbo and elbo_se (nats), khat and khat_se; worst_shift, worst_sd_ratio and worst_coverage_90 with `_se` and
            `_quantity` (largest over all quantities, hence above 0 by noise alone), and with `_least` and `_most`,
            between which the error that is truly the largest lies with 95 % (as distances from 0, from a log ratio of
            0, from 0.9); seconds, gradient_evaluations. NaN or empty where unknown, and where the fit's status says
            that there is no optimum (`Status.has_optimum`): such numbers only say when it was stopped.
        quantities: One row for each source (`reference` or guide) and quantity: title, unit, mean, mean_se, sd, sd_se,
            and the quantiles q5, q25, q50, q75, q95, in the quantity's unit.
        pairs: The 50 pairs of each guide whose correlation differs most: guide, quantity_a, quantity_b, reference,
            guide_value, difference, se.
        correlations: Source to correlation matrix, of the 60 scalars that are worst off if there are more.
        focus: One row for each item asked for and source: see `focus_tables.focus_table`.
        agreement: Where no reference can be trusted, what the guides say to each other: see `summaries.agreement`.
        reference_ok: Whether the reference allows verdicts.
        sample: Source to its scalars, thinned to at most 1,000 draws, for figures.
        overall: The study's verdict, on the user's own quantities where there are any: see `overall.Overall`.
        advice: What to do next, a sentence each, the most important first.
        gaps: How the log evidence splits into what each fit reached, what its optimiser left and what its family cannot
            reach: see `gaps.Gaps`.
        corrections: One row for each correction of a guide, like those of `guides` (their wall-clock seconds count
            the guide's), and `of`, the guide that it corrects; empty if none were asked for.
        predictions: What the reference and each guide predict: see `predictions.Predictions`.
        floors: What wasserstein_1 would be on average if nothing differed: quantities in rows, guides in columns.
        model: What was compared.
        thresholds: What counted as right.
    """

    table: pd.DataFrame
    guides: pd.DataFrame
    quantities: pd.DataFrame
    pairs: pd.DataFrame
    correlations: dict[str, pd.DataFrame]
    focus: pd.DataFrame
    agreement: pd.DataFrame
    reference_ok: bool
    sample: dict[str, Scalars]
    overall: Overall
    advice: tuple[str, ...]
    gaps: Gaps
    corrections: pd.DataFrame
    predictions: Predictions
    floors: pd.DataFrame
    model: Model
    thresholds: Thresholds

    def to_datatree(self) -> xr.DataTree:
        """Draws and errors in the groups `reference` and one for each guide; see `trees.tree`."""
        return trees.tree(self.model, self.sample, self.guides, self.table, self.floors)


@dataclass(frozen=True, eq=False)
class _Side:
    """One fit's part of a comparison: its draws, or why there are none."""

    fit: Approximation
    scalars: Scalars | None
    problem: str
    khat: Estimate = NAN
    metrics: Metrics | None = None


def compare(
    model: Model,
    reference: Reference | None,
    fits: Sequence[Approximation],
    *,
    key: jax.Array,
    draws: int = 10_000,
    focus: Sequence[str] = (),
    thresholds: Thresholds | None = None,
    corrections: Sequence[Reweighted | Fit] = (),
    progress: Progress = silent,
) -> Comparison:
    """Every fit compared with the reference, quantity by quantity.

    An approximation need not come from `fit`: whatever has what `Approximation` lists is compared alike.

    Args:
        model: Whose quantities are compared.
        reference: A `Reference`, or None if there is none; without one that passed its checks nothing is judged.
        fits: `Fit`s, or any other `Approximation`s; guide names must differ.
        key: Random key. Each guide's draws depend on it and on the guide's name alone.
        draws: Draws from each guide; cheap, so that the reference's error dominates.
        focus: The few quantities, contrasts and events that matter, as text: see `focus`.
        thresholds: What counts as right; the defaults of `Thresholds` if None.
        corrections: What may repair a guide, from `corrections.corrections`; judged like guides, in a table of its own.
        progress: Called before each guide.

    Raises:
        ValueError: A focus cannot be parsed, guide names repeat, or fewer than 1,000 draws are asked for.
    """
    thresholds = thresholds or Thresholds()
    _check(fits, draws)
    items = [parse_focus(text, model) for text in ([focus] if isinstance(focus, str) else focus)]
    drawn = dict(reference.draws) if reference is not None and reference.usable else {}
    anchor = labelling(model, drawn) if drawn else None
    truth = scalars(model, drawn) if drawn else None
    problem = _two_posteriors(model) or _reference_problem(reference)
    than = "the reference" if reference is None or reference.status in (Status.EXACT, Status.LOADED) else "NUTS"
    standard = prepare(truth.values) if truth else None
    sides: list[_Side] = []
    for i, (fit, sites) in enumerate(_drawn(model, fits, key, draws)):
        progress("compare", i, len(fits), fit.guide.name)
        side, anchor = _side(model, fit, sites, standard, anchor)
        sides.append(side)
    mended = [_mended(model, fit, standard, anchor, jax.random.fold_in(key, 2), draws) for fit in corrections]
    progress("compare", len(fits), len(fits), "")
    rows = {s.fit.guide.name: _rows(s, truth, thresholds, judged=not problem) for s in sides}
    table = join(list(rows.values()), TABLE_COLUMNS)
    guides = pd.DataFrame([_guide_row(s, rows[s.fit.guide.name], than, problem) for s in sides])
    guides = guides.set_index("guide") if len(guides) else guides
    sources = ({"reference": truth} if truth else {}) | {s.fit.guide.name: s.scalars for s in sides if s.scalars}
    quantities = join([summarise(name, source) for name, source in sources.items()], QUANTITY_COLUMNS)
    astray = {s.fit.guide.name for s in sides if not s.fit.status.has_optimum}
    meant = {name: source for name, source in sources.items() if name not in astray}
    alone = quantities[~quantities["source"].isin(astray)] if problem else quantities.iloc[:0]
    judged = {s.fit.guide.name: not _why_not(s, problem) for s in sides}
    seconds = reference.cost.seconds if reference is not None and than == "NUTS" else float("nan")
    chart = reference.chart if reference is not None else model.chart
    repairs = _corrections_table(mended, truth, thresholds, than, problem)
    asked = focus_table(items, meant, than, thresholds, judged=judged)
    whole = overall(guides, asked, problem)
    split = gaps(model, reference, fits, _largest(table), key=jax.random.fold_in(key, 1))
    progress("predict", 0, 1, "new observations")
    predicted = predictions(
        model,
        reference,
        fits,
        split.drawn,
        key=jax.random.fold_in(key, 3),
        thresholds=thresholds,
        than=than,
        judged=not problem,
    )
    progress("predict", 1, 1, "done")
    return Comparison(
        table=table,
        guides=guides,
        quantities=quantities,
        pairs=join([_pairs(s, truth) for s in sides], PAIR_COLUMNS),
        correlations=_correlations(sources, table),
        focus=asked,
        overall=whole,
        agreement=agreement(alone, thresholds),
        reference_ok=not problem,
        sample={name: thinned(source) for name, source in sources.items()},
        advice=advise(
            model,
            guides,
            table,
            whole,
            repairs,
            predicted.scores,
            problem,
            chart,
            seconds,
            reference_failed=reference is not None and problem == _reference_problem(reference),
            reference_modes=reference is not None and reference.modes,
            longer_helps=reference is not None and reference.status not in (Status.LOW_ENERGY, Status.DIVERGENCES),
        )
        if len(guides)
        else (),
        gaps=split,
        corrections=repairs,
        predictions=predicted,
        floors=_floors(sides, truth),
        model=model,
        thresholds=thresholds,
    )


def _check(fits: Sequence[Approximation], draws: int) -> None:
    names = [fit.guide.name for fit in fits]
    repeated = sorted({name for name in names if names.count(name) > 1 or name == "reference"})
    if repeated:
        raise ValueError(f"Expected guides with different names, none 'reference'; got {', '.join(repeated)} again.")
    if draws < 1_000:
        raise ValueError(f"Expected at least 1,000 draws of each guide; got {draws}: fewer cannot tell anything.")


def _reference_problem(reference: Reference | None) -> str:
    """Why no verdict may be given; empty if one may."""
    if reference is None:
        return "there is no reference"
    if not reference.usable:
        return f"the reference has no draws: {reference.status.value}"
    if not reference.status.ok:
        return f"the reference failed its checks: {reference.status.value}"
    return ""


def _two_posteriors(model: Model) -> str:
    """Why guides and reference have not the same posterior; empty if they have."""
    names = model.parameters("plain")
    if not names:
        return ""
    return (
        f"the model has parameters of its own ({', '.join(names)}), which each guide learns and NUTS holds where they "
        "begin, so that they have different posteriors: give them priors"
    )


def _drawn(
    model: Model, fits: Sequence[Approximation], key: jax.Array, draws: int
) -> Iterator[tuple[Approximation, dict[str, np.ndarray] | str]]:
    """Each fit with its draws, or with why there are none; the next one draws while one is compared."""

    def sites(fit: Approximation) -> dict[str, np.ndarray] | str:
        if not fit.usable:
            return _problem(fit)
        try:
            with jax.enable_x64(True):  # the caller's own setting does not reach this thread
                return guide_draws(model, fit, jax.random.fold_in(key_for(key, fit.guide.name), 0), draws)
        except (ValueError, TypeError, KeyError, ArithmeticError, RuntimeError) as error:
            # A guide that cannot draw is a row in the report; the others' work is not lost.
            first = (str(error).strip() or type(error).__name__).split("\n")[0]
            return f"{Status.FAILED.value}: {first}"

    # One thread alone, because NumPyro's stack of handlers is not made for two; the comparison has no use for it.
    with ThreadPoolExecutor(1, "draw") as pool:
        following = pool.submit(sites, fits[0]) if fits else None
        for i, fit in enumerate(fits):
            current = following.result() if following else ""
            following = pool.submit(sites, fits[i + 1]) if i + 1 < len(fits) else None
            yield fit, current


def _side(
    model: Model,
    fit: Approximation,
    sites: dict[str, np.ndarray] | str,
    truth: Sequence[Standard | None] | None,
    anchor: np.ndarray | None,
    multiplicity: np.ndarray | None = None,
) -> tuple[_Side, np.ndarray | None]:
    """One fit's metrics, and the labelling for the fits after it."""
    if isinstance(sites, str):
        return _Side(fit, None, sites), anchor
    if anchor is None and model.labels is not None:
        anchor = labelling(model, model.labels.relabel(sites))
    source = to_scalars(model, sites, anchor)
    compared = metrics(truth, source.values[0], multiplicity) if truth else None
    weights = NAN if fit.fresh_log_weights is None else khat(fit.fresh_log_weights)
    return _Side(fit, source, "" if fit.status.ok else _problem(fit), weights, compared), anchor


def _mended(
    model: Model,
    fit: Reweighted | Fit,
    truth: Sequence[Standard | None] | None,
    anchor: np.ndarray | None,
    key: jax.Array,
    draws: int,
) -> _Side:
    """A correction's metrics; its draws may be worth less than as many independent ones."""
    own = key_for(key, fit.guide.name)
    try:
        if not fit.usable:
            return _Side(fit, None, _problem(fit))
        if isinstance(fit, Fit):
            return _side(model, fit, guide_draws(model, fit, own, draws), truth, anchor)[0]
        with jax.enable_x64(True):
            sites = {name: values[None] for name, values in fit.draw(own, draws, sites_to_draw(model)).items()}
        return _side(model, fit, sites, truth, anchor, fit.chosen(own)[1])[0]
    except (ValueError, TypeError, KeyError, ArithmeticError, RuntimeError) as error:
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        return _Side(fit, None, f"{Status.FAILED.value}: {first}")


def _corrections_table(
    mended: Sequence[_Side], truth: Scalars | None, thresholds: Thresholds, than: str, problem: str
) -> pd.DataFrame:
    rows = []
    for side in mended:
        own = _rows(side, truth, thresholds, judged=not problem)
        rows.append({**_guide_row(side, own, than, problem), "of": side.fit.guide.name.rpartition("+")[0]})
    return pd.DataFrame(rows).set_index("guide") if rows else pd.DataFrame(columns=["of"])


def _problem(fit: Approximation) -> str:
    return f"{ended(fit)}{f' ({fit.message})' if fit.message else ''}"


def _rows(side: _Side, truth: Scalars | None, thresholds: Thresholds, *, judged: bool) -> pd.DataFrame:
    if side.metrics is None or truth is None:
        return pd.DataFrame(columns=list(TABLE_COLUMNS))
    judged = judged and not side.problem
    return metric_rows(side.fit.guide.name, truth.names, side.metrics, thresholds, judged=judged)


def _why_not(side: _Side, reference_problem: str) -> str:
    """The sentence in the place of a verdict; empty if there is one."""
    problem = side.problem or reference_problem
    return f"not judged: {problem}" if problem else ""


def _guide_row(side: _Side, rows: pd.DataFrame, than: str, reference_problem: str) -> dict[str, Any]:
    fit, verdicts = side.fit, quantity_verdicts(rows)
    sentence = _why_not(side, reference_problem) or guide_sentence(rows, verdicts, than)
    found = fit.status.has_optimum
    elbo, tail = (fit.elbo or NAN, side.khat) if found else (NAN, NAN)
    counts = list(verdicts.values())
    return {
        "guide": fit.guide.name,
        "title": fit.guide.title,
        "status": fit.status.name,
        "verdict": combine(counts).value if counts else "",
        "sentence": sentence,
        "quantities": len(counts),
        "right": counts.count(Verdict.RIGHT),
        "wrong": counts.count(Verdict.WRONG),
        "cannot_tell": counts.count(Verdict.CANNOT_TELL),
        "elbo": elbo.value,
        "elbo_se": elbo.se,
        "khat": tail.value,
        "khat_se": tail.se,
        **worst(rows if found else rows.iloc[:0]),
        "seconds": fit.cost.seconds,
        "gradient_evaluations": fit.cost.gradient_evaluations,
    }


def _pairs(side: _Side, truth: Scalars | None) -> pd.DataFrame:
    if side.metrics is None or side.scalars is None or truth is None:
        return pd.DataFrame(columns=list(PAIR_COLUMNS))
    pairs = worst_pairs(truth.values, side.scalars.values[0], side.metrics.effective)
    names = np.array(truth.names, dtype=object)
    return pd.DataFrame(
        {
            "guide": side.fit.guide.name,
            "quantity_a": names[pairs.first],
            "quantity_b": names[pairs.second],
            "reference": pairs.reference,
            "guide_value": pairs.guide,
            "difference": pairs.guide - pairs.reference,
            "se": pairs.se,
        }
    )


def _correlations(sources: Mapping[str, Scalars], table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The matrices over all scalars, or over the worst off by Wasserstein distance if there are too many."""
    if not sources:
        return {}
    names = list(next(iter(sources.values())).names)
    if len(names) > _MATRIX_SCALARS:
        distance = table[table["metric"] == "wasserstein_1"].groupby("quantity")["value"].max()
        ranked = distance.sort_values(ascending=False).index.tolist() if len(distance) else names
        chosen = set(ranked[:_MATRIX_SCALARS])
        names = [name for name in names if name in chosen]
    columns = [next(iter(sources.values())).names.index(name) for name in names]
    flat = {source: s.values.reshape(-1, len(s.names))[:, columns] for source, s in sources.items()}
    return correlation_frames(flat, names)


def _largest(table: pd.DataFrame) -> dict[str, tuple[Estimate, str]]:
    """Guide name to the largest difference of distribution functions over its quantities, and whose it is."""
    rows = table[table["metric"] == "cdf_difference"].dropna(subset=["value"])
    found = {}
    for guide, own in rows.groupby("guide"):
        row = own.iloc[int(np.argmax(own["value"].to_numpy()))]
        found[str(guide)] = (Estimate(float(row["value"]), float(row["se"])), str(row["quantity"]))
    return found


def _floors(sides: Sequence[_Side], truth: Scalars | None) -> pd.DataFrame:
    floors = {s.fit.guide.name: s.metrics.floor for s in sides if s.metrics is not None}
    return pd.DataFrame(floors, index=pd.Index(truth.names if truth else [], name="quantity"))
