"""Improper posteriors that a Gaussian does not notice: far out, the density of a coordinate falls too slowly.

A Gaussian sits where the density is high, and may sit there well although the tail beyond has no finite mass: of one
dummy variable that tells classes apart, of a scale that two groups do not hold, of a flat log scale. A density m(z) of
one coordinate has a finite integral only where it falls faster than 1 / |z|. So each unconstrained coordinate of a site
with an improper prior is followed outwards, both ways, and log m is taken by Laplace's method (Tierney & Kadane 1986,
Accurate approximations for posterior moments and marginal densities): the maximum over all others, and the volume that
the curvature there leaves them. What matters is how log m changes, so that an error which stays the same is none.

First all are maximised 100 and 316 sds out, where most have a density that falls faster than any volume grows, or a
marginal that clearly falls from the one to the other. What is left is walked along, by Newton's method in units of the
place before: as a scale goes to zero or without end, the curvatures of the others part by so many decades that no other
units leave their determinant as a number.

A tail that is level only tens of nats below the fit is none, though it has no finite integral either: programs clamp
probabilities and rates (NumPyro's `Bernoulli(probs=...)` at 36 nats a row), and no sampler would ever go there.

A proper prior ends any tail, but where it does may be too far to be seen; so only coordinates whose own prior is
improper are followed, as far as 10^6 sds or numbers go, and nothing is claimed of less than 10.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from toolkit.modelling.model import Model
from toolkit.modelling.once import once_a_chart
from toolkit.modelling.sites import LATENT, trace_sites
from toolkit.modelling.space import latent_space
from toolkit.status import Status
from toolkit.variational.density import LogDensity
from toolkit.variational.failures import Failure, coordinate_names
from toolkit.variational.gaussians import Member
from toolkit.variational.solvers.lockstep import minimise_each

_SIZE = 100  # dimensions: in more, determinants are dear
_SCREENED_AT = 100.0  # sds, where most coordinates of regressions are told to be held
_SCREENED_ROUNDS = 40
_STATIONARY = 0.03  # of the gradient along a coordinate, that those of the others may be left with; and at most one
_VOLUME_RATE = 2.0  # nats that the logarithm of a scale may grow or fall by, for each unit of another coordinate
_VOLUME_RATE_FAR = 300.0  # the same for each e-fold of the distance: beyond, scales are no numbers
_FIRST, _LAST, _LEAST = 1.0, 1e6, 10.0  # sds of a walk, and where it may end before anything is said
_STEP = 10**0.5  # between two places of a walk, or less where Newton's method does not settle there
_E_FOLDS = 2.0  # of what is positive, in a step of one sd at most: ten of them are nine decades
_TRIALS = 80  # of places on a walk
_STALLED = 0.04  # of the distance: shorter steps mean that numbers have ended
_NEAREST = 0.2  # sds: where nothing settles so near, the others have no maximum
_NEARLY = 0.1  # nats that Newton's next step would gain, where only a clear fall is asked about
_SETTLED = 1e-4  # nats that Newton's next step would gain
_NEWTON = 8
_LENGTHS = np.array([1.0, 0.3, 0.1, 0.01])  # of Newton's step
_DIFFERENCE = 0.03  # sds
_ROUND = (0.5, 2.0)  # the curvatures that are left in units that fit
_LOPSIDED = 0.1  # between a second derivative and the same one the other way round: more is rounding
_SLOW = 0.9  # nats for each e-fold of the distance: one is where integrals end to be finite
_FAST = 1.1
_CARRIED = (
    14.0  # nats: a level tail so far below the fit that e^14 times the walk would not hold its mass is no finding
)
_CLEAR = 3.0
_DECIDED = 30.0  # sds from which on a fall that is fast enough ends a walk
_STEEP = 19.0  # nats of a fall over half a decade at most that ends it from 3 sds on; a Gaussian's from 3 to 7 is 20
_STEEP_FROM = 3.0
_EDGE_FROM, _EDGE_WITHIN, _EDGE_POINTS = 2.0, 6.0, 64  # sds from the fit where numbers end, and at how many looks
_LEVEL = 0.5  # nats
_ENDS_OF_NUMBERS = 300.0  # e-folds, 10^130: of what exponentials can reach, and no quantity of any unit does
_WIDEST = 1e-4  # the least curvature at the fit in units of the fit's own: a mean field is too narrow


@dataclass(frozen=True)
class FlatCoordinate:
    """An unconstrained coordinate of a site with an improper prior.

    Attributes:
        number: Which one.
        name: For sentences: `"beta[2]"`, or `"log(sigma)"` where the site is positive.
        longest: The most that a step of one sd may be, in unconstrained units: two e-folds of what is positive.
    """

    number: int
    name: str
    longest: float = math.inf


@dataclass(frozen=True)
class _Place:
    """The maximum of log p over all coordinates but one, and what the curvature there says.

    Attributes:
        distance: Of the one coordinate from the fit, in sds.
        x: The point (size,).
        factor: A square root of the others' covariance, (others, others).
        tangent: How the others move with the one, (others,).
        height: Log p there, in nats.
        volume: The logarithm of the factor's determinant.
    """

    distance: float
    x: np.ndarray
    factor: np.ndarray
    tangent: np.ndarray
    height: float
    volume: float

    @property
    def log_marginal(self) -> float:
        """Of the one coordinate, but for a constant, in nats."""
        return self.height + self.volume


@once_a_chart
def flat_coordinates(model: Model, chart: str) -> tuple[FlatCoordinate, ...]:
    """The unconstrained coordinates in a chart of all sites with an improper prior."""
    if not model.flat_priors:
        return ()
    sites, space = trace_sites(model.bound(chart), model.arrays), latent_space(model, chart)
    names, found, begin = coordinate_names(space), list[FlatCoordinate](), 0
    for name, shape in zip(space.names, space.shapes, strict=True):
        end = begin + int(np.prod(shape))
        site = sites[name]
        if site.kind == LATENT and not site.proper:
            longest = _E_FOLDS if site.support in ("positive", "half-line") else math.inf
            found += [FlatCoordinate(i, _shown(names[i], site.support), longest) for i in range(begin, end)]
        begin = end
    return tuple(found)


def _shown(name: str, support: str) -> str:
    return {"real": name, "positive": f"log({name})"}.get(support, f"{name} in unconstrained space")


def find_heavy_tail(density: LogDensity, flat: Sequence[FlatCoordinate], member: Member) -> Failure | None:
    """Why a posterior has no finite mass along one of its coordinates; None where no such coordinate is found.

    It takes some tens of gradients for each coordinate whose density falls fast, and some hundreds for one with a
    slow tail. In more than 100 dimensions no tail is followed.

    Args:
        density: Log p(x, z).
        flat: Which coordinates to follow.
        member: The Gaussian from which to set out.
    """
    return _followed(density, flat, member) or _run_off(flat, member)


def _run_off(flat: Sequence[FlatCoordinate], member: Member) -> Failure | None:
    """A scale that is no longer a number of any unit, where no walk has told more."""
    for one in flat:
        at = member.loc[one.number]
        if math.isfinite(one.longest) and abs(at) > _ENDS_OF_NUMBERS:
            where = f"{'+' if at > 0 else '-'}infinity"
            return Failure(
                Status.IMPROPER, f"{one.name} has run off towards {where}, to {at:.3g}, near where numbers end"
            )
    return None


def _followed(density: LogDensity, flat: Sequence[FlatCoordinate], member: Member) -> Failure | None:
    if not flat or density.size > _SIZE:
        return None
    with np.errstate(all="ignore"):  # tails are followed to where numbers end
        covariance = _covariance(density, member)
        if covariance is None:
            return None
        rays = [_Ray(density, one, way, member.loc, covariance) for one in flat for way in (1.0, -1.0)]
        for ray, searched in _undecided(density, rays):
            found = ray.walked(searched)
            if found:
                return found
    return None


def find_level_edge(density: LogDensity, flat: Sequence[FlatCoordinate], member: Member) -> Failure | None:
    """Why draws of a Gaussian have no number for a density although the density does not end there; None elsewhere.

    A tail may be level up to where floating-point numbers end (the log rate of a class without any events, once its
    exponential underflows): the Gaussian is then as wide as these are, too wide for a walk of ten sds. Each coordinate
    with an improper prior is moved alone, up to six sds; where numbers end at two or more, a Gaussian would have fallen
    by two nats, and any density that it was fitted to by some. Where the density is zero it does end; and a wall nearer
    than exponentials reach is the model's own.

    Args:
        density: Log p(x, z).
        flat: Which coordinates to move.
        member: The Gaussian.
    """
    distances = np.linspace(0.0, _EDGE_WITHIN, _EDGE_POINTS)
    with np.errstate(all="ignore"):
        sds = np.sqrt(member.variances)
        for one in flat:
            for way in (1.0, -1.0):
                points = np.repeat(member.loc[None], len(distances), 0)
                points[:, one.number] += way * distances * sds[one.number]
                values, gradients = density.over(points)
                broken = np.flatnonzero(~(np.isfinite(values) & np.isfinite(gradients).all(1)))
                if not len(broken) or distances[broken[0]] < _EDGE_FROM:
                    continue
                first, at = values[broken[0]], points[broken[0], one.number]
                if not np.isneginf(first) and abs(at) > _ENDS_OF_NUMBERS and np.ptp(values[: broken[0]]) < _LEVEL:
                    return Failure(
                        Status.IMPROPER,
                        f"as {one.name} goes to {'+' if way > 0 else '-'}infinity, the log density stays level as far "
                        f"as it is a number, up to about {at:.3g}",
                    )
    return None


class _Ray:
    """One coordinate, one way."""

    def __init__(
        self, density: LogDensity, coordinate: FlatCoordinate, way: float, loc: np.ndarray, covariance: np.ndarray
    ) -> None:
        self.density, self.coordinate, self.way, self.loc = density, coordinate, way, loc
        k = coordinate.number
        self.others = np.delete(np.arange(density.size), k)
        self.unit = way * min(math.sqrt(covariance[k, k]), coordinate.longest)
        self.line = covariance[:, k] / covariance[k, k]
        rest = covariance[np.ix_(self.others, self.others)] - np.outer(
            covariance[self.others, k], self.line[self.others]
        )
        self.factor = _square_root(rest)

    def at(self, distance: float) -> np.ndarray:
        """The point (size,) on the Gaussian's regression line, so many sds out."""
        return self.loc + distance * self.unit * self.line

    def walked(self, searched: np.ndarray | None) -> Failure | None:
        """What walks outwards say of the tail: from what a search has found far out, and from the fit.

        The others may have several maxima. Where the density falls in one of them, it may not in another, and one may
        end on the way; only where it falls by far more than it must is one enough.
        """
        here = self._settled(self._beginning(0.0, self.loc), 0.0)
        if here is None:
            return None
        beginnings = [(here, _FIRST)]
        if searched is not None:
            beginnings.insert(0, (self._beginning(_SCREENED_AT, searched), _SCREENED_AT))
        for begin, first in beginnings:
            places = self._walk(begin, first)
            if _is_steep(places):
                return None
            found = self._judged(places, here)
            if found:
                return found
        return None

    def _beginning(self, distance: float, x: np.ndarray) -> _Place:
        """A point from which Newton's method sets out, in the fit's own units."""
        return _Place(distance, x, self.factor, self.line[self.others], math.nan, math.nan)

    def _walk(self, begin: _Place, distance: float) -> list[_Place]:
        """Places farther and farther out, the first at a distance, until one says enough or numbers end."""
        places = list[_Place]()
        here, step = begin, max(_FIRST, distance)
        for _ in range(_TRIALS):
            place = self._settled(here, distance)
            if place:
                places.append(place)
                if _is_held(places) or distance >= _LAST:
                    break
                here, step = place, min(2 * step, (_STEP - 1) * distance)
            else:
                step /= 3
                if step < _STALLED * distance or (not places and step < _NEAREST):
                    break
            distance = min(here.distance + step, _LAST)
        return places

    def _judged(self, places: Sequence[_Place], fit: _Place) -> Failure | None:
        fallen = _falls(places)
        if fallen is None or not (places[-1].distance >= _LEAST and max(fallen.rates) < _SLOW):
            return None
        # A density may be level far below the fit only because a program has clamped a probability or a rate.
        if places[-1].log_marginal + math.log(places[-1].distance) < fit.log_marginal - _CARRIED:
            return None
        where = f"{self.coordinate.name} goes to {'+' if self.way > 0 else '-'}infinity"
        first, last = fallen.places[0], fallen.places[-1]
        lost = first.log_marginal - last.log_marginal
        needed = math.log(last.distance / first.distance)
        rise = last.height - first.height
        if -lost > needed and rise > needed:
            return Failure(Status.UNBOUNDED, f"{where}, and the log density rises without end")
        text = f"falls by {lost:.1f} nats" if lost > 0.05 else "does not fall"
        return Failure(
            Status.IMPROPER,
            f"as {where}, its density {text} from {first.distance:.2g} to {last.distance:.2g} sds, where a finite "
            f"integral needs a fall of more than {needed:.1f} nats",
        )

    def _settled(self, before: _Place, distance: float) -> _Place | None:
        """The maximum at a distance, from a place before it; None where Newton's method does not settle."""
        gone = (distance - before.distance) * self.unit
        x = np.repeat(before.x[None], 3, 0)
        x[:, self.coordinate.number] = self.at(distance)[self.coordinate.number]
        x[:, self.others] += gone * np.outer([0.0, 1.0, 0.5], before.tangent)
        values, _ = self.density.over(x)
        if not np.isfinite(values).any():
            return None
        point, factor = x[np.nanargmax(values)], before.factor
        for number in range(_NEWTON):
            steps = np.zeros((len(self.others), self.density.size))
            steps[:, self.others] = _DIFFERENCE * factor.T
            values, gradients = self.density.over(np.concatenate([point[None], point + steps, point - steps]))
            if not (np.isfinite(values).all() and np.isfinite(gradients).all()):
                return None
            above, below = np.split(gradients[1:], 2)
            change = (below - above) / (2 * _DIFFERENCE)  # minus the Hessian, one column of the factor at a time
            curvature = change[:, self.others] @ factor
            lopsided = np.abs(curvature - curvature.T).max(initial=0.0) > _LOPSIDED
            curves, axes = scipy.linalg.eigh((curvature + curvature.T) / 2) if len(curvature) else (_NONE, curvature)
            bent = np.maximum(np.abs(curves), 1e-8 * np.abs(curves).max(initial=1e-8))
            slope = axes.T @ (factor.T @ gradients[0][self.others])
            factor = factor @ (axes / np.sqrt(bent))
            towards = factor @ (slope / np.sqrt(bent))
            gain = float((slope**2 / bent).sum()) / 2
            positive = bool((curves > 0).all())
            fits = bool((curves > _ROUND[0]).all() and (curves < _ROUND[1]).all())
            if positive and fits and not lopsided and gain < _SETTLED:
                cross = change[:, self.coordinate.number]  # in the units before
                tangent = -factor @ ((axes.T @ cross) / np.sqrt(bent))
                volume = float(np.linalg.slogdet(factor)[1]) if len(factor) else 0.0
                return _Place(distance, point, factor, tangent, float(values[0]), volume)
            if not positive and number >= _NEWTON // 2:
                return None  # the others run off
            trials = np.repeat(point[None], len(_LENGTHS), 0)
            trials[:, self.others] += np.outer(_LENGTHS, towards)
            tried, _ = self.density.over(trials)
            best = int(np.nanargmax(np.where(np.isfinite(tried), tried, -np.inf)))
            if tried[best] > values[0] - 1e-9 * max(abs(values[0]), 1.0):
                point = trials[best]
        return None


_NONE = np.empty(0)


@dataclass(frozen=True)
class _Falls:
    """The last decade of a walk: three places, and the nats lost between them for each e-fold of the distance."""

    places: tuple[_Place, _Place, _Place]
    rates: tuple[float, float]


def _falls(places: Sequence[_Place]) -> _Falls | None:
    """The last decade; None where a walk has not covered one."""
    last = places[-1] if places else None
    chosen = []
    for times in (_STEP**2, _STEP):
        far_enough = [place for place in places if last and place.distance <= last.distance / times * 1.001]
        if not far_enough:
            return None
        chosen.append(far_enough[-1])
    assert last is not None
    first, middle = chosen
    if middle is first:
        return None
    return _Falls((first, middle, last), (_rate(first, middle), _rate(middle, last)))


def _rate(first: _Place, last: _Place) -> float:
    return (first.log_marginal - last.log_marginal) / math.log(last.distance / first.distance)


def _is_held(places: Sequence[_Place]) -> bool:
    """Whether the density is seen to fall fast enough."""
    last = places[-1]
    before = next(place for place in places if place.distance >= last.distance / (_STEP * 1.001))
    if _is_steep(places) or (last.distance >= _STEEP_FROM and before.log_marginal - last.log_marginal > _STEEP):
        return True
    fallen = _falls(places)
    return fallen is not None and last.distance >= _DECIDED and min(fallen.rates) > _FAST


def _is_steep(places: Sequence[_Place]) -> bool:
    """Whether the density falls by far more than it must between the last two places, far out."""
    return len(places) > 1 and places[-1].distance >= _DECIDED and _rate(*places[-2:]) > _CLEAR


def _undecided(density: LogDensity, rays: Sequence[_Ray]) -> list[tuple[_Ray, np.ndarray | None]]:
    """The rays along which nothing is decided by maxima at two distances far out, each with the nearer of these maxima.

    A ray is decided where log p falls faster there than volumes can grow, or where its marginal clearly falls.
    """
    near = _Maxima(density, rays, _SCREENED_AT)
    volumes = (density.size - 1) * np.minimum(
        _VOLUME_RATE * np.abs([ray.unit for ray in rays]), _VOLUME_RATE_FAR / _SCREENED_AT
    )
    left = np.flatnonzero(~(near.stationary & (-near.slopes > volumes + 10 / _SCREENED_AT)))
    if not len(left):
        return []
    # The others have mostly gone on as they had begun.
    begin = np.where(near.ended[:, None], _STEP * near.x, 0.0)[left]
    far = _Maxima(density, [rays[int(i)] for i in left], _STEP * _SCREENED_AT, begin)
    lost = near.log_marginals(left) - far.log_marginals(np.arange(len(left)))
    undecided = left[~(lost > _CLEAR * math.log(_STEP))]
    return [(rays[int(i)], near.points[i] if near.ended[i] else None) for i in undecided]


class _Maxima:
    """Log p maximised over all coordinates but one, along several rays at one distance, side by side.

    Args:
        density: Log p(x, z).
        rays: Along which coordinates.
        distance: In sds.
        begin: Where searches begin, away from the Gaussian's regression lines in each ray's units, (rays, others); on
            the lines if None.

    Attributes:
        x: Where searches ended, in these units, (rays, others).
        points: The same as points, (rays, size).
        ended: Which ended by themselves at a finite density, (rays,).
        slopes: Of log p along the coordinate there, in nats for each of its sds, (rays,).
        stationary: Where the others' gradients are small beside that, (rays,).
    """

    def __init__(
        self, density: LogDensity, rays: Sequence[_Ray], distance: float, begin: np.ndarray | None = None
    ) -> None:
        self._density = density
        self._lines = np.stack([ray.at(distance) for ray in rays])
        self._others, self._factors = np.stack([ray.others for ray in rays]), np.stack([ray.factor for ray in rays])
        everyone = np.arange(len(rays))

        def losses(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            rows = x[:, -1].astype(int)  # each search carries its ray's number, which has no gradient
            values, gradients = density.over(self._placed(x[:, :-1], rows))
            return -values, np.concatenate([-self._pulled(gradients, rows), np.zeros((len(x), 1))], 1)

        begin = np.zeros((len(rays), density.size - 1)) if begin is None else begin
        numbered = np.concatenate([begin, everyone[:, None]], 1)
        found = minimise_each(losses, numbered, decrease=1e-6, gradient=1e-2, max_rounds=_SCREENED_ROUNDS)
        self.x = found.x[:, :-1]
        self.points = self._placed(self.x, everyone)
        values, gradients = density.over(self.points)
        units, numbers = [ray.unit for ray in rays], [ray.coordinate.number for ray in rays]
        self.ended = found.ended & np.isfinite(values)
        self.slopes = np.array(units) * gradients[everyone, numbers]
        left = np.abs(self._pulled(gradients, everyone)).max(1, initial=0.0)
        self.stationary = np.isfinite(values) & (left <= np.minimum(_STATIONARY * np.abs(self.slopes), 1.0))

    def log_marginals(self, rows: np.ndarray) -> np.ndarray:
        """Of the coordinates of some rays, by Laplace's method in each ray's units, in nats, (rows,).

        NaN where there is no maximum, or rounding has left nothing of the curvature.
        """
        width = self.x.shape[1]
        steps = _DIFFERENCE * np.concatenate([np.zeros((1, width)), np.eye(width), -np.eye(width)])
        tried, each = np.repeat(self.x[rows], len(steps), 0), np.repeat(rows, len(steps))
        values, gradients = self._density.over(self._placed(tried + np.tile(steps, (len(rows), 1)), each))
        heights = values.reshape(len(rows), -1)[:, 0]
        slopes = self._pulled(gradients, each).reshape(len(rows), len(steps), width)
        above, below = np.split(slopes[:, 1:], 2, axis=1)
        curvatures = (below - above) / (2 * _DIFFERENCE)  # minus the Hessians
        sound = np.isfinite(heights) & np.isfinite(curvatures).all((1, 2))
        curves = np.linalg.eigvalsh(np.where(sound[:, None, None], curvatures, np.eye(width)))
        least = curves.min(1, initial=np.inf)
        lopsided = np.abs(curvatures - curvatures.mT).max((1, 2), initial=0.0)
        # What a Newton step would gain at most, and how wrong the smallest curvature may be.
        gained = (slopes[:, 0] ** 2).sum(1) / (2 * least)
        settled = sound & (least > 0) & (lopsided < _LOPSIDED * least) & (gained < _NEARLY)
        volumes = -0.5 * np.log(np.maximum(curves, np.finfo(float).tiny)).sum(1)
        return np.where(settled, heights + volumes, np.nan)

    def _placed(self, x: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Points (n, size), from the others' coordinates in their rays' units (n, others)."""
        placed, others = self._lines[rows], self._others[rows]
        shifted = np.einsum("nij,nj->ni", self._factors[rows], x)
        np.put_along_axis(placed, others, np.take_along_axis(placed, others, 1) + shifted, 1)
        return placed

    def _pulled(self, gradients: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Gradients in these units (n, others), from those at the points (n, size)."""
        return np.einsum("nij,ni->nj", self._factors[rows], np.take_along_axis(gradients, self._others[rows], 1))


def _covariance(density: LogDensity, member: Member) -> np.ndarray | None:
    """The fit's covariance (size, size), widened where the density's curvature at its centre is less than its own.

    A mean field has the sds that coordinates have when the others are held, and no correlations.
    """
    covariance = member.covariance()
    sds = np.sqrt(np.diag(covariance))
    if not (np.isfinite(covariance).all() and (sds > 0).all()):
        return None
    factor = _square_root(covariance)
    steps = _DIFFERENCE * factor.T
    _, gradients = density.over(np.concatenate([member.loc + steps, member.loc - steps]))
    above, below = np.split(gradients, 2)
    curvature = (below - above) @ factor / (2 * _DIFFERENCE)
    if not np.isfinite(curvature).all():
        return covariance
    curves, axes = scipy.linalg.eigh((curvature + curvature.T) / 2)
    wider = factor @ (axes / np.sqrt(np.where(curves > 0, np.clip(curves, _WIDEST, 1.0), 1.0)))
    return np.asarray(wider @ wider.T)


def _square_root(covariance: np.ndarray) -> np.ndarray:
    """A square root, of which rounding may leave only the order of its smallest parts."""
    if not len(covariance):
        return covariance
    sds = np.sqrt(np.maximum(np.diag(covariance), np.finfo(float).tiny))
    values, vectors = scipy.linalg.eigh(covariance / np.outer(sds, sds))
    return np.asarray(sds[:, None] * vectors * np.sqrt(np.maximum(values, 1e-14)))
