"""The verb `diagnose`: what one may say of a fit without a reference, and how far that may be believed.

Evidence, none of which decides alone: the certificate (did the optimiser arrive?), where other starts ended, k-hat,
short chains from the fit's own draws (`short_chains`), and on request simulation-based calibration of the family
(VSBC). What the short chains changed is judged like a difference from a reference; the verdict is predicted, and its
record on posteriors that are known stands beside it (`RECORD`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import numpy as np
import pandas as pd

from toolkit.comparison.metrics import NAN, khat, metrics, prepare
from toolkit.comparison.sentences import at_most, climbs, ended, guide_sentence
from toolkit.comparison.sources import guide_draws, key_for, labelling, sites_to_draw, to_scalars
from toolkit.comparison.tables import TABLE_COLUMNS, metric_rows, quantity_verdicts
from toolkit.comparison.verdicts import Thresholds, Verdict, combine, holm, simultaneous_z
from toolkit.estimate import Estimate
from toolkit.influence import TAIL_LIMIT
from toolkit.modelling.points import sites_at
from toolkit.progress import Progress, silent
from toolkit.variational.certificates import Scope
from toolkit.variational.fits import Fit
from toolkit.variational.short_chains import (
    CHAINS,
    LEAST_TRANSITIONS,
    MOST_UNEVEN,
    TRANSITIONS,
    ShortChains,
    short_chains,
)

_FORGOTTEN = 0.1  # correlation of where a chain began and where it ended, up to which it has forgotten the beginning
_DRAWS = 10_000
_STRANDS = 4  # groups of chains that the errors are had from; the chains are independent
_LEVEL = 0.05


class Record(NamedTuple):
    """How often a predicted verdict on a fit was what a reference of somebody else's said.

    Attributes:
        predicted: How many fits got this verdict, and the reference decided.
        agreed: How many of them the reference gave the same.
    """

    predicted: int
    agreed: int


RECORD: Mapping[str, Record] = {"right": Record(12, 12), "wrong": Record(32, 32)}
"""Of 69 fits (23 posteriors, three guides): what `python benchmarks/predictions.py --summary` tells of its table."""


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What one may say of a fit without a reference.

    Attributes:
        fit: The fit.
        verdict: Predicted: right if nothing was found and everything could have been, wrong if short chains moved away
            beyond a threshold, else cannot tell; None where nothing can be said.
        sentence: The same in words.
        table: One row for each quantity and metric, as in `Comparison.table`, of the fit against where its chains
            ended: value, se, verdict and `least`, the near end of an interval for the size of that difference that
            holds for all rows at once with 95 %; NaN where the chains are uneven.
        forgotten: For each quantity, the correlation of where the chains began and where they ended; above 0.1 nothing
            is predicted to be right.
        uneven: The share of chains that hardly accept a step which fits the others; above 0.02 (the neck of a funnel,
            an edge) single numbers may have moved the wrong way, and nothing is predicted.
        khat: Of the importance weights.
        optima: How many distinct optima the starts led to.
        evidence: A sentence for each kind of evidence.
        calibration: From `vsbc`: quantity, p_value, fallen; empty if it was not asked for.
    """

    fit: Fit
    verdict: Verdict | None
    sentence: str
    table: pd.DataFrame
    forgotten: pd.Series
    uneven: float
    khat: Estimate
    optima: int
    evidence: tuple[str, ...]
    calibration: pd.DataFrame


def diagnose(
    fit: Fit,
    *,
    key: jax.Array,
    thresholds: Thresholds | None = None,
    chains: int = CHAINS,
    transitions: int = TRANSITIONS,
    simulations: int = 0,
    progress: Progress = silent,
) -> Diagnosis:
    """What one may say of a fit without a reference: evidence of several kinds and a predicted verdict.

    Args:
        fit: From `fit`.
        key: Random key.
        thresholds: What counts as right; the defaults of `Thresholds` if None.
        chains: Short chains that start from the fit's draws.
        transitions: Of each.
        simulations: Data sets that are simulated and refitted for VSBC; 0 leaves it out, since it costs as many fits.
        progress: Called between blocks of work.

    Raises:
        ValueError: A number is out of its range, or VSBC is asked for on a model that cannot simulate its data.

    Reference: Yao, Vehtari, Simpson & Gelman (2018), Yes, but did it work?: evaluating variational inference, ICML.
    """
    if chains < 8 * _STRANDS or transitions < LEAST_TRANSITIONS:
        least = f"{8 * _STRANDS} chains of at least {LEAST_TRANSITIONS} transitions"
        raise ValueError(f"Expected at least {least}; got {chains} and {transitions}.")
    thresholds = thresholds or Thresholds()
    model = fit.model
    calibration = vsbc(fit, simulations, key=jax.random.fold_in(key, 2)) if simulations else _no_calibration()
    nothing = Diagnosis(
        fit, None, "", pd.DataFrame(columns=[*TABLE_COLUMNS, "least"]), pd.Series(dtype=float), math.nan, NAN,
        len(fit.optima), (), calibration,
    )  # fmt: skip
    if fit.usable and not fit.has_density:
        return replace(nothing, sentence="nothing can be said: it is a point, without a spread to be right or wrong")
    if not (fit.usable and fit.status.has_optimum):
        message = f" ({fit.message})" if fit.message else ""
        return replace(nothing, sentence=f"nothing can be said: {ended(fit)}{message}")
    tail = NAN if fit.fresh_log_weights is None else khat(fit.fresh_log_weights)

    def report(done: int, total: int) -> None:
        progress("short chains", done, total, f"transition {done} of {total}")

    moved = short_chains(fit, key=jax.random.fold_in(key, 0), chains=chains, transitions=transitions, report=report)
    sites = sites_to_draw(model)
    ends = sites_at(model, moved.end, sites, fit.chart, fit.params)
    begins = sites_at(model, moved.start, sites, fit.chart, fit.params)
    shaped = {name: _in_strands(values) for name, values in ends.items()}
    anchor = labelling(model, shaped)
    end = to_scalars(model, shaped, anchor)
    start = to_scalars(model, {name: _in_strands(values) for name, values in begins.items()}, anchor)
    drawn = guide_draws(model, fit, key_for(jax.random.fold_in(key, 1), fit.guide.name), _DRAWS)
    whole = to_scalars(model, drawn, anchor)
    found = metrics(prepare(end.values), whole.values[0])
    rows = metric_rows(fit.guide.name, end.names, found, thresholds, judged=True)
    rows["least"] = _certain(rows) if moved.uneven <= MOST_UNEVEN else math.nan
    forgotten = _correlations(start.values, end.values, end.names)
    per_quantity = _predicted(rows, forgotten, moved.uneven)
    verdict = combine(list(per_quantity.values())) if per_quantity else None
    if verdict is Verdict.RIGHT and not fit.status.ok:
        verdict = Verdict.CANNOT_TELL
    sentence = _sentence(fit, rows, per_quantity, forgotten, moved.uneven)
    evidence = _evidence(fit, tail, moved, forgotten, chains, transitions, calibration)
    return Diagnosis(
        fit,
        verdict,
        f"{sentence}{_record(verdict)}",
        rows,
        forgotten,
        moved.uneven,
        tail,
        len(fit.optima),
        evidence,
        calibration,
    )


def _sentence(fit: Fit, rows: pd.DataFrame, predicted: dict[str, Verdict], forgotten: pd.Series, uneven: float) -> str:
    """The verdict in words; where it cannot be told, what stands in the way."""
    if uneven > MOST_UNEVEN:
        return "cannot tell: short chains do not mix here, as in the neck of a funnel; another chart may help"
    wrong = Verdict.WRONG in predicted.values()
    remembered = int((forgotten[list(predicted)] > _FORGOTTEN).sum())
    if remembered and not wrong:
        return (
            f"cannot tell: nothing is wrong where short chains went, but in {remembered} of {len(predicted)} "
            "quantities they have not forgotten where they began"
        )
    if not fit.status.ok and not wrong:
        return f"cannot tell: nothing is wrong where short chains went, but {ended(fit)}"
    return guide_sentence(rows, predicted, "where short chains went")


def _in_strands(values: np.ndarray) -> np.ndarray:
    """Independent draws as (chain, draw, ...), which the reference's side of a metric asks for."""
    length = len(values) // _STRANDS
    return values[: _STRANDS * length].reshape(_STRANDS, length, *values.shape[1:])


def _certain(rows: pd.DataFrame) -> np.ndarray:
    """How large each decisive number's error is at least, as a distance from 0, from 1 in its log, or from 0.9."""
    decisive = rows["verdict"] != ""
    z = simultaneous_z(int(decisive.sum()))
    least = np.full(len(rows), np.nan)
    for i, (metric, value, se) in enumerate(zip(rows["metric"], rows["value"], rows["se"], strict=True)):
        if not decisive.iloc[i] or not (math.isfinite(value) and math.isfinite(se)):
            continue
        if str(metric).endswith("_ratio"):
            least[i] = max(abs(math.log(value)) - z * se / value, 0.0) if value > 0 else math.inf
        else:
            least[i] = max(abs(value - (0.9 if metric == "coverage_90" else 0.0)) - z * se, 0.0)
    return least


def _correlations(start: np.ndarray, end: np.ndarray, names: tuple[str, ...]) -> pd.Series:
    """By ranks, so that heavy tails do not hide what is left."""
    ranks = [values.reshape(-1, len(names)).argsort(axis=0).argsort(axis=0) for values in (start, end)]
    first, last = (own - own.mean(axis=0) for own in ranks)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (first * last).sum(axis=0) / np.sqrt(np.square(first).sum(axis=0) * np.square(last).sum(axis=0))
    return pd.Series(np.abs(found), index=list(names), name="correlation")


def predicted_verdicts(diagnosis: Diagnosis) -> dict[str, Verdict]:
    """Each quantity's predicted verdict; empty where nothing can be said."""
    return _predicted(diagnosis.table, diagnosis.forgotten, diagnosis.uneven) if len(diagnosis.table) else {}


def _predicted(rows: pd.DataFrame, forgotten: pd.Series, uneven: float) -> dict[str, Verdict]:
    """Each quantity's verdict; none is right whose chains have not forgotten, none is told where they do not mix."""
    found = quantity_verdicts(rows)
    if uneven > MOST_UNEVEN:
        return dict.fromkeys(found, Verdict.CANNOT_TELL)
    return {
        name: Verdict.CANNOT_TELL if verdict is Verdict.RIGHT and not forgotten[name] <= _FORGOTTEN else verdict
        for name, verdict in found.items()
    }


def _record(verdict: Verdict | None) -> str:
    known = RECORD.get(verdict.value) if verdict else None
    if known is None:
        return ""
    return (
        f" (predicted without a reference: of {known.predicted} fits to known posteriors that were predicted "
        f"{verdict.value if verdict else ''} and that their references decide, {known.agreed} were)"
    )


def _evidence(
    fit: Fit,
    tail: Estimate,
    moved: ShortChains,
    forgotten: pd.Series,
    chains: int,
    transitions: int,
    calibration: pd.DataFrame,
) -> tuple[str, ...]:
    told = [_arrival(fit)]
    if len(fit.optima) > 1:
        heights = [optimum.value for optimum in fit.optima]
        told.append(f"starts: led to {len(heights)} ends, {max(heights) - min(heights):.3g} nats apart")
    else:
        told.append("starts: led to one end")
    if math.isfinite(tail.value):
        weak = "weights cannot repair it" if tail.value > TAIL_LIMIT else "weights may repair it"
        told.append(f"k-hat: {tail} (limit {TAIL_LIMIT}): {weak}; it tells very bad fits from others, not good ones")
    worst = float(forgotten.max())
    where = "have forgotten where they began" if worst <= _FORGOTTEN else "have not all forgotten where they began"
    told.append(
        f"short chains: {chains:,} of {transitions} transitions {where}: the largest correlation is {worst:.2f} "
        f"({forgotten.idxmax()}, limit {_FORGOTTEN}); {moved.uneven:.1%} of them accept less than half of their moves "
        f"(limit {MOST_UNEVEN:.0%}); a mode to which none of them went is not seen"
    )
    if len(calibration):
        fallen = calibration[calibration["fallen"]]
        said = (
            f"off centre in {len(fallen)} ({', '.join(fallen['quantity'].head(3))})"
            if len(fallen)
            else "none is off centre"
        )
        told.append(f"VSBC: over simulated data, of {len(calibration)} scalars {said}, by Holm at {_LEVEL:.0%}")
    return tuple(told)


def _arrival(fit: Fit) -> str:
    certificate = fit.certificate
    if not climbs(fit):
        return f"arrival: {ended(fit)}; it does not climb the ELBO, and how far the family's best lies is not asked"
    if certificate is None or not math.isfinite(certificate.limit):
        return f"arrival: {ended(fit)}; there is no certificate"
    told = "estimated to have left" if certificate.scope is Scope.ESTIMATE else "left"
    return f"arrival: {ended(fit)}; the optimiser {told} at most {at_most(certificate.limit)} nats"


def _no_calibration() -> pd.DataFrame:
    return pd.DataFrame(columns=["quantity", "p_value", "fallen"])


def vsbc(fit: Fit, simulations: int, *, key: jax.Array, steps: int = 2_000) -> pd.DataFrame:
    """Whether the family's means are centred over data simulated from the prior: NumPyro's VSBC, Holm's correction.

    Columns: quantity (a scalar of a latent site), p_value of the symmetry test, fallen (whether symmetry falls at 5 %
    over all scalars). It speaks of the family under the prior, not of this fit; its fits are NumPyro's own SVI (Adam).

    Args:
        fit: Whose guide and model.
        simulations: Data sets.
        key: Random key.
        steps: SVI steps of each fit.

    Raises:
        ValueError: The model cannot draw its data: a flat prior, or a likelihood made of factors.

    Reference: Yao, Vehtari, Simpson & Gelman (2018), section 3.
    """
    model = fit.model
    if model.flat_priors or not model.observed:
        what = f"the prior of {', '.join(model.flat_priors)} is flat" if model.flat_priors else "nothing is observed"
        raise ValueError(f"Expected a model that can draw its data for VSBC; {what}: leave VSBC out.")
    import numpyro.optim
    from numpyro.infer import Trace_ELBO
    from numpyro.infer.calibration import vsbc_diagnostic

    program = model.bound(fit.chart)
    rest = {name: value for name, value in model.arrays.items() if name not in model.observed}
    with jax.enable_x64(True):
        # NumPyro's VSBC takes older keys only.
        older = jax.random.PRNGKey(int(np.asarray(jax.random.key_data(key)).ravel()[-1]))
        result = vsbc_diagnostic(
            older,
            program,
            fit.guide.build(program),
            numpyro.optim.Adam(5e-2),
            Trace_ELBO(),
            observed_sites=list(model.observed),
            num_simulations=simulations,
            num_svi_steps=steps,
            **dict.fromkeys(model.observed),
            **rest,
        )
    names, p_values = [], []
    for site in result.param_names:
        values = np.atleast_1d(np.asarray(result.ks_pvalues[site]))
        names += [site if values.size == 1 else f"{site}[{', '.join(map(str, i))}]" for i in np.ndindex(values.shape)]
        p_values += values.ravel().tolist()
    fallen = holm(np.array(p_values), _LEVEL)
    return pd.DataFrame({"quantity": names, "p_value": p_values, "fallen": fallen})
