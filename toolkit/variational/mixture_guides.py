"""NumPyro's guide for a mixture of Gaussians in unconstrained space: q(z) = sum over k of w_k N(z; m_k, L_k L_k').

One Gaussian finds one mode of several, and lacks the logarithm of what the others hold; a mixture has a component for
each. With one component, or with all of them equal, it is a full-rank Gaussian: it contains that family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

from toolkit.variational.structured_guides import AutoScaled


class AutoMixtureNormal(AutoScaled):
    """NumPyro's guide for a mixture of multivariate normals.

    Its parameters are `<prefix>_weights` (component,), which sum to one, `<prefix>_locs` (component, size) and
    `<prefix>_scale_trils` (component, size, size). However many components the parameters that it is given have, so
    many it has; the number below is that of its first ones, which all lie at the start.

    Its draws do not move with the weights: NumPyro's SVI has no gradient for it, and `fit` uses a solver of its own
    (`toolkit.variational.mixture_fits`).

    Args:
        model: A NumPyro callable.
        components: How many, to begin with.
        **options: Those of `AutoScaled`: the parameters' prefix, the first location and sd.

    Raises:
        ValueError: There is no component, or the first sd is not positive.
    """

    def __init__(self, model: Callable[..., Any], *, components: int = 2, **options: Any) -> None:
        if components < 1:
            raise ValueError(f"Expected at least one component; got {components}.")
        self.components = components
        super().__init__(model, **options)

    def _get_posterior(self) -> dist.MixtureSameFamily:
        count, kind = self.components, jnp.result_type(self._init_latent)
        weights = numpyro.param(
            f"{self.prefix}_weights", jnp.full(count, 1 / count, kind), constraint=constraints.simplex
        )
        locs = numpyro.param(f"{self.prefix}_locs", jnp.tile(self._init_latent[None], (count, 1)))
        identity = self._init_scale * jnp.identity(self.latent_dim, kind)
        scale_trils = numpyro.param(
            f"{self.prefix}_scale_trils",
            jnp.tile(identity[None], (count, 1, 1)),
            constraint=constraints.softplus_lower_cholesky,
        )
        return _mixture(weights, locs, scale_trils)

    def get_posterior(self, params: Mapping[str, Any]) -> dist.MixtureSameFamily:
        """The distribution of an unconstrained vector in NumPyro's order."""
        return _mixture(*(params[f"{self.prefix}_{part}"] for part in ("weights", "locs", "scale_trils")))


def _mixture(weights: Any, locs: Any, scale_trils: Any) -> dist.MixtureSameFamily:
    normals = dist.MultivariateNormal(jnp.asarray(locs), scale_tril=jnp.asarray(scale_trils))
    return dist.MixtureSameFamily(dist.Categorical(probs=jnp.asarray(weights)), normals)
