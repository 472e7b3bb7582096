"""What our NumPyro guides share: how they begin, and for Gaussians with structure their margins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax.scipy.special import ndtri
from numpyro.infer.autoguide import AutoContinuous
from numpyro.infer.initialization import init_to_uniform

from toolkit.modelling.space import Space


class AutoScaled(AutoContinuous):
    """A guide in unconstrained space that begins with the same sd in every coordinate.

    Args:
        model: A NumPyro callable.
        prefix: Of the names of parameters.
        init_loc_fn: NumPyro's strategy for the first location.
        init_scale: The first sd of every coordinate, in unconstrained units.

    Raises:
        ValueError: The first sd is not positive.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        prefix: str = "auto",
        init_loc_fn: Callable[..., Any] = init_to_uniform,
        init_scale: float = 0.1,
    ) -> None:
        if init_scale <= 0:
            raise ValueError(f"Expected init_scale above 0; got {init_scale}.")
        self._init_scale = init_scale
        # Whoever masks `model` while the guide is set up leaves the density to be looked at here.
        self._program = model
        super().__init__(model, prefix=prefix, init_loc_fn=init_loc_fn)


class AutoStructuredNormal(AutoScaled):
    """A multivariate normal in unconstrained space whose structure is read from the model's density.

    A subclass has `get_posterior`, whose distribution has `loc` and `variance`, (size,) each. The arguments are those
    of `AutoScaled`.
    """

    @property
    def _space(self) -> Space:
        """The latent sites, in NumPyro's order; once the guide has seen the model."""
        return Space(tuple(self._init_locs), tuple(jnp.shape(value) for value in self._init_locs.values()))

    def median(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Site name to the posterior median of each coordinate."""
        return self._unpack_and_constrain(jnp.asarray(params[f"{self.prefix}_loc"]), params)

    def quantiles(self, params: Mapping[str, Any], quantiles: Any) -> dict[str, Any]:
        """Site name to quantiles of each coordinate, `(*shape of quantiles, ...)`."""
        posterior = self.get_posterior(params)
        apart = jnp.multiply.outer(ndtri(jnp.asarray(quantiles, posterior.loc.dtype)), jnp.sqrt(posterior.variance))
        return self._unpack_and_constrain(jnp.broadcast_to(posterior.loc, apart.shape) + apart, params)
