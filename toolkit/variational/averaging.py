"""What noisy gradients cost in nats when steps are averaged, by estimator.

Averaged steps on n noisy gradients end, at best, 1/2 tr(H^-1 C) / n nats below the optimum: C is the covariance of one
gradient there, H minus the ELBO's Hessian, both in all parameters. No choice of step sizes does better to this order,
so that it is a bound for what could be reached, and no promise that it is.

References:
    Polyak & Juditsky (1992), Acceleration of stochastic approximation by averaging, theorem 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from toolkit.compilation import QUICK
from toolkit.estimate import Estimate
from toolkit.modelling.completion import BATCH
from toolkit.modelling.model import Model
from toolkit.variational.draws import check_key
from toolkit.variational.fits import Fit
from toolkit.variational.gradient_estimators import (
    BATCHES,
    ESTIMATORS,
    NEED_OTHERS,
    REPARAMETERISED,
    Pieces,
    by_leaving_out,
    estimates_of,
)
from toolkit.variational.gradients import place
from toolkit.variational.guide_gradients import guide_gradients
from toolkit.variational.guides import Guide, find_guide


def averaging_costs(
    model: Model,
    guide: str | Guide,
    *,
    key: jax.Array,
    at: Fit | Mapping[str, Any],
    draws: int = 64,
    repeats: int = 400,
) -> dict[str, Estimate]:
    """By estimator, 1/2 tr(H^-1 C) in nats for gradients of one draw each: over n draws, what averaged steps leave.

    Those with a baseline are taken as they are with `draws` of them behind one gradient, of which C is so many times
    as large.

    Args:
        model: The model.
        guide: A `Guide`, or its name.
        key: Random key.
        at: An optimum: a fit of this guide, or parameters as in `gradient_noise`.
        draws: How many draws a gradient is made from, at least 2.
        repeats: How many gradients are compared, at least 80; rounded up to a multiple of 40.

    Raises:
        ValueError: An argument is not what it should be, the guide has no reparameterised draws, a gradient is not
            finite, or the ELBO does not bend down in all directions there.
    """
    guide = find_guide(guide, model)
    check_key(key)
    if draws < 2 or repeats < 2 * BATCHES:
        raise ValueError(f"Expected at least 2 draws and {2 * BATCHES} repeats; got {draws} and {repeats}.")
    program, params, guide = place(model, guide, at)
    with jax.enable_x64(True):
        found = guide_gradients(model, guide, program, params)
        if REPARAMETERISED in found.absent:
            raise ValueError(
                f"Expected a guide whose draws move with its parameters; of '{guide.name}': "
                f"{found.absent[REPARAMETERISED]}."
            )
        rows = -(-repeats // BATCHES)

        def one(key: Any) -> Any:
            value, score, path = found.single(found.vector, key)
            return value, score, path, jax.jacfwd(lambda v: found.single(v, key)[2])(found.vector)

        def batch(keys: Any) -> Any:
            value, score, path, bends = jax.lax.map(one, keys, batch_size=BATCH)
            return value, score, path, bends.mean(0)

        keys = jax.random.split(key, BATCHES * rows * draws)
        keys = keys.reshape(BATCHES, rows * draws, *keys.shape[1:])
        run = jax.jit(batch).lower(keys[0]).compile(QUICK)
        pieces = [jax.device_get(run(some)) for some in keys]
    known = [name for name in ESTIMATORS if name not in found.absent]
    curvature = -np.stack([piece[3] for piece in pieces])
    gradients = {
        name: [_gradients(name, value, score, path, draws) for value, score, path, _ in pieces] for name in known
    }
    if not all(np.isfinite(part).all() for parts in (*gradients.values(), [curvature]) for part in parts):
        raise ValueError(f"Expected finite gradients of '{guide.name}'; some draws have none.")
    return {name: _cost(np.stack(own), curvature, guide.name) for name, own in gradients.items()}


def _gradients(name: str, value: Any, score: Any, path: Any, draws: int) -> np.ndarray:
    """Independent gradients (gradient, parameter), scaled so that they vary as those of one draw."""
    count = draws if name in NEED_OTHERS else 1
    parts = [part if part is None else part.reshape(-1, count, part.shape[1]) for part in (score, path)]
    return np.asarray(count**0.5 * estimates_of(name, Pieces(value.reshape(-1, count), *parts)))


def _cost(gradients: np.ndarray, curvature: np.ndarray, name: str) -> Estimate:
    """From gradients (batch, gradient, parameter) and curvatures (batch, parameter, parameter)."""

    def cost(kept: np.ndarray) -> float:
        h = curvature[kept].mean(0)
        h = (h + h.T) / 2
        if not np.linalg.eigvalsh(h)[0] > 0:
            raise ValueError(f"Expected an optimum, where the ELBO bends down in all directions; '{name}' is at none.")
        c = np.cov(gradients[kept].reshape(-1, gradients.shape[-1]), rowvar=False).reshape(h.shape)
        return 0.5 * float(np.trace(np.linalg.solve(h, c)))

    batches = np.arange(len(gradients))
    return by_leaving_out(cost(batches), np.array([cost(batches[batches != left]) for left in batches]))
