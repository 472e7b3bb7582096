"""Natural-gradient steps for Gaussians, by the Bonnet and Price identities; those for a full-rank one.

For q = N(m, P^-1) the ELBO's natural gradient needs two averages over q: of log p's gradient, which moves the location,
and of its Hessian, whose negative is the precision that q should have. Both come from gradients alone: with the draws
whitened by q's own factor, z = m + L e, Stein's identity gives E[L' H L] = E[(L' g) e']. What the current q would
explain, L' g = -e, is taken out before averaging, so that on a Gaussian target there is no noise at all.

Reference: Khan & Rue (2023), The Bayesian learning rule, section 3.2; Opper & Archambeau (2009), equations 5 and 6;
Lin, Schmidt & Khan (2020), Handling the positive-definite constraint in the Bayesian learning rule, section 3.

Steps at falling rates, and the decrement that ends them, are the same for every family (`Rule`); `projected` has the
rule for those whose covariance is not free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import scipy.linalg

from toolkit.variational.density import LogDensity
from toolkit.variational.draws import Key, branch, mirrored_draws
from toolkit.variational.gaussians import inverse_factor

_LEAST, _MOST = 0.05, 20.0  # by how much a step may change a variance, before it is weighed by its rate
STEPS = 150  # averaged ones, at most
_SLOWEST = 0.01  # a rate at which steps are no longer worth their draws
_WORTH = 0.03  # nats, that a step of a start must gain: the climb that follows is cheaper
_NEAR = 2.0  # times the gap that noise alone keeps up at a constant rate
_ENOUGH = 0.5  # of the tolerance, since the estimate has an error
_FALL = 5.0  # standard errors by which a step may seem to lower the ELBO
_ROUNDING = 1e-9  # of an ELBO
_SHORTEST = 1e-3  # times its rate, of a step that is tried again
_SMOOTHED = 6  # products of gradients, over which the estimate of what is left to gain is averaged, or the last half


@dataclass(frozen=True)
class Gaussian:
    """N(loc, factor factor') in unconstrained space.

    Attributes:
        loc: Shape (size,).
        factor: Lower-triangular, shape (size, size).
        elbo: In nats, on the draws that moved it: too high where these are few; -inf if it is not finite there, NaN
            where none were drawn.
    """

    loc: np.ndarray
    factor: np.ndarray
    elbo: float = np.nan

    @property
    def precision(self) -> np.ndarray:
        """Shape (size, size)."""
        inverse = scipy.linalg.solve_triangular(self.factor, np.eye(len(self.loc)), lower=True)
        return inverse.T @ inverse


@dataclass(frozen=True)
class _Slope:
    """The ELBO of a Gaussian and its natural gradient, in units of the Gaussian's own factor.

    Attributes:
        elbo: In nats.
        se: Its standard error, were the draws independent.
        shift: E[L' g], shape (size,).
        bend: I + E[L' H L], shape (size, size): zero where the covariance is the best.
    """

    elbo: float
    se: float
    shift: np.ndarray
    bend: np.ndarray


def natural_steps(
    density: LogDensity, loc: np.ndarray, precision: np.ndarray, *, base: np.ndarray, steps: int = 12
) -> Gaussian:
    """The Gaussian after at most so many steps on common draws, each taken only if it raises the ELBO there.

    Args:
        density: What to approximate.
        loc: Where to begin, shape (size,).
        precision: With which precision, shape (size, size), positive definite.
        base: Base draws, (draws, size).
        steps: The most steps; they end when one gains less than 0.03 nats.
    """
    factor = inverse_factor(precision)
    slope = _slope(density, loc, factor, base)
    rate = 1.0
    if not np.isfinite(slope.elbo):
        return Gaussian(loc, factor, -np.inf)
    for _ in range(steps):
        if _product(slope, slope) < _WORTH:  # to second order no step gains more
            break
        moved, turned = _step(loc, factor, slope, rate)
        new = _slope(density, moved, turned, base)
        if not new.elbo > slope.elbo:
            rate /= 3
            if rate < _SLOWEST:
                break
            continue
        gain, rate = new.elbo - slope.elbo, min(1.0, 2 * rate)
        loc, factor, slope = moved, turned, new
        if gain < _WORTH:
            break
    return Gaussian(loc, factor, slope.elbo)


class Slope(Protocol):
    """What draws say of a Gaussian: at least its ELBO.

    Its error is that of independent draws; of mirrored and evenly spread ones it is mostly smaller.
    """

    @property
    def elbo(self) -> float:
        """In nats; -inf where a draw has no finite density."""
        ...

    @property
    def se(self) -> float:
        """The ELBO's standard error in nats, were the draws independent."""
        ...


@dataclass(frozen=True)
class Taken[At, S: Slope]:
    """A step.

    Attributes:
        begin: From where.
        slope: What draws there said.
        rate: With what weight.
        end: To where.
    """

    begin: At
    slope: S
    rate: float
    end: At


class Rule[At, S: Slope](Protocol):
    """How natural-gradient steps are taken in a family of Gaussians.

    Attributes:
        base: Standard normal numbers that a draw takes.
    """

    @property
    def base(self) -> int:
        """Standard normal numbers that a draw takes."""
        ...

    def look(self, at: At, base: np.ndarray) -> S:
        """The slope at a Gaussian on base draws (n, base)."""
        ...

    def step(self, at: At, slope: S, rate: float) -> At:
        """What a weighted mean of the old curvature and slope and of those seen leads to.

        Raises:
            numpy.linalg.LinAlgError: Rounding leaves no Gaussian there.
        """
        ...

    def product(self, taken: Taken[At, S], slope: S) -> float:
        """Half of g' H^-1 h in nats, where `taken` was a step along H^-1 g, and h is the slope's gradient."""
        ...

    def decrement(self, at: At, first: S, second: S) -> float:
        """Half of g' H^-1 h in nats, of two gradients at one place; inf where H is bent upwards."""
        ...


@dataclass(frozen=True)
class Averaged[At]:
    """Where averaged natural-gradient steps ended.

    Attributes:
        at: The last iterate that was looked at.
        gap: In nats, an estimate of what the family's best still gains: Newton's decrement, as a mean over the last few
            iterates; infinite before the second.
        arrived: Whether that came to be well below the tolerance; else the steps were used up, or led nowhere.
        near: Steps since it came near, over which the iterate is a mean.
        course: The ELBO at each step, in nats, (steps,).
    """

    at: At
    gap: float
    arrived: bool
    near: int
    course: np.ndarray


def averaged_steps[At, S: Slope](
    rule: Rule[At, S],
    begin: At,
    *,
    key: Key,
    draws: int,
    tolerance: float,
    near: int = 0,
    most: int = STEPS,
    report: Callable[[int, float], None] | None = None,
) -> Averaged[At]:
    """The Gaussian to which steps on ever new draws converge, at rates that fall as 1 / step once they have come near.

    At such rates precision and location are means over all these steps, and their noise falls with the number of all
    draws, not with those of one step: the way to the optimum of a family with so many parameters that no affordable set
    of fixed draws pins it. A mean over steps from afar would keep some of where they began; so the rate stays what it
    is until what is left to gain is less than the noise. A step after which the ELBO is lower than noise explains, or
    not finite, is taken again at half its rate.

    Args:
        rule: How steps are taken.
        begin: Where to begin.
        key: Random key.
        draws: In each step, a power of two.
        tolerance: In nats: steps end when the decrement is well below it.
        near: Steps over which `begin` is a mean already.
        most: The most steps.
        report: Called at each step with its number and ELBO.
    """
    at = begin
    course: list[float] = []
    products: list[float] = []
    last: Taken[At, S] | None = None
    gap, first, damping, arrived = np.inf, near, 1.0, False
    for number in range(1, most + 1):
        slope = rule.look(at, mirrored_draws(draws, rule.base, key=branch(key, number)))
        course.append(slope.elbo)
        if report:
            report(number, slope.elbo)
        if last is None and not np.isfinite(slope.elbo):
            break
        square = rule.product(last, last.slope) if last else 0.0
        if last and _falls(last, slope, square):
            damping /= 2  # a shorter step from where the last one set out
            at = last.begin
            last = _taken(rule, at, last.slope, last.rate / 2) if damping > _SHORTEST else None
            if last is None:
                break
            at = last.end
            continue
        if last:
            # The draws of two steps are independent, but the later iterate has moved by a share of the earlier noise.
            products.append(rule.product(last, slope) + last.rate * square)
            noise = max(0.0, square - products[-1])
            if near or products[-1] < max(_NEAR * last.rate / (2 - last.rate) * noise, tolerance / 4):
                near += 1
            # As many as noise asks for: to stop where a mean over few happens to be low would be to stop too soon.
            gap = float(np.mean(products[-max(min(_SMOOTHED, near - first), (near - first) // 2, 1) :]))
        arrived = near - first >= _SMOOTHED and gap < _ENOUGH * tolerance
        seen = at
        last, damping = None if arrived else _taken(rule, at, slope, damping / (near + 3)), min(1.0, 1.5 * damping)
        if last is None:
            return Averaged(seen, gap, arrived, near, np.array(course))
        at = last.end
    return Averaged(last.begin if last else at, gap, False, near, np.array(course))


def _falls[At, S: Slope](last: Taken[At, S], slope: S, square: float) -> bool:
    """Whether the ELBO after a step is lower than the noise of its direction and that of both ELBOs explain."""
    # The error is the earlier one's, for both: where the later one's is larger, that is because the step was too long.
    explained = last.rate**2 * square + _FALL * 2**0.5 * last.slope.se
    return not slope.elbo >= last.slope.elbo - explained - _ROUNDING * (1 + abs(last.slope.elbo))


def _taken[At, S: Slope](rule: Rule[At, S], at: At, slope: S, rate: float) -> Taken[At, S] | None:
    """A step, shorter where rounding leaves no Gaussian at its end; None where a short one does not help."""
    least = _SHORTEST * rate
    while rate > least:
        try:
            return Taken(at, slope, rate, rule.step(at, slope, rate))
        except np.linalg.LinAlgError:
            rate /= 4
    return None


class FullRank:
    """Steps of a full-rank Gaussian, in units of its own factor.

    Args:
        density: What to approximate.
    """

    def __init__(self, density: LogDensity) -> None:
        self._density = density
        self.base = density.size

    def look(self, at: Gaussian, base: np.ndarray) -> _Slope:
        """The slope."""
        return _slope(self._density, at.loc, at.factor, base)

    def step(self, at: Gaussian, slope: _Slope, rate: float) -> Gaussian:
        """A step, whose ELBO is not known."""
        return Gaussian(*_step(at.loc, at.factor, slope, rate))

    def product(self, taken: Taken[Gaussian, _Slope], slope: _Slope) -> float:
        """As the Fisher metric has it, which at the optimum is the curvature."""
        return _product(taken.slope, slope)

    def decrement(self, at: Gaussian, first: _Slope, second: _Slope) -> float:
        """Half the squared natural gradient, |L' E g|^2 / 2 + |I + L' E[H] L|^2 / 4."""
        return _product(first, second)


def _product(first: _Slope, second: _Slope) -> float:
    """Half the inner product of two gradients in the Fisher metric."""
    return float(0.5 * first.shift @ second.shift + 0.25 * np.einsum("ij,ij->", first.bend, second.bend))


def _slope(density: LogDensity, loc: np.ndarray, factor: np.ndarray, base: np.ndarray) -> _Slope:
    size = len(loc)
    values, gradients = density.over(loc + base @ factor.T)
    diagonal = np.diag(factor)
    with np.errstate(over="ignore", invalid="ignore"):
        whitened = gradients @ factor + base  # what -|e|^2 / 2 does not explain
        finite = np.isfinite(values).all() and np.isfinite(whitened).all() and (diagonal > 0).all()
        if not finite:
            return _Slope(-np.inf, np.nan, np.zeros(size), np.zeros((size, size)))
        terms = values + 0.5 * np.einsum("ni,ni->n", base, base)
        elbo = terms.mean() + np.log(diagonal).sum() + 0.5 * size * np.log(2 * np.pi)
        bend = whitened.T @ base / len(base)
    return _Slope(float(elbo), float(terms.std()) / len(base) ** 0.5, whitened.mean(0), (bend + bend.T) / 2)


def _step(loc: np.ndarray, factor: np.ndarray, slope: _Slope, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Location and factor after a step whose precision is the weighted mean of the old and the new one."""
    unit = np.eye(len(loc))
    turned = inverse_factor((1 - rate) * unit + rate * _bounded(unit - slope.bend))
    return loc + rate * factor @ (turned @ (turned.T @ slope.shift)), factor @ turned


def _bounded(precision: np.ndarray) -> np.ndarray:
    """The matrix with its eigenvalues brought within bounds; as it is where a factorisation shows that they are."""
    if is_between(precision, np.eye(len(precision)), _LEAST, _MOST):
        return precision
    values, vectors = scipy.linalg.eigh(precision, check_finite=False)
    return (vectors * np.clip(values, _LEAST, _MOST)) @ vectors.T


def is_between(matrix: np.ndarray, other: np.ndarray, least: float, most: float) -> bool:
    """Whether a symmetric matrix lies between two multiples of a positive definite one."""
    try:
        # Cholesky's factorisation exists if and only if all eigenvalues are positive; it takes a tenth of their time.
        scipy.linalg.cholesky(matrix - least * other, lower=True, check_finite=False)
        scipy.linalg.cholesky(most * other - matrix, lower=True, check_finite=False)
    except scipy.linalg.LinAlgError:
        return False
    return True


def is_safely_positive(matrix: np.ndarray) -> bool:
    """Whether a symmetric matrix, scaled to a unit diagonal, has no eigenvalue below 1e-8."""
    diagonal = np.diag(matrix)
    if not (np.isfinite(matrix).all() and (diagonal > 0).all()):
        return False
    root = np.sqrt(diagonal)
    scaled = matrix / root / root[:, None]
    try:
        scipy.linalg.cholesky(scaled - 1e-8 * np.eye(len(matrix)), lower=True, check_finite=False)
    except scipy.linalg.LinAlgError:
        return False
    return True
