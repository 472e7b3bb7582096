"""Where a fit starts: modes of the density, the curvature there, and the Gaussians that grow from them."""

from __future__ import annotations

import time
from dataclasses import dataclass

import jax
import numpy as np

from toolkit.compilation import keep_compiled_programs
from toolkit.modelling.model import Model
from toolkit.modelling.space import Space
from toolkit.threads import threads_for
from toolkit.variational.density import LogDensity, central_differences, difference_steps
from toolkit.variational.draws import Key, branch, generator, matched_draws, power_of_two
from toolkit.variational.gaussians import DENSE_LIMIT, Diagonal, Frame, Member, Quadratic
from toolkit.variational.projection import project
from toolkit.variational.solvers.fixed_draws import FixedDrawsELBO, climb
from toolkit.variational.solvers.lockstep import minimise_each
from toolkit.variational.solvers.natural import is_safely_positive, natural_steps

_BATCHES, _SHRINK = 20, 0.7  # of points to begin at, each batch from smaller boxes
# Rounds of the searches, and whether in the coordinates of a curvature. Few that end at a mode take more than 150.
_ROUNDS = ((25, False), (40, True), (60, True), (200, False))
_LARGE_ROUNDS = ((500, False),)  # where a curvature is dear
_STEPS = 12
_NEAR, _WIDE = 2.0, 10.0  # half the boxes' widths: NumPyro's own, and one for modes that it does not reach
_GROWN = 3  # modes from which a Gaussian is grown: the best by the evidence that their curvature gives them
HOPELESS = 100.0  # nats below the best, from which a mode or a start is not followed
_VOLUME = 5.0  # nats for each dimension, that a place may have in volume: 150 times the best mode's sds
_STATIONARY = 0.1  # nats that Newton's step would gain, from which on a point is no mode
_CHEAP = 300  # dimensions
_SAME_HEIGHT = 1e-3  # nats between two searches that ended at one mode
_SAME_PLACE = 0.5  # posterior sds between them, or unconstrained units where no curvature is known
_SAME_ELBO = 3.0  # nats between two Gaussians that are on their way to one optimum
_SAME_LABELS = 0.05  # of the norm: a transform's Jacobian moves the modes of two labellings apart by a little
_BOX_PRECISION = 4.0  # a sd of a half, for unconstrained coordinates of which nothing is known
_ESCAPES = 4  # searches that ran off, from whose beginnings a mean field climbs
_ESCAPE_DRAWS, _ESCAPE_STEPS, _ESCAPE_STAGE = 64, 150, 25
_NO_START = 1e10  # unconstrained units: beyond, an escape is itself a run-off, and goes no further
_NARROW = -3.0  # of the first log scale there, in working units: an eighth of the box
# Common draws of the natural-gradient steps for each dimension, up to so many draws and beyond; fewer than one would
# fit the draws.
_DRAWS_A_DIMENSION, _UP_TO, _BEYOND = 8, 256, 4
_LEAST_DRAWS = 128


@dataclass(frozen=True)
class Start:
    """A point from which a fit sets out, and the local scale there.

    Attributes:
        loc: Shape (size,), unconstrained.
        precision: Of the Gaussian that grew from the end of a search, shape (size, size); None where none is finite or
            the dimension is beyond what a dense matrix is for.
        elbo: Of that Gaussian, in nats, on the draws that moved it; -inf without one.
        log_density: log p(x, z) where the search ended, in nats.
        is_mode: Whether the search ended at a stationary point with negative curvature.
    """

    loc: np.ndarray
    precision: np.ndarray | None
    elbo: float
    log_density: float
    is_mode: bool


@dataclass(frozen=True)
class Starts:
    """Starting points of a model in a chart, the best first.

    Attributes:
        chart: The chart.
        space: The latent sites that a point holds.
        points: The points.
        searches: How many searches for a mode had a valid beginning.
        ends: Log p(x, z) at the distinct ends of the searches, in nats, the highest first.
        seconds: Spent on all of it, the programs' compilation not counted.
        gradient_evaluations: Of the log density.
        compile_seconds: Spent on the log density's programs.
        peak_bytes: What these hold at once.
    """

    chart: str
    space: Space
    points: tuple[Start, ...]
    searches: int
    ends: tuple[float, ...]
    seconds: float
    gradient_evaluations: int
    compile_seconds: float
    peak_bytes: int


def find_starts(model: Model, *, key: Key, chart: str | None = None, count: int = 8) -> Starts:
    """Starting points, in float64, from up to `count` searches that set out at dispersed points.

    Each search climbs the log density by L-BFGS; the curvature where it ends gives the scale, and a few
    natural-gradient steps move both towards the best full-rank Gaussian. No point at all means that no search had a
    beginning with a finite density and gradient.

    Raises:
        ValueError: `count` is below one, or the model has no latent scalar.
    """
    if count < 1:
        raise ValueError(f"Expected at least one search for a start; got {count}.")
    keep_compiled_programs()
    with jax.enable_x64(True):
        return _found(model, key, model.chart if chart is None else chart, count)


def _found(model: Model, key: Key, chart: str, count: int) -> Starts:
    density = LogDensity(model, chart)
    if density.size == 0:
        raise ValueError(f"Expected a model with latent scalars; '{model.name}' has none: there is nothing to fit.")
    # A run-off ends where floating-point numbers do.
    with threads_for(density.size), np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return _searched(model, density, key, chart, count)


def _searched(model: Model, density: LogDensity, key: Key, chart: str, count: int) -> Starts:
    begun = time.perf_counter()
    dispersed = _valid_points(density, key, count)
    ends = sorted(_searched_from(density, dispersed), key=lambda end: end.loss)
    distinct: list[_Found] = []
    dense = density.size <= DENSE_LIMIT
    for end in _relabelled_once(model, density.space, chart, ends):
        if not _at_another(end, distinct):
            distinct.append(_Found(end, *(_curvature(density, end.loc) if dense else (None, False))))
    own = branch(key, 50)  # apart from the key of the beginnings
    if dense:
        modes = sorted((one for one in distinct if one.is_mode), key=lambda one: -_laplace(one))[:_GROWN]
        points = [_from_mode(density, one, key=own) for one in _hopeful(modes)]
        # One that has run off stands high; one that is stuck far below a mode has nothing to give. In high dimension a
        # Gaussian takes minutes to grow, and searches that lead nowhere are many.
        least = -modes[0].end.loss - HOPELESS - _VOLUME * density.size if modes else -np.inf
        strays = [one for one in distinct if not one.is_mode and -one.end.loss > least]
        strays = strays if density.size <= _CHEAP or not modes else []
        points += _from_beginnings(density, [one.end for one in strays], key=own)
        if not any(np.isfinite(point.elbo) for point in points):
            points = [_from_mode(density, one, key=own) for one in distinct[:1]]
    else:
        points = [Start(one.end.begin, None, -np.inf, -one.end.loss, is_mode=False) for one in distinct[:_GROWN]]
    points = _once_each(sorted(points, key=lambda start: -start.elbo))[:_GROWN]
    return Starts(
        chart,
        density.space,
        tuple(points),
        len(dispersed),
        tuple(-one.end.loss for one in distinct),
        time.perf_counter() - begun,
        density.evaluations,
        density.compile_seconds,
        density.peak_bytes,
    )


def _once_each(points: list[Start]) -> list[Start]:
    """The starts without those that have grown to where a better one is."""
    kept: list[Start] = []
    for point in points:
        if not any(
            _are_near(point.loc, other.loc, other.precision) and abs(point.elbo - other.elbo) < _SAME_ELBO
            for other in kept
        ):
            kept.append(point)
    return kept


def _are_near(one: np.ndarray, other: np.ndarray, precision: np.ndarray | None) -> bool:
    """Whether a point lies within half a posterior sd of another, at which the precision is known if it is."""
    apart = one - other
    return bool((apart @ apart if precision is None else apart @ precision @ apart) < _SAME_PLACE**2)


@dataclass(frozen=True)
class _End:
    """Where a search for a mode ended, minus the log density there in nats, and where it began."""

    loc: np.ndarray
    loss: float
    begin: np.ndarray


@dataclass(frozen=True)
class _Found:
    """The end of a search, minus the Hessian there (size, size), and whether it was positive definite as it was."""

    end: _End
    precision: np.ndarray | None
    is_mode: bool


def _at_another(end: _End, kept: list[_Found]) -> bool:
    """Whether a search ended at the mode of an earlier one, which is kept with the precision there.

    Equal heights alone do not make one mode of two (those of a symmetric density have them): the ends must also lie
    within half a posterior sd of each other.
    """
    return any(
        abs(end.loss - other.end.loss) <= _SAME_HEIGHT and _are_near(end.loc, other.end.loc, other.precision)
        for other in kept
    )


def _relabelled_once(model: Model, space: Space, chart: str | None, ends: list[_End]) -> list[_End]:
    """The ends without those that differ from a better one in their labelling alone."""
    labels = model.labels
    if labels is None or len(ends) < 2:
        return ends
    sites = [model.constrain(space.unravel(end.loc), model.arrays, chart=chart) for end in ends]
    rows = [np.asarray(values[labels.by])[None, None] for values in sites]
    kept = [0]
    for number in range(1, len(ends)):
        for better in kept:
            aligned = labels.relabel({labels.by: rows[number]}, anchor=rows[better][0, 0])[labels.by]
            if np.linalg.norm(aligned - rows[better]) < _SAME_LABELS * np.linalg.norm(rows[better]):
                break
        else:
            kept.append(number)
    return [ends[number] for number in kept]


def _laplace(found: _Found) -> float:
    """The log evidence in nats of a mode's Laplace approximation; its height where no curvature is known."""
    if found.precision is None:
        return -found.end.loss
    return float(-found.end.loss - 0.5 * np.linalg.slogdet(found.precision / (2 * np.pi))[1])


def _hopeful(modes: list[_Found]) -> list[_Found]:
    """The modes that are not far below the best, either for a full-rank Gaussian or for a factorised one.

    Which mode is the better one may depend on the family: all others lie between these two.
    """
    if len(modes) < 2:
        return modes
    heights = np.array([[_laplace(one), _factorised(one)] for one in modes])
    hopeful = (heights > heights.max(0) - HOPELESS).any(1)
    return [one for one, follow in zip(modes, hopeful, strict=True) if follow]


def _factorised(found: _Found) -> float:
    """The ELBO in nats of the best factorised Gaussian at a mode, were the density Gaussian."""
    assert found.precision is not None
    return float(-found.end.loss - 0.5 * np.log(np.diag(found.precision) / (2 * np.pi)).sum())


def _curvature(density: LogDensity, loc: np.ndarray) -> tuple[np.ndarray | None, bool]:
    """Minus the Hessian at a point, its eigenvalues bounded away from zero, and whether the point is a mode.

    That it is where the Hessian needs no bounding and Newton's step would gain next to nothing.

    By central differences of the gradient, first with steps of a ten-thousandth of the coordinate, then of a hundredth
    of the sd that these found: exact to about six digits, and without a program of its own.
    """
    steps = difference_steps(loc)
    hessian, _ = central_differences(density, loc, steps)
    diagonal = -np.diag(hessian)
    known = np.isfinite(diagonal) & (diagonal > 0)
    steps = np.where(known, 1e-2 / np.sqrt(np.where(known, diagonal, 1.0)), steps)
    hessian, gradient = central_differences(density, loc, steps)
    if not np.isfinite(hessian).all():
        return None, False
    precision, definite = positive_definite(-hessian)
    if precision is None or not definite:
        return precision, False
    return precision, bool(gradient @ np.linalg.solve(precision, gradient) < 2 * _STATIONARY)


def _from_mode(density: LogDensity, found: _Found, *, key: Key) -> Start:
    """The Gaussian that grows from the curvature at a mode, or at the end of a search that is none."""
    if found.precision is None:
        return Start(found.end.begin, None, -np.inf, -found.end.loss, is_mode=False)
    return _grown(density, found.end, found.end.loc, found.precision, found.is_mode, key=key)


def _from_beginnings(density: LogDensity, ends: list[_End], *, key: Key) -> list[Start]:
    """The Gaussians that grow from where searches began, past what drew them away for ever.

    The density of a centred hierarchy has no upper bound; the ELBO has. A mean field climbs it on a few draws, in any
    units, and another from elsewhere until two have come to the same place; log p's mean curvature there then gives
    the scale for natural-gradient steps.
    """
    climbed = list[_Escape]()
    for number, end in enumerate(ends[:_ESCAPES]):
        escape = _escaped(density, end, key=branch(key, number))
        if escape is None:
            continue
        known = next((i for i, other in enumerate(climbed) if _is_same(escape, other)), None)
        if known is None:
            climbed.append(escape)
            continue
        climbed[known] = max(escape, climbed[known], key=lambda one: one.elbo)
        break
    starts = []
    for number, one in enumerate(sorted(climbed, key=lambda one: -one.elbo)[:_GROWN]):
        own = branch(key, _ESCAPES + number)
        around = Quadratic(one.member.loc, np.zeros(density.size), np.diag(one.member.variances**-1))
        near = project(density, one.family, one.member, around, key=own, draws=_draws(density.size))
        precision, _ = positive_definite(near.precision)
        tried = [matrix for matrix in (precision, around.precision) if matrix is not None]
        heights = [_height(density, one.member.loc, matrix, key=own) for matrix in tried] if len(tried) > 1 else [0.0]
        for index in np.argsort(-np.array(heights)):  # the other one where the better leads nowhere
            start = _grown(density, one.end, one.member.loc, tried[index], is_mode=False, key=own)
            if np.isfinite(start.elbo):
                break
        starts.append(start)
    return starts


@dataclass(frozen=True)
class _Escape:
    """Where a mean field climbed to from where a search had begun, and its ELBO in nats on the draws it climbed on."""

    end: _End
    family: Diagonal
    member: Member
    elbo: float


def _escaped(density: LogDensity, end: _End, *, key: Key) -> _Escape | None:
    """The climb of a mean field from a search's beginning; None where no ELBO is finite.

    It sets out again and again in units of its own sds: those of the beginning are nobody's.
    """
    base = matched_draws(_ESCAPE_DRAWS, density.size, key=key)
    frame, narrow = Frame.of(end.begin, np.full(density.size, _BOX_PRECISION)), _NARROW
    escape: _Escape | None = None
    left = _ESCAPE_STEPS
    while left > 0:
        family, nothing = Diagonal(frame), Quadratic(frame.loc, np.zeros(density.size), np.zeros(density.size))
        begin = np.concatenate([np.zeros(density.size), np.full(density.size, narrow)])
        stage = min(left, _ESCAPE_STAGE)
        climbed = climb(FixedDrawsELBO(density, family, nothing, base), begin, residual=0.1, max_evaluations=stage)
        left -= climbed.evaluations
        member = family.member(climbed.x)
        sizes = np.concatenate([np.abs(member.loc), np.sqrt(member.variances)])
        if not np.isfinite(climbed.elbo) or (escape and not sizes.max() < _NO_START):
            break
        settled = escape and climbed.elbo - escape.elbo < _SAME_ELBO and climbed.evaluations < stage
        escape = _Escape(end, family, member, climbed.elbo)
        if settled or not (sizes.max() < _NO_START and member.variances.min() > _NO_START**-2):
            break
        frame, narrow = Frame.of(member.loc, 1 / member.variances), 0.0
    return escape


def _is_same(one: _Escape, other: _Escape) -> bool:
    """Whether two mean fields have come to the same place: in a typical coordinate, and in height."""
    apart = (one.member.loc - other.member.loc) / np.sqrt(other.member.variances)
    return bool(np.mean(apart**2) < _SAME_PLACE**2 and abs(one.elbo - other.elbo) < _SAME_ELBO)


def _height(density: LogDensity, loc: np.ndarray, precision: np.ndarray, *, key: Key) -> float:
    """The ELBO of N(loc, precision^-1) but for a constant, in nats; -inf where it is not a number."""
    factor = Frame.of(loc, precision).factor
    values, _ = density.over(loc + matched_draws(_LEAST_DRAWS, density.size, key=key) @ factor.T)
    height = float(values.mean() + np.log(np.diag(factor)).sum())
    return height if np.isfinite(height) else -np.inf


def _grown(density: LogDensity, end: _End, loc: np.ndarray, precision: np.ndarray, is_mode: bool, *, key: Key) -> Start:
    base = matched_draws(_draws(density.size), density.size, key=key)
    nothing = Start(loc, None, -np.inf, -end.loss, is_mode)
    try:
        gaussian = natural_steps(density, loc, precision, base=base, steps=_STEPS)
        if not np.isfinite(gaussian.elbo):
            return nothing
        precision = gaussian.precision
    except np.linalg.LinAlgError:  # a curvature of so many decades that rounding has made some of it negative
        return nothing
    if not (np.diag(precision) > 0).all():  # or has left nothing of it
        return nothing
    return Start(gaussian.loc, precision, gaussian.elbo, -end.loss, is_mode)


def _draws(size: int) -> int:
    """Common draws of natural-gradient steps: with few for each dimension the steps would fit the draws."""
    few = min(power_of_two(_DRAWS_A_DIMENSION * size), _UP_TO)
    return max(_LEAST_DRAWS, few, power_of_two(_BEYOND * size))


def _valid_points(density: LogDensity, key: Key, count: int) -> list[np.ndarray]:
    """Points with a finite density and gradient, uniform in boxes around the origin, some of them wide.

    Where many are invalid the boxes become ever smaller.
    """
    rng = generator(key)
    points: list[np.ndarray] = []
    for batch in range(_BATCHES):
        radii = _SHRINK**batch * np.where(np.arange(count) % 4 == 3, _WIDE, _NEAR)
        tried = rng.uniform(-1, 1, (count, density.size)) * radii[:, None]
        values, gradients = density.over(tried)
        valid = np.isfinite(values) & np.isfinite(gradients).all(1)
        points += list(tried[valid])
        if len(points) >= count:
            break
    return points[:count]


def _searched_from(density: LogDensity, points: list[np.ndarray]) -> list[_End]:
    """Where searches by L-BFGS end.

    After some rounds those under way go on in the coordinates of the curvature where the best of them is: most are by
    then on their way to one mode, and the rounds halve. The last rounds are for those whom another's curvature misled.
    """
    if not points:
        return []
    x, losses = np.stack(points), np.full(len(points), np.inf)
    under_way = np.arange(len(points))
    for rounds, curved in _ROUNDS if density.size <= _CHEAP else _LARGE_ROUNDS:
        frame = _metric(density, x[under_way], losses[under_way] if curved else None)

        def lost(at: np.ndarray, frame: Frame = frame) -> tuple[np.ndarray, np.ndarray]:
            values, gradients = density.over(frame.loc + frame.move(at.T).T)
            return -values, -frame.pull(gradients.T).T

        begin = frame.measure((x[under_way] - frame.loc).T).T
        found = minimise_each(lost, begin, max_rounds=rounds)
        sound = np.isfinite(found.losses)
        kept = under_way[sound]
        x[kept], losses[kept] = frame.loc + frame.move(found.x[sound].T).T, found.losses[sound]
        under_way = under_way[~found.ended]
        if not len(under_way):
            break
    return [_End(*one) for one in zip(x, losses.tolist(), points, strict=True)]


def _metric(density: LogDensity, x: np.ndarray, losses: np.ndarray | None) -> Frame:
    """The coordinates of the curvature at the best of several points, or the model's own where none is wanted."""
    plain = Frame.of(np.zeros(density.size), np.ones(density.size))
    if losses is None:
        return plain
    best = x[int(np.argmin(losses))]
    hessian, _ = central_differences(density, best)
    precision, _ = positive_definite(-hessian) if np.isfinite(hessian).all() else (None, False)
    return plain if precision is None else Frame.of(best, precision)


def positive_definite(matrix: np.ndarray) -> tuple[np.ndarray | None, bool]:
    """The nearest usable precision matrix, and whether the one given was positive definite.

    The matrix is first scaled to a unit diagonal, so that a bound on its eigenvalues means the same in every unit.
    """
    if is_safely_positive(matrix):
        return matrix, True
    scale = np.sqrt(np.abs(np.diag(matrix)))
    if not (scale > 0).all():
        return None, False
    values, vectors = np.linalg.eigh(matrix / np.outer(scale, scale))
    bounded = np.clip(np.abs(values), 1e-3, None)
    return (vectors * bounded) @ vectors.T * np.outer(scale, scale), False
