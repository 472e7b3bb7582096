"""A chart for points on a simplex in which a flat Dirichlet distribution is exactly standard normal."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.scipy.special import erfc, gammaln, ndtri
from jax.scipy.stats import norm
from numpyro.distributions import constraints
from numpyro.distributions.transforms import ParameterFreeTransform
from numpyro.infer.reparam import Reparam


class NormalToSimplex(ParameterFreeTransform):
    """From n - 1 independent standard normals to n shares with a flat Dirichlet distribution.

    Each share takes a part v of what the ones before it left. With m shares still to come, v of a flat Dirichlet is
    Beta(1, m), so that 1 - v is the m-th root of a uniform, here the normal distribution function of -z.
    """

    domain = constraints.real_vector
    codomain = constraints.simplex

    def __call__(self, x: Any) -> Any:
        """Shares `(..., n)` from normals `(..., n - 1)`."""
        return _shares(x)

    def _inverse(self, y: Any) -> Any:
        return _normals(y)

    def log_abs_det_jacobian(self, x: Any, y: Any, intermediates: Any = None) -> Any:
        """Log of the volume that shares (the first n - 1 of them) gain per volume of normals, `(...)`."""
        return _log_volume(x)

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the shares."""
        return (*shape[:-1], shape[-1] + 1)

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the normals."""
        return (*shape[:-1], shape[-1] - 1)


# Compiled whole: NumPyro also runs models operation by operation, and each would be compiled by itself.
@jax.jit
def _shares(x: Any) -> Any:
    log_left = _log_upper_tail(x) / _to_come(x)
    before = jnp.exp(jnp.pad(jnp.cumsum(log_left, axis=-1), _widths(x, 1, 0)))
    return before * jnp.pad(-jnp.expm1(log_left), _widths(x, 0, 1), constant_values=1.0)


@jax.jit
def _normals(y: Any) -> Any:
    # What is left, summed from the small end; each logarithm by the form that does not cancel.
    left = jnp.cumsum(y[..., ::-1], axis=-1)[..., ::-1]
    part = y[..., :-1] / left[..., :-1]
    log_left = jnp.where(part < 0.5, jnp.log1p(-part), jnp.log(left[..., 1:] / left[..., :-1]))
    log_tail = log_left * _to_come(log_left)
    head = -jnp.expm1(log_tail)
    return jnp.where(head < 0.5, ndtri(head), -ndtri(jnp.exp(log_tail)))


@jax.jit
def _log_volume(x: Any) -> Any:
    # The normal density goes to the flat one, which is (n - 1)! everywhere.
    return norm.logpdf(x).sum(-1) - gammaln(x.shape[-1] + 1.0)


def _log_upper_tail(x: Any) -> Any:
    """Log P(Z > x) of a standard normal Z, to full relative precision on both sides.

    (JAX's log_ndtr takes the logarithm of a number close to 1 between 5 and 8 sds.)
    """
    below = x < 0
    # `abs` would have no slope at 0; beyond 37 the tail underflows.
    distance = jnp.minimum(jnp.where(below, -x, x), 37.0)
    tail = erfc(distance / jnp.sqrt(2.0)) / 2
    return jnp.where(below, jnp.log1p(-tail), jnp.log(tail))


def _to_come(x: Any) -> Any:
    size = x.shape[-1]
    return jnp.arange(size, 0, -1.0).reshape((1,) * (x.ndim - 1) + (size,))


def _widths(x: Any, before: int, after: int) -> list[tuple[int, int]]:
    return [(0, 0)] * (x.ndim - 1) + [(before, after)]


class NormalSimplexReparam(Reparam):
    """A chart that samples a simplex-valued site through `NormalToSimplex`; its prior stays as it is."""

    def __call__(self, name: str, fn: dist.Distribution, obs: Any) -> tuple[None, Any]:
        """Sample `<name>_normal` in place of `name`; gives no distribution and the value of `name`."""
        if obs is not None:
            raise ValueError(f"Expected a latent site; got '{name}', which is observed.")
        transform = NormalToSimplex()
        return None, transform(numpyro.sample(f"{name}_normal", dist.TransformedDistribution(fn, transform.inv)))

    def inverse(self, fn: dist.Distribution, value: Any) -> Any:
        """The normals that give the site its value."""
        return NormalToSimplex().inv(value)
