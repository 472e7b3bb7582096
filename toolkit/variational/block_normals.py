"""Multivariate normals whose Cholesky factor is zero outside of a pattern, as NumPyro's distributions have it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.linalg import solve_triangular
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.transforms import Transform

from toolkit.variational.blocks import Blocks


class BlockNormal(dist.Distribution):
    """The multivariate normal whose Cholesky factor is lower-triangular in an order of the coordinates.

    Args:
        loc: In the vector's own order, (size,).
        scale_tril: The factor with rows and columns in `order`, (size, size).
        order: `order[k]` is the coordinate at place k.
        validate_args: Whether NumPyro checks the arguments.
    """

    arg_constraints = {"loc": constraints.real_vector, "scale_tril": constraints.lower_cholesky}
    support = constraints.real_vector
    reparametrized_params = ["loc", "scale_tril"]
    pytree_aux_fields = ("order",)

    def __init__(self, loc: Any, scale_tril: Any, order: tuple[int, ...], *, validate_args: bool | None = None) -> None:
        self.loc, self.scale_tril, self.order = loc, scale_tril, order
        super().__init__((), jnp.shape(loc), validate_args=validate_args)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        """Draws, `(*sample_shape, size)`."""
        noise = jax.random.normal(key, (*sample_shape, *self.event_shape), jnp.result_type(self.loc))
        ordered = noise @ self.scale_tril.T
        return self._broadcast(self.loc, ordered) + ordered[..., np.argsort(self.order)]

    @dist.util.validate_sample
    def log_prob(self, value: Any, intermediates: Any = None) -> Any:
        """In nats, `(...)` for values `(..., size)`, in O(size^2) each."""
        size = self.event_shape[0]
        centred = (value - self._broadcast(self.loc, value))[..., np.asarray(self.order)]
        white = solve_triangular(self.scale_tril, centred.reshape(-1, size).T, lower=True)
        squares = jnp.sum(jnp.square(white), axis=0).reshape(centred.shape[:-1])
        return -0.5 * (squares + size * np.log(2 * np.pi)) - jnp.log(jnp.diagonal(self.scale_tril)).sum()

    @property
    def mean(self) -> Any:
        """Shape (size,)."""
        return self.loc

    @property
    def variance(self) -> Any:
        """Shape (size,)."""
        return jnp.square(self.scale_tril).sum(-1)[np.argsort(self.order)]

    @property
    def covariance_matrix(self) -> Any:
        """Shape (size, size)."""
        places = np.argsort(self.order)
        return (self.scale_tril @ self.scale_tril.T)[places[:, None], places[None, :]]

    @staticmethod
    def _broadcast(loc: Any, like: Any) -> Any:
        return jnp.broadcast_to(loc, jnp.broadcast_shapes(jnp.shape(like), jnp.shape(loc)))


class BlockCholesky(constraints.Constraint):
    """Lower-triangular with a positive diagonal, and zero outside of a pattern."""

    event_dim = 2

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks

    def __call__(self, x: Any) -> Any:
        """Whether each factor `(..., size, size)` meets it."""
        outside = jnp.where(self.blocks.pattern, 0.0, x)
        return (outside == 0).all((-2, -1)) & (jnp.diagonal(x, axis1=-2, axis2=-1) > 0).all(-1)

    def feasible_like(self, prototype: Any) -> Any:
        """The identity, in the prototype's shape."""
        return jnp.broadcast_to(jnp.identity(self.blocks.size), jnp.shape(prototype))

    def tree_flatten(self) -> Any:
        """No leaves: the blocks are static."""
        return (), ((), {"blocks": self.blocks})

    def eq(self, other: object, static: bool = False) -> Any:
        """Whether the other is the constraint of the same blocks."""
        return isinstance(other, BlockCholesky) and self.blocks == other.blocks


class _BlockCholeskyTransform(Transform):
    """From the free entries, those below the diagonal and then the diagonal's, to a factor with a pattern.

    As in NumPyro's `ScaledUnitLowerCholeskyTransform`: diag(softplus(d)) (I + strictly lower).
    """

    domain = constraints.real_vector

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks

    @property
    def codomain(self) -> BlockCholesky:
        return BlockCholesky(self.blocks)

    @property
    def _below(self) -> tuple[np.ndarray, ...]:
        return np.nonzero(np.tril(self.blocks.pattern, -1))

    def __call__(self, x: Any) -> Any:
        size, (rows, columns) = self.blocks.size, self._below
        unit = jnp.broadcast_to(jnp.identity(size, x.dtype), (*x.shape[:-1], size, size))
        unit = unit.at[..., rows, columns].set(x[..., :-size])
        return unit * jax.nn.softplus(x[..., -size:])[..., None]

    def _inverse(self, y: Any) -> Any:
        rows, columns = self._below
        diagonal = jnp.diagonal(y, axis1=-2, axis2=-1)
        # softplus^-1(d) = log(e^d - 1), which must not overflow
        free = diagonal + jnp.log(-jnp.expm1(-diagonal))
        return jnp.concatenate([(y / diagonal[..., None])[..., rows, columns], free], axis=-1)

    def log_abs_det_jacobian(self, x: Any, y: Any, intermediates: Any = None) -> Any:
        in_row = np.tril(self.blocks.pattern, -1).sum(1)
        diagonal = jnp.diagonal(y, axis1=-2, axis2=-1)
        scaled = jnp.broadcast_to(jnp.asarray(in_row, y.dtype), diagonal.shape) * jnp.log(diagonal)
        return (scaled + jax.nn.log_sigmoid(x[..., -self.blocks.size :])).sum(-1)

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-1], self.blocks.size, self.blocks.size)

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-2], int(self.blocks.pattern.sum()))

    def tree_flatten(self) -> Any:
        return (), ((), {"blocks": self.blocks})

    def eq(self, other: object, static: bool = False) -> Any:
        return isinstance(other, _BlockCholeskyTransform) and self.blocks == other.blocks


@biject_to.register(BlockCholesky)
def _to_block_cholesky(constraint: BlockCholesky) -> _BlockCholeskyTransform:
    return _BlockCholeskyTransform(constraint.blocks)
