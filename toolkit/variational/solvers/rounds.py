"""Stochastic optimisation of networks in rounds, each as long as all before it together, with steps that decay.

A network's ELBO rises by fits and starts, and a block of steps without a gain says little. Here a round ends at the
average of its last, short steps; the next one begins there with long steps again (warm restarts: Loshchilov & Hutter
2017, SGDR, ICLR), and is as long as everything before it. Going on no longer pays where such a round gains less than a
fraction of the tolerance, by the ELBO of its end and that of the best end so far on common draws.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toolkit.cost import Cost
from toolkit.estimate import Estimate
from toolkit.variational.solvers.svi import (
    Params,
    Programs,
    Solution,
    Trace,
    block_mean,
    paired_gain,
    sound,
    with_step_size,
)

_FIRST_STEPS = 2_000  # of the first round
_WORTH = 0.2, 0.5  # of the tolerance: a round's gain for which another one is run; the second where steps are long
_LAST = 0.01  # of the first step size, which the last block of a round comes near
_CHECKS = 4  # sets of common draws behind a round's gain
_FRESH = 8  # sets of draws behind the ELBO
_WORSE = 2  # rounds in a row that may end lower, each with shorter steps, before it is given up


def optimise_in_rounds(
    programs: Programs,
    given: dict[str, Any],
    *,
    key: jax.Array,
    step_size: float,
    tolerance: float,
    max_steps: int,
    report: Callable[[int, int, float], None],
) -> Solution:
    """The averaged iterate after which a round as long as all before it together no longer raises the ELBO.

    The iterate is never one whose ELBO on the common draws lies below that of the first parameters.

    Args:
        programs: From `lower_programs`.
        given: Keyword arguments of model and guide.
        key: For the steps and for the checks, which use draws that no step has seen.
        step_size: Adam's first in each round, in the units of the parameters; a quarter of it after a round that ended
            lower than the one before.
        tolerance: In nats: it has arrived where a round's gain is below a fifth of it (half where steps are long)
            and below all of it with two standard errors; the first round does not count.
        max_steps: The budget; no round is begun that would exceed it.
        report: Called after each block with the steps taken, how many there will be if no further round pays, and the
            block's mean ELBO.
    """
    begun = time.perf_counter()
    state = programs.initial._replace(rng_key=jax.random.fold_in(key, 0))

    def checked(params: Params) -> np.ndarray:
        return np.concatenate(
            [np.asarray(programs.check(jax.random.fold_in(key, 1_000 + i), params, given)) for i in range(_CHECKS)]
        )

    best = programs.svi.optim.get_params(state.optim_state)
    best_weights = checked(best)
    course: list[tuple[int, float, float]] = []
    invalid, steps, worse, longest = 0, 0, 0, step_size
    blocks = -(-_FIRST_STEPS // programs.block_steps)
    arrived = exhausted = False
    worth = tolerance * _WORTH[programs.long_steps]
    while not arrived and worse <= _WORSE:
        if steps + blocks * programs.block_steps > max_steps:
            exhausted = True
            break
        state = with_step_size(programs.svi, state, longest, best)
        average = best
        for number in range(blocks):
            share = _LAST + (1 - _LAST) * (1 + math.cos(math.pi * (number + 0.5) / blocks)) / 2
            state = _at_step_size(state, longest * share)
            state, average, losses, skipped = programs.block(state, given)
            steps += programs.block_steps
            invalid += int(skipped)
            course.append((steps, *block_mean(-np.asarray(losses))))
            report(steps, steps + (blocks - number - 1) * programs.block_steps, course[-1][1])
        weights = checked(average)
        gained = paired_gain(weights, best_weights)
        if not gained.value > -worth:
            # Steps so long that they lead away say nothing of what shorter ones would gain.
            worse, longest = worse + 1, longest / 4
            continue
        worse = 0
        repeated = steps > blocks * programs.block_steps  # a first round has nothing before it that it could repeat
        arrived = repeated and gained.value < worth and gained.value + 2 * gained.se < tolerance
        if gained.value > 0:
            best, best_weights = average, weights
        blocks = max(blocks, steps // programs.block_steps)
    fresh = np.concatenate(
        [np.asarray(programs.weigh(jax.random.fold_in(key, 2_000 + i), best, given)) for i in range(_FRESH)]
    )
    finite = sound(fresh)
    spent = math.ceil(steps * programs.particles * programs.share)
    cost = Cost(0.0, time.perf_counter() - begun, spent, programs.peak_bytes)
    return Solution(
        best,
        Estimate.of_mean(fresh) if finite else Estimate(-math.inf, math.nan),
        float(best_weights.mean()) if finite and sound(best_weights) else -math.inf,
        fresh,
        arrived and finite,
        exhausted,
        Trace(*np.array(course, dtype=float).reshape(-1, 3).T.copy()),
        invalid,
        cost,
    )


def _at_step_size(state: Any, step_size: float) -> Any:
    """The state with another step size, its moments as they are."""
    count, (params, inner) = state.optim_state
    value = jnp.asarray(step_size, inner.hyperparams["learning_rate"].dtype)
    return state._replace(
        optim_state=(count, (params, inner._replace(hyperparams={**inner.hyperparams, "learning_rate": value})))
    )
