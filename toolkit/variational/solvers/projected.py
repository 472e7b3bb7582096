"""Natural-gradient steps for Gaussian families whose covariance is not free, such as a diagonal plus a few columns.

A Gaussian that is the best of its family has, by Bonnet's and Price's identities, the same slope and is as good there
as if log p were its own projection on quadratics: the quadratic with the means of log p's gradient and Hessian over q.
So each step projects log p from draws of q (`nearest_quadratic`), averages this quadratic with those of the steps
before, and moves q to the family's best under that mean, for which no draws are needed. In a full-rank family that is
the natural-gradient step of `natural`; in a smaller one only those of the mean's numbers count that the family can
follow, and its noise falls accordingly.

Reference: Salimans & Knowles (2013), Fixed-form variational posterior approximation through stochastic linear
regression, sections 3 and 5; Mishkin et al. (2018), SLANG, take such steps for a diagonal plus columns, but keep the
mean's leading eigenvectors, which is not the best of the family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg
from scipy.optimize import minimize

from toolkit.variational.density import LogDensity
from toolkit.variational.gaussians import Family, Frame, Quadratic
from toolkit.variational.projection import nearest_quadratic
from toolkit.variational.solvers.natural import Taken

_LEAST, _MOST = 0.1, 20.0  # by how much a step may change the mean's curvature in any direction
_DRIFTED = 4.0  # times the frame's curvature in some direction, or a fourth of it: a new frame is then taken
_EVALUATIONS = 60  # of the known ELBO, in a step
_MEMORY = 20
_SETTLED = 1e-5  # nats that an evaluation still gains: the member is then the best
_PROBE = 0.1  # of a gradient, by which the known ELBO is tilted to see where its best goes


@dataclass(frozen=True)
class Fitted:
    """A member that is its family's best, were log p a quadratic.

    Attributes:
        frame: What the family is measured with.
        family: The family.
        x: The member's parameters.
        quadratic: The quadratic, whose precision is a positive definite matrix.
    """

    frame: Frame
    family: Family
    x: np.ndarray
    quadratic: Quadratic


@dataclass(frozen=True)
class _Seen:
    """What draws of a member say.

    Attributes:
        at: The member.
        elbo: In nats; -inf where a draw's density is not finite.
        quadratic: Log p's projection.
        gradient: Of the ELBO, in the family's parameters.
    """

    at: Fitted
    elbo: float
    quadratic: Quadratic
    gradient: np.ndarray


class Projected:
    """Steps in any Gaussian family, by the quadratic that its draws see.

    Args:
        density: What to approximate.
        form: The family, measured by a frame.
        base: Standard normal numbers that a draw takes.
    """

    def __init__(self, density: LogDensity, form: Callable[[Frame], Family], base: int) -> None:
        self._density, self._form, self.base = density, form, base

    def look(self, at: Fitted, base: np.ndarray) -> _Seen:
        """The slope at a member."""
        try:
            member = at.family.member(at.x)
        except np.linalg.LinAlgError:  # so wide that rounding has made it singular
            return _Seen(at, -np.inf, at.quadratic, np.zeros_like(at.x))
        rests, near = nearest_quadratic(self._density, at.family, member, at.quadratic, base)
        if near is None:
            return _Seen(at, -np.inf, at.quadratic, np.zeros_like(at.x))
        elbo = float(rests.mean()) + at.family.exact(at.x, member, at.quadratic)[0]
        return _Seen(at, elbo, near, at.family.exact(at.x, member, near)[1])

    def step(self, at: Fitted, slope: _Seen, rate: float) -> Fitted:
        """The best member under the weighted mean of the two quadratics."""
        mean = _mean(at.quadratic, slope.quadratic, rate)
        if not _is_between(mean.precision, at.frame.precision, 1 / _DRIFTED, _DRIFTED):
            frame = Frame.of(mean.centre, mean.precision)
            family = self._form(frame)
            at = Fitted(frame, family, family.near(at.family.undrawn(at.x)), mean)
        return replace(at, x=best_member(at.family, at.x, mean), quadratic=mean)

    def product(self, taken: Taken[Fitted, _Seen], slope: _Seen) -> float:
        """The step itself is along H^-1 g; where the frame has changed it is read in the slope's."""
        family = slope.at.family
        begin, end = (
            one.x if one.family is family else family.near(one.family.undrawn(one.x))
            for one in (taken.begin, taken.end)
        )
        return float(0.5 * slope.gradient @ (end - begin)) / taken.rate

    def decrement(self, at: Fitted, first: _Seen, second: _Seen) -> float:
        """Where the best under the quadratic at hand goes when that is tilted by a part of the first gradient."""
        here = at.family.exact(at.x, at.family.undrawn(at.x), at.quadratic)[1]
        tilted = best_member(at.family, at.x, at.quadratic, tilt=_PROBE * first.gradient - here)
        return float(0.5 * second.gradient @ (tilted - at.x)) / _PROBE


def best_member(family: Family, x: np.ndarray, quadratic: Quadratic, tilt: np.ndarray | None = None) -> np.ndarray:
    """The parameters of the family's best, were log p a quadratic, from those of a member nearby.

    Args:
        family: The family.
        x: Where to begin, (parameters,).
        quadratic: Log p.
        tilt: A gradient (parameters,) that is added to the ELBO's.
    """
    begun, slope = family.exact(x, family.undrawn(x), quadratic)
    slope = slope if tilt is None else slope + tilt
    length = float(np.linalg.norm(slope))
    if not length > 0:
        return x
    # L-BFGS-B's first step has length one, whatever the gradient; in a frame's parameters the gradient is the step.
    unit = min(1.0, length)

    def loss(steps: np.ndarray) -> tuple[float, np.ndarray]:
        at = x + unit * steps
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            try:
                elbo, gradient = family.exact(at, family.undrawn(at), quadratic)
            except np.linalg.LinAlgError:
                return 1e300, np.zeros_like(at)
        if tilt is not None:
            elbo, gradient = elbo + float(tilt @ (at - x)), gradient + tilt
        if not (np.isfinite(elbo) and np.isfinite(gradient).all()):
            return 1e300, np.zeros_like(at)  # a wall, which the line search turns away from
        return begun - elbo, -unit * gradient  # from zero, so that SciPy's relative change is one in nats

    limits = {"maxcor": _MEMORY, "maxfun": _EVALUATIONS, "maxiter": _EVALUATIONS, "ftol": _SETTLED, "gtol": 0.0}
    found = minimize(loss, np.zeros_like(x), jac=True, method="L-BFGS-B", options=limits)
    return x + unit * np.asarray(found.x)


def _mean(old: Quadratic, new: Quadratic, rate: float) -> Quadratic:
    """The weighted mean of two quadratics around the new one's centre, its curvature within bounds of the old one's."""
    slope = old.gradient - old.times((new.centre - old.centre)[None])[0]  # the old one's, around the new one's centre
    gradient = slope + rate * (new.gradient - slope)
    precision = _bounded(old.precision, old.precision + rate * (new.precision - old.precision))
    return Quadratic(new.centre, gradient, precision)


def _bounded(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """The new matrix, in no direction bent by less or more than bounds times the old one."""
    if _is_between(new, old, _LEAST, _MOST):
        return new
    values, vectors = scipy.linalg.eigh(new, old, check_finite=False)  # vectors' old vectors = 1
    back = old @ vectors
    bounded = (back * np.clip(values, _LEAST, _MOST)) @ back.T
    return (bounded + bounded.T) / 2


def _is_between(matrix: np.ndarray, other: np.ndarray, least: float, most: float) -> bool:
    """Whether a matrix lies between multiples of a positive definite one, which two factorisations show."""
    other = np.diag(other) if other.ndim == 1 else other
    try:
        scipy.linalg.cholesky(matrix - least * other, lower=True, check_finite=False)
        scipy.linalg.cholesky(most * other - matrix, lower=True, check_finite=False)
    except scipy.linalg.LinAlgError:
        return False
    return True
