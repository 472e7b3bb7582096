"""The verb `fit`: one guide, one model, and how it ended."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer import Trace_ELBO, init_to_value
from numpyro.infer.autoguide import (
    AutoContinuous,
    AutoDAIS,
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuide,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from numpyro.infer.util import constrain_fn, log_density

from toolkit.compilation import QUICK
from toolkit.cost import Cost
from toolkit.estimate import Estimate
from toolkit.modelling.completion import BATCH, complete
from toolkit.modelling.model import Model
from toolkit.progress import Progress, silent
from toolkit.status import Status
from toolkit.variational.coordinates import Coordinates, coordinates
from toolkit.variational.guides import Guide, find_guide
from toolkit.variational.objectives import StickTheLandingELBO, log_weight
from toolkit.variational.solvers.svi import Programs, Solution, Trace, lower_programs, optimise
from toolkit.variational.starts import Start, Starts, find_starts, latent_space

_PARTICLES = 8
_FIRST_STEP = 0.01  # of Adam, where nothing is known of the parameters' scales
# In the working coordinates: at most a twentieth of a posterior sd, and in d dimensions so much over sqrt(d), since the
# noise of steps costs about d step^2 / 2 nats. Where the curvature is known, most of the way lies behind.
_FIRST_STEP_OF_SD = 0.05
_FIRST_STEP_WHITENED = 0.1
_FIRST_STEP_UNKNOWN = 0.4
_ELBO_DRAWS = 2_048
_SCALARS_AT_ONCE = 32_000_000  # drawn at once, all sites counted: 256 MB


@dataclass(frozen=True, eq=False)
class Fit:
    """A guide fitted to a model: it can draw, and where its family has one, give its log density.

    Attributes:
        guide: The family.
        model: The model.
        status: How the optimisation ended.
        message: A detail on the status, for the report; empty if there is none.
        elbo: E_q[log p(x, z) - log q(z)] in nats on draws that the fit has not seen; None if it could not be had.
        fresh_log_weights: Log p(x, z) - log q(z) in nats at the draws behind `elbo`, (draws,); None without a density.
        gap_bound: An upper bound on the family's best ELBO minus this one, in nats; None where none was computed.
        traces: The course of each start.
        invalid_steps: Steps skipped because loss or gradient were NaN or infinite.
        cost: Time, gradient evaluations, memory.
        autoguide: NumPyro's guide; everything that NumPyro does with a guide works with it and `params`.
        params: Its parameters, constrained, and the model's own parameters where its chart has any; empty if the fit
            failed.
        start: Where the search began, unconstrained, by site; the autoguide was set up there.
    """

    guide: Guide
    model: Model
    status: Status
    message: str = ""
    elbo: Estimate | None = None
    fresh_log_weights: np.ndarray | None = None
    gap_bound: Estimate | None = None
    traces: tuple[Trace, ...] = ()
    invalid_steps: int = 0
    cost: Cost = field(default_factory=Cost)
    autoguide: Any = None
    params: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)

    @property
    def chart(self) -> str:
        """The model's chart that the guide looks at."""
        return self.guide.chart or self.model.chart

    @property
    def usable(self) -> bool:
        """Whether there is an approximation to draw from."""
        return bool(self.params)

    @property
    def has_density(self) -> bool:
        """Whether the family has a density; a point mass has none."""
        return self.usable and not isinstance(self.autoguide, AutoDelta)

    def draw(self, key: jax.Array, draws: int, sites: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
        """Independent draws of latent and deterministic sites, `(draws, ...)` each, in constrained space.

        Args:
            key: Random key.
            draws: How many.
            sites: Which sites; all if None. Deterministic ones that are not asked for are not computed.

        Raises:
            ValueError: The fit failed and has nothing to draw from, or a site is unknown.
        """
        self._require_usable()

        def one(key: jax.Array, params: Any, arrays: Any) -> dict[str, Any]:
            guide_key, _ = jax.random.split(key)  # as `log_weight` does, so that one key means one set of draws
            return self._latents(guide_key, params, arrays)

        scalars = sum(math.prod(site.shape) for site in self.model.sites.values())
        pieces = [
            complete(self.model, latents, params=self.params, chart=self.chart, sites=sites)
            for latents in self._map(one, key, draws, at_once=max(BATCH, _SCALARS_AT_ONCE // max(scalars, 1)))
        ]
        return {name: np.concatenate([piece[name] for piece in pieces])[:draws] for name in pieces[0]}

    def log_weights(self, key: jax.Array, draws: int) -> np.ndarray:
        """Log p(x, z) - log q(z) at independent draws z of the guide, shape (draws,), in nats.

        Raises:
            ValueError: The fit failed, or its family has no density.
        """
        self._require_density()
        program = self.model.bound(self.chart)
        pieces = self._map(lambda k, params, arrays: log_weight(k, params, program, self._program, arrays), key, draws)
        return np.concatenate(list(pieces))[:draws]

    def log_density(self, latents: Mapping[str, Any]) -> np.ndarray:
        """Log q(z) of latent sites `(draws, ...)` in the guide's chart, shape (draws,), in nats.

        The density is with respect to the constrained sites' own volume, as NumPyro's `log_density` has it.

        Raises:
            ValueError: The fit failed, or its family has no density in closed form.
        """
        self._require_density()
        if isinstance(self.autoguide, AutoDAIS):
            text = f"Expected a density in closed form; '{self.guide.name}' gives weights only."
            raise ValueError(text)  # noqa: TRY004 - the family's limit, not an argument's type
        with jax.enable_x64(True):
            return np.asarray(
                jax.lax.map(
                    lambda z: self._log_density(z), {k: np.asarray(v) for k, v in latents.items()}, batch_size=BATCH
                )
            )

    @property
    def _program(self) -> Callable[..., Any]:
        """The guide as a NumPyro program; a Laplace approximation becomes the Gaussian that it stands for."""
        if isinstance(self.autoguide, AutoLaplaceApproximation):
            return _laplace_program(self.autoguide, self.params)
        return self.autoguide

    def _latents(self, key: jax.Array, params: Any, arrays: Any) -> dict[str, Any]:
        guide = handlers.seed(handlers.substitute(self._program, data=params), key)
        trace = handlers.trace(guide).get_trace(**arrays)
        return {
            name: site["value"]
            for name, site in trace.items()
            if site["type"] == "sample" and not site["is_observed"] and not site["infer"].get("is_auxiliary")
        }

    def _log_density(self, latents: Mapping[str, Any]) -> Any:
        guide = self.autoguide
        if not isinstance(guide, AutoContinuous):
            value, _ = log_density(handlers.seed(guide, 0), (), self.model.arrays, {**self.params, **latents})
            return value
        trace = handlers.trace(
            handlers.seed(handlers.substitute(self.model.bound(self.chart), data={**self.params, **latents}), 0)
        ).get_trace(**self.model.arrays)
        jacobian, unconstrained = 0.0, {}
        for name in guide._init_locs:
            transform = biject_to(trace[name]["fn"].support)
            unconstrained[name] = transform.inv(latents[name])
            jacobian += transform.log_abs_det_jacobian(unconstrained[name], latents[name]).sum()
        # In the guide's own order; its `_unpack_latent.inv` needs an argument that nothing gives (NumPyro 0.22).
        vector = jnp.concatenate([jnp.ravel(value) for value in unconstrained.values()])
        # AutoDiagonalNormal's posterior is a batch of independent normals: the sum is the joint density.
        return guide.get_posterior(self.params).log_prob(vector).sum() - jacobian

    def _map(self, one: Callable[..., Any], key: jax.Array, draws: int, at_once: int = 2**20) -> Iterator[Any]:
        """The results of `one`, at most about so many at once; the last piece has a few more than were asked for."""
        if draws < 1:
            raise ValueError(f"Expected at least 1 draw; got {draws}.")
        # Pieces of one length in whole batches: any other length would be compiled as a program of its own.
        count = -(-draws // at_once)
        length = -(-draws // (count * BATCH)) * BATCH

        def many(keys: Any, params: Any, arrays: Any) -> Any:
            return jax.lax.map(lambda k: one(k, params, arrays), keys, batch_size=BATCH)

        with jax.enable_x64(True):
            keys = jax.random.split(key, count * length).reshape(count, length, -1)
            given = (self.params, self.model.arrays)
            program = jax.jit(many).lower(keys[0], *given).compile(QUICK)
        for piece in keys:
            with jax.enable_x64(True):
                yield jax.device_get(program(piece, *given))

    def _require_usable(self) -> None:
        if not self.usable:
            raise ValueError(f"Expected a fit that can draw; '{self.guide.name}' has none: {self.status.value}.")

    def _require_density(self) -> None:
        self._require_usable()
        if not self.has_density:
            raise ValueError(f"Expected a family with a density; '{self.guide.name}' is a point mass.")


@dataclass(frozen=True, eq=False)
class Prepared:
    """A Gaussian guide's programs for a model: traced, and compiled by the time that `programs` returns them."""

    model: Model
    guide: Guide
    coordinates: Coordinates
    programs: Callable[[], Programs]


def prepare(model: Model, guide: Guide, *, pool: Executor | None = None) -> Prepared | None:
    """The programs that fit a guide from any start; None where they depend on the start, as a flow's do.

    Args:
        model: The model.
        guide: The guide.
        pool: Where to compile, beside whatever the caller goes on with; when first asked for if None.

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
        given = {"arrays": model.arrays, "frame": chosen.frame(anywhere)}
        program = _without_frame(model.bound(guide.chart))
        working = _working_guide(built, chosen)
        loss = StickTheLandingELBO(_PARTICLES)
        compiled = lower_programs(program, working, loss, given, jax.random.PRNGKey(0))
    return Prepared(model, guide, chosen, pool.submit(compiled).result if pool else functools.cache(compiled))


def fit(
    model: Model,
    guide: str | Guide,
    *,
    key: jax.Array,
    tolerance: float = 0.1,
    max_steps: int = 20_000,
    starts: Starts | int = 2,
    prepared: Prepared | None = None,
    progress: Progress = silent,
) -> Fit:
    """The guide fitted by NumPyro's SVI, with step sizes, stopping and starts chosen for the user.

    Everything runs in float64. A statistical failure (no valid start, divergence, steps used up) is told by the fit's
    status and is not raised.

    Args:
        model: The model.
        guide: A `Guide`, or the name of one of `GUIDES`, such as `"full_rank"` or `"mean_field@centred"`.
        key: Random key; the same key gives the same fit.
        tolerance: In nats: a gain in ELBO that is worth no further work.
        max_steps: The budget of each start, in steps of eight draws.
        starts: How many dispersed searches for a mode to begin with, or their result (`find_starts`), which several
            guides may share.
        prepared: The result of `prepare` for this model and guide; made here if None.
        progress: Called between blocks of steps.

    Raises:
        ValueError: The guide's name or chart is unknown, the guide cannot be built for this model, or the starts are
            of another chart.
    """
    guide = find_guide(guide)
    chart = guide.chart or model.chart
    if tolerance <= 0:
        raise ValueError(f"Expected a positive tolerance in nats; got {tolerance}.")
    with jax.enable_x64(True):
        if isinstance(starts, int):
            starts = find_starts(model, key=jax.random.fold_in(key, 0), chart=chart, count=starts)
        if starts.chart != chart or starts.space != latent_space(model, chart):
            raise ValueError(
                f"Expected starts of this model in chart '{chart}'; got starts in chart '{starts.chart}', with the "
                f"sites {', '.join(starts.space.names)}: find them with chart='{chart}'."
            )
        if prepared and (prepared.model is not model or prepared.guide != guide):
            raise ValueError(
                f"Expected what `prepare` gave for model '{model.name}' and guide '{guide.name}'; got it for "
                f"'{prepared.model.name}' and '{prepared.guide.name}'."
            )
        cost = Cost(0.0, starts.seconds, starts.gradient_evaluations, 0)
        if not starts.points:
            return Fit(guide, model, Status.NO_VALID_START, cost=cost)
        progress(f"fit {guide.name}", 0, 1, "compiling")
        prepared = prepared or prepare(model, guide)
        if prepared:
            programs = prepared.programs()
            cost = replace(cost, compile_seconds=programs.compile_seconds, peak_bytes=programs.peak_bytes)
        outcomes = [
            _run(model, guide, prepared, starts, start, jax.random.fold_in(key, 1 + i), tolerance, max_steps, progress)
            for i, start in enumerate(starts.points)
        ]
    progress(f"fit {guide.name}", 1, 1, "done")
    # By draws other than those behind the reported ELBO, which would be too high for having won.
    best, _ = max(outcomes, key=lambda outcome: outcome[1])
    runs = [run for run, _ in outcomes]
    return replace(
        best,
        traces=tuple(trace for run in runs for trace in run.traces),
        invalid_steps=sum(run.invalid_steps for run in runs),
        cost=functools.reduce(_together, (run.cost for run in runs), cost),
    )


def _run(
    model: Model,
    guide: Guide,
    prepared: Prepared | None,
    starts: Starts,
    start: Start,
    key: jax.Array,
    tolerance: float,
    max_steps: int,
    progress: Progress,
) -> tuple[Fit, float]:
    """One start's fit, and the ELBO to choose between starts by."""

    def report(steps: int, expected: int, elbo: float) -> None:
        # Never complete: a block that pays, or another start, may follow.
        progress(f"fit {guide.name}", steps, max(expected, steps + 1), f"ELBO {elbo:.2f}")

    built = build_guide(model, guide, starts.space.unravel(start.loc))
    given: dict[str, Any] = {"arrays": model.arrays, "frame": {}}
    if prepared:
        given["frame"] = frame = prepared.coordinates.frame(start)
        programs, compiling = prepared.programs(), 0.0
        widest = _FIRST_STEP_UNKNOWN if start.precision is None else _FIRST_STEP_WHITENED
        step_size = min(_FIRST_STEP_OF_SD, widest / starts.space.size**0.5)
    else:
        program, working = _without_frame(model.bound(guide.chart)), _without_frame(built)
        programs = lower_programs(program, working, Trace_ELBO(_PARTICLES), given, key)()
        compiling, step_size = programs.compile_seconds, _FIRST_STEP
    solution = optimise(
        programs, given, key=key, step_size=step_size, tolerance=tolerance, max_steps=max_steps, report=report
    )
    params = jax.device_get(programs.constrain(solution.params))
    if prepared:
        names = set(prepared.coordinates.initial)
        own = {name: value for name, value in params.items() if name not in names}
        moved = prepared.coordinates.to_params({name: params[name] for name in names}, frame)
        params = own | jax.device_get(moved)
    status, message = _outcome(solution, max_steps)
    fitted = Fit(
        guide,
        model,
        status,
        message,
        traces=(solution.trace,),
        invalid_steps=solution.invalid_steps,
        cost=replace(solution.cost, compile_seconds=compiling, peak_bytes=programs.peak_bytes),
        autoguide=built,
        params=params if status is not Status.DIVERGED else {},
        start={name: np.asarray(value) for name, value in starts.space.unravel(start.loc).items()},
    )
    if not fitted.has_density:
        return fitted, solution.compared
    elbo, weights = solution.elbo, solution.log_weights
    if isinstance(built, AutoLaplaceApproximation):  # what was climbed is the log density, not the Gaussian's ELBO
        weights = fitted.log_weights(jax.random.fold_in(key, 1), _ELBO_DRAWS)
        elbo = Estimate.of_mean(weights)
    return replace(fitted, elbo=elbo, fresh_log_weights=weights), solution.compared


def build_guide(model: Model, guide: Guide, start: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """NumPyro's guide for the model, set up on its data; an autoguide begins at the unconstrained point `start`."""
    program = model.bound(guide.chart)
    built = guide.build(program)
    if not isinstance(built, AutoGuide):
        return built
    with jax.enable_x64(True):
        if start is not None:
            constrained = jax.jit(lambda point: constrain_fn(program, (), model.arrays, point))(dict(start))
            # As JAX arrays: a model may index a latent by its data inside a traced program.
            values = {name: jnp.asarray(value) for name, value in constrained.items()}
            built.init_loc_fn = init_to_value(values=values)
        _set_up(built, model.arrays)
    return built


def _set_up(built: AutoGuide, arrays: Mapping[str, Any]) -> None:
    """Let an autoguide read the model's latent sites.

    NumPyro evaluates the density and its gradient there, operation by operation, to check the start; ours is checked,
    and for the Gaussian guides, which need no density here, it is masked meanwhile: that saves seconds.
    """
    program = built.model
    if isinstance(built, AutoNormal | AutoDiagonalNormal | AutoMultivariateNormal | AutoLowRankMultivariateNormal):
        hidden = handlers.block(program, hide_fn=lambda site: site.get("is_observed", False))
        built.model = handlers.mask(hidden, mask=False)
    with handlers.block(), handlers.seed(rng_seed=0):
        built._setup_prototype(**arrays)
    built.model = program


def _working_guide(built: Any, chosen: Coordinates) -> Callable[..., Any]:
    """The autoguide as a function of the dimensionless parameters, given the model's arrays and a start's frame."""

    def working(*, arrays: Any, frame: Any) -> Any:
        given = {name: numpyro.param(name, value) for name, value in chosen.initial.items()}
        params = chosen.to_params(given, frame)
        with handlers.block(hide=list(params)), handlers.substitute(data=params):
            return built(**arrays)

    return working


def _without_frame(program: Callable[..., Any]) -> Callable[..., Any]:
    """The model, or a guide in its own parameters, beside a working guide: it has no use for the frame."""
    return lambda *, arrays, frame: program(**arrays)


def _outcome(solution: Solution, max_steps: int) -> tuple[Status, str]:
    message = f"{solution.invalid_steps} invalid steps were skipped" if solution.invalid_steps else ""
    if not np.isfinite(solution.elbo.value):
        weights = solution.log_weights
        lost = f"{(~np.isfinite(weights)).sum():,} of {weights.size:,} draws of the guide have no finite density"
        return Status.DIVERGED, f"{lost}; {message}" if message else lost
    if not solution.arrived:
        spent = solution.trace.steps[-1] >= max_steps
        return (Status.BUDGET, message or f"{max_steps:,} steps") if spent else (Status.NOISY, message)
    return Status.ARRIVED, message


def _together(first: Cost, second: Cost) -> Cost:
    return Cost(
        first.compile_seconds + second.compile_seconds,
        first.run_seconds + second.run_seconds,
        first.gradient_evaluations + second.gradient_evaluations,
        max(first.peak_bytes, second.peak_bytes),
    )


def _laplace_program(guide: AutoLaplaceApproximation, params: Mapping[str, Any]) -> Callable[..., Any]:
    """The Gaussian that a Laplace approximation stands for, as a NumPyro guide."""
    gaussian = AutoMultivariateNormal(guide.model, prefix=guide.prefix, init_loc_fn=guide.init_loc_fn)
    posterior = guide.get_posterior(params)

    def program(**kwargs: Any) -> Any:
        fixed = {f"{guide.prefix}_loc": posterior.loc, f"{guide.prefix}_scale_tril": posterior.scale_tril}
        with handlers.block(hide=list(fixed)), handlers.substitute(data=fixed):
            return gaussian(**kwargs)

    return program
