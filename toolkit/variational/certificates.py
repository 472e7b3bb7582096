"""How far a fit is from its family's best: an upper bound in nats, or an estimate where none can be afforded.

For fixed base draws that the fit has not seen, the ELBO on these draws is a function of the family's parameters, and

    E[ max over the family of ELBO on the draws  -  ELBO of the fit on the draws ]  >=  ELBO(best) - ELBO(fit),

since the best member is one of those over which the maximum is taken (Mak, Morton & Wood 1999, Monte Carlo bounding
techniques for determining solution quality in stochastic programs, section 2). The difference is paired: both ELBOs are
taken on the same draws. Several independent sets of draws give a mean, its standard error and an upper 95 % limit. The
maximum over a finite set of draws is too high by what the set can be fitted to; so the bound closes only as the sets
grow. The draws' own mean and covariance are matched to the normal's (`matched_draws`), which leaves less to be fitted
to, none at all where log p is quadratic. A climb that is cut short leaves an estimate, since what it could still have
gained is known from below only.

The maximum is found by a climb from the fit: the bound speaks of the optimum that this climb reaches, and is `LOCAL`.
Where the model declares a log-concave posterior and the family is closed under mixing of locations and factors, the
ELBO is concave in them (Challis & Barber 2013; Domke 2020, theorem 9), every optimum is the best one, and the bound is
`GLOBAL`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
from scipy import stats

from toolkit.estimate import Estimate
from toolkit.variational.density import LogDensity
from toolkit.variational.draws import Key, branch, matched_draws, mirrored_draws
from toolkit.variational.gaussians import Family, Quadratic
from toolkit.variational.solvers.fixed_draws import EVALUATIONS, Climbed, FixedDrawsELBO, Pair, Units, climb
from toolkit.variational.solvers.natural import Rule, Slope

SETS = 4
USABLE_LIMIT = 2.0
"""Nats of a limit above which a fit without proof is no longer usable: a convention.

Where the posterior is in the family so much room is a KL of 2 nats, from which on Pinsker's bound on probabilities says
nothing.
"""
_LEVEL = 0.95
_NEGATIVE = 1e-5  # the probability of an estimate so far below zero that it is none


class Scope(Enum):
    """What a certificate speaks of; the value is the word that the report prints."""

    GLOBAL = "global bound"
    LOCAL = "local bound"
    ESTIMATE = "estimate"


@dataclass(frozen=True)
class Certificate:
    """How much the family's best may lie above a fit.

    Attributes:
        gap: In nats, the mean over the sets of draws, with its standard error: what was found, and no limit. A bound
            counts for each set what the climb may have left, at least a hundredth of the tolerance, so that it is
            never 0.
        limit: The upper 95 % limit of the gap in nats, by Student's t: what to read and to report.
        scope: Whether it bounds the gap to the best of the family (`GLOBAL`), to the best that can be reached by
            climbing (`LOCAL`), or estimates the latter (`ESTIMATE`), which may also be too low.
        draws: In each set.
        sets: Independent sets of draws; 0 where no draws were needed, since the family's best is known in closed form.
    """

    gap: Estimate
    limit: float
    scope: Scope
    draws: int
    sets: int

    @property
    def words(self) -> str:
        """Such as `"local bound from 4 sets of 1,024 draws"`."""
        if not self.sets:
            return f"{self.scope.value}, in closed form"
        return f"{self.scope.value} from {self.sets} sets of {self.draws:,} draws"


@dataclass(frozen=True)
class Bounded:
    """A bound, and the climbs behind it.

    Attributes:
        certificate: None where the first climb gained so much that the others were not asked for.
        gains: What each climb gained, its residual included, in nats, (sets,).
        ends: Where they ended.
    """

    certificate: Certificate | None
    gains: np.ndarray
    ends: tuple[Climbed, ...]


def bound_gap(
    density: LogDensity,
    family: Family,
    x: np.ndarray,
    quadratic: Quadratic,
    *,
    key: Key,
    draws: int,
    residual: float,
    least_steps: int = 1,
    scope: Scope,
    sets: int = SETS,
    hopeless: float = math.inf,
    pairs: Sequence[Pair] = (),
    max_evaluations: int = EVALUATIONS,
    report: Callable[[int, float], None] | None = None,
) -> Bounded:
    """An upper bound on what the family's best gains over a member.

    Args:
        density: Log p(x, z).
        family: The family.
        x: The member's parameters, found without any of the draws that `key` gives.
        quadratic: Near log p under the member: its curvature says how much a climb has left to gain.
        key: Random key.
        draws: In each set, a power of two.
        residual: In nats: each climb goes on until no more than this is left to gain on its draws; it is added to the
            bound, or what is left where that is more.
        least_steps: Of each climb, see `climb`.
        scope: `GLOBAL` or `LOCAL`.
        sets: Independent sets of draws, at least two.
        hopeless: A gain in nats; if the first climb gains more, no bound is asked for.
        pairs: What earlier climbs of this family have learned of its curvature.
        max_evaluations: The most evaluations of a climb; what it seems to leave is added, and makes an estimate of the
            bound.
        report: Called at each evaluation with its number and the ELBO.
    """
    ends = list[Climbed]()
    gains = list[float]()
    units = Units(family, x, quadratic)
    units.learn(pairs)
    for number in range(sets):
        base = matched_draws(draws, family.base, key=branch(key, number))
        objective = FixedDrawsELBO(density, family, quadratic, base)
        end = climb(
            objective,
            x,
            residual=residual,
            least_steps=least_steps,
            units=units,
            max_evaluations=max_evaluations,
            report=report,
        )
        ends.append(end)
        units.learn(end.pairs)
        gains.append(end.elbo - end.begun + max(end.residual, residual))
        if gains[0] > hopeless:
            return Bounded(None, np.array(gains), tuple(ends))
    # What is known of how much a climb has left when it is cut short is known from below.
    reached = scope if all(end.arrived for end in ends) else Scope.ESTIMATE
    return Bounded(certificate_of(np.array(gains), reached, draws), np.array(gains), tuple(ends))


def estimate_gap[At, S: Slope](rule: Rule[At, S], at: At, *, key: Key, draws: int, sets: int = SETS) -> Certificate:
    """Newton's decrement of a Gaussian: an estimate of its gap, for dimensions in which no bound closes.

    The square of a noisy gradient is too large; so each estimate is a product of two, over two sets of draws.

    Args:
        rule: How natural-gradient steps are taken in its family.
        at: The Gaussian, found without any of the draws that `key` gives.
        key: Random key.
        draws: In each set, a power of two.
        sets: Pairs of sets; each pair gives one estimate.

    Returns:
        An estimate; infinite where a draw has no finite density, or the curvature at hand is no maximum's.
    """
    gaps = []
    for number in range(sets):
        first, second = (
            rule.look(at, mirrored_draws(draws, rule.base, key=branch(key, 2 * number + half))) for half in (0, 1)
        )
        finite = math.isfinite(first.elbo) and math.isfinite(second.elbo)
        gaps.append(rule.decrement(at, first, second) if finite else math.inf)
    certificate = certificate_of(np.array(gaps), Scope.ESTIMATE, draws)
    # Noise makes an estimate negative, but so far below zero only once in 100,000.
    if certificate.gap.value < -stats.t.ppf(1 - _NEGATIVE, sets - 1) * certificate.gap.se:
        return replace(certificate, gap=Estimate(math.inf, math.nan), limit=math.inf)
    return certificate


def certificate_of(gains: np.ndarray, scope: Scope, draws: int) -> Certificate:
    """The certificate from what climbs gained, in nats, (sets,), each on a set of so many draws."""
    gap = Estimate.of_mean(gains) if np.isfinite(gains).all() else Estimate(math.inf, math.nan)
    reach = stats.t.ppf(_LEVEL, len(gains) - 1) * gap.se
    limit = gap.value + reach if math.isfinite(gap.value) else math.inf
    return Certificate(gap, float(limit), scope, draws, len(gains))
