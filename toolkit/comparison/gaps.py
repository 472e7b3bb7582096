"""Where the log evidence went: what a fit reached, what its optimiser left, what its family cannot reach.

    log p(x)  =  ELBO(fit)  +  optimisation gap  +  family gap  ( +  label symmetry )

KL(q || p) = E_q[log q(z) - log p(z | x)] is the sum of the three gaps; KL(p || q) = E_p[log p(z | x) - log q(z)] looks
from the other side. Texts differ in which of the two they call forward: here both go by their formulas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import pandas as pd

from toolkit.comparison.metrics import NAN
from toolkit.comparison.sentences import climbs
from toolkit.comparison.sources import Approximation, Weighed, key_for
from toolkit.comparison.verdicts import Z
from toolkit.estimate import Estimate
from toolkit.influence import TAIL_LIMIT, chain_error, tail_index
from toolkit.modelling.labels import Labels
from toolkit.modelling.model import Model
from toolkit.modelling.points import points
from toolkit.sampling.evidence import LogEvidence, Proposal, latents, log_evidence
from toolkit.sampling.references import Reference

GAP_COLUMNS = (
    "guide", "elbo", "elbo_se", "kl_qp", "kl_qp_se", "kl_qp_low", "kl_qp_high", "optimisation", "optimisation_limit",
    "optimisation_scope", "family_low", "family_high", "labels", "kl_pq", "kl_pq_se", "kl_pq_khat", "kl_pq_problem",
    "tv_bound", "cdf_difference", "cdf_difference_se", "cdf_difference_quantity", "expected_log_likelihood",
    "kl_to_prior", "kl_to_prior_se", "energy", "energy_se", "entropy", "problem",
)  # fmt: skip

_DRAWS = 2_000
"""Of each guide, for densities and decompositions: the error of a mean of nats is a fortieth of their sd."""

NOT_CLIMBED = "ELBO not climbed"
"""What stands for the optimiser's share of a fit whose algorithm seeks something else than a high ELBO."""

DIVERGENT = 1.0
"""Tail index of - log q under p from which on its mean is infinite; above `TAIL_LIMIT` no draws at hand tell it."""


POINT = "a point has no density: its entropy and ELBO are minus infinity, and KL(q || p) and KL(p || q) infinite"
"""What `Gaps.table` says of a point mass in place of its gaps."""


def is_point(fit: Any) -> bool:
    """Whether a fit is a point mass, which can draw and has no density."""
    return bool(fit.usable and not getattr(fit, "has_density", True))


@dataclass(frozen=True, eq=False)
class Gaps:
    """The split of the log evidence.

    Attributes:
        evidence: Log p(x) of one labelling, or why there is none.
        table: One row for each fit, in nats: elbo; kl_qp, KL(q || p), with kl_qp_low and kl_qp_high, its 95 % limits,
            also where the evidence is known between limits alone; optimisation (the certificate's mean),
            optimisation_limit (its upper 95 % limit) and optimisation_scope (`NOT_CLIMBED` where it is not asked);
            family_low and family_high, between which the family's gap lies by these limits; labels, what lies in equal
            labellings that the guide leaves out;
            kl_pq, KL(p || q), with the tail index behind it and kl_pq_problem, why it is no number; tv_bound, what no
            probability may differ by more than, at 95 %; cdf_difference, the largest difference that was seen, and of
            which quantity; the decompositions expected_log_likelihood - kl_to_prior and energy + entropy (in the plain
            chart's unconstrained space; of a point mass the entropy is minus infinity); problem, why something is
            missing. NaN or empty where unknown.
        drawn: Guide name to the draws of its latent sites that this rests on, `(draws, ...)` each.
    """

    evidence: LogEvidence
    table: pd.DataFrame
    drawn: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Side:
    """One fit's densities beside the posterior's.

    Attributes:
        fit: The fit.
        drawn: Draws of its latent sites, `(draws, ...)` each; empty if there are none.
        at_own: Log p(x, z) - log q(z) at independent draws, minus infinity outside the labelling it sits on.
        at_reference: The same at the reference's draws, `(chain, draw)`; None where that cannot be had.
        labels: Nats in labellings that the guide leaves out.
        problem: Why a part is missing.
    """

    fit: Approximation
    drawn: Mapping[str, np.ndarray]
    at_own: np.ndarray | None
    at_reference: np.ndarray | None
    labels: float
    problem: str


def gaps(
    model: Model,
    reference: Reference | None,
    fits: Sequence[Approximation],
    largest: Mapping[str, tuple[Estimate, str]],
    *,
    key: jax.Array,
) -> Gaps:
    """How the log evidence splits for each fit.

    Args:
        model: The model.
        reference: Draws of its posterior; without ones that passed their checks the evidence is not known.
        fits: The fits; those without an optimum have an empty row.
        largest: Guide name to the largest difference of distribution functions that was seen, and of which quantity.
        key: Random key.
    """
    trusted = reference is not None and reference.usable and reference.status.ok
    seen = latents(reference) if trusted and reference is not None else {}
    shape = next(iter(reference.draws.values())).shape[:2] if seen and reference is not None else (0, 0)
    sides = [_side(model, fit, seen, shape, key=key_for(key, fit.guide.name)) for fit in fits]
    proposals = [
        Proposal(side.fit.guide.name, side.at_reference, side.at_own)
        for side in sides
        if side.at_reference is not None and side.at_own is not None
    ]
    if trusted and reference is not None:
        evidence = log_evidence(model, reference, proposals, key=jax.random.fold_in(key, 0))
    else:
        evidence = _unknown(model, sides)
    log_p = points(model, seen, "plain").log_density.reshape(shape) if seen and proposals else None
    rows = [_row(model, side, evidence, log_p, largest.get(side.fit.guide.name)) for side in sides]
    return Gaps(
        evidence,
        pd.DataFrame(rows, columns=list(GAP_COLUMNS)),
        {side.fit.guide.name: side.drawn for side in sides if side.drawn},
    )


def _unknown(model: Model, sides: Sequence[_Side]) -> LogEvidence:
    """The evidence without a reference: known exactly or at least as high as the best ELBO."""
    copies = model.labels.log_copies if model.labels else 0.0
    if model.log_evidence is not None:
        return LogEvidence(Estimate(model.log_evidence - copies, 0.0), "exact", log_copies=copies)
    elbos = [side.fit.elbo for side in sides if side.fit.elbo and side.fit.status.has_optimum]
    problem = "there is no reference that passed its checks"
    best = max(elbos, default=None)  # below the evidence of all labellings
    low = Estimate(best.value - copies, best.se) if best else None
    return LogEvidence(None, problem=problem, low=low, log_copies=copies)


def _side(
    model: Model, fit: Approximation, seen: Mapping[str, np.ndarray], shape: tuple[int, ...], *, key: jax.Array
) -> _Side:
    point = is_point(fit)
    if not (fit.usable and fit.status.has_optimum and (fit.elbo or point)):
        return _Side(fit, {}, None, None, 0.0, "")
    sites = (*model.latents, model.labels.by) if model.labels else model.latents
    try:
        with jax.enable_x64(True):
            drawn = fit.draw(key, _DRAWS, tuple(dict.fromkeys(sites)))
        if point:
            return _Side(fit, drawn, None, None, 0.0, POINT)
        if not isinstance(fit, Weighed) or fit.fresh_log_weights is None:
            return _Side(fit, drawn, None, None, 0.0, "its density is not known")
        if not model.labels:
            at_reference = fit.log_weights_at(seen).reshape(shape) if seen else None
            return _Side(fit, drawn, np.asarray(fit.fresh_log_weights, float), at_reference, 0.0, "")
        by = model.labels.by
        orders = model.labels.orders(np.asarray(drawn[by]), _anchor(model.labels, seen or drawn, relabel=not seen))
        kinds, counts = np.unique(orders, axis=0, return_counts=True)
        own = kinds[counts.argmax()]
        shares = counts / counts.sum()
        # What the guide spreads over labellings is no longer left out.
        labels = model.labels.log_copies + float((shares * np.log(shares)).sum())
        if not seen:
            return _Side(fit, drawn, np.asarray(fit.fresh_log_weights, float), None, labels, "")
        at_own = np.where((orders == own).all(axis=1), fit.log_weights_at(drawn), -np.inf)
        moved = model.labels.permuted(dict(seen), np.argsort(own).tolist())
        return _Side(fit, drawn, at_own, fit.log_weights_at(moved).reshape(shape), labels, "")
    except (ValueError, TypeError, KeyError, ArithmeticError, RuntimeError) as error:
        # A guide that cannot be looked at is a row with its reason; the others' work is not lost.
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        return _Side(fit, {}, None, None, 0.0, first)


def _anchor(labels: Labels, draws: Mapping[str, np.ndarray], *, relabel: bool) -> np.ndarray:
    """A labelling to count by: the mean of the draws, after they were brought to one labelling where they have none."""
    values = {labels.by: np.asarray(draws[labels.by])[None]}
    return (labels.relabel(values) if relabel else values)[labels.by].mean(axis=(0, 1))


def _row(
    model: Model,
    side: _Side,
    evidence: LogEvidence,
    log_p: np.ndarray | None,
    largest: tuple[Estimate, str] | None,
) -> dict[str, Any]:
    fit = side.fit
    row: dict[str, Any] = dict.fromkeys(GAP_COLUMNS, math.nan) | {
        "guide": fit.guide.name,
        "optimisation_scope": "",
        "kl_pq_problem": "",
        "cdf_difference_quantity": "",
        "problem": side.problem,
    }
    if not (fit.usable and fit.status.has_optimum and (fit.elbo or side.problem == POINT)):
        return row | {"problem": side.problem or "the fit has no optimum"}
    if fit.elbo is None:
        return row | _decomposed(model, side, Estimate(-math.inf, 0.0))
    elbo = fit.elbo
    row |= {"elbo": elbo.value, "elbo_se": elbo.se, "labels": side.labels}
    below = _kl_qp(evidence, elbo)
    row |= {"kl_qp": below.value, "kl_qp_se": below.se}
    for name, end, sign in (("low", evidence.low, -1.0), ("high", evidence.high, 1.0)):
        known = evidence.estimate or end
        if known:
            reach = sign * Z * math.hypot(known.se, elbo.se)
            row[f"kl_qp_{name}"] = known.value + evidence.log_copies - elbo.value + reach
    if isinstance(fit, Weighed) and fit.certificate is not None:
        gap = fit.certificate
        row |= {"optimisation": gap.gap.value, "optimisation_limit": gap.limit, "optimisation_scope": gap.scope.value}
        row["family_high"] = max(row["kl_qp_high"] - side.labels, 0.0)
        row["family_low"] = max(row["kl_qp_low"] - side.labels - gap.limit, 0.0)
    if not climbs(fit):
        row["optimisation_scope"] = NOT_CLIMBED
    reverse, khat, problem = _kl_pq(side.at_reference, log_p, evidence)
    row |= {"kl_pq": reverse.value, "kl_pq_se": reverse.se, "kl_pq_khat": khat, "kl_pq_problem": problem}
    row["tv_bound"] = total_variation_bound(below, reverse)
    if largest:
        row |= {"cdf_difference": largest[0].value, "cdf_difference_se": largest[0].se}
        row["cdf_difference_quantity"] = largest[1]
    return row | (_decomposed(model, side, elbo) if side.drawn else {})


def _kl_qp(evidence: LogEvidence, elbo: Estimate) -> Estimate:
    """KL(q || p) to the posterior with all its labellings; NaN where the evidence is not known.

    Both errors are added in squares, though the guide's draws may be in both: its error is then a little too large.
    """
    if evidence.estimate is None:
        return NAN
    value = evidence.estimate.value + evidence.log_copies - elbo.value
    return Estimate(value, float(math.hypot(evidence.estimate.se, elbo.se)))


def _kl_pq(
    at_reference: np.ndarray | None, log_p: np.ndarray | None, evidence: LogEvidence
) -> tuple[Estimate, float, str]:
    """KL(p || q) to one labelling, the tail index of - log q, and why it is no number.

    What makes it infinite is - log q, far out. The tail of log p - log q does not show it: it may be highest in the
    middle, where a wide guide has too little, and the few draws far out are then no more than outliers among those.
    """
    if at_reference is None:
        return NAN, math.nan, ""
    known = log_p is not None and np.isfinite(log_p).all()
    khat = tail_index(at_reference - log_p if known else at_reference)
    if not np.isfinite(at_reference).all():
        return NAN, khat, "infinite: the guide gives no density where the posterior has some"
    if khat > DIVERGENT:
        return NAN, khat, "divergent: it grows with the draws, since the guide's tails are too light"
    if evidence.estimate is None:
        return NAN, khat, ""
    if khat > TAIL_LIMIT:
        return NAN, khat, "not to be had from so many draws: it rests on the rarest of them"
    influence = 0.0 if evidence.influence is None else evidence.influence
    value = float(at_reference.mean()) - evidence.estimate.value
    return Estimate(value, float(math.hypot(chain_error(at_reference - influence), evidence.own_error))), khat, ""


def total_variation_bound(*divergences: Estimate) -> float:
    """The most that any probability may differ by under p and q, at 95 % confidence; 1 says nothing.

    It bounds differences of probabilities and of distribution functions, never those of means or sds.

    Args:
        divergences: KL(q || p) and KL(p || q) in nats, NaN where unknown; each alone bounds, and the smaller counts.

    Reference: Pinsker's sqrt(KL / 2), and sqrt(1 - exp(-KL)) after Bretagnolle & Huber (1979), Estimation des densites:
        risque minimax, as Canonne (2022), A short note on an inequality between KL and TV, has both.
    """
    limits = [max(d.value, 0.0) + Z * d.se for d in divergences if math.isfinite(d.value) and math.isfinite(d.se)]
    if not limits:
        return math.nan
    least = min(limits)
    return min(math.sqrt(least / 2.0), math.sqrt(-math.expm1(-least)))


def _decomposed(model: Model, side: _Side, elbo: Estimate) -> dict[str, float]:
    """Both decompositions of the ELBO; their second terms are had from draws, the first so that they add up to it."""
    try:
        seen = points(model, side.drawn, "plain", getattr(side.fit, "params", None))
    except (ValueError, TypeError):
        return {}
    energy = Estimate.of_mean(seen.log_density)
    found = {"energy": energy.value, "energy_se": energy.se, "entropy": elbo.value - energy.value}
    if not model.flat_priors and (isinstance(side.fit, Weighed) or elbo.value == -math.inf):
        likelihood = Estimate.of_mean(seen.log_likelihood)
        found |= {
            "expected_log_likelihood": likelihood.value,
            "kl_to_prior": likelihood.value - elbo.value,
            "kl_to_prior_se": float(math.hypot(likelihood.se, elbo.se)),
        }
    return found
