"""KL divergence between two distributions that are known, in closed form or over draws."""

from __future__ import annotations

import math

import jax
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions.kl import kl_divergence as closed_form

from toolkit.estimate import Estimate

_DRAWS = 100_000


def kl_divergence(
    p: dist.Distribution, q: dist.Distribution, *, key: jax.Array | None = None, draws: int = _DRAWS
) -> Estimate:
    """KL(p || q) = E_p[log p - log q] in nats: with se 0 where NumPyro has a closed form, else over draws of p.

    It is infinite where q gives no probability to what p can be. Where q's tails are too light for it to be finite, as
    from a Cauchy to a normal, the mean over draws grows with their number, with an error as large as itself.

    Args:
        p: The distribution that is averaged over.
        q: The other; of the same batch shape (), and of the same event shape.
        key: For the draws; only asked for where there is no closed form.
        draws: How many.

    Raises:
        ValueError: The shapes differ or there is a batch, or there is no closed form and no key.
    """
    if p.batch_shape or q.batch_shape or p.event_shape != q.event_shape:
        raise ValueError(
            f"Expected two single distributions of one event shape; got batches {p.batch_shape} and {q.batch_shape}, "
            f"events {p.event_shape} and {q.event_shape}."
        )
    with jax.enable_x64(True):
        try:
            return Estimate(float(closed_form(p, q)), 0.0)
        except NotImplementedError:
            pass
        if key is None:
            raise ValueError(
                f"Expected a key for draws, since KL({type(p).__name__} || {type(q).__name__}) has no closed form "
                "in NumPyro; got none."
            )
        seen = p.sample(key, (draws,))
        differences = np.asarray(p.log_prob(seen) - q.log_prob(seen), float)
    return Estimate.of_mean(differences) if np.isfinite(differences).all() else Estimate(math.inf, math.nan)
