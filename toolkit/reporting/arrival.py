"""How near a fit is to its family's best, in cells and sentences: certificates, optima, solvers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from toolkit.comparison.gaps import NOT_CLIMBED, is_point
from toolkit.comparison.sentences import at_most, climbs, sampled, seeks_elbo, whose
from toolkit.comparison.verdicts import Thresholds, reach
from toolkit.estimate import Estimate
from toolkit.reporting.contents import Cell, Column
from toolkit.variational.certificates import Scope

GAP = Column(
    "gap, at most (nats)",
    "How far the ELBO of the family's best may lie above this fit's: the upper 95 % limit. A global bound speaks of "
    "the best of the whole family; a local bound of the optimum that can be reached by climbing from here, and "
    "restarts speak to the rest; an estimate of the latter too, and is no bound. Where there is no limit, a dash "
    "with the reason. No limit of a bound is below a hundredth of the tolerance (0.001 at the default): so much each "
    "climb of a certificate may leave.",
)
OPTIMA = Column(
    "optima",
    "To how many distinct optima the starts led, and how far apart in nats the best and the lowest are; the best one "
    "is reported. SVI does not tell optima apart: there the starts are counted. Of a point they are optima of the log "
    "density.",
)
_LEVEL, _LEVEL_SES = 0.1, 3.0  # nats, what a fit is asked to arrive within by default; standard errors
_LEAST_SHARE = 0.01  # of a posterior's mass, that is told of
_FIXED_DRAWS, _SVI = "fixed_draws", "svi"  # as `Fit.solver` names them
_REASONS = {
    "TOO_FEW_DRAWS": "too few draws",
    "BUDGET": "budget used up",
}


def on_fixed_draws(fit: Any) -> bool:
    """Whether what was climbed is the ELBO on draws held fixed."""
    return bool(fit.solver == _FIXED_DRAWS)


def by_svi(fit: Any) -> bool:
    """Whether stochastic steps fitted it: its `optima` are the ends of starts; how far the best is, is not known."""
    return bool(fit.solver == _SVI)


def by_density(fit: Any) -> bool:
    """Whether what rose is the log density and not an ELBO: of a point, and of a Gaussian around a mode."""
    return climbs(fit) and not seeks_elbo(fit)


def bounded(fit: Any) -> bool:
    """Whether there is a certificate that limits the fit's gap."""
    return fit.status.has_optimum and fit.certificate is not None and math.isfinite(fit.certificate.limit)


def no_optimum(fit: Any) -> str:
    """Why the fit has no ELBO, k-hat or optima to show, in two words; empty if it has."""
    return "a point" if is_point(fit) else "" if fit.status.has_optimum else _no_gap(fit)


def optima_of(fit: Any) -> tuple[Estimate, ...]:
    """The ELBOs of the optima that the starts led to; none where what they ended at are no optima."""
    return tuple(fit.optima) if fit.status.has_optimum else ()


def gap_cell(fit: Any, *, long: bool = False) -> Cell:
    """The gap's upper limit with its scope; a dash with the reason where there is none.

    Args:
        fit: The fit.
        long: Whether the note also tells the sets of draws.
    """
    if bounded(fit):
        certificate = fit.certificate
        return Cell(at_most(certificate.limit), note=certificate.words if long else certificate.scope.value)
    return Cell("–", note=_no_gap(fit))


def _no_gap(fit: Any) -> str:
    if not fit.usable:
        return "no fit"
    if not fit.status.has_optimum:
        return "no optimum"
    if is_point(fit):
        return "a point"
    if not seeks_elbo(fit):
        return NOT_CLIMBED
    if fit.certificate is not None:
        return "no finite limit"
    return "SVI gives none" if by_svi(fit) else _REASONS.get(fit.status.name, "none")


def spread(optima: Sequence[Estimate]) -> Estimate:
    """The ELBO of the best optimum less that of the lowest, in nats; NaN if one is not finite."""
    if not optima or not all(math.isfinite(optimum.value) for optimum in optima):
        return Estimate(math.nan, math.nan)
    best, lowest = max(optima), min(optima)
    return Estimate(best.value - lowest.value, math.hypot(best.se, lowest.se))


def as_high(optima: Sequence[Estimate]) -> int:
    """How many optima are as high as the best one, itself counted: within 0.1 nats, or three standard errors."""
    best = max(optima)
    lower_by = [spread((best, optimum)) for optimum in optima]
    return sum(apart.value <= max(_LEVEL, _LEVEL_SES * apart.se) for apart in lower_by)


def optima_cell(fit: Any) -> Cell:
    """How many distinct optima the starts led to, and their spread; by SVI, of which that is not known, the starts."""
    optima = optima_of(fit)
    count = len(optima)
    if count and not climbs(fit):
        return Cell("–", note=NOT_CLIMBED)
    if not count:
        return Cell("–", note=no_optimum(fit))
    text = f"{count} start{'' if count == 1 else 's'}" if by_svi(fit) else f"{count}"
    return Cell(text, note=f"{spread(optima)} nats apart" if count > 1 else "")


def solver_sentences(fits: Iterable[Any]) -> list[str]:
    """Which solver fitted which guides, and why that one."""
    names: dict[tuple[str, str], list[str]] = {}
    for fit in fits:
        if fit.solver:
            names.setdefault((fit.solver, fit.why), []).append(fit.guide.name)
    return [
        f"Solver of {_joined(guides)}: {_solver(solver)}{_because(why)}." for (solver, why), guides in names.items()
    ]


def _solver(name: str) -> str:
    return "SVI" if name == _SVI else name.replace("_", " ")


def _because(why: str) -> str:
    return "" if not why else f", as {why}" if why == "asked for" else f", because {why}"


def _joined(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def optima_sentences(fits: Iterable[Any]) -> list[str]:
    """For each guide whose starts led to several optima: how many, how far apart, and which one is reported."""
    return [_optima_sentence(fit) for fit in fits if len(optima_of(fit)) > 1]


def _optima_sentence(fit: Any) -> str:
    count, apart, ends = len(fit.optima), spread(fit.optima), sorted(fit.optima, reverse=True)
    height = "log density" if is_point(fit) else "ELBO"
    heights = _joined([f"{end}".replace("-", "−", 1) for end in (ends if count < 5 else [ends[0], ends[-1]])])
    heights = heights if count < 5 else f"from {heights.replace(' and ', ' down to ')}"
    if by_svi(fit):
        return (
            f"{fit.guide.name}: {count} starts ended {apart} nats apart ({height} {heights}); whether at one optimum "
            "is not known. The best one is reported; nothing is averaged."
        )
    text = f"{fit.guide.name}: its starts led to {count} distinct optima, {apart} nats apart ({height} {heights}). "
    if fit.certificate is not None and fit.certificate.scope is Scope.GLOBAL:
        # The ELBO is concave there, so that there is one optimum.
        return f"{text}The family has only one here: the lower ones are climbs that ended short of it."
    level = as_high(fit.optima)
    if level > 1:
        which = "They are" if level == count else f"The best {level} are"
        told = (
            f"{which} as high as each other, within {_LEVEL:g} nats or three standard errors, as where labels may "
            "switch or the posterior has several modes: each then describes its own part of it. One of them is reported"
        )
        told += "; nothing" if level == count else " and the lower ones are local optima; nothing"
    else:
        told = "The best one is reported and the lower ones are local optima; nothing"
    return f"{text}{told} is averaged.{_left_out(fit)} That no start found a better one does not exclude one."


def _left_out(fit: Any) -> str:
    """How much of the posterior lies at the other optima if each is a mode of its own, where that is not next to none.

    A mode's share of the mass goes by its evidence, which its ELBO stands for; optima of one height are told otherwise.
    """
    if as_high(fit.optima) > 1:
        return ""
    if is_point(fit):
        return " How much of the posterior's mass lies at each, their heights do not say."
    heights = np.array([end.value for end in fit.optima])
    share = 1 - 1 / np.exp(heights - heights.max()).sum()
    if share < _LEAST_SHARE:
        return ""
    return (
        f" Where each is a mode of the posterior's own, about {100 * share:.0f} % of its mass lies at the others, and "
        "the guide leaves that out."
    )


def unclimbed_sentences(fits: Iterable[Any]) -> list[str]:
    """For fits whose algorithm does not climb the ELBO: what is not asked of them."""
    names = [fit.guide.name for fit in fits if not climbs(fit) and fit.status.has_optimum]
    if not names:
        return []
    does, it = ("does", "it") if len(names) == 1 else ("do", "they")
    return [
        f"{_joined(names)} {does} not climb the ELBO: how far {it} may lie below the family's highest ELBO is not "
        "asked, and KL(q || p) is not split into the optimiser's part and the family's. Its ELBO is told all the same, "
        "since it compares approximations of one posterior."
    ]


def whose_sentences(fits: Iterable[Any], table: pd.DataFrame, thresholds: Thresholds) -> list[str]:
    """For each guide with wrong quantities, whether that is the family's or may be the optimiser's, and by what."""
    said = []
    for fit in fits:
        own = table[table["guide"] == fit.guide.name]
        clause = whose(own, fit.certificate, thresholds, climbs=seeks_elbo(fit), sampled=sampled(fit))
        if clause:
            said.append(f"{fit.guide.name}: {clause}.{_in_sds(fit) if bounded(fit) else ''}")
    return said


def _in_sds(fit: Any) -> str:
    """What a gap of that many nats may mean for means and sds."""
    shift, (low, high) = reach(fit.certificate.limit)
    # Of what lies elsewhere, a certificate that was found by climbing says nothing.
    elsewhere = (
        "" if fit.certificate.scope is Scope.GLOBAL else " That a better optimum lies elsewhere is not excluded."
    )
    return (
        f" Under a Gaussian posterior so many nats move no mean by more than {shift:.2f} sd, and no sd by a factor "
        f"outside {low:.2f} to {high:.2f}; under another that is an orientation.{elsewhere}"
    )
