"""Draws of sites in constrained space, from draws of the latents."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from toolkit.compilation import QUICK
from toolkit.cost import Cost
from toolkit.modelling.model import Model

_CHUNK_BYTES = 100e6
"""Memory that draws worked on together may take; an upstream issue reports 321 GiB asked for by one call."""


def kept_sites(model: Model) -> tuple[str, ...]:
    """The sites that draws are kept of: quantities, latents, and what relabelling needs."""
    labelled = (model.labels.by, *model.labels.axes) if model.labels else ()
    return tuple(dict.fromkeys((*(q.site for q in model.quantities), *model.latents, *labelled)))


def constrained(model: Model, z: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], Cost]:
    """The kept sites as `(chain, draw, ...)` in float64, from the chart's latents in unconstrained space."""
    return _mapped(model, lambda point, arrays: model.constrain(point, arrays), z)


def completed(model: Model, latents: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], Cost]:
    """The kept sites as `(chain, draw, ...)` in float64, from the plain chart's latents in constrained space."""
    return _mapped(model, lambda point, arrays: model.values(point, arrays, chart="plain"), latents)


def _mapped(
    model: Model, fn: Callable[..., Mapping[str, Any]], points: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], Cost]:
    sites = kept_sites(model)
    sample = next(iter(points.values())).shape[:2]
    # Twice the program's sites: values and about as much in between. The chunk bounds memory, never the result.
    scalars = sum(math.prod(site.shape) for site in model.sites.values())
    chunk = max(1, min(math.prod(sample), int(_CHUNK_BYTES / (16 * (scalars + 1)))))

    def program(points: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
        def one(point: Mapping[str, Any]) -> dict[str, Any]:
            values = fn(point, arrays)
            return {site: values[site] for site in sites}

        return jax.lax.map(one, points, batch_size=chunk)

    started = time.perf_counter()
    with jax.enable_x64(True):
        flat = {name: values.reshape(-1, *values.shape[2:]) for name, values in points.items()}
        compiled = jax.jit(program).lower(flat, model.arrays).compile(QUICK)
        ready = time.perf_counter()
        rows = {site: np.asarray(values, dtype=np.float64) for site, values in compiled(flat, model.arrays).items()}
    cost = Cost(compile_seconds=ready - started, run_seconds=time.perf_counter() - ready)
    return {site: rows[site].reshape(*sample, *rows[site].shape[1:]) for site in sites}, cost
