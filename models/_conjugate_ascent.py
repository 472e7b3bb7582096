"""Coordinate ascent for the conjugate regression: guide programs, closed-form updates, ELBO, and the family's best.

Two free-form families, of which `cavi` factorises everything and `cavi_joint` only coefficients from noise:

    cavi          q(intercept) prod_j q(beta[j]) q(noise_variance)
    cavi_joint    q(intercept, beta) q(noise_variance)

With c the coefficients, intercept first, d of them, P their precision times the noise variance, and tau the mean of
1 / noise_variance, the best factors are

    q(c[j]) = Normal((X'y - sum_{k != j} P[j, k] m[k]) / P[j, j], variance 1 / (tau P[j, j]))                    cavi
    q(c)    = MultivariateNormal(P^-1 X'y, P^-1 / tau)                                                     cavi_joint
    q(noise_variance) = InverseGamma(2 + (n + d) / 2, 2 noise_sd^2 + E_q[|y - X c|^2 + c'P0 c] / 2)           unknown

Their fixed point is unique. There tau is the posterior's own mean of 1 / noise_variance, and KL(q || p) is

    1/2 (sum_j log P[j, j] - log det P)                                              in cavi alone, for correlation
    + g(2 + (n + d) / 2) - g(2 + n / 2),  g(a) = a log a - a - log Gamma(a)           in both, where noise is unknown

The second part, about d / (2 n) nats, depends on how many rows and coefficients there are and on nothing else. A
product of densities that is best must be such a fixed point, and a best one exists, since KL(q || p) is lower
semicontinuous with compact level sets: what is left to gain is therefore known, whatever the state.

References:
    Bishop (2006), Pattern Recognition and Machine Learning, sections 10.1.3 and 10.3.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import scipy.linalg
from numpyro.distributions import constraints
from scipy.special import gammaln, psi

from toolkit import Guide
from toolkit.variational.coordinate_ascent import CoordinateAscent, State, Update

if TYPE_CHECKING:
    from models.conjugate_regression import Posterior

_FACTORISED = ("mean_field", "diagonal")
_GAUSSIANS = ("full_rank", "coupled", "blocks", "low_rank", "laplace", *_FACTORISED)


def guides(posterior: Posterior) -> tuple[Guide, Guide]:
    """`cavi` and `cavi_joint` for a model with this posterior.

    Their families are all products of densities, of whatever form: so each contains the Gaussian ones that factorise as
    it does, and where the noise is known `cavi_joint` contains everything.
    """
    known = posterior.noise == "known"
    return (
        _guide(posterior, "cavi", joint=False, contains=_FACTORISED),
        _guide(posterior, "cavi_joint", joint=True, contains=("cavi", *(_GAUSSIANS if known else _FACTORISED))),
    )


def family_gap(posterior: Posterior, *, joint: bool) -> float:
    """KL(q || p) in nats of the family's best member, which is what its best ELBO lies below the log evidence.

    Args:
        posterior: What is approximated.
        joint: Whether the coefficients are one factor (`cavi_joint`) or one each (`cavi`).
    """
    precision = posterior.precision
    gap = 0.0 if joint else 0.5 * float(np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1])
    if posterior.noise == "unknown":
        exact = posterior.noise_law[0]
        gap += _tightness(exact + len(precision) / 2) - _tightness(exact)
    return gap


def _tightness(shape: float) -> float:
    return shape * math.log(shape) - shape - float(gammaln(shape))


def _guide(posterior: Posterior, name: str, *, joint: bool, contains: tuple[str, ...]) -> Guide:
    best = posterior.log_evidence - family_gap(posterior, joint=joint)
    elbo = partial(_elbo, posterior)
    solve = CoordinateAscent(
        _updates(posterior, joint=joint), elbo, _start(posterior, joint=joint), left=lambda state: best - elbo(state)
    )
    label = "coordinate ascent" + (", coefficients jointly" if joint else "")
    program = _Program(joint=joint, noise=posterior.noise)
    return Guide(name, lambda fn: program, contains, chart="plain", label=label, solve=solve)


class _Program:
    """The guide as a NumPyro program, whose parameters are a state of the ascent."""

    def __init__(self, *, joint: bool, noise: str) -> None:
        self.joint, self.noise = joint, noise

    def __call__(self, x: Any, y: Any = None) -> None:
        """Samples the model's latent sites."""
        size = x.shape[1] + 1
        if self.noise == "unknown":
            law = [
                numpyro.param(f"noise_{part}", jnp.ones(()), constraint=constraints.positive)
                for part in ("shape", "scale")
            ]
            numpyro.sample("noise_variance", dist.InverseGamma(*law))
        loc = numpyro.param("loc", jnp.zeros(size))
        if self.joint:
            factor = numpyro.param("scale_tril", jnp.eye(size), constraint=constraints.lower_cholesky)
            # The intercept first and the slopes given it: each site keeps a density of its own.
            intercept = numpyro.sample("intercept", dist.Normal(loc[0], factor[0, 0]))
            pulled = loc[1:] + factor[1:, 0] * (intercept - loc[0]) / factor[0, 0]
            numpyro.sample("beta", dist.MultivariateNormal(pulled, scale_tril=factor[1:, 1:]))
        else:
            scale = numpyro.param("scale", jnp.ones(size), constraint=constraints.positive)
            numpyro.sample("intercept", dist.Normal(loc[0], scale[0]))
            numpyro.sample("beta", dist.Normal(loc[1:], scale[1:]).to_event(1))


def _start(posterior: Posterior, *, joint: bool) -> State:
    """Coefficients and noise as under the prior."""
    size = len(posterior.precision)
    scale = posterior.noise_sd * posterior.prior_precision**-0.5
    state: State = {"loc": np.zeros(size)} | ({"scale_tril": np.diag(scale)} if joint else {"scale": scale})
    if posterior.noise == "unknown":
        shape, rate = posterior.noise_prior
        state |= {"noise_shape": np.array(shape), "noise_scale": np.array(rate)}
    return state


def _updates(posterior: Posterior, *, joint: bool) -> dict[str, Update]:
    """Factor name to its best parameters given the others, in the order of a sweep."""
    names = ["intercept", *(f"beta[{j}]" for j in range(posterior.x.shape[1]))]
    updates: dict[str, Update] = (
        {"intercept, beta": _joint_update(posterior)}
        if joint
        else {name: _coefficient_update(posterior, j) for j, name in enumerate(names)}
    )
    if posterior.noise == "unknown":
        updates["noise_variance"] = _noise_update(posterior)
    return updates


def _coefficient_update(posterior: Posterior, j: int) -> Update:
    row, own = posterior.precision[j], float(posterior.precision[j, j])
    pulled = float(posterior.design[:, j] @ posterior.y)

    def update(state: State) -> State:
        loc, scale = state["loc"].copy(), state["scale"].copy()
        loc[j] += (pulled - row @ loc) / own
        scale[j] = (_precision_of_noise(posterior, state) * own) ** -0.5
        return {"loc": loc, "scale": scale}

    return update


def _joint_update(posterior: Posterior) -> Update:
    # P = U U' with U upper triangular, so that U'^-1 is a lower triangular square root of P^-1.
    turned = np.linalg.cholesky(posterior.precision[::-1, ::-1])
    root = scipy.linalg.solve_triangular(turned[::-1, ::-1].T, np.eye(len(turned)), lower=True)

    def update(state: State) -> State:
        return {"loc": posterior.mean, "scale_tril": root / math.sqrt(_precision_of_noise(posterior, state))}

    return update


def _noise_update(posterior: Posterior) -> Update:
    shape, rate = posterior.noise_prior

    def update(state: State) -> State:
        counted = len(posterior.y) + len(posterior.precision)
        return {
            "noise_shape": np.array(shape + counted / 2),
            "noise_scale": np.array(rate + _squares(posterior, state) / 2),
        }

    return update


def _precision_of_noise(posterior: Posterior, state: State) -> float:
    """The mean of 1 / noise_variance."""
    if posterior.noise == "known":
        return posterior.noise_sd**-2.0
    return float(state["noise_shape"] / state["noise_scale"])


def _squares(posterior: Posterior, state: State) -> float:
    """The mean of |y - X c|^2 + c'P0 c over the coefficients' factors."""
    loc, precision = state["loc"], posterior.precision
    apart = posterior.y - posterior.design @ loc
    spread = (
        np.einsum("ij,ij->", precision @ state["scale_tril"], state["scale_tril"])
        if "scale_tril" in state
        else np.diag(precision) @ state["scale"] ** 2
    )
    return float(apart @ apart + posterior.prior_precision @ loc**2 + spread)


def _elbo(posterior: Posterior, state: State) -> float:
    """The ELBO of a state in nats."""
    size, counted = len(posterior.precision), len(posterior.y) + len(posterior.precision)
    scales = np.diag(state["scale_tril"]) if "scale_tril" in state else state["scale"]
    entropy = float(np.log(scales).sum()) + 0.5 * size * (1 + math.log(2 * math.pi))
    noise = 0.0
    if posterior.noise == "known":
        log_variance = 2 * math.log(posterior.noise_sd)
    else:
        (a0, b0), (a, b) = posterior.noise_prior, (float(state["noise_shape"]), float(state["noise_scale"]))
        log_variance = math.log(b) - float(psi(a))
        noise = a0 * math.log(b0) - float(gammaln(a0)) - (a0 + 1) * log_variance - b0 * a / b
        noise += a + math.log(b) + float(gammaln(a)) - (1 + a) * float(psi(a))
    precision = _precision_of_noise(posterior, state)
    energy = -0.5 * counted * (math.log(2 * math.pi) + log_variance)
    energy += 0.5 * float(np.log(posterior.prior_precision).sum()) - 0.5 * precision * _squares(posterior, state)
    return energy + noise + entropy
