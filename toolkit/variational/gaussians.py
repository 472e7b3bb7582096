"""Gaussian families as functions of standard normal base draws, in coordinates in which each is easy to climb.

A member is a vector of dimensionless parameters, zero at the frame: the family's best approximation of a Gaussian with
a given location and precision. There the ELBO's curvature is about one in every parameter, whatever the model's units
and correlations (exactly so for a location and a Cholesky factor, where the posterior is Gaussian).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import scipy.linalg

_LOG_2PI = float(np.log(2 * np.pi))
_ROUNDING = 1e-14  # of a matrix with a unit diagonal: a smaller eigenvalue may as well be negative
DENSE_LIMIT = 1_500  # dimensions: a matrix of 18 MB, and about a second for its decomposition


@dataclass(frozen=True)
class Quadratic:
    """h(z) = gradient (z - centre) - (z - centre)' precision (z - centre) / 2, in nats.

    Its mean over any Gaussian is known, which makes it a control variate: what is left of log p to be averaged over
    draws is only what is not quadratic. With the means of log p's gradient and Hessian over q it is the projection of
    log p on quadratics in L2(q), by Stein's identities, and no other quadratic leaves less variance.

    Attributes:
        centre: Shape (size,).
        gradient: Shape (size,).
        precision: Shape (size, size), or (size,) where only a diagonal is known; need not be positive definite.
    """

    centre: np.ndarray
    gradient: np.ndarray
    precision: np.ndarray

    def at(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values (n,) and gradients (n, size) at points (n, size)."""
        apart = points - self.centre
        pulled = self.times(apart)
        return apart @ self.gradient - 0.5 * np.einsum("ni,ni->n", apart, pulled), self.gradient - pulled

    def times(self, vectors: np.ndarray) -> np.ndarray:
        """`vectors @ precision`, for vectors (..., size)."""
        return vectors * self.precision if self.precision.ndim == 1 else vectors @ self.precision

    def at_one(self, point: np.ndarray) -> tuple[float, np.ndarray]:
        """Value and gradient (size,) at a point (size,)."""
        values, gradients = self.at(point[None])
        return float(values[0]), gradients[0]

    @property
    def diagonal(self) -> np.ndarray:
        """The precision's diagonal (size,)."""
        return self.precision if self.precision.ndim == 1 else np.diag(self.precision)


@dataclass(frozen=True)
class Member:
    """A Gaussian of a family: where it lies and what one of its draws is made of.

    Attributes:
        loc: Shape (size,).
        scale: Shape (size,), for a diagonal or low-rank covariance: S in S (I + W W') S, of either sign; None
            otherwise.
        columns: W, shape (size, rank), for a low-rank covariance; None otherwise.
        factor: A square root of the covariance by which draws are made, (size, size), lower-triangular once its rows
            are in the family's order; None where draws need none.
    """

    loc: np.ndarray
    scale: np.ndarray | None = None
    columns: np.ndarray | None = None
    factor: np.ndarray | None = None

    @property
    def variances(self) -> np.ndarray:
        """Shape (size,)."""
        if self.factor is not None:
            return np.einsum("ij,ij->i", self.factor, self.factor)
        spread = 1.0 if self.columns is None else 1 + np.einsum("ir,ir->i", self.columns, self.columns)
        return _scale(self) ** 2 * spread

    def covariance(self) -> np.ndarray:
        """Shape (size, size)."""
        if self.factor is not None:
            return self.factor @ self.factor.T
        covariance = np.diag(_scale(self) ** 2)
        if self.columns is not None:
            scaled = _scale(self)[:, None] * self.columns
            covariance += scaled @ scaled.T
        return covariance

    def log_density(self, points: np.ndarray) -> np.ndarray:
        """At points (n, size), shape (n,)."""
        apart = points - self.loc
        if self.factor is not None:
            white, log_volume = np.linalg.solve(self.factor, apart.T).T, float(np.linalg.slogdet(self.factor)[1])
            squares = np.einsum("ni,ni->n", white, white)
        else:
            white, log_volume = apart / _scale(self), float(np.log(np.abs(_scale(self))).sum())
            squares = np.einsum("ni,ni->n", white, white)
            if self.columns is not None:
                spread = _Spread(self.columns)
                squares -= np.square(white @ spread.left) @ spread.share
                log_volume += spread.log_volume
        return -0.5 * squares - log_volume - 0.5 * len(self.loc) * math.log(2 * math.pi)


class Family(Protocol):
    """A set of Gaussians, each named by a vector of parameters.

    Attributes:
        size: Coordinates of a draw.
        base: Standard normal numbers that a draw takes.
        parameters: How many parameters a member has.
    """

    size: int
    base: int
    parameters: int

    def member(self, x: np.ndarray) -> Member:
        """The Gaussian of these parameters (parameters,)."""
        ...

    def undrawn(self, x: np.ndarray) -> Member:
        """The same Gaussian without what only its draws need, where that is dear: enough for `exact`."""
        ...

    def near(self, member: Member) -> np.ndarray:
        """The parameters of a Gaussian that lies in the family."""
        ...

    def points(self, member: Member, base: np.ndarray) -> np.ndarray:
        """Draws (n, size), one for each row of base (n, base)."""
        ...

    def scores(self, member: Member, base: np.ndarray) -> np.ndarray:
        """Minus the gradient of log q at the draws, covariance^-1 (z - loc), (n, size)."""
        ...

    def pull(self, x: np.ndarray, member: Member, base: np.ndarray, gradients: np.ndarray) -> np.ndarray:
        """The gradient (parameters,) of a mean over draws, from its gradients at the draws (n, size)."""
        ...

    def mean(self, members: Sequence[np.ndarray]) -> np.ndarray:
        """Parameters in the middle of several near each other."""
        ...

    def entropy(self, member: Member) -> float:
        """In nats."""
        ...

    def exact(self, x: np.ndarray, member: Member, quadratic: Quadratic) -> tuple[float, np.ndarray]:
        """Entropy plus the mean of a quadratic over the member, in nats, and its gradient (parameters,)."""
        ...

    def bend(self, x: np.ndarray, quadratic: Quadratic) -> np.ndarray | None:
        """Minus the Hessian of `exact` in the parameters behind the shifts; None where it is about one."""
        ...


@dataclass(frozen=True)
class Frame:
    """Where a family's parameters are zero, and what they are measured with.

    Attributes:
        loc: Shape (size,).
        precision: Of the Gaussian that the frame follows, (size, size), or its diagonal (size,).
        factor: The lower Cholesky factor of its covariance, (size, size), or the sds (size,).
    """

    loc: np.ndarray
    precision: np.ndarray
    factor: np.ndarray

    @classmethod
    def of(cls, loc: np.ndarray, precision: np.ndarray) -> Frame:
        """The frame of N(loc, precision^-1)."""
        if precision.ndim == 1:
            return cls(loc, precision, precision**-0.5)
        precision = _invertible(precision)
        return cls(loc, precision, inverse_factor(precision))

    def move(self, shift: np.ndarray) -> np.ndarray:
        """A vector (size,), or columns (size, n), in the model's units from one in the frame's."""
        return (self.factor * shift.T).T if self.factor.ndim == 1 else self.factor @ shift

    def pull(self, gradient: np.ndarray) -> np.ndarray:
        """The gradient in the frame's units from one in the model's."""
        return (self.factor * gradient.T).T if self.factor.ndim == 1 else self.factor.T @ gradient

    def measure(self, vector: np.ndarray) -> np.ndarray:
        """A vector in the frame's units from one in the model's."""
        if self.factor.ndim == 1:
            return (vector.T / self.factor).T
        return scipy.linalg.solve_triangular(self.factor, vector, lower=True)

    @property
    def diagonal(self) -> np.ndarray:
        """The precision's diagonal (size,)."""
        return self.precision if self.precision.ndim == 1 else np.diag(self.precision)


def _invertible(precision: np.ndarray) -> np.ndarray:
    """The matrix, or one whose flattest directions are bent as much as rounding may have taken away."""
    units = np.diag(precision) ** -0.5
    scaled = precision * np.outer(units, units)
    try:
        scipy.linalg.cholesky(scaled - _ROUNDING * np.eye(len(scaled)), lower=True, check_finite=False)
    except scipy.linalg.LinAlgError:
        values, vectors = scipy.linalg.eigh(scaled)
        return (vectors * np.maximum(values, 10 * _ROUNDING)) @ vectors.T / np.outer(units, units)
    return precision


def inverse_factor(precision: np.ndarray) -> np.ndarray:
    """The lower Cholesky factor of the inverse of a positive definite matrix."""
    # With the order of coordinates reversed, the inverse of an upper factor is a lower one of the inverse.
    upper = scipy.linalg.cholesky(precision[::-1, ::-1], lower=True, check_finite=False)
    inverse = scipy.linalg.solve_triangular(upper, np.eye(len(precision)), lower=True, check_finite=False)
    return np.ascontiguousarray(inverse.T[::-1, ::-1])


_LEAST_SCALE = 1e-6  # of the frame's: W = B / S must be a number
_SCALES, _SPRINT, _SEVERAL_SCALES = 8, 10, 100  # beginnings, rounds from each, dimensions in which they are cheap
_ROOT_2 = float(np.sqrt(2.0))  # a log scale's curvature is 2: in these units it is 1


class Diagonal:
    """Independent coordinates: a location and log sds.

    Args:
        frame: What the parameters are measured with.
    """

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        self.size = self.base = len(frame.loc)
        self.parameters = 2 * self.size
        # The best factorised Gaussian has the precision's diagonal (Bishop 2006, section 10.1.2).
        self._scale = frame.diagonal**-0.5

    def member(self, x: np.ndarray) -> Member:
        """The Gaussian of these parameters."""
        shift, log_scale = np.split(x, 2)
        return Member(self._frame.loc + self._frame.move(shift), self._scale * np.exp(log_scale / _ROOT_2))

    undrawn = member

    def near(self, member: Member) -> np.ndarray:
        """The parameters of a diagonal Gaussian."""
        shift = self._frame.measure(member.loc - self._frame.loc)
        return np.concatenate([shift, _ROOT_2 * np.log(_scale(member) / self._scale)])

    def points(self, member: Member, base: np.ndarray) -> np.ndarray:
        """Draws."""
        return member.loc + _scale(member) * base

    def scores(self, member: Member, base: np.ndarray) -> np.ndarray:
        """Minus the gradient of log q at the draws."""
        return base / _scale(member)

    def pull(self, x: np.ndarray, member: Member, base: np.ndarray, gradients: np.ndarray) -> np.ndarray:
        """The gradient of a mean over draws."""
        by_scale = _scale(member) * np.einsum("ni,ni->i", gradients, base) / len(base)
        return np.concatenate([self._frame.pull(gradients.mean(0)), by_scale / _ROOT_2])

    def mean(self, members: Sequence[np.ndarray]) -> np.ndarray:
        """Parameters in the middle."""
        return np.mean(members, axis=0)

    def entropy(self, member: Member) -> float:
        """In nats."""
        return float(np.log(_scale(member)).sum()) + 0.5 * self.size * (1 + _LOG_2PI)

    def exact(self, x: np.ndarray, member: Member, quadratic: Quadratic) -> tuple[float, np.ndarray]:
        """Entropy plus the mean of a quadratic."""
        value, by_loc = quadratic.at_one(member.loc)
        spread = quadratic.diagonal * _scale(member) ** 2
        gradient = np.concatenate([self._frame.pull(by_loc), (1 - spread) / _ROOT_2])
        return value + self.entropy(member) - 0.5 * float(spread.sum()), gradient

    def bend(self, x: np.ndarray, quadratic: Quadratic) -> None:
        """None: in these parameters the curvature is about one."""


class Triangular:
    """A location and a Cholesky factor, full or zero outside a pattern, in an order of the coordinates.

    The factor is the frame's own times a triangular matrix with the same pattern; patterns must be such that the
    product has it too (everything; blocks; blocks each of which is coupled to the shared coordinates before them).

    Args:
        frame: What the parameters are measured with.
        order: `order[k]` is the coordinate in place k; the draws' own order if None.
        pattern: Which entries of the factor, in that order, may differ from zero, (size, size); all if None.
    """

    def __init__(self, frame: Frame, order: np.ndarray | None = None, pattern: np.ndarray | None = None) -> None:
        self._frame = frame
        self.size = self.base = len(frame.loc)
        self._order = np.arange(self.size) if order is None else order
        precision = np.diag(frame.precision) if frame.precision.ndim == 1 else frame.precision
        precision = precision[np.ix_(self._order, self._order)]
        allowed = np.tril(np.ones_like(precision, dtype=bool) if pattern is None else pattern)
        self._root = inverse_factor(precision) if pattern is None else best_factor(precision, allowed)
        self._below = np.flatnonzero(np.tril(allowed, -1))
        self.parameters = 2 * self.size + len(self._below)

    def member(self, x: np.ndarray) -> Member:
        """The Gaussian of these parameters."""
        shift, log_diagonal, below = self._split(x)
        triangle = np.zeros_like(self._root)
        triangle.flat[self._below] = below
        np.fill_diagonal(triangle, np.exp(log_diagonal / _ROOT_2))
        factor = np.empty_like(triangle)
        factor[self._order] = self._root @ triangle
        return Member(self._frame.loc + self._frame.move(shift), factor=factor)

    undrawn = member

    def near(self, member: Member) -> np.ndarray:
        """The parameters of a Gaussian whose factor has the pattern, or of any Gaussian if there is no pattern."""
        shift = self._frame.measure(member.loc - self._frame.loc)
        ordered = None if member.factor is None else self._ordered(member)
        if ordered is None or np.triu(ordered, 1).any():  # another family's, which has another order
            ordered = np.linalg.cholesky(member.covariance()[np.ix_(self._order, self._order)])
        triangle = scipy.linalg.solve_triangular(self._root, ordered, lower=True)
        return np.concatenate([shift, _ROOT_2 * np.log(np.diag(triangle)), triangle.flat[self._below]])

    def points(self, member: Member, base: np.ndarray) -> np.ndarray:
        """Draws."""
        return member.loc + base @ _factor(member).T

    def scores(self, member: Member, base: np.ndarray) -> np.ndarray:
        """Minus the gradient of log q at the draws."""
        scores = np.empty_like(base)
        scores[:, self._order] = scipy.linalg.solve_triangular(self._ordered(member), base.T, lower=True, trans="T").T
        return scores

    def pull(self, x: np.ndarray, member: Member, base: np.ndarray, gradients: np.ndarray) -> np.ndarray:
        """The gradient of a mean over draws."""
        product = self._root.T @ (gradients[:, self._order].T @ base / len(base))
        return self._packed(x, self._frame.pull(gradients.mean(0)), product)

    def mean(self, members: Sequence[np.ndarray]) -> np.ndarray:
        """Parameters in the middle."""
        return np.mean(members, axis=0)

    def entropy(self, member: Member) -> float:
        """In nats."""
        return float(np.log(np.diag(self._ordered(member))).sum()) + 0.5 * self.size * (1 + _LOG_2PI)

    def exact(self, x: np.ndarray, member: Member, quadratic: Quadratic) -> tuple[float, np.ndarray]:
        """Entropy plus the mean of a quadratic."""
        value, by_loc = quadratic.at_one(member.loc)
        pulled = quadratic.times(_factor(member).T).T
        value += self.entropy(member) - 0.5 * float(np.einsum("ij,ij->", _factor(member), pulled))
        gradient = self._packed(x, self._frame.pull(by_loc), -self._root.T @ pulled[self._order])
        gradient[self.size : 2 * self.size] += 1 / _ROOT_2
        return value, gradient

    def bend(self, x: np.ndarray, quadratic: Quadratic) -> None:
        """None: in these parameters the curvature is about one."""

    def _split(self, x: np.ndarray) -> list[np.ndarray]:
        return np.split(x, [self.size, 2 * self.size])

    def _packed(self, x: np.ndarray, shift: np.ndarray, product: np.ndarray) -> np.ndarray:
        """The gradient, from those with respect to the shift and to the triangular matrix."""
        _, log_diagonal, _ = self._split(x)
        by_diagonal = np.diag(product) * np.exp(log_diagonal / _ROOT_2) / _ROOT_2
        return np.concatenate([shift, by_diagonal, product.flat[self._below]])

    def _ordered(self, member: Member) -> np.ndarray:
        """The member's factor with its rows in the family's order: lower-triangular."""
        return _factor(member)[self._order]


class LowRank:
    """A diagonal plus a few columns: covariance S (I + W W') S, S = diag(scale), as NumPyro has it.

    The parameters are those of B = S W and of S itself, not of its logarithm. The best member often has a coordinate
    whose own scale is zero, since the columns carry all of it (a Heywood case, as in factor analysis): in B and S that
    is an ordinary maximum, on both sides of which the sign of the scale means nothing, and no parameter runs off.

    Draws are made by the covariance's Cholesky factor, from `size` base numbers, and not by NumPyro's sum of S e and
    S W f, from `size + rank`. The Gaussian is the same; but for given draws the sum also depends on how each draw is
    shared out between e and f, to which a maximum over few draws would be fitted, most of all where a scale is zero.
    In dimensions beyond what dense matrices are for, the sum it is.

    Args:
        frame: What the parameters are measured with.
        rank: Columns of W.
        dense: Whether draws are made by the Cholesky factor; up to `DENSE_LIMIT` dimensions if None.
    """

    def __init__(self, frame: Frame, rank: int, *, dense: bool | None = None) -> None:
        self._frame, self.rank = frame, rank
        self.size = len(frame.loc)
        self._dense = self.size <= DENSE_LIMIT if dense is None else dense
        self.base = self.size if self._dense else self.size + rank
        self.parameters = self.size * (2 + rank)
        if frame.precision.ndim == 1:
            self._scale, columns = frame.precision**-0.5, np.zeros((self.size, rank))
        else:
            self._scale, columns = best_low_rank(frame.precision, rank)
        # A column of zeros is a saddle of the ELBO, from which no gradient leads away.
        columns = columns + 1e-3 * np.random.default_rng(0).standard_normal(columns.shape)
        self._columns = self._scale[:, None] * columns

    def member(self, x: np.ndarray) -> Member:
        """The Gaussian of these parameters."""
        bare = self.undrawn(x)
        return replace(bare, factor=_cholesky(bare.covariance())) if self._dense else bare

    def undrawn(self, x: np.ndarray) -> Member:
        """The same Gaussian without its Cholesky factor."""
        shift, stretch, columns = np.split(x, [self.size, 2 * self.size])
        scale = self._scale * _away_from_zero(1 + stretch / _ROOT_2)
        moved = self._columns + self._frame.move(columns.reshape(self.size, self.rank))
        return Member(self._frame.loc + self._frame.move(shift), scale, moved / scale[:, None])

    def near(self, member: Member) -> np.ndarray:
        """The parameters of a low-rank Gaussian of at most this rank, or of a diagonal one."""
        columns = -self._columns
        if member.columns is not None:
            columns[:, : member.columns.shape[1]] += _scale(member)[:, None] * member.columns
        shift = self._frame.measure(member.loc - self._frame.loc)
        stretch = _ROOT_2 * (_scale(member) / self._scale - 1)
        return np.concatenate([shift, stretch, self._frame.measure(columns).ravel()])

    def points(self, member: Member, base: np.ndarray) -> np.ndarray:
        """Draws."""
        if member.factor is not None:
            return member.loc + base @ member.factor.T
        return member.loc + _scale(member) * self._mixed(member, base)

    def scores(self, member: Member, base: np.ndarray) -> np.ndarray:
        """Minus the gradient of log q at the draws."""
        if member.factor is not None:
            return scipy.linalg.solve_triangular(member.factor, base.T, lower=True, trans="T").T
        mixed, spread = self._mixed(member, base), _Spread(_columns(member))
        return (mixed - mixed @ spread.left * spread.share @ spread.left.T) / _scale(member)

    def pull(self, x: np.ndarray, member: Member, base: np.ndarray, gradients: np.ndarray) -> np.ndarray:
        """The gradient of a mean over draws."""
        if member.factor is not None:
            bend = by_covariance(member.factor, gradients.T @ base / len(base))
            by_scale = 2 * np.diag(bend) * _scale(member)
            by_columns = 2 * bend @ (_scale(member)[:, None] * _columns(member))
        else:
            by_scale = np.einsum("ni,ni->i", gradients, base[:, : self.size]) / len(base)
            by_columns = gradients.T @ base[:, self.size :] / len(base)
        return self._packed(gradients.mean(0), by_scale, by_columns)

    def mean(self, members: Sequence[np.ndarray]) -> np.ndarray:
        """Parameters in the middle, once every member's columns are turned to lie as the first one's do.

        A rotation of the columns changes no Gaussian; the mean of differently turned ones would be another.
        """
        first = self._whitened(members[0])
        turned = []
        for x in members:
            columns = self._whitened(x)
            rotation, _ = scipy.linalg.orthogonal_procrustes(columns, first)
            begin = self._frame.measure(self._columns)
            # A scale's sign means nothing: all are taken to the positive side.
            stretch = _ROOT_2 * (np.abs(1 + x[self.size : 2 * self.size] / _ROOT_2) - 1)
            turned.append(np.concatenate([x[: self.size], stretch, (columns @ rotation - begin).ravel()]))
        return np.mean(turned, axis=0)

    def _whitened(self, x: np.ndarray) -> np.ndarray:
        """The columns S W in the frame's units, (size, rank)."""
        return self._frame.measure(self._columns) + x[2 * self.size :].reshape(self.size, self.rank)

    def entropy(self, member: Member) -> float:
        """In nats."""
        return self._entropy(member, _Spread(_columns(member)))

    def _entropy(self, member: Member, spread: _Spread) -> float:
        return float(np.log(np.abs(_scale(member))).sum()) + spread.log_volume + 0.5 * self.size * (1 + _LOG_2PI)

    def exact(self, x: np.ndarray, member: Member, quadratic: Quadratic) -> tuple[float, np.ndarray]:
        """Entropy plus the mean of a quadratic."""
        value, by_loc = quadratic.at_one(member.loc)
        scale, columns = _scale(member), _columns(member)
        moved = scale[:, None] * columns
        pulled = quadratic.times(moved.T).T
        spread = quadratic.diagonal * scale**2
        inverse = _Spread(columns)
        solved = inverse.of_columns
        value += self._entropy(member, inverse) - 0.5 * float(spread.sum() + np.einsum("ir,ir->", moved, pulled))
        by_scale = inverse.diagonal - spread
        return value, self._packed(by_loc, by_scale / scale, solved / scale[:, None] - pulled)

    def bend(self, x: np.ndarray, quadratic: Quadratic) -> np.ndarray:
        """Minus the Hessian of `exact` in stretches and columns, shape (size (1 + rank),) twice; shifts have about one.

        With covariance C = S S + B B', K its inverse and P the quadratic's precision, from d C's first and second
        derivatives in (K - P) / 2 and -(K dC K dC) / 2.
        """
        member = self.undrawn(x)
        scale, columns = _scale(member), _columns(member)
        moved = scale[:, None] * columns
        spread = _Spread(columns)
        inverse = np.eye(self.size) - spread.left * spread.share @ spread.left.T
        np.fill_diagonal(inverse, spread.diagonal)
        inverse /= np.outer(scale, scale)
        precision = np.diag(quadratic.precision) if quadratic.precision.ndim == 1 else quadratic.precision
        solved = inverse @ moved
        unit = self._scale / _ROOT_2
        stretches = (unit * scale)[:, None] * inverse**2 * (unit * scale)
        stretches = 2 * stretches - np.diag(unit**2 * np.diag(inverse - precision))
        pulled, turned = self._frame.pull(inverse).T, self._frame.pull(solved)
        mixed = 2 * np.einsum("i,ij,ib->ijb", unit * scale, pulled, solved).reshape(self.size, -1)
        inner, left = self._frame.pull(pulled), self._frame.pull(self._frame.pull(inverse - precision).T)
        own = np.einsum("ij,ab->iajb", inner, moved.T @ solved) + np.einsum("ib,ja->iajb", turned, turned)
        own -= np.einsum("ij,ab->iajb", left, np.eye(self.rank))
        return np.block([[stretches, mixed], [mixed.T, own.reshape(2 * (self.size * self.rank,))]])

    def _mixed(self, member: Member, base: np.ndarray) -> np.ndarray:
        """Draws in units of the scale, (n, size)."""
        return base[:, : self.size] + base[:, self.size :] @ _columns(member).T

    def _packed(self, loc: np.ndarray, scale: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """The gradient, from those with respect to location, scale and columns in the model's units."""
        return np.concatenate([self._frame.pull(loc), scale * self._scale / _ROOT_2, self._frame.pull(columns).ravel()])


class _Spread:
    """(I + W W')^-1 by the singular values of W = U D V': it is I - U (D^2 / (1 + D^2)) U'.

    Where a coordinate's own scale is all but zero, its row of W is huge, and what is left on the diagonal is a
    difference of nearly equal numbers: from I + W' W it would be rounding alone.

    Attributes:
        left: U, (size, rank).
        share: D^2 / (1 + D^2), (rank,).
        diagonal: Of the inverse, (size,).
        of_columns: The inverse times W, (size, rank).
        log_volume: Half the log of the determinant of I + W W'.
    """

    def __init__(self, columns: np.ndarray) -> None:
        self.left, values, right = np.linalg.svd(columns, full_matrices=False)
        squares = values**2
        self.share = squares / (1 + squares)
        own = self.left**2
        self.diagonal = np.maximum(1 - own.sum(1), 0.0) + own @ (1 / (1 + squares))
        self.of_columns = self.left * (values / (1 + squares)) @ right
        self.log_volume = 0.5 * float(np.log1p(squares).sum())


def _away_from_zero(values: np.ndarray) -> np.ndarray:
    """The values, none of them nearer to zero than the least that counts."""
    return np.where(np.abs(values) < _LEAST_SCALE, np.copysign(_LEAST_SCALE, values), values)


def _scale(member: Member) -> np.ndarray:
    if member.scale is None:
        raise ValueError("Expected a Gaussian with a scale of its own for each coordinate; got a Cholesky factor.")
    return member.scale


def _columns(member: Member) -> np.ndarray:
    if member.columns is None:
        raise ValueError("Expected a low-rank Gaussian; got one without columns.")
    return member.columns


def _factor(member: Member) -> np.ndarray:
    if member.factor is None:
        raise ValueError("Expected a Gaussian with a Cholesky factor; got one without.")
    return member.factor


def _cholesky(covariance: np.ndarray) -> np.ndarray:
    """The lower factor of a covariance.

    Raises:
        numpy.linalg.LinAlgError: The covariance is not finite, or rounding has made it singular.
    """
    if not np.isfinite(covariance).all():
        raise np.linalg.LinAlgError("a covariance that is not finite has no factor")
    return scipy.linalg.cholesky(covariance, lower=True, check_finite=False)


def by_covariance(factor: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """The gradient (size, size), symmetric, with respect to a covariance, from that with respect to its factor.

    Args:
        factor: The covariance's lower Cholesky factor, (size, size).
        gradient: With respect to the factor, (size, size); what lies above its diagonal does not count.

    Reference: Murray (2016), Differentiation of the Cholesky decomposition, section 3.2.
    """
    inner = np.tril(factor.T @ gradient)
    inner[np.diag_indices_from(inner)] /= 2
    halfway = scipy.linalg.solve_triangular(factor, inner.T, lower=True, trans="T").T
    bend = scipy.linalg.solve_triangular(factor, halfway, lower=True, trans="T")
    return (bend + bend.T) / 2


def best_factor(precision: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """The lower-triangular factor L, zero where not allowed, of the Gaussian nearest in KL(q || p) to N(0, P^-1).

    KL(q || p) is a sum over L's columns, l' P l / 2 - log l_k, each with a closed optimum on its own support: the first
    column of the inverse of P there, scaled. That is the first column of this inverse's Cholesky factor, whose second
    is the optimum on the support without its first row, and so on. So columns whose supports are nested like this, as
    within a block, or where a shared coordinate follows another, are had from one decomposition.

    Args:
        precision: P, shape (size, size), positive definite.
        allowed: Shape (size, size), lower-triangular, with the diagonal.
    """
    size = len(precision)
    factor = np.zeros_like(precision)
    nested = [(allowed[k:, k - 1] == allowed[k:, k]).all() for k in range(1, size)]
    begins = [0, *(k for k in range(1, size) if not nested[k - 1])]
    for begin, end in zip(begins, [*begins[1:], size], strict=True):
        # As in `inverse_factor`, of whose columns only the first are wanted.
        backwards = np.flatnonzero(allowed[:, begin])[::-1]
        upper = scipy.linalg.cholesky(precision[np.ix_(backwards, backwards)], lower=True, check_finite=False)
        wanted = np.eye(len(upper))[:, ::-1][:, : end - begin]
        inverse = scipy.linalg.solve_triangular(upper, wanted, lower=True, trans="T", check_finite=False)
        factor[backwards, begin:end] = inverse
    return factor


def best_low_rank(
    precision: np.ndarray, rank: int, *, rounds: int = 50, tolerance: float = 0.01
) -> tuple[np.ndarray, np.ndarray]:
    """Scale (size,) and factor (size, rank) of the low-rank Gaussian nearest in KL(q || p) to N(0, precision^-1).

    See `_nearest_low_rank`. The KL has local minima, tenths of a nat apart in ordinary regressions: a few rounds from
    several scales show from which to go on.

    Args:
        precision: Shape (size, size), positive definite.
        rank: Columns of the factor.
        rounds: The most rounds.
        tolerance: A fall of the KL in one round, in nats, at which they stop.
    """
    size, random = len(precision), np.random.default_rng(0)
    begin = 1 / np.sqrt(np.diag(precision))
    if size <= _SEVERAL_SCALES:
        spread = np.stack([np.zeros(size), *random.standard_normal((_SCALES - 1, size))])
        scales, _, losses = _nearest_low_rank(precision, rank, _SPRINT, -np.inf, begin * np.exp(spread))
        begin = scales[np.argmin(np.where(np.isnan(losses), np.inf, losses))]
    scales, factors, _ = _nearest_low_rank(precision, rank, rounds, tolerance, begin[None])
    return scales[0], factors[0]


@dataclass(frozen=True)
class RankGain:
    """How many columns a low-rank covariance is worth, and what one more would add.

    Attributes:
        rank: Columns.
        gain: Nats that one more column would add to the ELBO, were the posterior the Gaussian that was asked.
        limit: Whether there are no more columns to be had, because a full covariance would have fewer numbers.
    """

    rank: int
    gain: float
    limit: bool


def rank_by_gain(precision: np.ndarray, worth: float) -> RankGain:
    """The least rank from which one more column gains less than `worth` nats against N(0, precision^-1).

    By doubling and bisection, the gains of a column falling as columns are added.

    Args:
        precision: Shape (size, size), positive definite.
        worth: In nats.
    """
    size = len(precision)
    most = max(1, (size - 1) // 2)
    scales = {0: 1 / np.sqrt(np.diag(precision))}
    losses = dict[int, float]()

    def loss(rank: int) -> float:
        if rank > size:  # no more columns than there are directions
            return loss(size)
        if rank not in losses:
            begin = scales[max(known for known in scales if known <= rank)]
            found, _, reached = _nearest_low_rank(precision, rank, 50, worth / 20, begin[None])
            scales[rank], losses[rank] = found[0], float(reached[0])
        return losses[rank]

    def gain(rank: int) -> float:
        return loss(rank) - loss(rank + 1)

    low, high = 0, 1  # more than `low` columns are wanted
    while high < most and gain(high) >= worth:
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if gain(middle) >= worth else (low, middle)
    left = gain(high)
    return RankGain(high, left, high == most and left >= worth)


def _nearest_low_rank(
    precision: np.ndarray, rank: int, rounds: int, tolerance: float, scales: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scales (n, size), factors (n, size, rank) and, but for a constant, KLs (n,) in nats, from n scales to begin with.

    q has covariance S (I + W W') S with S = diag(scale). Given S, W lies along the eigenvectors of S precision S with
    the smallest eigenvalues; given W, each scale solves a quadratic. Both are exact, so the KL falls in every round.
    Rounds end when none of the KLs falls by the tolerance any more.
    """
    scale = scales.copy()
    unit = np.eye(len(precision))
    last = np.full(len(scale), np.inf)
    for _ in range(rounds):
        factor = _along_lowest(precision * scale[:, :, None] * scale[:, None, :], rank)
        weights = precision * (unit + factor @ factor.mT)
        own = np.einsum("nii->ni", weights)
        for i in range(len(precision)):
            others = np.einsum("nj,nj->n", weights[:, i], scale) - own[:, i] * scale[:, i]
            scale[:, i] = (np.sqrt(others**2 + 4 * own[:, i]) - others) / (2 * own[:, i])
        inner = np.eye(rank) + factor.mT @ factor
        spread = np.einsum("ni,ni->n", scale, (weights @ scale[:, :, None])[:, :, 0])
        loss = 0.5 * (spread - np.linalg.slogdet(inner)[1]) - np.log(scale).sum(1)
        if (last - loss < tolerance).all():
            return scale, factor, loss
        last = loss
    return scale, factor, last


def _along_lowest(scaled: np.ndarray, rank: int) -> np.ndarray:
    """The columns W (n, size, rank) for which I + W W' is nearest to the inverse of each matrix (n, size, size)."""
    if len(scaled) > 1:
        values, vectors = np.linalg.eigh(scaled)
        values, vectors = values[:, :rank], vectors[:, :, :rank]
    else:  # in high dimension the few that are wanted cost a fraction of all
        found = scipy.linalg.eigh(scaled[0], subset_by_index=(0, rank - 1))
        values, vectors = found[0][None], found[1][None]
    return np.asarray(vectors * np.sqrt(np.maximum(1 / values - 1, 0))[:, None, :])
