"""Fits of Gaussian guides: climbed from every start, the best one proved, all outside of compiled programs.

start -> a climb on fixed draws, or averaged natural-gradient steps -> the best of the starts -> its certificate
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
from toolkit.variational.certificates import Certificate, Scope
from toolkit.variational.density import LogDensity
from toolkit.variational.draws import Key, branch, generator, matched_draws
from toolkit.variational.failures import Failure, find_failure, find_ridge, is_sound
from toolkit.variational.gaussian_optima import (
    CHOSEN_DRAWS,
    COMPARED_DRAWS,
    FIXED_DRAWS,
    NATURAL_GRADIENT,
    Optimum,
    Report,
    at_rest,
    climb_from,
    distinct,
    first_draws,
    gain_of,
    is_same,
    kept_back,
    least_steps_of,
    look_at,
    own_quadratic,
    projection_draws,
    solve_start,
    stays_lower,
    step_draws,
    take_steps,
    trace_of,
)
from toolkit.variational.gaussian_proofs import estimated, proved
from toolkit.variational.gaussians import Family, Frame, Member, Quadratic, Triangular
from toolkit.variational.projection import project
from toolkit.variational.solvers.fixed_draws import EVALUATIONS, MOST_PARAMETERS, FixedDrawsELBO
from toolkit.variational.starts import HOPELESS, Start, positive_definite
from toolkit.variational.tails import FlatCoordinate, find_heavy_tail

FIXED_LIMIT = 300  # dimensions up to which fixed draws pin any Gaussian family
_PINNED = 45_000  # parameters that they pin beyond, as many as a full-rank Gaussian has there
_ELBO_DRAWS, _ELBO_PIECE = (1_024, 4_096), 128  # at least and at most, and what they are a multiple of
_SMALL = 0.1  # of the tolerance: the ELBO's standard error for which no more draws are asked
_RECENTRINGS = 4  # of a family that depends on its frame


def can_be_pinned(form: GaussianForm, size: int) -> bool:
    """Whether an affordable set of fixed draws pins a family in so many dimensions, in climbs of affordable length."""
    return size <= FIXED_LIMIT or parameters(form, size) <= (_PINNED if form.concave else MOST_PARAMETERS)


def parameters(form: GaussianForm, size: int) -> int:
    """How many parameters a family has in so many dimensions."""
    return form.family(Frame(np.zeros(size), np.ones(size), np.ones(size))).parameters


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
            solve_start(
                density,
                form,
                start,
                solver,
                key=branch(key, i),
                tolerance=tolerance,
                budget=left() // (len(followed) - i),
                compared=COMPARED_DRAWS if len(followed) > 1 else CHOSEN_DRAWS,
                report=report,
            )
            for i, start in enumerate(followed)
        ]
    optima = distinct([optimum for optimum in climbed if math.isfinite(optimum.elbo.value)])
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
    others = [one for one in optima if one is not best and stays_lower(one, best)]
    optima = (best, *(one for one in others if not is_same(one, best)))
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
        best, proof = estimated(
            density, form, best, key=branch(key, 1_001), tolerance=tolerance, left=left, report=report
        )
    else:
        best, proof = proved(
            density,
            best,
            scope,
            least_steps_of(form),
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
    optima = (replace(best, elbo=elbo), *(one for one in optima[1:] if not is_same(one, best)))
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
        if not stays_lower(optimum, optima[0]):
            own = branch(key, number)
            optimum = climb_from(
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
            optimum = replace(optimum, trace=trace_of(whole))
        finished.append(optimum)
    return distinct(finished)


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
        gain = gain_of(density, best, x, COMPARED_DRAWS, key=branch(own, 0))
        if gain.value <= 0:
            continue
        around = project(
            density, family, family.member(x), best.quadratic, key=branch(own, 1), draws=projection_draws(density.size)
        )
        fitting = _best_for(form, around)
        if fitting is not None:
            bent = family.near(fitting)
            x = bent if gain_of(density, best, bent, COMPARED_DRAWS, key=branch(own, 0)).value > gain.value else x
        found: Optimum | None = None
        if solver == NATURAL_GRADIENT and left() > kept_back(density.size) + 2 * step_draws(density.size):
            begin = at_rest(form, family.member(x), around)
            found = take_steps(
                density, form, begin, key=branch(own, 2), tolerance=tolerance, budget=left(), report=report
            )
        elif solver == FIXED_DRAWS:
            found = climb_from(
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
        gains = [gain_of(density, best, at, COMPARED_DRAWS, key=branch(own, 3)).value for at in (there, x)]
        if found and max(gains) > 0 and gains[0] >= gains[1]:
            best = found
        elif max(gains) > 0:
            looked = look_at(density, family, x, around, best.trace, key=branch(own, 4), draws=COMPARED_DRAWS)
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
        known = next(iter(own_quadratic(best.member)), None)
        if known is None or known.precision.ndim == 1 or left() < first_draws(best.family):
            break
        frame = Frame.of(best.member.loc, known.precision)
        family = form.family(frame)
        found = climb_from(
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
            best = replace(found, trace=trace_of(np.concatenate([best.trace.elbo, found.trace.elbo])))
        if not gain.value > _SMALL * tolerance + 2 * gain.se:
            break
    return best


def _lead(density: LogDensity, one: Optimum, other: Optimum, *, key: Key) -> Estimate:
    """How far one optimum lies above another, which may be of a family of another frame, on common base draws."""
    base = matched_draws(COMPARED_DRAWS, one.family.base, key=key)
    first, second = (FixedDrawsELBO(density, at.family, at.quadratic, base).each(at.x) for at in (one, other))
    with np.errstate(invalid="ignore"):
        gain = first - second
    return Estimate.of_mean(gain) if is_sound(gain) else Estimate(-math.inf, math.nan)


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
