"""A model: a NumPyro callable, its data, and what one wants to know from it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from inspect import Parameter, signature
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer.initialization import init_to_uniform
from numpyro.infer.reparam import Reparam
from numpyro.infer.util import constrain_fn, potential_energy, transform_fn

from toolkit.modelling.dataset import Dataset
from toolkit.modelling.enumeration import SummedOut, sum_out_discrete
from toolkit.modelling.labels import Labels
from toolkit.modelling.once import once_a_chart
from toolkit.modelling.sites import DETERMINISTIC, FACTOR, LATENT, OBSERVED, Site, improper_start, trace_sites

Sites = Mapping[str, Any]
ExactDraws = Callable[[jax.Array, int], Mapping[str, Any]]


@dataclass(frozen=True)
class Quantity:
    """A site that the report speaks of.

    Attributes:
        site: The NumPyro site's name; latent or deterministic.
        label: How the report calls it; the site's name if empty.
        unit: Its unit, such as `"spikes/s"`; empty if it has none.
        dims: Names of its axes, for a deterministic site, whose axes no plate names.
    """

    site: str
    label: str = ""
    unit: str = ""
    dims: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The label, or the site's name where there is none."""
        return self.label or self.site


@dataclass(frozen=True, eq=False)
class Model:
    """A NumPyro callable bound to a dataset.

    The callable is run once, abstractly, when the model is made: what it declares is read from that trace.

    Attributes:
        fn: The NumPyro callable; called with the dataset's arrays and static values by name.
        dataset: What it is conditioned on.
        quantities: What to report; every latent site, and every deterministic site outside the observations'
            plates, if empty.
        charts: Chart name to NumPyro reparameterisers by site: how a guide or NUTS may look at the same
            posterior (centred, non-centred, ...). `"plain"`, the callable as written, is always there.
        chart: The chart that guides and NUTS use unless told otherwise.
        exact: Draws from the posterior where it is known: `exact(key, draws)` gives site name to `(draws, ...)`.
        log_evidence: log p(x) in nats, where it is known.
        labels: What may be relabelled without changing the density, such as topics.
        log_concave: Declares that the posterior density is log-concave in the unconstrained space of the model's own
            chart.
        guides: Guides of its own (`toolkit.Guide`), which can be asked for by name beside the general ones: such as
            coordinate ascent by this model's closed-form updates.
        name: For machines and files; the callable's name if empty.
        title: For the report; the name if empty.
        question: One sentence that the model answers.

    Raises:
        ValueError: The callable cannot run on the data, observes nothing, has a discrete latent that cannot be
            summed out, or a quantity, chart or coordinate does not fit it.
    """

    fn: Callable[..., Any]
    dataset: Dataset
    quantities: tuple[Quantity, ...] = field(default=(), kw_only=True)
    charts: Mapping[str, Mapping[str, Reparam]] = field(default_factory=dict, kw_only=True)
    chart: str = field(default="plain", kw_only=True)
    exact: ExactDraws | None = field(default=None, kw_only=True)
    log_evidence: float | None = field(default=None, kw_only=True)
    labels: Labels | None = field(default=None, kw_only=True)
    log_concave: bool = field(default=False, kw_only=True)
    guides: tuple[Any, ...] = field(default=(), kw_only=True)
    name: str = field(default="", kw_only=True)
    title: str = field(default="", kw_only=True)
    question: str = field(default="", kw_only=True)
    sites: Mapping[str, Site] = field(init=False, repr=False)
    summed_out: tuple[str, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        if not isinstance(self.dataset, Dataset):
            raise ValueError(  # noqa: TRY004 - misuse is a ValueError everywhere
                f"Expected a Dataset; got {type(self.dataset).__name__}: write Dataset('mine', {{'x': x, 'y': y}})."
            )
        put = functools.partial(object.__setattr__, self)
        put("name", self.name or getattr(self.fn, "__name__", "model"))
        put("title", self.title or self.name.replace("_", " "))
        put("charts", {"plain": {}, **{name: dict(config) for name, config in self.charts.items()}})
        _check_arguments(self.fn, self.dataset)
        sites = self._trace(self.fn)
        discrete = tuple(site.name for site in sites.values() if site.kind == LATENT and site.discrete)
        put("sites", sites)
        self._check_plates()
        if discrete:
            put("fn", sum_out_discrete(self.fn, discrete, self.kwargs))
            sites = self._trace(self.fn)
        put("summed_out", self.fn.discrete if isinstance(self.fn, SummedOut) else ())
        put("sites", sites)
        if not any(site.kind in (OBSERVED, FACTOR) for site in sites.values()):
            raise ValueError(
                f"Expected model '{self.name}' to observe something; it has only {', '.join(sites) or 'no sites'}: "
                "give the data as obs= of a numpyro.sample, or add the likelihood with numpyro.factor."
            )
        if not any(site.kind == LATENT for site in sites.values()):
            raise ValueError(f"Expected model '{self.name}' to have a latent site; everything in it is observed.")
        put("quantities", tuple(self.quantities) or self._default_quantities())
        self._check_quantities()
        self._check_coords()
        if self.chart not in self.charts:
            raise ValueError(f"Expected chart to be one of {sorted(self.charts)}; got '{self.chart}'.")

    @property
    def kwargs(self) -> dict[str, Any]:
        """Everything that the callable is called with: static values and arrays."""
        return {**self.dataset.static, **self.dataset.arrays}

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arguments that are traced."""
        return dict(self.dataset.arrays)

    def bound(self, chart: str | None = None) -> Callable[..., Any]:
        """The callable in a chart, with the static values filled in; it takes the arrays by name."""
        chart = self.chart if chart is None else chart
        if chart not in self.charts:
            raise ValueError(
                f"Expected chart to be one of {sorted(self.charts)} for model '{self.name}'; got '{chart}'."
            )
        fn = functools.partial(self.fn, **self.dataset.static)
        return handlers.reparam(fn, config=dict(self.charts[chart])) if self.charts[chart] else fn

    @property
    def latents(self) -> tuple[str, ...]:
        """Names of the latent sites in program order, in the plain chart."""
        return tuple(site.name for site in self.sites.values() if site.kind == LATENT)

    @property
    def observed(self) -> tuple[str, ...]:
        """Names of the observed sites in program order; empty where the likelihood is a factor."""
        return tuple(site.name for site in self.sites.values() if site.kind == OBSERVED)

    @property
    def flat_priors(self) -> tuple[str, ...]:
        """Names of the latent sites whose prior is improper and cannot be drawn from."""
        return tuple(site.name for site in self.sites.values() if site.kind == LATENT and not site.proper)

    @once_a_chart
    def parameters(self, chart: str) -> tuple[str, ...]:
        """Names of the parameters that the callable itself has in a chart, such as a learned degree of centring."""
        names: list[str] = []

        def run(arrays: Sites) -> None:
            with handlers.block(), handlers.trace() as trace:
                handlers.substitute(handlers.seed(self.bound(chart), 0), substitute_fn=improper_start)(**arrays)
            names.extend(name for name, message in trace.items() if message["type"] == "param")

        jax.eval_shape(run, self.arrays)
        return tuple(names)

    def local(self, site: str) -> bool:
        """Whether a latent site has one value for each unit of the data, such as one per document."""
        observed = {plate for name in self.observed for plate, _, _ in self.sites[name].plates}
        return any(plate in observed for plate, _, _ in self.sites[site].plates)

    def dims(self, site: str) -> tuple[str, ...]:
        """Names of a site's axes, from its quantity, its plates, or as ArviZ would name them."""
        given = next((q.dims for q in self.quantities if q.site == site and q.dims), ())
        return given or self.sites[site].dims

    def in_chart(self, chart: str) -> Model:
        """The same model, looked at in another chart unless a guide says otherwise.

        That it is log-concave was declared for its own.
        """
        return replace(self, chart=chart, log_concave=self.log_concave and chart == self.chart)

    def values(
        self, latents: Sites, arrays: Sites, params: Sites | None = None, chart: str | None = None
    ) -> dict[str, Any]:
        """Every latent and deterministic site, from the latent values of one draw in constrained space."""
        fn = handlers.substitute(self.bound(chart), data=_as_jax({**(params or {}), **latents}))
        with handlers.block(), handlers.trace() as trace:
            handlers.seed(fn, rng_seed=0)(**arrays)
        return {
            name: message["value"]
            for name, message in trace.items()
            if message["type"] == "deterministic" or (message["type"] == "sample" and not message["is_observed"])
        }

    def log_density(self, unconstrained: Sites, arrays: Sites, chart: str | None = None) -> Any:
        """Log p(x, z) of one draw in unconstrained space, the Jacobian of the transforms included, in nats."""
        return -potential_energy(self.bound(chart), (), dict(arrays), _as_jax(unconstrained))

    def constrain(
        self, unconstrained: Sites, arrays: Sites, params: Sites | None = None, chart: str | None = None
    ) -> dict[str, Any]:
        """Every latent and deterministic site, from the latent values of one draw in unconstrained space."""
        bound = handlers.substitute(self.bound(chart), data=dict(params or {}))
        latents = constrain_fn(bound, (), dict(arrays), _as_jax(unconstrained), return_deterministic=True)
        return dict(latents)

    def start(self, key: jax.Array, arrays: Sites, radius: float = 2.0, chart: str | None = None) -> dict[str, Any]:
        """A point in unconstrained space, uniform in [-radius, radius] in every latent coordinate."""
        seeded = handlers.seed(self.bound(chart), rng_seed=key)
        with handlers.block(), handlers.trace() as trace:
            handlers.substitute(seeded, substitute_fn=init_to_uniform(radius=radius))(**arrays)
        latents = {n: m for n, m in trace.items() if m["type"] == "sample" and not m["is_observed"]}
        inverse = {name: biject_to(message["fn"].support) for name, message in latents.items()}
        return transform_fn(inverse, {name: message["value"] for name, message in latents.items()}, invert=True)

    def fingerprint(self) -> str:
        """A hash of what the model computes, its data and settings; the same in every process.

        Taken from the lowered program of density and sites, so that an edit to a helper function counts and a
        renamed variable or a comment does not.
        """

        def program(unconstrained: Sites, arrays: Sites) -> tuple[Any, dict[str, Any]]:
            return self.log_density(unconstrained, arrays), self.constrain(unconstrained, arrays)

        with jax.enable_x64(True):
            point = jax.eval_shape(lambda: self.start(jax.random.PRNGKey(0), self.arrays))
            text = jax.jit(program).lower(point, self.arrays).as_text()
        digest = hashlib.sha256(text.encode())
        digest.update(repr((jax.__version__, numpyro.__version__, self.chart, self.labels, self.quantities)).encode())
        for name, array in sorted(self.dataset.arrays.items()):
            digest.update(f"{name}{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def _trace(self, fn: Callable[..., Any]) -> dict[str, Site]:
        try:
            return trace_sites(fn, self.kwargs)
        except Exception as error:  # the callable is the user's, and may raise anything
            text = f"{type(error).__name__}: {str(error).strip()}".split("\n")[0]
            # Arrays are traced: their values are not there when NumPy, a size or a branch asks for them.
            if isinstance(error, jax.errors.TracerArrayConversionError):
                text += " Use jax.numpy for what is computed from data and latents."
            elif isinstance(error, jax.errors.ConcretizationTypeError | jax.errors.TracerIntegerConversionError):
                text += " A value that decides a size or a branch belongs to the dataset's static values, static={...}."
            raise ValueError(
                f"Expected model '{self.name}' to run on dataset '{self.dataset.name}'; it stops with {text}"
            ) from error

    def _check_plates(self) -> None:
        """NumPyro compares an observation with its plates only when the density is computed."""
        for site in self.sites.values():
            batch = site.shape[: len(site.shape) - site.event_dims]
            for plate, size, axis in site.plates:
                if -axis <= len(batch) and batch[axis] not in (1, size):
                    raise ValueError(
                        f"Expected {size:,} values of site '{site.name}' along plate '{plate}' of model "
                        f"'{self.name}'; got {batch[axis]:,}: give the plate the size of its data."
                    )

    def _default_quantities(self) -> tuple[Quantity, ...]:
        observed = [self.sites[name].shape for name in self.observed]
        latent = [Quantity(name) for name in self.latents]
        derived = [
            Quantity(site.name)
            for site in self.sites.values()
            if site.kind == DETERMINISTIC and site.shape not in [shape for shape in observed if shape]
        ]
        return tuple(latent + derived)

    def _check_quantities(self) -> None:
        known = [site.name for site in self.sites.values() if site.kind in (LATENT, DETERMINISTIC)]
        for quantity in self.quantities:
            if quantity.site not in known:
                raise ValueError(
                    f"Expected a quantity to be a latent or deterministic site, one of {known}; got '{quantity.site}'."
                )
            rank = len(self.sites[quantity.site].shape)
            if quantity.dims and len(quantity.dims) != rank:
                raise ValueError(f"Expected {rank} dims for quantity '{quantity.site}'; got {quantity.dims}.")

    def _check_coords(self) -> None:
        for name in (*self.latents, *(q.site for q in self.quantities)):
            for dim, size in zip(self.dims(name), self.sites[name].shape, strict=True):
                labels = self.dataset.coords.get(dim)
                if labels is not None and len(labels) != size:
                    raise ValueError(
                        f"Expected {size} coords for dimension '{dim}' of site '{name}'; "
                        f"dataset '{self.dataset.name}' has {len(labels)}."
                    )
                names, counts = np.unique(np.array([] if labels is None else labels).astype(str), return_counts=True)
                if (counts > 1).any():
                    raise ValueError(
                        f"Expected each coord of dimension '{dim}' of site '{name}' once; dataset "
                        f"'{self.dataset.name}' has '{names[counts.argmax()]}' {counts.max()} times: tables and focus "
                        "could not tell them apart."
                    )


def _as_jax(values: Sites) -> dict[str, Any]:
    """Values as JAX arrays: inside of a `scan` a model's values are looked up by a traced step."""
    return {name: jax.tree.map(jnp.asarray, value) for name, value in values.items()}


def _check_arguments(fn: Callable[..., Any], dataset: Dataset) -> None:
    parameters = signature(fn).parameters.values()
    given = {*dataset.arrays, *dataset.static}
    if not any(p.kind is Parameter.VAR_KEYWORD for p in parameters):
        unknown = sorted(given - {p.name for p in parameters})
        if unknown:
            raise ValueError(
                f"Expected dataset '{dataset.name}' to hold arguments of '{getattr(fn, '__name__', 'the model')}' "
                f"({', '.join(p.name for p in parameters)}); it also holds {', '.join(unknown)}."
            )
    needed: Iterable[Parameter] = (
        p
        for p in parameters
        if p.default is Parameter.empty and p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    )
    missing = [p.name for p in needed if p.name not in given]
    if missing:
        raise ValueError(
            f"Expected dataset '{dataset.name}' to hold {', '.join(map(repr, missing))} "
            f"for '{getattr(fn, '__name__', 'the model')}'."
        )
