"""The fit of a mixture of Gaussians: stratified draws held fixed, a quasi-Newton method, a bound on what is left.

The ELBO of q = sum over k of w_k N(m_k, L_k L_k') is a sum over components,

    ELBO  =  sum over k of  w_k  E[ log p(z) - log q(z) ],   z = m_k + L_k eps,   eps ~ N(0, I),

so that with as many draws for each component nothing is drawn by chance but eps: the weights have an exact gradient,
and locations and factors that of draws which move with them. On draws held fixed this is a smooth function with a
maximum to find. Each component begins at a mode of its own: at the Gaussian that grew there, with the weight that its
evidence gives it. Where there are fewer modes than components, the heaviest component is split in two.

The bound is that of `toolkit.variational.certificates`: climbs from the fit on draws that it has not seen. It speaks of
the optimum that they reach, and of no other number of components. Where components overlap the ELBO is nearly flat
along some directions, in which neither a small slope nor a small step says that a climb is over: so it goes on until
its last steps, its slope and Newton's step by the curvature that it has met are a hundredth of what the bound counts as
left.

References:
    Miller, Foti & Adams (2017), Variational boosting: iteratively refining posterior approximations, ICML, section 3.
    Arenz, Neumann & Zhong (2018), Efficient gradient-free variational inference using policy search, ICML; and (2022),
    A unified perspective on natural gradient variational inference with Gaussian mixture models, TMLR.
    Lin, Khan & Schmidt (2019), Fast and simple natural-gradient variational inference with mixture of
    exponential-family approximations, ICML.
    Roeder, Wu & Duvenaud (2017), Sticking the landing, section 3.2 (stratified draws of a mixture).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import logsumexp
from scipy.optimize import LbfgsInvHessProduct, OptimizeResult, minimize
from scipy.special import log_softmax

from toolkit.estimate import Estimate
from toolkit.status import Status
from toolkit.threads import threads_for
from toolkit.variational.autoguides import gaussian_form
from toolkit.variational.certificates import SETS, Certificate, Scope, certificate_of
from toolkit.variational.density import LogDensity
from toolkit.variational.draws import Key, branch, generator, matched_draws, power_of_two
from toolkit.variational.gaussian_proofs import Proof
from toolkit.variational.gaussians import inverse_factor
from toolkit.variational.own_solvers import Problem, Solved
from toolkit.variational.solvers.svi import Trace
from toolkit.variational.starts import HOPELESS

_FIRST_DRAWS, _MOST_DRAWS = 512, 8_192  # for each component
_DRAWS_A_DIMENSION = 8
_ROUNDS, _TIMES = 6, 4  # as many draws in a round as in the one before: those of its certificate together
_PIECE = 256  # draws of a component whose densities are computed at once
_EVALUATIONS, _LEAST_EVALUATIONS = 300, 10  # of a climb, at most; and at least, or the budget pays for none
_LOOKED_AT = 4  # sets of draws that say which of several mixtures is the highest
_LOOKS = 3 * _LOOKED_AT  # evaluations that say whether a climb has ended above where it began, and above the Gaussian
_SCREENED = 40  # evaluations from each split that is tried
_SPLITS, _AXES, _ANY = 3, 32, 8  # splits that are climbed from, of so many axes and other directions that are tried
_APART = 0.6  # sds of the component that is split between its location and those of its halves
_COUNTED, _RESIDUAL = 1e-2, 1e-4  # of the tolerance: what a bound counts as left, and what seems left where climbs end
_ROUNDING = 1e-6  # of that: a slope from which no step can be told
_MEMORY, _LAST_STEPS = 30, 3  # steps from which a climb knows the curvature, and whose gains are looked at
_NEGLIGIBLE = 1e-4  # weight of a mode that gets no component
_NEAR = 1.0  # sds between a start and the panel's Gaussian that lies at the same mode
_MOST_COMPONENTS = 50


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians in unconstrained space.

    Attributes:
        log_weights: Shape (component,), of weights that sum to one.
        locs: Shape (component, size).
        factors: Shape (component, size, size), lower triangular with a positive diagonal.
    """

    log_weights: np.ndarray
    locs: np.ndarray
    factors: np.ndarray

    @property
    def components(self) -> int:
        """How many there are."""
        return len(self.log_weights)

    @property
    def size(self) -> int:
        """Of an unconstrained vector."""
        return int(self.locs.shape[1])

    def params(self, prefix: str = "auto") -> dict[str, np.ndarray]:
        """The parameters of `AutoMixtureNormal`."""
        parts = {"weights": np.exp(self.log_weights), "locs": self.locs, "scale_trils": self.factors}
        return {f"{prefix}_{name}": value for name, value in parts.items()}


class StratifiedELBO:
    """The ELBO in nats of mixtures near one, as a function of dimensionless parameters, on draws that do not change.

    The parameters are zero at that mixture and measured by it: a component's location and factor by its own factor, and
    everything by the root of its weight, so that the curvature is about one where components lie apart.

    Args:
        density: Log p(x, z).
        around: The mixture.
        draws: For each component, a multiple of 256.
        key: Random key.
    """

    def __init__(self, density: LogDensity, around: Mixture, draws: int, *, key: Key) -> None:
        self.density, self.around = density, around
        base = [matched_draws(draws, around.size, key=branch(key, k)) for k in range(around.components)]
        self._pieces = np.stack(base).reshape(around.components, -1, _PIECE, around.size).swapaxes(0, 1)
        weights = np.exp(around.log_weights)
        self._frame = {
            "log_weights": around.log_weights,
            "locs": around.locs,
            "factors": around.factors,
            "units": 1 / np.sqrt(np.maximum(weights, _NEGLIGIBLE)),
        }

    @property
    def parameters(self) -> int:
        """How many there are."""
        count, size = self.around.components, self.around.size
        return count * (1 + 2 * size + size * (size - 1) // 2)

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """ELBO and its gradient (parameters,); -inf where a draw's log density or gradient is not finite."""
        total, slope = 0.0, np.zeros_like(x)
        for base in self._pieces:
            points = np.asarray(_points(x, self._frame, base))
            with np.errstate(over="ignore", invalid="ignore"):
                values, gradients = self.density.over(points.reshape(-1, self.around.size))
            if not (np.isfinite(values).all() and np.isfinite(gradients).all()):
                return -np.inf, np.zeros_like(x)
            elbo, by = _elbo_and_slope(
                x, self._frame, base, values.reshape(points.shape[:2]), gradients.reshape(points.shape)
            )
            total += float(elbo)
            slope += np.asarray(by)
        elbo, slope = total / len(self._pieces), slope / len(self._pieces)
        return (elbo, slope) if np.isfinite(elbo) and np.isfinite(slope).all() else (-np.inf, np.zeros_like(x))

    def mixture(self, x: np.ndarray) -> Mixture:
        """The mixture with these parameters."""
        log_weights, locs, factors = (np.asarray(part) for part in _placed(x, self._frame))
        return Mixture(log_weights, locs, factors)


@dataclass(frozen=True)
class Ascent:
    """Where a climb ended: the parameters, its ELBO in nats at its beginning and end, and what it may have left there.

    `course` is the ELBO at each evaluation; `arrived` whether no more than the residual asked for is left.
    """

    x: np.ndarray
    begun: float
    elbo: float
    left: float
    arrived: bool
    course: np.ndarray


def ascend(objective: StratifiedELBO, *, residual: float, max_evaluations: int = _EVALUATIONS) -> Ascent:
    """The best mixture on fixed draws, by L-BFGS from the one that the parameters are measured by.

    Args:
        objective: ELBO and gradient.
        residual: In nats: it ends when what its last three steps gained, the gradient's square, and twice what Newton's
            step would gain are all below it. The curvature behind the latter is what the steps have met, and one where
            none has been. With fewer steps it has arrived only where the gradient is rounding.
        max_evaluations: The most evaluations.
    """
    course, gains = list[float](), list[float]()
    best: tuple[float, np.ndarray, np.ndarray] = (-np.inf, np.zeros(objective.parameters), np.zeros(0))
    pairs: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=_MEMORY)
    here: tuple[float, np.ndarray, np.ndarray] | None = None

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal best, here
        if len(course) >= max_evaluations:  # SciPy looks only between line searches
            raise _Enough
        elbo, gradient = objective(x)
        course.append(elbo)
        if elbo > best[0]:
            best = elbo, x.copy(), gradient
        if len(course) == 1:
            here = best
        return (-elbo, -gradient) if np.isfinite(elbo) else (1e300, np.zeros_like(x))

    def left() -> float:
        gradient, newton = best[2], 0.0
        if pairs:
            steps, bends = (np.array(part) for part in zip(*pairs, strict=True))
            newton = float(gradient @ LbfgsInvHessProduct(steps, bends).matvec(gradient))
        return max(float(gradient @ gradient), newton, sum(gains[-_LAST_STEPS:])) if gradient.size else np.inf

    def is_over() -> bool:
        remains = left()
        return remains <= (residual if len(gains) >= _LAST_STEPS else _ROUNDING * residual)

    def looked(intermediate_result: OptimizeResult) -> None:
        nonlocal here
        assert here is not None
        gains.append(best[0] - here[0])
        step, bend = best[1] - here[1], here[2] - best[2]
        if step @ bend > 0:
            pairs.append((step, bend))
        here = best
        if is_over():
            raise StopIteration

    begin = np.zeros(objective.parameters)
    options = {"maxcor": _MEMORY, "maxfun": max_evaluations, "maxiter": max_evaluations, "ftol": 0.0, "gtol": 0.0}
    with np.errstate(over="ignore", invalid="ignore"), suppress(_Enough):
        minimize(loss, begin, jac=True, method="L-BFGS-B", callback=looked, options=options)
    elbo, x, _ = best
    return Ascent(x, course[0], elbo, left(), is_over(), np.array(course))


class _Enough(Exception):  # noqa: N818 - no error: what SciPy's `minimize` has no other word for
    """The climb need go no further."""


def fit_mixture(problem: Problem, components: int | None = None) -> Solved:
    """The best mixture of Gaussians that climbs from the modes lead to, for `Guide.solve`.

    Args:
        problem: The model, its starts and its best full-rank Gaussian.
        components: How many; as many as there are modes, but at least two, if None.

    Raises:
        ValueError: There are more than 50 components.
    """
    if components is not None and components > _MOST_COMPONENTS:
        raise ValueError(f"Expected at most {_MOST_COMPONENTS} components of a mixture; got {components}.")
    density = LogDensity(problem.model, problem.chart)
    compiled = density.compile_seconds
    with threads_for(density.size):
        found = _found(problem, density, components)
    why = f"on fixed draws of each component the ELBO is a smooth function, which has a maximum to find; {found.words}"
    return Solved(
        found.mixture.params(problem.program.prefix),
        found.proof.status,
        found.proof.message,
        solver="stratified_draws",
        why=why,
        trace=Trace(np.arange(1.0, len(found.course) + 1), found.course, np.full(len(found.course), np.nan)),
        certificate=found.proof.certificate,
        gradients=density.evaluations,
        compile_seconds=compiled,
        peak_bytes=density.peak_bytes,
    )


@dataclass(frozen=True)
class _Found:
    mixture: Mixture
    proof: Proof
    course: np.ndarray
    words: str


def _found(problem: Problem, density: LogDensity, components: int | None) -> _Found:
    """The mixture, its certificate, the ELBO at each evaluation, and where it began."""
    key, residual = problem.key, _RESIDUAL * problem.tolerance
    draws = min(max(_FIRST_DRAWS, power_of_two(_DRAWS_A_DIMENSION * density.size)), _MOST_DRAWS)

    def left() -> int:
        return max(problem.max_gradients - density.evaluations, 0)

    def lacking(then: str = "") -> str:
        return f"of the budget {left():,} gradients are left, which do not suffice{then}"

    def report(stage: str, elbo: float) -> None:
        problem.progress("fit mixture", density.evaluations, problem.max_gradients, f"{stage}, ELBO {elbo:.2f}")

    places = _places(problem, density, residual, draws, left)
    wanted = components or max(2, places.mixture.components)
    kept = np.argsort(-places.mixture.log_weights)[:wanted]
    whole = places.mixture
    mixture = Mixture(log_softmax(whole.log_weights[kept]), whole.locs[kept], whole.factors[kept])
    courses = list[np.ndarray]()
    short = ""
    while mixture.components < wanted:
        if 2 * _price_of_split(mixture, draws) > left():  # the other half is for a climb and its bound
            short = lacking(f" to split {_count(mixture.components, 'component')} into more")
            break
        mixture, course = _split(density, mixture, draws, residual, key=branch(key, 10 + mixture.components))
        courses.append(course)
    proof = Proof(None, Status.BUDGET, short)
    for number in range(_ROUNDS):
        own = branch(key, 100 + number)
        affordable = left() // (draws * mixture.components)
        most = min(_EVALUATIONS, affordable if short else affordable // 2)
        if most < _LOOKS + _LEAST_EVALUATIONS:
            proof = Proof(proof.certificate, Status.BUDGET, short or lacking())
            if not number and mixture.components > 1:  # of which it is not known whether it is above the Gaussian
                paid = affordable >= 2 * _LOOKED_AT
                alike = _gaussian(problem, mixture.components)
                mixture = _highest(density, (alike, mixture), draws, key=own)[0] if paid else _gaussian(problem, 1)
            break
        objective = StratifiedELBO(density, mixture, draws, key=branch(own, 0))
        end = ascend(objective, residual=residual, max_evaluations=most - _LOOKS)
        courses.append(end.course)
        report("climbing", end.elbo)
        any_of = _gaussian(problem, mixture.components), mixture, objective.mixture(end.x)
        mixture, _ = _highest(density, any_of, draws, key=branch(own, 1))
        if short:
            break
        each = (1 + SETS) * len(end.course)
        bound = _bound(density, mixture, draws, problem.tolerance, key=branch(own, 2), left=left, report=report)
        if bound.unpaid or (not end.arrived and most < _EVALUATIONS):
            # The limit of the round before holds for what is no lower, too.
            proof = Proof(proof.certificate, Status.BUDGET, lacking())
            break
        certificate = bound.certificate
        if certificate is not None and certificate.limit < problem.tolerance:
            proof = Proof(certificate)
            break
        proof = Proof(certificate, Status.BUDGET, f"more than {_ROUNDS} rounds of it")
        price = (each + (1 + SETS) * _LOOKED_AT) * draws * mixture.components
        if price > left():
            proof = Proof(certificate, Status.BUDGET, lacking())
            break
        # What a climb gains is what the fit lacks, and what its draws can be fitted to: more of them help with that.
        mixture, gain = _highest(density, (mixture, *bound.ends), draws, key=branch(own, 3))
        if certificate is not None and certificate.limit - gain < problem.tolerance / 2:
            continue
        if _TIMES * draws > _MOST_DRAWS:
            proof = Proof(certificate, Status.TOO_FEW_DRAWS, f"{draws:,} draws of each component do not pin more")
            break
        draws *= _TIMES
        if _TIMES * price > left():
            proof = Proof(certificate, Status.BUDGET, lacking())
            break
    mixture = _heaviest_first(mixture)
    weights = ", ".join(f"{weight:.3g}" for weight in np.exp(mixture.log_weights))
    words = f"{places.words}, and it has {_count(mixture.components, 'component')}, of weight {weights}"
    return _Found(mixture, proof, np.concatenate(courses) if courses else np.zeros(0), words)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _heaviest_first(mixture: Mixture) -> Mixture:
    order = np.argsort(-mixture.log_weights)
    return Mixture(mixture.log_weights[order], mixture.locs[order], mixture.factors[order])


@dataclass(frozen=True)
class _Places:
    """The Gaussians at the places that starts led to, weighted by their evidence, and how many got none."""

    mixture: Mixture
    dropped: int

    @property
    def words(self) -> str:
        """Such as `"the starts led to 2 places, of which 1 holds less than 0.0001 and gets no component"`."""
        text = f"the starts led to {_count(self.mixture.components + self.dropped, 'place')}"
        if self.dropped:
            holds = "holds" if self.dropped == 1 else "hold"
            gets = "gets" if self.dropped == 1 else "get"
            text += f", of which {self.dropped:,} {holds} less than {_NEGLIGIBLE:g} and {gets} no component"
        return text


def _places(problem: Problem, density: LogDensity, residual: float, draws: int, left: Callable[[], int]) -> _Places:
    """The Gaussians that grew from each mode, weighted by their evidence; at the best one's, the panel's Gaussian.

    What a start knows of its evidence is rough where the panel's Gaussian has been climbed to. So a place that seems
    negligible is climbed to before it gets no component, unless it is hopeless, or the budget's quarter does not pay.
    """
    assert problem.starts is not None
    assert problem.gaussian is not None
    best = _gaussian(problem, 1)
    known = [
        (start.elbo, Mixture(np.zeros(1), start.loc[None], inverse_factor(start.precision)[None]))
        for start in problem.starts.points
        if start.precision is not None and np.isfinite(start.elbo)
    ]

    def is_apart(one: Mixture) -> bool:
        return float(np.linalg.norm(np.linalg.solve(best.factors[0], one.locs[0] - best.locs[0]))) > _NEAR

    height = problem.gaussian.elbo.value if problem.gaussian.elbo else max(elbo for elbo, _ in known)
    others = [(elbo, one) for elbo, one in known if is_apart(one)]
    for place, (elbo, one) in enumerate(others):
        hopeful = height - HOPELESS < elbo < height + np.log(_NEGLIGIBLE)
        if hopeful and 4 * _SCREENED * draws <= left():
            objective = StratifiedELBO(density, one, draws, key=branch(problem.key, 50 + place))
            end = ascend(objective, residual=residual, max_evaluations=_SCREENED)
            others[place] = (max(elbo, end.elbo), objective.mixture(end.x))
    members = [(height, best), *((elbo, one) for elbo, one in others if is_apart(one))]
    log_weights = log_softmax([elbo for elbo, _ in members])
    kept = log_weights > np.log(_NEGLIGIBLE)
    mixtures = [one for (_, one), keep in zip(members, kept, strict=True) if keep]
    return _Places(
        Mixture(
            log_softmax(log_weights[kept]),
            np.concatenate([one.locs for one in mixtures]),
            np.concatenate([one.factors for one in mixtures]),
        ),
        int((~kept).sum()),
    )


def _gaussian(problem: Problem, components: int) -> Mixture:
    """The full-rank Gaussian, as so many equal components."""
    assert problem.gaussian is not None
    form = gaussian_form(problem.gaussian.autoguide, problem.space)
    assert form is not None
    best = form.member(problem.gaussian.params)
    assert best.factor is not None
    return Mixture(
        np.full(components, -np.log(components)),
        np.tile(best.loc, (components, 1)),
        np.tile(best.factor, (components, 1, 1)),
    )


def _price_of_split(mixture: Mixture, draws: int) -> int:
    """Gradients that `_split` takes, at most."""
    of_screening = (min(mixture.size, _AXES) + _ANY) * _PIECE
    return (of_screening + _SPLITS * _SCREENED * draws) * (mixture.components + 1)


def _split(
    density: LogDensity, mixture: Mixture, draws: int, residual: float, *, key: Key
) -> tuple[Mixture, np.ndarray]:
    """The mixture with its heaviest component split along a direction that raises the ELBO most, after a short climb.

    The halves together have the mean and covariance of the whole.
    """
    size, heaviest = mixture.size, int(np.argmax(mixture.log_weights))
    rng = generator(key)
    directions = [np.eye(size)[axis] for axis in range(min(size, _AXES))]
    directions += [one / np.linalg.norm(one) for one in rng.standard_normal((_ANY, size))]
    tried = []
    for direction in directions:
        halves = _halved(mixture, heaviest, direction)
        objective = StratifiedELBO(density, halves, _PIECE, key=branch(key, 0))
        tried.append((objective(np.zeros(objective.parameters))[0], halves))
    tried.sort(key=lambda one: -one[0])
    ends = []
    for _, halves in tried[:_SPLITS]:
        objective = StratifiedELBO(density, halves, draws, key=branch(key, 1))
        end = ascend(objective, residual=residual, max_evaluations=_SCREENED)
        ends.append((end.elbo, objective.mixture(end.x), end.course))
    _, best, course = max(ends, key=lambda one: one[0])
    return best, course


def _halved(mixture: Mixture, which: int, direction: np.ndarray) -> Mixture:
    """The mixture with a component split in two along a direction (size,) of length one in its own sds."""
    loc, factor = mixture.locs[which], mixture.factors[which]
    shift = _APART * factor @ direction
    shrunk = np.eye(mixture.size) + (np.sqrt(1 - _APART**2) - 1) * np.outer(direction, direction)
    root = np.linalg.qr((factor @ shrunk).T, mode="r").T
    root = root * np.sign(np.diag(root))
    log_weights, locs, factors = mixture.log_weights.copy(), mixture.locs.copy(), mixture.factors.copy()
    log_weights[which] -= np.log(2)
    locs[which], factors[which] = loc - shift, root
    return Mixture(
        np.append(log_weights, log_weights[which]),
        np.concatenate([locs, (loc + shift)[None]]),
        np.concatenate([factors, root[None]]),
    )


def _highest(density: LogDensity, mixtures: Sequence[Mixture], draws: int, *, key: Key) -> tuple[Mixture, float]:
    """Of mixtures with as many components the one with the highest ELBO on new draws, and by how much over the first.

    A later one counts as higher than those before where it is by two standard errors: climbs on few draws may gain
    what others lack, and the highest of many would have won by noise.
    """
    heights = []
    for one in mixtures:
        sets = [StratifiedELBO(density, one, draws, key=branch(key, number)) for number in range(_LOOKED_AT)]
        heights.append(np.array([objective(np.zeros(objective.parameters))[0] for objective in sets]))
    best = 0
    for number in range(1, len(mixtures)):
        better = bool(np.isfinite(heights[number]).all())
        if better and np.isfinite(heights[best]).all():
            gain = Estimate.of_mean(heights[number] - heights[best])
            better = gain.value > 2 * gain.se
        best = number if better else best
    return mixtures[best], float((heights[best] - heights[0]).mean()) if best else 0.0


@dataclass(frozen=True)
class _Bound:
    """A certificate, and where its climbs ended.

    There is none where a draw has no finite density, or where the budget cut a climb short (`unpaid`).
    """

    certificate: Certificate | None = None
    ends: tuple[Mixture, ...] = ()
    unpaid: bool = False


def _bound(
    density: LogDensity,
    mixture: Mixture,
    draws: int,
    tolerance: float,
    *,
    key: Key,
    left: Callable[[], int],
    report: Callable[[str, float], None],
) -> _Bound:
    """What climbs from the mixture gain on draws that it has not seen."""
    gains, ends, arrived = list[float](), list[Mixture](), True
    for number in range(SETS):
        most = min(_EVALUATIONS, left() // ((SETS - number) * draws * mixture.components))
        if most < _LEAST_EVALUATIONS:
            return _Bound(unpaid=True)
        objective = StratifiedELBO(density, mixture, draws, key=branch(key, number))
        end = ascend(objective, residual=_RESIDUAL * tolerance, max_evaluations=most)
        if not np.isfinite(end.begun):
            return _Bound()
        if not end.arrived and most < _EVALUATIONS:
            return _Bound(unpaid=True)
        gains.append(end.elbo - end.begun + max(end.left, _COUNTED * tolerance))
        ends.append(objective.mixture(end.x))
        arrived = arrived and end.arrived
        report(f"bounding, {number + 1} of {SETS}", end.begun)
    scope = Scope.LOCAL if arrived else Scope.ESTIMATE
    return _Bound(certificate_of(np.array(gains), scope, draws * mixture.components), tuple(ends))


def _placed(x: Any, frame: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Log weights, locations and factors of the mixture with these parameters."""
    count, size = frame["locs"].shape
    below = size * (size - 1) // 2
    logits, shifts, diagonals, lower = jnp.split(x, np.cumsum([count, count * size, count * size]))
    units = frame["units"][:, None]
    log_weights = jax.nn.log_softmax(frame["log_weights"] + frame["units"] * logits)
    turned = jnp.zeros((count, size, size)).at[:, *np.tril_indices(size, -1)].set(lower.reshape(count, below) * units)
    scales = jnp.exp(diagonals.reshape(count, size) * units)
    turned = turned + scales[:, :, None] * jnp.identity(size)[None]
    locs = frame["locs"] + jnp.einsum("kij,kj->ki", frame["factors"], shifts.reshape(count, size) * units)
    return log_weights, locs, frame["factors"] @ turned


@jax.jit
def _points(x: Any, frame: dict[str, Any], base: Any) -> Any:
    """Draws (component, draw, size) of each component."""
    _, locs, factors = _placed(x, frame)
    return locs[:, None, :] + jnp.einsum("kij,knj->kni", factors, base)


@jax.jit
@partial(jax.value_and_grad)
def _elbo_and_slope(x: Any, frame: dict[str, Any], base: Any, values: Any, gradients: Any) -> Any:
    """The ELBO on these draws, given log p and its gradient at them."""
    log_weights, locs, factors = _placed(x, frame)
    points = locs[:, None, :] + jnp.einsum("kij,knj->kni", factors, base)
    log_p = values + (gradients * (points - jax.lax.stop_gradient(points))).sum(-1)
    count, draws, size = points.shape
    flat = points.reshape(count * draws, size)

    def log_normal(loc: Any, factor: Any) -> Any:
        white = solve_triangular(factor, (flat - loc[None]).T, lower=True)
        return -0.5 * (white**2).sum(0) - jnp.log(jnp.diagonal(factor)).sum() - 0.5 * size * jnp.log(2 * jnp.pi)

    each = log_weights[:, None] + jax.vmap(log_normal)(locs, factors)
    log_q = logsumexp(each, axis=0).reshape(count, draws)
    return (jnp.exp(log_weights)[:, None] * (log_p - log_q)).mean(1).sum()
