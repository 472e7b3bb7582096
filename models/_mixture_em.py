"""Expectation maximisation for the Gaussian mixture: E step, M step, free energy, as a guide.

With r[i, k] the probability that row i belongs to component k, n[k] = sum_i r[i, k], and the priors as pseudo-data,

    E:  r[i, k]  proportional to  weights[k] prod_j Normal(x[i, j]; means[k, j], variances[k, j])

    M:  weights[k]      = (n[k] + c) / sum_l (n[l] + c)                                          c = concentration - 1
        means[k, j]     = sum_i r[i, k] x[i, j] / (n[k] + m)                                     m = 0.01
        variances[k, j] = (s + m means[k, j]^2 + sum_i r[i, k] (x[i, j] - means[k, j])^2) / (n[k] + d)

with s twice the scale of the inverse gamma, and d = 2 (shape + 1) + 1: its power of a variance, and that of the mean's
prior. With c, m, s and d at 0 these are the steps to maximum likelihood, which is not bounded: a component that shrinks
onto a row has a likelihood without end.

References:
    Bishop (2006), Pattern Recognition and Machine Learning, sections 9.2 to 9.4.
    Fraley & Raftery (2007), Bayesian regularization for normal mixture estimation and model-based clustering, Journal
    of Classification 24(2), section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpyro.infer.autoguide import AutoDelta
from scipy.special import gammaln, logsumexp, xlogy

from toolkit import Guide
from toolkit.variational.coordinate_ascent import State
from toolkit.variational.expectation_maximisation import STARTS, ExpectationMaximisation


@dataclass(frozen=True)
class PseudoData:
    """The priors of the mixture as data that nobody saw; all zero, the default, is none: maximum likelihood.

    Attributes:
        rows: In each component, for the weights.
        mean_weight: Rows at 0, for each mean.
        power: Of each variance in the density, doubled and turned round: rows for the variances.
        squares: Sum of squares, for each variance.
        constant: What the log density has beside, in nats.
    """

    rows: float = 0.0
    mean_weight: float = 0.0
    power: float = 0.0
    squares: float = 0.0
    constant: float = 0.0

    @classmethod
    def of_priors(
        cls, components: int, features: int, concentration: float, mean_weight: float, shape: float, scale: float
    ) -> PseudoData:
        """Of a symmetric Dirichlet, Normal(0, variance / mean_weight) and InverseGamma(shape, scale)."""
        dirichlet = gammaln(components * concentration) - components * gammaln(concentration)
        each = 0.5 * math.log(mean_weight / (2 * math.pi)) + shape * math.log(scale) - gammaln(shape)
        constant = float(dirichlet + components * features * each)
        return cls(concentration - 1, mean_weight, 2 * (shape + 1) + 1, 2 * scale, constant)


@dataclass(frozen=True, eq=False)
class Mixture:
    """The steps on some data.

    A state has `weights` `(component,)`, `means` and `variances` `(component, feature)`, and `assignments`, the
    probabilities r `(row, component)`.

    Attributes:
        x: Features `(row, feature)`.
        components: How many components.
        prior: The priors as pseudo-data.
    """

    x: np.ndarray
    components: int
    prior: PseudoData = PseudoData()

    def expect(self, state: State) -> State:
        """The E step: the assignments' distribution given all else."""
        joint = self._joint(state)
        return {"assignments": np.exp(joint - logsumexp(joint, axis=1, keepdims=True))}

    def maximise(self, state: State) -> State:
        """The M step: weights, means and variances that are best given the assignments' distribution."""
        shares, prior = state["assignments"], self.prior
        counts = shares.sum(axis=0)
        weights = counts + prior.rows
        means = shares.T @ self.x / (counts + prior.mean_weight)[:, None]
        apart = np.einsum("ik,ikj->kj", shares, np.square(self.x[:, None] - means))
        squares = prior.squares + prior.mean_weight * means**2 + apart
        return {
            "weights": weights / weights.sum(),
            "means": means,
            "variances": squares / (counts + prior.power)[:, None],
        }

    def free_energy(self, state: State) -> float:
        """E_r[log p(x, assignments, parameters)] plus the entropy of r, in nats."""
        shares = state["assignments"]
        return float(np.sum(shares * self._joint(state)) - xlogy(shares, shares).sum()) + self._log_prior(state)

    def log_density(self, state: State) -> float:
        """Log p(x, parameters) in nats, in constrained space, assignments summed out."""
        return float(logsumexp(self._joint(state), axis=1).sum()) + self._log_prior(state)

    def begin(self, rng: np.random.Generator) -> State:
        """A random start: as many rows as means, equal weights, and the data's own variances."""
        kinds = np.unique(self.x, axis=0)  # two means at one place would never part
        rows = rng.choice(len(kinds), self.components, replace=len(kinds) < self.components)
        return {
            "weights": np.full(self.components, 1 / self.components),
            "means": kinds[rows],
            "variances": np.tile(self.x.var(axis=0), (self.components, 1)),
        }

    def _joint(self, state: State) -> np.ndarray:
        """Log of weight times density of each row under each component, `(row, component)`."""
        variances = state["variances"]
        apart = np.square(self.x[:, None] - state["means"]) / variances
        densities = -0.5 * (np.log(2 * math.pi * variances) + apart).sum(axis=2)
        return np.log(state["weights"]) + densities

    def _log_prior(self, state: State) -> float:
        prior, variances = self.prior, state["variances"]
        weights = xlogy(prior.rows, state["weights"]).sum()
        squares = (prior.squares + prior.mean_weight * state["means"] ** 2) / variances
        return float(weights - 0.5 * (prior.power * np.log(variances) + squares).sum() + prior.constant)


def guide(mixture: Mixture, starts: int = STARTS) -> Guide:
    """`em` for a model with this density: a point mass at the highest optimum that so many random starts led to."""
    solve = ExpectationMaximisation(mixture.expect, mixture.maximise, mixture.free_energy, mixture.begin, starts=starts)
    return Guide("em", AutoDelta, chart="plain", label="expectation maximisation", solve=solve)
