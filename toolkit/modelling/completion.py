"""All sites of many draws, from their latents, by one compiled program for every guide of a model."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from numpyro import handlers

from toolkit.compilation import QUICK
from toolkit.modelling.model import Model

BATCH = 64  # draws that are computed side by side
_KEPT = 8  # programs of a model

_programs: weakref.WeakKeyDictionary[Model, dict[Any, Any]] = weakref.WeakKeyDictionary()


def complete(
    model: Model,
    latents: Mapping[str, np.ndarray],
    *,
    params: Mapping[str, Any],
    chart: str,
    sites: tuple[str, ...] | None = None,
) -> dict[str, np.ndarray]:
    """Latent and deterministic sites, `(draws, ...)` each, in constrained space.

    Args:
        model: The model.
        latents: The chart's latents, `(draws, ...)` each, in constrained space; whole batches of `BATCH` draws compile
            soonest.
        params: Values of the parameters that the model itself has in this chart; others are ignored.
        chart: Which chart.
        sites: Which sites; all if None. What is not asked for is not computed.

    Raises:
        ValueError: A site is unknown.
    """
    with jax.enable_x64(True):
        one = {name: value[0] for name, value in latents.items()}
        own = {name: value for name, value in params.items() if name in _parameters(model, one, chart)}
        given = (dict(latents), own, model.arrays)
        shapes = tuple((name, value.shape, str(value.dtype)) for name, value in latents.items())
        programs = _programs.setdefault(model, {})
        program = programs.pop((chart, sites, shapes), None) or _compiled(model, chart, sites, given)
        programs[chart, sites, shapes] = program  # behind all others: the one used longest ago goes first
        if len(programs) > _KEPT:
            programs.pop(next(iter(programs)))
        values = jax.device_get(program(*given))
    return {name: np.asarray(value) for name, value in values.items()}


def _compiled(model: Model, chart: str, sites: tuple[str, ...] | None, given: tuple[Any, ...]) -> Any:
    def many(latents: Any, params: Any, arrays: Any) -> Any:
        def one(latents: Any) -> dict[str, Any]:
            values = model.values(latents, arrays, params, chart)
            unknown = sorted(set(sites or ()) - set(values))
            if unknown:
                raise ValueError(f"Expected sites of model '{model.name}', {sorted(values)}; got {unknown}.")
            return {name: value for name, value in values.items() if sites is None or name in sites}

        return jax.lax.map(one, latents, batch_size=BATCH)

    return jax.jit(many).lower(*given).compile(QUICK)


def _parameters(model: Model, latents: Mapping[str, Any], chart: str) -> set[str]:
    """The names of the model's own parameters in a chart, such as a learned degree of centring."""
    names: set[str] = set()

    def run(latents: Any, arrays: Any) -> None:
        program = handlers.substitute(model.bound(chart), data=latents)
        trace = handlers.trace(handlers.seed(program, 0)).get_trace(**arrays)
        names.update(name for name, site in trace.items() if site["type"] == "param")

    jax.eval_shape(run, dict(latents), model.arrays)
    return names
