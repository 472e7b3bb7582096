"""BlackJAX: mean-field and full-rank VI, and Pathfinder, on the model's unconstrained log density in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from competitors.gaussians import Gaussian
from competitors.runs import Clock, Problem, Run, Snapshot, Solve, Solver, run_blocks

_STEP = 1e-2
_STEPS = 10_000
_BLOCK = 1_000
_DRAWS = 100  # BlackJAX's default for one step
_PATHFINDER_DRAWS = 200  # BlackJAX's default for one ELBO


def _log_density(problem: Problem) -> Callable[[Any], Any]:
    return lambda vector: problem.model.log_density(problem.space.unravel(vector), problem.model.arrays)


def _prepare_adam(problem: Problem, name: str, gaussian: Callable[[Any], Gaussian]) -> Solve:
    """10,000 steps of Adam at 1e-2, in scanned blocks; number of draws and objective are BlackJAX's defaults."""
    import blackjax
    import jax
    import jax.numpy as jnp
    import optax

    def solve(seed: int, clock: Clock) -> Run:
        with jax.enable_x64(True):
            algorithm = getattr(blackjax, name)(_log_density(problem), optax.adam(_STEP), num_samples=_DRAWS)

            @jax.jit
            def block(state: Any, key: Any) -> Any:
                keys = jax.random.split(key, _BLOCK)
                return jax.lax.scan(lambda s, k: (algorithm.step(k, s)[0], None), state, keys)[0]

            def advance(carry: Any) -> Any:
                state, key = carry
                key, own = jax.random.split(key)
                return jax.block_until_ready((block(state, own), key))

            first = (algorithm.init(jnp.zeros(problem.space.size)), jax.random.PRNGKey(seed))
            return run_blocks(
                advance,
                first,
                lambda carry: gaussian(jax.device_get(carry[0])),
                clock,
                block=_BLOCK,
                steps=_STEPS,
                draws=_DRAWS,
            )

    return solve


def prepare_meanfield(problem: Problem) -> Solve:
    """`blackjax.meanfield_vi`."""
    return _prepare_adam(problem, "meanfield_vi", lambda state: Gaussian.of_scales(state.mu, np.exp(state.rho)))


def prepare_fullrank(problem: Problem) -> Solve:
    """`blackjax.fullrank_vi`."""
    return _prepare_adam(problem, "fullrank_vi", lambda state: Gaussian.of_factor(state.mu, unpacked(state)))


def unpacked(state: Any) -> np.ndarray:
    """The Cholesky factor of BlackJAX's state: the diagonal's logarithms, then the rows below it."""
    size = len(state.mu)
    factor = np.diag(np.exp(state.chol_params[:size]))
    factor[np.tril_indices(size, k=-1)] = state.chol_params[size:]
    return factor


def prepare_pathfinder(problem: Problem) -> Solve:
    """`blackjax.pathfinder` from one uniform point in [-2, 2], as NumPyro would start."""
    import blackjax
    import jax
    import jax.numpy as jnp

    space, model = problem.space, problem.model

    def solve(seed: int, clock: Clock) -> Run:
        with jax.enable_x64(True):
            start_key, own = jax.random.split(jax.random.PRNGKey(seed))
            values = model.start(start_key, model.arrays)
            start = jnp.concatenate([jnp.ravel(values[name]) for name in space.names])
            algorithm = blackjax.pathfinder(_log_density(problem))
            approximate = jax.jit(lambda key, start: algorithm.init(key, start, num_samples=_PATHFINDER_DRAWS)[0])
            state = jax.device_get(jax.block_until_ready(approximate(own, start)))
            seconds = clock.seconds
        return Run((Snapshot(0, seconds, pathfinder_gaussian(state)),), None)

    return solve


def pathfinder_gaussian(state: Any) -> Gaussian:
    """The Gaussian of a Pathfinder state: covariance diag(alpha) + beta gamma beta', loc one Newton step further.

    Reference: Zhang et al. (2022), Pathfinder, algorithm 4. BlackJAX's `grad_position` is that of minus log p, with
    which `bfgs_sample` steps; the same sign here, since what it draws is what its users get.
    """
    covariance = np.diag(state.alpha) + state.beta @ state.gamma @ state.beta.T
    loc = state.position + covariance @ state.grad_position
    return Gaussian.of_covariance(loc, (covariance + covariance.T) / 2)


SOLVERS = (
    Solver("blackjax_meanfield", ("mean_field",), prepare_meanfield, ("blackjax",)),
    Solver("blackjax_fullrank", ("full_rank",), prepare_fullrank, ("blackjax",)),
    Solver("blackjax_pathfinder", ("full_rank",), prepare_pathfinder, ("blackjax",)),
)
