"""Several chains at once, each stored as soon as it ends, all stopped by one Ctrl-C."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace

import jax
import numpy as np

from toolkit.cost import Cost
from toolkit.modelling.model import Model
from toolkit.progress import Progress
from toolkit.sampling.nuts import Chain, NoValidStart, Sampler, Settings, lower_sampler, sample_chain
from toolkit.storage import Storage

Results = dict[int, Chain | NoValidStart]


@dataclass(frozen=True)
class Archive:
    """Where a run's finished chains are kept, under a name made of all that their draws depend on."""

    storage: Storage
    name: str

    def load(self, chain: int) -> Chain | None:
        """The chain as it was saved, or None."""
        entry = self.storage.load("chain", f"{self.name}-{chain}")
        if entry is None:
            return None
        arrays, meta = entry
        z = {name.removeprefix("z/"): values for name, values in arrays.items() if name.startswith("z/")}
        return Chain(
            z=z,
            log_density=arrays["log_density"],
            energy=arrays["energy"],
            diverging=arrays["diverging"],
            steps=arrays["steps"],
            gradient_evaluations=meta["gradient_evaluations"],
            seconds=meta["seconds"],
        )

    def save(self, chain: int, result: Chain) -> None:
        """Keep a finished chain."""
        values = {field.name: getattr(result, field.name) for field in fields(Chain) if field.name != "z"}
        arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
        meta = {name: value for name, value in values.items() if name not in arrays}
        z = {f"z/{name}": value for name, value in result.z.items()}
        self.storage.save("chain", f"{self.name}-{chain}", z | arrays, meta)


def run_chains(
    model: Model,
    settings: Settings,
    *,
    key: jax.Array,
    chains: int,
    archive: Archive | None,
    progress: Progress,
    sampler: Callable[[], Sampler] | None = None,
) -> tuple[Results, Cost]:
    """Chain number to result, and what they cost; where one has no valid start, the others may be missing.

    Chain number c has the key `fold_in(key, c)` and its own dispersed start, so that its draws depend neither on
    the other chains nor on which of them were stored before. A stored chain counts in the cost with the seconds
    that it took then, shared among the cores.

    Args:
        model: Looked at in its own chart.
        settings: Lengths and target acceptance.
        key: A JAX random key.
        chains: How many.
        archive: Where finished chains are looked for and kept; nowhere if None.
        progress: Called from the caller's thread only; an exception that it raises stops every chain.
        sampler: Gives the programs, for this model and these settings; made here if None.
    """
    loaded = {chain: stored for chain in range(chains) if archive and (stored := archive.load(chain))}
    cores = min(chains, _usable_cores())
    cost = Cost(run_seconds=sum(chain.seconds for chain in loaded.values()) / cores)
    results: Results = dict(loaded)
    if len(loaded) < chains:
        ready = (sampler or lower_sampler(model, settings, key))()
        if ready.settings != settings:
            raise ValueError(f"Expected a sampler with {settings}; got one with {ready.settings}.")
        started = time.perf_counter()
        results |= _Crew(ready, key, chains, archive, progress).run(set(range(chains)) - set(loaded))
        cost = replace(ready.cost, run_seconds=cost.run_seconds + time.perf_counter() - started)
    evaluations = sum(chain.gradient_evaluations for chain in results.values() if isinstance(chain, Chain))
    return dict(sorted(results.items())), replace(cost, gradient_evaluations=evaluations)


def _usable_cores() -> int:
    """The cores that this process may use; a container may be given fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, eq=False)
class _Crew:
    """Threads that run the missing chains; compiled programs hold no lock, so each keeps a core busy."""

    sampler: Sampler
    key: jax.Array
    chains: int
    archive: Archive | None
    progress: Progress

    def run(self, missing: set[int]) -> Results:
        stop, events = threading.Event(), queue.SimpleQueue[tuple[int, int]]()

        def work(chain: int) -> Chain | NoValidStart | None:
            result = sample_chain(
                self.sampler, jax.random.fold_in(self.key, chain), chain, stop, lambda *event: events.put(event)
            )
            if self.archive and isinstance(result, Chain):
                self.archive.save(chain, result)
            return result

        with ThreadPoolExecutor(min(len(missing), _usable_cores()), "chain") as pool:
            futures = {chain: pool.submit(work, chain) for chain in sorted(missing)}
            try:
                self._follow(futures, events)
            finally:
                # Whatever ended this, Ctrl-C among it: a chain stops at its next block, one that ended is stored.
                stop.set()
        return {chain: result for chain, future in futures.items() if (result := future.result()) is not None}

    def _follow(
        self, futures: Mapping[int, Future[Chain | NoValidStart | None]], events: queue.SimpleQueue[tuple[int, int]]
    ) -> None:
        """Report the chains' blocks until every chain has ended or one could not go on."""
        settings = self.sampler.settings
        length = settings.warmup + settings.draws
        made = dict.fromkeys(futures, 0)
        before = (self.chains - len(futures)) * length
        while True:
            ended = all(future.done() for future in futures.values())
            try:
                chain, count = events.get(timeout=0.0 if ended else 0.1)
            except queue.Empty:
                if ended or any(future.done() and _lost(future) for future in futures.values()):
                    return
                continue
            made[chain] += count
            phase = "warm-up" if made[chain] < settings.warmup else "draws"
            text = f"chain {chain + 1} of {self.chains}, {phase}"
            self.progress("reference", before + sum(made.values()), self.chains * length, text)


def _lost(future: Future[Chain | NoValidStart | None]) -> bool:
    return future.exception() is not None or isinstance(future.result(), NoValidStart)
