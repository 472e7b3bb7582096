"""KL divergence between two distributions that are known, in closed form or over draws."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.constraints import Constraint
from numpyro.distributions.kl import kl_divergence as closed_form

from toolkit.estimate import Estimate

_DRAWS = 100_000
_CATEGORICAL = (dist.CategoricalProbs, dist.CategoricalLogits)


def kl_divergence(
    p: dist.Distribution, q: dist.Distribution, *, key: jax.Array | None = None, draws: int = _DRAWS
) -> Estimate:
    """KL(p || q) = E_p[log p - log q] in nats: with se 0 where NumPyro has a closed form, else over draws of p.

    It is infinite where p can be what q cannot: by their supports, and where q's density is zero at a draw of p. Where
    q's tails are too light for it to be finite, as from a Cauchy to a normal, the mean over draws grows with their
    number, with an error as large as itself.

    Args:
        p: The distribution that is averaged over.
        q: The other; of the same batch shape (), and of the same event shape.
        key: For the draws; only asked for where there is no closed form.
        draws: How many.

    Raises:
        ValueError: The shapes differ or there is a batch, there is no closed form and no key, or densities at draws are
            no numbers.
    """
    if p.batch_shape or q.batch_shape or p.event_shape != q.event_shape:
        raise ValueError(
            f"Expected two single distributions of one event shape; got batches {p.batch_shape} and {q.batch_shape}, "
            f"events {p.event_shape} and {q.event_shape}."
        )
    sizes = [np.shape(law.probs)[-1] for law in (p, q) if isinstance(law, _CATEGORICAL)]
    if len(set(sizes)) > 1:
        raise ValueError(f"Expected two categorical distributions of equally many categories; got {sizes}.")
    with jax.enable_x64(True):
        if not _reaches(q.support, p.support):
            return Estimate(math.inf, 0.0)
        try:
            return Estimate(float(closed_form(p, q)), 0.0)
        except NotImplementedError:
            pass
        if key is None:
            raise ValueError(
                f"Expected a key for draws, since KL({type(p).__name__} || {type(q).__name__}) has no closed form "
                "in NumPyro; got none."
            )
        return _over_draws(p, q, p.sample(key, (draws,)))


def _over_draws(p: dist.Distribution, q: dist.Distribution, seen: Any) -> Estimate:
    """The mean of log p - log q; densities are asked for only where they are defined."""
    if not np.all(p.support(seen)) or not np.isfinite(own := np.asarray(p.log_prob(seen), float)).all():
        raise ValueError(
            f"Expected finite densities of {type(p).__name__} at its own draws; some are rounded to the edge of its "
            "support: take a distribution further from the edge, or its logarithm's."
        )
    if not np.all(q.support(seen)):
        return Estimate(math.inf, 0.0)
    other = np.asarray(q.log_prob(seen), float)
    if np.isnan(other).any() or (other == math.inf).any():
        raise ValueError(
            f"Expected densities of {type(q).__name__} at draws of {type(p).__name__}; some are no numbers."
        )
    return Estimate(math.inf, 0.0) if (other == -math.inf).any() else Estimate.of_mean(own - other)


def _reaches(wide: Constraint, narrow: Constraint) -> bool:
    """Whether a support holds another, so far as their kinds and bounds tell."""
    if wide.is_discrete != narrow.is_discrete:
        return False
    outer, inner = _bounds(wide), _bounds(narrow)
    return outer is None or inner is None or (outer[0] <= inner[0] and inner[1] <= outer[1])


def _bounds(support: Constraint) -> tuple[float, float] | None:
    """The lowest and highest number of a support that is an interval, the same for all elements; None for others."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    low, high = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    if not isinstance(support, type(constraints.real)) and low is None and high is None:
        return None
    ends = np.min(-np.inf if low is None else low), np.max(np.inf if high is None else high)
    return float(ends[0]), float(ends[1])
