"""NumPyro's guide for a model, set up on its data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer import init_to_value
from numpyro.infer.autoguide import (
    AutoContinuous,
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuide,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from numpyro.infer.util import constrain_fn

from toolkit.modelling.model import Model
from toolkit.variational.block_guides import AutoBlockNormal
from toolkit.variational.chain_guides import AutoChainNormal
from toolkit.variational.flow_guides import AutoFlow
from toolkit.variational.guides import Guide
from toolkit.variational.mixture_guides import AutoMixtureNormal

_GAUSSIAN = (
    AutoNormal,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoLowRankMultivariateNormal,
    AutoBlockNormal,
    AutoChainNormal,
)
# They need names, shapes and supports of a model, and not its density.
_ON_OUTLINE = (*_GAUSSIAN, AutoLaplaceApproximation, AutoDelta, AutoFlow, AutoMixtureNormal)


def build_guide(model: Model, guide: Guide, start: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """NumPyro's guide for the model, set up on its data; an autoguide begins at the unconstrained point `start`."""
    program = model.bound(guide.chart)
    built = guide.build(program)
    if not isinstance(built, AutoGuide):
        return built
    with jax.enable_x64(True):
        readable = start is not None and isinstance(built, _ON_OUTLINE)
        outline = _outline(program, model.arrays, start or {}) if readable else None
        if outline is not None:
            _set_up_on_outline(built, outline, model.arrays, start or {})
            return built
        if start is not None:
            constrained = jax.jit(lambda point: constrain_fn(program, (), model.arrays, point))(dict(start))
            # As JAX arrays: a model may index a latent by its data inside a traced program.
            values = {name: jnp.asarray(value) for name, value in constrained.items()}
            built.init_loc_fn = init_to_value(values=values)
        _set_up(built, model.arrays)
    return built


def _set_up(built: AutoGuide, arrays: Mapping[str, Any]) -> None:
    """Let an autoguide read the model's latent sites.

    NumPyro evaluates the density and its gradient there, operation by operation, to check the start; ours is checked,
    and for guides that need no density here, Gaussians and points, it is masked meanwhile: that saves seconds.
    """
    program = built.model
    if isinstance(built, _ON_OUTLINE):
        hidden = handlers.block(program, hide_fn=_is_observed)
        built.model = handlers.mask(hidden, mask=False)
    with handlers.block(), handlers.seed(rng_seed=0):
        built._setup_prototype(**arrays)
    built.model = program


@dataclass(frozen=True)
class _Latent:
    """A latent site: where it may lie, its shapes, the plates around it, and where it begins, constrained."""

    support: Any
    batch: tuple[int, ...]
    event: tuple[int, ...]
    plates: tuple[Any, ...]
    value: jax.Array


@dataclass(frozen=True)
class _Outline:
    """What an autoguide reads of a model.

    Attributes:
        sites: Latent sites by name, and deterministic ones, of which nothing but the name is read.
        replays: Whether a draw's values follow from one another, so that only the model can constrain them.
    """

    sites: Mapping[str, _Latent | None]
    replays: bool

    @property
    def values(self) -> dict[str, jax.Array]:
        """Where each latent begins."""
        return {name: site.value for name, site in self.sites.items() if site}

    def __call__(self, **arrays: Any) -> None:
        """A program with the same latent sites and none of the model's work."""
        for name, site in self.sites.items():
            if site is None:
                numpyro.deterministic(name, jnp.zeros(()))
                continue
            with ExitStack() as stack:
                for frame in site.plates:
                    stack.enter_context(numpyro.plate(frame.name, frame.size, dim=frame.dim))
                numpyro.sample(name, dist.ImproperUniform(site.support, site.batch, site.event))


def _outline(program: Callable[..., Any], arrays: Mapping[str, Any], start: Mapping[str, Any]) -> _Outline | None:
    """The outline of a program, traced and not run; None for one that has more to it than an outline can say.

    That is a program with parameters of its own or subsampled plates.
    """
    trace: dict[str, Any] = {}

    def supports(point: Mapping[str, Any]) -> dict[str, Any]:
        def placed(site: dict[str, Any]) -> Any:
            if site["type"] == "sample" and site["name"] in point:
                return biject_to(site["fn"].support)(point[site["name"]])
            return None

        seeded = handlers.seed(handlers.substitute(program, substitute_fn=placed), rng_seed=0)
        trace.clear()
        trace.update(handlers.trace(seeded).get_trace(**arrays))
        return {name: site["fn"].support for name, site in trace.items() if _is_latent(site)}

    with handlers.block():
        jax.eval_shape(supports, dict(start))
        plates = [site for site in trace.values() if site["type"] == "plate"]
        others = {site["type"] for site in trace.values()} - {"sample", "deterministic", "plate"}
        if others or any(part not in (None, size) for size, part in (plate["args"] for plate in plates)):
            return None
        within = {name: site["fn"].support for name, site in trace.items() if _is_latent(site)}
        depends = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(within))
        if depends:  # one site's support depends on another site
            within = jax.jit(supports)(dict(start))
    sites: dict[str, _Latent | None] = {}
    for name, site in trace.items():
        if _is_latent(site):
            shapes = tuple(site["fn"].batch_shape), tuple(site["fn"].event_shape)
            value = jnp.asarray(biject_to(within[name])(start[name]))
            sites[name] = _Latent(within[name], *shapes, tuple(site["cond_indep_stack"]), value)
        elif site["type"] == "deterministic":
            sites[name] = None
    return _Outline(sites, depends or None in sites.values())


def _is_latent(site: Mapping[str, Any]) -> bool:
    return site["type"] == "sample" and not site["is_observed"]


def _set_up_on_outline(
    built: AutoGuide, outline: _Outline, arrays: Mapping[str, Any], start: Mapping[str, Any]
) -> None:
    """Let an autoguide read an outline of its model instead of the model itself, and only trace it.

    NumPyro runs the model and its density there three times, operation by operation; each kind of operation is compiled
    on its own, which takes seconds. Of all that, a Gaussian or a point keeps names, shapes, supports and plates, and
    the values where it begins, which are known: they take the place of the traced ones.
    """
    program = built.model
    built.init_loc_fn = init_to_value(values=outline.values)
    built.model = handlers.mask(outline, mask=False)
    with handlers.block(), handlers.seed(rng_seed=0):
        if isinstance(built, AutoBlockNormal | AutoChainNormal):  # which look at the density for their structure
            built._setup_prototype(**arrays)
        else:
            jax.eval_shape(lambda: built._setup_prototype(**arrays))
    built.model = program
    # Tracing has put the sites into alphabetical order; NumPyro's is the program's, and so is `Space`'s.
    own = outline.values if isinstance(built, AutoDelta) else start  # a point's parameters are constrained
    built._init_locs = {name: jnp.asarray(own[name]) for name in outline.values}
    if isinstance(built, AutoContinuous):
        built._init_latent = jnp.asarray(np.concatenate([np.ravel(start[name]) for name in built._init_locs]))
        shapes = built._unpack_latent.unpack_fn.keywords["shape_dict"]
        ordered = {name: shapes[name] for name in built._init_locs}
        shapes.clear()
        shapes.update(ordered)
    for name, site in built.prototype_trace.items():
        if name in outline.values:
            site["value"] = outline.values[name]
        elif site["type"] == "deterministic":
            site["value"] = jnp.asarray(0.0)
        site.get("kwargs", {}).pop("rng_key", None)
    if outline.replays:
        built._postprocess_fn = handlers.seed(partial(_replayed, program, arrays), rng_seed=0)


def _replayed(program: Callable[..., Any], arrays: Mapping[str, Any], point: Mapping[str, Any]) -> dict[str, Any]:
    """Constrained values and deterministic sites, from the model: only it knows how one follows from another."""
    hidden = handlers.block(program, hide_fn=_is_observed)
    return constrain_fn(hidden, (), arrays, jax.tree.map(jnp.asarray, dict(point)), return_deterministic=True)


def _is_observed(site: Mapping[str, Any]) -> bool:
    return bool(site.get("is_observed", False))
