"""NumPyro's guide for a model, set up on its data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from numpyro import handlers
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
