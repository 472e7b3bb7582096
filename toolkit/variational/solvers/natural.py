"""Natural-gradient steps for a full-rank Gaussian, by the Bonnet and Price identities.

For q = N(m, P^-1) the ELBO's natural gradient needs two averages over q: of log p's gradient, which moves the location,
and of its Hessian, whose negative is the precision that q should have. Both come from gradients alone: with the draws
whitened by q's own factor, z = m + L e, Stein's identity gives E[L' H L] = E[(L' g) e']. What the current q would
explain, L' g = -e, is taken out before averaging, so that on a Gaussian target there is no noise at all.

Reference: Khan & Rue (2023), The Bayesian learning rule, section 3.2; Opper & Archambeau (2009), equations 5 and 6;
Lin, Schmidt & Khan (2020), Handling the positive-definite constraint in the Bayesian learning rule, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from toolkit.variational.density import LogDensity
from toolkit.variational.draws import Key, base_draws, branch
from toolkit.variational.gaussians import inverse_factor

_LEAST, _MOST = 0.05, 20.0  # by how much a step may change a variance, before it is weighed by its rate
STEPS = 150  # averaged ones, at most
_SLOWEST = 0.01  # a rate at which steps are no longer worth their draws
_WORTH = 0.03  # nats, that a step of a start must gain: the climb that follows is cheaper
_NEAR = 2.0  # times the gap that noise alone keeps up at a constant rate
_ENOUGH = 0.5  # of the tolerance, since the estimate has an error
_SMOOTHED = 6  # products of gradients, over which the estimate of what is left to gain is averaged


@dataclass(frozen=True)
class Gaussian:
    """N(loc, factor factor') in unconstrained space.

    Attributes:
        loc: Shape (size,).
        factor: Lower-triangular, shape (size, size).
        elbo: In nats, on the draws that moved it: too high where these are few; -inf if it is not finite there.
    """

    loc: np.ndarray
    factor: np.ndarray
    elbo: float

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
        shift: E[L' g], shape (size,).
        bend: I + E[L' H L], shape (size, size): zero where the covariance is the best.
    """

    elbo: float
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


@dataclass(frozen=True)
class Averaged:
    """Where averaged natural-gradient steps ended.

    Attributes:
        gaussian: The last iterate, which is a mean over all steps; its ELBO is the last step's, on that step's draws.
        gap: In nats, an estimate of what the family's best still gains: Newton's decrement, as a mean over the last few
            iterates; infinite before the second.
        arrived: Whether that came to be well below the tolerance; else the steps were used up.
        course: The ELBO at each step, in nats, and the gradients computed by then, (steps, 2).
    """

    gaussian: Gaussian
    gap: float
    arrived: bool
    course: np.ndarray


def averaged_steps(
    density: LogDensity,
    begin: Gaussian,
    *,
    key: Key,
    draws: int,
    tolerance: float,
    most: int = STEPS,
    report: Callable[[int, float], None] | None = None,
) -> Averaged:
    """The Gaussian to which steps on ever new draws converge, at rates that fall as 1 / step once they have come near.

    At such rates precision and location are means over all these steps, and their noise falls with the number of all
    draws, not with those of one step: the way to a full-rank optimum in dimensions in which no affordable set of fixed
    draws pins it. A mean over steps from afar would keep some of where they began; so the rate stays what it is until
    what is left to gain is less than the noise.

    Args:
        density: What to approximate.
        begin: Where to begin.
        key: Random key.
        draws: In each step, a power of two.
        tolerance: In nats: steps end when the decrement is well below it.
        most: The most steps.
        report: Called at each step with its number and ELBO.
    """
    loc, factor = begin.loc, begin.factor
    course: list[tuple[float, float]] = []
    products: list[float] = []
    taken = 0.0  # the last step's rate
    last: tuple[np.ndarray, np.ndarray, _Slope] | None = None
    gap, elbo, near, damping, arrived = np.inf, begin.elbo, 0, 1.0, False
    for number in range(1, most + 1):
        base = base_draws(draws, len(loc), key=branch(key, number))
        slope = _slope(density, loc, factor, base)
        course.append((slope.elbo, density.evaluations))
        if report:
            report(number, slope.elbo)
        if not np.isfinite(slope.elbo):
            if last is None:
                break
            damping /= 2  # a shorter step from where the last one set out
            taken = damping / (near + 3)
            loc, factor = _step(*last, taken)
            continue
        if last is not None:
            # The draws of two steps are independent, but the later iterate has moved by a share of the earlier noise.
            square = _product(last[2], last[2])
            products.append(_product(last[2], slope) + taken * square)
            noise = max(0.0, square - products[-1])
            if near or products[-1] < max(_NEAR * taken / (2 - taken) * noise, tolerance / 4):
                near += 1
            gap = float(np.mean(products[-min(_SMOOTHED, max(near, 1)) :]))
        elbo = slope.elbo
        arrived = near >= _SMOOTHED and gap < _ENOUGH * tolerance
        if arrived:
            break
        last, taken, damping = (loc, factor, slope), damping / (near + 3), min(1.0, 1.5 * damping)
        loc, factor = _step(*last, taken)
    return Averaged(Gaussian(loc, factor, elbo), float(gap), arrived, np.array(course))


def decrement(density: LogDensity, loc: np.ndarray, factor: np.ndarray, bases: list[np.ndarray]) -> np.ndarray:
    """Estimates, in nats, of the gap to the best full-rank Gaussian nearby, one for each pair of independent draws.

    Half the squared natural gradient: |L' E g|^2 / 2 + |I + L' E[H] L|^2 / 4. A square of a noisy mean is too large, so
    each is the product of the means over two sets of draws.

    Args:
        density: What is approximated.
        loc: Shape (size,).
        factor: Shape (size, size).
        bases: Independent sets of base draws, an even number, (draws, size) each.
    """
    slopes = [_slope(density, loc, factor, base) for base in bases]
    return np.array([_product(a, b) for a, b in zip(slopes[::2], slopes[1::2], strict=True)])


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
            return _Slope(-np.inf, np.zeros(size), np.zeros((size, size)))
        elbo = (values + 0.5 * np.einsum("ni,ni->n", base, base)).mean() + np.log(diagonal).sum()
        bend = whitened.T @ base / len(base)
    return _Slope(float(elbo + 0.5 * size * np.log(2 * np.pi)), whitened.mean(0), (bend + bend.T) / 2)


def _step(loc: np.ndarray, factor: np.ndarray, slope: _Slope, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Location and factor after a step whose precision is the weighted mean of the old and the new one."""
    unit = np.eye(len(loc))
    turned = inverse_factor((1 - rate) * unit + rate * _bounded(unit - slope.bend))
    return loc + rate * factor @ (turned @ (turned.T @ slope.shift)), factor @ turned


def _bounded(precision: np.ndarray) -> np.ndarray:
    """The matrix with its eigenvalues brought within bounds; as it is where a factorisation shows that they are."""
    unit = np.eye(len(precision))
    try:
        scipy.linalg.cholesky(precision - _LEAST * unit, lower=True, check_finite=False)
        scipy.linalg.cholesky(_MOST * unit - precision, lower=True, check_finite=False)
    except scipy.linalg.LinAlgError:
        values, vectors = scipy.linalg.eigh(precision, check_finite=False)
        return (vectors * np.clip(values, _LEAST, _MOST)) @ vectors.T
    return precision


def is_safely_positive(matrix: np.ndarray) -> bool:
    """Whether a symmetric matrix, scaled to a unit diagonal, has no eigenvalue below 1e-8."""
    diagonal = np.diag(matrix)
    if not (np.isfinite(matrix).all() and (diagonal > 0).all()):
        return False
    root = np.sqrt(diagonal)
    scaled = matrix / root / root[:, None]
    try:
        # Cholesky's factorisation exists if and only if all eigenvalues are positive; it takes a tenth of their time.
        scipy.linalg.cholesky(scaled - 1e-8 * np.eye(len(matrix)), lower=True, check_finite=False)
    except scipy.linalg.LinAlgError:
        return False
    return True
