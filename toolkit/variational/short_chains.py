"""Short chains that start from a fit's draws: how far they move away is a lower bound of how far the fit is off.

A chain that leaves the posterior as it is brings any distribution nearer to it (in KL) with each step. Where chains
mix, what they change the fit has wrong, and what they do not change after they have forgotten where they started, the
fit has right, but for parts of the posterior to which no chain went. Where they do not mix, as in the neck of a
funnel, single numbers may first move the wrong way; such places show in chains that hardly accept a step which fits
the others (`ShortChains.uneven`).

Reference: Wang, Kasprzak & Huggins (2023), A targeted accuracy diagnostic for variational approximations, AISTATS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toolkit.compilation import QUICK
from toolkit.modelling.points import points
from toolkit.modelling.space import latent_space
from toolkit.variational.fits import Fit

CHAINS, TRANSITIONS, LEAPFROGS = 2_000, 30, 8
"""So many chains tell a shift of a twentieth sd from none; so many transitions forget a start that is not far off."""

MOST_UNEVEN = 0.02
"""Measured: 0.02 to 0.15 on funnels in a centred chart (Neal's, the radon model, eight schools, a Poisson GLMM), at
most 0.011 on posteriors on which the chains mix (docs/benchmarks.md)."""

LEAST_TRANSITIONS = 10

_ADAPTED = (5, 10, 15)  # transitions after which the chains' own covariance becomes the metric
_TARGET, _GAIN = 0.8, 1.0  # acceptance that the step is adapted to, and by how much in its log
_BATCH = 64
_DENSE = 300  # dimensions up to which the metric has correlations


@dataclass(frozen=True, eq=False)
class ShortChains:
    """Where short chains began and ended, in the unconstrained space of the fit's chart.

    Attributes:
        start: The fit's draws, `(chain, coordinate)`.
        end: Where the chains that began there have gone, `(chain, coordinate)`.
        acceptance: Each chain's mean acceptance probability over the second half of its transitions, `(chain,)`.
        gradient_evaluations: All that were computed.
    """

    start: np.ndarray
    end: np.ndarray
    acceptance: np.ndarray
    gradient_evaluations: int

    @property
    def uneven(self) -> float:
        """The share of chains that accept less than half of their moves: above `MOST_UNEVEN`, numbers mean nothing."""
        return float((self.acceptance < 0.5).mean())


def short_chains(
    fit: Fit,
    *,
    key: jax.Array,
    chains: int = CHAINS,
    transitions: int = TRANSITIONS,
    report: Callable[[int, int], None] | None = None,
) -> ShortChains:
    """Hamiltonian chains from a fit's draws, whose step and metric are adapted by all chains together.

    Args:
        fit: A fit that can draw.
        key: Random key.
        chains: How many.
        transitions: Of each chain.
        report: Called after each transition as `report(done, total)`.

    Raises:
        ValueError: The fit failed, or its chart cannot be inverted.
    """
    model, chart = fit.model, fit.chart
    of_draws, of_moves = jax.random.split(key)
    drawn = fit.draw(of_draws, chains, model.latents)
    start = points(model, drawn, chart, fit.params).vectors
    advance = _program(fit, start.shape)
    vectors, step = start, 0.8 / start.shape[1] ** 0.25
    metric, kept = _metric(start), []
    rng = np.random.default_rng(np.asarray(jax.random.key_data(of_moves)).ravel())
    for transition in range(transitions):
        with jax.enable_x64(True):
            base = rng.standard_normal(vectors.shape)
            levels = np.log(rng.random(chains))
            length = step * (0.8 + 0.4 * rng.random())  # a fixed one may come back to where it began
            moved, accepted = advance(vectors, base, levels, metric, np.array(length), model.arrays)
            vectors, acceptance = np.asarray(moved), np.asarray(accepted)
        step *= float(np.exp(_GAIN * (acceptance.mean() - _TARGET)))
        if transition >= transitions // 2:
            kept.append(acceptance)
        if transition + 1 in _ADAPTED:
            metric = _metric(vectors)
        if report:
            report(transition + 1, transitions)
    return ShortChains(start, vectors, np.mean(kept, axis=0), chains * transitions * (LEAPFROGS + 1))


def _metric(vectors: np.ndarray) -> np.ndarray:
    """A square root of the points' covariance: (coordinate, coordinate), or the sds alone, (coordinate,)."""
    sds = np.maximum(vectors.std(axis=0), 1e-12 * np.maximum(np.abs(vectors.mean(axis=0)), 1e-300))
    if not 1 < vectors.shape[1] <= _DENSE:
        return sds
    correlation = np.corrcoef((vectors / sds).T)
    shrunk = (1 - 1e-3) * correlation + 1e-3 * np.eye(len(sds))
    return sds[:, None] * np.linalg.cholesky(shrunk)


def _program(fit: Fit, shape: tuple[int, int]) -> Any:
    """One transition of all chains: from vectors, momenta, levels, metric and step to vectors and acceptances."""
    space = latent_space(fit.model, fit.chart)

    def log_density(vector: Any, arrays: Any) -> Any:
        return fit.model.log_density(space.unravel(vector), arrays, fit.chart)

    def one(vector: Any, momentum: Any, level: Any, metric: Any, step: Any, arrays: Any) -> tuple[Any, Any]:
        def slope(z: Any) -> tuple[Any, Any]:
            value, gradient = jax.value_and_grad(log_density)(z, arrays)
            # In coordinates in which the metric is the identity.
            return value, (metric.T @ gradient if metric.ndim == 2 else metric * gradient)

        def across(momentum: Any) -> Any:
            return metric @ momentum if metric.ndim == 2 else metric * momentum

        def leap(_: Any, state: Any) -> Any:
            z, p, _, g = state
            p = p + 0.5 * step * g
            z = z + step * across(p)
            value, g = slope(z)
            return z, p + 0.5 * step * g, value, g

        value, gradient = slope(vector)
        z, p, there, _ = jax.lax.fori_loop(0, LEAPFROGS, leap, (vector, momentum, value, gradient))
        log_ratio = there - value + 0.5 * (momentum @ momentum - p @ p)
        log_ratio = jnp.where(jnp.isfinite(log_ratio), log_ratio, -jnp.inf)
        return jnp.where(level < log_ratio, z, vector), jnp.exp(jnp.minimum(log_ratio, 0.0))

    def every(vectors: Any, momenta: Any, levels: Any, metric: Any, step: Any, arrays: Any) -> Any:
        def row(own: tuple[Any, Any, Any]) -> tuple[Any, Any]:
            vector, momentum, level = own
            return one(vector, momentum, level, metric, step, arrays)

        return jax.lax.map(row, (vectors, momenta, levels), batch_size=_BATCH)

    size = shape[1]
    metric = jax.ShapeDtypeStruct((size, size) if 1 < size <= _DENSE else (size,), np.float64)
    with jax.enable_x64(True):
        rows = jax.ShapeDtypeStruct(shape, np.float64)
        given = (rows, rows, jax.ShapeDtypeStruct(shape[:1], np.float64), metric, jax.ShapeDtypeStruct((), np.float64))
        return jax.jit(every).lower(*given, fit.model.arrays).compile(QUICK)
