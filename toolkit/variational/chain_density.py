"""A model's log density under Gaussians along a chain: all that their fits ask of it, in time linear in its length.

A natural-gradient step needs two averages over q, of log p's gradient and of its Hessian. The latter has the chain's
pattern and comes from a few products of Hessian and vector at each draw. The quadratic with these two averages is the
control variate of the ELBO on fixed draws: its mean over q is known, so that draws are asked only for what log p has
beyond it, and a maximum over the family cannot be fitted to their first two moments, of which a long chain has more
than there are draws.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toolkit.compilation import QUICK, peak_bytes
from toolkit.variational.chain_search import pattern_from, pattern_products
from toolkit.variational.chains import (
    Chain,
    Pattern,
    cholesky,
    coloured,
    combined,
    covariances,
    half_log_determinant,
    identity,
    inner,
    solved,
    times,
)
from toolkit.variational.own_solvers import Problem
from toolkit.variational.solvers.natural import Taken

_AT_ONCE = 200_000  # numbers in the draws looked at together: beyond a core's cache each takes twice as long
_TOGETHER, _LEAST = 128, 16  # draws of a climb, and of a look


@dataclass(frozen=True, eq=False)
class ChainGaussian:
    """N(loc, precision^-1) in unconstrained space.

    Attributes:
        loc: Shape (size,).
        factor: The Cholesky factor of its precision, with the chain's pattern.
        precision: With the same pattern.
    """

    loc: Any
    factor: Pattern
    precision: Pattern


class ChainQuadratic(NamedTuple):
    """gradient (z - centre) - (z - centre)' precision (z - centre) / 2, in nats: near log p but for a constant.

    Attributes:
        centre: Shape (size,).
        gradient: Shape (size,).
        precision: With the chain's pattern; need not be positive definite.
    """

    centre: Any
    gradient: Any
    precision: Pattern


class Frame(NamedTuple):
    """A Gaussian from which others are measured, so that the ELBO's curvature is about one in every direction.

    Attributes:
        loc: Shape (size,).
        factor: Of its precision.
        columns: For each block's columns of the factor, a root of the inverse of the covariance of the coordinates in
            their rows (the block, the next one, the shared), (blocks, 2 block + shared, 2 block + shared).
    """

    loc: Any
    factor: Pattern
    columns: Any


@dataclass(frozen=True, eq=False)
class Seen:
    """What draws say of a Gaussian.

    Attributes:
        elbo: In nats; -inf where a draw has no finite density, gradient or curvature.
        se: Its standard error, were the draws independent.
        quadratic: The one nearest to log p under the Gaussian, by the means of gradients and Hessians.
        precision: Of the Gaussian that was looked at.
    """

    elbo: float
    se: float
    quadratic: ChainQuadratic
    precision: Pattern


class ChainDensity:
    """A model's log density under Gaussians along a chain.

    Args:
        problem: The model and the chart.
        chain: The chain.

    Attributes:
        chain: The chain.
        gradients: Gradients asked for so far, and products of Hessian and vector, which take as long.
        compile_seconds: Spent on tracing and compiling.
        peak_bytes: What the largest program holds at once.
    """

    def __init__(self, problem: Problem, chain: Chain) -> None:
        self.chain, self.gradients, self.compile_seconds, self.peak_bytes = chain, 0, 0.0, 0
        self._arrays = jax.device_put(problem.model.arrays)
        self._probes = pattern_products(chain)
        model, space, chart = problem.model, problem.space, problem.chart

        def log_density(vector: Any, arrays: Any) -> Any:
            return model.log_density(space.unravel(vector), arrays, chart)

        loc, pattern = np.zeros(chain.size), identity(chain)
        self.batch = max(2, min(_LEAST, 1 << (_AT_ONCE // (chain.size * len(self._probes))).bit_length() >> 1))
        looked = (loc, pattern, np.zeros((self.batch, chain.places)), self._probes, self._arrays)
        self._look = self._compiled(_looker(log_density, chain), *looked)
        frame = Frame(loc, pattern, np.zeros((chain.blocks, *2 * (2 * chain.block + len(chain.shared),))))
        quadratic = ChainQuadratic(loc, loc, pattern)
        x = np.zeros(parameters(chain))
        self.together = max(2, min(_TOGETHER, 1 << (_AT_ONCE // chain.size).bit_length() >> 1))
        climbed = (x, frame, quadratic, np.zeros((self.together, chain.places)), self._arrays)
        self._rest = self._compiled(jax.value_and_grad(_rest_mean(log_density, chain)), *climbed)

    def look(self, at: ChainGaussian, base: np.ndarray) -> Seen:
        """The ELBO of a Gaussian on base draws (n, places), and the quadratic nearest to log p; n a power of two."""
        values, squares = np.empty(len(base)), np.empty(len(base))
        gradient, products = np.zeros(self.chain.size), np.zeros(self._probes.shape)
        for begin in range(0, len(base), self.batch):
            piece = slice(begin, begin + self.batch)
            found = self._look(at.loc, at.factor, base[piece], self._probes, self._arrays)
            values[piece], squares[piece] = found[0], found[1]
            gradient += np.asarray(found[2]) / len(base)
            products += np.asarray(found[3]) / len(base)
        self.gradients += len(base) * (1 + len(self._probes))
        if not (np.isfinite(values).all() and np.isfinite(gradient).all() and np.isfinite(products).all()):
            return Seen(-math.inf, math.nan, ChainQuadratic(at.loc, gradient, at.precision), at.precision)
        terms = values + 0.5 * squares
        entropy = 0.5 * self.chain.size * math.log(2 * math.pi) - float(_half_log_determinant(at.factor))
        quadratic = ChainQuadratic(at.loc, gradient, _pattern_from(self.chain, -products))
        se = float(terms.std()) / len(base) ** 0.5
        return Seen(float(terms.mean()) + entropy, se, quadratic, at.precision)

    def rest(
        self, x: np.ndarray, frame: Frame, quadratic: ChainQuadratic, base: np.ndarray
    ) -> tuple[float, np.ndarray]:
        """The mean over draws of what the quadratic leaves of log p, in nats, and its gradient (parameters,)."""
        value, gradient = 0.0, np.zeros_like(x)
        for begin in range(0, len(base), self.together):
            found = self._rest(x, frame, quadratic, base[begin : begin + self.together], self._arrays)
            value += float(found[0]) * self.together / len(base)
            gradient += np.asarray(found[1]) * (self.together / len(base))
        self.gradients += len(base)
        return value, gradient

    def _compiled(self, program: Callable[..., Any], *given: Any) -> Any:
        begun = time.perf_counter()
        compiled = jax.jit(program).lower(*given).compile(QUICK)
        self.compile_seconds += time.perf_counter() - begun
        self.peak_bytes = max(self.peak_bytes, peak_bytes(compiled))
        return compiled


def _looker(log_density: Callable[..., Any], chain: Chain) -> Callable[..., Any]:
    """The program that looks at draws: log densities, squares of the draws' noise, sums of gradients and products."""

    def look(loc: Any, factor: Pattern, noise: Any, probes: Any, arrays: Any) -> Any:
        points, squares = _points(chain, loc, factor, noise)

        def one(point: Any) -> Any:
            value, gradient = jax.value_and_grad(log_density)(point, arrays)
            _, along = jax.linearize(lambda at: jax.grad(log_density)(at, arrays), point)
            return value, gradient, jax.vmap(along)(probes)

        values, gradients, products = jax.vmap(one)(points)
        return values, squares, gradients.sum(0), products.sum(0)

    return look


def _rest_mean(log_density: Callable[..., Any], chain: Chain) -> Callable[..., Any]:
    """The program that gives the mean over draws of log p without what the quadratic has of it."""

    def rest(x: Any, frame: Frame, quadratic: ChainQuadratic, noise: Any, arrays: Any) -> Any:
        loc, factor = member(chain, frame, x)
        points, _ = _points(chain, loc, factor, noise)
        apart = points - jnp.broadcast_to(quadratic.centre, points.shape)
        pulled = chain.from_places(chain.joined(*times(quadratic.precision, *chain.split(chain.into_places(apart)))))
        known = apart @ quadratic.gradient - 0.5 * (apart * pulled).sum(-1)
        return (jax.vmap(lambda point: log_density(point, arrays))(points) - known).mean()

    return rest


def _points(chain: Chain, loc: Any, factor: Pattern, noise: Any) -> tuple[Any, Any]:
    """Draws (n, size) from base draws (n, places), and the squares of the latter (n,), the padding left out."""
    local, shared = chain.split(noise)
    local = jnp.where(chain.padded, 0.0, local)
    squares = jnp.square(local).sum((-2, -1)) + jnp.square(shared).sum(-1)
    apart = chain.from_places(chain.joined(*coloured(factor, local, shared)))
    return jnp.broadcast_to(loc, apart.shape) + apart, squares


def parameters(chain: Chain) -> int:
    """How long a vector of parameters is; some of its entries, above the factor's diagonal, change nothing."""
    shared = len(chain.shared)
    return chain.places + chain.blocks * (2 * chain.block + shared) * chain.block + shared**2


def member(chain: Chain, frame: Frame, x: Any) -> tuple[Any, Pattern]:
    """Location and factor of the Gaussian with parameters x, zero at the frame's."""
    block, shared, blocks = chain.block, len(chain.shared), chain.blocks
    cut = chain.places + blocks * (2 * block + shared) * block
    moved = chain.from_places(chain.joined(*coloured(frame.factor, *chain.split(x[: chain.places]))))
    below = x[chain.places : cut].reshape(blocks, 2 * block + shared, block)
    below = below.at[:, :block].set(jnp.tril(below[:, :block])).at[-1, block : 2 * block].set(0.0)
    change = frame.columns @ below
    corner = frame.factor.corner @ jnp.tril(x[cut:].reshape(shared, shared))
    factor = Pattern(
        frame.factor.diagonal + change[:, :block],
        frame.factor.below + change[:, block : 2 * block].at[-1].set(0.0),
        frame.factor.side + change[:, 2 * block :],
        frame.factor.corner + corner,
    )
    return frame.loc + moved, factor


def frame_of(chain: Chain, at: ChainGaussian) -> Frame:
    """The frame in which a Gaussian is zero."""
    return Frame(at.loc, at.factor, _columns(at.factor))


@partial(jax.jit, compiler_options=QUICK)
def _columns(factor: Pattern) -> Any:
    """W with W W' the inverse of the covariance of the rows of each block's columns; lower-triangular."""
    found = covariances(factor)
    blocks, block = found.diagonal.shape[:2]
    after, side_after = (jnp.roll(part, -1, axis=0) for part in (found.diagonal, found.side))
    # Behind the last block there is none: a unit block takes its place, and is not read.
    after = after.at[-1].set(jnp.eye(block))
    side_after = side_after.at[-1].set(0.0)
    below = found.below.at[-1].set(0.0)
    corner = jnp.broadcast_to(found.corner, (blocks, *found.corner.shape))
    rows = [
        jnp.concatenate([found.diagonal, below.mT, found.side.mT], axis=2),
        jnp.concatenate([below, after, side_after.mT], axis=2),
        jnp.concatenate([found.side, side_after, corner], axis=2),
    ]
    return jnp.linalg.cholesky(jnp.linalg.inv(jnp.concatenate(rows, axis=1)))


def _known(chain: Chain, frame: Frame, quadratic: ChainQuadratic, x: Any) -> Any:
    """The mean of a quadratic over the Gaussian with parameters x, and the Gaussian's entropy, in nats."""
    loc, factor = member(chain, frame, x)
    apart = loc - quadratic.centre
    pulled = chain.from_places(chain.joined(*times(quadratic.precision, *chain.split(chain.into_places(apart)))))
    spread = inner(quadratic.precision, covariances(factor)) - chain.padded.sum()
    entropy = 0.5 * chain.size * (1 + math.log(2 * math.pi)) - half_log_determinant(factor)
    return apart @ quadratic.gradient - 0.5 * apart @ pulled - 0.5 * spread + entropy


_quick = partial(jax.jit, compiler_options=QUICK)  # these programs are small, and compiled anew for each length
_known_and_slope = _quick(jax.value_and_grad(_known, argnums=3), static_argnums=0)
_half_log_determinant = _quick(half_log_determinant)
_pattern_from = _quick(pattern_from, static_argnums=0)
member_of = _quick(member, static_argnums=0)
_factor_of = _quick(cholesky)


@_quick
def precision_of(factor: Pattern) -> Pattern:
    """L L' inside of the pattern, which holds all of it."""
    before = jnp.roll(factor.below, 1, axis=0).at[0].set(0.0)
    side_before = jnp.roll(factor.side, 1, axis=0).at[0].set(0.0)
    return Pattern(
        factor.diagonal @ factor.diagonal.mT + before @ before.mT,
        factor.below @ factor.diagonal.mT,
        factor.side @ factor.diagonal.mT + side_before @ before.mT,
        factor.corner @ factor.corner.T + jnp.einsum("tgi,thi->gh", factor.side, factor.side),
    )


def stepped(chain: Chain, at: ChainGaussian, quadratic: ChainQuadratic, rate: float) -> ChainGaussian:
    """The Gaussian after a natural-gradient step.

    Raises:
        numpy.linalg.LinAlgError: The new precision is not positive definite.
    """
    precision = combined(at.precision, quadratic.precision, rate)
    factor = _factor_of(precision)
    if not all(np.isfinite(np.asarray(part)).all() for part in factor):
        raise np.linalg.LinAlgError("the precision is not positive definite")
    return ChainGaussian(at.loc + rate * _applied(chain, factor, quadratic.gradient), factor, precision)


def _apply(chain: Chain, factor: Pattern, vector: Any) -> Any:
    """The covariance times a vector (size,)."""
    return chain.from_places(chain.joined(*solved(factor, *chain.split(chain.into_places(vector)))))


_applied = _quick(_apply, static_argnums=0)


class ChainRule:
    """How natural-gradient steps are taken along a chain (`toolkit.variational.solvers.natural.Rule`).

    Args:
        density: Log p(x, z).
    """

    def __init__(self, density: ChainDensity) -> None:
        self._density, self.base = density, density.chain.places

    def look(self, at: ChainGaussian, base: np.ndarray) -> Seen:
        """What draws say of a Gaussian."""
        return self._density.look(at, base)

    def step(self, at: ChainGaussian, seen: Seen, rate: float) -> ChainGaussian:
        """The Gaussian whose precision is a weighted mean of the old one and the one seen."""
        return stepped(self._density.chain, at, seen.quadratic, rate)

    def product(self, taken: Taken[ChainGaussian, Seen], seen: Seen) -> float:
        """Half the inner product of two gradients, as the Fisher metric has it where the step set out."""
        return self.decrement(taken.begin, taken.slope, seen)

    def decrement(self, at: ChainGaussian, first: Seen, second: Seen) -> float:
        """The same for two gradients at one place: g' C h / 2 + tr[(P - Q) C (R - Q) C] / 4, C the covariance 1 / Q."""
        ends = (
            (seen.quadratic.gradient, _difference(seen.quadratic.precision, seen.precision)) for seen in (first, second)
        )
        return float(_half_product(self._density.chain, at.precision, at.factor, *ends))


def _half_of_product(chain: Chain, precision: Pattern, factor: Pattern, first: Any, second: Any) -> Any:
    (gradient, bend), (other_gradient, other_bend) = first, second
    shift = 0.5 * other_gradient @ _apply(chain, factor, gradient)
    # Of Q^-1 along a change B of Q the derivative is -Q^-1 B Q^-1: no dense inverse is needed.
    _, turned = jax.jvp(lambda matrix: covariances(cholesky(matrix)), (precision,), (bend,))
    return shift - 0.25 * inner(other_bend, turned)


_half_product = _quick(_half_of_product, static_argnums=0)


@_quick
def _difference(first: Pattern, second: Pattern) -> Pattern:
    return Pattern(*(a - b for a, b in zip(first, second, strict=True)))


class _Family:
    """What a climb asks of a family: how many parameters, and the ELBO of a quadratic.

    Args:
        chain: The chain.
        frame: What parameters are measured from.
    """

    def __init__(self, chain: Chain, frame: Frame) -> None:
        self._chain, self._frame = chain, frame
        self.size, self.parameters = chain.places, parameters(chain)

    def undrawn(self, x: np.ndarray) -> np.ndarray:
        """The parameters are all that `exact` needs."""
        return x

    def exact(self, x: np.ndarray, at: np.ndarray, quadratic: ChainQuadratic) -> tuple[float, np.ndarray]:
        """Entropy plus the mean of a quadratic, in nats, and its gradient (parameters,)."""
        value, gradient = _known_and_slope(self._chain, self._frame, quadratic, x)
        return float(value), np.asarray(gradient)

    def bend(self, x: np.ndarray, quadratic: ChainQuadratic) -> None:
        """None: in these parameters the curvature is about one."""


class ChainELBO:
    """The ELBO in nats as a function of parameters, on base draws that do not change, the control variate used.

    Args:
        density: Log p(x, z).
        frame: What parameters are measured from.
        quadratic: The control variate.
        base: Base draws, (draws, places), a multiple of the number looked at together.

    Attributes:
        best: The highest ELBO that was met, and its parameters.
    """

    def __init__(self, density: ChainDensity, frame: Frame, quadratic: ChainQuadratic, base: np.ndarray) -> None:
        self.family, self.quadratic = _Family(density.chain, frame), quadratic
        self._density, self._frame, self._base = density, frame, base
        self.best: tuple[float, np.ndarray] = (-math.inf, np.zeros(parameters(density.chain)))

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """ELBO and its gradient (parameters,); -inf where a draw's log density or gradient is not finite."""
        known, slope = self.family.exact(x, x, self.quadratic)
        if not math.isfinite(known):  # no Gaussian: the factor's diagonal must be positive
            return -math.inf, np.zeros_like(x)
        value, gradient = self._density.rest(x, self._frame, self.quadratic, self._base)
        if not (math.isfinite(value) and np.isfinite(gradient).all()):
            return -math.inf, np.zeros_like(x)
        if known + value > self.best[0]:
            self.best = known + value, x.copy()
        return known + value, slope + gradient
