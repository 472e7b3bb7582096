"""Predictive distributions of single observations, and how far a guide's lie from the reference's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from toolkit.estimate import Estimate
from toolkit.influence import chain_error, effective_draws, independent_error
from toolkit.modelling.model import Model
from toolkit.modelling.observations import Observed, log_likelihoods

_OUTCOMES = 8_000_000
"""Log likelihoods of new data from each source: less than a second."""

_LEAST_SETS, _MOST_SETS = 2, 50  # of new data

MOST_NOISE = 0.1
"""Nats of one observation by which noise may set both densities apart. An observation of many numbers knows so much of
the latents that few of the draws explain it: exact draws would seem to lose 18 nats for one of 100 numbers."""

_NONE = Estimate(math.nan, math.nan)


@dataclass(frozen=True, eq=False)
class Data:
    """The observations that are looked at.

    Attributes:
        sites: The observed sites by name.
        chosen: Site to places of observations, all or as many as memory allows; they follow one another.
    """

    sites: Mapping[str, Observed]
    chosen: dict[str, np.ndarray]

    @cached_property
    def counts(self) -> dict[str, int]:
        """How many observations each site has."""
        return {name: site.places.size for name, site in self.sites.items()}

    @property
    def count(self) -> int:
        """Observations in all; masked ones are none."""
        return sum(self.counts.values())

    @property
    def looked_at(self) -> int:
        """Observations that were chosen."""
        return sum(places.size for places in self.chosen.values())

    @cached_property
    def scales(self) -> np.ndarray:
        """How many observations each chosen one stands for, (observation,)."""
        return np.concatenate(
            [np.full(places.size, self.counts[name] / max(places.size, 1)) for name, places in self.chosen.items()]
        )

    @cached_property
    def binary(self) -> np.ndarray:
        """Which chosen observations are a single zero or one, (observation,)."""
        kinds = [site.kind == "binary" and site.size == 1 for site in self.sites.values()]
        return np.repeat(kinds, [places.size for places in self.chosen.values()])

    def part(self, name: str) -> slice:
        """Where a site's observations are among all that were chosen."""
        names = list(self.chosen)
        begin = sum(self.chosen[other].size for other in names[: names.index(name)])
        return slice(begin, begin + self.chosen[name].size)

    def total(self, each: np.ndarray, error: float = 0.0) -> Estimate:
        """The sum over all observations of what is known of the chosen ones, (observation,), with its own error.

        Where not all were chosen, what the choice adds to the error is in it.
        """
        variance = error**2
        for name, places in self.chosen.items():
            own, count = each[self.part(name)], self.counts[name]
            if 1 < places.size < count:
                variance += count**2 * (1.0 - places.size / count) * float(np.var(own, ddof=1)) / places.size
        return Estimate(float(self.scales @ each), math.sqrt(variance))


@dataclass(frozen=True, eq=False)
class Source:
    """Draws of one distribution of the latents.

    Attributes:
        name: `reference`, or the guide's.
        draws: The latent sites, `(draws, ...)` each.
        shape: (chain, draw) of the reference, (draw,) of a guide.
        likelihoods: Log p(y_i | z), (draws, observation), in nats.
        log_ratios: Log p(x, z) - log q(z), (draws,); None where the density is not known, and for the reference.
    """

    name: str
    draws: Mapping[str, np.ndarray]
    shape: tuple[int, ...]
    likelihoods: np.ndarray
    log_ratios: np.ndarray | None = None

    @property
    def is_reference(self) -> bool:
        """Whether these are the reference's draws."""
        return len(self.shape) == 2

    @cached_property
    def effective(self) -> float:
        """How many independent draws they are worth, by their log likelihoods."""
        total = self.likelihoods.sum(axis=1)
        return effective_draws(total.reshape(self.shape)) if self.is_reference else float(total.size)

    def error(self, series: np.ndarray) -> float:
        """The standard error of the mean of a series over the draws."""
        return chain_error(series.reshape(self.shape)) if self.is_reference else independent_error(series)

    def places(self, draws: int) -> np.ndarray:
        """So many of the draws, evenly taken, by their places."""
        return np.unique(np.linspace(0, len(self.likelihoods) - 1, min(draws, len(self.likelihoods))).astype(int))


class _Divergence:
    """KL of a guide's predictive distributions to the reference's, added up outcome by outcome.

    With p and q the two predictive densities of an outcome, KL(p || q) is the mean of -log(q / p) under p, and that of
    q / p - 1 is 0: a share of the second takes noise from the first, nearly all of it where p and q are alike.
    """

    def __init__(self, reference: Source, guide: Source) -> None:
        self._reference, self._guide = reference, guide
        count = reference.likelihoods.shape[1]
        # The two means (log, ratio) for each observation, each set of outcomes, and each draw.
        self._each = np.zeros((2, count))
        self._sets: list[np.ndarray] = []
        self._moved = np.zeros((2, len(reference.likelihoods))), np.zeros((2, len(guide.likelihoods)))
        self._noise = np.zeros((2, count))
        self._products = np.zeros(2)
        self._excluded = False

    def add(
        self,
        weight: np.ndarray,
        scales: np.ndarray,
        of_reference: np.ndarray,
        of_guide: np.ndarray,
        *,
        sampled: bool,
    ) -> None:
        """One outcome of every observation, with its probability or share and what it stands for, (observation,)."""
        (log_p, shares_p), (log_q, shares_q) = _averaged(of_reference), _averaged(of_guide)
        # What the reference may predict and the guide rules out makes the loss infinite.
        self._excluded |= bool(((weight > 0) & np.isfinite(log_p) & np.isneginf(log_q)).any())
        with np.errstate(over="ignore", invalid="ignore"):
            difference = np.where(weight > 0, log_q - log_p, 0.0)
            parts = np.stack([-difference, np.expm1(difference)])
            slopes = weight * np.stack([-np.ones_like(difference), np.exp(difference)])
            self._products += weight @ np.stack([parts[0] * parts[1], np.square(parts[1])]).T
        self._each += weight * parts
        if sampled:
            self._sets.append((scales * weight * parts).sum(axis=1))
        self._moved[0][:] -= scales * slopes @ shares_p.T
        self._moved[1][:] += scales * slopes @ shares_q.T
        # Both densities are averages over draws, whose noise alone sets them apart.
        for i, (shares, source) in enumerate([(shares_p, self._reference), (shares_q, self._guide)]):
            self._noise[i] += weight * np.square(shares - 1.0).mean(axis=0) / source.effective

    def estimate(self, data: Data) -> tuple[Estimate, str]:
        """The sum over all observations, less what noise alone would give, never below 0; or why there is none."""
        if self._excluded:
            return Estimate(math.inf, 0.0), ""
        if not np.isfinite(self._each).all():
            return _NONE, "under some draws a density is no number"
        if (0.5 * self._noise.sum(axis=0) > MOST_NOISE).any():
            return _NONE, "its draws are too few to average the predictive density of every observation"
        share = float(np.clip(-self._products[0] / self._products[1], 0.0, 1.0)) if self._products[1] > 0 else 1.0
        mix = np.array([1.0, share])
        # To second order in the errors of the densities; the outcomes come from the reference's own draws.
        noise = 0.5 * self._noise.sum(axis=0)
        new = independent_error(np.array(self._sets) @ mix) * len(self._sets) if self._sets else 0.0
        drawn = math.hypot(self._reference.error(mix @ self._moved[0]), self._guide.error(mix @ self._moved[1]))
        value, se = data.total(mix @ self._each - noise, math.hypot(new, drawn))
        return Estimate(max(value, 0.0), math.hypot(se, data.total(noise).value)), ""


def predictive_losses(
    model: Model, sources: Sequence[Source], data: Data, new: Mapping[str, np.ndarray]
) -> dict[str, tuple[Estimate, str]]:
    """How many nats each guide's predictions of as many new observations are expected to lose to the reference's.

    The loss is KL(p || q) of the predictive distributions of each observation given its predictors and what was
    observed before it, added up; NaN with the reason where it cannot be told.

    Args:
        model: The model.
        sources: The reference and then the guides.
        data: What was observed.
        new: Data made anew from the reference, site to `(sets, *shape)`; zeros and ones are summed over exactly.
    """
    reference, *guides = sources
    found = {guide.name: _Divergence(reference, guide) for guide in guides}

    def add(outcomes: Mapping[str, np.ndarray], which: np.ndarray, share: float) -> None:
        """One outcome of each observation of `which`; with this share, or with its probability where that is 0."""
        of_reference = log_likelihoods(model, reference.draws, data.chosen, outcomes)
        weight = np.where(which, share or np.exp(_averaged(of_reference)[0]), 0.0)
        for guide in guides:
            own = log_likelihoods(model, guide.draws, data.chosen, outcomes)
            found[guide.name].add(weight, data.scales, of_reference, own, sampled=bool(share))

    if data.binary.any():
        for outcome in (0, 1):
            add({name: _either(site, outcome) for name, site in data.sites.items()}, data.binary, 0.0)
    if not data.binary.all():
        sets = list(_sets(reference, new))
        for outcomes in sets:
            add(outcomes, ~data.binary, 1.0 / len(sets))
    return {name: divergence.estimate(data) for name, divergence in found.items()}


def _sets(reference: Source, new: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    made = len(next(iter(new.values())))
    numbers = len(reference.likelihoods) * sum(values[0].size for values in new.values())
    count = min(made, max(_LEAST_SETS, min(_MOST_SETS, _OUTCOMES // numbers)))
    for place in np.linspace(0, made - 1, count).astype(int):
        yield {name: values[place] for name, values in new.items()}


def _either(site: Observed, outcome: int) -> np.ndarray:
    """The same outcome everywhere where there are two; else what was observed."""
    return np.full_like(site.values, outcome) if site.kind == "binary" else site.values


def _averaged(log_density: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log of the mean density over draws, (observation,), and each draw's share of the mean, (draws, observation)."""
    largest = log_density.max(axis=0)
    largest = np.where(np.isfinite(largest), largest, 0.0)
    shares = np.exp(log_density - largest)
    mean = shares.mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return largest + np.log(mean), np.where(mean > 0, shares / mean, 1.0)
