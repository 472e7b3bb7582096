"""The ELBO of a mixture of Gaussians on stratified draws that are held fixed, and climbs on it.

The ELBO of q = sum over k of w_k N(m_k, L_k L_k') is a sum over components,

    ELBO  =  sum over k of  w_k  E[ log p(z) - log q(z) ],   z = m_k + L_k eps,   eps ~ N(0, I),

so that with as many draws for each component nothing is drawn by chance but eps: the weights have an exact gradient,
and locations and factors that of draws which move with them. On draws held fixed this is a smooth function with a
maximum to find. Where components overlap it is nearly flat along some directions, in which neither a small slope nor a
small step says that a climb is over: so it goes on until its last steps, its slope and Newton's step by the curvature
that it has met all say so.

Reference: Roeder, Wu & Duvenaud (2017), Sticking the landing, section 3.2 (stratified draws of a mixture).
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import logsumexp
from scipy.optimize import LbfgsInvHessProduct, OptimizeResult, minimize

from toolkit.variational.density import LogDensity
from toolkit.variational.draws import Key, branch, matched_draws

PIECE = 256  # draws of a component whose densities are computed at once
EVALUATIONS = 300  # of a climb, at most
NEGLIGIBLE = 1e-4  # weight of a mode that gets no component, and the least that a component is measured by
_ROUNDING = 1e-6  # of a residual: a slope from which no step can be told
_MEMORY, _LAST_STEPS = 30, 3  # steps from which a climb knows the curvature, and whose gains are looked at


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians in unconstrained space.

    Attributes:
        log_weights: Shape (component,), of weights that sum to one.
        locs: Shape (component, size).
        factors: Shape (component, size, size), lower triangular with a positive diagonal.
    """

    log_weights: np.ndarray
    locs: np.ndarray
    factors: np.ndarray

    @property
    def components(self) -> int:
        """How many there are."""
        return len(self.log_weights)

    @property
    def size(self) -> int:
        """Of an unconstrained vector."""
        return int(self.locs.shape[1])

    def params(self, prefix: str = "auto") -> dict[str, np.ndarray]:
        """The parameters of `AutoMixtureNormal`."""
        parts = {"weights": np.exp(self.log_weights), "locs": self.locs, "scale_trils": self.factors}
        return {f"{prefix}_{name}": value for name, value in parts.items()}


class StratifiedELBO:
    """The ELBO in nats of mixtures near one, as a function of dimensionless parameters, on draws that do not change.

    The parameters are zero at that mixture and measured by it: a component's location and factor by its own factor, and
    everything by the root of its weight, so that the curvature is about one where components lie apart.

    Args:
        density: Log p(x, z).
        around: The mixture.
        draws: For each component, a multiple of 256.
        key: Random key.
    """

    def __init__(self, density: LogDensity, around: Mixture, draws: int, *, key: Key) -> None:
        self.density, self.around = density, around
        base = [matched_draws(draws, around.size, key=branch(key, k)) for k in range(around.components)]
        self._pieces = np.stack(base).reshape(around.components, -1, PIECE, around.size).swapaxes(0, 1)
        weights = np.exp(around.log_weights)
        self._frame = {
            "log_weights": around.log_weights,
            "locs": around.locs,
            "factors": around.factors,
            "units": 1 / np.sqrt(np.maximum(weights, NEGLIGIBLE)),
        }

    @property
    def parameters(self) -> int:
        """How many there are."""
        count, size = self.around.components, self.around.size
        return count * (1 + 2 * size + size * (size - 1) // 2)

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """ELBO and its gradient (parameters,); -inf where a draw's log density or gradient is not finite."""
        total, slope = 0.0, np.zeros_like(x)
        for base in self._pieces:
            points = np.asarray(_points(x, self._frame, base))
            with np.errstate(over="ignore", invalid="ignore"):
                values, gradients = self.density.over(points.reshape(-1, self.around.size))
            if not (np.isfinite(values).all() and np.isfinite(gradients).all()):
                return -np.inf, np.zeros_like(x)
            elbo, by = _elbo_and_slope(
                x, self._frame, base, values.reshape(points.shape[:2]), gradients.reshape(points.shape)
            )
            total += float(elbo)
            slope += np.asarray(by)
        elbo, slope = total / len(self._pieces), slope / len(self._pieces)
        return (elbo, slope) if np.isfinite(elbo) and np.isfinite(slope).all() else (-np.inf, np.zeros_like(x))

    def mixture(self, x: np.ndarray) -> Mixture:
        """The mixture with these parameters."""
        log_weights, locs, factors = (np.asarray(part) for part in _placed(x, self._frame))
        return Mixture(log_weights, locs, factors)


@dataclass(frozen=True)
class Ascent:
    """Where a climb ended: the parameters, its ELBO in nats at its beginning and end, and what it may have left there.

    `course` is the ELBO at each evaluation; `arrived` whether no more than the residual asked for is left.
    """

    x: np.ndarray
    begun: float
    elbo: float
    left: float
    arrived: bool
    course: np.ndarray


def ascend(objective: StratifiedELBO, *, residual: float, max_evaluations: int = EVALUATIONS) -> Ascent:
    """The best mixture on fixed draws, by L-BFGS from the one that the parameters are measured by.

    Args:
        objective: ELBO and gradient.
        residual: In nats: it ends when what its last three steps gained, the gradient's square, and twice what Newton's
            step would gain are all below it. The curvature behind the latter is what the steps have met, and one where
            none has been. With fewer steps it has arrived only where the gradient is rounding.
        max_evaluations: The most evaluations.
    """
    course, gains = list[float](), list[float]()
    best: tuple[float, np.ndarray, np.ndarray] = (-np.inf, np.zeros(objective.parameters), np.zeros(0))
    pairs: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=_MEMORY)
    here: tuple[float, np.ndarray, np.ndarray] | None = None

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal best, here
        if len(course) >= max_evaluations:  # SciPy looks only between line searches
            raise _Enough
        elbo, gradient = objective(x)
        course.append(elbo)
        if elbo > best[0]:
            best = elbo, x.copy(), gradient
        if len(course) == 1:
            here = best
        return (-elbo, -gradient) if np.isfinite(elbo) else (1e300, np.zeros_like(x))

    def left() -> float:
        gradient, newton = best[2], 0.0
        if pairs:
            steps, bends = (np.array(part) for part in zip(*pairs, strict=True))
            newton = float(gradient @ LbfgsInvHessProduct(steps, bends).matvec(gradient))
        return max(float(gradient @ gradient), newton, sum(gains[-_LAST_STEPS:])) if gradient.size else np.inf

    def is_over() -> bool:
        remains = left()
        return remains <= (residual if len(gains) >= _LAST_STEPS else _ROUNDING * residual)

    def looked(intermediate_result: OptimizeResult) -> None:
        nonlocal here
        assert here is not None
        gains.append(best[0] - here[0])
        step, bend = best[1] - here[1], here[2] - best[2]
        if step @ bend > 0:
            pairs.append((step, bend))
        here = best
        if is_over():
            raise StopIteration

    begin = np.zeros(objective.parameters)
    options = {"maxcor": _MEMORY, "maxfun": max_evaluations, "maxiter": max_evaluations, "ftol": 0.0, "gtol": 0.0}
    with np.errstate(over="ignore", invalid="ignore"), suppress(_Enough):
        minimize(loss, begin, jac=True, method="L-BFGS-B", callback=looked, options=options)
    elbo, x, _ = best
    return Ascent(x, course[0], elbo, left(), is_over(), np.array(course))


class _Enough(Exception):  # noqa: N818 - no error: what SciPy's `minimize` has no other word for
    """The climb need go no further."""


def _placed(x: Any, frame: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Log weights, locations and factors of the mixture with these parameters."""
    count, size = frame["locs"].shape
    below = size * (size - 1) // 2
    logits, shifts, diagonals, lower = jnp.split(x, np.cumsum([count, count * size, count * size]))
    units = frame["units"][:, None]
    log_weights = jax.nn.log_softmax(frame["log_weights"] + frame["units"] * logits)
    turned = jnp.zeros((count, size, size)).at[:, *np.tril_indices(size, -1)].set(lower.reshape(count, below) * units)
    scales = jnp.exp(diagonals.reshape(count, size) * units)
    turned = turned + scales[:, :, None] * jnp.identity(size)[None]
    locs = frame["locs"] + jnp.einsum("kij,kj->ki", frame["factors"], shifts.reshape(count, size) * units)
    return log_weights, locs, frame["factors"] @ turned


@jax.jit
def _points(x: Any, frame: dict[str, Any], base: Any) -> Any:
    """Draws (component, draw, size) of each component."""
    _, locs, factors = _placed(x, frame)
    return locs[:, None, :] + jnp.einsum("kij,knj->kni", factors, base)


@jax.jit
@partial(jax.value_and_grad)
def _elbo_and_slope(x: Any, frame: dict[str, Any], base: Any, values: Any, gradients: Any) -> Any:
    """The ELBO on these draws, given log p and its gradient at them."""
    log_weights, locs, factors = _placed(x, frame)
    points = locs[:, None, :] + jnp.einsum("kij,knj->kni", factors, base)
    log_p = values + (gradients * (points - jax.lax.stop_gradient(points))).sum(-1)
    count, draws, size = points.shape
    flat = points.reshape(count * draws, size)

    def log_normal(loc: Any, factor: Any) -> Any:
        white = solve_triangular(factor, (flat - loc[None]).T, lower=True)
        return -0.5 * (white**2).sum(0) - jnp.log(jnp.diagonal(factor)).sum() - 0.5 * size * jnp.log(2 * jnp.pi)

    each = log_weights[:, None] + jax.vmap(log_normal)(locs, factors)
    log_q = logsumexp(each, axis=0).reshape(count, draws)
    return (jnp.exp(log_weights)[:, None] * (log_p - log_q)).mean(1).sum()
