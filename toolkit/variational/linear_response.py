"""Linear-response covariances: the correlations that a factorised Gaussian knows of and does not have.

A mean field's means react to a small tilt of the posterior as the true means do; how they react is a covariance. With f
the negative ELBO in locations m and log scales r, it is the (m, m) block of the inverse of f's Hessian at the optimum:

    covariance = (H_mm - H_mr H_rr^-1 H_rm)^-1

which for a Gaussian posterior is the exact one, whatever the mean field's own variances are.

Reference: Giordano, Broderick & Jordan (2018), Covariances, robustness, and variational Bayes, JMLR 19(51), section 3.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import scipy.linalg

from toolkit.cost import Cost
from toolkit.modelling.space import latent_space
from toolkit.status import Status
from toolkit.variational.autoguides import gaussian_form
from toolkit.variational.building import build_guide
from toolkit.variational.density import LogDensity
from toolkit.variational.draws import Key, matched_draws, power_of_two
from toolkit.variational.fits import Fit
from toolkit.variational.gaussians import Member
from toolkit.variational.guides import Guide, find_guide

MOST_DIMENSIONS = 200
"""Beyond, the Hessian's 4 d sets of gradients cost more than the full-rank guide that has these correlations anyway."""

_LEAST_DRAWS, _DRAWS_A_DIMENSION = 128, 4
_STEP = 1e-2  # of a scale, or of a log scale


def responds(fit: Fit) -> bool:
    """Whether a fit is a factorised Gaussian's, at an optimum of the ELBO, in not too many dimensions."""
    return not _why_not(fit)


def _why_not(fit: Fit) -> str:
    if not (fit.usable and fit.status.has_optimum):
        return f"Expected a fit that has an optimum; '{fit.guide.name}' has none: {fit.status.value}."
    if not fit.guide.climbs:
        return (
            f"Expected a fit at an optimum of the ELBO, which responds; '{fit.guide.name}' was fitted by another aim."
        )
    space = latent_space(fit.model, fit.chart)
    form = gaussian_form(fit.autoguide, space)
    member = form.member(fit.params) if form else None
    if member is None or member.scale is None or member.columns is not None:
        return f"Expected a factorised Gaussian; '{fit.guide.name}' is none."
    return (
        "" if space.size <= MOST_DIMENSIONS else f"Expected at most {MOST_DIMENSIONS} dimensions; got {space.size:,}."
    )


def linear_response(fit: Fit, *, key: Key) -> Fit:
    """A factorised Gaussian's fit with linear-response covariances, as a fit of the full-rank family around its means.

    Its ELBO and certificate are not known: it was not optimised. Where the Hessian is no covariance's inverse (the
    fit is not near an optimum), its status is FAILED, and the message says so.

    Args:
        fit: A mean field's fit that has an optimum.
        key: For the fixed draws behind the Hessian.

    Raises:
        ValueError: The fit has no optimum, is not a factorised Gaussian's, or there are too many dimensions.
    """
    problem = _why_not(fit)
    if problem:
        raise ValueError(problem)
    space = latent_space(fit.model, fit.chart)
    form = gaussian_form(fit.autoguide, space)
    assert form is not None
    member = form.member(fit.params)
    begun = time.perf_counter()
    density = LogDensity(fit.model, fit.chart)
    full = find_guide("full_rank")
    guide = Guide(f"{fit.guide.name}+lr", full.build, chart=fit.chart, label="linear-response covariances")
    made = Fit(guide, fit.model, Status.FAILED, solver="linear_response", why="asked for")
    try:
        factor = np.linalg.cholesky(_responding(density, member, key=key))
    except (np.linalg.LinAlgError, ValueError):  # SciPy's, of a Hessian that is not finite
        return replace(made, message="the ELBO's Hessian is no covariance's inverse: the fit is not near an optimum")
    # What it takes is on top of the fit without which there is nothing to respond.
    cost = Cost(
        fit.cost.compile_seconds + density.compile_seconds,
        fit.cost.run_seconds + time.perf_counter() - begun - density.compile_seconds,
        fit.cost.gradient_evaluations + density.evaluations,
        max(fit.cost.peak_bytes, density.peak_bytes),
    )
    made = replace(made, cost=cost)
    start = space.unravel(member.loc)
    built = build_guide(fit.model, guide, start)
    full_form = gaussian_form(built, space)
    assert full_form is not None
    params = full_form.params(Member(member.loc, factor=factor))
    own = {name: value for name, value in fit.params.items() if name in fit.model.parameters(fit.chart)}
    return replace(made, status=fit.status, autoguide=built, params={**own, **params}, start=dict(start))


def _responding(density: LogDensity, member: Member, *, key: Key) -> np.ndarray:
    """The covariance (size, size), from differences of the ELBO's gradient on fixed draws."""
    assert member.scale is not None
    size, scale = density.size, np.abs(member.scale)
    draws = power_of_two(max(_LEAST_DRAWS, _DRAWS_A_DIMENSION * size))
    base = matched_draws(draws, size, key=key)

    def gradient(shift: np.ndarray, log_ratio: np.ndarray) -> np.ndarray:
        """Of the negative ELBO, in locations measured in scales and in log scales, (2 size,)."""
        width = scale * np.exp(log_ratio)
        _, slopes = density.over(member.loc + scale * shift + width * base)
        return np.concatenate([-(slopes * scale).mean(0), -(slopes * width * base).mean(0) - 1.0])

    nothing, hessian = np.zeros(size), np.empty((2 * size, 2 * size))
    for i in range(size):
        step = np.zeros(size)
        step[i] = _STEP
        hessian[i] = (gradient(step, nothing) - gradient(-step, nothing)) / (2 * _STEP)
        hessian[size + i] = (gradient(nothing, step) - gradient(nothing, -step)) / (2 * _STEP)
    hessian = (hessian + hessian.T) / 2
    np.linalg.cholesky(hessian[size:, size:])  # the scales' own block must bend the right way too
    mixed = hessian[:size, size:]
    reduced = hessian[:size, :size] - mixed @ scipy.linalg.solve(hessian[size:, size:], mixed.T)
    return np.linalg.inv((reduced + reduced.T) / 2) * np.outer(scale, scale)
