"""PyMC's ADVI, full-rank ADVI, DADVI and Pathfinder, on programs that are shown to have the same density."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import numpy as np

from competitors.gaussians import Gaussian
from competitors.pymc_programs import PROGRAMS, build
from competitors.runs import Clock, Problem, Run, Snapshot, Solve, Solver

_ITERATIONS = 10_000  # PyMC's default, with one draw each
_FIXED_DRAWS = 30  # DADVI's default
_POINTS = 10


def _order(problem: Problem, program: Any) -> np.ndarray:
    """For each coordinate of the model's vector, its place in PyMC's, which stacks `initial_point`."""
    names = {value.name: variable.name for value, variable in program.values_to_rvs.items()}
    point = program.initial_point()
    return problem.space.order([(names[name], int(np.size(value))) for name, value in point.items()])


def verify(problem: Problem) -> None:
    """Nothing, if PyMC's density and the model's differ by a constant in unconstrained space.

    The transforms are part of it: log for positive sites and logit for bounded ones on both sides.

    Raises:
        ValueError: They differ by something that depends on the point.
    """
    import jax

    program = build(problem.posterior)
    order, space, model = _order(problem, program), problem.space, problem.model
    density = program.compile_logp()
    start = program.initial_point()
    ends = np.cumsum([np.size(value) for value in start.values()])[:-1]
    differences, heights = [], []
    for vector in np.random.default_rng(0).uniform(-1, 1, (_POINTS, space.size)):
        pieces = zip(start.items(), np.split(vector, ends), strict=True)
        theirs = float(density({name: piece.reshape(np.shape(value)) for (name, value), piece in pieces}))
        with jax.enable_x64(True):
            ours = float(model.log_density(space.unravel(vector[order]), model.arrays))
        differences.append(theirs - ours)
        heights.append(abs(ours))
    spread = np.ptp(differences)
    if not spread <= 1e-8 + 1e-11 * max(heights):
        raise ValueError(
            f"Expected PyMC's program of '{problem.posterior}' to have the model's density up to a constant; the "
            f"difference varies by {spread:.2g} nats over {_POINTS} points: mend `competitors/pymc_programs.py`."
        )


def prepare_advi(problem: Problem, *, method: str) -> Solve:
    """`pymc.fit` at its defaults: 10,000 iterations of one draw."""
    import pymc as pm

    _import_backend()
    program = build(problem.posterior)
    order = _order(problem, program)

    def solve(seed: int, clock: Clock) -> Run:
        approximation = pm.fit(method=method, model=program, random_seed=seed, progressbar=False)
        with clock.paused():
            loc = approximation.mean.eval()
            if method == "advi":
                gaussian = Gaussian.of_scales(loc, approximation.std.eval())
            else:
                gaussian = Gaussian.of_factor(loc, approximation.groups[0].L.eval())
        return Run((Snapshot(_ITERATIONS, clock.seconds, gaussian.reordered(order)),), _ITERATIONS)

    return solve


def prepare_dadvi(problem: Problem) -> Solve:
    """`pymc_extras.fit(method="dadvi")` at its defaults: 30 fixed draws, trust-region Newton."""
    import pymc_extras

    _import_backend()
    program = build(problem.posterior)
    order = _order(problem, program)

    def solve(seed: int, clock: Clock) -> Run:
        fitted = pymc_extras.fit(method="dadvi", model=program, random_seed=seed, progressbar=False)
        seconds = clock.seconds
        result = fitted["optimizer_result"]
        loc, log_scales = np.split(result["x"].values, 2)
        gaussian = Gaussian.of_scales(loc, np.exp(log_scales)).reordered(order)
        steps, products = (int(result[count]) if count in result else None for count in ("njev", "nhev"))
        if not bool(result["success"]):
            note = str(result["message"].values)  # PyMC draws from where it stopped all the same
        else:
            note = "" if products is None else f"and {products * _FIXED_DRAWS} Hessian-vector products"
        evaluations = None if steps is None else steps * _FIXED_DRAWS
        return Run((Snapshot(steps or 0, seconds, gaussian),), evaluations, note=note)

    return solve


def prepare_pathfinder(problem: Problem) -> Solve:
    """`pymc_extras.fit(method="pathfinder")` at its defaults: 4 paths, 1,000 draws resampled by their weights.

    Resampled draws have no density. What is measured is the Gaussian with their mean and covariance.
    """
    import pymc_extras

    _import_backend()
    program = build(problem.posterior)

    def solve(seed: int, clock: Clock) -> Run:
        with warnings.catch_warnings():
            # Its paths are forked processes, JAX is loaded beside them for our measuring, and they do not use it.
            warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning)
            fitted = pymc_extras.fit(method="pathfinder", model=program, random_seed=seed, progressbar=False)
        seconds = clock.seconds
        draws = _unconstrained(problem, fitted["posterior"])
        try:
            gaussian = Gaussian.of_covariance(draws.mean(axis=0), np.cov(draws, rowvar=False))
        except np.linalg.LinAlgError:
            distinct = len(np.unique(draws, axis=0))
            return Run((), None, note=f"{distinct} distinct draws: no Gaussian")
        return Run((Snapshot(0, seconds, gaussian),), None, note="Gaussian with its draws' moments")

    return solve


def _unconstrained(problem: Problem, posterior: Any) -> np.ndarray:
    """Draws of all latent sites, (draws, size), by the model's own transforms."""
    import jax
    import jax.numpy as jnp
    from numpyro.infer.util import unconstrain_fn

    space, model = problem.space, problem.model
    draws = {name: posterior[name].values.reshape(-1, *shape) for name, shape in _shapes(problem).items()}

    def one(sites: Any) -> Any:
        values = unconstrain_fn(model.bound(), (), model.arrays, sites)
        return jnp.concatenate([jnp.ravel(values[name]) for name in space.names])

    with jax.enable_x64(True):
        return np.asarray(jax.jit(jax.vmap(one))(draws))


def _shapes(problem: Problem) -> dict[str, tuple[int, ...]]:
    """Site name to shape in constrained space."""
    return {name: problem.model.sites[name].shape for name in problem.space.names}


def _import_backend() -> None:
    """PyTensor imports its compiler when it first compiles; imports are not the solver's seconds."""
    import pytensor.link.numba.linker  # noqa: F401


_NEEDED = ("pymc", "pymc_extras")
SOLVERS = tuple(
    Solver(name, (guide,), prepare, _NEEDED, PROGRAMS.__contains__, verify)
    for name, guide, prepare in (
        ("pymc_advi", "mean_field", partial(prepare_advi, method="advi")),
        ("pymc_dadvi", "mean_field", prepare_dadvi),
        ("pymc_fullrank_advi", "full_rank", partial(prepare_advi, method="fullrank_advi")),
        ("pymc_pathfinder", "full_rank", prepare_pathfinder),
    )
)
