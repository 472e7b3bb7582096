"""Where a model's density breaks: the sites whose log density is not finite at a point."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from numpyro import handlers
from numpyro.infer.util import compute_log_probs

from toolkit.modelling.model import Model


def invalid_sites(model: Model, unconstrained: Mapping[str, Any]) -> tuple[str, ...]:
    """One clause for each site that breaks the density at a point, such as `site 'y' has a log density of -inf`.

    Args:
        model: Looked at in its own chart, on its own data.
        unconstrained: That chart's latents in unconstrained space.
    """
    with jax.enable_x64(True), handlers.block(), warnings.catch_warnings():
        # That values lie outside a support is what is looked for.
        warnings.simplefilter("ignore", UserWarning)
        try:
            values = model.constrain(unconstrained, model.arrays)
            seeded = handlers.seed(model.bound(), rng_seed=0)
            point = {name: values[name] for name in unconstrained}
            densities, _ = compute_log_probs(seeded, (), model.arrays, point)
        except ValueError as error:  # NumPyro's validation, of a rate that is not a number
            return (f"the program raises '{error}'",)
    return tuple(
        f"site '{name}' has a log density of {float(density):g}"
        for name, density in densities.items()
        if not np.isfinite(density)
    )
