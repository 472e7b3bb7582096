"""Why a fit has no optimum to arrive at: improper posteriors, flat directions, densities without a bound, edges.

The ELBO is never above log p(x), so it is without a bound only where the posterior cannot be normalised, and then no
answer of any family means anything. What such a fit looks like depends on where it was stopped; therefore nothing is
read from its numbers alone, unless floating-point numbers have ended. A suspicion costs one set of draws. It is
confirmed by climbing on, each time in units of the Gaussian that the last climb ended at, and each gain measured on
draws of its own: an optimum ends this, and only a climb that covers decades without an end is called a run-off. What
rises tells the kinds apart: the density (`UNBOUNDED`) or only the Gaussian's volume (`IMPROPER`). A density that is the
same all along a line is `FLAT`, whether or not the family at hand can follow it.

An ELBO may also have a bound where log p(x) has none: of one datum with flat priors on a mean and a log scale every
Gaussian may be stretched about the datum without end, and its ELBO stays what it is. Of a proper posterior that cannot
be: the mass that it has outside of a bounded set goes to zero as the set grows, and so KL(q || p) to infinity as q
leaves them all. An ELBO that stays the same along a path without end is therefore `IMPROPER`, too.

A scale alone cannot run to zero: its entropy falls without end, and the ELBO rises only if the mean log density does so
faster. A collapse is therefore a density without a bound, and its sentence names the coordinate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg
from scipy.special import ndtri

from toolkit.modelling.density import invalid_sites
from toolkit.modelling.model import Model
from toolkit.modelling.space import Space
from toolkit.status import Status
from toolkit.variational.autoguides import GaussianForm
from toolkit.variational.density import LogDensity, central_differences
from toolkit.variational.draws import Key, branch, matched_draws, power_of_two
from toolkit.variational.gaussians import Diagonal, Family, Frame, Member, Quadratic, Triangular
from toolkit.variational.solvers.fixed_draws import FixedDrawsELBO, climb

_DRAWS, _SCREENED_DRAWS = 256, 32
_DRAWS_AN_EDGE = 4_096
_SUSPICIOUS = 0.3  # sds from where a location should be, or nats that a scale's logarithm is short of a stationary ELBO
_NOT_NEAR = 10.0  # unconstrained units from the origin, farther than which a location is measured by itself as well
_FALSE_ALARMS = 0.001  # the chance of a suspicion where there is nothing
_STAGES = 12
_EVALUATIONS = 40  # of a stage's climb
_WORTH = 0.25  # nats that a stage must gain
_LEAST_STAGES = 2
_FAR = 1e4  # a scale's factor, or sds of the fit, that no fit should still be from its optimum
_FLAT_CURVATURE = 1e-5  # of a direction, in units of what single coordinates have
_FLATTER = 0.05  # the same, where draws are what it is known by
_STRAIGHTENING = (1.0,) * 6 + (30.0,) * 2
_FLAT_RAY = (1e3, 1e5, 1e7)  # conditional sds; one that is 7e9 times what it is taken for reads as flat
_FLAT_CHANGE = 1e-6  # nats
_NAMED = 0.3  # of the largest: coordinates with so much of a direction are named with it
_MOST_NAMED = 4
_LARGEST = 1e150  # whose square is still a number
_ROOT_2 = math.sqrt(2.0)  # a diagonal Gaussian's parameter for each unit of a scale's logarithm
_RIDGE_DRAWS = 256
_RIDGE_SIZE = _RIDGE_DRAWS // 4  # dimensions: in more, a few draws leave flat directions of their own
_RIDGE_STEPS = 30  # of Lanczos's method
_RIDGE_DIFFERENCE = 1e-3  # working parameters
_RIDGE_CURVATURE = 0.02  # below which it is walked along: in these parameters, others are about one
_RIDGE = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # logarithms of factors: beyond the last, squares are no numbers
_RIDGE_CHANGE = 0.05  # nats, by which even a prior with an sd of 900 on a logarithm ends the walk
_OUTWARDS = (10.0, 100.0, 1e3)  # times as far from the origin
_INWARDS = np.geomspace(1e-90, 1.0, 31)  # parts of the way from the origin, at which a density may be finite
_NARROWINGS = 4
_RESOLUTION = 1e-14  # of a location: narrower Gaussians have draws that are no longer distinct numbers
_LEAST = 1e-100
_LARGE = 1e8  # unconstrained units, from which a fit is looked at more closely
_BEYOND = 1e12  # from which it is a run-off if it gains by going as much farther as `_OUTWARDS` says
_NO_SQUARES = math.sqrt(_LARGEST)  # from which nothing can be measured, and no further proof is asked for
_WIDER = 1.5
# Of a Gaussian so much wider: an edge just outside the farthest of 1,024 to 16,384 draws, where a normal's upper tail
# is one in so many, lies 3.1 to 3.8 sds away, and beyond it are 2 to 0.5 % of the wider one's draws. With less than
# this (an edge 4.1 sds away, beyond which a climb's draws hardly come) it is not the edge that holds the fit.
_SQUEEZED = 0.003
_DENSE = 300  # dimensions up to which a fit's covariance is looked at as a matrix


@dataclass(frozen=True)
class Failure:
    """A status, and the sentence that goes with it."""

    status: Status
    message: str


def find_failure(
    density: LogDensity,
    form: GaussianForm,
    member: Member,
    quadratic: Quadratic,
    *,
    key: Key,
    suspected: bool = False,
) -> Failure | None:
    """Why a Gaussian fit has no optimum to arrive at; None where nothing speaks for that.

    A fit at an optimum costs 256 gradients, and six for each direction in which its density has next to no curvature.

    Args:
        density: Log p(x, z).
        form: The family.
        member: Where the fit is.
        quadratic: Near log p under the member.
        key: Random key.
        suspected: Whether to look closely in any case.
    """
    with np.errstate(all="ignore"):  # a run-off ends where floating-point numbers do
        found = _flat_nearby(density, member, quadratic)
        if found:
            return found
        # A family that no stretch stays in has no zero slope along one at its best.
        if not (suspected or (form.around is None and _is_suspicious(density, form, member, key=branch(key, 0)))):
            return None
        return (
            _flat_anywhere(density, member)
            or _beyond_units(density, member, key=branch(key, 3))
            or _running_off(density, form, member, key=branch(key, 1))
            or _collapsing(density, member, key=branch(key, 2))
        )


def find_ridge(density: LogDensity, member: Member, *, key: Key) -> Failure | None:
    """Why a Gaussian fit is one of an endless row that are all as good; None where no such row is found.

    A row is made by a map that leaves the posterior as it is, along which no mode can have a curvature in all
    directions: where a search has found such a mode, there is nothing to look for. Rows of diagonal Gaussians are
    looked for whatever the family of the fit, in up to 64 dimensions, by the flattest direction of their ELBO on 256
    draws; that takes at most some 90,000 gradients.

    Args:
        density: Log p(x, z).
        member: Where the fit is.
        key: Random key.
    """
    frame = _own_frame(member)
    if frame is None or density.size > _RIDGE_SIZE:
        return None
    family = Diagonal(Frame.of(member.loc, frame.diagonal))
    size = density.size
    base = matched_draws(_RIDGE_DRAWS, size, key=key)
    objective = FixedDrawsELBO(density, family, Quadratic(member.loc, np.zeros(size), frame.diagonal), base)
    with np.errstate(all="ignore"):
        top = climb(objective, np.zeros(family.parameters), residual=_RIDGE_CHANGE / 10, max_evaluations=_EVALUATIONS)
        curvature, line = _flattest(objective, top.x)
        growth = line[size:] / _ROOT_2  # of the scales' logarithms
        if not (abs(curvature) < _RIDGE_CURVATURE and np.abs(growth).max() > 0):
            return None
        line = line / growth[np.argmax(np.abs(growth))]
        for far in _RIDGE:
            x = top.x + far * line
            if not objective(x)[0] > top.elbo - _RIDGE_CHANGE:
                walked = climb(objective, x, residual=_RIDGE_CHANGE / 10, max_evaluations=_EVALUATIONS)
                reached = (walked.x - top.x)[size:].max() / _ROOT_2
                if not (walked.elbo > top.elbo - _RIDGE_CHANGE and reached > far / 2):
                    return None
                line = (walked.x - top.x) / reached
    names = _largest(density.space, np.maximum(np.abs(line[:size]), line[size:] / _ROOT_2))
    return Failure(Status.IMPROPER, f"the ELBO stays the same as {names} go on without end")


def _flattest(objective: FixedDrawsELBO, x: np.ndarray) -> tuple[float, np.ndarray]:
    """The least curvature of minus the ELBO and its direction (parameters,), by Lanczos's method."""

    def curved(vector: np.ndarray) -> np.ndarray:
        step = _RIDGE_DIFFERENCE * vector
        return (objective(x - step)[1] - objective(x + step)[1]) / (2 * _RIDGE_DIFFERENCE)

    first = np.random.default_rng(0).standard_normal(len(x))
    basis, products = [first / np.linalg.norm(first)], list[np.ndarray]()
    while True:
        products.append(curved(basis[-1]))
        rest = products[-1]
        for _ in range(2):  # rounding leaves something of the others after one
            rest = rest - np.stack(basis).T @ (np.stack(basis) @ rest)
        length = np.linalg.norm(rest)
        if len(basis) == min(len(x), _RIDGE_STEPS) or not length > 1e-8:
            break
        basis.append(rest / length)
    matrix = np.stack(basis) @ np.stack(products).T
    if not np.isfinite(matrix).all():
        return math.inf, first
    values, vectors = scipy.linalg.eigh((matrix + matrix.T) / 2)
    flattest = int(np.argmin(np.abs(values)))
    return float(values[flattest]), np.stack(basis).T @ vectors[:, flattest]


def describe_edge(
    density: LogDensity, model: Model, chart: str, family: Family, member: Member, *, key: Key
) -> Failure | None:
    """The share of a Gaussian's draws that have no finite density, and which site breaks it; None without an edge.

    A climb squeezes a Gaussian until none of its draws cross an edge; so one half as wide again is asked, and an edge
    is told where as many of its draws lie beyond as squeezing implies.

    Args:
        density: Log p(x, z).
        model: The model, to ask for the site.
        chart: The chart of the density.
        family: The family.
        member: Where the fit is.
        key: Random key.
    """
    base = matched_draws(_DRAWS_AN_EDGE, family.base, key=key)
    if member.columns is not None and member.factor is None:  # NumPyro's parameters, without what draws are made by
        member = family.member(family.near(member))
    for wider, share, words in ((1.0, 0.0, ""), (_WIDER, _SQUEEZED, " half as wide again")):
        with np.errstate(all="ignore"):
            points = member.loc + wider * (family.points(member, base) - member.loc)
            values, gradients = density.over(points)
        broken = ~(np.isfinite(values) & np.isfinite(gradients).all(1))
        if broken.mean() > share:
            sites = name_invalid(model, chart, density.space, points[np.flatnonzero(broken)[0]])
            lost = f"{broken.mean():.2g} of {len(base):,} draws of a Gaussian{words} have no finite density"
            return Failure(Status.DIVERGED, f"{lost}{sites}")
    return None


def name_invalid(model: Model, chart: str, space: Space, point: np.ndarray) -> str:
    """Such as `": site 'y' has a log density of nan"`; empty where every site alone is finite."""
    clauses = invalid_sites(model.in_chart(chart), space.unravel(point))
    return f": {'; '.join(clauses)}" if clauses else ""


def is_sound(terms: np.ndarray) -> bool:
    """Whether numbers are finite, and so are their squares."""
    with np.errstate(invalid="ignore"):
        return bool((np.abs(terms) < _LARGEST).all())


def coordinate_names(space: Space) -> list[str]:
    """A name for each unconstrained coordinate, such as `"beta[2]"`."""
    names = []
    for name, shape in zip(space.names, space.shapes, strict=True):
        names += [f"{name}[{','.join(map(str, place))}]" if place else name for place in np.ndindex(*shape)]
    return names


# -- flat directions --------------------------------------------------------------------------------------------------


def _flat_nearby(density: LogDensity, member: Member, quadratic: Quadratic) -> Failure | None:
    """A flat line through the fit, by the curvature that the fit knows."""
    if density.size > _DENSE or _is_far_out(member):
        return None
    known = [quadratic.precision] if quadratic.precision.ndim > 1 else []
    if member.factor is not None:
        known += _inverses(member.covariance())
    return next((found for one in known if (found := _flat_by(density, member.loc, one))), None)


def _flat_anywhere(density: LogDensity, member: Member) -> Failure | None:
    """A flat line through the fit or through the origin, by the curvature there: far out rounding has taken it."""
    if density.size > _DENSE:
        return None
    origin = np.zeros(density.size)
    # A conditional sd may be any number of raw units; the fit's own is about that or more.
    units = np.clip(np.nan_to_num(_sds(member), nan=1.0), 1.0, _NO_SQUARES)
    for loc in (origin,) if _is_far_out(member) else (origin, member.loc):
        curvature = -central_differences(density, loc)[0]
        if not np.isfinite(curvature).all():
            continue
        for number in np.flatnonzero(np.abs(np.diag(curvature)) < _FLAT_CURVATURE):
            line = np.zeros(density.size)
            line[number] = units[number]
            if _is_flat(density, loc, line):
                return _along(density.space, line)
        found = _flat_by(density, loc, curvature)
        if found:
            return found
    return None


def _flat_by(density: LogDensity, loc: np.ndarray, precision: np.ndarray) -> Failure | None:
    """A flat line among the directions in which a precision has next to nothing."""
    diagonal = np.diag(precision)
    if not (np.isfinite(precision).all() and (diagonal > 0).all()):
        return None
    units = diagonal**-0.5  # the coordinates' conditional sds
    scaled = precision * np.outer(units, units)
    if not np.isfinite(scaled).all():
        return None
    values, vectors = scipy.linalg.eigh(scaled)
    flattest = int(np.argmin(np.abs(values)))  # at a place that is no mode others may be negative
    if not np.abs(values[flattest]) < _FLATTER:
        return None
    line = _straightened(density, loc, units * vectors[:, flattest], units, values, vectors)
    return _along(density.space, line / units) if _is_flat(density, loc, line) else None


def _inverses(covariance: np.ndarray) -> list[np.ndarray]:
    """The inverse, of which rounding may leave only the order of the largest eigenvalues; none if it is no number."""
    sds = np.sqrt(np.diag(covariance))
    if not (is_sound(covariance) and (sds > 0).all()):
        return []
    values, vectors = scipy.linalg.eigh(covariance / np.outer(sds, sds))
    return [(vectors / np.maximum(values, 1e-15)) @ vectors.T / np.outer(sds, sds)]


def _straightened(
    density: LogDensity,
    loc: np.ndarray,
    line: np.ndarray,
    units: np.ndarray,
    values: np.ndarray,
    vectors: np.ndarray,
) -> np.ndarray:
    """A direction freed of what it has of curved ones, by Newton's step from the gradient far out on it."""
    bounded = np.where(np.abs(values) < _FLATTER, np.copysign(_FLATTER, values), values)
    bounded[np.argmin(np.abs(values))] = np.inf
    for far in (*_STRAIGHTENING, *_FLAT_RAY):
        _, gradients = density.over(np.stack([loc + far * line, loc - far * line]))
        slope = (gradients[0] - gradients[1]) / (2 * far)
        if not np.isfinite(slope).all():
            break
        line = line + units * (vectors @ ((vectors.T @ (units * slope)) / bounded))
    return line


def _is_flat(density: LogDensity, loc: np.ndarray, line: np.ndarray) -> bool:
    far = np.array([0.0, *_FLAT_RAY, *(-distance for distance in _FLAT_RAY)])
    points = loc + far[:, None] * line
    if not (points[1:] != points[0]).any(1).all():  # straightening has left nothing of the direction
        return False
    values, _ = density.over(points)
    return bool(np.isfinite(values).all() and (np.abs(values - values[0]) < _FLAT_CHANGE).all())


def _along(space: Space, direction: np.ndarray) -> Failure:
    weights = np.where(np.abs(direction) > _NAMED * np.abs(direction).max(), np.abs(direction), 0.0)
    with_first = np.sign(direction) == np.sign(direction[np.argmax(weights > 0)])
    one_way, other_way = np.where(with_first, weights, 0.0), np.where(with_first, 0.0, weights)
    names = _largest(space, one_way)
    if other_way.any():
        names = f"{names} one way and {_largest(space, other_way)} the other"
    elif (one_way > 0).sum() > 1:
        names += " together"
    return Failure(Status.FLAT, f"moving {names} changes nothing in the density")


def _largest(space: Space, weights: np.ndarray) -> str:
    """The coordinates that weigh most."""
    weights = np.nan_to_num(weights)  # of what has left the numbers, too
    if not weights.max() > 0:
        return "the coordinates"
    order = [int(i) for i in np.argsort(-weights) if weights[i] > _NAMED * weights.max()]
    names = [coordinate_names(space)[i] for i in sorted(order[:_MOST_NAMED])]
    more = f" and {len(order) - _MOST_NAMED} more" if len(order) > _MOST_NAMED else ""
    return (", ".join(names) + more) if more or len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# -- run-offs ---------------------------------------------------------------------------------------------------------


def _running_off(density: LogDensity, form: GaussianForm, member: Member, *, key: Key) -> Failure | None:
    """What a climb that covers decades and still gains is a sign of; None where there is none."""
    first, sds = member, _sds(member)
    # What low rank can gain full rank can, without columns that run off by themselves.
    family: Callable[[Frame], Family]
    whole = member.factor is not None and density.size <= _DENSE and not form.concave
    family = Triangular if whole else form.around or form.family
    for number in range(1, _STAGES + 1):
        stage = _stage(density, family, member, key=branch(key, number))
        if stage is None:
            return None
        member = stage.member
        narrow = _too_narrow(density.space, member)  # from there on draws are a handful of numbers, and stages stall
        if narrow:
            return narrow
        logs = np.log(_sds(member) / sds)
        moved = np.abs(member.loc - first.loc) / sds
        far = max(np.exp(np.abs(logs).max()), moved.max())
        if not far < (_FAR if number >= _LEAST_STAGES else _FAR**2):
            # By the last stage: the first ones may rise by what the fit was short of, as on the way into a cone.
            return _named(density.space, stage.energy, stage.volume, logs, moved)
    return None


def _beyond_units(density: LogDensity, member: Member, *, key: Key) -> Failure | None:
    """What a Gaussian is a sign of that has gone further than most units explain, and gains by going further.

    A sum of money may lie at 10^13 with an sd of 10^11, which is no run-off: ten times as far its ELBO is lower. Where
    squares are no numbers nothing can be measured, and what has come there has run off.
    """
    narrow = _too_narrow(density.space, member)
    if narrow:
        return narrow
    sds = _sds(member)
    logs, moved = np.log(sds), np.abs(member.loc)
    sizes = np.maximum(sds, moved)
    if sizes.max() < _BEYOND:
        return None
    if sizes.max() < _NO_SQUARES:
        rises = _farther_out(density, member, sizes >= _LARGE, key=key)
        return _named(density.space, *rises, logs, moved) if rises else None
    # A density alone means nothing: it is compared with the finite one nearest to the origin, on the way there.
    heights = density.over(np.append(0.0, _INWARDS)[:, None] * member.loc)[0]
    finite = heights[np.isfinite(heights)]
    energy = heights[-1] - (finite[0] if len(finite) else 0.0)
    return _named(density.space, energy, float(np.log(sizes).max()), logs, moved)


def _farther_out(density: LogDensity, member: Member, far: np.ndarray, *, key: Key) -> tuple[float, float] | None:
    """The rises in nats of the mean log density and the entropy as what is far out goes a thousand times as far.

    By decades, each three times as wide as the one before, which is clearer of a cone's edges; None where one of them
    gains nothing.
    """
    apart = _apart(member, key=key)
    begun = before = density.over(member.loc + apart)[0]
    for nearer, times in itertools.pairwise((1.0, *_OUTWARDS)):
        points = np.where(far, times * member.loc + math.sqrt(times) * apart, member.loc + apart)
        values = density.over(points)[0]
        if not _is_gain(values - before, far.sum() * math.log(times / nearer) / 2):
            return None
        before = values
    return float((before - begun).mean()), float(far.sum() * math.log(_OUTWARDS[-1]) / 2)


def _apart(member: Member, *, key: Key) -> np.ndarray:
    """Draws of a Gaussian less its location, (draws, size), for which nothing is inverted: far out that may fail."""
    size = len(member.loc)
    columns = np.zeros((size, 0)) if member.columns is None or member.factor is not None else member.columns
    width = size + columns.shape[1]
    base = matched_draws(max(_DRAWS, power_of_two(4 * width)), width, key=key)
    if member.factor is not None:
        return base @ member.factor.T
    assert member.scale is not None
    return member.scale * (base[:, :size] + base[:, size:] @ columns.T)


def _too_narrow(space: Space, member: Member) -> Failure | None:
    """What a Gaussian is a sign of that is so narrow, for where it lies, that its draws are no distinct numbers."""
    far = np.abs(member.loc)
    narrow = _sds(member) / np.maximum(far, _LEAST)
    if not (narrow.min() < _RESOLUTION and far.max() < _LARGE):
        return None
    where = f"the guide's sd of {_largest(space, -np.minimum(np.log(narrow / _RESOLUTION), 0))} runs to zero"
    return Failure(Status.UNBOUNDED, f"{where}, and the log density rises without end")


def _collapsing(density: LogDensity, member: Member, *, key: Key) -> Failure | None:
    """A coordinate along which the density has a spike that no narrower Gaussian ever fills."""
    few, many = (matched_draws(draws, density.size, key=branch(key, draws)) for draws in (_SCREENED_DRAWS, _DRAWS))
    for number in range(min(density.size, _DENSE)):
        if _narrowed(density, member, number, few, times=1, surely=False) is None:
            continue
        centre = _narrowed(density, member, number, many, times=_NARROWINGS, surely=True)
        if centre is not None:
            name = coordinate_names(density.space)[number]
            where = f"the guide's sd of {name} runs to zero at {centre:.4g}"
            return Failure(Status.UNBOUNDED, f"{where}, and the log density rises without end")
    return None


def _narrowed(
    density: LogDensity, member: Member, number: int, base: np.ndarray, *, times: int, surely: bool
) -> float | None:
    """Where a coordinate's scale can be divided by ten, several times over; None where that costs ELBO.

    At most draws the density must rise nearly as the entropy falls; surely, the mean must gain beyond its noise.
    """
    sds, draws = _sds(member), len(base)
    cloud = member.loc + sds * base
    centre, width = member.loc[number], max(sds[number], 1e-8 * abs(member.loc[number]))
    energies = list[np.ndarray]()
    for _ in range(times + 1):
        line = np.repeat(member.loc[None], _DRAWS + 1, 0)  # a spike hides between coarser points
        line[:, number] = centre + width * np.linspace(-4, 4, _DRAWS + 1)
        values, _ = density.over(line)
        centre, width = line[int(np.argmax(np.nan_to_num(values, nan=-math.inf))), number], width / 10
        cloud[:, number] = centre + width * base[:, number]
        energies.append(density.over(cloud)[0])
        if len(energies) > 1:
            rise = energies[-1] - energies[-2] - math.log(10)
            if not np.quantile(rise, 0.25) > -0.5 * math.log(10):  # at the foot of a wall only those outside rise
                return None
            gained = is_sound(rise) and rise.mean() > max(_WORTH / 4, 2 * rise.std() / math.sqrt(draws))
            if surely and not gained:
                return None
    return float(centre)


def _is_far_out(member: Member) -> bool:
    """Whether a location or a scale is too large, or a scale too small, for differences to be trusted there."""
    sds = _sds(member)
    narrow = bool((sds < _RESOLUTION * np.abs(member.loc)).any())
    return narrow or not max(np.abs(member.loc).max(), sds.max()) < _LARGE


def _sds(member: Member) -> np.ndarray:
    return np.sqrt(member.variances)


@dataclass(frozen=True)
class _Stage:
    """Where a climb from a member ended, and by how much the mean log density and the entropy rose, in nats."""

    member: Member
    energy: float
    volume: float


def _stage(density: LogDensity, family_in: Callable[[Frame], Family], member: Member, *, key: Key) -> _Stage | None:
    """A climb in units of the member; None where it gains nothing on draws of its own or leaves the numbers."""
    frame = _own_frame(member)
    if frame is None:
        return None
    family = family_in(frame)
    quadratic = Quadratic(frame.loc, np.zeros(family.size), frame.precision)
    before = family.member(family.near(member))
    draws = max(_DRAWS, power_of_two(4 * family.base))
    base, fresh = (matched_draws(draws, family.base, key=branch(key, i)) for i in range(2))
    objective = FixedDrawsELBO(density, family, quadratic, base)
    begun = density.over(family.points(before, fresh))[0]
    entropy = family.entropy(before)

    def measured(x: np.ndarray) -> _Stage | None:
        after = family.member(x)
        change, volume = density.over(family.points(after, fresh))[0] - begun, family.entropy(after) - entropy
        return _Stage(after, float(change.mean()), volume) if _is_gain(change, volume) else None

    # On a cone's way out, location and scale grow together, and a climb on few draws widens until others fall outside.
    if (np.abs(before.loc) > _sds(before)).any():
        for times in _OUTWARDS:
            outward = measured(family.near(_outward(before, times)))
            if outward:
                return outward
    return measured(climb(objective, family.near(before), residual=_WORTH / 5, max_evaluations=_EVALUATIONS).x)


def _is_gain(change: np.ndarray, volume: float) -> bool:
    """Whether changes of the log density at draws and one of the entropy add up to a gain, beyond their noise.

    Where a few draws fall outside of a cone, what they gain is all the noise; where even without that there is a gain,
    there is one.
    """
    if not (is_sound(change) and math.isfinite(volume)):
        return False
    return any(
        terms.mean() + volume > max(_WORTH, 2 * terms.std() / math.sqrt(len(terms)))
        for terms in (change, np.minimum(change, 0.0))
    )


def _outward(member: Member, times: float) -> Member:
    """A Gaussian so many times as far from the origin, and three times as wide: clearer of a cone's edges."""
    wider = math.sqrt(10)
    scale, factor = (None if part is None else wider * part for part in (member.scale, member.factor))
    return replace(member, loc=times * member.loc, scale=scale, factor=factor)


def _is_suspicious(density: LogDensity, form: GaussianForm, member: Member, *, key: Key) -> bool:
    """Whether a location or a scale is far from where the ELBO is stationary, or all of it gains far out.

    Every Gaussian family here is closed under shifting and under stretching a single coordinate; at its best member
    therefore E[g_i] = 0 and E[g_i (z_i - loc_i)] = -1 for each coordinate i, with g the gradient of log p. A location
    far from the origin is also measured by itself: where there is no end to go to, it is far off in its own size though
    not in sds. Near the edges of a cone all of this may hold by the few draws that fall outside; clear of them nothing
    holds it.
    """
    if _is_far_out(member):
        return True
    frame = _own_frame(member)
    if frame is None:
        return True
    family = form.family(frame)
    base = matched_draws(max(_DRAWS, power_of_two(4 * family.base)), family.base, key=key)
    member = family.member(family.near(member))
    apart = family.points(member, base) - member.loc
    values, gradients = density.over(member.loc + apart)
    sds = _sds(member)
    if (np.abs(member.loc) > sds).any():
        outward = family.member(family.near(_outward(member, _OUTWARDS[-1])))
        change = density.over(family.points(outward, base))[0] - values
        if _is_gain(change, family.entropy(outward) - family.entropy(member)):
            return True
    left = gradients + family.scores(member, base)
    sizes = np.where(np.abs(member.loc) > _NOT_NEAR, np.abs(member.loc), 0.0)
    terms = np.concatenate([np.maximum(sds, sizes) * left, left * apart], axis=1)
    offs, ses = np.abs(terms.mean(0)), terms.std(0) / math.sqrt(len(base))
    by_chance = -ndtri(_FALSE_ALARMS / (2 * len(offs)))  # standard errors that the largest of so many may be off
    return bool(not ((offs < _SUSPICIOUS) | (offs < by_chance * ses)).all())


def _own_frame(member: Member) -> Frame | None:
    """The frame of a Gaussian itself; None where its covariance can no longer be inverted."""
    if member.factor is None and member.columns is None:
        assert member.scale is not None
        precision = member.scale**-2.0
        return Frame.of(member.loc, precision) if is_sound(np.append(precision, 1 / precision)) else None
    covariance = member.covariance()
    sds = np.sqrt(np.diag(covariance))
    if not (is_sound(covariance) and is_sound(1 / sds**2)):
        return None
    inverse = _inverse(covariance / np.outer(sds, sds))
    return None if inverse is None else Frame.of(member.loc, inverse / np.outer(sds, sds))


def _inverse(correlation: np.ndarray) -> np.ndarray | None:
    """The inverse, symmetric; None where rounding leaves nothing of it.

    SciPy's `inv` only warns of that, and what a warning does is the user's to choose.
    """
    root, failed = scipy.linalg.lapack.dpotrf(correlation, lower=1)
    if failed:
        return None
    condition, _ = scipy.linalg.lapack.dpocon(root, np.linalg.norm(correlation, 1), uplo="L")
    if not condition > np.finfo(float).eps:
        return None
    return np.asarray(scipy.linalg.cho_solve((root, True), np.eye(len(root))))


def _named(space: Space, energy: float, volume: float, logs: np.ndarray, moved: np.ndarray) -> Failure:
    """The status of a run-off, and which coordinates run."""
    if math.isnan(energy) or energy > max(volume, 0.0):  # infinity less infinity: log p has left the numbers
        if moved.max() < _FAR and -logs.min() > math.log1p(moved.max()):
            what = f"the guide's sd of {_largest(space, np.maximum(-logs, 0.0))} runs to zero"
        else:
            names = _largest(space, np.log1p(moved))
            what = f"{names} {'run' if ' and ' in names else 'runs'} away"
        return Failure(Status.UNBOUNDED, f"{what}, and the log density rises without end")
    growing: Sequence[float] = np.maximum(np.maximum(logs, np.log1p(moved)), 0.0)
    names = _largest(space, np.asarray(growing))
    return Failure(Status.IMPROPER, f"{names} {'grow' if ' and ' in names else 'grows'} without end")
