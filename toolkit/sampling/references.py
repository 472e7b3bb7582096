"""The reference: draws that guides are held against, with what is known about their worth."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpyro
import pandas as pd

from toolkit.compilation import keep_compiled_programs
from toolkit.cost import Cost
from toolkit.modelling.density import invalid_sites
from toolkit.modelling.model import ExactDraws, Model, Quantity
from toolkit.modelling.scalars import scalars
from toolkit.progress import Progress, silent
from toolkit.sampling.chains import Archive, Results, run_chains
from toolkit.sampling.diagnostics import Evidence, diagnose, energy_fraction, judge
from toolkit.sampling.files import FileDraws, fitted_to_model, read_draws
from toolkit.sampling.modes import tell_disagreement
from toolkit.sampling.nuts import (
    MAX_TREE_DEPTH,
    START_RADIUS,
    START_TRIES,
    Chain,
    NoValidStart,
    Sampler,
    Settings,
    lower_sampler,
)
from toolkit.sampling.posterior import completed, constrained, kept_sites
from toolkit.status import Status
from toolkit.storage import Storage

_MOST_OTHER_LATENTS = 2_000
"""Latent scalars that are no quantity are diagnosed up to this number, which takes ArviZ 6 s."""

_ALONE = " A single chain is judged by its halves: a mode that it has not met is not seen."

_LAYOUT = "2"
"""Part of every stored name: raised when what is stored, or how chains are run, changes."""

_JUDGED = (
    "ArviZ's rank-normalised split R-hat (limit 1.01), bulk and tail ESS (limit 400; Vehtari et al. 2021), divergences "
    "(limit 0) and E-BFMI (limit 0.3; Betancourt 2016) were checked for every quantity and latent."
)


def _no_diagnostics() -> pd.DataFrame:
    return pd.DataFrame(columns=["rhat", "ess_bulk", "ess_tail"], dtype=float).rename_axis("scalar")


@dataclass(frozen=True, eq=False)
class Reference:
    """Draws from the posterior, as good as their status says.

    Attributes:
        model: Whose posterior it is.
        draws: Site name to `(chain, draw, ...)` in float64, constrained and brought to one labelling: every
            quantity's site and every latent; empty if there are none.
        status: How it ended; verdicts may be given only if `status.ok`.
        reasons: One sentence for each failed check.
        diagnostics: R-hat, bulk and tail ESS (columns rhat, ess_bulk, ess_tail), one row for each scalar of the
            quantities and then of the other latents; NaN for one that never varies.
        divergences: Divergent transitions after warm-up; None where a file does not say.
        ebfmi: The energy's Bayesian fraction of missing information, `(chain,)`; None where there is no energy.
        tree_depth_hits: Transitions after warm-up that used the largest tree; None for draws from a file.
        log_density: Log p(x, z) with the Jacobian, `(chain, draw)`, in nats, in the chart's unconstrained space.
        energy: The Hamiltonian, `(chain, draw)`, in nats.
        cost: What it took when it was made.
        origin: Where the draws are from, in a few words.
        chart: The chart that NUTS ran in; the model's own for other draws.
        seed_text: The key that the draws depend on; empty for draws from a file.
        methods: How they were made and judged, as a paragraph.
        modes: Whether its chains disagree for a reason that longer ones do not mend: they sit in different modes, their
            labels have switched, or one is stuck.
        stored: Whether it was taken from storage whole, not made now.
    """

    model: Model
    draws: Mapping[str, np.ndarray]
    status: Status
    reasons: tuple[str, ...] = ()
    diagnostics: pd.DataFrame = field(default_factory=_no_diagnostics)
    divergences: int | None = 0
    ebfmi: np.ndarray | None = None
    tree_depth_hits: int | None = 0
    log_density: np.ndarray | None = None
    energy: np.ndarray | None = None
    cost: Cost = Cost()
    origin: str = ""
    chart: str = "plain"
    seed_text: str = ""
    methods: str = ""
    modes: bool = False
    stored: bool = False

    @property
    def usable(self) -> bool:
        """Whether there are draws at all."""
        return bool(self.draws)


def reference(
    model: Model,
    *,
    key: jax.Array,
    chains: int = 4,
    warmup: int = 1_000,
    draws: int = 1_000,
    chart: str | None = None,
    target_accept: float = 0.9,
    force: bool = False,
    storage: Storage | None = None,
    sampler: Callable[[], Sampler] | None = None,
    progress: Progress = silent,
) -> Reference:
    """Exact draws where the model knows its posterior, else NUTS from dispersed starts, judged.

    Nothing here looks at a guide. With a storage, each chain is kept as it ends: a run that was interrupted goes
    on where it stopped and gives the same draws, bit for bit, as one that was not.

    Args:
        model: What to sample.
        key: A JAX random key.
        chains: How many chains; they share the cores there are.
        warmup: Transitions of each chain that adapt and are thrown away.
        draws: Transitions of each chain that are kept.
        chart: The chart that NUTS runs in; the model's own if None.
        target_accept: The acceptance probability that NUTS adapts its step size to; higher is slower and safer.
        force: Run NUTS even where the posterior is known exactly.
        storage: Where finished work is looked for and kept; nowhere if None.
        sampler: From `prepare_reference`, called with the same arguments; made here if None.
        progress: Called between blocks of transitions; raising from it stops the run.

    Raises:
        ValueError: A number is out of its range, or the model has no such chart.
    """
    _check_numbers(chains, warmup, draws, target_accept)
    keep_compiled_programs()
    if model.exact is not None and not force:
        return _exact(model, model.exact, key, chains, draws)
    charted, settings = _charted(model, chart), Settings(warmup, draws, target_accept)
    name = _name(charted, settings, key)
    origin = f"NUTS, {chains} chains x {draws:,} draws after {warmup:,} warm-up"
    blank = Reference(
        model,
        {},
        Status.FAILED,
        origin=origin,
        chart=charted.chart,
        seed_text=_seed(key),
        methods=_methods(charted, settings, chains),
    )
    entry = _entry(name, model, chains)
    stored = storage.load("reference", entry) if storage else None
    if stored:
        return _unpack(blank, *stored)
    archive = Archive(storage, name) if storage else None
    try:
        results, cost = run_chains(
            charted, settings, key=key, chains=chains, archive=archive, progress=progress, sampler=sampler
        )
        made = _collect(blank, charted, results, cost, chains)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        text = str(error).strip().split("\n")[0]
        return replace(blank, reasons=(f"NUTS stopped with an error of the machine or of JAX: {text}",))
    if storage and made.usable:
        storage.save("reference", entry, *_pack(made))
    return made


def prepare_reference(
    model: Model,
    *,
    key: jax.Array,
    pool: Executor,
    chains: int = 4,
    warmup: int = 1_000,
    draws: int = 1_000,
    chart: str | None = None,
    target_accept: float = 0.9,
    storage: Storage | None = None,
) -> Callable[[], Sampler] | None:
    """What gives the programs of `reference`, compiled in `pool` beside whatever the caller goes on with.

    None where they are not needed: the posterior is known exactly, or the reference is kept in the storage.
    """
    charted, settings = _charted(model, chart), Settings(warmup, draws, target_accept)
    if model.exact is not None:
        return None
    if storage and storage.load("reference", _entry(_name(charted, settings, key), model, chains)):
        return None
    try:
        return pool.submit(lower_sampler(charted, settings, key)).result
    except (jax.errors.JaxRuntimeError, MemoryError):
        return None  # `reference` meets the same error and tells it


def _charted(model: Model, chart: str | None) -> Model:
    return model if chart in (None, model.chart) else model.in_chart(str(chart))


def load_reference(path: str | Path, model: Model) -> Reference:
    """Draws from a file or folder, matched to the model by site name and judged like NUTS's own.

    Deterministic sites that they lack are computed if they hold every latent. Divergences and energy are judged where
    a netCDF file's `sample_stats` group has them.

    Args:
        path: A netCDF file in ArviZ's form, with a `posterior` group and the dims chain and draw; an NPZ file with an
            array `(chain, draw, ...)` for each site, or with `draws` (chain, draw, parameter) and `parameters`; a JSON
            file of posteriordb's reference draws (`.json`, `.json.zip`, `.json.gz`), whose elements are named
            `theta[1]` as in Stan; or a folder with one of these.
        model: Whose posterior the draws are of.

    Raises:
        ValueError: There is no such file, it is in none of these forms, or its draws do not fit the model.
    """
    return _from_elsewhere(read_draws(Path(path), model), model, Path(path).name)


def as_reference(draws: Mapping[str, Any], model: Model, *, origin: str = "draws from elsewhere") -> Reference:
    """Draws at hand as a reference, judged like NUTS's own.

    Args:
        draws: Site name to `(chain, draw, ...)`; every latent at least.
        model: Whose posterior they are of.
        origin: Where they are from, in a few words.

    Raises:
        ValueError: They lack a latent site, have another shape than the model's, or are not finite numbers.
    """
    return _from_elsewhere(fitted_to_model(draws, origin, model), model, origin, read=False)


def _from_elsewhere(loaded: FileDraws, model: Model, name: str, *, read: bool = True) -> Reference:
    sample = next(iter(loaded.sites.values())).shape[:2]
    blank = Reference(
        model,
        {},
        Status.FAILED,
        divergences=loaded.divergences,
        tree_depth_hits=None,
        log_density=loaded.log_density,
        energy=loaded.energy,
        origin=f"draws from {name}" if read else name,
        chart=model.chart,
        methods=(
            f"{sample[0]} chains x {sample[1]:,} draws {f'were read from {name}' if read else f'({name}) were given'} "
            f"and matched to the model by site name{', then relabelled' if model.labels else ''}. {_JUDGED}"
            f"{_ALONE if sample[0] == 1 else ''}"
        ),
    )
    judged = _judged(blank, loaded.sites)
    return replace(judged, status=Status.LOADED) if judged.status is Status.PASSED else judged


def _exact(model: Model, exact: ExactDraws, key: jax.Array, chains: int, draws: int) -> Reference:
    started = time.perf_counter()
    with jax.enable_x64(True):
        rows = {site: np.asarray(values, float) for site, values in exact(key, chains * draws).items()}
    sites = {site: values.reshape(chains, draws, *values.shape[1:]) for site, values in rows.items()}
    cost = Cost(run_seconds=time.perf_counter() - started)
    if set(kept_sites(model)) - set(sites):
        sites, more = completed(model, {name: sites[name] for name in model.latents})
        cost = replace(more, run_seconds=cost.run_seconds + more.run_seconds)
    blank = Reference(
        model,
        {},
        Status.EXACT,
        cost=cost,
        origin=f"{chains * draws:,} exact draws",
        chart=model.chart,
        seed_text=_seed(key),
        methods="Independent draws from the posterior in closed form, which this model knows; NUTS was not run.",
    )
    return replace(_judged(blank, sites), status=Status.EXACT, reasons=())


def _collect(blank: Reference, model: Model, results: Results, cost: Cost, chains: int) -> Reference:
    """The reference from finished chains, or the failed one that says why a chain has no start."""
    for chain, result in results.items():
        if isinstance(result, NoValidStart):
            return _without_start(blank, model, chain, chains, result, cost)
    done = [result for result in results.values() if isinstance(result, Chain)]
    z = {name: np.stack([chain.z[name] for chain in done]) for name in done[0].z}
    sites, more = constrained(model, z)
    steps = np.stack([chain.steps for chain in done])
    held = replace(
        blank,
        divergences=int(sum(chain.diverging.sum() for chain in done)),
        tree_depth_hits=int((steps >= 2**MAX_TREE_DEPTH - 1).sum()),
        log_density=np.stack([chain.log_density for chain in done]),
        energy=np.stack([chain.energy for chain in done]),
        cost=Cost(
            cost.compile_seconds + more.compile_seconds,
            cost.run_seconds + more.run_seconds,
            cost.gradient_evaluations,
            max(cost.peak_bytes, more.peak_bytes),
        ),
    )
    return _judged(held, sites)


def _without_start(
    blank: Reference, model: Model, chain: int, chains: int, result: NoValidStart, cost: Cost
) -> Reference:
    sites = invalid_sites(model, result.point)
    where = "; ".join(sites) or "the gradient is NaN or infinite"
    reason = (
        f"Chain {chain + 1} of {chains} found no point with a finite density and gradient in {START_TRIES} tries; "
        f"at the last {where}: check that the prior allows what the data needs."
    )
    return replace(blank, status=Status.NO_VALID_START, reasons=(reason,), cost=cost)


def _judged(held: Reference, sites: Mapping[str, np.ndarray]) -> Reference:
    """The reference with these draws, relabelled and diagnosed; the rest of `held` is judged with them."""
    model = held.model
    draws = model.labels.relabel(sites) if model.labels else dict(sites)
    parts = [scalars(model, draws), scalars(model, draws, _other_latents(model))]
    names = [name for part in parts for name in part.names]
    values = np.concatenate([part.values for part in parts], axis=-1)
    finite = np.isfinite(values).all(axis=(0, 1))
    ebfmi = None if held.energy is None else energy_fraction(held.energy)
    evidence = Evidence(
        diagnose(names, values),
        not_finite=tuple(name for name, fine in zip(names, finite, strict=True) if not fine),
        transitions=math.prod(values.shape[:2]),
        divergences=held.divergences,
        tree_depth_hits=held.tree_depth_hits or 0,
        ebfmi=ebfmi,
        log_density=held.log_density,
    )
    status, reasons = judge(evidence)
    told = tell_disagreement(model, draws, parts[0]) if status is Status.RHAT else ()
    reasons = (*reasons, *told)
    if reasons and model.flat_priors:
        reasons = (*reasons, _may_be_improper(model.flat_priors))
    judged = replace(held, draws=draws, status=status, reasons=reasons, modes=bool(told))
    return replace(judged, diagnostics=evidence.table, ebfmi=ebfmi)


def _may_be_improper(sites: tuple[str, ...]) -> str:
    return (
        f"The prior of {', '.join(sites)} is flat: the posterior is improper if the data do not hold what is flat, and "
        "then no number of draws lets the chains agree; try a proper prior."
    )


def _other_latents(model: Model) -> tuple[Quantity, ...]:
    """Latents that are no quantity, which are diagnosed too unless there are too many of them."""
    reported = {quantity.site for quantity in model.quantities}
    others = [name for name in model.latents if name not in reported]
    size = sum(math.prod(model.sites[name].shape) for name in others)
    return tuple(Quantity(name) for name in others) if size <= _MOST_OTHER_LATENTS else ()


def _check_numbers(chains: int, warmup: int, draws: int, target_accept: float) -> None:
    least = {"chains": (chains, 2), "warmup": (warmup, 1), "draws": (draws, 8)}
    for name, (value, bound) in least.items():
        if value < bound:
            raise ValueError(f"Expected {name} to be at least {bound}; got {value}.")
    if not 0 < target_accept < 1:
        raise ValueError(f"Expected target_accept between 0 and 1; got {target_accept}.")


def _seed(key: jax.Array) -> str:
    """The key's numbers, whichever of JAX's two forms it has."""
    data = jax.random.key_data(key) if jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    return f"key {' '.join(str(number) for number in np.asarray(data).ravel())}"


def _name(model: Model, settings: Settings, key: jax.Array) -> str:
    """A name for all that a chain's draws depend on but its number."""
    parts = (
        _LAYOUT,
        model.fingerprint(),
        settings,
        START_RADIUS,
        START_TRIES,
        MAX_TREE_DEPTH,
        str(key.dtype),
        _seed(key),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _entry(name: str, model: Model, chains: int) -> str:
    """A name for a whole reference, whose diagnostics and reasons also hold the scalars' names, as coords give them."""
    one = {site: np.zeros((1, 1, *model.sites[site].shape)) for site in kept_sites(model)}
    names = [name for quantities in (None, _other_latents(model)) for name in scalars(model, one, quantities).names]
    return f"{name}-{chains}-{hashlib.sha256(repr(names).encode()).hexdigest()[:16]}"


def _methods(model: Model, settings: Settings, chains: int) -> str:
    return (
        f"NUTS (Hoffman & Gelman 2014) as in NumPyro {numpyro.__version__}, in float64 and the chart '{model.chart}': "
        f"{chains} chains, each started uniformly in [-{START_RADIUS:g}, {START_RADIUS:g}] in every unconstrained "
        f"coordinate, independently of any guide; {settings.warmup:,} transitions of warm-up adapted the step size "
        f"(target acceptance {settings.target_accept:g}) and a diagonal mass matrix, {settings.draws:,} were kept; "
        f"trees up to depth {MAX_TREE_DEPTH}.{' Labels were matched by assignment.' if model.labels else ''} {_JUDGED}"
    )


def _pack(made: Reference) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What the storage keeps of a reference; the model and the words are made anew."""
    arrays = {f"draws/{site}": values for site, values in made.draws.items()}
    arrays |= {
        name: values for name in ("log_density", "energy", "ebfmi") if (values := getattr(made, name)) is not None
    }
    arrays |= {"names": made.diagnostics.index.to_numpy(dtype=str), "diagnostics": made.diagnostics.to_numpy()}
    meta = {name: getattr(made, name) for name in ("reasons", "divergences", "tree_depth_hits", "modes")}
    return arrays, meta | {"status": made.status.name, "cost": asdict(made.cost)}


def _unpack(blank: Reference, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> Reference:
    index = pd.Index(arrays["names"].astype(object), name="scalar")
    return replace(
        blank,
        draws={name.removeprefix("draws/"): v for name, v in arrays.items() if name.startswith("draws/")},
        status=Status[meta["status"]],
        reasons=tuple(meta["reasons"]),
        diagnostics=pd.DataFrame(arrays["diagnostics"], index=index, columns=_no_diagnostics().columns),
        divergences=meta["divergences"],
        tree_depth_hits=meta["tree_depth_hits"],
        modes=meta["modes"],
        cost=Cost(**meta["cost"]),
        log_density=arrays.get("log_density"),
        energy=arrays.get("energy"),
        ebfmi=arrays.get("ebfmi"),
        stored=True,
    )
