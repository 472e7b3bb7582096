"""What a model's callable declares: its sites, read from an abstract trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpyro
from numpyro import handlers
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.transforms import ExpTransform
from numpyro.infer.initialization import init_to_uniform

LATENT, OBSERVED, DETERMINISTIC, FACTOR = "latent", "observed", "deterministic", "factor"


@dataclass(frozen=True)
class Site:
    """One named place in a model's program.

    Attributes:
        name: NumPyro's site name.
        kind: `"latent"`, `"observed"`, `"deterministic"` or `"factor"`.
        shape: Shape of the value.
        plates: The plates around it, outermost first, as (name, size, axis counted from the end of the batch shape).
        event_dims: How many trailing axes belong to one draw from the site's distribution.
        event_names: Names for those axes where the model gives them (`infer={"event_dims": [...]}`).
        distribution: The distribution's class name, or the empty string.
        discrete: Whether a latent site takes discrete values.
        proper: Whether prior draws can be made.
        support: `"real"` where every number is allowed, `"positive"`, `"half-line"`, or the constraint's class
            name.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    plates: tuple[tuple[str, int, int], ...] = ()
    event_dims: int = 0
    event_names: tuple[str, ...] = ()
    distribution: str = ""
    discrete: bool = False
    proper: bool = True
    support: str = ""

    @property
    def dims(self) -> tuple[str, ...]:
        """A name for each axis: the plate's, the model's own, or `<site>_dim_<i>` as ArviZ has it."""
        batch = len(self.shape) - self.event_dims
        names = {batch + axis: plate for plate, _, axis in self.plates}
        names |= {batch + i: name for i, name in enumerate(self.event_names)}
        return tuple(names.get(i, f"{self.name}_dim_{i}") for i in range(len(self.shape)))


def trace_sites(fn: Callable[..., Any], kwargs: Mapping[str, Any]) -> dict[str, Site]:
    """The sites of one run of `fn`, in program order, without computing anything.

    Arrays enter as abstract values, so that the cost does not depend on the data's size.
    """
    sites: dict[str, Site] = {}

    def run(arrays: Mapping[str, Any]) -> int:
        start = handlers.substitute(handlers.seed(fn, rng_seed=0), substitute_fn=improper_start)
        with handlers.block(), handlers.trace() as trace:
            start(**{**kwargs, **arrays})
        sites.update(
            (name, _site(message)) for name, message in trace.items() if message["type"] in ("sample", "deterministic")
        )
        return 0

    jax.eval_shape(run, {name: value for name, value in kwargs.items() if hasattr(value, "dtype")})
    return sites


def improper_start(message: Mapping[str, Any]) -> Any:
    """A value for latent sites without prior draws (flat priors); None leaves the site to its prior."""
    if message["type"] == "sample" and not message["is_observed"] and _is_flat(message["fn"]):
        return init_to_uniform(message)
    return None


def _unwrapped(distribution: Any) -> Any:
    """The distribution without the shells that plates, `to_event` and `mask` put around it."""
    shells = (
        numpyro.distributions.Independent
        | numpyro.distributions.ExpandedDistribution
        | numpyro.distributions.MaskedDistribution
    )
    while isinstance(distribution, shells):
        distribution = distribution.base_dist
    return distribution


def _is_flat(distribution: Any) -> bool:
    """Whether it is an `ImproperUniform`, be it transformed or in shells."""
    base = _unwrapped(distribution)
    while isinstance(base, numpyro.distributions.TransformedDistribution):
        base = _unwrapped(base.base_dist)
    return isinstance(base, numpyro.distributions.ImproperUniform)


def _support(distribution: Any) -> str:
    support = distribution.support
    while isinstance(support, type(constraints.independent(constraints.real, 1))):
        support = support.base_constraint
    known = {"real": constraints.real, "positive": constraints.positive}
    if found := next((name for name, one in known.items() if type(support) is type(one)), ""):
        return found
    parts = [] if support.is_discrete else getattr(biject_to(support), "parts", [biject_to(support)])
    return "half-line" if any(isinstance(part, ExpTransform) for part in parts) else type(support).__name__


def _site(message: Mapping[str, Any]) -> Site:
    shape = tuple(jax.numpy.shape(message["value"]))
    if message["type"] == "deterministic":
        return Site(message["name"], DETERMINISTIC, shape)
    distribution = message["fn"]
    if isinstance(distribution, numpyro.distributions.Unit):
        return Site(message["name"], FACTOR, shape)
    base = _unwrapped(distribution)
    return Site(
        message["name"],
        OBSERVED if message["is_observed"] else LATENT,
        shape,
        plates=tuple(
            (frame.name, frame.size, frame.dim) for frame in sorted(message["cond_indep_stack"], key=lambda f: f.dim)
        ),
        event_dims=distribution.event_dim,
        event_names=tuple(message["infer"].get("event_dims", ())),
        distribution=type(base).__name__,
        discrete=bool(distribution.support.is_discrete),
        proper=not _is_flat(distribution),
        support=_support(distribution),
    )
