"""The exact posterior of a linear-Gaussian chain of scalars that are seen with noise: Kalman's filter and smoother."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np


@dataclass(frozen=True, eq=False)
class KalmanSmoother:
    """The posterior of levels u[t] that follow one another and are seen with noise, in closed form.

        u[t] ~ Normal(coefficients[0] u[t - 1] + coefficients[1] u[t - 2] + ..., level_sd);  u[t] = 0 before the first
        y[t] ~ Normal(u[t], observation_sd)

    The first level has `initial_sd` in place of `level_sd`. The filter's and the smoother's weights do not depend on
    the data, so that they are worked out once.

    Attributes:
        steps: How many levels there are.
        coefficients: Of the levels before, the latest first.
        level_sd: Of what is new in a level.
        initial_sd: Of the first level.
        observation_sd: Of the noise.

    Reference: Durbin & Koopman (2012), Time Series Analysis by State Space Methods, second edition, sections 4.3 and
        4.4 (filter and smoother), 4.9 (draws), 7.2 (likelihood).
    """

    steps: int
    coefficients: tuple[float, ...]
    level_sd: float
    initial_sd: float
    observation_sd: float

    @cached_property
    def transition(self) -> np.ndarray:
        """The companion matrix, which takes (u[t], u[t - 1], ...) to the next one."""
        order = len(self.coefficients)
        return np.vstack([self.coefficients, np.eye(order)[:-1]])

    @cached_property
    def _filtered(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Predicted covariances (steps, order, order), prediction errors' variances (steps,), gains (steps, order)."""
        order = len(self.coefficients)
        covariances, variances, gains = (
            np.empty((self.steps, order, order)),
            np.empty(self.steps),
            np.empty((self.steps, order)),
        )
        covariance = np.zeros((order, order))
        covariance[0, 0] = self.initial_sd**2
        for t in range(self.steps):
            covariances[t], variances[t] = covariance, covariance[0, 0] + self.observation_sd**2
            gains[t] = self.transition @ covariance[:, 0] / variances[t]
            covariance = self.transition @ covariance @ self.transition.T - np.outer(gains[t], gains[t]) * variances[t]
            covariance[0, 0] += self.level_sd**2
            covariance = (covariance + covariance.T) / 2
        return covariances, variances, gains

    def _errors(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Predicted levels with those before, (..., steps, order), and prediction errors (..., steps)."""
        _, _, gains = self._filtered
        states, errors = np.empty((*y.shape, len(self.coefficients))), np.empty(y.shape)
        state = np.zeros((*y.shape[:-1], len(self.coefficients)))
        for t in range(self.steps):
            states[..., t, :], errors[..., t] = state, y[..., t] - state[..., 0]
            state = state @ self.transition.T + errors[..., t, None] * gains[t]
        return states, errors

    def mean(self, y: np.ndarray) -> np.ndarray:
        """Of each level given all observations y (..., steps), shape (..., steps)."""
        covariances, variances, gains = self._filtered
        states, errors = self._errors(y)
        means, later = np.empty(y.shape), np.zeros(states[..., 0, :].shape)
        for t in range(self.steps - 1, -1, -1):
            # r = Z v / F + L' r with L = T - K Z', where Z picks the first coordinate.
            pulled = later @ self.transition
            pulled[..., 0] += errors[..., t] / variances[t] - later @ gains[t]
            later = pulled
            means[..., t] = states[..., t, 0] + later @ covariances[t][0]
        return means

    @cached_property
    def variance(self) -> np.ndarray:
        """Of each level given all observations, (steps,)."""
        covariances, variances, gains = self._filtered
        found, later = np.empty(self.steps), np.zeros_like(self.transition)
        for t in range(self.steps - 1, -1, -1):
            through = self.transition - np.outer(gains[t], np.eye(len(gains[t]))[0])
            later = through.T @ later @ through
            later[0, 0] += 1 / variances[t]
            found[t] = covariances[t][0, 0] - covariances[t][0] @ later @ covariances[t][0]
        return found

    def log_evidence(self, y: np.ndarray) -> float:
        """Log p(y) in nats, by the errors of one-step predictions."""
        _, variances, _ = self._filtered
        _, errors = self._errors(y)
        return float(-0.5 * (np.log(2 * math.pi * variances) + errors**2 / variances).sum())

    def draw(self, key: jax.Array, draws: int, y: np.ndarray) -> np.ndarray:
        """Independent draws of the levels given y (steps,), shape (draws, steps).

        A draw from the prior, with observations of its own, is moved by what the smoother says of the difference.
        """
        of_levels, of_noise = jax.random.split(key)
        news = np.array(jax.random.normal(of_levels, (draws, self.steps)))
        news *= np.r_[self.initial_sd, np.full(self.steps - 1, self.level_sd)]
        levels, state = np.empty_like(news), np.zeros((draws, len(self.coefficients)))
        for t in range(self.steps):
            state = state @ self.transition.T
            state[:, 0] += news[:, t]
            levels[:, t] = state[:, 0]
        noise: Any = self.observation_sd * np.asarray(jax.random.normal(of_noise, (draws, self.steps)))
        return levels + self.mean(y - levels - noise)
