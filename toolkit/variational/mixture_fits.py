"""The fit of a mixture of Gaussians: climbs on stratified draws (`mixture_climbs`), and a bound on what is left.

Each component begins at a mode of its own: at the Gaussian that grew there, with the weight that its evidence gives it.
Where there are fewer modes than components, the heaviest component is split in two.

The bound is that of `toolkit.variational.certificates`: climbs from the fit on draws that it has not seen. It speaks of
the optimum that they reach, and of no other number of components. Climbs go on until they have a hundredth left of what
the bound counts as left.

References:
    Miller, Foti & Adams (2017), Variational boosting: iteratively refining posterior approximations, ICML, section 3.
    Arenz, Neumann & Zhong (2018), Efficient gradient-free variational inference using policy search, ICML; and (2022),
    A unified perspective on natural gradient variational inference with Gaussian mixture models, TMLR.
    Lin, Khan & Schmidt (2019), Fast and simple natural-gradient variational inference with mixture of
    exponential-family approximations, ICML.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax

from toolkit.estimate import Estimate
from toolkit.status import Status
from toolkit.threads import threads_for
from toolkit.variational.autoguides import gaussian_form
from toolkit.variational.certificates import SETS, Certificate, Scope, certificate_of
from toolkit.variational.density import LogDensity
from toolkit.variational.draws import Key, branch, generator, power_of_two
from toolkit.variational.gaussian_proofs import Proof
from toolkit.variational.gaussians import inverse_factor
from toolkit.variational.mixture_climbs import EVALUATIONS, NEGLIGIBLE, PIECE, Mixture, StratifiedELBO, ascend
from toolkit.variational.own_solvers import Problem, Solved
from toolkit.variational.solvers.svi import Trace
from toolkit.variational.starts import HOPELESS

_FIRST_DRAWS, _MOST_DRAWS = 512, 8_192  # for each component
_DRAWS_A_DIMENSION = 8
_ROUNDS, _TIMES = 6, 4  # as many draws in a round as in the one before: those of its certificate together
_LEAST_EVALUATIONS = 10  # of a climb, or the budget pays for none
_LOOKED_AT = 4  # sets of draws that say which of several mixtures is the highest
_LOOKS = 3 * _LOOKED_AT  # evaluations that say whether a climb has ended above where it began, and above the Gaussian
_SCREENED = 40  # evaluations from each split that is tried
_SPLITS, _AXES, _ANY = 3, 32, 8  # splits that are climbed from, of so many axes and other directions that are tried
_APART = 0.6  # sds of the component that is split between its location and those of its halves
_COUNTED, _RESIDUAL = 1e-2, 1e-4  # of the tolerance: what a bound counts as left, and what seems left where climbs end
_NEAR = 1.0  # sds between a start and the panel's Gaussian that lies at the same mode
_MOST_COMPONENTS = 50


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
        # The other half is for a climb and its bound.
        screened = _evaluations_of_split(mixture, draws, left() // 2)
        if screened < _LEAST_EVALUATIONS:
            short = lacking(f" to split {_count(mixture.components, 'component')} into more")
            break
        own = branch(key, 10 + mixture.components)
        mixture, course = _split(density, mixture, draws, residual, screened, key=own)
        courses.append(course)
    proof = Proof(None, Status.BUDGET, short)
    for number in range(_ROUNDS):
        own = branch(key, 100 + number)
        affordable = left() // (draws * mixture.components)
        most = min(EVALUATIONS, affordable if short else affordable // 2)
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
        # A limit that is kept holds for what is no lower: the Gaussian is asked in the first round alone.
        first = () if number else (_gaussian(problem, mixture.components),)
        any_of = (*first, mixture, objective.mixture(end.x))
        mixture, _ = _highest(density, any_of, draws, key=branch(own, 1))
        if short:
            break
        each = (1 + SETS) * len(end.course)
        bound = _bound(density, mixture, draws, problem.tolerance, key=branch(own, 2), left=left, report=report)
        if bound.unpaid:
            # The limit of the round before holds for what is no lower, too.
            proof = Proof(proof.certificate, Status.BUDGET, lacking())
            break
        certificate = bound.certificate
        if certificate is None:
            proof = Proof(None, Status.DIVERGED, "draws of the mixture have no finite density")
            break
        if certificate.limit < problem.tolerance:
            proof = Proof(certificate)
            break
        if not end.arrived and most < EVALUATIONS:
            proof = Proof(certificate, Status.BUDGET, lacking())
            break
        proof = Proof(certificate, Status.BUDGET, f"more than {_ROUNDS} rounds of it")
        price = (each + (1 + SETS) * _LOOKED_AT) * draws * mixture.components
        if price > left():
            proof = Proof(certificate, Status.BUDGET, lacking())
            break
        # What a climb gains is what the fit lacks, and what its draws can be fitted to: more of them help with that.
        mixture, gain = _highest(density, (mixture, *bound.ends), draws, key=branch(own, 3))
        if certificate.limit - gain < problem.tolerance / 2:
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
            text += f", of which {self.dropped:,} {holds} less than {NEGLIGIBLE:g} and {gets} no component"
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
        hopeful = height - HOPELESS < elbo < height + np.log(NEGLIGIBLE)
        if hopeful and 4 * _SCREENED * draws <= left():
            objective = StratifiedELBO(density, one, draws, key=branch(problem.key, 50 + place))
            end = ascend(objective, residual=residual, max_evaluations=_SCREENED)
            others[place] = (max(elbo, end.elbo), objective.mixture(end.x))
    members = [(height, best), *((elbo, one) for elbo, one in others if is_apart(one))]
    log_weights = log_softmax([elbo for elbo, _ in members])
    kept = log_weights > np.log(NEGLIGIBLE)
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


def _evaluations_of_split(mixture: Mixture, draws: int, gradients: int) -> int:
    """How long the climbs of `_split` may be for so many gradients, in evaluations."""
    of_screening = (min(mixture.size, _AXES) + _ANY) * PIECE
    return min(_SCREENED, (gradients // (mixture.components + 1) - of_screening) // (_SPLITS * draws))


def _split(
    density: LogDensity, mixture: Mixture, draws: int, residual: float, screened: int, *, key: Key
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
        objective = StratifiedELBO(density, halves, PIECE, key=branch(key, 0))
        tried.append((objective(np.zeros(objective.parameters))[0], halves))
    tried.sort(key=lambda one: -one[0])
    ends = []
    for _, halves in tried[:_SPLITS]:
        objective = StratifiedELBO(density, halves, draws, key=branch(key, 1))
        end = ascend(objective, residual=residual, max_evaluations=screened)
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
        most = min(EVALUATIONS, left() // ((SETS - number) * draws * mixture.components))
        if most < _LEAST_EVALUATIONS:
            return _Bound(unpaid=True)
        objective = StratifiedELBO(density, mixture, draws, key=branch(key, number))
        end = ascend(objective, residual=_RESIDUAL * tolerance, max_evaluations=most)
        if not np.isfinite(end.begun):
            return _Bound()
        if not end.arrived and most < EVALUATIONS:
            return _Bound(unpaid=True)
        gains.append(end.elbo - end.begun + max(end.left, _COUNTED * tolerance))
        ends.append(objective.mixture(end.x))
        arrived = arrived and end.arrived
        report(f"bounding, {number + 1} of {SETS}", end.begun)
    scope = Scope.LOCAL if arrived else Scope.ESTIMATE
    return _Bound(certificate_of(np.array(gains), scope, draws * mixture.components), tuple(ends))
