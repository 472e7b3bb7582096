"""A hierarchy of linear-Gaussian levels: its exact posterior, and inference by prediction errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from toolkit import Certificate, Estimate, Scope, Status
from toolkit.variational.own_solvers import Problem, Solved
from toolkit.variational.solvers.svi import Trace

_FRACTION = 1e-4  # of the tolerance: what the fall of the free energy that is still to come may be
_SHARE = 0.01  # of the tolerance: the least that a certificate says
_LAG = 10  # steps over which the rate of the falls is measured
_ROUNDING = 1e-14  # of the free energy
_POINTS = 200  # of the course


@dataclass(frozen=True, eq=False)
class Posterior:
    """The causes' posterior, level 1 first.

    Attributes:
        mean: `(cause,)`.
        precision: `(cause, cause)`.
        lower: The precision's Cholesky factor.
        log_evidence: Log p(y) in nats.
    """

    mean: np.ndarray
    precision: np.ndarray
    lower: np.ndarray
    log_evidence: float

    @property
    def mean_field_kl(self) -> float:
        """What the best mean field lies below the log evidence, in nats."""
        return float(0.5 * np.log(np.diag(self.precision)).sum() - np.log(np.diag(self.lower)).sum())


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """Causes that predict causes, and in the end what is seen.

    Attributes:
        weights: W_0, W_1, ...; W_l is `(sizes[l], sizes[l + 1])` and predicts level l from level l + 1.
        sds: s_0, s_1, ...; s_l `(sizes[l],)` is what level l has beside its prediction. The top's prediction is 0.
    """

    weights: tuple[Any, ...]
    sds: tuple[Any, ...]

    @classmethod
    def unpacked(cls, weights: Any, sds: Any, sizes: Sequence[int]) -> Hierarchy:
        """From flat arrays, as a dataset holds them."""
        shapes = list(zip(sizes[:-1], sizes[1:], strict=True))
        ends = np.cumsum([a * b for a, b in shapes])
        pieces = [weights[end - a * b : end].reshape(a, b) for end, (a, b) in zip(ends, shapes, strict=True)]
        ends = np.cumsum(sizes)
        return cls(tuple(pieces), tuple(sds[end - size : end] for end, size in zip(ends, sizes, strict=True)))

    def packed(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights and sds as flat arrays."""
        return np.concatenate([np.ravel(weights) for weights in self.weights]), np.concatenate(self.sds)

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many pixels, causes at level 1, and so on."""
        return tuple(len(sds) for sds in self.sds)

    def split(self, causes: Any) -> list[Any]:
        """Causes of all levels `(..., cause)` as one array a level, level 1 first."""
        ends = np.cumsum(self.sizes[1:])
        return [causes[..., end - size : end] for end, size in zip(ends, self.sizes[1:], strict=True)]

    def errors(self, y: np.ndarray, causes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Prediction errors weighted by precision, level 0 first: (what is there - its prediction) / s^2.

        Reference: Bogacz (2017), A tutorial on the free-energy framework for modelling perception and learning.
        """
        there = [y, *causes]
        predicted = [weights @ above for weights, above in zip(self.weights, causes, strict=True)]
        predicted.append(np.zeros(self.sizes[-1]))
        return [(x - mean) / sds**2 for x, mean, sds in zip(there, predicted, self.sds, strict=True)]

    def pushes(self, errors: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Where each level's causes are pushed, the gradient of log p(y, causes): -e_l + W_(l-1)' e_(l-1).

        Reference: Rao & Ballard (1999), Predictive coding in the visual cortex; Bogacz (2017).
        """
        return [
            weights.T @ below - own for weights, below, own in zip(self.weights, errors[:-1], errors[1:], strict=True)
        ]

    @cached_property
    def local_precisions(self) -> list[np.ndarray]:
        """The diagonal of the causes' precision, one array a level: 1 / s_l^2 + sum over what it predicts of W^2 / s^2.

        A unit needs its own connections for it and nothing else.
        """
        return [
            own**-2.0 + np.square(weights).T @ below**-2.0
            for weights, below, own in zip(self.weights, self.sds[:-1], self.sds[1:], strict=True)
        ]

    @cached_property
    def rates(self) -> list[np.ndarray]:
        """How far a unit may go along its push, one array a level, so that the free energy never rises.

        One over a bound of the sum of the absolute values of its row of the precision: a diagonal matrix of such sums
        is above the precision, and each step goes to the minimum of a parabola above the free energy. In the bound are
        sums of the absolute weights of all that predict the same: a unit has to be told of its siblings' by what they
        predict, once.

        Reference: Hunter & Lange (2004), A tutorial on MM algorithms, on quadratic bounds.
        """
        found = []
        for level, (weights, below, own) in enumerate(zip(self.weights, self.sds[:-1], self.sds[1:], strict=True)):
            from_above = np.abs(self.weights[level + 1]).sum(1) if level + 1 < len(self.weights) else 0.0
            siblings = np.abs(weights).sum(1) + (level > 0)
            found.append(1.0 / (own**-2.0 * (1 + from_above) + np.abs(weights).T @ (below**-2.0 * siblings)))
        return found

    def free_energy(self, errors: Sequence[np.ndarray]) -> float:
        """Minus the ELBO in nats, exactly, of normals around the causes with variances 1 / `local_precisions`."""
        variances = 1.0 / np.concatenate(self.local_precisions)
        sds = np.concatenate(self.sds)
        squares = np.square(np.concatenate(errors) * sds).sum()
        energy = 0.5 * squares + np.log(sds).sum() + 0.5 * len(sds) * math.log(2 * math.pi)
        return float(energy - 0.5 * np.log(2 * math.pi * variances).sum())

    def posterior(self, y: np.ndarray) -> Posterior:
        """The exact posterior of the causes, by linear algebra on all of them at once."""
        zero = self.split(np.zeros(sum(self.sizes[1:])))
        precision = self.precision
        lower = np.linalg.cholesky(precision)
        slope = np.concatenate(self.pushes(self.errors(y, zero)))
        mean = np.linalg.solve(precision, slope)
        sds, errors = np.concatenate(self.sds), np.concatenate(self.errors(y, self.split(mean)))
        joint = -0.5 * np.square(errors * sds).sum() - np.log(sds).sum() - 0.5 * len(sds) * math.log(2 * math.pi)
        volume = 0.5 * len(mean) * math.log(2 * math.pi) - np.log(np.diag(lower)).sum()
        return Posterior(mean, precision, lower, float(joint + volume))

    @cached_property
    def precision(self) -> np.ndarray:
        """The causes' joint precision given what is seen, level 1 first, `(cause, cause)`: block tridiagonal."""
        ends = np.cumsum(self.sizes[1:])
        places = [slice(end - size, end) for end, size in zip(ends, self.sizes[1:], strict=True)]
        precision = np.zeros((ends[-1], ends[-1]))
        for level, (weights, below) in enumerate(zip(self.weights, self.sds[:-1], strict=True)):
            here = places[level]
            weighted = weights.T / below**2
            precision[here, here] += weighted @ weights + np.diag(self.sds[level + 1] ** -2.0)
            if level:
                precision[here, places[level - 1]] = -weighted
                precision[places[level - 1], here] = -weighted.T
        return precision


def settle(problem: Problem, *, site: str) -> Solved:
    """The mean field that prediction errors lead to: each cause goes along its push until nothing is left to gain.

    Args:
        problem: The model, with arrays `weights`, `sds` and `y` and static `sizes`.
        site: The latent sites' name, with `{level}` for the level.

    Raises:
        ValueError: The model is another one, or the guide looks at another chart than the errors are those of.
    """
    arrays, static = problem.model.arrays, problem.model.dataset.static
    _check(problem, site)
    hierarchy = Hierarchy.unpacked(arrays["weights"], arrays["sds"], static["sizes"])
    causes = hierarchy.split(np.zeros(sum(hierarchy.sizes[1:])))
    errors = hierarchy.errors(arrays["y"], causes)
    course = [hierarchy.free_energy(errors)]
    settled = False
    while not settled and len(course) <= problem.max_gradients:
        pushes = hierarchy.pushes(errors)
        causes = [x + rate * push for x, rate, push in zip(causes, hierarchy.rates, pushes, strict=True)]
        errors = hierarchy.errors(arrays["y"], causes)
        course.append(hierarchy.free_energy(errors))
        settled = _still_to_fall(course) < _FRACTION * problem.tolerance
    # What is left is known exactly, since the free energy is a parabola; the units do not need to know it.
    slope = np.concatenate(hierarchy.pushes(errors))
    left = float(0.5 * slope @ np.linalg.solve(hierarchy.posterior(arrays["y"]).precision, slope))
    params = dict[str, Any]()
    for level, (x, precision) in enumerate(zip(causes, hierarchy.local_precisions, strict=True), start=1):
        name = f"{site.format(level=level)}_{problem.program.prefix}"
        params |= {f"{name}_loc": x, f"{name}_scale": precision**-0.5}
    steps = np.unique(np.geomspace(1, len(course), min(_POINTS, len(course))).astype(int)) - 1
    if left <= problem.tolerance:
        status, message = Status.ARRIVED, ""
    else:
        status = Status.UNPROVEN if settled else Status.BUDGET
        message = f"{left:.2g} nats are left after {len(course) - 1:,} steps"
    return Solved(
        params,
        status,
        message,
        solver="prediction errors",
        why="it is made of units that go along their own prediction errors, down the free energy, which is minus the "
        f"ELBO; {len(course) - 1:,} steps",
        trace=Trace(steps, -np.array(course)[steps], np.zeros(len(steps))),
        # At least a hundredth of the tolerance, as for all other certificates: rounding is in it.
        certificate=Certificate(Estimate(left, 0.0), max(left, _SHARE * problem.tolerance), Scope.GLOBAL, 0, 0),
        elbo=-course[-1],
        gradients=len(course) - 1,
    )


def _check(problem: Problem, site: str) -> None:
    """The model is a hierarchy, looked at as it is written."""
    arrays, static = problem.model.arrays, problem.model.dataset.static
    sites = {site.format(level=level) for level in range(1, len(static.get("sizes", ())))}
    if any(name not in arrays for name in ("weights", "sds", "y")) or set(problem.space.names) != sites:
        raise ValueError(
            f"Expected a hierarchy of causes as in `predictive_coding`, whose prediction errors this guide follows; "
            f"got model '{problem.model.name}' with latent sites {', '.join(problem.space.names)}."
        )
    if problem.chart != "plain":
        raise ValueError(
            f"Expected chart 'plain', in which the prediction errors are a gradient; got '{problem.chart}'."
        )


def _still_to_fall(course: Sequence[float]) -> float:
    """How much the free energy will still fall, if its falls go on shrinking as they did over the last steps."""
    if len(course) < _LAG + 2:
        return math.inf
    last, before = course[-2] - course[-1], course[-_LAG - 2] - course[-_LAG - 1]
    if last <= _ROUNDING * abs(course[-1]):
        return 0.0
    shrink = (last / before) ** (1 / _LAG) if before > 0 else 1.0
    return last * shrink / (1 - shrink) if shrink < 1 else math.inf
