"""Fixed draws and a quasi-Newton method: the ELBO on common base draws is a smooth function with a maximum to find.

Reference: Giordano, Ingram & Broderick (2024), Black box variational inference with a deterministic objective (DADVI);
Burroni, Domke & Sheldon (2024), Sample average approximation for black-box VI. Here the draws' first two moments are
matched to the normal's (`matched_draws`), so that fewer draws do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import scipy.linalg
from scipy.optimize import OptimizeResult, minimize
from scipy.sparse.linalg import LinearOperator, cg

from toolkit.variational.density import LogDensity
from toolkit.variational.gaussians import Family, Quadratic

_MEMORY = 20  # pairs of steps that L-BFGS remembers
EVALUATIONS = 200  # of a climb, at most
_DIFFERENCE = 1e-5  # of a curvature's difference quotient, in working parameters
_FLATTEST = 1e-3
_CG_STEPS = 100
MOST_PARAMETERS = 4_000  # whose curvature is factorised
_LEAST_BENDS = (0.25, 1.0)  # added to a curvature: less would let steps leap along what is flat only nearby


class Parametrised(Protocol):
    """What a climb asks of a family of Gaussians: see `toolkit.variational.gaussians.Family`."""

    @property
    def parameters(self) -> int:
        """How many a member has."""
        ...

    def undrawn(self, x: np.ndarray) -> Any:
        """A member, as `exact` takes it."""
        ...

    def exact(self, x: np.ndarray, member: Any, quadratic: Any) -> tuple[float, np.ndarray]:
        """Entropy plus the mean of a quadratic over the member, in nats, and its gradient (parameters,)."""
        ...

    def bend(self, x: np.ndarray, quadratic: Any) -> np.ndarray | None:
        """Minus the Hessian of `exact`; None where it is about one."""
        ...


class Objective(Protocol):
    """What can be climbed: an ELBO in nats and its gradient (parameters,), and the part of it that no draws are in."""

    @property
    def family(self) -> Parametrised:
        """Over whose members."""
        ...

    @property
    def quadratic(self) -> Any:
        """Near log p."""
        ...

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """At parameters (parameters,)."""
        ...


class FixedDrawsELBO:
    """The ELBO in nats as a function of a family's parameters, on base draws that do not change.

    Args:
        density: Log p(x, z).
        family: Whose members are compared.
        quadratic: Near log p: a control variate for single ELBOs, and the curvature by which a climb's end is judged.
        base: Base draws, (draws, family.base).
    """

    def __init__(self, density: LogDensity, family: Family, quadratic: Quadratic, base: np.ndarray) -> None:
        self.density, self.family, self.quadratic, self.base = density, family, quadratic, base
        self._nothing = Quadratic(quadratic.centre, np.zeros(family.size), np.zeros(family.size))

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """ELBO and its gradient (parameters,); -inf where any draw's log density or gradient is not finite."""
        with np.errstate(divide="ignore"):  # a scale that underflows has no entropy
            try:
                member = self.family.member(x)
                entropy, by_entropy = self.family.exact(x, member, self._nothing)
            except np.linalg.LinAlgError:  # a low-rank Gaussian so wide that its columns are all that is left of it
                return -np.inf, np.zeros_like(x)
        values, gradients = self.density.over(self.family.points(member, self.base))
        elbo = float(values.mean()) + entropy
        if not (np.isfinite(elbo) and np.isfinite(gradients).all()):
            return -np.inf, np.zeros_like(x)
        return elbo, self.family.pull(x, member, self.base, gradients) + by_entropy

    def each(self, x: np.ndarray) -> np.ndarray:
        """Terms (draws,) whose mean is the ELBO, each with the quadratic's deviation from its mean taken out."""
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # a run-off's terms are not finite
            try:
                member = self.family.member(x)
                exact, _ = self.family.exact(x, member, self.quadratic)
            except np.linalg.LinAlgError:
                return np.full(len(self.base), np.nan)
            points = self.family.points(member, self.base)
            values, _ = self.density.over(points)
            known, _ = self.quadratic.at(points)
            return values - known + exact


Pair = tuple[np.ndarray, np.ndarray]  # a step and how minus the gradient changed along it


class Units:
    """Steps from a member in which the curvature that is known without draws is about one.

    Most families' parameters are such units already. In a low-rank Gaussian's it spans three decades, which each climb
    would have to learn anew. Directions flatter than a quarter stay flat, such as turns of its columns, which
    change nothing.

    Args:
        family: The family.
        x: The member's parameters.
        quadratic: Near log p under the member.
    """

    def __init__(self, family: Parametrised, x: np.ndarray, quadratic: Any) -> None:
        self._shifts, self._root = 0, None
        self._secants = list[tuple[np.ndarray, np.ndarray]]()
        bent = family.bend(x, quadratic) if family.parameters <= MOST_PARAMETERS else None
        if bent is None or not np.isfinite(bent).all():
            return
        self._shifts = family.parameters - len(bent)
        for least in _LEAST_BENDS:
            try:
                self._root = scipy.linalg.cholesky(bent + least * np.eye(len(bent)), check_finite=False)
                return
            except np.linalg.LinAlgError:  # bent upwards by more: far from an optimum
                continue

    def learn(self, pairs: Sequence[Pair]) -> None:
        """Take in what a climb has found of the curvature, by BFGS updates of a root of the inverse.

        Where the units are J, the inverse Hessian is J J', and after a pair it is J+ J+' with J+ = (I - s u') J
        (Brodlie, Gourlay & Greenstadt 1973, Rank-one and rank-two corrections to positive definite matrices expressed
        in product form).
        """
        for step, bend in pairs:
            product = float(step @ bend)
            bent = self._bent(step)  # by the curvature that the units stand for
            before = float(step @ bent)
            if not (0 < before < np.inf and _FLATTEST * before < product < np.inf):  # flat, or a bend of noise alone
                continue
            self._secants.append((step, bend / product - bent / np.sqrt(product * before)))

    def move(self, steps: np.ndarray) -> np.ndarray:
        """The parameters' change, from steps (parameters,)."""
        moved = steps
        if self._root is not None:
            behind = scipy.linalg.solve_triangular(self._root, steps[self._shifts :], check_finite=False)
            moved = np.concatenate([steps[: self._shifts], behind])
        for step, by in self._secants:
            moved = moved - step * (by @ moved)
        return moved

    def pull(self, gradient: np.ndarray) -> np.ndarray:
        """The gradient with respect to steps, from that with respect to parameters."""
        pulled = gradient
        for step, by in reversed(self._secants):
            pulled = pulled - by * (step @ pulled)
        if self._root is None:
            return pulled
        behind = scipy.linalg.solve_triangular(self._root, pulled[self._shifts :], trans="T", check_finite=False)
        return np.concatenate([pulled[: self._shifts], behind])

    def _bent(self, step: np.ndarray) -> np.ndarray:
        """The Hessian times a step, where it is one in these units."""
        back = step
        for known, by in reversed(self._secants):
            back = back + known * ((by @ back) / (1 - by @ known))
        if self._root is not None:
            behind = self._root.T @ (self._root @ back[self._shifts :])
            back = np.concatenate([back[: self._shifts], behind])
        for known, by in self._secants:
            back = back + by * ((known @ back) / (1 - by @ known))
        return back


@dataclass(frozen=True)
class Climbed:
    """Where a climb ended.

    Attributes:
        x: The parameters, (parameters,).
        begun: The ELBO on these draws where it began, in nats.
        elbo: The same where it ended; an optimum on these draws, and so too high as an estimate of the ELBO.
        residual: What a further climb could still gain on these draws, in nats; see `remaining`.
        arrived: Whether that is no more than was asked for; else evaluations ran out, or the climb ended at a wall, and
            the residual may be far too low.
        evaluations: Of the ELBO and its gradient.
        course: The ELBO at each evaluation, (evaluations,).
        pairs: The last steps between its best points, and how the slope changed along them; none where the climb did
            not arrive.
    """

    x: np.ndarray
    begun: float
    elbo: float
    residual: float
    arrived: bool
    evaluations: int
    course: np.ndarray
    pairs: tuple[Pair, ...]


def climb(
    objective: Objective,
    x: np.ndarray,
    *,
    residual: float,
    least_steps: int = 1,
    units: Units | None = None,
    max_evaluations: int = EVALUATIONS,
    report: Callable[[int, float], None] | None = None,
) -> Climbed:
    """The best member on fixed draws, by L-BFGS, up to a residual in nats.

    Args:
        objective: ELBO and gradient.
        x: Where to begin.
        residual: The climb ends when no more than this is left to gain.
        least_steps: Taken in any case: what seems to be left is reckoned with the curvature that is known.
        units: In which its steps are measured; those of the curvature at `x` if None.
        max_evaluations: The most evaluations, at least one.
        report: Called at each evaluation with its number and the ELBO.
    """
    best, course = (-np.inf, x, np.zeros_like(x)), list[float]()
    left = gained = np.inf

    def is_over(at: np.ndarray, gradient: np.ndarray) -> bool:
        nonlocal left
        left = np.inf
        if gradient @ gradient < residual:
            left = remaining(objective, at, gradient, enough=residual, at_least=gained)
        return left < residual

    with np.errstate(over="ignore", invalid="ignore"):
        first = objective(x)
        units = Units(objective.family, x, objective.quadratic) if units is None else units
        slope = float(np.linalg.norm(units.pull(first[1])))
    # L-BFGS-B's first step has length one, whatever the gradient. In these units it is the gradient itself, which is
    # Newton's step wherever the curvature is about one.
    unit = min(1.0, slope) if slope > 0 else 1.0

    def loss(steps: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal best
        if len(course) == max_evaluations:  # SciPy looks only between line searches
            raise _Enough
        at = x + unit * units.move(steps)
        elbo, gradient = objective(at) if course else first
        course.append(elbo)
        if report:
            report(len(course), elbo)
        if not np.isfinite(elbo):
            return 1e300, np.zeros_like(at)  # a wall, which the line search turns away from
        if elbo > best[0]:
            best = elbo, at, gradient
        return -elbo, -unit * units.pull(gradient)

    taken, here, height = 0, (x, first[1]), first[0]
    pairs: deque[Pair] = deque(maxlen=_MEMORY)

    def looked(intermediate_result: OptimizeResult) -> None:
        nonlocal taken, here, gained, height
        taken += 1
        at, gradient = best[1:]
        gained, height = best[0] - height, best[0]
        if here[0] is not at:
            pairs.append((at - here[0], here[1] - gradient))
            here = at, gradient
        if taken >= least_steps and is_over(*best[1:]):
            raise StopIteration

    limits = {"maxcor": _MEMORY, "maxfun": max_evaluations, "maxiter": max_evaluations, "ftol": 0.0, "gtol": 0.0}
    with np.errstate(over="ignore", invalid="ignore"):
        with suppress(_Enough):
            minimize(loss, np.zeros_like(x), jac=True, method="L-BFGS-B", callback=looked, options=limits)
        elbo, found, gradient = best
        if np.isfinite(elbo) and not left < residual:  # it ended early, and what is known is no more than too much
            left = remaining(objective, found, gradient, at_least=gained)
    arrived = left <= residual  # elsewhere, such as at a wall, the last steps say little of what others will meet
    kept = tuple(pairs) if arrived else ()
    return Climbed(found, course[0], elbo, left, arrived, len(course), np.array(course), kept)


class _Enough(Exception):  # noqa: N818 - no error: what SciPy's `cg` and `minimize` have no other word for
    """The climb, or its conjugate gradients, need go no further."""


def remaining(
    objective: Objective, x: np.ndarray, gradient: np.ndarray, *, enough: float = np.inf, at_least: float = 0.0
) -> float:
    """What a climb could still gain, in nats: g' H^-1 g, twice what Newton's step would gain.

    H is the curvature of the part of the ELBO that is known exactly, and costs no draws: in most directions it is about
    one, but a family may have flat ones, in which a small gradient leads far. Directions flatter than a thousandth
    count as a thousandth. By at most a hundred conjugate gradients, each of which raises it: an estimate from below.
    Where H is bent upwards along one of them, what it had risen to is all that is known from H, and it counts as no
    less than what the climb's last step gained.

    Args:
        objective: The ELBO.
        x: The parameters.
        gradient: Of the ELBO there.
        enough: In nats: more need not be known exactly.
        at_least: In nats: what is left where H is bent upwards.
    """
    least = float(gradient @ gradient)  # as where H is one in all directions
    try:
        newton = newton_step(objective.family, objective.quadratic, x, gradient, enough=enough)
    except np.linalg.LinAlgError:  # at a member that rounding has made singular nothing is known of what is left
        return np.inf
    return max(newton.gain, least, at_least if newton.bent_upwards else 0.0)


@dataclass(frozen=True)
class NewtonStep:
    """A step along H^-1 g.

    Attributes:
        step: H^-1 g, (parameters,), as far as conjugate gradients came.
        gain: g' H^-1 g in nats, an estimate from below.
        bent_upwards: Whether H is bent upwards along one of them, where the step ends.
    """

    step: np.ndarray
    gain: float
    bent_upwards: bool


def newton_step(
    family: Parametrised,
    quadratic: Any,
    x: np.ndarray,
    gradient: np.ndarray,
    *,
    flattest: float = _FLATTEST,
    rtol: float = 0.1,
    most: int = _CG_STEPS,
    enough: float = np.inf,
) -> NewtonStep:
    """H^-1 g by conjugate gradients, H minus the Hessian of the part of the ELBO that is known exactly.

    Args:
        family: The family.
        quadratic: Near log p.
        x: The parameters.
        gradient: g, of any ELBO there.
        flattest: Added to H.
        rtol: Of the gradient's length, that may be left.
        most: Conjugate gradients, at most.
        enough: A gain in nats beyond which it need not be known.

    Raises:
        numpy.linalg.LinAlgError: Rounding has made the member singular.
    """
    reached, risen, bent_upwards = np.zeros_like(x), 0.0, False

    def slope(at: np.ndarray) -> np.ndarray:
        return family.exact(at, family.undrawn(at), quadratic)[1]

    def curved(vector: np.ndarray) -> np.ndarray:
        length = np.linalg.norm(vector)
        step = _DIFFERENCE / length if length > 0 else 0.0
        bent = (slope(x - step * vector) - slope(x + step * vector)) / (2 * _DIFFERENCE) * length
        return bent + flattest * vector

    def seen(solved: np.ndarray) -> None:
        nonlocal reached, risen, bent_upwards
        gain = float(gradient @ solved)
        if gain < risen:
            bent_upwards = True
            raise _Enough
        reached, risen = solved.copy(), gain
        if risen > enough:
            raise _Enough

    operator = LinearOperator((len(x), len(x)), matvec=curved, dtype=float)
    with suppress(_Enough):
        cg(operator, gradient, rtol=rtol, maxiter=most, callback=seen)
    return NewtonStep(reached, risen, bent_upwards)
