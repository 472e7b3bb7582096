"""Does it matter for predictions? What each guide predicts, beside the reference, for data old and new.

| question | table | answered by |
|---|---|---|
| What does predicting with the guide cost? | scores: loss | KL of the predictive distributions of new observations |
| What is leave-one-out, by its draws? | scores: loo | PSIS-LOO; p / q is in the weights of a guide's draws |
| Would the model make such data? | checks | replicated data beside what was observed |
| Do probabilities and intervals hold? | calibration | predictive probabilities and ranks of what was observed |

A guide's draws weighted with 1 / p(y_i | z) alone are no leave-one-out of the guide: q(z) / p(y_i | z) need not be a
distribution at all. On the breast-cancer model full rank would seem to predict 42 nats worse than NUTS, where no
predicted probability differs by more than 0.02.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import pandas as pd
from scipy.special import logsumexp

from toolkit.comparison.leave_one_out import LeaveOneOut, khat_limit, leave_one_out
from toolkit.comparison.moment_matching import moment_matched
from toolkit.comparison.predictive import Data, Source, predictive_losses
from toolkit.comparison.sides import LEAST_DRAWS
from toolkit.comparison.sources import Approximation, Weighed, key_for
from toolkit.comparison.verdicts import Thresholds, Verdict, judge
from toolkit.estimate import Estimate
from toolkit.influence import independent_error, least_probability_error
from toolkit.modelling.model import Model
from toolkit.modelling.observations import PIECE, Observed, log_likelihoods, observed, replicates
from toolkit.sampling.evidence import latents
from toolkit.sampling.references import Reference

SCORE_COLUMNS = (
    "source", "observations", "loss", "loss_se", "verdict", "sentence", "loo", "loo_se", "loo_data_se", "p_loo",
    "p_loo_se", "khat", "unreliable", "matched", "problem",
)  # fmt: skip
CHECK_COLUMNS = ("site", "statistic", "observed", "source", "mean", "low", "high", "p_value", "p_value_se")
CALIBRATION_COLUMNS = ("site", "measure", "source", "kind", "value", "se", "difference", "difference_se")
OBSERVATION_COLUMNS = ("site", "position", "observed", "source", "kind", "value")

IN_SAMPLE, LEFT_OUT = "in sample", "left out"

MOST_UNRELIABLE = 0.1
"""Share of a site's observations whose leave-one-out weights may be bad before nothing left out is shown."""

SHOWN = 1_000
"""Observations of a site whose calibration is looked at, at most."""

_NUMBERS = 5_000_000  # log likelihoods at once, draws x observations: 40 MB
_LEAST_DRAWS, _MOST_DRAWS, _GUIDE_DRAWS = 500, 4_000, 2_000
_REPLICATED, _LEAST_REPLICATES, _MOST_REPLICATES = 1_000_000, 100, 1_000  # numbers, sets of data


@dataclass(frozen=True, eq=False)
class Predictions:
    """What is predicted, by the reference and by each guide.

    Attributes:
        scores: One row for each source (`reference` or guide). loss: the nats by which the source's predictive
            distribution of as many new observations, at the same predictors, is expected to score below the
            reference's (their KL divergence, added up over observations; 0 is right), with its Monte Carlo error;
            verdict by `Thresholds.elpd`; sentence. loo: the expected log predictive density by leave-one-out of the
            posterior, from this source's draws, in nats, with its Monte Carlo error and loo_data_se, the error for
            other data of this kind; p_loo, the effective number of parameters; khat, the largest tail index;
            unreliable, how many observations have weights that cannot be trusted; matched, how many were mended by
            moment matching. problem: why something is missing.
        checks: One row for each statistic of replicated data and source: what was observed, the replicates' mean and
            central 90 %, and the p-value, the probability that a replicate lies above what was observed.
        calibration: One row for each site, measure and source: the share of observations in their central 50 % and
            90 % predictive intervals, or the Brier score of probabilities, each with the error that comes of so few
            observations, and the difference from the reference's on the same ones.
        observations: What the calibration is computed from: a probability or a rank for each of at most 1,000
            observations of a site and source, `in sample` or `left out`.
        problem: Why there is nothing; empty if there is something.
    """

    scores: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(SCORE_COLUMNS)))
    checks: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(CHECK_COLUMNS)))
    calibration: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(CALIBRATION_COLUMNS)))
    observations: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(OBSERVATION_COLUMNS)))
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
        drawn: Guide name to independent draws of its latent sites, `(draws, ...)` each; guides without are left out.
        key: Random key.
        thresholds: What counts as right.
        than: What the reference is called in sentences.
        judged: Whether a verdict may be given.
    """
    if not model.observed:
        return Predictions(problem="the likelihood is a factor, which has no single observations to predict")
    if reference is None or not reference.usable:
        return Predictions(problem="there are no reference draws to compare with")
    if model.parameters("plain"):
        return Predictions(
            problem="the model has parameters of its own, which guides and NUTS hold at different values"
        )
    missing = [name for name in model.latents if name not in reference.draws]
    if missing:
        return Predictions(problem=f"the reference has no draws of {', '.join(missing)}, which predictions need")
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    try:
        data = _data(model, rng)
        sources, failed = _sources(model, reference, fits, drawn, data, key)
        replicated = {source.name: _replicates(model, source, data, key) for source in sources}
        losses = predictive_losses(model, sources, data, replicated["reference"])
    except (ValueError, TypeError, ArithmeticError, NotImplementedError) as error:
        # Whatever the user's own distributions cannot do; the comparison stands without.
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        return Predictions(problem=f"the observed sites cannot be looked at one by one: {first}")
    kept = np.sort(np.concatenate([_shown(data.part(name), rng) for name in data.chosen]))
    left_out = {
        source.name: _left_out(model, source, data, kept)
        for source in sources
        if source.is_reference or source.log_ratios is not None
    }
    observations = _observations(sources, data, replicated, left_out["reference"][0], kept, rng)
    scores = [
        _score_row(source, data, losses.get(source.name), left_out.get(source.name), thresholds, than, judged=judged)
        for source in sources
    ]
    scores += [_row(name, data) | {"problem": problem} for name, problem in failed.items()]
    return Predictions(
        scores=pd.DataFrame(scores, columns=list(SCORE_COLUMNS)),
        checks=pd.DataFrame(_check_rows(sources, data, replicated), columns=list(CHECK_COLUMNS)),
        calibration=pd.DataFrame(_calibration_rows(observations, data), columns=list(CALIBRATION_COLUMNS)),
        observations=observations,
    )


def _shown(part: slice, rng: np.random.Generator) -> np.ndarray:
    every = np.arange(part.start, part.stop)
    return every if every.size <= SHOWN else rng.choice(every, SHOWN, replace=False)


def _data(model: Model, rng: np.random.Generator) -> Data:
    sites = observed(model)
    count, most = sum(site.units for site in sites.values()), _NUMBERS // _LEAST_DRAWS
    every = {name: np.arange(site.units) for name, site in sites.items()}
    if count <= most:
        return Data(sites, every)
    shares = {name: max(1, places.size * most // count) for name, places in every.items()}
    return Data(sites, {name: np.sort(rng.choice(every[name], share, replace=False)) for name, share in shares.items()})


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


def _replicates(model: Model, source: Source, data: Data, key: jax.Array) -> dict[str, np.ndarray]:
    size = sum(site.values.size for site in data.sites.values())
    draws = max(_LEAST_REPLICATES, min(_MOST_REPLICATES, _REPLICATED // max(size, 1)))
    # The same random numbers for each source, so that differences are the sources' own.
    return replicates(model, source.some(draws), key)


def _left_out(model: Model, source: Source, data: Data, keep: np.ndarray) -> tuple[LeaveOneOut, int]:
    """Leave-one-out by a source's draws, and how many observations were mended by moment matching."""
    given = leave_one_out(source.likelihoods, source.shape, log_ratios=source.log_ratios, keep=keep)
    if not source.is_reference:
        return given, 0
    found = moment_matched(model, source.draws, data.chosen, given, source.likelihoods)
    return found, int(given.unreliable.sum() - found.unreliable.sum())


def _score_row(
    source: Source,
    data: Data,
    loss: Estimate | None,
    left_out: tuple[LeaveOneOut, int] | None,
    thresholds: Thresholds,
    than: str,
    *,
    judged: bool,
) -> dict[str, Any]:
    row = _row(source.name, data)
    if loss is not None:
        row |= {"loss": loss.value, "loss_se": loss.se}
        if judged:
            verdict = judge(loss.value, loss.se, *(thresholds.limits("predictive_loss") or (math.nan, math.nan)))
            if loss.value == math.inf:
                verdict = Verdict.WRONG
            row |= {"verdict": verdict.value, "sentence": _sentence(verdict, loss, data, thresholds, than)}
    if left_out is None:
        return row | {"problem": "its density is not known, which leave-one-out by its draws needs"}
    found, matched = left_out
    total = data.total(found.elpd, found.error)
    row |= {
        "loo": total.value,
        "loo_se": total.se,
        "loo_data_se": math.sqrt(data.count) * float(np.std(found.elpd)),
        "p_loo": data.total(found.lpd - found.elpd, found.p_loo.se).value,
        "p_loo_se": data.total(found.lpd - found.elpd, found.p_loo.se).se,
        "khat": float(found.khat.max()),
        "unreliable": int(found.unreliable.sum()),
        "matched": matched,
    }
    if source.log_ratios is not None and not found.khat.min() <= khat_limit(len(source.likelihoods)):
        # Each observation's weights hold those from guide to posterior, and these alone cannot be trusted.
        row |= dict.fromkeys(("loo", "loo_se", "loo_data_se", "p_loo", "p_loo_se"), math.nan)
        row |= {"problem": "its draws are too far from the posterior to be weighted"}
    elif not math.isfinite(total.value):
        row |= {"problem": "under some of its draws an observation is impossible"}
    return row


def _row(name: str, data: Data) -> dict[str, Any]:
    """A row of which nothing is known yet."""
    words = dict.fromkeys(("verdict", "sentence", "problem"), "")
    return dict.fromkeys(SCORE_COLUMNS, math.nan) | {"source": name, "observations": data.count} | words


def _sentence(verdict: Verdict, loss: Estimate, data: Data, thresholds: Thresholds, than: str) -> str:
    what = f"{data.count:,} new observation{'' if data.count == 1 else 's'}"
    lost = "infinitely many" if loss.value == math.inf else f"{loss}"
    if verdict is Verdict.RIGHT:
        return f"predicts as {than}: {lost} nats lost over {what}"
    if verdict is Verdict.WRONG:
        return f"predicts worse than {than}: {lost} nats lost over {what}, more than {thresholds.elpd:g}"
    return f"cannot tell whether it predicts as {than}: {lost} nats lost over {what}, limit {thresholds.elpd:g}"


def _check_rows(
    sources: Sequence[Source], data: Data, replicated: Mapping[str, Mapping[str, np.ndarray]]
) -> list[dict[str, Any]]:
    rows = []
    for name, site in data.sites.items():
        for statistic, of in _statistics(site).items():
            seen = float(of(site.values.reshape(1, -1).astype(float))[0])
            made = {source.name: of(_flat(replicated[source.name][name]).astype(float)) for source in sources}
            if all(np.ptp(new) == 0.0 and np.isclose(new[0], seen) for new in made.values()):
                continue  # given with the data, such as the mean of counts whose totals are
            for source in sources:
                new = made[source.name]
                above = np.where(new > seen, 1.0, np.where(new == seen, 0.5, 0.0))
                low, high = np.quantile(new, [0.05, 0.95])
                rows.append(
                    {
                        "site": name,
                        "statistic": statistic,
                        "observed": seen,
                        "source": source.name,
                        "mean": float(new.mean()),
                        "low": float(low),
                        "high": float(high),
                        "p_value": float(above.mean()),
                        # Replicates are taken so far apart that the draws behind them are nearly independent.
                        "p_value_se": max(independent_error(above), least_probability_error(new.size)),
                    }
                )
    return rows


def _statistics(site: Observed) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """What is looked at in replicated data (replicate, number), by the kind of data."""
    mean = {"mean": lambda new: new.mean(axis=1)}
    if site.kind == "binary":
        return mean
    spread = {"sd": lambda new: new.std(axis=1), "largest": lambda new: new.max(axis=1)}
    if site.kind == "count":
        return mean | {"share of zeros": lambda new: (new == 0).mean(axis=1)} | spread
    return mean | {"smallest": lambda new: new.min(axis=1)} | spread


def _observations(
    sources: Sequence[Source],
    data: Data,
    replicated: Mapping[str, Mapping[str, np.ndarray]],
    left_out: LeaveOneOut,
    kept: np.ndarray,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Probabilities or ranks of at most 1,000 observations of each site, by each source, and left out by the reference.

    Args:
        sources: The reference and then the guides.
        data: What was observed.
        replicated: Source to replicated data.
        left_out: Leave-one-out by the reference.
        kept: Which of all chosen observations are shown.
        rng: Breaks ties between whole numbers.
    """
    frames = []
    for name, site in data.sites.items():
        part = data.part(name)
        own = (kept >= part.start) & (kept < part.stop)
        places = data.chosen[name][kept[own] - part.start]
        size = site.values.size // site.units
        # Of an observation of several numbers, the first few: all hang on one leave-one-out.
        numbers = (places[:, None] * size + np.arange(min(size, max(1, SHOWN // max(places.size, 1))))).ravel()
        seen = site.values.reshape(-1)[numbers].astype(float)
        ties = rng.uniform(size=numbers.size)
        trusted = not left_out.unreliable[kept[own]].mean() > MOST_UNRELIABLE
        for source in (*sources, None) if trusted else sources:
            at = source or sources[0]
            if site.kind == "binary" and size == 1:
                density = left_out.elpd if source is None else _lpd(at)
                chance = np.exp(np.minimum(density[kept[own]], 0.0))
                value = np.where(seen == 1, chance, 1.0 - chance)
            else:
                new = _flat(replicated[at.name][name])[:, numbers]
                weights = None
                if source is None:
                    every = np.unique(np.linspace(0, len(at.likelihoods) - 1, len(new)).astype(int))
                    weights = np.repeat(left_out.log_weights[every][:, own], numbers.size // max(places.size, 1), 1)
                value = _rank(new, seen, weights, ties)
            frames.append(
                pd.DataFrame(
                    {
                        "site": name,
                        "position": numbers,
                        "observed": seen,
                        "source": at.name,
                        "kind": IN_SAMPLE if source else LEFT_OUT,
                        "value": value,
                    }
                )
            )
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(OBSERVATION_COLUMNS))


def _flat(new: np.ndarray) -> np.ndarray:
    return new.reshape(len(new), -1)


def _lpd(source: Source) -> np.ndarray:
    return np.asarray(logsumexp(source.likelihoods, axis=0) - math.log(len(source.likelihoods)))


def _rank(new: np.ndarray, seen: np.ndarray, log_weights: np.ndarray | None, ties: np.ndarray) -> np.ndarray:
    """The probability that new data lie below what was observed, (number,)."""
    weights = np.full(new.shape, 1.0 / len(new))
    if log_weights is not None:
        weights = np.exp(log_weights - logsumexp(log_weights, axis=0))
    below, equal = (weights * (new < seen)).sum(axis=0), (weights * (new == seen)).sum(axis=0)
    # Spread over the steps of the distribution function, of whole numbers (Czado, Gneiting & Held 2009, section 2.1)
    # and of so few replicates: uniform if the model is right.
    step = 1.0 / len(new)
    return np.asarray((below + ties * (equal + step)) / (1.0 + step))


def _calibration_rows(observations: pd.DataFrame, data: Data) -> list[dict[str, Any]]:
    rows = []
    for name, site in data.sites.items():
        own = observations[observations["site"] == name]
        probabilities = site.kind == "binary" and site.values.size == site.units
        held = {
            (str(source), str(kind)): _held(group["value"].to_numpy(), group["observed"].to_numpy(), probabilities)
            for (source, kind), group in own.groupby(["source", "kind"], sort=False)
        }
        for (source, kind), measures in held.items():
            for measure, each in measures.items():
                difference = each - held["reference", IN_SAMPLE][measure]
                rows.append(
                    {
                        "site": name,
                        "measure": measure,
                        "source": source,
                        "kind": kind,
                        "value": float(each.mean()),
                        "se": independent_error(each),
                        "difference": float(difference.mean()),
                        "difference_se": independent_error(difference),
                    }
                )
    return rows


def _held(value: np.ndarray, seen: np.ndarray, probabilities: bool) -> dict[str, np.ndarray]:
    """What each observation says of a source's probabilities, or of its intervals."""
    if probabilities:
        return {"Brier score": np.square(value - seen)}
    return {f"in the central {share:.0%}": (np.abs(value - 0.5) <= 0.5 * share).astype(float) for share in (0.5, 0.9)}
