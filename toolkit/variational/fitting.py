"""The verb `fit`: one guide, one model, the solver that suits them, and how it ended."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any
from weakref import WeakKeyDictionary

import jax
import numpy as np
from numpyro.infer.autoguide import AutoDAIS, AutoLowRankMultivariateNormal

from toolkit.compilation import keep_compiled_programs
from toolkit.cost import Cost
from toolkit.estimate import Estimate
from toolkit.modelling.density import invalid_sites
from toolkit.modelling.model import Model
from toolkit.modelling.space import Space, latent_space
from toolkit.progress import Progress, silent
from toolkit.status import Status
from toolkit.threads import threads_for
from toolkit.variational.amortised_fits import with_units
from toolkit.variational.amortised_guides import AutoAmortisedNormal
from toolkit.variational.autoguides import GaussianForm, gaussian_form
from toolkit.variational.block_guides import AutoBlockNormal
from toolkit.variational.building import build_guide
from toolkit.variational.density import LogDensity
from toolkit.variational.draws import branch, check_key
from toolkit.variational.failures import describe_edge
from toolkit.variational.fits import Fit
from toolkit.variational.gaussian_fits import FIXED_DRAWS, NATURAL_GRADIENT, can_be_pinned, fit_gaussian, parameters
from toolkit.variational.gaussians import DENSE_LIMIT, RankGain, rank_by_gain
from toolkit.variational.guides import BY_GAIN, FULL_RANK, GUIDES, Guide, default_rank, find_guide
from toolkit.variational.minibatches import Minibatch, find_minibatch
from toolkit.variational.nesting import contains
from toolkit.variational.own_solvers import Problem, Solved, check_chart
from toolkit.variational.starts import Starts, find_starts
from toolkit.variational.stochastic_fits import Prepared, fit_by_svi, start_at
from toolkit.variational.tails import find_level_edge, flat_coordinates

AUTO, SVI = "auto", "svi"
SOLVERS = (AUTO, FIXED_DRAWS, NATURAL_GRADIENT, SVI)
_MAY_HIDE_AN_EDGE = (Status.UNPROVEN, Status.BUDGET, Status.TOO_FEW_DRAWS, Status.DIVERGED)
MAX_GRADIENTS = 3_000_000
_LEAST_ELBO_DRAWS, _OWN_ELBO_DRAWS = 100, 4_096
_ELBO_SES, _ELBO_ROUNDING = 8.0, 1e-6  # how far an ELBO in closed form may lie from the one on draws


def fit(
    model: Model,
    guide: str | Guide,
    *,
    key: jax.Array,
    tolerance: float = 0.1,
    max_gradients: int = MAX_GRADIENTS,
    solver: str = AUTO,
    starts: Starts | int = 8,
    smaller: Sequence[Fit] = (),
    prepared: Prepared | None = None,
    elbo_draws: int | None = None,
    minibatch: int | Minibatch | None = None,
    progress: Progress = silent,
) -> Fit:
    """The best member of a guide's family, and a certificate of how far it may still be from it.

    Everything runs in float64. A statistical failure (no valid start, divergence, a budget used up) is told by the
    fit's status and is not raised.

    Args:
        model: The model.
        guide: A `Guide`, or the name of one of `GUIDES`, such as `"full_rank"` or `"mean_field@centred"`.
        key: Random key; the same key gives the same fit.
        tolerance: In nats: the optimisation gap that is good enough. Gaussian guides are worked on until their
            certificate's upper limit is below it; others until a step no longer gains a fraction of it.
        max_gradients: The budget, in gradients of the log density at one point each, the starts counted. Climbs, SVI's
            steps and the certificate keep to it; the search for starts and the diagnosis of a failure always run to
            their end.
        solver: `"fixed_draws"` (a quasi-Newton method on the ELBO of common draws), `"natural_gradient"` (averaged
            steps on ever new draws, for full-rank and low-rank Gaussians in high dimension), `"svi"` (NumPyro's, for
            any guide), or `"auto"`, which chooses and says why.
        starts: How many dispersed searches for a mode to begin with, or their result (`find_starts`), which several
            guides may share.
        smaller: Fits of the same model; a Gaussian guide is not left below those of families that it contains, and a
            flow or a mixture begins at the full-rank Gaussian among them, or at one of its own. Fits of other families
            are passed over, and SVI passes over all.
        prepared: The result of `prepare` for this model and guide, where the solver is SVI; made here if None.
        elbo_draws: Fresh draws behind the ELBO of a guide that is not fitted by SVI, and behind its log weights, from
            which k-hat is had. If None, as many as make the ELBO's standard error a tenth of the tolerance, from 1,024
            to 4,096. SVI has a number of its own, which its test of arrival takes.
        minibatch: Rows of the data that each step of SVI sees, of the plate that all observed sites share, or a
            `Minibatch` that names plate and arrays; all of them if None. Starts and the ELBO in the end see all rows.
        progress: Called between pieces of work.

    Raises:
        ValueError: The model is no `Model`, the key not one of JAX's, or a number not positive; guide, chart or solver
            are unknown; the guide cannot be built for this model or fitted by that solver; starts or smaller fits are
            of another chart or model; the model's rows cannot be taken in batches.
    """
    guide = find_guide(guide, model if isinstance(model, Model) else None)
    if not isinstance(model, Model):
        raise ValueError(  # noqa: TRY004 - misuse is a ValueError everywhere
            f"Expected a Model; got {model!r}: write Model(callable, Dataset('mine', {{'y': y}}))."
        )
    check_key(key)
    chart = guide.chart or model.chart
    check_limits(tolerance, max_gradients)
    if not isinstance(starts, int | Starts):
        raise ValueError(  # noqa: TRY004 - misuse is a ValueError everywhere
            f"Expected starts to be how many searches there should be, or what `find_starts` gave; got {starts!r}."
        )
    if elbo_draws is not None and elbo_draws < _LEAST_ELBO_DRAWS:
        raise ValueError(
            f"Expected elbo_draws to be None or at least {_LEAST_ELBO_DRAWS}, so that its error is known; "
            f"got {elbo_draws}."
        )
    if isinstance(smaller, Fit):
        raise ValueError("Expected smaller to be a sequence of fits; got one fit: write smaller=[fit].")  # noqa: TRY004
    for other in smaller:
        if other.model is not model:
            raise ValueError(
                f"Expected smaller fits of this very model; got '{other.guide.name}' of '{other.model.name}'"
                f"{', another object of that name' if other.model.name == model.name else ''}: pass those of this one."
            )
    if minibatch is not None and solver not in (AUTO, SVI):
        raise ValueError(f"Expected solver '{SVI}' for minibatches, which no other takes; got '{solver}'.")
    if guide.solve and (solver != AUTO or minibatch is not None):
        got = "minibatches" if minibatch is not None else f"'{solver}'"
        raise ValueError(f"Expected solver '{AUTO}' for '{guide.name}', which has an algorithm of its own; got {got}.")
    batch = None if minibatch is None else find_minibatch(model, minibatch)
    if prepared and (prepared.model is not model or prepared.guide != guide or prepared.minibatch != batch):
        raise ValueError(
            f"Expected what `prepare` gave for model '{model.name}', guide '{guide.name}' and minibatch {batch}; got "
            f"it for '{prepared.model.name}', '{prepared.guide.name}' and {prepared.minibatch}."
        )
    keep_compiled_programs()
    with jax.enable_x64(True):
        space = latent_space(model, chart)
        if not isinstance(starts, int) and (starts.chart != chart or starts.space != space):
            raise ValueError(
                f"Expected starts of this model in chart '{chart}'; got starts in chart '{starts.chart}', with the "
                f"sites {', '.join(starts.space.names)}: find them with chart='{chart}'."
            )
        if guide.solve:
            check_chart(model, chart, guide.name)
        if guide.solve and not guide.from_gaussian:
            problem = _problem(model, guide, space, key, tolerance, max_gradients, progress)
            problem = replace(problem, contained=_contained(guide, smaller, space, chart))
            return _by_itself(problem, guide, guide.solve, key, elbo_draws)
        if isinstance(starts, int):
            starts = find_starts(model, key=branch(key, 0), chart=chart, count=starts)
        guide, columns = _with_columns(guide, starts, tolerance)
        if guide.rank is not None and guide.rank > space.size:
            raise ValueError(
                f"Expected at most {space.size} columns for '{guide.name}' in {space.size} dimensions; "
                f"got {guide.rank}: take full_rank."
            )
        prepared = prepared if prepared and prepared.guide == guide else None
        built = _built(model, guide, space)
        chosen, why = choose_solver(model, guide, built, space, SVI if batch else solver)
        why = f"{f'for {batch.words}' if batch else why}{columns or _structure(built, guide, space)}"
        cost = Cost(starts.compile_seconds, starts.seconds, starts.gradient_evaluations, starts.peak_bytes)
        if not starts.points:
            return Fit(
                guide, model, Status.NO_VALID_START, _broken_at_origin(model, starts), cost=cost, solver=chosen, why=why
            )
        budget, learned = max(max_gradients - starts.gradient_evaluations, 0), {}
        if batch and isinstance(built, AutoDAIS):
            raise ValueError(
                f"Expected a guide that does not ask for the density itself, for minibatches; '{guide.name}' asks for "
                "that of all rows in each step: fit it without them."
            )
        if batch:
            batch.verify(model, chart, space, starts.points[0].loc)
        if guide.from_gaussian and not batch:
            gaussian = _gaussian(model, guide, starts, smaller, key, tolerance, budget // 2, progress)
            if not any(gaussian is other for other in smaller):
                cost, budget = cost + gaussian.cost, max(budget - gaussian.cost.gradient_evaluations, 0)
            if not (gaussian.usable and gaussian.status.has_optimum):
                told = f"at the Gaussian at which it would begin{gaussian.message and ': '}{gaussian.message}"
                return Fit(guide, model, gaussian.status, told, cost=cost, solver=gaussian.solver, why=gaussian.why)
            if guide.solve:
                problem = replace(_problem(model, guide, space, key, tolerance, budget, progress), starts=starts)
                fitted = _by_itself(replace(problem, gaussian=gaussian), guide, guide.solve, key, elbo_draws)
                return replace(fitted, cost=cost + fitted.cost)
            starts = replace(starts, points=(start_at(gaussian, space),))
            learned = {name: gaussian.params[name] for name in model.parameters(chart)}
            why = f"{why}; it begins at the best Gaussian, whose ELBO is {gaussian.elbo} nats"
        if chosen == SVI:
            fitted = fit_by_svi(model, guide, starts, prepared, batch, key, tolerance, budget, progress, learned)
        else:
            form = gaussian_form(built, space)
            assert form is not None
            fitted = _by_gaussian(
                model, guide, built, form, starts, smaller, chosen, key, tolerance, budget, elbo_draws, progress
            )
        if isinstance(built, AutoAmortisedNormal) and fitted.usable:
            status, message = with_units(built, fitted.params, fitted.status, fitted.message)
            fitted = replace(fitted, status=status, message=message)
    progress(f"fit {guide.name}", 1, 1, "done")
    return replace(fitted, cost=cost + fitted.cost, solver=chosen, why=why)


def _gaussian(
    model: Model,
    guide: Guide,
    starts: Starts,
    smaller: Sequence[Fit],
    key: jax.Array,
    tolerance: float,
    budget: int,
    progress: Progress,
) -> Fit:
    """The best full-rank Gaussian in a guide's chart: the panel's own, or else one that is fitted here."""
    if starts.space.size > DENSE_LIMIT:
        raise ValueError(
            f"Expected at most {DENSE_LIMIT:,} dimensions for '{guide.name}', which begins at a full-rank Gaussian; "
            f"got {starts.space.size:,}: take low_rank."
        )
    wanted = GUIDES[FULL_RANK] if guide.chart is None else GUIDES[FULL_RANK].in_chart(guide.chart)
    known = [one for one in smaller if one.guide.family == FULL_RANK and one.chart == starts.chart]
    if known:
        return known[0]
    own = jax.random.fold_in(key, 2)
    return fit(
        model, wanted, key=own, tolerance=tolerance, max_gradients=max(budget, 1), starts=starts, progress=progress
    )


def _problem(
    model: Model, guide: Guide, space: Space, key: jax.Array, tolerance: float, budget: int, progress: Progress
) -> Problem:
    """What a guide's own algorithm is given."""
    built = build_guide(model, guide, space.unravel(np.zeros(space.size)))
    chart = guide.chart or model.chart
    return Problem(model, chart, space, built, jax.random.fold_in(key, 0), tolerance, budget, progress)


def _contained(
    guide: Guide, smaller: Sequence[Fit], space: Space, chart: str
) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Locations and sds of the factorised Gaussians among fits of families that a guide contains."""
    found = []
    for other in smaller:
        usable = other.usable and other.status.has_optimum and other.chart == chart
        form = gaussian_form(other.autoguide, space) if usable and contains(guide, other.guide, other.model) else None
        member = form.member(other.params) if form else None
        if member is not None and member.scale is not None and member.columns is None:
            found.append((member.loc, np.abs(member.scale)))
    return tuple(found)


def _by_itself(
    problem: Problem, guide: Guide, solve: Callable[[Problem], Solved], key: jax.Array, elbo_draws: int | None
) -> Fit:
    """The fit of a guide that brings its own algorithm, with the ELBO of what that has found."""
    begun, model, space = time.perf_counter(), problem.model, problem.space
    with np.errstate(over="ignore", invalid="ignore"):  # a run-off ends where floating-point numbers do
        solved = solve(problem)
    fitted = Fit(
        guide,
        model,
        solved.status,
        solved.message,
        certificate=solved.certificate,
        log_evidence=solved.log_evidence,
        solver=solved.solver or guide.name,
        why=solved.why,
        optima=tuple(Estimate(height, 0.0) for height in solved.optima),
        reached=solved.reached,
        traces=((solved.trace,) if solved.trace else ()) + solved.other_traces,
        cost=Cost(
            solved.compile_seconds,
            time.perf_counter() - begun - solved.compile_seconds,
            solved.gradients,
            solved.peak_bytes,
        ),
        autoguide=problem.program,
        params=solved.params,
        start=space.unravel(np.zeros(space.size)),
    )
    if fitted.has_density:
        weights = fitted.log_weights(jax.random.fold_in(key, 1), elbo_draws or _OWN_ELBO_DRAWS)
        elbo = Estimate.of_mean(weights) if np.isfinite(weights).all() else Estimate(-math.inf, math.nan)
        if solved.elbo is not None:
            elbo = _agreed(solved.elbo, elbo, guide)
        optima = fitted.optima or ((elbo,) if solved.status.has_optimum else ())
        fitted = replace(fitted, elbo=elbo, fresh_log_weights=weights, optima=optima)
    problem.progress(f"fit {guide.name}", 1, 1, "done")
    return fitted


def _agreed(closed: float, drawn: Estimate, guide: Guide) -> Estimate:
    """An ELBO in closed form, if the one on fresh draws does not speak against it."""
    if not abs(closed - drawn.value) <= _ELBO_SES * drawn.se + _ELBO_ROUNDING * max(1.0, abs(closed)):
        raise ValueError(
            f"Expected the ELBO that '{guide.name}' has in closed form to be the one on fresh draws, {drawn} nats; got "
            f"{closed:.6g}: check its formula and the guide's program."
        )
    return Estimate(closed, 0.0)


def check_limits(tolerance: object, max_gradients: object) -> None:
    """Nothing, if a fit can be held to them.

    Raises:
        ValueError: The tolerance is no positive finite number, or max_gradients no positive whole one.
    """
    positive = isinstance(tolerance, Real) and 0 < float(tolerance) < math.inf
    if not (positive and isinstance(max_gradients, Integral) and int(max_gradients) > 0):
        raise ValueError(
            "Expected a positive tolerance in nats and a positive whole max_gradients; got "
            f"{tolerance!r} and {max_gradients!r}."
        )


def choose_solver(model: Model, guide: Guide, built: Any, space: Space, asked: str = AUTO) -> tuple[str, str]:
    """The solver for a guide, one of `SOLVERS`, and why it is that one.

    Raises:
        ValueError: The solver asked for is unknown, or cannot fit this guide.
    """
    if asked not in SOLVERS:
        raise ValueError(f"Expected solver to be one of {', '.join(SOLVERS)}; got '{asked}'.")
    form = gaussian_form(built, space)
    own = model.parameters(guide.chart)
    only_svi = (
        f"{guide.title} is not one of the Gaussian guides that the other solvers know"
        if form is None
        else f"chart '{guide.chart or model.chart}' has parameters of its own ({', '.join(own)}), which only SVI learns"
        if own
        else ""
    )
    if asked == SVI:
        return SVI, "asked for"
    if only_svi:
        if asked != AUTO:
            raise ValueError(f"Expected solver '{SVI}' for guide '{guide.name}', since {only_svi}; got '{asked}'.")
        return SVI, only_svi
    assert form is not None
    dense = space.size <= DENSE_LIMIT
    if asked != AUTO and not dense and (form.full or asked == NATURAL_GRADIENT):
        raise ValueError(f"Expected at most {DENSE_LIMIT:,} dimensions for solver '{asked}'; got {space.size:,}.")
    if asked != AUTO:
        return asked, "asked for"
    if form.full and not dense:
        return SVI, f"a full-rank factor in {space.size:,} dimensions is beyond what dense matrices are for"
    if can_be_pinned(form, space.size):
        text = "on fixed draws the ELBO of a Gaussian guide is a smooth function, which has a maximum to find"
        return FIXED_DRAWS, text
    many = f"{parameters(form, space.size):,} parameters"
    if dense:
        return NATURAL_GRADIENT, f"no affordable set of fixed draws pins {many} in {space.size:,} dimensions"
    text = f"in {space.size:,} dimensions matrices are too large for natural-gradient steps"
    return FIXED_DRAWS, f"{text}, though fixed draws may not pin {many}"


_set_up: WeakKeyDictionary[Model, dict[Hashable, Any]] = WeakKeyDictionary()


def _built(model: Model, guide: Guide, space: Space) -> Any:
    """NumPyro's guide, set up at the origin; a Gaussian one that has a name is set up once for a model, and copied."""
    if not guide.is_named:
        return build_guide(model, guide, space.unravel(np.zeros(space.size)))
    known, name = _set_up.setdefault(model, {}), (guide.name, guide.rank)
    if name not in known:
        built = build_guide(model, guide, space.unravel(np.zeros(space.size)))
        if gaussian_form(built, space) is None:
            return built
        known[name] = built
    return copy.copy(known[name])


def _with_columns(guide: Guide, starts: Starts, tolerance: float) -> tuple[Guide, str]:
    """A guide whose rank is chosen by gain with that rank, and why it is that one; any other guide as it is."""
    if guide.rank is not None or guide.name.partition("@")[0] != BY_GAIN:
        return guide, ""
    known = next((start.precision for start in starts.points if start.precision is not None), None)
    if known is None:
        count = _columns(default_rank(starts.space.size))
        return guide, f"; with {count}, NumPyro's default: no curvature is known by which they could be chosen"
    chosen = rank_by_gain(known, tolerance)
    return guide.of_rank(chosen.rank), f"; with {_columns(chosen.rank)}: {_gain_in_words(chosen, tolerance)}"


def _gain_in_words(chosen: RankGain, tolerance: float) -> str:
    """What one more column would gain, and what to take where there is none to be had."""
    if chosen.gain < -tolerance / 10:
        # More columns cannot lose: the search for the best ones did not settle, since nothing holds them.
        return (
            "what one more would gain could not be reckoned, because the density hardly bends along some directions "
            "(nearly flat, or of very different scales)"
        )
    text = f"one more would gain about {max(chosen.gain, 0.0):.2g} nats"
    if chosen.limit:
        text += ", but then it would have as many numbers as a full covariance: take full_rank"
    return text


def _structure(built: Any, guide: Guide, space: Space) -> str:
    """What the report says of a guide's blocks or columns; empty for families that have neither."""
    if isinstance(built, AutoAmortisedNormal):
        return f"; {built.words}"
    if isinstance(built, AutoBlockNormal):
        return f"; {built.blocks.words}"
    if isinstance(built, AutoLowRankMultivariateNormal):
        default = "" if guide.rank or built.rank else ", NumPyro's default"
        return f"; with {_columns(guide.rank or built.rank or default_rank(space.size))}{default}"
    return ""


def _columns(count: int) -> str:
    return f"{count} column{'' if count == 1 else 's'}"


def _broken_at_origin(model: Model, starts: Starts) -> str:
    """Which site breaks the density at the origin of unconstrained space, around which starts were looked for."""
    clauses = invalid_sites(model.in_chart(starts.chart), starts.space.unravel(np.zeros(starts.space.size)))
    return f"at the origin of unconstrained space, {'; '.join(clauses)}" if clauses else ""


def _by_gaussian(
    model: Model,
    guide: Guide,
    built: Callable[..., Any],
    form: GaussianForm,
    starts: Starts,
    smaller: Sequence[Fit],
    solver: str,
    key: jax.Array,
    tolerance: float,
    budget: int,
    elbo_draws: int | None,
    progress: Progress,
) -> Fit:
    """The fit of a Gaussian guide outside of compiled programs."""
    density = LogDensity(model, starts.chart)
    begun = time.perf_counter()
    members = []
    for other in smaller:
        smaller_form = gaussian_form(other.autoguide, starts.space)
        if other.usable and other.status.has_optimum and smaller_form and contains(guide, other.guide, model):
            members.append(smaller_form.member(other.params))

    def report(stage: str, done: int, total: int, elbo: float) -> None:
        progress(f"fit {guide.name}", done, max(total, done + 1), f"{stage}, ELBO {elbo:.2f}")

    flat = flat_coordinates(model, starts.chart)
    with threads_for(density.size):
        ended = fit_gaussian(
            density,
            form,
            starts.points,
            members,
            key=branch(key, 1),
            solver=solver,
            log_concave=model.log_concave and starts.chart == model.chart,
            tolerance=tolerance,
            max_gradients=budget,
            elbo_draws=elbo_draws,
            report=report,
            flat=flat,
        )
    status, message, edge = ended.status, ended.message, None
    if status in _MAY_HIDE_AN_EDGE:
        own = branch(key, 2)
        edge = find_level_edge(density, flat, ended.member) or describe_edge(
            density, model, starts.chart, ended.optima[0].family, ended.member, key=own
        )
        if edge:
            status, message = edge.status, edge.message
    if status in (Status.TOO_FEW_DRAWS, Status.BUDGET) and flat:
        message += f"; the posterior may be improper, as the priors of {', '.join(model.flat_priors)} are"
    best = ended.optima[0]
    usable = edge is None and status is not Status.DIVERGED
    return Fit(
        guide,
        model,
        status,
        message,
        elbo=ended.elbo,
        fresh_log_weights=ended.log_weights if usable else None,
        certificate=ended.certificate if usable else None,
        optima=tuple(optimum.elbo for optimum in ended.optima),
        traces=tuple(optimum.trace for optimum in ended.optima),
        cost=Cost(density.compile_seconds, time.perf_counter() - begun, density.evaluations, density.peak_bytes),
        autoguide=built,
        params=form.params(ended.member) if usable else {},
        start={name: np.asarray(value) for name, value in starts.space.unravel(best.member.loc).items()},
    )
