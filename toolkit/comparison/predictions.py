"""Does it matter for predictions? What each guide predicts, beside the reference, for data old and new.

| question | table | answered by |
|---|---|---|
| What does predicting with the guide cost? | scores: loss | KL of the predictive distributions of new observations |
| What is leave-one-out, by its draws? | scores: loo | PSIS-LOO; p / q is in the weights of a guide's draws |
| Would the model make such data? | checks | replicated data beside what was observed |
| Do probabilities and intervals hold? | calibration | predictive probabilities and ranks of what was observed |

A guide's draws weighted with 1 / p(y_i | z) alone are no leave-one-out of the guide: q(z) / p(y_i | z) need not be a
distribution at all. On the breast-cancer model the mean field would seem to predict 36 nats worse than NUTS, where no
predicted probability differs by more than 0.06.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import pandas as pd

from toolkit.comparison.leave_one_out import LeaveOneOut, khat_limit, leave_one_out
from toolkit.comparison.moment_matching import moment_matched
from toolkit.comparison.predictive import Data, Source, predictive_losses
from toolkit.comparison.replicated import (
    CALIBRATION_COLUMNS,
    CHECK_COLUMNS,
    MOST_UNRELIABLE,
    OBSERVATION_COLUMNS,
    calibration_rows,
    check_rows,
    observation_rows,
    replicated,
    shown,
    summed_up,
)
from toolkit.comparison.sentences import ended
from toolkit.comparison.sides import LEAST_DRAWS
from toolkit.comparison.sources import Approximation, Weighed, key_for
from toolkit.comparison.verdicts import Thresholds, Verdict, judge
from toolkit.estimate import Estimate
from toolkit.modelling.model import Model
from toolkit.modelling.observations import PIECE, log_likelihoods, observed
from toolkit.modelling.space import latent_space
from toolkit.sampling.evidence import latents
from toolkit.sampling.references import Reference

SCORE_COLUMNS = (
    "source", "observations", "looked_at", "loss", "loss_se", "verdict", "sentence", "problem", "loo", "loo_se",
    "loo_data_se", "p_loo", "p_loo_se", "khat", "unreliable", "matched", "loo_problem",
)  # fmt: skip
LEFT_OUT_COLUMNS = ("site", "unit", "elpd", "elpd_se", "khat")

_NUMBERS = 5_000_000  # log likelihoods at once, draws x observations: 40 MB
_LEAST_DRAWS, _MOST_DRAWS, _GUIDE_DRAWS = 500, 4_000, 2_000
_SMALL = 1_000  # observations of a site that are looked at in any case


@dataclass(frozen=True, eq=False)
class Predictions:
    """What is predicted, by the reference and by each guide.

    Attributes:
        scores: One row for each source (`reference` or guide). observations: how many there are; looked_at: a share
            of them where memory allows no more, which stands for all. loss: the nats by which the source's predictive
            distribution of as many new observations, at the same predictors, is expected to score below the
            reference's (their KL divergence, added up over observations; 0 is right), with its Monte Carlo error;
            verdict by `Thresholds.elpd`; sentence. loo: the expected log predictive density by leave-one-out of the
            posterior, from this source's draws, in nats, with its Monte Carlo error and loo_data_se, the error for
            other data of this kind; p_loo, the effective number of parameters; khat, the largest tail index;
            unreliable, how many of the observations that were looked at have weights that cannot be trusted (then there
            is no error); matched, how many were mended by moment matching. problem, loo_problem: why there is no
            loss, or no loo.
        checks: One row for each statistic of replicated data and source: what was observed, the replicates' mean and
            central 90 %, and the p-value, the probability that a replicate lies above what was observed.
        calibration: One row for each site, measure and source: the share of observations in their central 50 % and
            90 % predictive intervals, or the Brier score of probabilities, each with the error that comes of so few
            observations, and the difference from the reference's on the same ones.
        observations: What the calibration is computed from: a probability or a rank for each of at most 1,000
            observations of a site and source, `in sample` or `left out`.
        left_out: One row for each observation that was looked at: elpd, its log density by the reference without it,
            in nats, with its Monte Carlo error (NaN where its weights cannot be trusted), and their tail index khat.
        parameters: How many unconstrained parameters the model has, to hold p_loo against.
        problem: Why there is nothing; empty if there is something.
    """

    scores: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(SCORE_COLUMNS)))
    checks: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(CHECK_COLUMNS)))
    calibration: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(CALIBRATION_COLUMNS)))
    observations: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(OBSERVATION_COLUMNS)))
    left_out: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(LEFT_OUT_COLUMNS)))
    parameters: int = 0
    problem: str = ""


def predictions(
    model: Model,
    reference: Reference | None,
    fits: Sequence[Approximation],
    drawn: Mapping[str, Mapping[str, np.ndarray]],
    *,
    key: jax.Array,
    thresholds: Thresholds,
    than: str,
    judged: bool,
) -> Predictions:
    """What the reference and each guide predict.

    Args:
        model: The model.
        reference: Draws of its posterior; without usable ones there is nothing to compare with.
        fits: The fits.
        drawn: Guide name to independent draws of its latent sites, `(draws, ...)` each; others are drawn from here.
        key: Random key.
        thresholds: What counts as right.
        than: What the reference is called in sentences.
        judged: Whether a verdict may be given.
    """
    problem = _problem(model, reference)
    if problem or reference is None:
        return Predictions(problem=problem)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    try:
        return _predictions(model, reference, fits, drawn, rng, key, thresholds, than, judged=judged)
    except (ValueError, TypeError, ArithmeticError, RuntimeError, MemoryError) as error:
        # Whatever the user's own distributions cannot do, or memory cannot hold; the comparison stands without.
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        return Predictions(problem=f"the observed sites cannot be looked at one by one: {first}")


def _problem(model: Model, reference: Reference | None) -> str:
    """Why nothing can be said of predictions; empty if something can."""
    if not model.observed:
        why = "discrete latents are summed out of it" if model.summed_out else "it is a factor"
        return f"the likelihood has no single observations to predict: {why}"
    if reference is None or not reference.usable:
        return "there are no reference draws to compare with"
    if model.parameters("plain"):
        return "the model has parameters of its own, which guides and NUTS hold at different values"
    missing = [name for name in model.latents if name not in reference.draws]
    return f"the reference has no draws of {', '.join(missing)}, which predictions need" if missing else ""


def _predictions(
    model: Model,
    reference: Reference,
    fits: Sequence[Approximation],
    drawn: Mapping[str, Mapping[str, np.ndarray]],
    rng: np.random.Generator,
    key: jax.Array,
    thresholds: Thresholds,
    than: str,
    *,
    judged: bool,
) -> Predictions:
    data = _data(model, rng)
    if not data.looked_at:
        return Predictions(problem="every observation is masked")
    sources, failed = _sources(model, reference, fits, drawn, data, key)
    chosen = shown(data, rng)
    # The same random numbers for each source, so that differences are the sources' own.
    new, places = replicated(model, sources[0], data, key)
    made = {"reference": summed_up(new, places, sources[0], data, chosen)}
    losses = predictive_losses(model, sources, data, new)
    del new
    for source in sources[1:]:
        made[source.name] = summed_up(*replicated(model, source, data, key), source, data, chosen)
    kept = np.concatenate([own.units for own in chosen.values()])
    weighted = {
        source.name: leave_one_out(
            source.likelihoods,
            source.shape,
            log_ratios=source.log_ratios,
            keep=kept if source.is_reference else None,
            scales=data.scales,
        )
        for source in sources
        if source.is_reference or source.log_ratios is not None
    }
    left_out = weighted | {
        "reference": moment_matched(
            model, sources[0].draws, data.chosen, weighted["reference"], sources[0].likelihoods, data.scales
        )
    }
    matched = int(weighted["reference"].unreliable.sum() - left_out["reference"].unreliable.sum())
    observations = observation_rows(sources, data, made, left_out["reference"], weighted["reference"], chosen, rng)
    scores = []
    for source in sources:
        row = _row(source.name, data) | _loss_columns(losses.get(source.name), data, thresholds, than, judged=judged)
        row |= _left_out_columns(source, data, left_out.get(source.name), matched if source.is_reference else 0)
        scores.append(row)
    scores += [_row(name, data) | {"problem": problem} for name, problem in failed.items()]
    return Predictions(
        scores=pd.DataFrame(scores, columns=list(SCORE_COLUMNS)),
        checks=pd.DataFrame(check_rows(data, made), columns=list(CHECK_COLUMNS)),
        calibration=pd.DataFrame(calibration_rows(observations, data), columns=list(CALIBRATION_COLUMNS)),
        observations=observations,
        left_out=_pointwise(data, left_out["reference"], sources[0]),
        parameters=latent_space(model, "plain").size,
    )


def _data(model: Model, rng: np.random.Generator) -> Data:
    """All observations, or of each site its share of as many as memory allows; small sites whole."""
    sites = observed(model)
    counts, most = {name: site.places.size for name, site in sites.items()}, _NUMBERS // _LEAST_DRAWS
    share = min(1.0, most / max(sum(counts.values()), 1))
    wanted = {name: max(min(count, _SMALL), int(share * count)) for name, count in counts.items()}
    return Data(
        sites,
        {
            name: np.sort(rng.choice(site.places, wanted[name], replace=False))
            if wanted[name] < counts[name]
            else site.places
            for name, site in sites.items()
        },
    )


def _sources(
    model: Model,
    reference: Reference,
    fits: Sequence[Approximation],
    drawn: Mapping[str, Mapping[str, np.ndarray]],
    data: Data,
    key: jax.Array,
) -> tuple[list[Source], dict[str, str]]:
    """The reference and each guide that can draw its latent sites; why the others cannot, by name."""
    # In whole pieces: what is missing to one would be computed in vain.
    most = max(_LEAST_DRAWS, min(_MOST_DRAWS, _NUMBERS // data.looked_at // PIECE * PIECE))
    chains, length = next(iter(reference.draws.values())).shape[:2]
    kept = np.unique(np.linspace(0, length - 1, max(LEAST_DRAWS, min(length, most // chains))).astype(int))
    seen = latents(reference)
    own = {
        name: seen[name].reshape(chains, length, *seen[name].shape[1:])[:, kept].reshape(-1, *seen[name].shape[1:])
        for name in model.latents
    }
    sources = [Source("reference", own, (chains, kept.size), log_likelihoods(model, own, data.chosen))]
    failed = {}
    for fit in fits:
        name = fit.guide.name
        if not (fit.usable and fit.status.ok):
            failed[name] = f"not looked at: {ended(fit)}"
            continue
        try:
            made = drawn.get(name) or fit.draw(key_for(key, name), min(most, _GUIDE_DRAWS), model.latents)
            own = {site: np.asarray(made[site])[:most] for site in model.latents}
            ratios = fit.log_weights_at(own) if isinstance(fit, Weighed) and fit.fresh_log_weights is not None else None
            likelihoods = log_likelihoods(model, own, data.chosen)
        except (ValueError, TypeError, KeyError, ArithmeticError, RuntimeError) as error:
            # A guide that cannot be looked at is a row with its reason; the others' work is not lost.
            failed[name] = (str(error).strip() or type(error).__name__).split("\n")[0]
            continue
        sources.append(Source(name, own, likelihoods.shape[:1], likelihoods, ratios))
    return sources, failed


def _loss_columns(
    loss: tuple[Estimate, str] | None, data: Data, thresholds: Thresholds, than: str, *, judged: bool
) -> dict[str, Any]:
    if loss is None:
        return {}
    lost, problem = loss
    row = {"loss": lost.value, "loss_se": lost.se, "problem": problem}
    if not judged or problem:
        return row
    low, high = thresholds.limits("predictive_loss") or (math.nan, math.nan)
    verdict = Verdict.WRONG if lost.value == math.inf else judge(lost.value, lost.se, low, high)
    return row | {"verdict": verdict.value, "sentence": _sentence(verdict, lost, data, thresholds, than)}


def _left_out_columns(source: Source, data: Data, found: LeaveOneOut | None, matched: int) -> dict[str, Any]:
    if found is None:
        if all(np.ptp(values, axis=0).max(initial=0.0) == 0 for values in source.draws.values()):
            return {"loo_problem": "a point has no density, which leave-one-out by its draws needs"}
        return {"loo_problem": "its density is not known, which leave-one-out by its draws needs"}
    row = {"khat": float(found.khat.max()), "unreliable": int(found.unreliable.sum()), "matched": matched}
    if source.log_ratios is not None and not found.khat.min() <= khat_limit(len(source.likelihoods)):
        # Each observation's weights hold those from guide to posterior, and these alone cannot be trusted.
        told = f"k-hat {found.khat.min():.2f}: its draws are too far from the posterior to be weighted"
        return row | {"loo_problem": told}
    if row["unreliable"] > (MOST_UNRELIABLE * data.looked_at if source.is_reference else 0):
        return row | {"loo_problem": f"{row['unreliable']:,} of {data.looked_at:,} observations' weights fail (k-hat)"}
    if not np.isfinite(found.elpd).all():
        return row | {"loo_problem": "under some of its draws an observation is impossible"}
    total = data.total(found.elpd, found.error)
    optimism = data.total(found.lpd - found.elpd, found.optimism_error)
    # Weights that cannot be trusted have no error that could be.
    sure = 1.0 if row["unreliable"] == 0 else math.nan
    spread = float(np.std(found.elpd, ddof=1)) if found.elpd.size > 1 else math.nan
    return row | {
        "loo": total.value,
        "loo_se": sure * total.se,
        "loo_data_se": math.sqrt(data.count) * spread,
        "p_loo": optimism.value,
        "p_loo_se": sure * optimism.se,
    }


def _pointwise(data: Data, found: LeaveOneOut, source: Source) -> pd.DataFrame:
    # Autocorrelated draws are worth fewer; weights that cannot be trusted have no error that could be.
    errors = np.where(found.unreliable, np.nan, found.errors * math.sqrt(found.influence.size / source.effective))
    names = np.repeat(list(data.chosen), [places.size for places in data.chosen.values()])
    units = np.concatenate(list(data.chosen.values()))
    return pd.DataFrame({"site": names, "unit": units, "elpd": found.elpd, "elpd_se": errors, "khat": found.khat})


def _row(name: str, data: Data) -> dict[str, Any]:
    """A row of which nothing is known yet."""
    words = dict.fromkeys(("verdict", "sentence", "problem", "loo_problem"), "")
    counts = {"observations": data.count, "looked_at": data.looked_at}
    return dict.fromkeys(SCORE_COLUMNS, math.nan) | {"source": name} | counts | words


def _sentence(verdict: Verdict, loss: Estimate, data: Data, thresholds: Thresholds, than: str) -> str:
    what = f"{data.count:,} new observation{'' if data.count == 1 else 's'}"
    lost = "infinitely many" if loss.value == math.inf else f"{loss}"
    lost = f"{lost} nats lost over {what}, limit {thresholds.elpd:g}"
    if verdict is Verdict.CANNOT_TELL:
        return f"cannot tell whether it predicts single observations as {than}: {lost}"
    return f"predicts single observations {'as' if verdict is Verdict.RIGHT else 'worse than'} {than}: {lost}"
