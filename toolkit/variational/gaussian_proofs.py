"""A Gaussian fit's certificate, and the fit improved until that is below the tolerance or something runs out.

The certificate's own climbs are solutions on draws that the fit has not seen. Where it is not below the tolerance their
mean becomes the next fit, which has in effect been fitted to all of these draws, and the next certificate takes more.
Where the first climb alone gains more than the tolerance, the others are spared, and its end becomes the next fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from toolkit.estimate import Estimate
from toolkit.status import Status
from toolkit.variational.autoguides import GaussianForm
from toolkit.variational.certificates import SETS, USABLE_LIMIT, Bounded, Certificate, Scope, bound_gap, estimate_gap
from toolkit.variational.density import LogDensity
from toolkit.variational.draws import Key, branch, power_of_two
from toolkit.variational.gaussian_optima import (
    COMPARED_DRAWS,
    LEAST_DRAWS,
    MOST_DRAWS,
    RESIDUAL,
    Optimum,
    Report,
    at_rest,
    first_draws,
    gain_of,
    kept_back,
    look_at,
    step_draws,
    take_steps,
    trace_of,
)
from toolkit.variational.solvers.fixed_draws import EVALUATIONS
from toolkit.variational.solvers.natural import (
    FullRank,
    Gaussian,
)
from toolkit.variational.solvers.projected import Projected

_DECREMENT_DRAWS = 4_096
_ROUNDS = 8
_OPTIMISM = 0.4  # of the tolerance, that a certificate may be too high by: what draws are enough for
_LEARNED = 60  # pairs of steps that a certificate's climbs are told of
_EVALUATIONS_EXPECTED = 6  # of a certificate's climb
_GROWN = 2  # times the limit before: such a limit from the most draws says that they do not pin the family
_MOST_TIMES = 16  # as many draws in a round as in the one before
_TIGHT = 3  # times the draws must be affordable, or the round is taken to be the last


@dataclass(frozen=True)
class Proof:
    """A certificate, and why it is not below the tolerance if it is not.

    Attributes:
        certificate: None where no limit was found.
        ended: `ARRIVED` below the tolerance; else what ran out, `BUDGET` or `TOO_FEW_DRAWS`.
        why: What ran out, in words.
    """

    certificate: Certificate | None
    ended: Status = Status.ARRIVED
    why: str = ""

    @property
    def status(self) -> Status:
        """How the fit ended: a limit above the tolerance still leaves it usable, but not one that says nothing."""
        usable = self.certificate and self.certificate.limit <= USABLE_LIMIT
        return Status.UNPROVEN if usable and self.ended is not Status.ARRIVED else self.ended

    @property
    def message(self) -> str:
        """Such as `"up to 0.3 nats: of the budget 900 gradients are left, which do not suffice"`; else empty."""
        if self.ended is Status.ARRIVED:
            return ""
        if self.certificate is None:
            return f"no bound: {self.why}"
        estimate = ", an estimate" if self.certificate.scope is Scope.ESTIMATE else ""
        return f"up to {self.certificate.limit:.2g} nats{estimate}: {self.why}"


def proved(
    density: LogDensity,
    best: Optimum,
    scope: Scope,
    least_steps: int,
    *,
    key: Key,
    tolerance: float,
    left: Callable[[], int],
    report: Report,
) -> tuple[Optimum, Proof]:
    """The optimum, improved until its certificate is below the tolerance, or draws, rounds or the budget run out.

    The first limit that is low enough ends the work, and to stop at what pleases makes a limit hold less often than the
    95 % of a single one. What a maximum over few draws is too high by works the other way. How often limits hold all
    in all is measured (`benchmarks/certificates.py`).
    """
    certificate: Certificate | None = None
    draws, pairs = first_draws(best.family), best.pairs
    ended, why, insists = Status.BUDGET, f"more than {_ROUNDS} rounds of it", False
    too_few = f"draws are too few for {best.family.parameters:,} parameters"
    for number in range(_ROUNDS):
        own = branch(key, number)
        affordable = left() // (SETS * _EVALUATIONS_EXPECTED)
        if draws > affordable:
            why = f"of the budget {left():,} gradients are left, which do not suffice"
            if certificate or affordable < first_draws(best.family):
                break
            draws = power_of_two(affordable // 2 + 1)  # a limit above the tolerance is better than none
        insists = insists or number == _ROUNDS - 1 or _TIGHT * draws > affordable
        bounded = bound_gap(
            density,
            best.family,
            best.x,
            best.quadratic,
            key=branch(own, 0),
            draws=draws,
            residual=RESIDUAL * tolerance,
            least_steps=least_steps,
            scope=scope,
            hopeless=math.inf if insists else tolerance,
            pairs=pairs,
            max_evaluations=min(EVALUATIONS, _EVALUATIONS_EXPECTED * affordable // draws),
            report=lambda steps, elbo: report("certificate", steps, steps + 1, elbo),
        )
        found, before = bounded.certificate, certificate
        # The last one stands, not the lowest: to choose among limits would make each less than a 95 % limit.
        certificate = found or before
        if found and found.limit <= tolerance:  # an estimate where climbs were cut short, and labelled so
            return best, Proof(found)
        if found and before and draws == MOST_DRAWS and not found.limit < _GROWN * before.limit:
            ended, why = Status.TOO_FEW_DRAWS, f"{draws:,} {too_few}"
            break
        moved, gain = _moved(density, best, bounded, draws, key=branch(own, 1))
        # A climb gains what the fit lacks and what its draws can be fitted to; its end lacks the latter elsewhere, a
        # mean of ends one share of it. Only the latter shrinks as draws grow.
        optimism = ((found.limit if found else bounded.gains[0]) - gain.value) / (1 + 1 / len(bounded.ends))
        wanted = draws * max(optimism, 0.0) / (_OPTIMISM * tolerance) if math.isfinite(optimism) else 4 * draws
        # One that is better for certain; the limit of the one before holds for it as well.
        least = draws
        pairs = (*pairs, *(pair for end in bounded.ends for pair in end.pairs))[-_LEARNED:]
        if gain.value > 2 * gain.se:
            best = moved
        elif draws == MOST_DRAWS and insists:
            ended, why = Status.TOO_FEW_DRAWS, f"{draws:,} {too_few}"
            break
        elif draws == MOST_DRAWS:
            insists = True
        else:
            least = 2 * draws  # to ask again and again until one answer pleases would prove nothing
        draws = int(np.clip(power_of_two(wanted), least, min(_MOST_TIMES * draws, MOST_DRAWS)))
    if certificate and math.isfinite(certificate.limit):
        return best, Proof(certificate, ended, why)
    return best, Proof(None, ended, why)


def _moved(density: LogDensity, best: Optimum, bounded: Bounded, draws: int, *, key: Key) -> tuple[Optimum, Estimate]:
    """The mean of what the certificate's sets of draws were fitted by, and its gain on draws of their own, in nats."""
    # Nearly as good as a member fitted to all sets of draws at once.
    x = best.family.mean([end.x for end in bounded.ends])
    gain = gain_of(density, best, x, draws, key=branch(key, 0))
    if not math.isfinite(gain.value):
        return best, gain
    return look_at(density, best.family, x, best.quadratic, best.trace, key=branch(key, 1)), gain


def estimated(
    density: LogDensity,
    form: GaussianForm,
    best: Optimum,
    *,
    key: Key,
    tolerance: float,
    left: Callable[[], int],
    report: Report,
) -> tuple[Optimum, Proof]:
    """The optimum with Newton's decrement, its steps gone on with until that is below the tolerance."""
    certificate: Certificate | None = None
    goal, taken = tolerance, len(best.trace.steps)
    for number in range(_ROUNDS):
        own = branch(key, number)
        steps = f"{taken:,} natural-gradient {'step was' if taken == 1 else 'steps were'} taken"
        draws = min(_DECREMENT_DRAWS, power_of_two(left() // (2 * SETS) // 2 + 1))
        if draws < LEAST_DRAWS:
            why = f"{steps}, and of the budget {left():,} gradients are left, which do not suffice for an estimate"
            return best, Proof(certificate, Status.BUDGET, why)
        at = best.steps.at if best.steps else at_rest(form, best.member, best.quadratic)
        if isinstance(at, Gaussian):
            found = estimate_gap(FullRank(density), at, key=branch(own, 0), draws=draws)
        else:
            rule = Projected(density, form.family, at.family.base)
            found = estimate_gap(rule, at, key=branch(own, 0), draws=draws)
        certificate = found if math.isfinite(found.limit) else None
        is_low = certificate is not None and certificate.limit <= tolerance
        if best.arrived and is_low:
            return best, Proof(certificate)
        if left() < kept_back(density.size) + 2 * step_draws(density.size):
            return best, Proof(certificate, Status.BUDGET, f"{steps}, for which the budget was used up")
        if number == _ROUNDS - 1:
            break
        if best.arrived:  # the steps' own estimate is a mean over the last few of them, on fewer draws
            goal /= 2
        more = take_steps(
            density,
            form,
            at,
            key=branch(own, 1),
            tolerance=goal,
            budget=left(),
            near=best.steps.near if best.steps else 0,
            report=report,
        )
        taken += len(more.trace.steps)
        gain = gain_of(density, best, best.family.near(more.member), COMPARED_DRAWS, key=branch(own, 2))
        if not gain.value > -3 * gain.se:  # a lower end, or one without a finite density
            if is_low:
                return best, Proof(certificate)
            return best, Proof(certificate, Status.BUDGET, f"{steps}, and more of them did not raise the ELBO")
        best = replace(more, trace=trace_of(np.concatenate([best.trace.elbo, more.trace.elbo])))
    return best, Proof(certificate, Status.BUDGET, f"{steps}, more than {_ROUNDS} rounds of them")
