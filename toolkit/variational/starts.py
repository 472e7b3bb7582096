"""Where a fit starts: modes of the density and the curvature there, in the model's own scales."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize

from toolkit.compilation import QUICK
from toolkit.modelling.model import Model
from toolkit.variational.solvers.natural import Averages, is_safely_positive, natural_steps

DENSE_LIMIT = 1_500  # a d x d Hessian of 18 MB, and about a second for its decomposition
_TRIES = 50
_STEPS = 8
_SAME_HEIGHT = 1e-3  # nats between two searches that ended at one mode
_SAME_PLACE = 0.5  # posterior sds between them, or unconstrained units where no curvature is known
_SAME_LABELS = 0.05  # of the norm: a transform's Jacobian moves the modes of two labellings apart by a little
_BOX_PRECISION = 4.0  # a sd of a half, for unconstrained coordinates of which nothing is known


@dataclass(frozen=True)
class Space:
    """The latent sites of a model in a chart, in program order, as one vector in unconstrained space."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """How many unconstrained coordinates there are."""
        return sum(int(np.prod(shape)) for shape in self.shapes)

    def unravel(self, vector: Any) -> dict[str, Any]:
        """Site name to value, from one vector of shape (size,)."""
        values, begin = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            end = begin + int(np.prod(shape))
            values[name] = vector[begin:end].reshape(shape)
            begin = end
        return values

    def ravel(self, values: Any) -> Any:
        """One vector of shape (size,), from site name to value."""
        return jnp.concatenate([jnp.ravel(values[name]) for name in self.names])


@dataclass(frozen=True)
class Start:
    """A point from which a fit sets out, and the local scale there.

    Attributes:
        loc: Shape (size,), unconstrained.
        precision: Shape (size, size): minus the Hessian of log p there, averaged over a Gaussian around `loc`; None
            where it is not finite or the dimension is beyond what a dense matrix is for.
        elbo: Of the full-rank Gaussian with these two, in nats; on the draws that moved it, or, where these are fewer
            than the dimensions, on fresh ones; -inf without one.
        log_density: log p(x, z) where the search ended, in nats.
        is_mode: Whether the search ended at a stationary point with negative curvature.
    """

    loc: np.ndarray
    precision: np.ndarray | None
    elbo: float
    log_density: float
    is_mode: bool


@dataclass(frozen=True)
class Starts:
    """Starting points of a model in a chart, the best first, and what they cost."""

    chart: str
    space: Space
    points: tuple[Start, ...]
    seconds: float
    gradient_evaluations: int


def latent_space(model: Model, chart: str | None = None) -> Space:
    """The model's latent sites in a chart and their unconstrained shapes, in program order."""
    names: list[str] = []

    def point() -> dict[str, Any]:
        values = model.start(jax.random.PRNGKey(0), model.arrays, chart=chart)
        names.extend(values)
        return values

    shapes = jax.eval_shape(point)
    return Space(tuple(names), tuple(tuple(shapes[name].shape) for name in names))


def find_starts(model: Model, *, key: jax.Array, chart: str | None = None, count: int = 2) -> Starts:
    """Up to `count` starting points, in float64, from searches that set out at dispersed points.

    Each search climbs the log density by L-BFGS; the curvature where it ends gives the scale, and a few
    natural-gradient steps move both towards the best full-rank Gaussian. No point at all means that no start had a
    finite density and gradient.
    """
    with jax.enable_x64(True):
        return _found(model, key, chart or model.chart, count)


def _found(model: Model, key: jax.Array, chart: str, count: int) -> Starts:
    begun = time.perf_counter()
    space = latent_space(model, chart)
    arrays = model.arrays

    def log_density(vector: Any, arrays: Any) -> Any:
        return model.log_density(space.unravel(vector), arrays, chart)

    def loss_and_gradient(vector: Any, arrays: Any) -> tuple[Any, Any]:
        return jax.value_and_grad(lambda v: -log_density(v, arrays))(vector)

    climbing = jax.jit(loss_and_gradient).lower(np.zeros(space.size), arrays).compile(QUICK)
    evaluations = 0

    def evaluate(vector: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal evaluations
        evaluations += 1
        loss, gradient = climbing(vector, arrays)
        return float(loss), np.asarray(gradient, dtype=float)

    draw = jax.jit(lambda k, radius: space.ravel(model.start(k, arrays, radius, chart)))
    dispersed = _valid_points(evaluate, draw, key, count)
    ends = sorted((_climb(evaluate, point) for point in dispersed), key=lambda end: end.loss)
    points, kept = [], list[tuple[_End, np.ndarray | None]]()
    averages = None
    if space.size <= DENSE_LIMIT and ends:
        averages = Averages(log_density, arrays, space.size, key=jax.random.fold_in(key, _TRIES))
    for end in _relabelled_once(model, space, chart, ends):
        if _at_another(end, kept):
            continue
        precision, is_mode = _curvature(averages, end.loc) if averages else (None, False)
        kept.append((end, precision))
        if averages is None or precision is None:
            points.append(Start(end.begin, None, -np.inf, -end.loss, False))
        else:
            points.append(_start(averages, end, precision, is_mode=is_mode))
    evaluations += averages.evaluations if averages else 0
    points.sort(key=lambda start: -start.elbo)
    return Starts(chart, space, tuple(points), time.perf_counter() - begun, evaluations)


@dataclass(frozen=True)
class _End:
    """Where a search for a mode ended, minus the log density there in nats, and where it began."""

    loc: np.ndarray
    loss: float
    begin: np.ndarray


def _at_another(end: _End, kept: list[tuple[_End, np.ndarray | None]]) -> bool:
    """Whether a search ended at the mode of an earlier one, which is kept with the precision there.

    Equal heights alone do not make one mode of two (those of a symmetric density have them): the ends must also lie
    within half a posterior sd of each other.
    """
    for other, precision in kept:
        if abs(end.loss - other.loss) > _SAME_HEIGHT:
            continue
        apart = end.loc - other.loc
        distance = apart @ apart if precision is None else apart @ precision @ apart
        if distance < _SAME_PLACE**2:
            return True
    return False


def _relabelled_once(model: Model, space: Space, chart: str | None, ends: list[_End]) -> list[_End]:
    """The ends without those that differ from a better one in their labelling alone."""
    labels = model.labels
    if labels is None or len(ends) < 2:
        return ends
    sites = [model.constrain(space.unravel(end.loc), model.arrays, chart=chart) for end in ends]
    rows = [np.asarray(values[labels.by])[None, None] for values in sites]
    kept = [0]
    for number in range(1, len(ends)):
        for better in kept:
            aligned = labels.relabel({labels.by: rows[number]}, anchor=rows[better][0, 0])[labels.by]
            if np.linalg.norm(aligned - rows[better]) < _SAME_LABELS * np.linalg.norm(rows[better]):
                break
        else:
            kept.append(number)
    return [ends[number] for number in kept]


def _curvature(averages: Averages, loc: np.ndarray) -> tuple[np.ndarray | None, bool]:
    """Minus the Hessian at a point, its eigenvalues bounded away from zero, and whether it needed no bounding."""
    _, _, hessian = averages.at(loc)
    return positive_definite(-hessian) if np.isfinite(hessian).all() else (None, False)


def _start(averages: Averages, end: _End, precision: np.ndarray, *, is_mode: bool) -> Start:
    """The better of two Gaussians: grown from the end of a search, or, if that is no mode, from where it began.

    A density without an upper bound sends the search away for ever (the funnel of a centred hierarchy); the ELBO has
    a bound all the same, and natural-gradient steps from the beginning do not run off.
    """
    seeds = [(end.loc, precision, _STEPS)]
    if not is_mode:
        seeds.append((end.begin, _BOX_PRECISION * np.eye(averages.size), 3 * _STEPS))
    grown = [natural_steps(averages, loc, precision, steps=steps) for loc, precision, steps in seeds]
    best = max(grown, key=lambda gaussian: gaussian.elbo)
    if not np.isfinite(best.elbo):
        return Start(end.begin, None, -np.inf, -end.loss, False)
    return Start(best.loc, best.precision, best.elbo, -end.loss, is_mode)


def _valid_points(
    evaluate: Callable[[np.ndarray], tuple[float, np.ndarray]], draw: Callable[..., Any], key: jax.Array, count: int
) -> list[np.ndarray]:
    """Points with a finite density and gradient, from ever smaller boxes around the origin."""
    points: list[np.ndarray] = []
    for number in range(_TRIES):
        radius = 2.0 * 0.8 ** max(0, number - count)
        point = np.asarray(draw(jax.random.fold_in(key, number), radius), dtype=float)
        loss, gradient = evaluate(point)
        if np.isfinite(loss) and np.isfinite(gradient).all():
            points.append(point)
        if len(points) == count:
            break
    return points


def _climb(evaluate: Callable[[np.ndarray], tuple[float, np.ndarray]], point: np.ndarray) -> _End:
    """Where L-BFGS ends; an invalid step is a wall that it turns away from."""

    def walled(vector: np.ndarray) -> tuple[float, np.ndarray]:
        loss, gradient = evaluate(vector)
        if not np.isfinite(loss) or not np.isfinite(gradient).all():
            return 1e300, np.zeros_like(vector)
        return loss, gradient

    result = minimize(
        walled,
        point,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 1_000, "maxcor": 20, "ftol": 1e-12, "gtol": 1e-6},
    )
    return _End(np.asarray(result.x), float(result.fun), point)


def positive_definite(matrix: np.ndarray) -> tuple[np.ndarray | None, bool]:
    """The nearest usable precision matrix, and whether the one given was positive definite.

    The matrix is first scaled to a unit diagonal, so that a bound on its eigenvalues means the same in every unit.
    """
    if is_safely_positive(matrix):
        return matrix, True
    scale = np.sqrt(np.abs(np.diag(matrix)))
    if not (scale > 0).all():
        return None, False
    values, vectors = np.linalg.eigh(matrix / np.outer(scale, scale))
    bounded = np.clip(np.abs(values), 1e-3, None)
    return (vectors * bounded) @ vectors.T * np.outer(scale, scale), False
