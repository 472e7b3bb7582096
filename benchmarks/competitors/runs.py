"""What a solver is handed and what it hands back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from competitors.gaussians import Gaussian, Space


@dataclass(frozen=True, eq=False)
class Problem:
    """One posterior and one family: the posterior's name, its `toolkit.Model`, and the guide's name."""

    posterior: str
    model: Any
    guide: str
    space: Space


class Clock:
    """The seconds that count; it runs from the moment it is made, but for what happens in `paused`."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._begun = time.perf_counter()
        self._left_out = 0.0

    @property
    def seconds(self) -> float:
        """Counted so far."""
        return time.perf_counter() - self._begun - self._left_out

    @property
    def expired(self) -> bool:
        """Whether the limit is reached; solvers that work in blocks stop there."""
        return self.seconds >= self.limit

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done here is ours, not the solver's."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._left_out += time.perf_counter() - begun


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The approximation after so many steps and counted seconds."""

    steps: int
    seconds: float
    gaussian: Gaussian


@dataclass(frozen=True, eq=False)
class Run:
    """One call of a solver.

    Attributes:
        snapshots: The approximation on the way, the last one as the solver returned it; none if it returned none.
        gradient_evaluations: Of the log density, at one point each; None where the solver does not tell.
        cut: Whether the solver stopped at the limit, before its budget was spent.
        note: What a reader of the cell should know.
    """

    snapshots: tuple[Snapshot, ...]
    gradient_evaluations: int | None
    cut: bool = False
    note: str = ""


Solve = Callable[[int, Clock], Run]


@dataclass(frozen=True)
class Solver:
    """A way to fit a Gaussian family to a density.

    Attributes:
        name: What table and options call it.
        guides: The families that it fits; one that is its own (Pathfinder's) stands with the family that contains it.
        prepare: Imports what it needs and makes its model, both before the seconds count; the result is called with a
            seed and a clock.
        packages: Import names of what it needs beyond the toolkit.
        covers: Whether it has a program of this posterior.
        verify: Raises unless its program has the model's density; None where it uses the model itself.
        in_float64: Whether it traces the model in float64 alone, as the measuring does.
    """

    name: str
    guides: tuple[str, ...]
    prepare: Callable[[Problem], Solve]
    packages: tuple[str, ...] = ()
    covers: Callable[[str], bool] = lambda posterior: True
    verify: Callable[[Problem], None] | None = None
    in_float64: bool = False


def checkpoints(block: int, steps: int) -> tuple[int, ...]:
    """Step counts at which a run is looked at: `block` doubled again and again, and the last step.

    Raises:
        ValueError: The steps are no whole number of blocks.
    """
    if steps % block:
        raise ValueError(f"Expected a whole number of blocks of {block:,} steps; got {steps:,} steps.")
    counts = [block]
    while 2 * counts[-1] < steps:
        counts.append(2 * counts[-1])
    return (*counts, steps) if counts[-1] < steps else tuple(counts)


def run_blocks(
    advance: Callable[[Any], Any],
    state: Any,
    gaussian: Callable[[Any], Gaussian],
    clock: Clock,
    *,
    block: int,
    steps: int,
    draws: int,
) -> Run:
    """A run of `steps` steps, `block` at a time, with a snapshot at each of the `checkpoints`.

    Args:
        advance: From a state to the one a block later, computed to its end.
        state: The first state.
        gaussian: What a state stands for.
        clock: Runs while `advance` does.
        block: Steps in one call of `advance`.
        steps: The budget.
        draws: Gradient evaluations in one step.
    """
    snapshots, done, wanted = [], 0, checkpoints(block, steps)
    while done < steps and not clock.expired:
        state = advance(state)
        done += block
        seconds = clock.seconds
        # Where the limit cut the run, its last state counts as well.
        if done in wanted or clock.expired:
            with clock.paused():
                snapshots.append(Snapshot(done, seconds, gaussian(state)))
    return Run(tuple(snapshots), done * draws, cut=done < steps)
