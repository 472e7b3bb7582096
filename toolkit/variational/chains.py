"""Gaussians along a chain: block-tridiagonal precisions, and all that is asked of them in time linear in its length.

The coordinates are laid out in blocks along the chain (time), the shared ones (scales, coefficients) last. Where what
happens at a step depends on its neighbours and the shared coordinates alone, the Hessian of log p has the pattern

    P = [ D1  E1'         A1' ]      D  a block: a step, or as many steps as the chain reaches back
        [ E1  D2  E2'     A2' ]      E  of neighbours
        [     E2  D3 ...  A3' ]      A  of a block with the shared coordinates
        [ A1  A2  A3      S   ]      S  of the shared ones

The best Gaussian of all has the precision -E_q[Hessian of log p] (Opper & Archambeau 2009, equation 6), which has this
pattern too: no Gaussian is better than the best of this family. Its Cholesky factor has the pattern's lower half, so
that a factorisation, a draw, a density, a determinant and the covariances inside of the pattern cost a number of
operations proportional to the number of blocks.

References:
    Archer, Park, Buesing, Cunningham & Paninski (2015), Black box variational inference for state space models,
        section 3: Gaussians with block-tridiagonal precisions.
    Tan & Nott (2018), Gaussian variational approximation with sparse precision matrices, Statistics and Computing 28,
        259-275.
    Takahashi, Fagan & Chen (1973), Formation of a sparse bus impedance matrix: the covariances inside of the pattern.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular


@dataclass(frozen=True)
class Chain:
    """How the coordinates of a space lie along a chain; hashable.

    Attributes:
        coordinates: Those of each block, block after block, (blocks * block,); -1 where the first block is padded.
        block: Coordinates in a block.
        shared: Those in no block.
        sites: Whose coordinates lie along the chain.
        along: What they lie along, such as a plate's name; empty if there is no chain.
        lag: How many steps back a step depends on; a block holds as many steps.
        note: Why there is no chain; empty if there is one.

    Raises:
        ValueError: A coordinate is missing or there twice, or blocks do not come out even.
    """

    coordinates: tuple[int, ...]
    block: int
    shared: tuple[int, ...] = ()
    sites: tuple[str, ...] = ()
    along: str = ""
    lag: int = 1
    note: str = ""

    def __post_init__(self) -> None:
        placed = sorted(place for place in (*self.coordinates, *self.shared) if place >= 0)
        if placed != list(range(len(placed))):
            raise ValueError("Expected each coordinate once, in a block or among the shared ones.")
        if self.coordinates and (self.block < 1 or len(self.coordinates) % self.block):
            raise ValueError(f"Expected blocks of {self.block}; got {len(self.coordinates)} coordinates in blocks.")

    @property
    def blocks(self) -> int:
        """How many there are."""
        return len(self.coordinates) // self.block if self.coordinates else 0

    @functools.cached_property
    def size(self) -> int:
        """How many coordinates the space has."""
        return sum(place >= 0 for place in self.coordinates) + len(self.shared)

    @property
    def places(self) -> int:
        """How many places there are: the coordinates and the padding."""
        return len(self.coordinates) + len(self.shared)

    @functools.cached_property
    def order(self) -> np.ndarray:
        """The coordinate at each place, (places,), with `size` for the padding."""
        order = np.array((*self.coordinates, *self.shared), int)
        return np.where(order < 0, self.size, order)

    @functools.cached_property
    def padded(self) -> np.ndarray:
        """Which places are padding, bool (blocks, block)."""
        return np.array(self.coordinates, int).reshape(self.blocks, self.block) < 0

    def into_places(self, vectors: Any) -> Any:
        """Vectors (..., size) as (..., places), zero in the padding."""
        zero = jnp.zeros((*vectors.shape[:-1], 1), vectors.dtype)
        return jnp.concatenate([vectors, zero], axis=-1)[..., self.order]

    def from_places(self, placed: Any) -> Any:
        """The inverse of `into_places`."""
        out = jnp.zeros((*placed.shape[:-1], self.size + 1), placed.dtype)
        return out.at[..., self.order].set(placed)[..., :-1]

    def split(self, placed: Any) -> tuple[Any, Any]:
        """Values (..., places) as those of the blocks, (..., blocks, block), and the shared ones, (..., shared)."""
        local, shared = placed[..., : len(self.coordinates)], placed[..., len(self.coordinates) :]
        return local.reshape(*local.shape[:-1], self.blocks, self.block), shared

    @staticmethod
    def joined(local: Any, shared: Any) -> Any:
        """The inverse of `split`."""
        return jnp.concatenate([local.reshape(*local.shape[:-2], -1), shared], axis=-1)

    @property
    def parameters(self) -> int:
        """How many numbers a Gaussian of this pattern has."""
        blocks, block, shared = self.blocks, self.block, len(self.shared)
        triangles = blocks * block * (block + 1) // 2 + shared * (shared + 1) // 2
        return self.size + triangles + max(blocks - 1, 0) * block**2 + blocks * block * shared

    @property
    def words(self) -> str:
        """A sentence for the report, without a full stop."""
        shared = f"{len(self.shared):,} shared coordinate{'' if len(self.shared) == 1 else 's'}"
        if not self.blocks:
            return f"{shared} in one full block, as in full rank: {self.note}"
        reach = "each coupled to the next" if self.lag == 1 else f"of {self.lag} steps each, coupled to the next"
        text = (
            f"a chain of {self.blocks:,} blocks of {self.block:,} along {self.along} ({', '.join(self.sites)}), {reach}"
        )
        text += f"; {shared} coupled to all" if self.shared else ""
        return text + ("" if self.saves else ", as many as lie along it or more: little is saved over full_rank")

    @property
    def saves(self) -> bool:
        """Whether fewer coordinates are shared than lie along the chain."""
        return len(self.shared) < self.size - len(self.shared)


class Pattern(NamedTuple):
    """A matrix with the pattern of a chain: a symmetric one, of which the lower half is kept, or its Cholesky factor.

    Attributes:
        diagonal: D, (blocks, block, block).
        below: E, (blocks, block, block): entry t is that of block t + 1 with block t; the last one is zero.
        side: A, (blocks, shared, block).
        corner: S, (shared, shared).
    """

    diagonal: Any
    below: Any
    side: Any
    corner: Any


def identity(chain: Chain, scale: float = 1.0) -> Pattern:
    """A multiple of the identity with a chain's pattern; one in the padding."""
    diagonal = np.broadcast_to(scale * np.eye(chain.block), (chain.blocks, chain.block, chain.block)).copy()
    blocks, places = np.nonzero(chain.padded)
    diagonal[blocks, places, places] = 1.0
    shared = len(chain.shared)
    return Pattern(
        diagonal,
        np.zeros_like(diagonal),
        np.zeros((chain.blocks, shared, chain.block)),
        scale * np.eye(shared),
    )


def combined(first: Pattern, second: Pattern, weight: float) -> Pattern:
    """(1 - weight) of one and weight of the other."""
    return Pattern(*((1 - weight) * a + weight * b for a, b in zip(first, second, strict=True)))


def cholesky(matrix: Pattern) -> Pattern:
    """The lower Cholesky factor, with the same pattern; NaN where the matrix is not positive definite."""
    shared, block = matrix.side.shape[1:]

    def step(carry: Any, here: Any) -> tuple[Any, Any]:
        (before, side_before), (diagonal, below, side) = carry, here
        lower = jnp.linalg.cholesky(diagonal - before @ before.T)
        after = solve_triangular(lower, below.T, lower=True).T
        sides = solve_triangular(lower, (side - side_before @ before.T).T, lower=True).T
        return (after, sides), (lower, after, sides)

    start = (jnp.zeros((block, block)), jnp.zeros((shared, block)))
    _, (diagonal, below, side) = jax.lax.scan(step, start, (matrix.diagonal, matrix.below, matrix.side))
    corner = jnp.linalg.cholesky(matrix.corner - jnp.einsum("tgi,thi->gh", side, side)) if shared else matrix.corner
    return Pattern(diagonal, below, side, corner)


def whitened(factor: Pattern, local: Any, shared: Any) -> tuple[Any, Any]:
    """L' x for x in blocks (..., blocks, block) and shared (..., shared): standard normal where x ~ N(0, (L L')^-1)."""
    after = jnp.concatenate([local[..., 1:, :], jnp.zeros_like(local[..., :1, :])], axis=-2)
    white = jnp.einsum("tij,...ti->...tj", factor.diagonal, local) + jnp.einsum("tij,...ti->...tj", factor.below, after)
    return white + jnp.einsum("tgj,...g->...tj", factor.side, shared), shared @ factor.corner


def coloured(factor: Pattern, local: Any, shared: Any) -> tuple[Any, Any]:
    """The vectors x with L' x = e, the inverse of `whitened`: a draw of N(0, (L L')^-1) from standard normals e."""
    shared = _solved(factor.corner, shared, transposed=True)
    inverse = _inverses(factor.diagonal)
    own = jnp.einsum("tji,...tj->...ti", inverse, local - jnp.einsum("tgj,...g->...tj", factor.side, shared))
    # What is left for the steps, one after another, is a product and a sum.
    pull = factor.below @ inverse

    def step(after: Any, here: Any) -> tuple[Any, Any]:
        alone, pulled = here
        found = alone - after @ pulled
        return found, found

    along = jnp.moveaxis(own, -2, 0)
    _, found = jax.lax.scan(step, jnp.zeros_like(along[0]), (along, pull), reverse=True)
    return jnp.moveaxis(found, 0, -2), shared


def solved(factor: Pattern, local: Any, shared: Any) -> tuple[Any, Any]:
    """(L L')^-1 r for r in blocks (blocks, block) and shared (shared,)."""
    inverse = _inverses(factor.diagonal)

    def step(before: Any, here: Any) -> tuple[Any, Any]:
        inverted, below, right = here
        found = inverted @ (right - before)
        return below @ found, found

    _, forward = jax.lax.scan(step, jnp.zeros_like(local[0]), (inverse, factor.below, local))
    corner = _solved(factor.corner, shared - jnp.einsum("tgi,ti->g", factor.side, forward))
    return coloured(factor, forward, corner)


def half_log_determinant(factor: Pattern) -> Any:
    """The sum of the logarithms of a factor's diagonal."""
    inside = jnp.log(jnp.diagonal(factor.diagonal, axis1=-2, axis2=-1)).sum()
    return inside + jnp.log(jnp.diagonal(factor.corner)).sum()


def covariances(factor: Pattern) -> Pattern:
    """The entries of (L L')^-1 inside of the pattern; `side` is that of the shared with a block, as in the matrix."""
    shared, block = factor.side.shape[1:]
    inverse = solve_triangular(factor.corner, jnp.eye(shared), lower=True) if shared else factor.corner
    corner = inverse.T @ inverse

    own = _inverses(factor.diagonal)
    reach = jnp.concatenate([factor.below, factor.side], axis=1) @ own

    def step(carry: Any, here: Any) -> tuple[Any, Any]:
        (after, side_after), (alone, reach) = carry, here
        around = jnp.block([[after, side_after.T], [side_after, corner]])
        across = -around @ reach
        own = alone - reach.T @ across
        return (own, across[block:]), (own, across[:block], across[block:])

    start = (jnp.zeros((block, block)), jnp.zeros((shared, block)))
    _, (diagonal, below, side) = jax.lax.scan(step, start, (own.mT @ own, reach), reverse=True)
    return Pattern(diagonal, below, side, corner)


def _inverses(triangles: Any) -> Any:
    """Of the lower triangles of all blocks, (blocks, block, block)."""
    unit = jnp.broadcast_to(jnp.eye(triangles.shape[-1]), triangles.shape)
    return solve_triangular(triangles, unit, lower=True)


def inner(first: Pattern, second: Pattern) -> Any:
    """The trace of a product of two symmetric matrices, one of which is zero outside of the pattern."""
    twice = (first.below * second.below).sum() + (first.side * second.side).sum()
    return (first.diagonal * second.diagonal).sum() + (first.corner * second.corner).sum() + 2 * twice


def times(matrix: Pattern, local: Any, shared: Any) -> tuple[Any, Any]:
    """A symmetric matrix times vectors in blocks (..., blocks, block) and shared (..., shared)."""
    after = jnp.concatenate([local[..., 1:, :], jnp.zeros_like(local[..., :1, :])], axis=-2)
    own = jnp.einsum("tij,...tj->...ti", matrix.diagonal, local) + jnp.einsum("tij,...ti->...tj", matrix.below, after)
    from_before = jnp.einsum("tij,...tj->...ti", matrix.below, local)[..., :-1, :]
    own = own.at[..., 1:, :].add(from_before) + jnp.einsum("tgj,...g->...tj", matrix.side, shared)
    return own, jnp.einsum("tgj,...tj->...g", matrix.side, local) + shared @ matrix.corner


def log_density(factor: Pattern, local: Any, shared: Any) -> Any:
    """Of N(0, (L L')^-1) in nats, (...), at what lies in blocks (..., blocks, block) and shared (..., shared).

    Padding counts as standard normal coordinates: `padding` says what to take off.
    """
    white, corner = whitened(factor, local, shared)
    places = local.shape[-1] * local.shape[-2] + shared.shape[-1]
    squares = jnp.square(white).sum((-2, -1)) + jnp.square(corner).sum(-1)
    return half_log_determinant(factor) - 0.5 * squares - 0.5 * places * math.log(2 * math.pi)


def padding(chain: Chain) -> float:
    """What the padding, at zero, adds to `log_density`, in nats."""
    return -0.5 * float(chain.padded.sum()) * math.log(2 * math.pi)


def _solved(lower: Any, right: Any, *, transposed: bool = False) -> Any:
    """A lower triangle's inverse, or its transpose's, times each vector (..., n)."""
    if right.shape[-1] == 0:
        return right
    flat = right.reshape(-1, right.shape[-1])
    found = solve_triangular(lower, flat.T, lower=True, trans=1 if transposed else 0).T
    return found.reshape(right.shape)
