"""Fits of Gaussians along a chain: every part of them takes time and memory linear in the chain's length.

    starts -> natural-gradient steps on few draws, each of which raises the ELBO -> the best of the starts
           -> such steps on ever new draws, averaged
           -> climbs on fixed draws by L-BFGS: their gain is the certificate, the mean of their ends the next fit

A natural-gradient step needs two averages over q, of log p's gradient and of its Hessian. The latter has the chain's
pattern and comes from a few products of Hessian and vector at each draw; a weighted mean of the old precision and of
minus that Hessian is the new one (Khan & Rue 2023, The Bayesian learning rule, section 3.2). On a Gaussian posterior
the first full step arrives, whatever the draws. Elsewhere such steps crawl where scales and states depend on each other
in more than their means, as those of an EM algorithm do; L-BFGS learns that curvature.

The quadratic with these two averages is also the control variate of the ELBO on fixed draws: its mean over q is known,
so that draws are asked only for what log p has beyond it, and a maximum over the family cannot be fitted to their first
two moments, of which a long chain has more than there are draws. To all else it can: where draws are too few a climb
runs off, which is noticed and not believed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from toolkit.compilation import QUICK, peak_bytes
from toolkit.estimate import Estimate
from toolkit.status import Status
from toolkit.variational.certificates import SETS, Certificate, Scope, estimate_gap
from toolkit.variational.chain_guides import AutoChainNormal, chain_params
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
from toolkit.variational.draws import branch, generator, mirrored_draws
from toolkit.variational.own_solvers import Problem, Solved
from toolkit.variational.solvers.fixed_draws import Climbed, climb
from toolkit.variational.solvers.natural import Taken, averaged_steps
from toolkit.variational.solvers.svi import Trace

_STARTS, _TRIES = 4, 20
_RADIUS, _SHRINK = 2.0, 0.7  # of the box in which starts lie; NumPyro's own
_FIRST_SD = 0.1  # of every coordinate, in unconstrained units
_SPRINT, _SLOWEST = 60, 0.01  # natural-gradient steps from each start, and a rate at which they are no longer worth it
_WORTH = 1.0  # nats, that such a step must gain: what follows is cheaper
_COMMON_DRAWS, _NEW_DRAWS, _AVERAGED = 16, 64, 40  # draws of these steps, of averaged ones, and how many of the latter
_AT_ONCE, _TOGETHER = 2_000_000, 128  # numbers in the draws that are looked at together (16 MB), draws of a climb
_FIRST_DRAWS, _MOST_DRAWS, _MOST_TIMES = 128, 8_192, 8
_EVALUATIONS, _LEAST_STEPS = 100, 2  # of a climb
_RUN_OFF = 50.0  # nats, that a climb from where averaged steps have come gains only by being fitted to its draws
_ROUNDS = 8
_RESIDUAL = 0.01  # of the tolerance, that a climb may leave
_OPTIMISM = 0.4  # of the tolerance, that a certificate may be too high by
_LEVEL = 0.95
_USABLE_LIMIT = 2.0  # nats, as of other Gaussian fits without proof


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
        self.batch = max(2, min(_COMMON_DRAWS, 1 << (_AT_ONCE // (chain.size * len(self._probes))).bit_length() >> 1))
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
_member = _quick(member, static_argnums=0)
_factor_of = _quick(cholesky)


@_quick
def _precision_of(factor: Pattern) -> Pattern:
    """L L' inside of the pattern, which holds all of it."""
    before = jnp.roll(factor.below, 1, axis=0).at[0].set(0.0)
    side_before = jnp.roll(factor.side, 1, axis=0).at[0].set(0.0)
    return Pattern(
        factor.diagonal @ factor.diagonal.mT + before @ before.mT,
        factor.below @ factor.diagonal.mT,
        factor.side @ factor.diagonal.mT + side_before @ before.mT,
        factor.corner @ factor.corner.T + jnp.einsum("tgi,thi->gh", factor.side, factor.side),
    )


def _stepped(chain: Chain, at: ChainGaussian, quadratic: ChainQuadratic, rate: float) -> ChainGaussian:
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


class _Rule:
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
        return _stepped(self._density.chain, at, seen.quadratic, rate)

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


class _FixedDrawsELBO:
    """The ELBO in nats as a function of parameters, on base draws that do not change, the control variate used.

    Args:
        density: Log p(x, z).
        frame: What parameters are measured from.
        quadratic: The control variate.
        base: Base draws, (draws, places), a multiple of the number looked at together.
    """

    def __init__(self, density: ChainDensity, frame: Frame, quadratic: ChainQuadratic, base: np.ndarray) -> None:
        self.family, self.quadratic = _Family(density.chain, frame), quadratic
        self._density, self._frame, self._base = density, frame, base

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """ELBO and its gradient (parameters,); -inf where a draw's log density or gradient is not finite."""
        known, slope = self.family.exact(x, x, self.quadratic)
        if not math.isfinite(known):  # no Gaussian: the factor's diagonal must be positive
            return -math.inf, np.zeros_like(x)
        value, gradient = self._density.rest(x, self._frame, self.quadratic, self._base)
        if not (math.isfinite(value) and np.isfinite(gradient).all()):
            return -math.inf, np.zeros_like(x)
        return known + value, slope + gradient


def solve_chain(problem: Problem) -> Solved:
    """The best Gaussian along the model's chain, with a certificate.

    Raises:
        ValueError: The model has no chain, or its chart has parameters of its own.
    """
    guide = problem.program
    assert isinstance(guide, AutoChainNormal)
    chain = guide.chain
    if not chain.blocks:
        raise ValueError(
            f"Expected a model with a chain; got one without, since {chain.note}: take full_rank or coupled."
        )
    own = problem.model.parameters(problem.chart)
    if own:
        raise ValueError(
            f"Expected a chart without parameters of its own; '{problem.chart}' has {', '.join(own)}: take another one."
        )
    return _Search(problem, ChainDensity(problem, chain)).solved(guide)


class _RunOff(Exception):  # noqa: N818 - no error: draws are too few for a climb
    """A climb gains more than there can be to gain."""


Course = tuple[tuple[float, float], ...]


@dataclass(frozen=True, eq=False)
class _Found:
    """A Gaussian, and the ELBO with its standard error on the way to it."""

    at: ChainGaussian
    course: Course = ()


@dataclass(frozen=True, eq=False)
class _Proof:
    """A certificate, and how the fit ended."""

    certificate: Certificate | None
    status: Status = Status.ARRIVED
    message: str = ""


@dataclass(frozen=True, eq=False)
class _Search:
    """One fit."""

    problem: Problem
    density: ChainDensity

    @property
    def chain(self) -> Chain:
        """The chain."""
        return self.density.chain

    @property
    def left(self) -> int:
        """Gradients that the budget still has."""
        return max(self.problem.max_gradients - self.density.gradients, 0)

    def looks(self, draws: int) -> int:
        """Looks at so many draws that the budget still has."""
        return self.left // (draws * (1 + 3 * self.chain.block + len(self.chain.shared)))

    def base(self, draws: int, number: int) -> np.ndarray:
        """Base draws, one set for each number."""
        return mirrored_draws(draws, self.chain.places, key=branch(self.problem.key, number))

    def report(self, stage: str, number: int, elbo: float) -> None:
        """Tell what is done."""
        self.problem.progress("fit chain", number, number + 1, f"{stage}, ELBO {elbo:.2f}")

    def solved(self, guide: AutoChainNormal) -> Solved:
        """The fit, from the best of the starts."""
        common = self.base(_COMMON_DRAWS, 0)
        ends = [self._sprinted(begin, seen, common) for begin, seen in self._starts(common)]
        if not ends:
            return self._ended({}, _Proof(None, Status.NO_VALID_START), ())
        found, proof = self._proved(max(ends, key=lambda end: end.course[-1][0]))
        return self._ended(chain_params(guide, found.at.loc, found.at.factor), proof, found.course)

    def _ended(self, params: dict[str, Any], proof: _Proof, course: Course) -> Solved:
        elbo, se = np.array(course).reshape(-1, 2).T
        return Solved(
            params,
            proof.status,
            proof.message,
            solver="natural_gradient",
            why=f"natural gradients and climbs whose cost is linear in the chain's length; {self.chain.words}",
            trace=Trace(np.arange(1, len(elbo) + 1), elbo, se) if course else None,
            certificate=proof.certificate,
            gradients=self.density.gradients,
            compile_seconds=self.density.compile_seconds,
            peak_bytes=self.density.peak_bytes,
        )

    def _starts(self, common: np.ndarray) -> Iterator[tuple[ChainGaussian, Seen]]:
        """The origin of unconstrained space, and points dispersed around it, where the density is finite."""
        numbers = generator(branch(self.problem.key, 1))
        precision, factor = (identity(self.chain, _FIRST_SD**power) for power in (-2, -1))
        for number in range(_STARTS):
            for attempt in range(_TRIES if number else 1):
                radius = _RADIUS * _SHRINK**attempt if number else 0.0
                begin = ChainGaussian(numbers.uniform(-radius, radius, self.chain.size), factor, precision)
                seen = self.density.look(begin, common)
                if math.isfinite(seen.elbo):
                    yield begin, seen
                    break

    def _sprinted(self, at: ChainGaussian, seen: Seen, common: np.ndarray) -> _Found:
        """The end of a few natural-gradient steps on common draws, each of which raised the ELBO there."""
        course, rate = [(seen.elbo, seen.se)], 1.0
        while len(course) < _SPRINT and rate > _SLOWEST and self.looks(_COMMON_DRAWS):
            moved = self._tried(at, seen, rate, common)
            rate = min(1.0, 3 * rate) if moved else rate / 3
            if moved is None:
                continue
            (at, new), gain = moved, moved[1].elbo - seen.elbo
            seen = new
            course.append((seen.elbo, seen.se))
            self.report("first steps", len(course), seen.elbo)
            if gain < _WORTH:
                break
        return _Found(at, tuple(course))

    def _tried(
        self, at: ChainGaussian, seen: Seen, rate: float, common: np.ndarray
    ) -> tuple[ChainGaussian, Seen] | None:
        """Where a step leads, if that raises the ELBO; else one that leaves the shared coordinates apart."""
        for precision in (seen.quadratic.precision, _uncoupled(seen.quadratic.precision)):
            try:
                moved = _stepped(self.chain, at, seen.quadratic._replace(precision=precision), rate)
            except np.linalg.LinAlgError:
                continue
            new = self.density.look(moved, common)
            if new.elbo > seen.elbo:
                return moved, new
        return None

    def _proved(self, found: _Found) -> tuple[_Found, _Proof]:
        """The Gaussian, gone on with until its certificate is below the tolerance, and how that ended.

        The mean of a certificate's ends is the next fit: it has in effect been fitted to all of their draws. Where a
        climb runs off its draws are too few, and averaged steps go on meanwhile.
        """
        tolerance, draws, certificate = self.problem.tolerance, _FIRST_DRAWS, None
        why, near = f"{_ROUNDS} rounds of climbs did not bring it lower", 0
        for number in range(10, 10 + 10 * _ROUNDS, 10):
            seen = self.density.look(found.at, self.base(_FIRST_DRAWS, number))
            if not math.isfinite(seen.elbo):
                return found, _Proof(None, Status.DIVERGED, "draws of the Gaussian have no finite density")
            found = replace(found, course=(*found.course, (seen.elbo, seen.se)))
            if self.left < SETS * draws * _LEAST_STEPS * 3:
                why = f"of the budget {self.left:,} gradients are left, which do not suffice"
                break
            frame = frame_of(self.chain, found.at)
            ends = self._climbs(frame, seen.quadratic, draws, number)
            if len(ends) < SETS:
                if draws == _MOST_DRAWS:
                    why = f"climbs on {draws:,} draws run off"
                    break
                draws = min(4 * draws, _MOST_DRAWS)
                found, near = self._averaged(found, near, number)
                continue
            certificate = self._bound(ends, draws)
            if certificate.limit <= tolerance:
                return found, _Proof(certificate)
            x = np.mean([end.x for end in ends], axis=0)
            check = _FixedDrawsELBO(self.density, frame, seen.quadratic, self.base(draws, number + 9))
            gain = check(x)[0] - check(np.zeros_like(x))[0]
            if gain > 0:
                loc, factor = _member(self.chain, frame, x)
                found = replace(found, at=ChainGaussian(loc, factor, _precision_of(factor)))
            elif draws == _MOST_DRAWS:
                why = f"{draws:,} draws do not pin {self.chain.parameters:,} parameters"
                break
            optimism = (certificate.gap.value - max(gain, 0.0)) / (1 + 1 / SETS)
            wanted = draws * max(optimism, 0.0) / (_OPTIMISM * tolerance)
            least = draws if gain > 0 else 2 * draws
            wanted = int(np.clip(1 << math.ceil(math.log2(max(wanted, 1.0))), least, _MOST_TIMES * draws))
            draws = min(wanted, _MOST_DRAWS)
        if certificate is None and self.looks(_NEW_DRAWS) >= 2 * SETS:
            found, _ = self._averaged(found, near, 1)
            estimate = estimate_gap(_Rule(self.density), found.at, key=branch(self.problem.key, 2), draws=_NEW_DRAWS)
            certificate = estimate if math.isfinite(estimate.limit) else None
        if certificate is None:
            return found, _Proof(None, Status.BUDGET, f"no bound: {why}")
        status = Status.UNPROVEN if certificate.limit <= _USABLE_LIMIT else Status.BUDGET
        estimated = ", an estimate" if certificate.scope is Scope.ESTIMATE else ""
        return found, _Proof(certificate, status, f"up to {certificate.limit:.2g} nats{estimated}: {why}")

    def _averaged(self, found: _Found, near: int, number: int) -> tuple[_Found, int]:
        """Where natural-gradient steps on ever new draws lead, and over how many of them that is a mean."""
        steps = min(_AVERAGED, self.looks(_NEW_DRAWS))
        if steps < 2:
            return found, near
        taken = averaged_steps(
            _Rule(self.density),
            found.at,
            key=branch(self.problem.key, number + 8),
            draws=_NEW_DRAWS,
            tolerance=self.problem.tolerance,
            near=near,
            most=steps,
            report=lambda step, elbo: self.report("averaging", step, elbo),
        )
        course = (*found.course, *((float(elbo), math.nan) for elbo in taken.course if math.isfinite(elbo)))
        return _Found(taken.at, course), taken.near

    def _climbs(self, frame: Frame, quadratic: ChainQuadratic, draws: int, number: int) -> list[Climbed]:
        """Climbs on sets of draws that the fit has not seen; fewer than `SETS` where one of them runs off."""
        ends = list[Climbed]()
        for one in range(SETS):
            try:
                end = self._climb(frame, quadratic, self.base(draws, number + 1 + one))
            except _RunOff:
                break
            if not end.arrived:
                break
            ends.append(end)
        return ends

    def _climb(self, frame: Frame, quadratic: ChainQuadratic, base: np.ndarray) -> Climbed:
        begun: float | None = None

        def report(steps: int, elbo: float) -> None:
            nonlocal begun
            self.report("certificate", steps, elbo)
            begun = elbo if begun is None else begun
            if elbo - begun > _RUN_OFF:
                raise _RunOff

        return climb(
            _FixedDrawsELBO(self.density, frame, quadratic, base),  # type: ignore[arg-type]
            np.zeros(parameters(self.chain)),
            residual=_RESIDUAL * self.problem.tolerance,
            least_steps=_LEAST_STEPS,
            max_evaluations=int(np.clip(self.left // len(base), 1, _EVALUATIONS)),
            report=report,
        )

    def _bound(self, ends: list[Climbed], draws: int) -> Certificate:
        """The mean of what climbs gained on draws that the fit has not seen, what they may have left included."""
        gains = np.array([end.elbo - end.begun + max(end.residual, _RESIDUAL * self.problem.tolerance) for end in ends])
        gap = Estimate.of_mean(gains)
        # The Hessian has the pattern: where the ELBO of the family is stationary, so is that of all Gaussians, which is
        # concave where log p is.
        concave = self.problem.model.log_concave and self.problem.chart == self.problem.model.chart
        scope = Scope.GLOBAL if concave else Scope.LOCAL
        limit = gap.value + stats.t.ppf(_LEVEL, len(gains) - 1) * gap.se
        return Certificate(gap, float(limit), scope, draws, SETS)


def _uncoupled(precision: Pattern) -> Pattern:
    """The precision without what couples the shared coordinates to the chain, and bent downwards among them.

    Far from the optimum scales and states may pull each other where no Gaussian follows; apart, each has its own.
    """
    values, vectors = np.linalg.eigh(np.asarray(precision.corner))
    corner = (vectors * np.maximum(np.abs(values), 1e-3 * np.abs(values).max(initial=1.0))) @ vectors.T
    return precision._replace(side=jnp.zeros_like(precision.side), corner=corner)
