"""Fits by NumPyro's SVI: any guide, any chart, one start at a time."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import numpyro
import scipy.linalg
from numpyro import handlers
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation

from toolkit.cost import Cost
from toolkit.estimate import Estimate
from toolkit.modelling.model import Model
from toolkit.modelling.space import Space, latent_space
from toolkit.progress import Progress
from toolkit.status import Status
from toolkit.variational.autoguides import gaussian_form
from toolkit.variational.building import build_guide
from toolkit.variational.coordinates import Coordinates, coordinates
from toolkit.variational.density import LogDensity
from toolkit.variational.failures import Failure, describe_edge, find_failure
from toolkit.variational.fits import Fit
from toolkit.variational.flow_guides import AutoFlow
from toolkit.variational.gaussians import Frame, Quadratic
from toolkit.variational.guides import Guide
from toolkit.variational.minibatches import Minibatch
from toolkit.variational.objectives import StickTheLandingELBO
from toolkit.variational.solvers.rounds import optimise_in_rounds
from toolkit.variational.solvers.svi import BLOCK, Programs, Solution, begun_with, lower_programs, optimise
from toolkit.variational.starts import DENSE_LIMIT, Start, Starts
from toolkit.variational.tails import find_heavy_tail, find_level_edge, flat_coordinates

_PARTICLES = 8
_FLOW_PARTICLES = 32  # where the inverse is dear or unknown, a gradient cannot stick to its landing
_FIRST_STEP = 0.01  # of Adam, where nothing is known of the parameters' scales
# In the working coordinates: at most a twentieth of a posterior sd, and in d dimensions so much over sqrt(d), since the
# noise of steps costs about d step^2 / 2 nats. Where the curvature is known, most of the way lies behind.
_FIRST_STEP_OF_SD = 0.05
_FIRST_STEP_WHITENED = 0.1
_FIRST_STEP_UNKNOWN = 0.4
_ELBO_DRAWS = 2_048
# Before the names of working parameters: NumPyro keeps one list of names for the sites of guide and model, and what a
# model has under one of these names would be replaced by the parameter.
_WORKING = "elbowroom:"


@dataclass(frozen=True, eq=False)
class Prepared:
    """A Gaussian guide's programs for a model: traced, and compiled when `programs` is first called."""

    model: Model
    guide: Guide
    coordinates: Coordinates
    minibatch: Minibatch | None
    programs: Callable[[], Programs]


def prepare(model: Model, guide: Guide, *, minibatch: Minibatch | None = None) -> Prepared | None:
    """The programs that fit a guide from any start; None where they depend on the start, as a flow's do.

    Args:
        model: The model.
        guide: The guide.
        minibatch: What a step sees of the data; all of it if None.

    Raises:
        ValueError: The guide's chart is unknown, or the guide cannot be built for this model.
    """
    with jax.enable_x64(True):
        space = latent_space(model, guide.chart)
        built = build_guide(model, guide, space.unravel(np.zeros(space.size)))
        chosen = coordinates(built, space)
        if chosen is None:
            return None
        anywhere = Start(np.zeros(space.size), None, 0.0, 0.0, is_mode=False)
        given = _given(model, minibatch) | {"frame": chosen.frame(anywhere)}
        working = _working_guide(built, chosen)
        loss = Trace_ELBO(_FLOW_PARTICLES) if isinstance(built, AutoFlow) else StickTheLandingELBO(_PARTICLES)
        program = _program(model, guide, minibatch)
        compiled = lower_programs(program, working, loss, given, jax.random.PRNGKey(0), minibatch)
    return Prepared(model, guide, chosen, minibatch, functools.cache(compiled))


def fit_by_svi(
    model: Model,
    guide: Guide,
    starts: Starts,
    prepared: Prepared | None,
    minibatch: Minibatch | None,
    key: jax.Array,
    tolerance: float,
    max_gradients: int,
    progress: Progress,
    learned: Mapping[str, Any] | None = None,
) -> Fit:
    """The best of the fits from each start, which share one budget and, for a Gaussian guide, one set of programs.

    What is left of the budget need not be enough for a block of steps from each: then the best starts have it, or the
    best one is taken as it is. Steps begin with what has been `learned` of the model's own parameters before.
    """
    key = jax.random.key_data(key)  # JAX has two forms of a key, and programs are compiled for one of them
    progress(f"fit {guide.name}", 0, 1, "compiling")
    prepared = prepared or prepare(model, guide, minibatch=minibatch)
    cost = Cost()
    if prepared:
        programs = prepared.programs()
        cost = Cost(programs.compile_seconds, peak_bytes=programs.peak_bytes)
    share = minibatch.share if minibatch else 1.0
    particles = prepared.programs().particles if prepared else _PARTICLES
    points = starts.points[: max(1, int(max_gradients / (particles * BLOCK * share)))]
    max_steps = int(max_gradients / (particles * len(points) * share))
    outcomes = [
        _run(
            model,
            guide,
            prepared,
            minibatch,
            starts,
            start,
            jax.random.fold_in(key, 1 + i),
            tolerance,
            max_steps,
            progress,
            learned or {},
        )
        for i, start in enumerate(points)
    ]
    # By draws other than those behind the reported ELBO, which would be too high for having won.
    outcomes.sort(key=lambda outcome: -outcome[1])
    best = outcomes[0][0]
    runs = [run for run, _ in outcomes]
    return replace(
        best,
        # The ends of starts: steps that scatter do not tell whether two of them are at one optimum.
        optima=tuple(end for run in runs for end in run.optima),
        traces=tuple(trace for run in runs for trace in run.traces),
        invalid_steps=sum(run.invalid_steps for run in runs),
        cost=functools.reduce(operator.add, (run.cost for run in runs), cost),
    )


def _run(
    model: Model,
    guide: Guide,
    prepared: Prepared | None,
    minibatch: Minibatch | None,
    starts: Starts,
    start: Start,
    key: jax.Array,
    tolerance: float,
    max_steps: int,
    progress: Progress,
    learned: Mapping[str, Any],
) -> tuple[Fit, float]:
    """One start's fit, and the ELBO to choose between starts by."""

    def report(steps: int, expected: int, elbo: float) -> None:
        # Never complete: a block that pays, or another start, may follow.
        progress(f"fit {guide.name}", steps, max(expected, steps + 1), f"ELBO {elbo:.2f}")

    built = build_guide(model, guide, starts.space.unravel(start.loc))
    given = _given(model, minibatch)
    if prepared:
        given["frame"] = frame = prepared.coordinates.frame(start)
        programs, compiling = prepared.programs(), 0.0
        widest = _FIRST_STEP_UNKNOWN if start.precision is None else _FIRST_STEP_WHITENED
        step_size = min(_FIRST_STEP_OF_SD, widest / starts.space.size**0.5)
        if isinstance(built, AutoFlow):
            step_size = min(_FIRST_STEP, step_size)
    else:
        program, working = _program(model, guide, minibatch), _without_frame(built)
        programs = lower_programs(program, working, Trace_ELBO(_PARTICLES), given, key, minibatch)()
        compiling, step_size = programs.compile_seconds, _FIRST_STEP
    if learned:
        programs = begun_with(programs, learned)
    climb = optimise_in_rounds if isinstance(built, AutoFlow) else optimise
    solution = climb(
        programs, given, key=key, step_size=step_size, tolerance=tolerance, max_steps=max_steps, report=report
    )
    params = jax.device_get(programs.constrain(solution.params))
    if prepared:
        own = {name: value for name, value in params.items() if not name.startswith(_WORKING)}
        ended = {name: params[_WORKING + name] for name in prepared.coordinates.initial}
        params = own | jax.device_get(prepared.coordinates.to_params(ended, frame))
    status, message = _outcome(solution)
    failure = _failure(model, built, starts, start, params, status, jax.random.fold_in(key, 2))
    if failure:
        skipped = _skipped(solution)
        status, message = failure.status, f"{failure.message}; {skipped}" if skipped else failure.message
    fitted = Fit(
        guide,
        model,
        status,
        message,
        traces=(solution.trace,) if solution.trace.steps.size else (),
        invalid_steps=solution.invalid_steps,
        cost=replace(solution.cost, compile_seconds=compiling, peak_bytes=programs.peak_bytes),
        autoguide=built,
        params=params if status is not Status.DIVERGED else {},
        start={name: np.asarray(value) for name, value in starts.space.unravel(start.loc).items()},
    )
    by_density = isinstance(built, AutoDelta | AutoLaplaceApproximation)
    elbo, weights = solution.elbo, solution.log_weights
    if not fitted.has_density:
        return replace(fitted, optima=(elbo,) if fitted.usable else ()), solution.compared
    if by_density:
        weights = fitted.log_weights(jax.random.fold_in(key, 1), _ELBO_DRAWS)
        elbo = Estimate.of_mean(weights)
    return replace(fitted, elbo=elbo, optima=(elbo,), fresh_log_weights=weights), solution.compared


def start_at(gaussian: Fit, space: Space) -> Start:
    """The start at a full-rank Gaussian that was fitted."""
    form = gaussian_form(gaussian.autoguide, space)
    assert form is not None
    member = form.member(gaussian.params)
    assert member.factor is not None
    inverse = scipy.linalg.solve_triangular(member.factor, np.eye(space.size), lower=True)
    return Start(member.loc, inverse.T @ inverse, gaussian.elbo.value if gaussian.elbo else math.nan, math.nan, False)


def _working_guide(built: Any, chosen: Coordinates) -> Callable[..., Any]:
    """The autoguide as a function of the dimensionless parameters, given the model's arrays and a start's frame."""

    def working(*, arrays: Any, frame: Any, order: Any = None) -> Any:
        given = {name: numpyro.param(_WORKING + name, value) for name, value in chosen.initial.items()}
        params = chosen.to_params(given, frame)
        with handlers.block(hide=list(params)), handlers.substitute(data=params):
            return built(**arrays)

    return working


def _given(model: Model, minibatch: Minibatch | None) -> dict[str, Any]:
    """What programs are called with, but for a start's frame."""
    rows = {"order": minibatch.order()} if minibatch else {}
    return {"arrays": model.arrays, "frame": {}, **rows}


def _program(model: Model, guide: Guide, minibatch: Minibatch | None) -> Callable[..., Any]:
    """The model as a step sees it."""
    bound = model.bound(guide.chart)
    return _without_frame(minibatch.scaled(bound) if minibatch else bound)


def _without_frame(program: Callable[..., Any]) -> Callable[..., Any]:
    """The model, or a guide in its own parameters, beside a working guide: it has no use for frame and order."""
    return lambda *, arrays, frame, order=None: program(**arrays)


def _failure(
    model: Model, built: Any, starts: Starts, start: Start, params: Mapping[str, Any], status: Status, key: jax.Array
) -> Failure | None:
    """Why a Gaussian guide's steps have no end to come to; None where there is one, or for any other guide."""
    form = gaussian_form(built, starts.space)
    if form is None or model.parameters(starts.chart) or starts.space.size > DENSE_LIMIT:
        return None
    member = form.member(params)
    parts = (member.loc, member.scale, member.factor, member.columns)
    if not all(np.isfinite(part).all() for part in parts if part is not None):
        return None
    density, flat = LogDensity(model, starts.chart), flat_coordinates(model, starts.chart)
    if status is Status.DIVERGED:
        family = form.family(Frame.of(start.loc, np.ones(density.size) if start.precision is None else start.precision))
        own = jax.random.fold_in(key, 0)
        edge = find_level_edge(density, flat, member) or describe_edge(
            density, model, starts.chart, family, member, key=own
        )
        if edge:
            return edge
    known = np.zeros(density.size) if start.precision is None else start.precision
    quadratic = Quadratic(member.loc, np.zeros(density.size), known)
    suspected = status is not Status.ARRIVED
    found = find_failure(density, form, member, quadratic, key=jax.random.fold_in(key, 1), suspected=suspected)
    return found or find_heavy_tail(density, flat, member)


def _skipped(solution: Solution) -> str:
    return f"{solution.invalid_steps} invalid steps were skipped" if solution.invalid_steps else ""


def _outcome(solution: Solution) -> tuple[Status, str]:
    message = _skipped(solution)
    if not np.isfinite(solution.elbo.value):
        weights = solution.log_weights
        lost = f"{(~np.isfinite(weights)).sum():,} of {weights.size:,} draws of the guide have no finite density"
        return Status.DIVERGED, f"{lost}; {message}" if message else lost
    if solution.exhausted:
        return Status.BUDGET, message or f"{solution.trace.steps.max(initial=0):,.0f} steps"
    return (Status.ARRIVED if solution.arrived else Status.NOISY), message
