"""The whole chain in one call: guides fitted, reference drawn, compared, and written as a report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import jax

from toolkit.comparison.comparisons import Comparison, compare
from toolkit.comparison.corrections import corrections
from toolkit.comparison.decided import draws_wanted
from toolkit.comparison.focus import parse_focus
from toolkit.comparison.verdicts import Thresholds
from toolkit.compilation import keep_compiled_programs
from toolkit.modelling.model import Model
from toolkit.progress import Progress, silent
from toolkit.sampling.references import Reference, prepare_reference, reference
from toolkit.status import Status
from toolkit.storage import Storage
from toolkit.variational.fits import Fit
from toolkit.variational.fitting import AUTO, MAX_GRADIENTS, SOLVERS, check_limits, fit
from toolkit.variational.guides import DEFAULT_GUIDES, Guide, find_guide
from toolkit.variational.keeping import fit_key, keep_fit, kept_fit
from toolkit.variational.nesting import check_nesting, contains, smallest_first
from toolkit.variational.starts import Starts, find_starts

_ELBO_DRAWS = 4_096  # k-hat is had from these draws' weights, too
_LEAST_GUIDE_DRAWS, _MOST_GUIDE_NUMBERS = 10_000, 50_000_000  # 400 MB for each guide
_PACKAGES = ("elbowroom", "numpyro", "jax", "jaxlib", "arviz", "arviz-stats", "optax", "numpy", "scipy", "pandas")


@dataclass(frozen=True, eq=False)
class Study:
    """Everything that was done for one model.

    Attributes:
        model: The model.
        fits: One for each guide, in the order asked for; a guide that failed is among them.
        reference: What the guides were compared with.
        comparison: What differs.
        seed: Makes every random number of the study.
        stages: Wall-clock seconds by stage: tracing, starts, each fit, reference, compare.
        command: Makes the same study again.
        versions: Package name to version.
        machine: Processor, cores and system, without a name.
        resumed: Stages whose result was taken from the cache.
        notes: Sentences on what was met on the way, such as a damaged cache entry that was made again.
    """

    model: Model
    fits: tuple[Fit, ...]
    reference: Reference
    comparison: Comparison
    seed: int
    stages: dict[str, float]
    command: str
    versions: dict[str, str] = field(default_factory=lambda: package_versions())
    machine: str = field(default_factory=lambda: machine_in_words())
    resumed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def write(self, folder: str | Path) -> Path:
        """The path of the report that was written into `folder`, tables, figures and draws beside it.

        Raises:
            ValueError: The folder cannot be written.
        """
        from toolkit.reporting.reports import render  # matplotlib takes a second to import: only when it is used

        return render(self).write(folder)


def study(
    model: Model,
    *,
    guides: Sequence[str | Guide] = DEFAULT_GUIDES,
    focus: Sequence[str] = (),
    seed: int = 0,
    tolerance: float = 0.1,
    max_gradients: int = MAX_GRADIENTS,
    solver: str = AUTO,
    chains: int = 4,
    warmup: int = 1_000,
    draws: int = 1_000,
    chart: str | None = None,
    target_accept: float = 0.9,
    against: Reference | None = None,
    until_decided: int = 0,
    thresholds: Thresholds | None = None,
    storage: Storage | None = None,
    progress: Progress = silent,
    command: str = "",
) -> Study:
    """All guides fitted, the reference drawn, and each guide compared with it.

    A guide that fails, by whatever error, is a row of the comparison with its sentence; the other guides and the
    reference stand. With a storage, what was finished is kept, and the same call after an interruption goes on
    from there with the same numbers.

    Args:
        model: The model.
        guides: Guides, or their names.
        focus: The few quantities that matter: names, indices, contrasts and events, such as `"beta[floor] > 0"`.
        seed: Makes every random number.
        tolerance: The optimisation gap that is good enough, in nats.
        max_gradients: The budget of each guide, in gradients of the log density at one point each.
        solver: How guides are fitted, one of `SOLVERS`; chosen for each guide if `"auto"`.
        chains: NUTS chains.
        warmup: Transitions for adaptation, in each chain.
        draws: Draws kept, in each chain.
        chart: The model's chart in which NUTS runs; the model's own choice if None.
        target_accept: The acceptance probability that NUTS adapts its step size to; higher is slower and safer.
        against: A reference from elsewhere (`load_reference`) instead of NUTS.
        until_decided: Draw the reference again, longer, until each guide is right or wrong in what was asked for, with
            at most so many draws in each chain; also where its checks failed for want of draws. 0 draws it once.
        thresholds: What counts as right; the documented defaults if None.
        storage: Where finished work is kept; nowhere if None. Compiled programs are kept in JAX's own cache either way.
        progress: Called between blocks of work.
        command: What the report names as the command that makes it again.

    Raises:
        ValueError: A guide, a chart, a focus expression or a count is not what it should be.
    """
    chosen = [find_guide(guide, model) for guide in guides]
    command = command or _call(
        guides=tuple(_shown(guide, model) for guide in chosen),
        focus=tuple(focus),
        seed=seed,
        tolerance=tolerance,
        max_gradients=max_gradients,
        solver=solver,
        chains=chains,
        warmup=warmup,
        draws=draws,
        chart=chart,
        target_accept=target_accept,
        until_decided=until_decided,
        thresholds=thresholds,
        against=_Words("the same reference") if against else None,
    )
    if not 0 <= seed < 2**32:
        raise ValueError(f"Expected a seed from 0 to {2**32 - 1:,}; got {seed}.")
    _check(model, chosen, chart, {"chains": (chains, 2), "warmup": (warmup, 1), "draws": (draws, 8)})
    if not 0 < target_accept < 1:
        raise ValueError(f"Expected target_accept between 0 and 1; got {target_accept}.")
    if until_decided and (against or until_decided < draws):
        got = "a reference from elsewhere" if against else f"{until_decided:,} with {draws:,} draws"
        raise ValueError(f"Expected until_decided with NUTS or exact draws, and no less than draws; got {got}.")
    check_limits(tolerance, max_gradients)
    if solver not in SOLVERS:
        raise ValueError(f"Expected solver to be one of {', '.join(SOLVERS)}; got '{solver}'.")
    thresholds = thresholds or Thresholds()
    for text in focus:
        parse_focus(text, model)  # a misspelt name should be heard of before the work, not after it
    keep_compiled_programs()
    met_before = len(storage.damaged) if storage else 0
    key = jax.random.PRNGKey(seed)
    nuts: dict[str, Any] = {
        "key": named_key(key, "reference"),
        "chains": chains,
        "warmup": warmup,
        "draws": draws,
        "chart": chart,
        "target_accept": target_accept,
        "storage": storage,
    }
    work = _Work(model, tuple(chosen), key, tolerance, max_gradients, solver, storage, progress)
    stages, resumed = work.stages, work.resumed
    done = {guide.name: kept for guide in chosen if (kept := work.kept(guide))}
    missing = [guide for guide in chosen if guide.name not in done]
    with _beside() as pool:
        progress("tracing", 0, 1, "NUTS")
        with _timed(stages, "tracing"):
            sampler = None if against else prepare_reference(model, pool=pool, **nuts)
        progress("tracing", 1, 1, "done")
        for guide in smallest_first(missing, model):
            done[guide.name] = work.fitted(guide, tuple(done.values()))
        fits = check_nesting([done[guide.name] for guide in chosen], tolerance)
        with _timed(stages, "reference"):
            drawn = against or reference(model, sampler=sampler, progress=progress, **nuts)
    if drawn.stored:
        resumed.append("reference")
        stages["reference"] = drawn.cost.seconds

    def compared(with_reference: Reference) -> Comparison:
        with _timed(stages, "compare"):
            return compare(
                model,
                with_reference,
                fits,
                key=named_key(key, "compare"),
                draws=_guide_draws(with_reference),
                focus=focus,
                thresholds=thresholds,
                corrections=corrections(fits, key=named_key(key, "corrections")) if with_reference.status.ok else (),
                progress=progress,
            )

    comparison, notes = compared(drawn), list(storage.damaged[met_before:]) if storage else []
    looks = 1
    while until_decided:
        length = next(iter(drawn.draws.values())).shape[1] if drawn.usable else draws
        wanted, why = _longer(drawn, comparison, length, until_decided)
        if wanted is None:
            notes += [f"Drawn until decided: {why}."] if why else []
            break
        notes.append(f"Drawn again with {wanted:,} draws a chain, since {length:,} did not decide.")
        longer = nuts | {"draws": wanted, "warmup": warmup if drawn.status.ok else max(warmup, wanted // 2)}
        with _timed(stages, "reference"):
            drawn = reference(model, progress=progress, **longer)
        comparison, looks = compared(drawn), looks + 1
    if looks > 1:
        notes.append(
            f"Each of the {looks} looks at a longer reference had 95 % intervals of its own: that one of them ended "
            f"the drawing with a wrong verdict on a number is up to {looks} times as likely as in a single look."
        )
    return Study(model, fits, drawn, comparison, seed, stages, command, resumed=tuple(resumed), notes=tuple(notes))


def _guide_draws(drawn: Reference) -> int:
    """Draws of each guide: they are cheap, and enough of them let the reference's error dominate."""
    size = next(iter(drawn.draws.values())).shape[:2] if drawn.usable else (0, 0)
    scalars = max(len(drawn.diagnostics), 1)
    return max(_LEAST_GUIDE_DRAWS, min(5 * size[0] * size[1] // 2, _MOST_GUIDE_NUMBERS // scalars))


def _longer(drawn: Reference, comparison: Comparison, length: int, most: int) -> tuple[int | None, str]:
    """How many draws a chain the next reference needs; None where it is not wanted, with the reason if undecided."""
    if comparison.reference_ok:
        return draws_wanted(comparison.overall.chosen, comparison.table, comparison.focus, length, most)
    if drawn.modes:
        return None, "longer chains do not mend chains that are stuck or sit in different modes"
    if drawn.status not in (Status.RHAT, Status.FEW_DRAWS):
        return None, f"longer chains do not mend it: {drawn.status.value}"
    if length >= most:
        return None, f"the limit of {most:,} draws a chain was reached: {drawn.status.value}"
    return min(most, 4 * length), ""


@dataclass(frozen=True, eq=False)
class _Work:
    """The fits of one study; `stages` and `resumed` tell what they took and what was there already."""

    model: Model
    guides: tuple[Guide, ...]
    key: jax.Array
    tolerance: float
    max_gradients: int
    solver: str
    storage: Storage | None
    progress: Progress
    stages: dict[str, float] = field(default_factory=dict)
    resumed: list[str] = field(default_factory=list)
    starts: dict[str, Starts] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)

    def kept(self, guide: Guide) -> Fit | None:
        """The guide's fit, if an earlier study has kept it."""
        name = self._name(guide)
        fit = kept_fit(self.storage, name, self.model, guide) if self.storage and name else None
        if fit:
            self.resumed.append(f"fit {guide.name}")
            self.stages[f"fit {guide.name}"] = fit.cost.seconds
        return fit

    def fitted(self, guide: Guide, smaller: tuple[Fit, ...]) -> Fit:
        """The fit, or a fit that says why there is none: another guide's work must not be lost to this one's error."""
        try:
            starts = 1 if guide.solve and not guide.from_gaussian else self._starts(guide.chart or self.model.chart)
            with _timed(self.stages, f"fit {guide.name}"):
                fitted = fit(
                    self.model,
                    guide,
                    key=self._key(guide),
                    tolerance=self.tolerance,
                    max_gradients=self.max_gradients,
                    solver=self.solver,
                    starts=starts,
                    smaller=smaller,
                    elbo_draws=_ELBO_DRAWS,
                    progress=self.progress,
                )
        except Exception as error:
            text = (str(error).strip() or type(error).__name__).split("\n")[0]
            return Fit(guide, self.model, Status.FAILED, text)
        name = self._name(guide)
        if self.storage and name:
            keep_fit(self.storage, name, fitted)
        return fitted

    def _key(self, guide: Guide) -> jax.Array:
        return named_key(self.key, f"fit {guide.name}")

    def _name(self, guide: Guide) -> str | None:
        """The name of the guide's kept fit, None where it is not kept.

        What the model computes in the guide's own chart is part of it, and which guides of the panel the fit may not
        end below: with others it might be another.
        """
        inside = [other for other in self.guides if other is not guide and contains(guide, other, self.model)]
        if self.storage is None or not all(other.is_named for other in inside):
            return None
        chart = guide.chart or self.model.chart
        if chart not in self.fingerprints:
            self.fingerprints[chart] = self.model.in_chart(chart).fingerprint()
        settings: dict[str, Any] = {
            "tolerance": self.tolerance,
            "max_gradients": self.max_gradients,
            "solver": self.solver,
            "contains": sorted(other.name for other in inside),
        }
        return fit_key(self.fingerprints[chart], guide, self._key(guide), settings)

    def _starts(self, chart: str) -> Starts:
        """The searches for a mode, which all guides of a chart share."""
        if chart not in self.starts:
            with _timed(self.stages, "starts"):
                self.progress("starts", 0, 1, "searching for modes")
                key = named_key(self.key, f"starts {chart}")
                self.starts[chart] = find_starts(self.model, key=key, chart=chart)
                self.progress("starts", 1, 1, "done")
        return self.starts[chart]


@contextmanager
def _beside() -> Iterator[Executor]:
    """One thread that compiles while the study goes on; whatever ends the study, what waits there is dropped."""
    pool = ThreadPoolExecutor(1, "compile")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


class _Words(str):
    """Text that stands in a call for an object that has no short literal."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{self}>"


def _shown(guide: Guide, model: Model) -> str:
    """A named guide as its name; a user's own as what it is, since its name alone would not be found."""
    return guide.name if guide.is_named or guide in model.guides else _Words(f"your guide {guide.name}")


def _call(**given: Any) -> str:
    """The call that makes the same study again, by the arguments that are not the defaults."""
    parameters = signature(study).parameters
    shown = [
        f"{name}={value!r}" for name, value in given.items() if name == "seed" or value != parameters[name].default
    ]
    return f"toolkit.study(model, {', '.join(shown)})"


def _check(model: Model, guides: Sequence[Guide], chart: str | None, numbers: Mapping[str, tuple[int, int]]) -> None:
    """Misuse is told before any work; `numbers` are values with the least that each may be."""
    if not guides:
        raise ValueError("Expected at least one guide; got none.")
    names = [guide.name for guide in guides]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Expected each guide once; got {', '.join(twice)} more than once.")
    for wanted in (chart, *(guide.chart for guide in guides)):
        if wanted is not None:
            model.bound(wanted)
    for name, (value, least) in numbers.items():
        if value < least:
            raise ValueError(f"Expected {name} to be at least {least}; got {value}.")


def named_key(key: jax.Array, name: str) -> jax.Array:
    """A key of its own for each name, so that adding a guide changes no other guide's numbers."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


@contextmanager
def _timed(stages: dict[str, float], stage: str) -> Iterator[None]:
    begun = time.perf_counter()
    try:
        yield
    finally:
        stages[stage] = stages.get(stage, 0.0) + time.perf_counter() - begun


def package_versions() -> dict[str, str]:
    """Python's version and those of the packages that a study's numbers depend on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}


def machine_in_words() -> str:
    """Processor type, cores that may be used, and system."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} {platform.machine()} cores, {platform.system()}, JAX on {jax.default_backend()}"
