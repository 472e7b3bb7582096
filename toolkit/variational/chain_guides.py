"""NumPyro's guide for a Gaussian along a chain (`toolkit.variational.chains`), and its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.infer.initialization import init_to_uniform

from toolkit.variational.chain_search import chain_of_program, check_chain
from toolkit.variational.chains import (
    Chain,
    Pattern,
    coloured,
    covariances,
    identity,
    log_density,
    padding,
)
from toolkit.variational.structured_guides import AutoStructuredNormal

CHAIN = "chain"
_TRIANGLES = constraints.independent(constraints.lower_cholesky, 1)
_CONSTRAINTS = Pattern(
    _TRIANGLES, constraints.independent(constraints.real, 3), constraints.independent(constraints.real, 3),
    constraints.lower_cholesky,
)  # fmt: skip


class ChainNormal(dist.Distribution):
    """The multivariate normal whose precision has the Cholesky factor of a chain.

    Args:
        loc: In the vector's own order, (size,).
        diagonal: Of the precision's factor, as `Pattern` has it, (blocks, block, block).
        below: (blocks, block, block); the last one does not count.
        side: (blocks, shared, block).
        corner: (shared, shared).
        chain: Where the coordinates lie.
        validate_args: Whether NumPyro checks the arguments.
    """

    arg_constraints = {"loc": constraints.real_vector}
    support = constraints.real_vector
    reparametrized_params = ["loc", *Pattern._fields]
    pytree_data_fields = ("loc", *Pattern._fields)
    pytree_aux_fields = ("chain",)

    def __init__(
        self,
        loc: Any,
        diagonal: Any,
        below: Any,
        side: Any,
        corner: Any,
        *,
        chain: Chain,
        validate_args: bool | None = None,
    ) -> None:
        self.loc, self.chain = loc, chain
        self.diagonal, self.below, self.side, self.corner = diagonal, below, side, corner
        super().__init__((), jnp.shape(loc), validate_args=validate_args)

    @property
    def factor(self) -> Pattern:
        """The precision's Cholesky factor."""
        return Pattern(self.diagonal, self.below.at[-1].set(0.0), self.side, self.corner)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        """Draws, `(*sample_shape, size)`."""
        noise = jax.random.normal(key, (*sample_shape, *self.event_shape), jnp.result_type(self.loc))
        placed = self.chain.joined(*coloured(self.factor, *self.chain.split(self.chain.into_places(noise))))
        return self.chain.from_places(placed) + jnp.broadcast_to(self.loc, noise.shape)

    @dist.util.validate_sample
    def log_prob(self, value: Any, intermediates: Any = None) -> Any:
        """In nats, `(...)` for values `(..., size)`, in O(size) each."""
        apart = self.chain.into_places(value - jnp.broadcast_to(self.loc, jnp.shape(value)))
        return log_density(self.factor, *self.chain.split(apart)) - padding(self.chain)

    @property
    def mean(self) -> Any:
        """Shape (size,)."""
        return self.loc

    @property
    def variance(self) -> Any:
        """Shape (size,)."""
        found = covariances(self.factor)
        local = jnp.diagonal(found.diagonal, axis1=-2, axis2=-1)
        return self.chain.from_places(self.chain.joined(local, jnp.diagonal(found.corner)))


class AutoChainNormal(AutoStructuredNormal):
    """NumPyro's guide for a multivariate normal along a chain, such as the states of a time series.

    Its precision couples each block of the chain with the next one and with the shared coordinates; draws and
    densities cost O(length). Its parameters are `<prefix>_loc`, (size,) in NumPyro's order of the unconstrained
    coordinates, and the precision's Cholesky factor in the four parts of `toolkit.variational.chains.Pattern`:
    `<prefix>_diagonal`, `<prefix>_below`, `<prefix>_side` and `<prefix>_corner`.

    Usage::

        guide = AutoChainNormal(model)  # the chain is found from the model's density
        svi = SVI(model, guide, ...)

    Args:
        model: A NumPyro callable.
        chain: The chain, where it is known already; found by trial (`find_chain`) if None.
        along: The plate, or the site along whose first axis the chain runs; all axes are tried if None.
        prefix: Of the names of parameters.
        init_loc_fn: NumPyro's strategy for the first location.
        init_scale: The first sd of every coordinate, in unconstrained units.

    Attributes:
        chain: The chain in use, once the guide has seen the model.

    Raises:
        ValueError: The first sd is not positive; or, when the guide first sees the model, `along` names nothing in it,
            or the posterior is not Markov along the chain that was given.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        chain: Chain | None = None,
        *,
        along: str | None = None,
        prefix: str = "auto",
        init_loc_fn: Callable[..., Any] = init_to_uniform,
        init_scale: float = 0.1,
    ) -> None:
        if chain is not None and along is not None:
            raise ValueError("Expected chain or along; got both: give along to find_chain.")
        self._given, self.along = chain, along
        super().__init__(model, prefix=prefix, init_loc_fn=init_loc_fn, init_scale=init_scale)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        space = self._space
        if self._given is not None:
            check_chain(self._program, args, kwargs, space, self._given)
        self.chain = self._given or chain_of_program(self._program, args, kwargs, space, self.along)
        if not self.chain.blocks:
            raise ValueError(
                f"Expected a model with a chain; got one without, since {self.chain.note}: take full_rank or coupled."
            )

    def _get_posterior(self) -> ChainNormal:
        loc = numpyro.param(f"{self.prefix}_loc", self._init_latent)
        begin = identity(self.chain, 1 / self._init_scale)
        dtype = jnp.result_type(self._init_latent)
        parts = {
            name: numpyro.param(f"{self.prefix}_{name}", jnp.asarray(part, dtype), constraint=constraint)
            for name, part, constraint in zip(Pattern._fields, begin, _CONSTRAINTS, strict=True)
            if part.size
        }
        return self._normal(loc, parts)

    def _normal(self, loc: Any, parts: Mapping[str, Any]) -> ChainNormal:
        empty = identity(self.chain)
        given = {name: parts.get(name, getattr(empty, name)) for name in Pattern._fields}
        return ChainNormal(loc, *(jnp.asarray(given[name]) for name in Pattern._fields), chain=self.chain)

    def get_posterior(self, params: Mapping[str, Any]) -> ChainNormal:
        """The multivariate normal of an unconstrained vector in NumPyro's order."""
        names = {f"{self.prefix}_{name}": name for name in Pattern._fields}
        parts = {names[name]: value for name, value in params.items() if name in names}
        return self._normal(jnp.asarray(params[f"{self.prefix}_loc"]), parts)


def chain_params(guide: AutoChainNormal, loc: Any, factor: Pattern) -> dict[str, Any]:
    """The guide's parameters for a location (size,) and its precision's Cholesky factor."""
    parts = {f"{guide.prefix}_{name}": np.asarray(part) for name, part in zip(Pattern._fields, factor, strict=True)}
    return {f"{guide.prefix}_loc": np.asarray(loc)} | {name: part for name, part in parts.items() if part.size}
