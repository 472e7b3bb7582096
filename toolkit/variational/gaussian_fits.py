"""Fits of Gaussian guides: climbed from every start, the best one proved, all outside of compiled programs.

    start -> a climb on fixed draws, or averaged natural-gradient steps -> the best of the starts -> its certificate

The certificate's own climbs are solutions on draws that the fit has not seen. Where it is not below the tolerance their
mean becomes the next fit, which has in effect been fitted to all of these draws, and the next certificate takes more.
Where the first climb alone gains more than the tolerance, the others are spared, and its end becomes the next fit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from toolkit.estimate import Estimate
from toolkit.status import Status
from toolkit.variational.autoguides import GaussianForm
from toolkit.variational.certificates import SETS, Bounded, Certificate, Scope, bound_gap, estimate_gap
from toolkit.variational.density import LogDensity
from toolkit.variational.draws import Key, branch, generator, matched_draws, power_of_two
from toolkit.variational.failures import Failure, find_failure, find_ridge, is_sound
from toolkit.variational.gaussians import Family, Frame, Member, Quadratic, Triangular
from toolkit.variational.projection import project
from toolkit.variational.solvers.fixed_draws import EVALUATIONS, MOST_PARAMETERS, FixedDrawsELBO, Pair, climb
from toolkit.variational.solvers.natural import (
    STEPS,
    Averaged,
    FullRank,
    Gaussian,
    Rule,
    Slope,
    averaged_steps,
    is_safely_positive,
)
from toolkit.variational.solvers.projected import Fitted, Projected, as_matrix
from toolkit.variational.solvers.svi import Trace
from toolkit.variational.starts import HOPELESS, Start, positive_definite
from toolkit.variational.tails import FlatCoordinate, find_heavy_tail

Report = Callable[[str, int, int, float], None]

FIXED_DRAWS, NATURAL_GRADIENT = "fixed_draws", "natural_gradient"
FIXED_LIMIT = 300  # dimensions up to which fixed draws pin any Gaussian family
_PINNED = 45_000  # parameters that they pin beyond, as many as a full-rank Gaussian has there

_LEAST_DRAWS, _FIRST_DRAWS, _MOST_DRAWS = 128, 1_024, 16_384
_PROJECTION_DRAWS, _PROJECTED = 256, 16  # at least, and for each dimension up to the many that a matrix asks for
_COMPARED_DRAWS = 1_024  # where the ELBOs of two optima are compared
_CHOSEN_DRAWS = 256  # where a control variate is
_ELBO_DRAWS, _ELBO_PIECE = (1_024, 4_096), 128  # at least and at most, and what they are a multiple of
_SMALL = 0.1  # of the tolerance: the ELBO's standard error for which no more draws are asked
_NATURAL_DRAWS = 1_024
_SCREENED = 80  # evaluations from each start; the proof goes on from the best one
_DECREMENT_DRAWS = 4_096
_ROUNDS = 8
_RECENTRINGS = 4  # of a family that depends on its frame
_RESIDUAL = 0.01  # of the tolerance, that a climb may leave as far as is known; five times as much held less often
_OPTIMISM = 0.4  # of the tolerance, that a certificate may be too high by: what draws are enough for
_LEARNED = 60  # pairs of steps that a certificate's climbs are told of
_EVALUATIONS_EXPECTED = 6  # of a certificate's climb
_UNKNOWN_SCALE = 0.1  # of a posterior of which no curvature is known, in unconstrained units
# Nats of a certificate's limit above which a fit without proof is no longer usable: a convention. Where the posterior
# is in the family so much room is a KL of 2 nats, from which on Pinsker's bound on probabilities says nothing.
_USABLE_LIMIT = 2.0
_SAME_OPTIMUM = 0.5  # sds of either Gaussian between the locations of one optimum
_SAME_HEIGHT = 0.5  # nats between the ELBOs of one optimum, beyond their errors
_GROWN = 2  # times the limit before: such a limit from the most draws says that they do not pin the family
_MOST_TIMES = 16  # as many draws in a round as in the one before
_TIGHT = 3  # times the draws must be affordable, or the round is taken to be the last


def can_be_pinned(form: GaussianForm, size: int) -> bool:
    """Whether an affordable set of fixed draws pins a family in so many dimensions, in climbs of affordable length."""
    return size <= FIXED_LIMIT or parameters(form, size) <= (_PINNED if form.concave else MOST_PARAMETERS)


def parameters(form: GaussianForm, size: int) -> int:
    """How many parameters a family has in so many dimensions."""
    return form.family(Frame(np.zeros(size), np.ones(size), np.ones(size))).parameters


@dataclass(frozen=True)
class Optimum:
    """Where one start's climb ended.

    Attributes:
        family: The family, in a frame near it.
        x: The parameters.
        quadratic: The control variate found there.
        elbo: On draws that no climb has seen, in nats.
        spread: The sd in nats of what one such draw says of it.
        trace: The course.
        arrived: Whether its solver came to its end.
        left: What it could still gain, in nats, as far as that is known.
        pairs: What the climb has learned of the curvature.
        steps: The averaged natural-gradient steps that led there, from which more could go on; None for a climb.
    """

    family: Family
    x: np.ndarray
    quadratic: Quadratic
    elbo: Estimate
    spread: float
    trace: Trace
    arrived: bool = True
    left: float = 0.0
    pairs: tuple[Pair, ...] = ()
    steps: Averaged[Gaussian] | Averaged[Fitted] | None = None

    @property
    def member(self) -> Member:
        """The Gaussian."""
        return self.family.member(self.x)


@dataclass(frozen=True)
class GaussianFit:
    """How the fit of a Gaussian guide ended.

    Attributes:
        status: How it ended.
        message: A detail on the status.
        member: The Gaussian.
        elbo: On fresh draws, in nats.
        log_weights: Log p(x, z) - log q(z) at fresh draws, (draws,), in nats.
        certificate: How far the best of the family may lie above; None where no draws pin it.
        optima: The distinct optima that starts led to, the best first. A climb that was stopped is one of them only if
            what it had left to gain would not lead to the best.
        seconds: Wall-clock, compilation not counted.
    """

    status: Status
    message: str
    member: Member
    elbo: Estimate
    log_weights: np.ndarray
    certificate: Certificate | None
    optima: tuple[Optimum, ...]
    seconds: float


def fit_gaussian(
    density: LogDensity,
    form: GaussianForm,
    starts: Sequence[Start],
    smaller: Sequence[Member],
    *,
    key: Key,
    solver: str,
    log_concave: bool,
    tolerance: float,
    max_gradients: int,
    elbo_draws: int | None,
    report: Report,
    flat: Sequence[FlatCoordinate] = (),
) -> GaussianFit:
    """The best member of a Gaussian family, with its certificate.

    Args:
        density: Log p(x, z).
        form: The family.
        starts: Where to begin, at least one.
        smaller: The best members of families that this one contains: none of them may end above.
        key: Random key.
        solver: `"fixed_draws"` or `"natural_gradient"`.
        log_concave: Whether the posterior is log-concave.
        tolerance: Of the certificate's upper limit, in nats.
        max_gradients: The budget.
        elbo_draws: Fresh ones behind the ELBO; if None, as many as make its error small.
        report: Called with what is done, of how many evaluations, and the ELBO.
        flat: Coordinates whose own prior is improper; their tails are followed.
    """
    begun, spent_before = time.perf_counter(), density.evaluations

    def left() -> int:
        return max(max_gradients - (density.evaluations - spent_before), 0)

    with np.errstate(over="ignore", invalid="ignore"):  # a run-off ends where floating-point numbers do
        followed = _followed(form, starts, solver)
        climbed = [
            _solved(
                density,
                form,
                start,
                solver,
                key=branch(key, i),
                tolerance=tolerance,
                budget=left() // (len(followed) - i),
                compared=_COMPARED_DRAWS if len(followed) > 1 else _CHOSEN_DRAWS,
                report=report,
            )
            for i, start in enumerate(followed)
        ]
    optima = _distinct([optimum for optimum in climbed if math.isfinite(optimum.elbo.value)])
    if solver == FIXED_DRAWS and len(optima) > 1 and density.size <= FIXED_LIMIT:  # beyond, a climb takes minutes
        optima = _finished(density, form, optima, key=branch(key, 1_006), tolerance=tolerance, left=left, report=report)
    if not optima:
        first = climbed[0]
        own = branch(key, 1_003)
        failure = find_failure(density, form, first.member, first.quadratic, key=own, suspected=True)
        return _failed(climbed, failure or find_heavy_tail(density, flat, first.member), begun)
    best = _not_below(
        density, form, optima[0], smaller, solver, key=branch(key, 1_000), tolerance=tolerance, left=left, report=report
    )
    if form.around is not None:
        best = _recentred(density, form, best, key=branch(key, 1_007), tolerance=tolerance, left=left, report=report)
    others = [one for one in optima if one is not best and _stays_lower(one, best)]
    optima = (best, *(one for one in others if not _is_same(one, best)))
    before = density.evaluations
    failure = find_failure(density, form, best.member, best.quadratic, key=branch(key, 1_003))
    if failure is None and not any(start.is_mode for start in starts):
        failure = find_ridge(density, best.member, key=branch(key, 1_005))
    if failure is None:
        failure = find_heavy_tail(density, flat, best.member)
        if failure:  # a tail of one coordinate may be part of a whole line along which nothing changes
            closely = branch(key, 1_004)
            line = find_failure(density, form, best.member, best.quadratic, key=closely, suspected=True)
            failure = line if line and line.status is Status.FLAT else failure
    spent_before += density.evaluations - before  # a diagnosis leaves the budget as it was
    own = branch(key, 1_002)
    if failure:
        return _without_optimum(density, best, optima, failure, elbo_draws or _ELBO_DRAWS[0], begun, key=own)
    scope = Scope.GLOBAL if log_concave and form.concave else Scope.LOCAL
    if solver == NATURAL_GRADIENT and not can_be_pinned(form, density.size):
        best, proof = _estimated(
            density, form, best, key=branch(key, 1_001), tolerance=tolerance, left=left, report=report
        )
    else:
        best, proof = _proved(
            density,
            best,
            scope,
            _least_steps(form),
            key=branch(key, 1_001),
            tolerance=tolerance,
            left=left,
            report=report,
        )
    status, message, certificate = proof.status, proof.message, proof.certificate
    if status not in (Status.ARRIVED, Status.UNPROVEN):
        closely = branch(key, 1_004)
        failure = find_failure(density, form, best.member, best.quadratic, key=closely, suspected=True)
    if failure:
        return _without_optimum(density, best, optima, failure, elbo_draws or _ELBO_DRAWS[0], begun, key=own)
    elbo, weights = _measured(density, best, key=own, draws=elbo_draws or _draws_for(best, _SMALL * tolerance))
    if not math.isfinite(elbo.value):
        status, message = Status.DIVERGED, "draws of the Gaussian have no finite density"
    optima = (replace(best, elbo=elbo), *(one for one in optima[1:] if not _is_same(one, best)))
    seconds = time.perf_counter() - begun
    return GaussianFit(status, message, best.member, elbo, weights, certificate, optima, seconds)


def _followed(form: GaussianForm, starts: Sequence[Start], solver: str) -> list[Start]:
    """The starts that are not far below the best for this family, the best first, then those of unknown height.

    Where the best is no mode its height may still rise by much, and all are followed, unless that is too dear.
    """
    promises = np.array([_promise(form, start) for start in starts])
    order = np.argsort(-promises, kind="stable")
    everyone = not starts[order[0]].is_mode and solver != NATURAL_GRADIENT
    return [starts[i] for i in order if everyone or not promises[i] < promises[order[0]] - HOPELESS]


def _promise(form: GaussianForm, start: Start) -> float:
    """The family's ELBO in nats at a start, were the density the Gaussian that has grown there; NaN without one."""
    if start.precision is None:
        return math.nan
    if form.full:
        return start.elbo
    frame = Frame.of(start.loc, start.precision)
    quadratic = Quadratic(start.loc, np.zeros(len(start.loc)), frame.precision)

    def height(family: Family) -> float:
        x = np.zeros(family.parameters)
        return family.exact(x, family.member(x), quadratic)[0]

    return start.elbo + height(form.family(frame)) - height(Triangular(frame))


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
        usable = self.certificate and self.certificate.limit <= _USABLE_LIMIT
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


def _solved(
    density: LogDensity,
    form: GaussianForm,
    start: Start,
    solver: str,
    *,
    key: Key,
    tolerance: float,
    budget: int,
    compared: int,
    report: Report,
) -> Optimum:
    """Where a start leads, by the solver asked for, its ELBO on so many draws."""
    known = start.precision
    frame = Frame.of(start.loc, np.full(density.size, _UNKNOWN_SCALE**-2) if known is None else known)
    family = form.family(frame)
    x = np.zeros(family.parameters)
    if solver == NATURAL_GRADIENT:
        quadratic = Quadratic(frame.loc, np.zeros(density.size), as_matrix(frame.precision))
        return _stepped(
            density,
            form,
            Gaussian(frame.loc, as_matrix(frame.factor)) if form.full else Fitted(frame, family, x, quadratic),
            key=key,
            tolerance=tolerance,
            budget=budget,
            compared=compared,
            report=report,
        )
    precision = np.zeros(density.size) if known is None else frame.precision
    return _climbed(
        density,
        form,
        family,
        x,
        Quadratic(frame.loc, np.zeros(density.size), precision),
        key=key,
        tolerance=tolerance,
        budget=budget,
        most=_SCREENED,
        compared=compared,
        report=report,
    )


def _stepped(
    density: LogDensity,
    form: GaussianForm,
    begin: Gaussian | Fitted,
    *,
    key: Key,
    tolerance: float,
    budget: int,
    near: int = 0,
    compared: int = _COMPARED_DRAWS,
    report: Report,
) -> Optimum:
    """Where averaged natural-gradient steps lead, the ELBO there on so many draws."""
    draws = _step_draws(density.size)
    most = int(np.clip((budget - _kept_back(density.size, compared)) // draws, 1, STEPS))

    def averaged[At, S: Slope](rule: Rule[At, S], at: At) -> Averaged[At]:
        return averaged_steps(
            rule,
            at,
            key=branch(key, 0),
            draws=draws,
            tolerance=tolerance,
            near=near,
            most=most,
            report=lambda steps, elbo: report("natural-gradient steps", steps, STEPS, elbo),
        )

    ended: Averaged[Gaussian] | Averaged[Fitted]
    if isinstance(begin, Gaussian):
        ended = full = averaged(FullRank(density), begin)
        frame = Frame.of(full.at.loc, full.at.precision)
        family, quadratic = form.family(frame), Quadratic(frame.loc, np.zeros(density.size), frame.precision)
        x = np.zeros(family.parameters)
    else:
        ended = other = averaged(Projected(density, form.family, begin.family.base), begin)
        family, x, quadratic = other.at.family, other.at.x, other.at.quadratic
    looked = _looked_at(density, family, x, quadratic, _trace(ended.course), key=branch(key, 1), draws=compared)
    return replace(looked, arrived=ended.arrived, left=max(ended.gap, 0.0), steps=ended)


def _step_draws(size: int) -> int:
    """Draws of a natural-gradient step in so many dimensions."""
    return max(_NATURAL_DRAWS, power_of_two(2 * size))


def _kept_back(size: int, compared: int = _COMPARED_DRAWS) -> int:
    """Gradients that steps leave of the budget: for a look at their end, and for an estimate of what is left."""
    return _projection_draws(size) + max(compared, power_of_two(4 * size)) + 2 * SETS * _LEAST_DRAWS


def _trace(course: np.ndarray) -> Trace:
    """An ELBO for each step, as a course."""
    return Trace(np.arange(1.0, len(course) + 1), course, np.full(len(course), math.nan))


def _finished(
    density: LogDensity,
    form: GaussianForm,
    optima: Sequence[Optimum],
    *,
    key: Key,
    tolerance: float,
    left: Callable[[], int],
    report: Report,
) -> tuple[Optimum, ...]:
    """The optima, where climbs that had been stopped and may yet become the best have gone on."""
    finished = list[Optimum]()
    for number, found in enumerate(optima):
        optimum = found
        if not _stays_lower(optimum, optima[0]):
            own = branch(key, number)
            optimum = _climbed(
                density,
                form,
                optimum.family,
                optimum.x,
                optimum.quadratic,
                key=own,
                tolerance=tolerance,
                budget=left(),
                most=EVALUATIONS,
                report=report,
            )
            whole = np.concatenate([found.trace.elbo, optimum.trace.elbo])
            optimum = replace(optimum, trace=_trace(whole))
        finished.append(optimum)
    return _distinct(finished)


def _stays_lower(optimum: Optimum, best: Optimum) -> bool:
    """Whether a climb came to its end, or stopped where what it seemed to have left would not lead to the best."""
    return optimum.arrived or optimum.elbo.value + optimum.left < best.elbo.value


def _climbed(
    density: LogDensity,
    form: GaussianForm,
    family: Family,
    x: np.ndarray,
    quadratic: Quadratic,
    *,
    key: Key,
    tolerance: float,
    budget: int,
    most: int,
    compared: int = _COMPARED_DRAWS,
    report: Report,
) -> Optimum:
    """Where a climb on fixed draws leads from a member, in at most so many evaluations, the ELBO on so many draws."""
    base = matched_draws(_first_draws(family), family.base, key=branch(key, 0))
    climbed = climb(
        FixedDrawsELBO(density, family, quadratic, base),
        x,
        residual=_RESIDUAL * tolerance,
        least_steps=_least_steps(form),
        max_evaluations=int(np.clip(budget // len(base), 1, most)),
        report=lambda steps, elbo: report("climbing", steps, steps + 1, elbo),
    )
    course = np.maximum.accumulate(climbed.course)  # the last point tried need not be the best
    looked = _looked_at(density, family, climbed.x, quadratic, _trace(course), key=branch(key, 1), draws=compared)
    return replace(looked, arrived=climbed.arrived, left=max(climbed.residual, 0.0), pairs=climbed.pairs)


def _least_steps(form: GaussianForm) -> int:
    """Of a climb before its end is believed: where the ELBO has saddles, little seems to be left near them."""
    return 1 if form.concave else 2


def _looked_at(
    density: LogDensity,
    family: Family,
    x: np.ndarray,
    quadratic: Quadratic,
    trace: Trace,
    *,
    key: Key,
    draws: int = _CHOSEN_DRAWS,
) -> Optimum:
    """A member with the control variate that suits it, and its ELBO on draws of their own."""
    member = family.member(x)
    near = project(density, family, member, quadratic, key=branch(key, 0), draws=_projection_draws(density.size))
    base = matched_draws(max(draws, power_of_two(2 * family.base)), family.base, key=branch(key, 1))
    points = family.points(member, base)
    values, _ = density.over(points)
    # Where gradients have heavy tails, what was fitted to few of them may be far from log p: then log q is nearer.
    chosen, least, elbo = near, math.inf, Estimate(-math.inf, math.nan)
    for tried in (near, quadratic, *_own_quadratic(member)):
        with np.errstate(over="ignore", invalid="ignore"):  # a run-off's terms are not finite
            terms = values - tried.at(points)[0] + family.exact(x, member, tried)[0]
            spread = float(terms.std())
        if is_sound(terms) and spread < least:
            chosen, least, elbo = tried, spread, Estimate.of_mean(terms)
    return Optimum(family, x, chosen, elbo, least, trace)


def _projection_draws(size: int) -> int:
    """Draws that a projection takes in so many dimensions."""
    wanted = min(_PROJECTED * size, max(4 * _PROJECTION_DRAWS, 4 * size))
    return max(_PROJECTION_DRAWS, power_of_two(wanted))


def _own_quadratic(member: Member) -> tuple[Quadratic, ...]:
    """A Gaussian's own log density but for a constant; none where its covariance can no longer be inverted.

    In dimensions beyond what dense matrices are for, only that of its margins.
    """
    nothing = np.zeros(len(member.loc))
    if member.factor is None:
        return (Quadratic(member.loc, nothing, 1 / member.variances),)
    try:
        inverse = np.linalg.inv(member.covariance())
    except np.linalg.LinAlgError:
        return ()
    return (Quadratic(member.loc, nothing, (inverse + inverse.T) / 2),)


def _distinct(optima: Sequence[Optimum]) -> tuple[Optimum, ...]:
    """The optima, the best first, each one once."""
    kept: list[Optimum] = []
    for optimum in sorted(optima, key=lambda optimum: -optimum.elbo.value):
        if not any(_is_same(optimum, other) for other in kept):
            kept.append(optimum)
    return tuple(kept)


def _is_same(first: Optimum, second: Optimum) -> bool:
    """Whether two climbs ended at one optimum: as high within their errors, and in one place as either measures it."""
    high = abs(first.elbo.value - second.elbo.value)
    if not high < _SAME_HEIGHT + 3 * math.hypot(first.elbo.se, second.elbo.se):
        return False
    apart = first.member.loc - second.member.loc
    measures = (*_own_quadratic(first.member), *_own_quadratic(second.member))
    return all(apart @ measure.times(apart[None])[0] < _SAME_OPTIMUM**2 for measure in measures)


def _not_below(
    density: LogDensity,
    form: GaussianForm,
    best: Optimum,
    smaller: Sequence[Member],
    solver: str,
    *,
    key: Key,
    tolerance: float,
    left: Callable[[], int],
    report: Report,
) -> Optimum:
    """The optimum, or one found from the best of a smaller family where that lies above it on common draws.

    From that best itself no gradient may lead on: a low-rank Gaussian without columns is a saddle. So the search begins
    at the family's best for the curvature there, where that is higher still.
    """
    for number, member in enumerate(smaller):
        own = branch(key, number)
        x, family = best.family.near(member), best.family
        gain = _gain(density, best, x, _COMPARED_DRAWS, key=branch(own, 0))
        if gain.value <= 0:
            continue
        around = project(
            density, family, family.member(x), best.quadratic, key=branch(own, 1), draws=_projection_draws(density.size)
        )
        fitting = _best_for(form, around)
        if fitting is not None:
            bent = family.near(fitting)
            x = bent if _gain(density, best, bent, _COMPARED_DRAWS, key=branch(own, 0)).value > gain.value else x
        found: Optimum | None = None
        if solver == NATURAL_GRADIENT and left() > _kept_back(density.size) + 2 * _step_draws(density.size):
            begin = _at_rest(form, family.member(x), around)
            found = _stepped(
                density, form, begin, key=branch(own, 2), tolerance=tolerance, budget=left(), report=report
            )
        elif solver == FIXED_DRAWS:
            found = _climbed(
                density,
                form,
                family,
                x,
                around,
                key=branch(own, 2),
                tolerance=tolerance,
                budget=left(),
                most=EVALUATIONS,
                report=report,
            )
        there = family.near(found.member) if found else x
        # What was found on its own draws need not lie above where it set out.
        gains = [_gain(density, best, at, _COMPARED_DRAWS, key=branch(own, 3)).value for at in (there, x)]
        if found and max(gains) > 0 and gains[0] >= gains[1]:
            best = found
        elif max(gains) > 0:
            looked = _looked_at(density, family, x, around, best.trace, key=branch(own, 4), draws=_COMPARED_DRAWS)
            best = replace(looked, arrived=False, left=math.inf, steps=None)
    return best


def _recentred(
    density: LogDensity,
    form: GaussianForm,
    best: Optimum,
    *,
    key: Key,
    tolerance: float,
    left: Callable[[], int],
    report: Report,
) -> Optimum:
    """The optimum of a family that depends on its frame, climbed anew with the frame at what was found before.

    Until that gains no more; what was found stays where the last one is no better.
    """
    for number in range(_RECENTRINGS):
        own = branch(key, number)
        known = next(iter(_own_quadratic(best.member)), None)
        if known is None or known.precision.ndim == 1 or left() < _first_draws(best.family):
            break
        frame = Frame.of(best.member.loc, known.precision)
        family = form.family(frame)
        found = _climbed(
            density,
            form,
            family,
            np.zeros(family.parameters),
            known,
            key=branch(own, 0),
            tolerance=tolerance,
            budget=left(),
            most=EVALUATIONS,
            report=report,
        )
        gain = _lead(density, found, best, key=branch(own, 1))
        if gain.value > 0:
            best = replace(found, trace=_trace(np.concatenate([best.trace.elbo, found.trace.elbo])))
        if not gain.value > _SMALL * tolerance + 2 * gain.se:
            break
    return best


def _lead(density: LogDensity, one: Optimum, other: Optimum, *, key: Key) -> Estimate:
    """How far one optimum lies above another, which may be of a family of another frame, on common base draws."""
    base = matched_draws(_COMPARED_DRAWS, one.family.base, key=key)
    first, second = (FixedDrawsELBO(density, at.family, at.quadratic, base).each(at.x) for at in (one, other))
    with np.errstate(invalid="ignore"):
        gain = first - second
    return Estimate.of_mean(gain) if is_sound(gain) else Estimate(-math.inf, math.nan)


def _at_rest(form: GaussianForm, member: Member, around: Quadratic) -> Gaussian | Fitted:
    """A member as natural-gradient steps begin with it: with the quadratic around it, or its own if that has no top."""
    _, slope = around.at_one(member.loc)
    quadratic = Quadratic(member.loc, slope, as_matrix(around.precision))
    if form.full or not is_safely_positive(quadratic.precision):
        margins = Quadratic(member.loc, np.zeros(len(slope)), np.diag(1 / member.variances))
        quadratic = next(iter(_own_quadratic(member)), margins)
    frame = Frame.of(member.loc, as_matrix(quadratic.precision))
    if form.full:
        return Gaussian(frame.loc, frame.factor)
    family = form.family(frame)
    return Fitted(frame, family, family.near(member), replace(quadratic, precision=frame.precision))


def _best_for(form: GaussianForm, quadratic: Quadratic) -> Member | None:
    """The family's best around a quadratic's centre, were that the density; None where a coordinate is bent upwards."""
    if not (np.isfinite(quadratic.precision).all() and (quadratic.diagonal > 0).all()):
        return None
    precision: np.ndarray | None = quadratic.precision
    if quadratic.precision.ndim == 2:
        precision, _ = positive_definite(quadratic.precision)
    if precision is None:
        return None
    family = form.family(Frame.of(quadratic.centre, precision))
    return family.member(np.zeros(family.parameters))


def _gain(density: LogDensity, best: Optimum, x: np.ndarray, draws: int, *, key: Key) -> Estimate:
    """How far a member of the family lies above an optimum, in nats, on common draws of their own."""
    objective = FixedDrawsELBO(density, best.family, best.quadratic, matched_draws(draws, best.family.base, key=key))
    with np.errstate(invalid="ignore"):  # of draws without a finite density in both
        gain = objective.each(x) - objective.each(best.x)
    return Estimate.of_mean(gain) if is_sound(gain) else Estimate(-math.inf, math.nan)


def _proved(
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
    draws, pairs = _first_draws(best.family), best.pairs
    ended, why, insists = Status.BUDGET, f"more than {_ROUNDS} rounds of it", False
    too_few = f"draws are too few for {best.family.parameters:,} parameters"
    for number in range(_ROUNDS):
        own = branch(key, number)
        affordable = left() // (SETS * _EVALUATIONS_EXPECTED)
        if draws > affordable:
            why = f"of the budget {left():,} gradients are left, which do not suffice"
            if certificate or affordable < _first_draws(best.family):
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
            residual=_RESIDUAL * tolerance,
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
        if found and before and draws == _MOST_DRAWS and not found.limit < _GROWN * before.limit:
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
        elif draws == _MOST_DRAWS and insists:
            ended, why = Status.TOO_FEW_DRAWS, f"{draws:,} {too_few}"
            break
        elif draws == _MOST_DRAWS:
            insists = True
        else:
            least = 2 * draws  # to ask again and again until one answer pleases would prove nothing
        draws = int(np.clip(power_of_two(wanted), least, min(_MOST_TIMES * draws, _MOST_DRAWS)))
    if certificate and math.isfinite(certificate.limit):
        return best, Proof(certificate, ended, why)
    return best, Proof(None, ended, why)


def _moved(density: LogDensity, best: Optimum, bounded: Bounded, draws: int, *, key: Key) -> tuple[Optimum, Estimate]:
    """The mean of what the certificate's sets of draws were fitted by, and its gain on draws of their own, in nats."""
    # Nearly as good as a member fitted to all sets of draws at once.
    x = best.family.mean([end.x for end in bounded.ends])
    gain = _gain(density, best, x, draws, key=branch(key, 0))
    if not math.isfinite(gain.value):
        return best, gain
    return _looked_at(density, best.family, x, best.quadratic, best.trace, key=branch(key, 1)), gain


def _estimated(
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
        if draws < _LEAST_DRAWS:
            why = f"{steps}, and of the budget {left():,} gradients are left, which do not suffice for an estimate"
            return best, Proof(certificate, Status.BUDGET, why)
        at = best.steps.at if best.steps else _at_rest(form, best.member, best.quadratic)
        if isinstance(at, Gaussian):
            found = estimate_gap(FullRank(density), at, key=branch(own, 0), draws=draws)
        else:
            rule = Projected(density, form.family, at.family.base)
            found = estimate_gap(rule, at, key=branch(own, 0), draws=draws)
        certificate = found if math.isfinite(found.limit) else None
        is_low = certificate is not None and certificate.limit <= tolerance
        if best.arrived and is_low:
            return best, Proof(certificate)
        if left() < _kept_back(density.size) + 2 * _step_draws(density.size):
            return best, Proof(certificate, Status.BUDGET, f"{steps}, for which the budget was used up")
        if number == _ROUNDS - 1:
            break
        if best.arrived:  # the steps' own estimate is a mean over the last few of them, on fewer draws
            goal /= 2
        more = _stepped(
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
        gain = _gain(density, best, best.family.near(more.member), _COMPARED_DRAWS, key=branch(own, 2))
        if not gain.value > -3 * gain.se:  # a lower end, or one without a finite density
            if is_low:
                return best, Proof(certificate)
            return best, Proof(certificate, Status.BUDGET, f"{steps}, and more of them did not raise the ELBO")
        best = replace(more, trace=_trace(np.concatenate([best.trace.elbo, more.trace.elbo])))
    return best, Proof(certificate, Status.BUDGET, f"{steps}, more than {_ROUNDS} rounds of them")


def _draws_for(best: Optimum, se: float) -> int:
    """The draws by which the ELBO's standard error falls to so many nats, within limits.

    Chosen by other draws than the ELBO is then taken from: to stop where an error has come out small would be to stop
    where the tail has been missed.
    """
    wanted = min(best.spread / se, float(_ELBO_DRAWS[1])) ** 2  # a ratio so large asks for the most draws in any case
    return int(np.clip(_ELBO_PIECE * math.ceil(min(wanted, _ELBO_DRAWS[1]) / _ELBO_PIECE), *_ELBO_DRAWS))


def _measured(density: LogDensity, best: Optimum, *, key: Key, draws: int) -> tuple[Estimate, np.ndarray]:
    """The ELBO in nats on independent draws, the control variate used, and log p(x, z) - log q(z) at them."""
    family, member = best.family, best.member
    base = generator(key).standard_normal((draws, family.base))
    points = family.points(member, base)
    values, _ = density.over(points)
    known, _ = best.quadratic.at(points)
    exact, _ = family.exact(best.x, member, best.quadratic)
    terms = values - known + exact
    apart = np.einsum("ni,ni->n", points - member.loc, family.scores(member, base))
    log_q = -0.5 * apart - (family.entropy(member) - 0.5 * family.size)
    elbo = Estimate.of_mean(terms) if is_sound(terms) else Estimate(-math.inf, math.nan)
    return elbo, values - log_q


def _failed(climbed: Sequence[Optimum], failure: Failure | None, begun: float) -> GaussianFit:
    """The first start's end, which has no finite ELBO."""
    first = climbed[0]
    status = failure.status if failure else Status.DIVERGED
    message = failure.message if failure else "no start led to a Gaussian all of whose draws have a finite density"
    nothing = Estimate(-math.inf, math.nan)
    seconds = time.perf_counter() - begun
    return GaussianFit(status, message, first.member, nothing, np.empty(0), None, tuple(climbed), seconds)


def _without_optimum(
    density: LogDensity,
    best: Optimum,
    optima: Sequence[Optimum],
    failure: Failure,
    draws: int,
    begun: float,
    *,
    key: Key,
) -> GaussianFit:
    """A fit whose family has no best member: where it stopped means nothing, and no certificate is asked for."""
    with np.errstate(over="ignore", invalid="ignore"):
        elbo, weights = _measured(density, best, key=key, draws=draws)
    seconds = time.perf_counter() - begun
    return GaussianFit(failure.status, failure.message, best.member, elbo, weights, None, tuple(optima), seconds)


def _first_draws(family: Family) -> int:
    """About one for each parameter, within limits, and enough for their moments to be matched."""
    wanted = np.clip(power_of_two(family.parameters), _LEAST_DRAWS, _FIRST_DRAWS)
    return int(max(wanted, min(power_of_two(4 * family.base), _MOST_DRAWS)))
