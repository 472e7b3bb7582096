"""NumPyro's guide for a model, set up on its data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer import init_to_value
from numpyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoGuide,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from numpyro.infer.util import constrain_fn

from toolkit.modelling.model import Model
from toolkit.variational.block_guides import AutoBlockNormal
from toolkit.variational.guides import Guide

_GAUSSIAN = (AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal, AutoBlockNormal)


def build_guide(model: Model, guide: Guide, start: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """NumPyro's guide for the model, set up on its data; an autoguide begins at the unconstrained point `start`."""
    program = model.bound(guide.chart)
    built = guide.build(program)
    if not isinstance(built, AutoGuide):
        return built
    with jax.enable_x64(True):
        outline = _outline(program, model.arrays, start) if start is not None and isinstance(built, _GAUSSIAN) else None
        if outline is not None:
            _set_up_on_outline(built, outline, model.arrays)
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
    and for the Gaussian guides, which need no density here, it is masked meanwhile: that saves seconds.
    """
    program = built.model
    if isinstance(built, _GAUSSIAN):
        hidden = handlers.block(program, hide_fn=lambda site: site.get("is_observed", False))
        built.model = handlers.mask(hidden, mask=False)
    with handlers.block(), handlers.seed(rng_seed=0):
        built._setup_prototype(**arrays)
    built.model = program


@dataclass(frozen=True)
class _Outline:
    """What a Gaussian autoguide reads of a model: its latent sites, where each may lie, and its plates.

    Attributes:
        sites: Name, type, support, batch and event shape, and plates of each latent or deterministic site, in order.
        values: Where each latent begins, constrained.
    """

    sites: tuple[tuple[str, str, Any, tuple[int, ...], tuple[int, ...], tuple[Any, ...]], ...]
    values: dict[str, jax.Array]

    def __call__(self, **arrays: Any) -> None:
        """A program with the same latent sites and none of the model's work."""
        for name, kind, support, batch, event, plates in self.sites:
            with ExitStack() as stack:
                for frame in plates:
                    stack.enter_context(numpyro.plate(frame.name, frame.size, dim=frame.dim))
                if kind == "sample":
                    numpyro.sample(name, dist.ImproperUniform(support, batch, event))
                else:
                    numpyro.deterministic(name, jnp.zeros(()))


def _outline(program: Callable[..., Any], arrays: Mapping[str, Any], start: Mapping[str, Any]) -> _Outline | None:
    """The outline of a program, traced and not run; None for one that has more to it than an outline can say.

    That is a program with parameters of its own or subsampled plates.
    """
    found: dict[str, Any] = {}
    kinds: set[str] = set()

    def look(point: Mapping[str, Any]) -> dict[str, Any]:
        def placed(site: dict[str, Any]) -> Any:
            if site["type"] == "sample" and site["name"] in point:
                return biject_to(site["fn"].support)(point[site["name"]])
            return None

        seeded = handlers.seed(handlers.substitute(program, substitute_fn=placed), rng_seed=0)
        trace = handlers.trace(seeded).get_trace(**arrays)
        kinds.update(site["type"] for site in trace.values())
        found.clear()
        found.update(
            (name, site)
            for name, site in trace.items()
            if site["type"] == "deterministic" or (site["type"] == "sample" and not site["is_observed"])
        )
        supports = {name: site["fn"].support for name, site in found.items() if site["type"] == "sample"}
        return supports

    with handlers.block():
        supports = jax.eval_shape(look, dict(start))
        frames = [frame for site in found.values() for frame in site.get("cond_indep_stack", ())]
        if not kinds <= {"sample", "deterministic", "plate"} or any(
            frame.size != frame.full_size if hasattr(frame, "full_size") else False for frame in frames
        ):
            return None
        live = {name: site["fn"].support for name, site in found.items() if site["type"] == "sample"}
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(live)):
            live = jax.jit(look)(dict(start))
    del supports
    sites = tuple(
        (
            name,
            site["type"],
            live.get(name),
            tuple(site["fn"].batch_shape) if name in live else (),
            tuple(site["fn"].event_shape) if name in live else (),
            tuple(site.get("cond_indep_stack", ())),
        )
        for name, site in found.items()
    )
    return _Outline(sites, {name: jnp.asarray(biject_to(live[name])(start[name])) for name in live})


def _set_up_on_outline(built: AutoGuide, outline: _Outline, arrays: Mapping[str, Any]) -> None:
    """Let a Gaussian autoguide read an outline of its model instead of the model itself.

    NumPyro runs the model and its density there three times, operation by operation; each kind of operation is compiled
    on its own, which takes seconds. Of all that, a Gaussian autoguide keeps names, shapes, supports and plates.
    """
    program = built.model
    built.init_loc_fn = init_to_value(values=outline.values)
    built.model = handlers.mask(outline, mask=False)
    with handlers.block(), handlers.seed(rng_seed=0):
        built._setup_prototype(**arrays)
    built.model = program
    hidden = handlers.block(program, hide_fn=lambda site: site.get("is_observed", False))
    # Constrained values and deterministic sites come from the model.
    built._postprocess_fn = handlers.seed(
        lambda point: constrain_fn(hidden, (), arrays, point, return_deterministic=True), rng_seed=0
    )
