"""Natural-gradient steps for Gaussian families whose covariance is not free, such as a diagonal plus a few columns.

A Gaussian that is the best of its family has, by Bonnet's and Price's identities, the same slope and is as good there
as if log p were its own projection on quadratics: the quadratic with the means of log p's gradient and Hessian over q.
So each step projects log p from draws of q (`nearest_quadratic`), averages this quadratic with those of the steps
before, and moves q to the family's best under that mean, for which no draws are needed. In a full-rank family that is
the natural-gradient step of `natural`, but for its bounds; in a smaller one only those of the mean's numbers count that
the family can follow, and its noise falls accordingly.

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
from toolkit.variational.solvers.fixed_draws import newton_step
from toolkit.variational.solvers.natural import Taken, is_between

_LEAST, _MOST = 0.6, 8.0  # by how much a step may change the mean's curvature in any direction
_DRIFTED = 4.0  # times the frame's curvature in some direction, or a fourth of it: a new frame is then taken
_EVALUATIONS = 60  # of the known ELBO, in a step
_MEMORY = 20
_SETTLED = 0.01  # of the slope where it began, in any direction: the member is then the best
_FLATTEST, _EXACT, _CG_STEPS = 1e-5, 0.01, 300  # of the curvature by which a decrement is reckoned


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
        se: Its standard error, were the draws independent.
        quadratic: Log p's projection.
        gradient: Of the ELBO, in the family's parameters.
    """

    at: Fitted
    elbo: float
    se: float
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
        nothing = _Seen(at, -np.inf, np.nan, at.quadratic, np.zeros_like(at.x))
        try:
            member = at.family.member(at.x)
        except np.linalg.LinAlgError:  # so wide that rounding has made it singular
            return nothing
        rests, near = nearest_quadratic(self._density, at.family, member, at.quadratic, base)
        if near is None:
            return nothing
        elbo = float(rests.mean()) + at.family.exact(at.x, member, at.quadratic)[0]
        gradient = at.family.exact(at.x, member, near)[1]
        return _Seen(at, elbo, float(rests.std()) / len(base) ** 0.5, near, gradient)

    def step(self, at: Fitted, slope: _Seen, rate: float) -> Fitted:
        """The best member under the weighted mean of the two quadratics, in a new frame where the old one is far."""
        mean = _mean(at.quadratic, slope.quadratic, rate)
        if not is_between(mean.precision, as_matrix(at.frame.precision), 1 / _DRIFTED, _DRIFTED):
            frame = Frame.of(mean.centre, mean.precision)
            family, mean = self._form(frame), replace(mean, precision=frame.precision)
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
        """By the curvature of the known ELBO, which is positive at the best member under the quadratic at hand."""
        try:
            newton = newton_step(
                at.family, at.quadratic, at.x, first.gradient, flattest=_FLATTEST, rtol=_EXACT, most=_CG_STEPS
            )
        except np.linalg.LinAlgError:
            return np.inf
        return np.inf if newton.bent_upwards else float(0.5 * second.gradient @ newton.step)


def best_member(family: Family, x: np.ndarray, quadratic: Quadratic) -> np.ndarray:
    """The parameters (parameters,) of the family's best, were log p a quadratic, from those of a member nearby."""
    begun, slope = family.exact(x, family.undrawn(x), quadratic)
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
            except np.linalg.LinAlgError:  # so far off that the columns are no numbers
                return 1e300, np.zeros_like(at)
        if not (np.isfinite(elbo) and np.isfinite(gradient).all()):
            return 1e300, np.zeros_like(at)  # a wall, which the line search turns away from
        return begun - elbo, -unit * gradient

    settled = _SETTLED * unit * float(np.abs(slope).max())
    limits = {"maxcor": _MEMORY, "maxfun": _EVALUATIONS, "maxiter": _EVALUATIONS, "ftol": 0.0, "gtol": settled}
    found = minimize(loss, np.zeros_like(x), jac=True, method="L-BFGS-B", options=limits)
    return x + unit * np.asarray(found.x)


def as_matrix(diagonal: np.ndarray) -> np.ndarray:
    """A matrix (size, size), also from a diagonal alone (size,)."""
    return np.diag(diagonal) if diagonal.ndim == 1 else diagonal


def _mean(old: Quadratic, new: Quadratic, rate: float) -> Quadratic:
    """The weighted mean of two quadratics around the new one's centre, its curvature within bounds of the old one's.

    What the new one adds is what few draws see, with noise that is large where the member is much narrower than the
    quadratic. The mean is bounded and not what it is made of: at small rates no bound acts, and the noise averages out.
    """
    slope = old.gradient - old.times((new.centre - old.centre)[None])[0]  # the old one's, around the new one's centre
    gradient = slope + rate * (new.gradient - slope)
    mean = old.precision + rate * (new.precision - old.precision)
    if not is_between(mean, old.precision, _LEAST, _MOST):
        values, vectors = scipy.linalg.eigh(mean, old.precision, check_finite=False)
        back = old.precision @ vectors  # vectors' back = 1
        bounded = (back * np.clip(values, _LEAST, _MOST)) @ back.T
        mean = (bounded + bounded.T) / 2
    return Quadratic(new.centre, gradient, mean)
