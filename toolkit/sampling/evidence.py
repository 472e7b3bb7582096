"""The log evidence: exact where it is known, else by bridges from the reference's draws, or refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np
import scipy.linalg

from toolkit.estimate import Estimate
from toolkit.influence import TAIL_LIMIT, chain_error, tail_index
from toolkit.modelling.model import Model
from toolkit.modelling.points import log_density_at, points, sites_at
from toolkit.sampling.bridge import Bridge, bridge
from toolkit.sampling.references import Reference

FOLDS = 10
"""A Gaussian is fitted to nine tenths of the draws and met by the last: with halves, twice the nats would be lost to
the fit (in 200 dimensions with 4,000 draws 5 instead of 2.8)."""

_OWN_DRAWS = 8_000
"""Of the fitted Gaussians; twice a default reference's, and as cheap as 8,000 evaluations of the density."""

_MOST_APART = 4.0
"""Errors by which two bridges may differ: beyond them, one is wrong and it is not known which."""

_ROUNDING = 0.01  # nats; bridges whose errors are smaller still may differ by as much


@dataclass(frozen=True, eq=False)
class Proposal:
    """A normalised distribution that is near the posterior, by its log ratios at two sets of draws.

    Attributes:
        name: How a sentence calls it.
        at_reference: Log p(x, z) - log q(z) at the reference's draws, `(chain, draw)`, in nats; both densities in one
            and the same space.
        at_own: The same at independent draws of q, `(draws,)`.
    """

    name: str
    at_reference: np.ndarray
    at_own: np.ndarray


@dataclass(frozen=True, eq=False)
class LogEvidence:
    """Log p(x), of one labelling where labels can switch; in nats.

    Attributes:
        estimate: Its value with its error; None where none can be trusted.
        how: How it was had, in words.
        problem: Why there is none; empty if there is one.
        low: What it is at least, in expectation: the highest ELBO; None without one.
        high: What it is at most, in expectation: the lowest mean of log p(x, z) - log q(z) under the reference.
        influence: What each reference draw adds to the estimate beyond the mean, `(chain, draw)`; None if exact.
        own_error: The part of the error that has nothing to do with the reference's draws.
        log_copies: Log of the number of equal labellings, which log p(x) of all of them has on top.
    """

    estimate: Estimate | None
    how: str = ""
    problem: str = ""
    low: Estimate | None = None
    high: Estimate | None = None
    influence: np.ndarray | None = None
    own_error: float = 0.0
    log_copies: float = 0.0


def log_evidence(
    model: Model, reference: Reference, proposals: Sequence[Proposal] = (), *, key: jax.Array
) -> LogEvidence:
    """Log p(x) of one labelling: the model's own where it is known, else by bridge sampling, else why not.

    Bridges lead from the reference's draws to each of the proposals, and to Gaussians fitted to the draws
    (each fold is met by a Gaussian of the others). Of those that can be trusted the one with the least error counts,
    and the others must agree with it.

    Args:
        model: The model.
        reference: Draws of its posterior, in one labelling.
        proposals: Distributions from elsewhere, such as guides.
        key: For the fitted Gaussians' draws.

    Reference: Gronau et al. (2017), A tutorial on bridge sampling, Journal of Mathematical Psychology 81.
    """
    low, high = _sandwich(proposals)
    nothing = LogEvidence(None, low=low, high=high, log_copies=model.labels.log_copies if model.labels else 0.0)
    if model.log_evidence is not None:
        exact = Estimate(model.log_evidence - nothing.log_copies, 0.0)
        if _above(low, exact):
            return replace(nothing, problem=f"the model states {exact} nats, and an ELBO of {low} lies above it")
        return replace(nothing, estimate=exact, how="exact")
    if not reference.status.ok:
        return replace(nothing, problem=f"the reference does not allow it: {reference.status.value}")
    try:
        offered = [*proposals, fitted_gaussians(model, reference, key=key)]
    except (ValueError, np.linalg.LinAlgError) as error:
        return replace(nothing, problem=f"the reference's draws cannot be looked at: {error}")
    tried = {proposal.name: _tried(proposal) for proposal in offered}
    sound = {name: found for name, (found, problem) in tried.items() if found is not None and not problem}
    if not sound:
        reasons = "; ".join(f"{name}: {problem}" for name, (_, problem) in tried.items())
        return replace(nothing, problem=f"no bridge can be trusted ({reasons})")
    name = min(sound, key=lambda name: sound[name].estimate.se)
    best = sound[name]
    for other, found in sound.items():
        if not _agree(found.estimate, best.estimate):
            problem = (
                f"two bridges disagree, {best.estimate} nats by {name} and {found.estimate} by {other}: part of the "
                "posterior may be missing from the draws"
            )
            return replace(nothing, problem=problem)
    if _above(low, best.estimate):
        problem = (
            f"an ELBO of {low} nats lies above the {best.estimate} of the bridge to {name}: part of the posterior is "
            "missing from the draws"
        )
        return replace(nothing, problem=problem)
    how = f"bridge sampling between the reference and {name}"
    return replace(nothing, estimate=best.estimate, how=how, influence=best.influence, own_error=best.own_error)


def _above(low: Estimate | None, evidence: Estimate) -> bool:
    """Whether a lower bound lies above what it bounds, by more than errors explain."""
    return low is not None and low.value > evidence.value and not _agree(low, evidence)


def _settled(at_reference: np.ndarray) -> bool:
    """Whether a mean of log ratios is a number: above a tail index of 0.7 the draws at hand do not tell it."""
    return tail_index(at_reference) <= TAIL_LIMIT


def _agree(first: Estimate, second: Estimate) -> bool:
    return abs(first.value - second.value) <= _MOST_APART * math.hypot(first.se, second.se) + _ROUNDING


def _tried(proposal: Proposal) -> tuple[Bridge | None, str]:
    """The bridge to a proposal, and why it cannot be trusted; no bridge where none can be built."""
    try:
        found = bridge(proposal.at_reference, proposal.at_own)
    except ValueError:
        return None, "it has log ratios that are not finite"
    return found, found.problem


def _sandwich(proposals: Sequence[Proposal]) -> tuple[Estimate | None, Estimate | None]:
    """The highest mean log ratio at own draws and the lowest at the reference's: the evidence lies between.

    Of a proposal that also lies in other labellings, what lies in this one is a distribution once it is divided by its
    share.
    """
    lows = []
    for proposal in proposals:
        inside = proposal.at_own[np.isfinite(proposal.at_own)]
        if inside.size > 1 and not np.isposinf(proposal.at_own).any():
            mean = Estimate.of_mean(inside)
            lows.append(Estimate(mean.value + math.log(inside.size / proposal.at_own.size), mean.se))
    highs = [
        Estimate(float(p.at_reference.mean()), chain_error(p.at_reference))
        for p in proposals
        if np.isfinite(p.at_reference).all() and _settled(p.at_reference)
    ]
    return max(lows, default=None), min(highs, default=None)


def fitted_gaussians(model: Model, reference: Reference, *, key: jax.Array) -> Proposal:
    """Gaussians fitted to the reference's draws in its chart's unconstrained space, each met by the fold left out.

    Their correlations are shrunk towards none, by how uncertain they are: in hundreds of dimensions that saves most of
    what too few draws cost.

    Args:
        model: The model.
        reference: Draws of its posterior.
        key: For the Gaussians' own draws.

    Raises:
        ValueError: The draws cannot be looked at in that chart.
        LinAlgError: They do not vary in some direction.

    Reference: Schaefer & Strimmer (2005), A shrinkage approach to large-scale covariance matrix estimation, Statistical
        Applications in Genetics and Molecular Biology 4(1), table 1 (target D).
    """
    chains, length = next(iter(reference.draws.values())).shape[:2]
    seen = points(model, latents(reference), reference.chart)
    vectors = seen.vectors.reshape(chains, length, -1)
    densities = seen.log_density.reshape(chains, length)
    folds = min(FOLDS, length)
    edges = np.linspace(0, length, folds + 1).astype(int)
    parts = list(zip(edges[:-1], edges[1:], strict=True))
    # Fitted with and without shrinking; what lies nearer to the draws left out is taken.
    fitted, met = [], []
    for begin, end in parts:
        others = np.concatenate([vectors[:, :begin], vectors[:, end:]], axis=1).reshape(-1, vectors.shape[-1])
        fitted.append(_Gaussian.fitted(others))
        left_out = vectors[:, begin:end].reshape(-1, vectors.shape[-1])
        met.append([gaussian.log_density(left_out).reshape(chains, -1) for gaussian in fitted[-1]])
    at_draws = [np.concatenate([pair[way] for pair in met], axis=1) for way in (0, 1)]
    way = int(at_draws[1].mean() > at_draws[0].mean())
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    drawn = [pair[way].draw(rng, -(-_OWN_DRAWS // folds)) for pair in fitted]
    of_own = [pair[way].log_density(own) for pair, own in zip(fitted, drawn, strict=True)]
    at_reference = densities - at_draws[way]
    own = np.concatenate(drawn)
    at_own = log_density_at(model, own, reference.chart) - np.concatenate(of_own)
    at_own[~_in_labelling(model, reference, own)] = -np.inf
    return Proposal("Gaussians fitted to its draws", at_reference, at_own)


def latents(reference: Reference) -> dict[str, np.ndarray]:
    """The latent sites' draws, all chains behind one another, `(draws, ...)` each, in the labelling of their mean.

    The site that labels are matched by is among them.
    """
    model = reference.model
    draws = {name: np.asarray(reference.draws[name]) for name in model.latents}
    if model.labels is not None:
        draws |= {model.labels.by: np.asarray(reference.draws[model.labels.by])}
        draws = model.labels.relabel(draws, anchor=draws[model.labels.by].mean(axis=(0, 1)))
    return {name: values.reshape(-1, *values.shape[2:]) for name, values in draws.items()}


def _in_labelling(model: Model, reference: Reference, vectors: np.ndarray) -> np.ndarray:
    """Which points of the reference's chart have the labelling of its mean, `(draws,)`; all where labels are fixed."""
    if model.labels is None:
        return np.ones(len(vectors), bool)
    by = model.labels.by
    anchor = np.asarray(reference.draws[by]).mean(axis=(0, 1))
    orders = model.labels.orders(sites_at(model, vectors, (by,), reference.chart)[by], anchor)
    return (orders == np.arange(model.labels.count)).all(axis=1)


@dataclass(frozen=True, eq=False)
class _Gaussian:
    """A multivariate normal.

    Attributes:
        mean: Its mean, `(coordinate,)`.
        lower: The lower triangular factor of its covariance, `(coordinate, coordinate)`.
    """

    mean: np.ndarray
    lower: np.ndarray

    @classmethod
    def fitted(cls, draws: np.ndarray) -> tuple[_Gaussian, _Gaussian]:
        """The Gaussian with the draws' mean and covariance, and the one whose correlations are shrunk towards none.

        Of few draws, the first has a covariance that is made regular by the least shrinking that does it.
        """
        mean, sd = draws.mean(axis=0), draws.std(axis=0, ddof=1)
        if not (sd > 0).all():
            raise np.linalg.LinAlgError(f"{int((~(sd > 0)).sum())} of {sd.size} coordinates do not vary")
        standard = (draws - mean) / sd
        correlation = standard.T @ standard / (len(draws) - 1)
        shrunk = _shrunk(correlation, standard)
        plain = correlation if len(draws) > 2 * sd.size else shrunk
        return cls(mean, sd[:, None] * np.linalg.cholesky(plain)), cls(mean, sd[:, None] * np.linalg.cholesky(shrunk))

    def log_density(self, vectors: np.ndarray) -> np.ndarray:
        white = scipy.linalg.solve_triangular(self.lower, (vectors - self.mean).T, lower=True)
        constant = np.log(np.diagonal(self.lower)).sum() + 0.5 * self.mean.size * math.log(2 * math.pi)
        return -0.5 * np.square(white).sum(axis=0) - constant

    def draw(self, rng: np.random.Generator, draws: int) -> np.ndarray:
        return self.mean + rng.standard_normal((draws, self.mean.size)) @ self.lower.T


def _shrunk(correlation: np.ndarray, standard: np.ndarray) -> np.ndarray:
    """Correlations times one factor, by how much of their squares is noise; `standard` holds the draws behind them."""
    count, apart = len(standard), ~np.eye(len(correlation), dtype=bool)
    square = np.square(standard)
    cubes = (square * standard).T @ standard / count
    fourth = np.square(square).mean(axis=0)
    both = square.T @ square / count
    # The variance of a correlation r of standard scores a, b is that of a b - r (a^2 + b^2) / 2.
    own = 0.25 * np.square(correlation) * (np.add.outer(fourth, fourth) + 2.0 * both)
    variance = np.maximum(both - correlation * (cubes + cubes.T) + own, 0.0) / count
    signal = float(np.square(correlation[apart]).sum())
    share = min(1.0, float(variance[apart].sum()) / signal) if signal > 0 else 0.0
    return np.where(apart, (1.0 - share) * correlation, 1.0)
