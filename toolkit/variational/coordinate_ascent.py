"""Coordinate ascent: factors updated in turn, each to its best given the others, until the ELBO has stopped rising.

A guide q(z) = prod_j q_j(z_j) without any form for its factors has, with all other factors held, one best factor,

    q_j(z_j)  proportional to  exp( E_{q without j}[ log p(x, z) ] ),

which for a conditionally conjugate model is a known distribution with parameters in closed form. No update can lower
the ELBO, so that a fall is an error of a formula and is told as one: after each sweep, and where it is asked what is
left also after each update, since a later one may make good what a wrong one has lost. A wrong update may raise the
ELBO on its whole way, if not to the most: so where the sweeps end each parameter is moved alone, which must gain
nothing. What is slow about coordinate ascent is correlation: for two Gaussian coordinates of correlation rho a sweep
leaves the fourth power of rho of the nats that were left before. A small gain is therefore no arrival; what is still to
come is reckoned from how fast gains shrink.

References:
    Bishop (2006), Pattern Recognition and Machine Learning, section 10.1.1.
    Blei, Kucukelbir & McAuliffe (2017), Variational inference: a review for statisticians, section 2.4.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import jax
import numpy as np
from numpyro import handlers

from toolkit.estimate import Estimate
from toolkit.status import Status
from toolkit.variational.certificates import Certificate, Scope
from toolkit.variational.own_solvers import Problem, Solved
from toolkit.variational.solvers.svi import Trace
from toolkit.variational.stationary import what_moving_gains

State = dict[str, np.ndarray]
"""The parameters of all factors by name, as the guide's program names them."""
Update = Callable[[State], State]
"""A factor's best parameters given all others'; those that it leaves out stay as they are."""

_SHARE = 0.01  # of the tolerance: what may be left
_ROUNDING = 1e-10  # of the ELBO: a fall below it says how sums are rounded
_NOISE = 1e-14  # of the ELBO: a gain below it may be rounding
_EACH, _GROWTH = 32, 1.05  # sweeps after which it is asked what is left, first each time, then each so much longer run
_LEAST_GAINS = 3
_POINTS = 400  # of a trace, at most


@dataclass(frozen=True, eq=False)
class Ascent:
    """Where coordinate ascent stopped.

    Attributes:
        state: All factors' parameters.
        status: `ARRIVED`, `BUDGET` or `DIVERGED`.
        left: In nats, how much the ELBO still has to rise: exact where that is known, else reckoned from the gains;
            infinite where the gains do not shrink yet.
        sweeps: How many were made.
        trace: The ELBO in nats after the sweeps, exact, of at most 400 of them.
        message: A detail on the status.
    """

    state: State
    status: Status
    left: float
    sweeps: int
    trace: Trace
    message: str = ""

    @property
    def elbo(self) -> float:
        """Of the state, in nats, in closed form; NaN if no sweep was made."""
        return float(self.trace.elbo[-1]) if self.trace.elbo.size else math.nan


def ascend(
    updates: Mapping[str, Update],
    elbo: Callable[[State], float],
    start: State,
    *,
    tolerance: float,
    max_sweeps: int,
    left: Callable[[State], float] | None = None,
    report: Callable[[int, float], None] | None = None,
) -> Ascent:
    """The state at which further sweeps over the factors no longer raise the ELBO.

    Args:
        updates: Factor name to update, in the order of a sweep.
        elbo: The ELBO of a state in nats, in closed form.
        start: First parameters of all factors.
        tolerance: In nats; it has arrived when no more than a hundredth of it is left to gain.
        max_sweeps: The budget.
        left: How much the ELBO still has to rise in nats, where that is known exactly; reckoned by `remaining` if None.
        report: Called now and then with the number of sweeps and the ELBO.

    Raises:
        ValueError: There is no factor, an update names a parameter that `start` lacks, or an update lowers the ELBO by
            more than rounding does, or raises it above what `left` says is the most.
    """
    if not updates:
        raise ValueError("Expected at least one factor to update; got none.")
    state, current = dict(start), float(elbo(dict(start)))
    elbos, gains = list[float](), list[float]()
    still, next_look, status, message = math.inf, 1, Status.BUDGET, ""
    since, seemed = 0, -math.inf  # gains are looked at from here on; where it last seemed to have arrived
    for sweep in range(1, max_sweeps + 1):
        before, looked, passed = state, sweep >= next_look or sweep == max_sweeps, [current]
        for name, update in updates.items():
            state = _updated(state, name, update)
            if looked:
                passed.append(float(elbo(state)))
        risen = passed[-1] if looked else float(elbo(state))
        if not math.isfinite(risen):
            state, status, message = before, Status.DIVERGED, _broken(updates, before, sweep)
            break
        falls = [earlier - later for earlier, later in pairwise(passed if looked else [current, risen])]
        if any(fall > _rounding(current) for fall in falls):
            raise ValueError(_fall(updates, elbo, before, current, sweep))
        elbos.append(risen)
        gains.append(risen - current)
        current = risen
        if looked:
            next_look = sweep + 1 if sweep < _EACH else math.ceil(_GROWTH * sweep)
            noise = _NOISE * max(1.0, abs(current))
            still = _left(left, state, current) if left else remaining(gains[since:], noise)
            if report:
                report(sweep, current)
            if still <= _SHARE * tolerance:
                if left or current - seemed <= _SHARE * tolerance:
                    status = Status.ARRIVED
                    break
                # Asked again, of later gains alone: behind large gains that shrink fast, small slow ones are not seen.
                since, seemed, still, next_look = sweep, current, math.inf, sweep + 1
    if left and status is not Status.DIVERGED:
        still = _left(left, state, current)
    elif status is Status.BUDGET and len(gains) - since < _LEAST_GAINS:
        still = remaining(gains, _NOISE * max(1.0, abs(current)))  # too few to be asked again of later ones alone
    return Ascent(state, status, still, len(elbos), _trace(elbos), message)


def remaining(gains: Sequence[float], noise: float = 0.0) -> float:
    """What further sweeps will gain in all, in nats, if the gains go on shrinking as they have of late.

    The last third of the gains is cut in two halves: where the second is q times the first, what follows is the second
    times q / (1 - q). Since the third grows with the run, a part of the error that shrinks slowly is seen once the
    faster parts are gone. What shrinks a hundred times more slowly than the run is long stays unseen. Where `ascend`
    has nothing better, it asks twice, the second time of gains that came after the first answer.

    Args:
        gains: Of each sweep, in nats.
        noise: A gain that may be rounding.
    """
    half = max(1, len(gains) // 6)
    if len(gains) < _LEAST_GAINS:
        return math.inf
    earlier, later = math.fsum(gains[-2 * half : -half]), math.fsum(gains[-half:])
    floor = half * noise
    if later <= floor:
        return floor
    if later >= earlier:
        return math.inf
    return later * later / (earlier - later)


@dataclass(frozen=True, eq=False)
class CoordinateAscent:
    """Coordinate ascent by a model's closed-form updates, for `Guide.solve`.

    A sweep counts as one gradient of the log density towards the budget.

    Attributes:
        updates: Factor name to update, in the order of a sweep.
        elbo: The ELBO of a state in nats, in closed form.
        start: First parameters, by the names that the guide's program has.
        left: How much the ELBO of the family's best lies above a state's in nats, where that is known exactly: the fit
            then has a certificate that bounds the gap to the best of the whole family. Without it there is none.
        chart: The chart for which the updates hold.
    """

    updates: Mapping[str, Update]
    elbo: Callable[[State], float]
    start: State
    left: Callable[[State], float] | None = None
    chart: str = "plain"

    def __call__(self, problem: Problem) -> Solved:
        """What the ascent has found.

        Raises:
            ValueError: The guide looks at another chart than the updates hold for, its program does not take the
                model's arrays, or an update is wrong: it lowers the ELBO, or leads elsewhere than to the best.
        """
        if problem.chart != self.chart:
            raise ValueError(
                f"Expected chart '{self.chart}', for which the closed-form updates hold; got '{problem.chart}'."
            )
        _check_program(problem, self.start)

        def report(sweep: int, elbo: float) -> None:
            problem.progress("coordinate ascent", sweep, sweep + 1, f"ELBO {elbo:.2f}")

        ended = ascend(
            self.updates,
            self.elbo,
            self.start,
            tolerance=problem.tolerance,
            max_sweeps=problem.max_gradients,
            left=self.left,
            report=report,
        )
        if ended.status is Status.ARRIVED:
            _check_optimum(problem, ended, self.elbo, self.updates)
        why = "the best of each factor given the others is known in closed form"
        certificate = None
        if self.left is None:
            why += "; how far the family's best may lie above is not, since the ELBO may have several optima"
        elif ended.status is not Status.DIVERGED:
            # At least a hundredth of the tolerance, as for all other certificates: rounding is in it.
            limit = max(ended.left, _SHARE * problem.tolerance)
            certificate = Certificate(Estimate(ended.left, 0.0), limit, Scope.GLOBAL, draws=0, sets=0)
            why += ", and so is the family's best"
        return Solved(
            ended.state if ended.status is not Status.DIVERGED else {},
            ended.status,
            _told(ended),
            solver="coordinate_ascent",
            why=why,
            trace=ended.trace if ended.sweeps else None,
            certificate=certificate,
            elbo=ended.elbo if ended.sweeps else None,
            gradients=ended.sweeps,
        )


def _check_program(problem: Problem, start: State) -> None:
    """The guide's program takes what the model takes, and has the start's parameters; else it is another's."""
    taken = inspect.signature(problem.program)
    try:
        taken.bind(**problem.model.arrays)
    except TypeError as error:
        raise ValueError(
            f"Expected a guide that takes the arrays of model '{problem.model.name}', which are "
            f"{', '.join(problem.model.arrays) or 'none'}; got one that takes {', '.join(taken.parameters) or 'none'}: "
            "closed-form updates are those of one model."
        ) from error
    with jax.enable_x64(True):
        trace = handlers.trace(handlers.seed(problem.program, 0)).get_trace(**problem.model.arrays)
    named = [name for name, site in trace.items() if site["type"] == "param"]
    if set(named) != set(start):
        raise ValueError(
            f"Expected a start with the parameters of the guide's program, {', '.join(named) or 'none'}; got "
            f"{', '.join(start) or 'none'}."
        )


def _check_optimum(
    problem: Problem, ended: Ascent, elbo: Callable[[State], float], updates: Mapping[str, Update]
) -> None:
    """Nothing is gained by moving a parameter from where the updates have led, or one of them is wrong.

    A parameter that no update gives is held on purpose.
    """
    given = {name for update in updates.values() for name in update(ended.state)}
    gains = what_moving_gains(problem.program, problem.model.arrays, ended.state, elbo, given)
    worst = max(gains, key=lambda name: gains[name], default="")
    if worst and gains[worst] > max(ended.left, _SHARE * problem.tolerance) + _rounding(ended.elbo):
        raise ValueError(
            "Expected each update to lead to its factor's best, from which no parameter can be moved for the better; "
            f"moving '{worst}' alone raised the ELBO by {gains[worst]:.3g} nats: check the formula of its factor's "
            "update, the ELBO's, and which constraint the guide's program gives to the parameter."
        )


def _updated(state: State, name: str, update: Update) -> State:
    try:
        changed = update(state)
    except KeyError as error:
        raise ValueError(
            f"Expected a start with every parameter that the update of factor '{name}' reads; it has "
            f"{', '.join(state)}, and not {error}."
        ) from error
    if not isinstance(changed, Mapping):
        raise ValueError(  # noqa: TRY004 - misuse is a ValueError everywhere
            f"Expected the update of factor '{name}' to give parameters by name; got {type(changed).__name__}."
        )
    if unknown := set(changed) - set(state):
        raise ValueError(
            f"Expected the update of factor '{name}' to give parameters that the start has, of "
            f"{', '.join(state)}; it gives {', '.join(sorted(unknown))}."
        )
    return {**state, **changed}


def _rounding(elbo: float) -> float:
    """By how many nats a sum of this size may be off."""
    return _ROUNDING * max(1.0, abs(elbo))


def _left(left: Callable[[State], float], state: State, elbo: float) -> float:
    """What is left to gain as it is known; what lies above the claimed best by more than rounding disproves it."""
    value = float(left(state))
    if value < -_rounding(elbo):
        raise ValueError(
            f"Expected no ELBO above the family's best, which is claimed to be {elbo + value:.6g} nats; got {elbo:.6g} "
            "nats: check the formula of what is left to gain, and the ELBO's."
        )
    return max(value, 0.0)


def _fall(
    updates: Mapping[str, Update], elbo: Callable[[State], float], state: State, current: float, sweep: int
) -> str:
    """Which update of a sweep lowered the ELBO most, in a sentence."""
    falls: dict[str, float] = {}
    for name, update in updates.items():
        state = _updated(state, name, update)
        risen = float(elbo(state))
        falls[name], current = current - risen, risen
    worst = max(falls, key=lambda name: falls[name])
    return (
        f"Expected no update to lower the ELBO; that of factor '{worst}' lowered it by {falls[worst]:.3g} nats in "
        f"sweep {sweep:,}: check its formula, and the ELBO's."
    )


def _broken(updates: Mapping[str, Update], state: State, sweep: int) -> str:
    """Where the ELBO stopped being a number, with the factor whose update gave none, if it was an update."""
    for name, update in updates.items():
        state = _updated(state, name, update)
        if not all(np.isfinite(value).all() for value in state.values()):
            return f"in sweep {sweep:,}, by the update of factor '{name}'"
    return f"in sweep {sweep:,}"


def _trace(elbos: Sequence[float]) -> Trace:
    """The ELBO after each of the first sweeps, and then after ever fewer of them."""
    steps = np.unique(np.geomspace(1, len(elbos), _POINTS).round().astype(int)) if elbos else np.zeros(0, int)
    values = np.asarray(elbos, float)[steps - 1]
    return Trace(steps.astype(float), values, np.zeros(len(steps)))


def _told(ended: Ascent) -> str:
    """What the report says of the end beside the status."""
    if ended.status is Status.BUDGET and ended.sweeps:
        much = f"about {ended.left:.2g} nats left to gain" if math.isfinite(ended.left) else "gains that do not shrink"
        return f"after {ended.sweeps:,} sweep{'' if ended.sweeps == 1 else 's'}, with {much}"
    return ended.message
