"""Data made anew beside the observed: statistics of all of them, and whether single observations are as foretold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
import pandas as pd
from scipy.special import logsumexp

from toolkit.comparison.leave_one_out import LeaveOneOut
from toolkit.comparison.predictive import Data, Source
from toolkit.influence import independent_error, least_probability_error
from toolkit.modelling.model import Model
from toolkit.modelling.observations import Observed, replicates

CHECK_COLUMNS = (
    "site", "statistic", "observed", "source", "mean", "low", "high", "p_value", "p_value_se", "sd_ratio",
    "sd_ratio_se",
)  # fmt: skip
CALIBRATION_COLUMNS = ("site", "measure", "source", "kind", "units", "value", "se", "difference", "difference_se")
OBSERVATION_COLUMNS = ("site", "unit", "position", "observed", "source", "kind", "value")
IN_SAMPLE, LEFT_OUT = "in sample", "left out"

SHOWN = 1_000
"""Numbers of a site whose calibration is looked at, at most."""

MOST_UNRELIABLE = 0.1
"""Share of a site's observations whose leave-one-out weights may be bad before nothing left out is shown."""

_MOST_LABELS = 6  # categories whose shares are told, the most frequent ones
_NUMBERS, _MOST_AT_ONCE = 1_000_000, 20_000_000  # made from each source, if that is enough replicates; and at most
_LEAST_REPLICATES, _MOST_REPLICATES = 100, 1_000


@dataclass(frozen=True, eq=False)
class Shown:
    """Which observations of a site are looked at one by one.

    Attributes:
        units: Their places among all that were chosen, (unit,).
        numbers: The places of their numbers in the site's flattened values, (number,).
        owners: Which of `units` each number belongs to, (number,).
    """

    units: np.ndarray
    numbers: np.ndarray
    owners: np.ndarray


@dataclass(frozen=True, eq=False)
class Made:
    """What is kept of one source's replicates.

    Attributes:
        statistics: Site and name to the statistic of each replicate, (replicate,).
        shown: Site to the replicates of the numbers that are shown, (replicate, number).
        places: Which of the source's draws the replicates come from, (replicate,).
        effective: How many independent replicates they are worth at most.
    """

    statistics: Mapping[tuple[str, str], np.ndarray]
    shown: Mapping[str, np.ndarray]
    places: np.ndarray
    effective: float


def replicated(model: Model, source: Source, data: Data, key: jax.Array) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Data made anew, site to `(replicates, *shape)`, and the places of the draws that they come from."""
    size = max(sum(site.values.size for site in data.sites.values()), 1)
    least = max(2, min(_LEAST_REPLICATES, _MOST_AT_ONCE // size))
    places = source.places(max(least, min(_MOST_REPLICATES, _NUMBERS // size)))
    return replicates(model, {name: np.asarray(values)[places] for name, values in source.draws.items()}, key), places


def summed_up(
    new: Mapping[str, np.ndarray], places: np.ndarray, source: Source, data: Data, chosen: Mapping[str, Shown]
) -> Made:
    """What is kept of replicates, so that those of all sources need not be held at once."""
    statistics: dict[tuple[str, str], np.ndarray] = {}
    kept: dict[str, np.ndarray] = {}
    for name, site in data.sites.items():
        numbers = new[name].reshape(len(places), -1)
        kept[name] = numbers[:, chosen[name].numbers].astype(float)
        seen = numbers[:, site.seen.ravel()].astype(float)
        statistics |= {(name, statistic): of(seen) for statistic, of in _statistics(site).items()}
    return Made(statistics, kept, places, min(float(len(places)), source.effective))


def shown(data: Data, rng: np.random.Generator) -> dict[str, Shown]:
    """At most 1,000 numbers of each site, of as many observations as that allows."""
    found = {}
    for name, site in data.sites.items():
        part = data.part(name)
        every = np.arange(part.start, part.stop)
        units = every if every.size <= SHOWN else np.sort(rng.choice(every, SHOWN, replace=False))
        each = min(site.size, max(1, SHOWN // max(units.size, 1)))
        places = data.chosen[name][units - part.start]
        numbers = (places[:, None] * site.size + np.arange(each)).ravel()
        owners = np.repeat(np.arange(units.size), each)
        known = site.seen.ravel()[numbers]
        found[name] = Shown(units, numbers[known], owners[known])
    return found


def _statistics(site: Observed) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """What is looked at in data (replicate, number), by their kind."""
    mean = {"mean": lambda new: new.mean(axis=1)}
    if site.kind == "binary":
        return mean
    if site.kind == "label":
        labels, counts = np.unique(site.values[site.seen], return_counts=True)
        most = labels[np.argsort(-counts, kind="stable")][:_MOST_LABELS]
        return {f"share of {label}": partial(_share, label=float(label)) for label in np.sort(most)}
    spread = {"sd": lambda new: new.std(axis=1), "largest": lambda new: new.max(axis=1)}
    if site.kind == "count":
        return mean | {"share of zeros": lambda new: (new == 0).mean(axis=1)} | spread
    return mean | {"smallest": lambda new: new.min(axis=1)} | spread


def _share(new: np.ndarray, label: float) -> np.ndarray:
    return np.asarray((new == label).mean(axis=1))


def check_rows(data: Data, made: Mapping[str, Made]) -> list[dict[str, Any]]:
    """Rows of `CHECK_COLUMNS`: each statistic of what was observed, beside its replicates from each source."""
    rows = []
    for name, site in data.sites.items():
        numbers = site.values[site.seen].astype(float)[None]
        for statistic, of in _statistics(site).items():
            seen = float(of(numbers)[0])
            own = {source: kept.statistics[name, statistic] for source, kept in made.items()}
            if all(np.ptp(new) == 0.0 and np.isclose(new[0], seen) for new in own.values()):
                continue  # given with the data, such as the mean of counts whose totals are
            rows += [
                {"site": name, "statistic": statistic, "observed": seen, "source": source}
                | _beside(seen, new, made[source].effective)
                | _spread(new, own["reference"], made[source].effective, made["reference"].effective)
                for source, new in own.items()
            ]
    return rows


def _beside(seen: float, new: np.ndarray, effective: float) -> dict[str, float]:
    above = np.where(new > seen, 1.0, np.where(new == seen, 0.5, 0.0))
    low, high = np.quantile(new, [0.05, 0.95])
    error = float(above.std(ddof=1) / math.sqrt(effective))
    return {
        "mean": float(new.mean()),
        "low": float(low),
        "high": float(high),
        "p_value": float(above.mean()),
        "p_value_se": max(error, least_probability_error(effective)),
    }


def _spread(
    new: np.ndarray, of_reference: np.ndarray, effective: float, of_reference_effective: float
) -> dict[str, float]:
    """How much more or less a statistic spreads than the reference's; the error is that of nearly normal ones."""
    sd = float(of_reference.std(ddof=1))
    if not sd > 0 or new is of_reference:
        return {"sd_ratio": math.nan, "sd_ratio_se": math.nan}
    ratio = float(new.std(ddof=1)) / sd
    return {"sd_ratio": ratio, "sd_ratio_se": ratio * math.sqrt(0.5 / effective + 0.5 / of_reference_effective)}


def observation_rows(
    sources: Sequence[Source],
    data: Data,
    made: Mapping[str, Made],
    left_out: LeaveOneOut,
    weighted: LeaveOneOut,
    chosen: Mapping[str, Shown],
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Probabilities of single zeros and ones, or ranks of other numbers, by each source, and left out by the reference.

    Args:
        sources: The reference and then the guides.
        data: What was observed.
        made: Source to what was kept of its replicates.
        left_out: Leave-one-out by the reference.
        weighted: The same by importance weights alone, with those of every observation that is shown.
        chosen: Site to what is shown.
        rng: Breaks ties between whole numbers.
    """
    frames, begin = [], 0
    for name, site in data.sites.items():
        own = chosen[name]
        columns = begin + own.owners
        begin += own.units.size
        if site.kind == "label" or not own.numbers.size:
            continue  # the order of categories says nothing
        seen = site.values.ravel()[own.numbers].astype(float)
        single = site.kind == "binary" and site.size == 1
        bad = (left_out if single else weighted).unreliable[own.units]
        values = []
        ties = rng.uniform(size=seen.size)
        for source in sources:
            of = (
                _chance(_seen_density(source)[own.units], seen)
                if single
                else _rank(made[source.name].shown[name], seen, ties)
            )
            values.append((source.name, IN_SAMPLE, of, np.ones(seen.size, bool)))
        if not bad.mean() > MOST_UNRELIABLE:
            # Which draws the replicates come from decides which of an observation's weights are theirs.
            weights = None if single else weighted.log_weights[made["reference"].places][:, columns]
            of = (
                _chance(left_out.elpd[own.units], seen)
                if single
                else _rank(made["reference"].shown[name], seen, ties, weights)
            )
            values.append(("reference", LEFT_OUT, of, ~bad[own.owners]))
        frames += [
            pd.DataFrame(
                {
                    "site": name,
                    "unit": data.chosen[name][own.units - data.part(name).start][own.owners][known],
                    "position": own.numbers[known],
                    "observed": seen[known],
                    "source": source,
                    "kind": kind,
                    "value": of[known],
                }
            )
            for source, kind, of, known in values
        ]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(OBSERVATION_COLUMNS))


def _seen_density(source: Source) -> np.ndarray:
    return np.asarray(logsumexp(source.likelihoods, axis=0) - math.log(len(source.likelihoods)))


def _chance(log_density: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """The probability of 1, from the log probability of what was observed."""
    chance = np.exp(np.minimum(log_density, 0.0))
    return np.where(seen == 1, chance, 1.0 - chance)


def _rank(new: np.ndarray, seen: np.ndarray, ties: np.ndarray, log_weights: np.ndarray | None = None) -> np.ndarray:
    """The probability that new data lie below what was observed, (number,)."""
    weights = np.full(new.shape, 1.0 / len(new))
    if log_weights is not None:
        weights = np.exp(log_weights - logsumexp(log_weights, axis=0))
    below, equal = (weights * (new < seen)).sum(axis=0), (weights * (new == seen)).sum(axis=0)
    # Spread over the steps of the distribution function, of whole numbers (Czado, Gneiting & Held 2009, section 2.1)
    # and of so few replicates: uniform if the model is right.
    step = 1.0 / len(new)
    return np.asarray((below + ties * (equal + step)) / (1.0 + step))


def calibration_rows(observations: pd.DataFrame, data: Data) -> list[dict[str, Any]]:
    """Rows of `CALIBRATION_COLUMNS`: Brier scores, or shares in predictive intervals, each by source."""
    rows = []
    for name, site in data.sites.items():
        own = observations[observations["site"] == name]
        single = site.kind == "binary" and site.size == 1
        held = {
            (str(source), str(kind)): _held(group, single)
            for (source, kind), group in own.groupby(["source", "kind"], sort=False)
        }
        for (source, kind), measures in held.items():
            for measure, each in measures.items():
                # On the observations that both have: left out, some may be missing.
                difference = (each - held["reference", IN_SAMPLE][measure]).dropna().to_numpy()
                rows.append(
                    {
                        "site": name,
                        "measure": measure,
                        "source": source,
                        "kind": kind,
                        "units": len(each),
                        "value": float(each.mean()),
                        "se": _error(each.to_numpy(), share=not single),
                        "difference": float(difference.mean()),
                        "difference_se": _error(difference, share=not single),
                    }
                )
    return rows


def _error(each: np.ndarray, *, share: bool) -> float:
    """The error of a mean over observations; of a share also where all of them, or none, are counted."""
    error = independent_error(each)
    return max(error, least_probability_error(each.size)) if share and math.isfinite(error) else error


def _held(group: pd.DataFrame, single: bool) -> dict[str, pd.Series]:
    """What each observation says of a source's probabilities, or of its intervals; its numbers are averaged first."""
    value = group["value"].to_numpy()
    if single:
        measures = {"Brier score": np.square(value - group["observed"].to_numpy())}
    else:
        measures = {f"in the central {share:.0%}": np.abs(value - 0.5) <= 0.5 * share for share in (0.5, 0.9)}
    units = group["unit"].to_numpy()
    return {name: pd.Series(each.astype(float)).groupby(units).mean() for name, each in measures.items()}
