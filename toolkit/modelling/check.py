"""A ladder of checks for a model, which stops at the first broken rung and says what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer.util import log_density, transform_fn

from toolkit.modelling.dataset import Dataset
from toolkit.modelling.density import invalid_sites
from toolkit.modelling.enumeration import sum_out_discrete
from toolkit.modelling.labels import Labels
from toolkit.modelling.model import Model
from toolkit.modelling.sites import FACTOR, LATENT, OBSERVED, trace_sites

RUNS = "runs on the data"
DISCRETE = "has no discrete latent left over"
OBSERVES = "observes something"
INFERS = "has something to infer"
COORDS = "has coords that fit its plates"
INDICES = "looks up only entries that are there"
DENSITY = "has a finite density"
GRADIENT = "has a finite gradient"
LABELS = "has labels that may switch"
PRIOR = "can be drawn from"

_POINTS = 10
"""How many prior draws, and how many dispersed starts, the density is tried at."""

_FILLS = "FILL_OR_DROP"
"""How JAX names, in a traced program, indexing that fills or drops what is not there."""

_ROUNDING = 1e-9
"""Of a log density: by less than that, two sums of the same terms in different orders may differ."""


@dataclass(frozen=True)
class Rung:
    """One check: its name continues "the model ...", and `message` says what was found or what to do."""

    name: str
    passed: bool
    message: str


def check(model: Model | Callable[..., Any], dataset: Dataset | None = None) -> tuple[Rung, ...]:
    """The rungs that were climbed, the last of them broken if the model is not ready for a study.

    Args:
        model: A model, or a NumPyro callable that has not become one yet.
        dataset: What the callable is to be conditioned on.

    Raises:
        ValueError: A callable without a dataset, or a model with one.
    """
    if isinstance(model, Model) is (dataset is not None):
        raise ValueError(
            "Expected a Model alone, or a NumPyro callable with the Dataset to condition it on; got "
            f"{'both a Model and a Dataset' if dataset else 'a callable alone'}."
        )
    rungs: list[Rung] = []
    for rung in _climb(model, dataset):
        rungs.append(rung)
        if not rung.passed:
            break
    return tuple(rungs)


def _climb(model: Model | Callable[..., Any], dataset: Dataset | None) -> Iterator[Rung]:
    if not isinstance(model, Model):
        fn, data = model, dataset or Dataset("", {})
        try:
            model = Model(fn, data)
        except ValueError as error:
            yield from _up_to(_broken(fn, data), str(error))
            return
    yield from _declared(model)
    points = _points(model)
    yield _indices(model, points)
    values, gradients = _densities(model, points)
    finite = np.isfinite(values)
    yield _density(model, points, finite)
    yield _gradient(gradients, finite)
    if model.labels is not None:
        yield _exchangeable(model, model.labels, points, finite)
    yield _prior(model)


def _broken(fn: Callable[..., Any], dataset: Dataset) -> str:
    """Which rung a callable that makes no Model stands on; in the order in which Model looks."""
    kwargs = {**dataset.static, **dataset.arrays}
    try:
        sites = trace_sites(fn, kwargs)
    except Exception:  # whatever the user's own code raises; Model has put it into words
        return RUNS
    discrete = tuple(site.name for site in sites.values() if site.kind == LATENT and site.discrete)
    if discrete:
        try:
            sites = trace_sites(sum_out_discrete(fn, discrete, kwargs), kwargs)
        except Exception:  # again the user's code, or what NumPyro says of it
            return DISCRETE
    kinds = {site.kind for site in sites.values()}
    if not kinds & {OBSERVED, FACTOR}:
        return OBSERVES
    return COORDS if LATENT in kinds else INFERS


def _up_to(broken: str, message: str) -> Iterator[Rung]:
    for name in (RUNS, DISCRETE, OBSERVES, INFERS, COORDS):
        if name == broken:
            yield Rung(name, False, message)
            return
        yield Rung(name, True, "")


def _declared(model: Model) -> Iterator[Rung]:
    """What a Model has made sure of already."""
    yield Rung(RUNS, True, f"on dataset '{model.dataset.name}'")
    summed = ", ".join(model.summed_out)
    yield Rung(DISCRETE, True, f"{summed} summed out by enumeration" if summed else "every latent is continuous")
    yield Rung(OBSERVES, True, ", ".join(model.observed) or "its likelihood is a factor")
    size = sum(int(np.prod(model.sites[name].shape)) for name in model.latents)
    yield Rung(INFERS, True, f"{', '.join(model.latents)} ({size:,} scalars)")
    dims = dict.fromkeys(dim for q in model.quantities for dim in model.dims(q.site) if dim in model.dataset.coords)
    yield Rung(COORDS, True, f"labels for {', '.join(dims)}" if dims else "no dimension is labelled")


def _points(model: Model) -> dict[str, Any]:
    """Points in unconstrained space, `(point, ...)`: prior draws where the prior is proper, then dispersed starts."""

    def from_prior(key: jax.Array) -> dict[str, Any]:
        with handlers.block(), handlers.trace() as trace:
            handlers.seed(model.bound(), rng_seed=key)(**model.arrays)
        latents = {n: m for n, m in trace.items() if m["type"] == "sample" and not m["is_observed"]}
        inverse = {name: biject_to(message["fn"].support) for name, message in latents.items()}
        return transform_fn(inverse, {name: message["value"] for name, message in latents.items()}, invert=True)

    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.PRNGKey(0), 2 * _POINTS)
        starts = jax.vmap(lambda key: model.start(key, model.arrays))(keys[_POINTS:])
        if model.flat_priors:
            return starts
        return jax.tree.map(lambda *rows: jnp.concatenate(rows), jax.vmap(from_prior)(keys[:_POINTS]), starts)


def index_past_its_array(model: Model) -> str:
    """What is wrong with an index at a dispersed start, as a sentence; empty where nothing is, or it cannot be told."""
    with jax.enable_x64(True):
        start = model.start(jax.random.PRNGKey(0), model.arrays)
    rung = _indices(model, {name: jnp.asarray(value)[None] for name, value in start.items()})
    return "" if rung.passed else rung.message


def _indices(model: Model, points: Mapping[str, Any]) -> Rung:
    """Whether an index runs past its array, where JAX takes the last entry and says nothing.

    Where some indexing fills or drops what is not there, as `jnp.take` does or is asked to, the check cannot tell.
    """
    checked = checkify.checkify(lambda point, arrays: model.log_density(point, arrays), errors=checkify.index_checks)
    point = {name: values[-1] for name, values in points.items()}
    try:
        with jax.enable_x64(True):
            if _FILLS in str(jax.make_jaxpr(model.log_density)(point, model.arrays)):
                return Rung(INDICES, True, "not checked: some indexing fills or drops what is not there")
            outcome, _ = jax.jit(checked)(point, model.arrays)
    except NotImplementedError as error:  # an operation through which JAX cannot carry the check
        return Rung(INDICES, True, f"not checked: {str(error).strip()}".split("\n")[0])
    found = outcome.get()
    if found is None:
        return Rung(INDICES, True, "at a dispersed start")
    return Rung(
        INDICES,
        False,
        f"Expected every index to lie within its array; got {found.split(chr(10))[0].strip().rstrip('.')}: JAX would "
        "take the last entry instead and not say so. Give the plate as many elements as the data have groups, counted "
        "from 0.",
    )


def _exchangeable(model: Model, labels: Labels, points: Mapping[str, Any], finite: np.ndarray) -> Rung:
    """Whether the density is the same in other orders of the labels that the model declares."""
    carriers = [site for site in labels.axes if site in model.latents]
    unknown = sorted(set(labels.axes) - set(model.sites))
    if unknown:
        return Rung(LABELS, False, f"Expected labels on sites of the model; it has no site {', '.join(unknown)}.")
    if not carriers:
        return Rung(LABELS, True, "not checked: no latent is among the sites with labels")
    swap = [1, 0, *range(2, labels.count)]
    # From these two all orders can be made.
    orders = dict.fromkeys((tuple(swap), tuple(np.roll(range(labels.count), 1).tolist())))
    with jax.enable_x64(True), handlers.block():
        here = int(np.flatnonzero(finite)[-1])
        every = model.constrain({name: values[here] for name, values in points.items()}, model.arrays)
        values = {name: np.asarray(every[name]) for name in model.latents}
        density = jax.jit(lambda latents, arrays: log_density(model.bound("plain"), (), arrays, latents)[0])
        level = float(density(values, model.arrays))
        try:
            others = [float(density(labels.permuted(values, order), model.arrays)) for order in orders]
        except ValueError as error:
            return Rung(LABELS, False, str(error))
    change = max((other - level for other in others), key=lambda d: abs(d) if np.isfinite(d) else np.inf)
    if abs(change) <= _ROUNDING * (1 + abs(level)):
        return Rung(LABELS, True, f"the density is the same in other orders of {', '.join(labels.axes)}")
    return Rung(
        LABELS,
        False,
        f"Expected the same density in every order of the {labels.count} labels of {', '.join(carriers)}; another "
        f"order changes it by {change:.3g} nats: declare every latent that carries the label with its right axis, and "
        "give all labels one prior, or take the declaration away.",
    )


def _densities(model: Model, points: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Log densities `(point,)` and their gradients by site, `(point, ...)`."""

    def one(point: Mapping[str, Any], arrays: Mapping[str, Any]) -> Any:
        return jax.value_and_grad(model.log_density)(point, arrays)

    with jax.enable_x64(True):
        values, gradients = jax.jit(jax.vmap(one, in_axes=(0, None)))(points, model.arrays)
    return np.asarray(values), {name: np.asarray(gradient) for name, gradient in gradients.items()}


def _density(model: Model, points: Mapping[str, Any], finite: np.ndarray) -> Rung:
    found = f"at {_count(finite[-_POINTS:])} dispersed starts"
    if len(finite) > _POINTS:
        found = f"at {_count(finite[:_POINTS])} prior draws and {found}"
    if finite.any():
        return Rung(DENSITY, True, found)
    last = {name: values[-1] for name, values in points.items()}
    where = "; ".join(invalid_sites(model, last)) or "the sum over sites is not finite"
    return Rung(
        DENSITY,
        False,
        f"Expected a finite log density somewhere; it is finite {found}. At the last of them: {where}. Check that each "
        "prior's support covers what the sites below it need, and that the data lies in its distribution's support.",
    )


def _gradient(gradients: Mapping[str, np.ndarray], finite: np.ndarray) -> Rung:
    fine = {name: np.isfinite(rows).reshape(len(finite), -1).all(axis=1) for name, rows in gradients.items()}
    good = np.logical_and.reduce(list(fine.values())) & finite
    if good.any():
        return Rung(GRADIENT, True, f"at {int(good.sum())} of the {int(finite.sum())} points with a finite density")
    bad = ", ".join(f"'{name}'" for name, rows in fine.items() if not rows[finite].any())
    return Rung(
        GRADIENT,
        False,
        f"Expected a finite gradient of the log density somewhere; it is NaN or infinite at all {int(finite.sum())} "
        f"points with a finite density, by site {bad or 'in turn'}: look for a square root, a norm or a division at 0, "
        "or a jnp.where whose unused branch is not finite.",
    )


def _prior(model: Model) -> Rung:
    """Never broken: what cannot be drawn is legitimate, and left out of the report."""
    if model.flat_priors:
        sites = ", ".join(model.flat_priors)
        return Rung(PRIOR, True, f"not from its prior, which is flat for {sites}: prior draws are left out")
    if not model.observed:
        return Rung(PRIOR, True, "prior draws only; its likelihood is a factor: predictive draws are left out")
    parameters = signature(model.fn).parameters
    fixed = [name for name in model.observed if name not in parameters or parameters[name].default is not None]
    if fixed:
        return Rung(
            PRIOR,
            True,
            f"prior draws only; no argument of the site's name with default None for {', '.join(fixed)}: predictive "
            "draws are left out",
        )
    return Rung(PRIOR, True, "prior and predictive draws")


def _count(finite: np.ndarray) -> str:
    return f"{int(finite.sum())} of {len(finite)}"
