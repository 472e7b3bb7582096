r"""Expectation propagation for regressions with a linear predictor, and its approximation of the evidence.

Observation n sees the latents z through one scalar eta_n = a_n'z + b_n. Its likelihood is replaced by a site, a
Gaussian function of eta_n that need not be normalisable, so that the product with the Gaussian prior is a Gaussian:

    q(z)  proportional to  prior(z) prod_n exp(shift_n s_n - precision_n s_n^2 / 2),     s_n = a_n'(z - mode)

A sweep takes each site out of q's marginal in turn (the cavity), puts the likelihood in its place (the tilted
distribution), and asks for the site that gives q the tilted distribution's mean and variance. All sites move at once,
by a share (the damping) of the way, until none moves: there the marginals of q have the moments of all tilted
distributions. That is no optimum of the ELBO, and no bound: where a mean field minimises KL(q || p) and is too narrow,
moments are matched in the direction of KL(p || q), one observation at a time.

References:
    Minka (2001), Expectation propagation for approximate Bayesian inference, UAI.
    Rasmussen & Williams (2006), Gaussian processes for machine learning, section 3.6 (the algorithm and its evidence).
    Seeger (2005), Expectation propagation for exponential families (natural parameters, damping).
    Gelman et al. (2017), Expectation propagation as a way of life, arXiv:1412.4869 (parallel sweeps, section 3).
    Chopin & Ridgway (2017), Leave Pima Indians alone, Statistical Science 32(1), section 3 (EP for binary regression).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg

from toolkit.status import Status
from toolkit.variational.linear_predictor import Regression, linear_predictor
from toolkit.variational.own_solvers import Problem, Solved
from toolkit.variational.quadratic_priors import Quadratic, highest
from toolkit.variational.solvers.svi import Trace
from toolkit.variational.tilted_moments import LogLikelihood, Tilted, tilted_moments

SETTLED = 1e-8
"""In sds: what a sweep may still move a mean or a sd by, undamped, and marginals may differ from tilted moments by."""

_COARSE = 1e-4  # sds: what a run must have come to for an answer, where no damping brings it further
_LEAST_DAMPING = 1 / 16
_GAIN, _PATIENCE = 0.9, 6.0  # a sweep counts as a gain if it moves less than so much; undamped sweeps without one
_MOST_SWEEPS = 2_000
_EMPTY_CAVITY = 1e-10  # of a marginal's precision: what a cavity must keep, or it is improper to rounding
_NEWTON_STEPS, _HALVINGS, _NEWTON_GAIN = 100, 40, 1e-10


@dataclass(frozen=True, eq=False)
class Gaussian:
    """What prior and sites make together: a Gaussian over z - mode.

    Attributes:
        factor: Lower Cholesky factor of the precision.
        mean: `(coordinate,)`.
        sds: Marginal, `(coordinate,)`.
        centres: Means of the linear predictors s, `(observation,)`.
        variances: Of the linear predictors.
        log_mass: Log of the integral of the product, its constants left out, in nats.
    """

    factor: np.ndarray
    mean: np.ndarray
    sds: np.ndarray
    centres: np.ndarray
    variances: np.ndarray
    log_mass: float

    @property
    def scale_tril(self) -> np.ndarray:
        """Lower Cholesky factor of the covariance."""
        # With the order of coordinates turned round, the inverse of the precision's factor is the covariance's.
        turned = np.linalg.cholesky((self.factor @ self.factor.T)[::-1, ::-1])[::-1, ::-1]
        return scipy.linalg.solve_triangular(turned, np.eye(len(turned)), lower=False).T


def gaussian(prior: Quadratic, design: np.ndarray, precisions: np.ndarray, shifts: np.ndarray) -> Gaussian | None:
    """Prior times sites as a Gaussian; None where it cannot be normalised."""
    precision = prior.precision + design.T @ (precisions[:, None] * design)
    linear = prior.linear + design.T @ shifts
    try:
        factor = np.linalg.cholesky(precision)
    except np.linalg.LinAlgError:
        return None
    if not (np.isfinite(factor).all() and np.isfinite(linear).all()):
        return None
    mean = scipy.linalg.cho_solve((factor, True), linear)
    inverse = scipy.linalg.solve_triangular(factor, np.eye(len(linear)), lower=True)
    apart = inverse @ design.T
    constants = 0.5 * len(linear) * math.log(2 * math.pi) - np.log(np.diag(factor)).sum()
    return Gaussian(
        factor,
        mean,
        np.sqrt((inverse**2).sum(0)),
        design @ mean,
        (apart**2).sum(0),
        float(prior.constant + constants + 0.5 * linear @ mean),
    )


@dataclass(frozen=True, eq=False)
class Sites:
    """The Gaussian functions that stand for likelihoods: exp(shift s - precision s^2 / 2), `(observation,)` each."""

    precisions: np.ndarray
    shifts: np.ndarray

    def towards(self, other: Sites, share: float) -> Sites:
        """A share of the way to other sites."""
        return Sites(
            (1 - share) * self.precisions + share * other.precisions, (1 - share) * self.shifts + share * other.shifts
        )


@dataclass(frozen=True, eq=False)
class Sweep:
    """One look at all sites, none of which has moved yet.

    Attributes:
        wanted: The sites that would give q the tilted moments; those that were skipped as they are.
        skipped: Observations whose cavity was improper or whose tilted distribution has no moments.
        residual: The largest distance of a marginal of q from its tilted distribution, in sds: of means, and of the
            logarithms of sds.
        log_evidence: In nats, by these sites; a makeshift where observations were skipped.
        tilted: The moments.
    """

    wanted: Sites
    skipped: np.ndarray
    residual: float
    log_evidence: float
    tilted: Tilted


def sweep(log_likelihood: LogLikelihood, sites: Sites, whole: Gaussian, low: np.ndarray, high: np.ndarray) -> Sweep:
    """Cavities, tilted moments and the sites that match them (Rasmussen & Williams 2006, equations 3.56 to 3.59).

    Args:
        log_likelihood: Log p(y | s) of each observation, from `(row, observation)`.
        sites: The sites.
        whole: What they make with the prior.
        low: Where each tilted distribution began in the last sweep, `(observation,)`.
        high: Where it ended.
    """
    precision = 1 / whole.variances - sites.precisions
    shift = whole.centres / whole.variances - sites.shifts
    proper = precision > _EMPTY_CAVITY / whole.variances
    # An improper cavity is skipped; q's own marginal stands in for it, so that all arrays keep their length.
    precision, shift = np.where(proper, precision, 1 / whole.variances), np.where(proper, shift, 0.0)
    reach, usual = 8 * np.sqrt(whole.variances), np.isfinite(low) & np.isfinite(high) & (low < high)
    low, high = np.where(usual, low, whole.centres - reach), np.where(usual, high, whole.centres + reach)
    tilted = tilted_moments(log_likelihood, shift / precision, 1 / precision, low, high)
    known = proper & tilted.valid
    variance, mean = np.where(known, tilted.variance, 1.0), np.where(known, tilted.mean, 0.0)
    wanted = Sites(
        np.where(known, 1 / variance - precision, sites.precisions),
        np.where(known, mean / variance - shift, sites.shifts),
    )
    shifted = np.abs(mean - whole.centres) / np.sqrt(whole.variances)
    widened = 0.5 * np.abs(np.log(variance / whole.variances))
    residual = float(np.where(known, np.maximum(shifted, widened), 0.0).max(initial=0.0))
    constants = _constants(tilted, precision, shift, sites)
    if not known.all():  # where there is no tilted distribution, site and likelihood are made to agree at q's mean
        at_mean = whole.centres * (sites.shifts - 0.5 * sites.precisions * whole.centres)
        constants = np.where(known, constants, log_likelihood(whole.centres[None])[0] - at_mean)
    return Sweep(wanted, ~known, residual, whole.log_mass + float(constants.sum()), tilted)


def _constants(tilted: Tilted, precision: np.ndarray, shift: np.ndarray, sites: Sites) -> np.ndarray:
    """Log of the constants that give each site, times its cavity, the mass of the tilted distribution (3.65)."""
    both = precision + sites.precisions
    with np.errstate(invalid="ignore", divide="ignore"):
        mass = 0.5 * np.log(precision / both) + 0.5 * (shift + sites.shifts) ** 2 / both - 0.5 * shift**2 / precision
    return tilted.log_constant - mass


@dataclass(frozen=True, eq=False)
class Run:
    """Where sweeps ended.

    Attributes:
        status: ARRIVED where they settled, BUDGET where they were used up, DIVERGED where no damping helped.
        sites: The sites, of all sweeps those that one more would have moved least.
        whole: The Gaussian that they make with the prior.
        last: The look at them.
        moved: How far one more undamped sweep would move a mean or the logarithm of a sd, in sds.
        damping: The share of the way that sites went in the end.
        course: The approximate log evidence before each sweep, in nats.
        nodes: Evaluations of every likelihood.
    """

    status: Status
    sites: Sites
    whole: Gaussian
    last: Sweep
    moved: float
    damping: float
    course: tuple[float, ...] = ()
    nodes: int = 0


def propagate(
    log_likelihood: LogLikelihood,
    prior: Quadratic,
    design: np.ndarray,
    sites: Sites,
    *,
    damping: float = 1.0,
    most_nodes: int = 10**9,
    report: Callable[[int, float], None] = lambda number, log_evidence: None,
) -> Run | None:
    """Sweeps over all sites at once, until none moves; None where even the first Gaussian cannot be normalised.

    Where sweeps gain nothing for a while, they begin again at the best state so far with half the damping. A step after
    which there would be no Gaussian is shortened.

    Args:
        log_likelihood: Log p(y | s) of each observation, from `(row, observation)`.
        prior: The log prior of z - mode.
        design: Gradients of the linear predictors, `(observation, coordinate)`.
        sites: Where to begin.
        damping: The share of the way that sites go, to begin with; 1 is all of it.
        most_nodes: The budget, in evaluations of every likelihood.
        report: Told the number of each sweep and the log evidence.
    """
    whole = gaussian(prior, design, sites.precisions, sites.shifts)
    if whole is None:
        return None
    best, gained, waited, nodes, course = None, math.inf, 0, 0, list[float]()
    reach = 8 * np.sqrt(whole.variances)
    low, high = whole.centres - reach, whole.centres + reach
    while True:
        look = sweep(log_likelihood, sites, whole, low, high)
        low, high, nodes = look.tilted.low, look.tilted.high, nodes + look.tilted.nodes
        course.append(look.log_evidence)
        report(len(course), look.log_evidence)
        step, share = _step(prior, design, sites, look, damping)
        moved = math.inf if step is None else max(look.residual, _distance(whole, step[1]) / share)
        here = Run(Status.ARRIVED, sites, whole, look, moved, damping)
        gained, waited = (moved, 0) if moved < _GAIN * gained else (gained, waited + 1)
        best = here if best is None or moved < best.moved else best
        stuck = step is None or (len(look.skipped) > 0 and look.skipped.all())
        status = Status.ARRIVED if moved <= SETTLED and not stuck else None
        if status is None and (nodes >= most_nodes or len(course) >= _MOST_SWEEPS):
            status = Status.BUDGET
        elif status is None and (stuck or waited > _PATIENCE / damping):
            damping, waited = damping / 2, 0
            step, _ = _step(prior, design, best.sites, best.last, damping)
            if step is None or damping < _LEAST_DAMPING:
                status = Status.ARRIVED if best.moved <= _COARSE else Status.DIVERGED
        if status is not None:
            return replace(best, status=status, damping=damping, course=tuple(course), nodes=nodes)
        assert step is not None
        sites, whole = step


def _step(
    prior: Quadratic, design: np.ndarray, sites: Sites, look: Sweep, share: float
) -> tuple[tuple[Sites, Gaussian] | None, float]:
    """The sites a share of the way on, or as much of it as leaves a Gaussian, and that share; None if there is none."""
    while share >= _LEAST_DAMPING / 2:
        moved = sites.towards(look.wanted, share)
        whole = gaussian(prior, design, moved.precisions, moved.shifts)
        if whole is not None:
            return (moved, whole), share
        share /= 2
    return None, share


def _distance(before: Gaussian, after: Gaussian) -> float:
    """The largest change of a coordinate's mean, in sds, or of the logarithm of its sd."""
    means = np.abs(after.mean - before.mean) / before.sds
    return float(max(means.max(), np.abs(np.log(after.sds / before.sds)).max()))


def laplace(regression: Regression) -> tuple[np.ndarray, Sites, int]:
    """A mode, or a point on the way to it where Newton's steps end early, sites with the curvature there, and looks.

    Sites begin so, since cavities under a wide prior may hold linear predictors at which a rate overflows.
    """
    prior, design, offset = regression.prior, regression.design, regression.offset
    place = prior.centre

    looks = 0

    def look(place: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        nonlocal looks
        looks += 1
        value, slope, bend = regression.derivatives(design @ place + offset)
        return float(value.sum()) + prior(place), slope, np.where(bend < 0, -bend, 0.0)

    height, slope, weights = look(place)
    for _ in range(_NEWTON_STEPS):
        gradient = prior.linear - prior.precision @ place + design.T @ slope
        precision = prior.precision + design.T @ (weights[:, None] * design)
        direction = highest(precision, gradient)
        for halving in range(_HALVINGS):
            there = place + 0.5**halving * direction
            higher, new_slope, new_weights = look(there)
            if higher > height:  # False for NaN
                break
        else:
            break
        gain, place, height, slope, weights = higher - height, there, higher, new_slope, new_weights
        if gain < _NEWTON_GAIN * (1 + abs(height)):
            break
    return place, Sites(weights, slope), looks


def solve_ep(problem: Problem) -> Solved:
    """What expectation propagation finds, as parameters of NumPyro's AutoMultivariateNormal.

    Raises:
        ValueError: The model is no regression with a linear predictor and a Gaussian prior.
    """
    begun = time.perf_counter()
    regression = linear_predictor(problem.model, problem.chart)
    with np.errstate(all="ignore"):
        mode, sites, looks = laplace(regression)
    compiled = time.perf_counter() - begun
    offset = regression.offset + regression.design @ mode

    def report(number: int, log_evidence: float) -> None:
        problem.progress("fit ep", number, number + 1, f"sweep {number}, log evidence about {log_evidence:.2f}")

    run = propagate(
        lambda places: regression.log_likelihood(places + offset),
        regression.prior.seen_from(mode),
        regression.design,
        sites,
        most_nodes=max(problem.max_gradients - looks, 1),
        report=report,
    )
    solver, why = "expectation propagation", regression.words
    if run is None:
        text = "the curvature at the mode makes no Gaussian: the posterior may be improper along a direction"
        return Solved({}, Status.IMPROPER, text, solver, why, gradients=looks, compile_seconds=compiled)
    course = np.array(run.course)
    skipped, status = run.last.skipped, run.status
    if status is Status.ARRIVED and skipped.any():  # a mode's curvature stands for what was never matched
        status = Status.DIVERGED if skipped.all() else Status.UNPROVEN
    arrived = status is not Status.DIVERGED
    prefix = problem.program.prefix
    found = {f"{prefix}_loc": mode + run.whole.mean, f"{prefix}_scale_tril": run.whole.scale_tril}
    return Solved(
        found if arrived else {},
        status,
        _message(run),
        solver,
        f"{why}; {len(course)} sweep{'' if len(course) == 1 else 's'}, the last with damping {run.damping:g}; its "
        "course is its approximation of the log evidence, which is no ELBO and no bound",
        trace=Trace(np.arange(1, len(course) + 1), course, np.full(len(course), np.nan)),
        log_evidence=run.last.log_evidence if status is Status.ARRIVED else None,
        gradients=looks + run.nodes,
        compile_seconds=compiled,
    )


def _message(run: Run) -> str:
    """What a reader must know of how the sweeps ended; empty if all went well."""
    said = []
    if run.status is Status.DIVERGED:
        said.append(f"with damping down to {max(run.damping, _LEAST_DAMPING):g} the sweeps did not settle")
    if run.status is Status.BUDGET or (run.status is Status.ARRIVED and run.moved > SETTLED):
        said.append(f"one more sweep would move a mean or a sd by up to {run.moved:.1g} sd")
    if skipped := int(run.last.skipped.sum()):
        said.append(
            f"{skipped} of {len(run.last.skipped)} observations were skipped in the end, since their cavities were "
            "improper or their likelihood no number there: they count by the curvature that they had before, and the "
            "log evidence is not approximated"
        )
    if run.last.tilted.miss > SETTLED:
        said.append(f"tilted moments are known to {run.last.tilted.miss:.1g} sd only, as where a likelihood has a kink")
    return "; ".join(said)
