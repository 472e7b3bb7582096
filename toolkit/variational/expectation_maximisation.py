"""Expectation maximisation: coordinate ascent over what is hidden, with a distribution, and the rest, with a point.

For a model p(x, h, z), hidden h (such as assignments) and parameters z, the free energy of a distribution r(h) and a
point z is

    F(r, z) = E_r[log p(x, h, z)] + entropy of r = log p(x, z) - KL(r || p(h | x, z)).

The E step takes the best r given z, p(h | x, z), at which F touches log p(x, z); the M step takes the best z given r.
So both are updates of one `ascend`, neither lowers F, and log p(x, z), h summed out, never falls. It ends at a local
maximum of that density in constrained space: with flat priors one of the likelihood. The guide is a point mass there;
it has no entropy, and no ELBO.

References:
    Dempster, Laird & Rubin (1977), Maximum likelihood from incomplete data via the EM algorithm, Journal of the Royal
    Statistical Society B 39(1).
    Neal & Hinton (1998), A view of the EM algorithm that justifies incremental, sparse, and other variants, in Jordan
    (ed.), Learning in Graphical Models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from toolkit.modelling.labels import Labels
from toolkit.status import Status
from toolkit.variational.coordinate_ascent import Ascent, State, Update, ascend
from toolkit.variational.own_solvers import Problem, Solved
from toolkit.variational.solvers.svi import Trace

STARTS = 20
_ASIDE = 0.01  # of the way to another start: where it is asked whether a climb has ended at a saddle
_SAME = 0.1  # of the tolerance: what two ends at one optimum may differ by, each with a hundredth left to gain


@dataclass(frozen=True, eq=False)
class ExpectationMaximisation:
    """Expectation maximisation by a model's closed-form steps, for `Guide.solve` of a guide that is a point mass.

    Every start is followed to its end, and asked there, a hundredth of the way to another start, whether a better one
    can be climbed to: the steps stand still at saddles too. Ends at one optimum are counted as one, whatever the order
    of labels; one that the budget cut short is no optimum. A sweep counts as one gradient of the log density towards
    the budget, which the starts share.

    States are mixed on the straight line between them: the latent sites' constrained spaces must be convex, as those of
    simplices, intervals and covariance matrices are, and those of spheres and of factors of correlations are not.

    Attributes:
        expect: The E step: the parameters of r(h) that are best given the latent sites.
        maximise: The M step: the latent sites that are best given r(h).
        free_energy: F of a state in nats, with all constants of the model's log density.
        begin: A random start: values of the latent sites, constrained.
        starts: How many.
        chart: The chart for which the steps hold.
    """

    expect: Update
    maximise: Update
    free_energy: Callable[[State], float]
    begin: Callable[[np.random.Generator], State]
    starts: int = STARTS
    chart: str = "plain"

    def __post_init__(self) -> None:
        if self.starts < 1:
            raise ValueError(f"Expected at least 1 start; got {self.starts}.")

    def __call__(self, problem: Problem) -> Solved:
        """The highest of the optima that the starts led to, as parameters of NumPyro's `AutoDelta`.

        Raises:
            ValueError: The guide looks at another chart than the steps hold for, or a step is wrong.
        """
        if problem.chart != self.chart:
            raise ValueError(f"Expected chart '{self.chart}', for which the E and M steps hold; got '{problem.chart}'.")
        rng = np.random.default_rng(np.asarray(jax.random.key_data(problem.key)).ravel())
        ends = []
        for number in range(self.starts):
            ends.append(self._climb(rng, problem))
            problem.progress("expectation maximisation", number + 1, self.starts, f"log density {ends[-1].elbo:.2f}")
        sound = [end for end in ends if end.status is not Status.DIVERGED]
        sweeps = sum(end.sweeps for end in ends)
        why = "the best of each step is known in closed form; what rises is the log density, not an ELBO"
        if not sound:
            told = f"from each of {self.starts} starts"
            return Solved({}, Status.DIVERGED, told, solver="expectation_maximisation", why=why, gradients=sweeps)
        slack = _SAME * problem.tolerance
        optima = self._distinct([e for e in sound if e.status is Status.ARRIVED], problem.model.labels, slack)
        best = max((optimum.end for optimum in optima), key=lambda end: end.elbo, default=None)
        unfinished = [end for end in sound if end.status is not Status.ARRIVED]
        highest = max(unfinished, key=lambda end: end.elbo, default=None)
        if best is None or (highest is not None and highest.elbo > best.elbo + slack):
            assert highest is not None
            return Solved(
                self._params(problem, highest),
                highest.status,
                _told_unfinished(highest, optima, len(unfinished), self.starts, sweeps),
                solver="expectation_maximisation",
                why=why,
                trace=highest.trace,
                gradients=sweeps,
            )
        return Solved(
            self._params(problem, best),
            best.status,
            _told(optima, self.starts, len(unfinished)),
            solver="expectation_maximisation",
            why=why,
            trace=best.trace,
            optima=tuple(optimum.end.elbo for optimum in optima),
            reached=tuple(optimum.starts for optimum in optima),
            other_traces=tuple(optimum.end.trace for optimum in optima[1:]),
            gradients=sweeps,
        )

    @staticmethod
    def _params(problem: Problem, end: Ascent) -> dict[str, np.ndarray]:
        """By AutoDelta's own names."""
        return {f"{name}_auto_loc": end.state[name] for name in problem.space.names}

    def _climb(self, rng: np.random.Generator, problem: Problem) -> Ascent:
        """Where one start ends; a saddle, at which the steps stand still as at an optimum, is left again."""
        sweeps = max(2, problem.max_gradients // self.starts)
        first = self._ascend(self.begin(rng), problem.tolerance, sweeps // 2)
        if first.status is not Status.ARRIVED:
            return first
        # Towards another start: where constrained space is convex no step leads out of it.
        aside = {name: (1 - _ASIDE) * first.state[name] + _ASIDE * other for name, other in self.begin(rng).items()}
        second = self._ascend(aside, problem.tolerance, sweeps - first.sweeps)
        total = first.sweeps + second.sweeps
        if not second.elbo > first.elbo + _SAME * problem.tolerance:  # back where it was
            return replace(first, sweeps=total)
        courses = first.trace, second.trace
        steps = np.r_[courses[0].steps, first.sweeps + courses[1].steps]
        return replace(
            second,
            sweeps=total,
            trace=Trace(steps, np.r_[courses[0].elbo, courses[1].elbo], np.r_[courses[0].se, courses[1].se]),
        )

    def _ascend(self, start: State, tolerance: float, max_sweeps: int) -> Ascent:
        # The E step last: then the free energy of what a sweep leaves is the log density itself.
        steps = {"maximise": self.maximise, "expect": self.expect}
        begun = {**start, **self.expect(start)}
        return ascend(steps, self.free_energy, begun, tolerance=tolerance, max_sweeps=max_sweeps)

    def _distinct(self, ends: Sequence[Ascent], labels: Labels | None, slack: float) -> list[_Optimum]:
        """The optima that climbs ended at, the highest first, each with the highest of its ends."""
        optima: list[_Optimum] = []
        for end in sorted(ends, key=lambda end: -end.elbo):
            for place, optimum in enumerate(optima):
                if self._same(optimum.end, end, labels, slack):
                    optima[place] = replace(optimum, starts=optimum.starts + 1)
                    break
            else:
                optima.append(_Optimum(end, 1))
        return optima

    def _same(self, first: Ascent, second: Ascent, labels: Labels | None, slack: float) -> bool:
        """Whether two ends are of one height, and the density does not sink between them, in one order of labels."""
        if abs(first.elbo - second.elbo) > slack:
            return False
        a, b = first.state, second.state
        if labels is not None:
            order = labels.orders(b[labels.by][None], a[labels.by])[0]
            b = {**b, **labels.permuted({name: b[name] for name in labels.axes if name in b}, order.tolist())}
        middle = {name: (a[name] + b[name]) / 2 for name in a}
        middle |= self.expect(middle)
        return self.free_energy(middle) >= min(first.elbo, second.elbo) - slack


@dataclass(frozen=True, eq=False)
class _Optimum:
    """An optimum: the highest end there, and how many starts led to it."""

    end: Ascent
    starts: int


def _told(optima: Sequence[_Optimum], starts: int, unfinished: int) -> str:
    best = optima[0]
    text = f"the best of {len(optima)} distinct optima, to which {best.starts} of {starts} starts led"
    if len(optima) == 1:
        text = f"the only optimum that was found, by {best.starts} of {starts} starts"
    return text + (f"; {unfinished} had not arrived when the budget was used up" if unfinished else "")


def _told_unfinished(highest: Ascent, optima: Sequence[_Optimum], unfinished: int, starts: int, sweeps: int) -> str:
    """Of an end that the budget cut short above all that arrived."""
    made = "1 sweep" if highest.sweeps == 1 else f"{highest.sweeps:,} sweeps"
    text = (
        f"{unfinished} of {starts} starts had not arrived when the budget was used up; the highest of them is no "
        f"optimum, at a log density of {highest.elbo:.6g} after {made}, of {sweeps:,} in all"
    )
    if not optima:
        return text
    many = "1 distinct optimum" if len(optima) == 1 else f"{len(optima)} distinct optima"
    return f"{text}; {many} that others arrived at lie{'s' * (len(optima) == 1)} lower"
