"""Where one start of a Gaussian guide leads: a climb on fixed draws or averaged steps, and a look at their end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from toolkit.estimate import Estimate
from toolkit.variational.autoguides import GaussianForm
from toolkit.variational.certificates import SETS
from toolkit.variational.density import LogDensity
from toolkit.variational.draws import Key, branch, matched_draws, power_of_two
from toolkit.variational.failures import is_sound
from toolkit.variational.gaussians import Family, Frame, Member, Quadratic
from toolkit.variational.projection import project
from toolkit.variational.solvers.fixed_draws import FixedDrawsELBO, Pair, climb
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
from toolkit.variational.starts import Start

Report = Callable[[str, int, int, float], None]

FIXED_DRAWS, NATURAL_GRADIENT = "fixed_draws", "natural_gradient"

LEAST_DRAWS, _FIRST_DRAWS, MOST_DRAWS = 128, 1_024, 16_384
_PROJECTION_DRAWS, _PROJECTED = 256, 16  # at least, and for each dimension up to the many that a matrix asks for
COMPARED_DRAWS = 1_024  # where the ELBOs of two optima are compared
CHOSEN_DRAWS = 256  # where a control variate is
_NATURAL_DRAWS = 1_024
_SCREENED = 80  # evaluations from each start; the proof goes on from the best one
RESIDUAL = 0.01  # of the tolerance, that a climb may leave as far as is known; five times as much held less often
_UNKNOWN_SCALE = 0.1  # of a posterior of which no curvature is known, in unconstrained units
_SAME_OPTIMUM = 0.5  # sds of either Gaussian between the locations of one optimum
_SAME_HEIGHT = 0.5  # nats between the ELBOs of one optimum, beyond their errors


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


def solve_start(
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
        return take_steps(
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
    return climb_from(
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


def take_steps(
    density: LogDensity,
    form: GaussianForm,
    begin: Gaussian | Fitted,
    *,
    key: Key,
    tolerance: float,
    budget: int,
    near: int = 0,
    compared: int = COMPARED_DRAWS,
    report: Report,
) -> Optimum:
    """Where averaged natural-gradient steps lead, the ELBO there on so many draws."""
    draws = step_draws(density.size)
    most = int(np.clip((budget - kept_back(density.size, compared)) // draws, 1, STEPS))

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
    looked = look_at(density, family, x, quadratic, trace_of(ended.course), key=branch(key, 1), draws=compared)
    return replace(looked, arrived=ended.arrived, left=max(ended.gap, 0.0), steps=ended)


def step_draws(size: int) -> int:
    """Draws of a natural-gradient step in so many dimensions."""
    return max(_NATURAL_DRAWS, power_of_two(2 * size))


def kept_back(size: int, compared: int = COMPARED_DRAWS) -> int:
    """Gradients that steps leave of the budget: for a look at their end, and for an estimate of what is left."""
    return projection_draws(size) + max(compared, power_of_two(4 * size)) + 2 * SETS * LEAST_DRAWS


def trace_of(course: np.ndarray) -> Trace:
    """An ELBO for each step, as a course."""
    return Trace(np.arange(1.0, len(course) + 1), course, np.full(len(course), math.nan))


def stays_lower(optimum: Optimum, best: Optimum) -> bool:
    """Whether a climb came to its end, or stopped where what it seemed to have left would not lead to the best."""
    return optimum.arrived or optimum.elbo.value + optimum.left < best.elbo.value


def climb_from(
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
    compared: int = COMPARED_DRAWS,
    report: Report,
) -> Optimum:
    """Where a climb on fixed draws leads from a member, in at most so many evaluations, the ELBO on so many draws."""
    base = matched_draws(first_draws(family), family.base, key=branch(key, 0))
    climbed = climb(
        FixedDrawsELBO(density, family, quadratic, base),
        x,
        residual=RESIDUAL * tolerance,
        least_steps=least_steps_of(form),
        max_evaluations=int(np.clip(budget // len(base), 1, most)),
        report=lambda steps, elbo: report("climbing", steps, steps + 1, elbo),
    )
    course = np.maximum.accumulate(climbed.course)  # the last point tried need not be the best
    looked = look_at(density, family, climbed.x, quadratic, trace_of(course), key=branch(key, 1), draws=compared)
    return replace(looked, arrived=climbed.arrived, left=max(climbed.residual, 0.0), pairs=climbed.pairs)


def least_steps_of(form: GaussianForm) -> int:
    """Of a climb before its end is believed: where the ELBO has saddles, little seems to be left near them."""
    return 1 if form.concave else 2


def look_at(
    density: LogDensity,
    family: Family,
    x: np.ndarray,
    quadratic: Quadratic,
    trace: Trace,
    *,
    key: Key,
    draws: int = CHOSEN_DRAWS,
) -> Optimum:
    """A member with the control variate that suits it, and its ELBO on draws of their own."""
    member = family.member(x)
    near = project(density, family, member, quadratic, key=branch(key, 0), draws=projection_draws(density.size))
    base = matched_draws(max(draws, power_of_two(2 * family.base)), family.base, key=branch(key, 1))
    points = family.points(member, base)
    values, _ = density.over(points)
    # Where gradients have heavy tails, what was fitted to few of them may be far from log p: then log q is nearer.
    chosen, least, elbo = near, math.inf, Estimate(-math.inf, math.nan)
    for tried in (near, quadratic, *own_quadratic(member)):
        with np.errstate(over="ignore", invalid="ignore"):  # a run-off's terms are not finite
            terms = values - tried.at(points)[0] + family.exact(x, member, tried)[0]
            spread = float(terms.std())
        if is_sound(terms) and spread < least:
            chosen, least, elbo = tried, spread, Estimate.of_mean(terms)
    return Optimum(family, x, chosen, elbo, least, trace)


def projection_draws(size: int) -> int:
    """Draws that a projection takes in so many dimensions."""
    wanted = min(_PROJECTED * size, max(4 * _PROJECTION_DRAWS, 4 * size))
    return max(_PROJECTION_DRAWS, power_of_two(wanted))


def own_quadratic(member: Member) -> tuple[Quadratic, ...]:
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


def distinct(optima: Sequence[Optimum]) -> tuple[Optimum, ...]:
    """The optima, the best first, each one once."""
    kept: list[Optimum] = []
    for optimum in sorted(optima, key=lambda optimum: -optimum.elbo.value):
        if not any(is_same(optimum, other) for other in kept):
            kept.append(optimum)
    return tuple(kept)


def is_same(first: Optimum, second: Optimum) -> bool:
    """Whether two climbs ended at one optimum: as high within their errors, and in one place as either measures it."""
    high = abs(first.elbo.value - second.elbo.value)
    if not high < _SAME_HEIGHT + 3 * math.hypot(first.elbo.se, second.elbo.se):
        return False
    apart = first.member.loc - second.member.loc
    measures = (*own_quadratic(first.member), *own_quadratic(second.member))
    return all(apart @ measure.times(apart[None])[0] < _SAME_OPTIMUM**2 for measure in measures)


def at_rest(form: GaussianForm, member: Member, around: Quadratic) -> Gaussian | Fitted:
    """A member as natural-gradient steps begin with it: with the quadratic around it, or its own if that has no top."""
    _, slope = around.at_one(member.loc)
    quadratic = Quadratic(member.loc, slope, as_matrix(around.precision))
    if form.full or not is_safely_positive(quadratic.precision):
        margins = Quadratic(member.loc, np.zeros(len(slope)), np.diag(1 / member.variances))
        quadratic = next(iter(own_quadratic(member)), margins)
    frame = Frame.of(member.loc, as_matrix(quadratic.precision))
    if form.full:
        return Gaussian(frame.loc, frame.factor)
    family = form.family(frame)
    return Fitted(frame, family, family.near(member), replace(quadratic, precision=frame.precision))


def gain_of(density: LogDensity, best: Optimum, x: np.ndarray, draws: int, *, key: Key) -> Estimate:
    """How far a member of the family lies above an optimum, in nats, on common draws of their own."""
    objective = FixedDrawsELBO(density, best.family, best.quadratic, matched_draws(draws, best.family.base, key=key))
    with np.errstate(invalid="ignore"):  # of draws without a finite density in both
        gain = objective.each(x) - objective.each(best.x)
    return Estimate.of_mean(gain) if is_sound(gain) else Estimate(-math.inf, math.nan)


def first_draws(family: Family) -> int:
    """About one for each parameter, within limits, and enough for their moments to be matched."""
    wanted = np.clip(power_of_two(family.parameters), LEAST_DRAWS, _FIRST_DRAWS)
    return int(max(wanted, min(power_of_two(4 * family.base), MOST_DRAWS)))
