"""One chain of the No-U-Turn Sampler, run in compiled blocks that can be stopped between them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from numpyro.infer import NUTS

from toolkit.compilation import QUICK, peak_bytes
from toolkit.cost import Cost
from toolkit.modelling.model import Model

MAX_TREE_DEPTH = 10
"""NumPyro's and Stan's default: at most 2^10 - 1 leapfrog steps a transition."""

START_RADIUS = 2.0
"""Half the width of the box that starts are drawn from, in unconstrained space; NumPyro's and Stan's default."""

START_TRIES = 100
"""NumPyro's number of tries for a start; here every 20 tries halve the box, to reach what is valid near 0 only."""

_BLOCK = 250
"""Transitions that one block can hold."""

_BLOCK_SECONDS = 0.5
"""How long a block should take, so that progress moves and Ctrl-C is heard."""

_OPTIONS = {"xla_cpu_multi_thread_eigen": False}
"""Every chain keeps one core busy; threads within a matrix product would only fight over the same cores."""

_FIRST_BUDGET = 50
"""Leapfrog steps of the first block, when nothing is known of their time."""

Report = Callable[[int, int], None]
"""Called as `report(chain, transitions)` after each block, from the chain's own thread."""


@dataclass(frozen=True)
class Settings:
    """What a chain depends on beside its model and key.

    Attributes:
        warmup: Transitions that adapt step size and mass matrix, and are thrown away.
        draws: Transitions that are kept.
        target_accept: The mean acceptance probability that the step size is adapted to.
    """

    warmup: int
    draws: int
    target_accept: float


@dataclass(frozen=True, eq=False)
class Chain:
    """One finished chain, warm-up left out.

    Attributes:
        z: The chart's latents in unconstrained space, `(draw, ...)`.
        log_density: Log p(x, z) with the Jacobian, `(draw,)`, in nats.
        energy: The Hamiltonian, `(draw,)`, in nats.
        diverging: Whether the transition diverged, `(draw,)`.
        steps: Leapfrog steps of the transition, `(draw,)`.
        gradient_evaluations: Leapfrog steps, warm-up included.
        seconds: Wall-clock seconds.
    """

    z: Mapping[str, np.ndarray]
    log_density: np.ndarray
    energy: np.ndarray
    diverging: np.ndarray
    steps: np.ndarray
    gradient_evaluations: int
    seconds: float


@dataclass(frozen=True, eq=False)
class NoValidStart:
    """A chain that could not begin; `point` is the last start tried, in unconstrained space."""

    point: Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Sampler:
    """A model's two compiled programs, which every chain shares; threads may call them at the same time.

    Attributes:
        start: `start(key, arrays)` gives the first state, whether it is valid, and its point.
        block: `block(state, limit, budget, arrays)` makes up to `limit` transitions and stops early once `budget`
            leapfrog steps are used up; gives the state, the transitions and how many they are. Because the numbers
            are arguments, cutting a chain in other places runs the same program and gives the same draws.
        arrays: The model's data, on the device.
        settings: What was compiled in.
        cost: Compile seconds and memory.
    """

    start: Callable[..., Any]
    block: Callable[..., Any]
    arrays: Mapping[str, Any]
    settings: Settings
    cost: Cost


class _Transitions(NamedTuple):
    z: Any
    log_density: Any
    energy: Any
    diverging: Any
    steps: Any


def lower_sampler(model: Model, settings: Settings, key: jax.Array) -> Callable[[], Sampler]:
    """The sampler of a model in its own chart, in float64, traced; calling the result compiles it, in any thread.

    `key` gives only its type.
    """
    started = time.perf_counter()
    with jax.enable_x64(True):
        arrays = jax.device_put(model.arrays)
        start = jax.jit(_start_program(model, settings)).lower(key, arrays)
        state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), start.out_info[0])
        block = jax.jit(_block_program(model, settings)).lower(state, 0, 0, arrays)
    traced = time.perf_counter() - started

    def compiled() -> Sampler:
        started = time.perf_counter()
        with ThreadPoolExecutor(2) as pool:
            # The start runs once a chain: not worth the compiler's best.
            starting, drawing = pool.map(lambda p, options: p.compile(options), (start, block), (QUICK, _OPTIONS))
        seconds = traced + time.perf_counter() - started
        cost = Cost(seconds, peak_bytes=max(peak_bytes(starting), peak_bytes(drawing)))
        return Sampler(starting, drawing, arrays, settings, cost)

    return compiled


def sample_chain(
    sampler: Sampler, key: jax.Array, chain: int, stop: threading.Event, report: Report
) -> Chain | NoValidStart | None:
    """One chain, or what kept it from starting, or None if `stop` was set before it ended."""
    started = time.perf_counter()
    warmup, total = sampler.settings.warmup, sampler.settings.warmup + sampler.settings.draws
    kept: list[_Transitions] = []
    done, evaluations, budget = 0, 0, _FIRST_BUDGET
    with jax.enable_x64(True):  # holds for one thread only
        state, valid, point = sampler.start(key, sampler.arrays)
        if not valid:
            return NoValidStart(jax.tree.map(np.array, point))
        while done < total:
            if stop.is_set():
                return None
            before = time.perf_counter()
            state, made, count = sampler.block(state, min(_BLOCK, total - done), budget, sampler.arrays)
            made, count = _rows(made, 0, int(count)), int(count)
            steps = int(made.steps.sum())
            budget = max(1, int(_BLOCK_SECONDS * steps / (time.perf_counter() - before)))
            kept.append(_rows(made, max(0, warmup - done), count))
            done, evaluations = done + count, evaluations + steps
            report(chain, count)
    draws = jax.tree.map(lambda *blocks: np.concatenate(blocks), *kept)
    return Chain(**draws._asdict(), gradient_evaluations=evaluations, seconds=time.perf_counter() - started)


def _rows(transitions: _Transitions, first: int, end: int) -> _Transitions:
    return jax.tree.map(lambda table: np.array(table[first:end]), transitions)


def _start_program(model: Model, settings: Settings) -> Callable[..., Any]:
    def start(key: jax.Array, arrays: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        starts, kernel_key = jax.random.split(key)

        def propose(tries: Any) -> Any:
            radius = START_RADIUS * 0.5 ** (tries // (START_TRIES // 5))
            return model.start(jax.random.fold_in(starts, tries), arrays, radius)

        def invalid(point: Any) -> Any:
            value, gradient = jax.value_and_grad(model.log_density)(point, arrays)
            return ~(jnp.isfinite(value) & jnp.isfinite(ravel_pytree(gradient)[0]).all())

        def again(carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
            tries, _, _ = carry
            point = propose(tries)
            return tries + 1, point, invalid(point)

        first = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(propose, 0))
        _, point, failed = jax.lax.while_loop(
            lambda carry: carry[2] & (carry[0] < START_TRIES), again, (0, first, jnp.array(True))
        )
        return _kernel(model, settings, arrays).init(kernel_key, settings.warmup, point), ~failed, point

    return start


def _block_program(model: Model, settings: Settings) -> Callable[..., Any]:
    def block(state: Any, limit: int, budget: int, arrays: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        kernel = _kernel(model, settings, arrays)
        # The kernel learns its potential only in `init`; nothing of this call survives compilation.
        kernel.init(state.rng_key, settings.warmup, state.z)

        def row(state: Any) -> _Transitions:
            return _Transitions(state.z, -state.potential_energy, state.energy, state.diverging, state.num_steps)

        def proceed(carry: Any) -> Any:
            _, _, count, used = carry
            return (count < limit) & (used < budget)

        def transition(carry: Any) -> Any:
            state, rows, count, used = carry
            state = kernel.sample(state, (), {})
            rows = jax.tree.map(lambda table, new: table.at[count].set(new), rows, row(state))
            return state, rows, count + 1, used + state.num_steps

        empty = jax.tree.map(lambda leaf: jnp.zeros((_BLOCK, *jnp.shape(leaf)), leaf.dtype), row(state))
        state, rows, count, _ = jax.lax.while_loop(proceed, transition, (state, empty, 0, 0))
        return state, rows, count

    return block


def _kernel(model: Model, settings: Settings, arrays: Mapping[str, Any]) -> NUTS:
    def potential(z: Mapping[str, Any]) -> Any:
        return -model.log_density(z, arrays)

    return NUTS(potential_fn=potential, target_accept_prob=settings.target_accept, max_tree_depth=MAX_TREE_DEPTH)
