"""NumPyro's SVI: as its tutorials write it, and over a grid of step sizes by someone with patience."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from competitors.gaussians import Gaussian, Space
from competitors.runs import Clock, Problem, Run, Snapshot, Solve, Solver, run_blocks

_ALL = ("mean_field", "low_rank", "full_rank")
_TUTORIAL_STEP = 1e-2
_TUTORIAL_STEPS = (2_000, 20_000)
_GRID = (1e-2, 1e-1, 1e-3, 1e-4)  # the likeliest to arrive first comes first: the others run no longer than it
_GRID_STEPS = 200_000
_GRID_BLOCK = 1_000


def _autoguide(guide: str, program: Callable[..., Any]) -> Any:
    from numpyro.infer import autoguide

    classes = {
        "mean_field": autoguide.AutoNormal,
        "low_rank": autoguide.AutoLowRankMultivariateNormal,
        "full_rank": autoguide.AutoMultivariateNormal,
    }
    return classes[guide](program)


def guide_gaussian(autoguide: Any, params: Any, space: Space) -> Gaussian:
    """The Gaussian that an autoguide and its constrained parameters stand for.

    Raises:
        ValueError: The autoguide is none of the Gaussian ones.
    """
    from numpyro.infer import autoguide as kinds

    prefix = autoguide.prefix
    if isinstance(autoguide, kinds.AutoNormal):
        loc, scales = (
            np.concatenate([np.ravel(params[f"{name}_{prefix}_{part}"]) for name in space.names])
            for part in ("loc", "scale")
        )
        return Gaussian.of_scales(loc, scales)
    loc = params[f"{prefix}_loc"]
    if isinstance(autoguide, kinds.AutoDiagonalNormal):
        stacked = Gaussian.of_scales(loc, params[f"{prefix}_scale"])
    elif isinstance(autoguide, kinds.AutoMultivariateNormal):
        stacked = Gaussian.of_factor(loc, params[f"{prefix}_scale_tril"])
    elif isinstance(autoguide, kinds.AutoLowRankMultivariateNormal):
        stacked = Gaussian.of_low_rank(loc, params[f"{prefix}_scale"], params[f"{prefix}_cov_factor"])
    else:
        raise ValueError(f"Expected a Gaussian autoguide; got {type(autoguide).__name__}.")  # noqa: TRY004
    # The autoguide says itself where it keeps which site.
    places = autoguide._unpack_latent(np.arange(space.size))
    return stacked.reordered(np.concatenate([np.ravel(places[name]) for name in space.names]).astype(int))


def prepare_tutorial(problem: Problem, *, steps: int) -> Solve:
    """Adam at 1e-2, one draw a step, `svi.run` without the bar, in JAX's default float32."""
    import jax
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.optim import Adam

    program = problem.model.bound()

    def solve(seed: int, clock: Clock) -> Run:
        guide = _autoguide(problem.guide, program)
        svi = SVI(program, guide, Adam(_TUTORIAL_STEP), Trace_ELBO())
        result = svi.run(jax.random.PRNGKey(seed), steps, progress_bar=False, **problem.model.arrays)
        params = jax.device_get(result.params)
        seconds = clock.seconds
        return Run((Snapshot(steps, seconds, guide_gaussian(guide, params, problem.space)),), steps)

    return solve


def prepare_member(problem: Problem, *, step_size: float) -> Solve:
    """One member of the grid, favoured: float64, one program for all blocks, nothing paid for looking on the way."""
    import jax
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.optim import Adam

    program, arrays = problem.model.bound(), problem.model.arrays

    def solve(seed: int, clock: Clock) -> Run:
        with jax.enable_x64(True):
            guide = _autoguide(problem.guide, program)
            svi = SVI(program, guide, Adam(step_size), Trace_ELBO())
            state = svi.init(jax.random.PRNGKey(seed), **arrays)

            @jax.jit
            def block(state: Any, arrays: Any) -> Any:
                return jax.lax.scan(lambda s, _: (svi.update(s, **arrays)[0], None), state, length=_GRID_BLOCK)[0]

            return run_blocks(
                lambda state: jax.block_until_ready(block(state, arrays)),
                state,
                lambda state: guide_gaussian(guide, jax.device_get(svi.get_params(state)), problem.space),
                clock,
                block=_GRID_BLOCK,
                steps=_GRID_STEPS,
                draws=1,
            )

    return solve


TUTORIAL = tuple(Solver(f"numpyro_{steps}", _ALL, partial(prepare_tutorial, steps=steps)) for steps in _TUTORIAL_STEPS)
GRID = tuple(
    Solver(f"numpyro_grid_{size:g}", _ALL, partial(prepare_member, step_size=size), in_float64=True) for size in _GRID
)
SOLVERS = (*TUTORIAL, *GRID)
