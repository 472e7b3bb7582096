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

from toolkit.modelling.model import Model
from toolkit.variational.solvers.natural import is_safely_positive, natural_steps

_DENSE_LIMIT = 1_500  # a d x d Hessian of 18 MB, and about a second for its decomposition
_TRIES = 50
_STEPS = 8
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
        elbo: Of the full-rank Gaussian with these two, on the draws that moved it, in nats; -inf without one.
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
    """Up to `count` starting points, from searches that set out at dispersed points.

    Each search climbs the log density by L-BFGS; the curvature where it ends gives the scale, and a few
    natural-gradient steps move both towards the best full-rank Gaussian. No point at all means that no start had a
    finite density and gradient. The caller sees to float64 (`jax.enable_x64`), as `fit` and `study` do.
    """
    begun = time.perf_counter()
    space = latent_space(model, chart)
    arrays = model.arrays

    @jax.jit
    def loss_and_gradient(vector: Any, arrays: Any) -> tuple[Any, Any]:
        return jax.value_and_grad(lambda v: -model.log_density(space.unravel(v), arrays, chart))(vector)

    evaluations = 0

    def evaluate(vector: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal evaluations
        evaluations += 1
        loss, gradient = loss_and_gradient(vector, arrays)
        return float(loss), np.asarray(gradient, dtype=float)

    draw = jax.jit(lambda k, radius: space.ravel(model.start(k, arrays, radius, chart)))
    dispersed = _valid_points(evaluate, draw, key, count)
    ends = sorted((_climb(evaluate, point) for point in dispersed), key=lambda end: end.loss)
    points = []
    for number, end in enumerate(_relabelled_once(model, space, chart, _distinct(ends))):
        start, work = _start(model, space, chart, end, jax.random.fold_in(key, _TRIES + number))
        evaluations += work
        points.append(start)
    points.sort(key=lambda start: -start.elbo)
    return Starts(space, tuple(points), time.perf_counter() - begun, evaluations)


@dataclass(frozen=True)
class _End:
    """Where a search for a mode ended, minus the log density there in nats, and where it began."""

    loc: np.ndarray
    loss: float
    begin: np.ndarray


def _distinct(ends: list[_End]) -> list[_End]:
    """The ends without those that reached the same log density as a better one, within a thousandth of a nat."""
    kept: list[_End] = []
    for end in ends:
        if all(abs(end.loss - other.loss) > 1e-3 for other in kept):
            kept.append(end)
    return kept


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


def _start(model: Model, space: Space, chart: str | None, end: _End, key: jax.Array) -> tuple[Start, int]:
    """The better of two Gaussians: grown from the end of a search, or, if that is no mode, from where it began.

    A density without an upper bound sends the search away for ever (the funnel of a centred hierarchy); the ELBO has
    a bound all the same, and natural-gradient steps from the beginning do not run off.
    """
    precision, is_mode = _curvature(model, space, end.loc, chart)
    if precision is None:
        return Start(end.begin, None, -np.inf, -end.loss, False), space.size
    seeds = [(end.loc, precision, _STEPS)]
    if not is_mode:
        seeds.append((end.begin, _BOX_PRECISION * np.eye(space.size), 3 * _STEPS))

    def log_density(vector: Any, arrays: Any) -> Any:
        return model.log_density(space.unravel(vector), arrays, chart)

    grown = [natural_steps(log_density, model.arrays, loc, p, key=key, steps=steps) for loc, p, steps in seeds]
    best = max(grown, key=lambda gaussian: gaussian.elbo)
    work = space.size + sum(gaussian.gradient_evaluations for gaussian in grown)
    if not np.isfinite(best.elbo):
        return Start(end.begin, None, -np.inf, -end.loss, False), work
    return Start(best.loc, best.precision, best.elbo, -end.loss, is_mode), work


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


def _curvature(model: Model, space: Space, loc: np.ndarray, chart: str | None) -> tuple[np.ndarray | None, bool]:
    """Minus the Hessian at a point, its eigenvalues bounded away from zero, and whether it needed no bounding."""
    if space.size > _DENSE_LIMIT:
        return None, False

    @jax.jit
    def hessian(vector: Any, arrays: Any) -> Any:
        gradient = jax.grad(lambda v: -model.log_density(space.unravel(v), arrays, chart))
        column = lambda tangent: jax.jvp(gradient, (vector,), (tangent,))[1]  # noqa: E731
        return jax.lax.map(column, jnp.eye(space.size), batch_size=64)

    matrix = np.asarray(hessian(loc, model.arrays), dtype=float)
    if not np.isfinite(matrix).all():
        return None, False
    return positive_definite((matrix + matrix.T) / 2)


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
