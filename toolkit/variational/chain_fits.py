"""Fits of Gaussians along a chain: every part of them takes time and memory linear in the chain's length.

    starts -> natural-gradient steps on few draws, each of which raises the ELBO -> the best of the starts
           -> climbs on fixed draws by L-BFGS: their gain is the certificate, the mean of their ends the next fit

Natural-gradient steps (Khan & Rue 2023, The Bayesian learning rule, section 3.2) keep the chain's pattern by
themselves, and on a Gaussian posterior the first full step arrives, whatever the draws. Elsewhere they crawl where
scales and states depend on each other in more than their means, as an EM algorithm does, and where log p has kinks the
mean of its Hessians is not the curvature that they take it for. Climbs need neither: L-BFGS learns the curvature. But a
maximum over a family with more parameters than its draws can hold runs off: a climb that gains very much is therefore
asked by other draws, and where these do not confirm it more draws are taken, with averaged natural-gradient steps in
between.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from toolkit.status import Status
from toolkit.variational.certificates import SETS, USABLE_LIMIT, Certificate, Scope, certificate_of
from toolkit.variational.chain_density import (
    ChainDensity,
    ChainELBO,
    ChainGaussian,
    ChainQuadratic,
    ChainRule,
    Frame,
    Seen,
    frame_of,
    member_of,
    parameters,
    precision_of,
    stepped,
)
from toolkit.variational.chain_guides import AutoChainNormal, chain_params
from toolkit.variational.chains import Chain, Pattern, identity
from toolkit.variational.draws import branch, generator, mirrored_draws
from toolkit.variational.own_solvers import Problem, Solved
from toolkit.variational.solvers.fixed_draws import Climbed, climb
from toolkit.variational.solvers.natural import averaged_steps
from toolkit.variational.solvers.svi import Trace

_STARTS, _TRIES = 4, 20
_RADIUS, _SHRINK = 2.0, 0.7  # of the box in which starts lie; NumPyro's own
_FIRST_SD = 0.1  # of every coordinate, in unconstrained units
_SPRINT, _SLOWEST = 60, 0.01  # natural-gradient steps from each start, and a rate at which they are no longer worth it
_WORTH = 1.0  # nats, that such a step must gain: what follows is cheaper
_COMMON_DRAWS, _NEW_DRAWS, _AVERAGED = 16, 64, 40  # draws of these steps, of averaged ones, and how many of the latter
_FIRST_DRAWS, _MOST_DRAWS, _MOST_TIMES = 128, 8_192, 8
_EVALUATIONS, _LEAST_STEPS = 100, 2  # of a climb
_MUCH = 50.0  # nats, from which on a climb's gain is asked by other draws before it goes on
_ROUNDS = 16  # that may gain little
_RESIDUAL = 0.01  # of the tolerance, that a climb may leave
_OPTIMISM = 0.4  # of the tolerance, that a certificate may be too high by
_EXACT = 1e-6  # of the tolerance: a gain that is rounding, on a posterior that is a Gaussian along the chain
_HOPE = 0.9  # of the limit before, at most, if the most draws are to be asked again


def solve_chain(problem: Problem) -> Solved:
    """The best Gaussian along the model's chain, with a certificate."""
    guide = problem.program
    assert isinstance(guide, AutoChainNormal)
    return _Search(problem, ChainDensity(problem, guide.chain)).solved(guide)


class _Much(Exception):  # noqa: N818 - no error: what SciPy's `minimize` has no other word for
    """A climb has gained so much that other draws should be asked."""


Course = tuple[tuple[float, float], ...]


@dataclass(frozen=True, eq=False)
class _Found:
    """A Gaussian, and the ELBO with its standard error on the way to it."""

    at: ChainGaussian
    course: Course = ()


@dataclass(frozen=True, eq=False)
class _Proof:
    """A certificate, and how the fit ended."""

    certificate: Certificate | None
    status: Status = Status.ARRIVED
    message: str = ""


@dataclass(frozen=True, eq=False)
class _Climbs:
    """Climbs on sets of draws: their ends if all of them arrived, else where the last one was and what came between."""

    ends: tuple[Climbed, ...]
    x: np.ndarray
    trouble: str = ""


@dataclass(frozen=True, eq=False)
class _Search:
    """One fit."""

    problem: Problem
    density: ChainDensity

    @property
    def chain(self) -> Chain:
        """The chain."""
        return self.density.chain

    @property
    def left(self) -> int:
        """Gradients that the budget still has."""
        return max(self.problem.max_gradients - self.density.gradients, 0)

    def looks(self, draws: int) -> int:
        """Looks at so many draws that the budget still has."""
        return self.left // (draws * (1 + 3 * self.chain.block + len(self.chain.shared)))

    def base(self, draws: int, number: int) -> np.ndarray:
        """Base draws, one set for each number."""
        return mirrored_draws(draws, self.chain.places, key=branch(self.problem.key, number))

    def report(self, stage: str, number: int, elbo: float) -> None:
        """Tell what is done."""
        self.problem.progress("fit chain", number, number + 1, f"{stage}, ELBO {elbo:.2f}")

    def solved(self, guide: AutoChainNormal) -> Solved:
        """The fit, from the best of the starts."""
        common = self.base(_COMMON_DRAWS, 0)
        ends = [self._sprinted(begin, seen, common) for begin, seen in self._starts(common)]
        if not ends:
            return self._ended({}, _Proof(None, Status.NO_VALID_START), ())
        found, proof = self._proved(max(ends, key=lambda end: end.course[-1][0]))
        flat = self.problem.model.flat_priors
        if flat and proof.status is not Status.ARRIVED:  # a Gaussian that spreads without end never arrives
            told = f"{proof.message}; the posterior may be improper, as the priors of {', '.join(flat)} are"
            proof = _Proof(proof.certificate, Status.BUDGET, told)
        return self._ended(chain_params(guide, found.at.loc, found.at.factor), proof, found.course)

    @property
    def _cost(self) -> str:
        return " whose cost is linear in the chain's length" if self.chain.saves else ""

    def _ended(self, params: dict[str, np.ndarray], proof: _Proof, course: Course) -> Solved:
        elbo, se = np.array(course).reshape(-1, 2).T
        return Solved(
            params,
            proof.status,
            proof.message,
            solver="natural_gradient",
            why=f"natural gradients and climbs{self._cost}; {self.chain.words}",
            trace=Trace(np.arange(1, len(elbo) + 1), elbo, se) if course else None,
            certificate=proof.certificate,
            gradients=self.density.gradients,
            compile_seconds=self.density.compile_seconds,
            peak_bytes=self.density.peak_bytes,
        )

    def _starts(self, common: np.ndarray) -> Iterator[tuple[ChainGaussian, Seen]]:
        """Fits of families that are contained, the origin of unconstrained space, and points dispersed around it."""
        begins = [self._contained(loc, scale) for loc, scale in self.problem.contained]
        begins += [self._begin(np.zeros(self.chain.size))]
        numbers = generator(branch(self.problem.key, 1))
        for begin in begins:
            if self.looks(_COMMON_DRAWS):
                seen = self.density.look(begin, common)
                if math.isfinite(seen.elbo):
                    yield begin, seen
        for _ in range(_STARTS - 1):
            for attempt in range(_TRIES):
                if not self.looks(_COMMON_DRAWS):
                    return
                radius = _RADIUS * _SHRINK**attempt
                begin = self._begin(numbers.uniform(-radius, radius, self.chain.size))
                seen = self.density.look(begin, common)
                if math.isfinite(seen.elbo):
                    yield begin, seen
                    break

    def _begin(self, loc: np.ndarray) -> ChainGaussian:
        """A narrow Gaussian around a point."""
        precision, factor = (identity(self.chain, _FIRST_SD**power) for power in (-2, -1))
        return ChainGaussian(loc, factor, precision)

    def _contained(self, loc: np.ndarray, scale: np.ndarray) -> ChainGaussian:
        """A factorised Gaussian as a member of the family."""
        unit = identity(self.chain)
        # The padding has ones, which stay.
        placed = np.append(scale, 1.0)[self.chain.order]
        local, shared = (np.asarray(part) for part in self.chain.split(placed))
        diagonal = np.asarray(unit.diagonal) / local[:, :, None]
        factor = Pattern(diagonal, unit.below, unit.side, np.diag(1 / shared))
        return ChainGaussian(loc, factor, precision_of(factor))

    def _sprinted(self, at: ChainGaussian, seen: Seen, common: np.ndarray) -> _Found:
        """The end of a few natural-gradient steps on common draws, each of which raised the ELBO there."""
        course, rate = [(seen.elbo, seen.se)], 1.0
        while len(course) < _SPRINT and rate > _SLOWEST and self.looks(_COMMON_DRAWS):
            moved = self._tried(at, seen, rate, common)
            rate = min(1.0, 3 * rate) if moved else rate / 3
            if moved is None:
                continue
            (at, new), gain = moved, moved[1].elbo - seen.elbo
            seen = new
            course.append((seen.elbo, seen.se))
            self.report("first steps", len(course), seen.elbo)
            if gain < _WORTH:
                break
        return _Found(at, tuple(course))

    def _tried(
        self, at: ChainGaussian, seen: Seen, rate: float, common: np.ndarray
    ) -> tuple[ChainGaussian, Seen] | None:
        """Where a step leads, if that raises the ELBO; else one that leaves the shared coordinates apart."""
        wanted = [seen.quadratic.precision]
        if self.chain.shared:
            wanted.append(_uncoupled(seen.quadratic.precision))
        for precision in wanted:
            try:
                moved = stepped(self.chain, at, seen.quadratic._replace(precision=precision), rate)
            except np.linalg.LinAlgError:
                continue
            if not self.looks(_COMMON_DRAWS):
                return None
            new = self.density.look(moved, common)
            if new.elbo > seen.elbo:
                return moved, new
        return None

    def _proved(self, found: _Found) -> tuple[_Found, _Proof]:
        """The Gaussian, gone on with until its certificate is below the tolerance, and how that ended.

        The mean of a certificate's ends is the next fit: it has in effect been fitted to all of their draws. A
        certificate is of the Gaussian that was climbed from, and stays only while later ones lie above it.
        """
        draws, near = _FIRST_DRAWS, 0
        certificate: Certificate | None = None
        ended, why = Status.TOO_FEW_DRAWS, f"{_ROUNDS} rounds of climbs gained at most {_WORTH:g} nat each"
        number = idle = 0
        while idle < _ROUNDS:
            number, idle = number + 10, idle + 1
            if not self.looks(_FIRST_DRAWS) or self.left < SETS * draws * _LEAST_STEPS * 3:
                ended, why = Status.BUDGET, f"of the budget {self.left:,} gradients are left, which do not suffice"
                break
            seen = self.density.look(found.at, self.base(_FIRST_DRAWS, number))
            if not math.isfinite(seen.elbo):
                return found, _Proof(None, Status.DIVERGED, "draws of the Gaussian have no finite density")
            found = replace(found, course=(*found.course, (seen.elbo, seen.se)))
            frame = frame_of(self.chain, found.at)
            climbs = self._climbs(frame, seen.quadratic, draws, number)
            gain = self._gain(frame, seen.quadratic, climbs.x, draws, number)
            if climbs.trouble:
                certificate = None
                if gain > 0:  # other draws confirm it: there was as much to gain
                    found = self._at(found, frame, climbs.x)
                    idle -= gain > _WORTH  # far from the optimum the budget is the only limit
                elif draws == _MOST_DRAWS:
                    why = f"climbs on {draws:,} draws {climbs.trouble}"
                    break
                else:
                    draws = min(4 * draws, _MOST_DRAWS)
                    found, near = self._averaged(found, near, number)
                continue
            before, certificate = certificate, self._bound(climbs.ends, draws)
            if certificate.limit <= self.problem.tolerance:
                return found, _Proof(certificate)
            hopeless = draws == _MOST_DRAWS and before and certificate.limit > _HOPE * before.limit
            if gain > 0:
                found = self._at(found, frame, climbs.x)
            if hopeless or (draws == _MOST_DRAWS and not gain > 0):
                why = f"{draws:,} draws do not pin {self.chain.parameters:,} parameters"
                break
            optimism = (certificate.gap.value - max(gain, 0.0)) / (1 + 1 / SETS)
            wanted = draws * max(optimism, 0.0) / (_OPTIMISM * self.problem.tolerance)
            least = draws if gain > 0 else 2 * draws
            wanted = int(np.clip(1 << math.ceil(math.log2(max(wanted, 1.0))), least, _MOST_TIMES * draws))
            draws = min(wanted, _MOST_DRAWS)
        if certificate is None:
            return found, _Proof(None, ended, f"no bound: {why}")
        status = Status.UNPROVEN if certificate.limit <= USABLE_LIMIT else ended
        return found, _Proof(certificate, status, f"up to {certificate.limit:.2g} nats: {why}")

    def _at(self, found: _Found, frame: Frame, x: np.ndarray) -> _Found:
        loc, factor = member_of(self.chain, frame, x)
        return replace(found, at=ChainGaussian(loc, factor, precision_of(factor)))

    def _gain(self, frame: Frame, quadratic: ChainQuadratic, x: np.ndarray, draws: int, number: int) -> float:
        """How far a member lies above the frame's, in nats, on draws that no climb has seen; -inf if not finite."""
        if not x.any():
            return -math.inf
        check = ChainELBO(self.density, frame, quadratic, self.base(draws, number + 9))
        gain = check(x)[0] - check(np.zeros_like(x))[0]
        return gain if math.isfinite(gain) else -math.inf

    def _averaged(self, found: _Found, near: int, number: int) -> tuple[_Found, int]:
        """Where natural-gradient steps on ever new draws lead, if that is higher, and over how many it is a mean."""
        steps = min(_AVERAGED, self.looks(_NEW_DRAWS) - 4)
        if steps < 2:
            return found, near
        taken = averaged_steps(
            ChainRule(self.density),
            found.at,
            key=branch(self.problem.key, number + 8),
            draws=_NEW_DRAWS,
            tolerance=self.problem.tolerance,
            near=near,
            most=steps,
            report=lambda step, elbo: self.report("averaging", step, elbo),
        )
        here, there = (self.density.look(at, self.base(_NEW_DRAWS, number + 7)).elbo for at in (found.at, taken.at))
        if not there > here:
            return found, near
        course = (*found.course, *((float(elbo), math.nan) for elbo in taken.course if math.isfinite(elbo)))
        return _Found(taken.at, course), taken.near

    def _climbs(self, frame: Frame, quadratic: ChainQuadratic, draws: int, number: int) -> _Climbs:
        """Climbs on sets of draws that the fit has not seen."""
        ends = list[Climbed]()
        for one in range(SETS):
            objective = ChainELBO(self.density, frame, quadratic, self.base(draws, number + 1 + one))
            try:
                end = self._climb(objective, draws)
            except _Much:
                return _Climbs((), objective.best[1], "gain more than other draws confirm")
            if not end.arrived:
                return _Climbs((), end.x, f"do not come to their end in {end.evaluations} evaluations")
            ends.append(end)
        return _Climbs(tuple(ends), np.mean([end.x for end in ends], axis=0))

    def _climb(self, objective: ChainELBO, draws: int) -> Climbed:
        begun: float | None = None

        def report(steps: int, elbo: float) -> None:
            nonlocal begun
            self.report("certificate", steps, elbo)
            begun = elbo if begun is None else begun
            if elbo - begun > _MUCH:
                raise _Much

        return climb(
            objective,
            np.zeros(parameters(self.chain)),
            residual=_RESIDUAL * self.problem.tolerance,
            least_steps=_LEAST_STEPS,
            max_evaluations=int(np.clip(self.left // draws, 1, _EVALUATIONS)),
            report=report,
        )

    def _bound(self, ends: Sequence[Climbed], draws: int) -> Certificate:
        """The mean of what climbs gained on draws that the fit has not seen, what they may have left included.

        On fixed draws the ELBO need not be concave, so that the bound is a local one; but where log p is a quadratic
        and concave nothing is left to draws, and a stationary member is the best of all Gaussians.
        """
        rose = np.array([end.elbo - end.begun for end in ends])
        floor = _RESIDUAL * self.problem.tolerance
        concave = self.problem.model.log_concave and self.problem.chart == self.problem.model.chart
        exact = concave and bool((np.abs(rose) < _EXACT * self.problem.tolerance).all())
        gains = rose + [max(end.residual, floor) for end in ends]
        return certificate_of(gains, Scope.GLOBAL if exact else Scope.LOCAL, draws)


def _uncoupled(precision: Pattern) -> Pattern:
    """The precision without what couples the shared coordinates to the chain, and bent downwards among them.

    Far from the optimum scales and states may pull each other where no Gaussian follows; apart, each has its own.
    """
    values, vectors = np.linalg.eigh(np.asarray(precision.corner))
    sizes = np.abs(values)
    corner = (vectors * np.maximum(sizes, 1e-3 * sizes.max())) @ vectors.T
    return precision._replace(side=np.zeros_like(precision.side), corner=corner)
