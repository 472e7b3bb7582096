"""Stochastic optimisation through NumPyro's SVI: scanned blocks, decaying steps, averaged iterates.

The step size is held while it still pays and cut by four when it no longer does, until a cut makes no difference; at
each step size the iterates are averaged, which removes most of the noise that a constant step leaves (Polyak &
Juditsky 1992; Dhaka et al. 2020, section 3). Whether a block paid is read from the ELBO of the averages on common
draws, paired, so that gains far below the ELBO's own noise are seen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpyro.infer import SVI
from numpyro.infer.elbo import ELBO

from toolkit.compilation import QUICK, peak_bytes
from toolkit.cost import Cost
from toolkit.estimate import Estimate
from toolkit.variational.minibatches import Minibatch
from toolkit.variational.objectives import log_weight

Params = dict[str, Any]
Program = Callable[..., Any]

BLOCK = 250  # steps, at most
_LONG_STEPS = 10_000  # parameters from which a step is long enough for shorter blocks
_CUTS = 3
_CHECK_DRAWS = 512
_AT_ONCE, _ROWS_AT_ONCE = 64, 2**22  # draws whose densities are computed side by side, and rows times such draws
_PATIENCE = 2  # blocks in a row without a gain before the step size is cut; one where steps are long
_FRESH_CHECKS = 16  # sets of draws for the final ELBO; a quarter of it where steps are long or see some of the data


@dataclass(frozen=True)
class Trace:
    """The course of one start: after so many `steps` (n,), the ELBO in nats of that block (n,) and its `se` (n,).

    The `se` is NaN where it is not known.
    """

    steps: np.ndarray
    elbo: np.ndarray
    se: np.ndarray


@dataclass(frozen=True)
class Solution:
    """Where an optimiser stopped.

    Attributes:
        params: The averaged iterate, unconstrained, by the names of the working guide's parameters.
        elbo: On draws of its own, in nats.
        compared: The ELBO on the draws by which iterates were chosen, in nats: to choose between starts by.
        log_weights: Log p(x, z) - log q(z) at the draws behind `elbo`, (draws,), in nats.
        arrived: Whether further or shorter steps no longer raised the ELBO by a fraction of the tolerance, as far as
            the draws that compare iterates can tell.
        exhausted: Whether the budget ended the steps.
        trace: The course; empty where the budget was too small for any step.
        invalid_steps: Steps skipped because loss or gradient were NaN or infinite.
        cost: Time, gradient evaluations (a minibatch counts as its share of the data), memory.
    """

    params: Params
    elbo: Estimate
    compared: float
    log_weights: np.ndarray
    arrived: bool
    exhausted: bool
    trace: Trace
    invalid_steps: int
    cost: Cost


@dataclass(frozen=True)
class Programs:
    """The compiled parts of an optimisation: a block of steps, and a check of iterates on common draws.

    They are called with the keyword arguments of model and guide, of which only the shapes were compiled in. Blocks and
    checks see minibatches where there are any; `weigh` is the check on all of the data.
    """

    svi: SVI
    particles: int
    long_steps: bool
    block_steps: int
    block: Any
    check: Any
    weigh: Any
    share: float
    initial: Any
    constrain: Callable[[Params], Params]
    compile_seconds: float
    peak_bytes: int


def lower_programs(
    model: Program,
    guide: Program,
    loss: ELBO,
    given: dict[str, Any],
    key: jax.Array,
    minibatch: Minibatch | None = None,
) -> Callable[[], Programs]:
    """What an optimisation runs, traced; calling the result compiles it, in any thread.

    Args:
        model: NumPyro callable; of a part of the rows, where there are minibatches, its density is an estimate.
        guide: Its guide.
        loss: The objective.
        given: Keyword arguments of both; for minibatches the data are `arrays` and the rows' order is `order`.
        key: For the parameters' first values.
        minibatch: What a step sees of the data; all of it if None.
    """
    begun = time.perf_counter()
    svi = SVI(model, guide, optax.inject_hyperparams(_careful_adam)(learning_rate=1e-3), loss)
    # Compiled, of a whole run of guide and model only the parameters' first values remain to be computed.
    initial = jax.jit(lambda key, given: svi.init(key, **given))(key, given)
    params = svi.optim.get_params(initial.optim_state)
    long_steps = sum(value.size for value in jax.tree.leaves(params)) >= _LONG_STEPS
    length = BLOCK // 5 if long_steps else BLOCK

    def block(state: Any, given: Any) -> tuple[Any, Params, Any, Any]:
        def step(carry: Any, _: None) -> tuple[Any, Any]:
            state, total = carry
            seen = given
            if minibatch:
                kept, own = jax.random.split(state.rng_key)
                state = state._replace(rng_key=kept)
                seen = minibatch.seen(own, given)
            state, value = svi.update(state, **seen)
            total = jax.tree.map(jnp.add, total, svi.optim.get_params(state.optim_state))
            return (state, total), value

        zeros = jax.tree.map(jnp.zeros_like, svi.optim.get_params(state.optim_state))
        skipped = _skipped(state)
        (state, total), losses = jax.lax.scan(step, (state, zeros), None, length=length)
        return state, jax.tree.map(lambda t: t / length, total), losses, _skipped(state) - skipped

    def weigh(key: jax.Array, params: Params, given: Any) -> Any:
        constrained = svi.constrain_fn(params)
        return jax.lax.map(
            lambda k: log_weight(k, constrained, model, guide, given),
            jax.random.split(key, _CHECK_DRAWS),
            batch_size=_AT_ONCE if minibatch is None else int(np.clip(_ROWS_AT_ONCE // minibatch.rows, 1, _AT_ONCE)),
        )

    def check_on_some(key: jax.Array, params: Params, given: Any) -> Any:
        """Each draw with a batch of its own: of two iterates the same ones."""
        assert minibatch is not None
        constrained = svi.constrain_fn(params)

        def one(key: jax.Array) -> Any:
            of_rows, of_draw = jax.random.split(key)
            return log_weight(of_draw, constrained, model, guide, minibatch.seen(of_rows, given))

        return jax.lax.map(one, jax.random.split(key, _CHECK_DRAWS), batch_size=_AT_ONCE)

    # Tracing shares NumPyro's one stack of handlers and stays in the caller's thread; compiling does not.
    lowered = [jax.jit(block).lower(initial, given), jax.jit(weigh).lower(key, params, given)]
    if minibatch:
        lowered.append(jax.jit(check_on_some).lower(key, params, given))
    traced = time.perf_counter() - begun

    def compiled() -> Programs:
        begun = time.perf_counter()
        with ThreadPoolExecutor(len(lowered)) as pool:
            compiled_block, *weighing = pool.map(lambda program: program.compile(QUICK), lowered)
        return Programs(
            svi,
            loss.num_particles,
            long_steps,
            length,
            compiled_block,
            weighing[-1],
            weighing[0],
            minibatch.share if minibatch else 1.0,
            initial,
            svi.constrain_fn,
            traced + time.perf_counter() - begun,
            peak_bytes(compiled_block),
        )

    return compiled


def _careful_adam(learning_rate: Any) -> optax.GradientTransformationExtraArgs:
    """Adam that skips, and counts, a step whose loss or gradient is NaN or infinite.

    `SVI.stable_update` does so too, but joins all gradients into one vector for it, which at a matrix of a million
    entries took up to four fifths of a step.
    """

    def spoil(updates: Any, state: Any, params: Any = None, *, value: Any, **_: Any) -> tuple[Any, Any]:
        return jax.tree.map(lambda update: jnp.where(jnp.isfinite(value), update, jnp.nan), updates), state

    watch = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), spoil)
    return optax.chain(watch, optax.apply_if_finite(optax.adam(learning_rate), np.iinfo(np.int32).max))


def _skipped(state: Any) -> Any:
    """How many steps have been skipped since the optimiser was set up."""
    return optax.tree.get(state.optim_state, "total_notfinite")


def optimise(
    programs: Programs,
    given: dict[str, Any],
    *,
    key: jax.Array,
    step_size: float,
    tolerance: float,
    max_steps: int,
    report: Callable[[int, int, float], None],
) -> Solution:
    """The averaged iterate at which further steps no longer raise the ELBO.

    Args:
        programs: From `lower_programs`.
        given: Keyword arguments of model and guide.
        key: For the steps and for the checks, which use draws that no step has seen.
        step_size: Adam's first, in the units of the parameters.
        tolerance: In nats; a step size is left when its blocks gain less than a fifth of it (half of it where steps
            are long) or less than two standard errors. After the last step size the last block must have ended
            within it of the best one, error included.
        max_steps: The budget; no block is begun that would exceed it.
        report: Called after each block with the steps taken, how many there will be if no further block pays, and the
            block's mean ELBO.
    """
    begun = time.perf_counter()
    state = programs.initial._replace(rng_key=jax.random.fold_in(key, 0))
    course: list[tuple[int, float, float]] = []
    invalid, steps = 0, 0
    arrived = False
    patience = 1 if programs.long_steps else _PATIENCE
    worth = tolerance / 2 if programs.long_steps else tolerance / 5  # a gain for which another block is run
    # One set of draws for all checks, so that differences between iterates are paired.
    check_key = jax.random.fold_in(key, 1)
    best = programs.svi.optim.get_params(state.optim_state)
    best_weights = np.asarray(programs.check(check_key, best, given))
    for cut in range(_CUTS + 1):
        state = with_step_size(programs.svi, state, step_size / 4**cut, best)
        before, idle = best_weights, 0
        while idle < patience and steps + programs.block_steps <= max_steps:
            state, average, losses, skipped = programs.block(state, given)
            values = -np.asarray(losses)
            steps += programs.block_steps
            invalid += int(skipped)
            course.append((steps, *block_mean(values)))
            weights = np.asarray(programs.check(check_key, average, given))
            gain = paired_gain(weights, best_weights)
            if gain.value > 0:
                best, best_weights = average, weights
            idle = 0 if gain.value > max(worth, 2 * gain.se) else idle + 1
            to_come = (_CUTS - cut + 1) * patience - idle
            report(steps, min(max_steps, steps + to_come * programs.block_steps), course[-1][1])
        exhausted = idle < patience  # the budget ended this step size, not its idleness
        if exhausted:
            break
        # Neither better nor worse for shorter steps: no noise is left that still shorter ones could take away.
        arrived = cut > 0 and _level(before, best_weights, weights, tolerance)
        if arrived:
            break
    else:
        arrived = abs(gain.value) + 2 * gain.se < tolerance
    few = programs.long_steps or programs.share < 1
    checks = _FRESH_CHECKS // 4 if few else _FRESH_CHECKS
    fresh = np.concatenate(
        [np.asarray(programs.weigh(jax.random.fold_in(key, 2 + i), best, given)) for i in range(checks)]
    )
    finite = sound(fresh)
    if programs.share < 1:
        best_weights = np.asarray(programs.weigh(check_key, best, given))
    spent = math.ceil(steps * programs.particles * programs.share)
    cost = Cost(0.0, time.perf_counter() - begun, spent, programs.peak_bytes)
    elbo = Estimate.of_mean(fresh) if finite else Estimate(-math.inf, math.nan)
    trace = Trace(*np.array(course, dtype=float).reshape(-1, 3).T.copy())
    compared = float(best_weights.mean()) if finite and sound(best_weights) else -math.inf
    return Solution(best, elbo, compared, fresh, arrived and finite, exhausted, trace, invalid, cost)


def paired_gain(weights: np.ndarray, before: np.ndarray) -> Estimate:
    """By how much the ELBO rose, from log weights on common draws."""
    if not sound(weights):
        return Estimate(-math.inf, 0.0)
    if not sound(before):
        return Estimate(math.inf, 0.0)
    return Estimate.of_mean(weights - before)


def _level(before: np.ndarray, best: np.ndarray, last: np.ndarray, tolerance: float) -> bool:
    """Whether a step size neither raised the ELBO nor holds it down, from log weights on common draws."""
    changes = paired_gain(best, before), paired_gain(best, last)
    return all(abs(c.value) < tolerance / 5 and abs(c.value) + 2 * c.se < tolerance for c in changes)


def sound(weights: np.ndarray) -> bool:
    """Whether log weights are finite and of a size that float64 can still tell apart."""
    return bool(np.isfinite(weights).all()) and float(weights.std()) < 1e8


def block_mean(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard error of a block's finite ELBO estimates, which are independent given the iterates."""
    finite = values[np.isfinite(values) & (np.abs(values) < 1e100)]
    return Estimate.of_mean(finite) if finite.size > 1 else Estimate(math.nan, math.nan)


def begun_with(programs: Programs, known: Mapping[str, Any]) -> Programs:
    """The programs with other first values, constrained, of the parameters by these names."""
    svi, state = programs.svi, programs.initial
    unconstrained = svi.constrain_fn({name: jnp.asarray(value) for name, value in known.items()}, invert=True)
    params = svi.optim.get_params(state.optim_state) | unconstrained
    return replace(programs, initial=state._replace(optim_state=svi.optim.init(params)))


def with_step_size(svi: SVI, state: Any, step_size: float, params: Params) -> Any:
    """The state with another step size, continued from the given iterate with fresh moments."""
    count, (_, inner) = svi.optim.init(params)
    hyperparams = dict(
        inner.hyperparams, learning_rate=jnp.asarray(step_size, inner.hyperparams["learning_rate"].dtype)
    )
    return state._replace(optim_state=(count, (params, inner._replace(hyperparams=hyperparams))))
