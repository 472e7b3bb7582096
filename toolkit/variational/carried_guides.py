"""A fitted amortised guide for other data: branches of units that the fit has not seen, without fitting."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from toolkit.status import Status
from toolkit.variational.amortised_fits import with_units
from toolkit.variational.amortised_guides import FREE, AutoAmortisedNormal
from toolkit.variational.fits import Fit
from toolkit.variational.guides import AMORTISED, Guide
from toolkit.variational.own_solvers import Problem, Solved


def carried(fitted: Fit) -> Guide:
    """A guide that is fitted to no data: it applies what an amortised fit has learned to the units of any dataset.

    q(shared) and the function are the fit's. Each unit's branch is what the function gives for that unit's own data,
    be it one that the fit has seen, one that it has not, or a known one with more rows. `fit(model, carried(fitted),
    key=key)` therefore costs a few derivatives of the log density; what its ELBO lacks to that of a new fit is the
    price of not fitting. Rows of a new unit do not move q(shared): for that the guide is fitted anew.

    Args:
        fitted: A fit of `amortised`, or of another guide made by `AutoAmortisedNormal`.

    Returns:
        The guide; its models must have the fit's shared coordinates and sites, and may have any number of units. How
        the fit ended is inherited.

    Raises:
        ValueError: The fit has no parameters or no optimum, or is of another family.
    """
    known = fitted.autoguide
    if not (isinstance(known, AutoAmortisedNormal) and fitted.usable and fitted.status.has_optimum):
        raise ValueError(
            f"Expected a fit of '{AMORTISED}' that has parameters and an optimum; got one of '{fitted.guide.name}', "
            f"{fitted.status.value}."
        )
    return Guide(
        f"{fitted.guide.name.partition('@')[0]}_carried",
        partial(AutoAmortisedNormal, hidden=known.hidden, like=known, prefix=known.prefix),
        chart=fitted.chart,
        label=fitted.guide.label,
        solve=_Carried(fitted),
        climbs=False,
    )


@dataclass(frozen=True, eq=False)
class _Carried:
    """The algorithm of a carried guide: it evaluates the fitted function."""

    fitted: Fit

    def __call__(self, problem: Problem) -> Solved:
        """The fit's parameters, with the constants of the problem's own units."""
        fitted, guide, known = self.fitted, problem.program, self.fitted.autoguide
        prefix, params = known.prefix, fitted.params
        held = {name: np.asarray(value) for name, value in known.constants_of(params).items()}
        before = guide.summaries.evaluations
        constants = guide.constants({part: held[f"reference_{part}"] for part in ("loc", "tril", "units")}, held)
        found = {f"{prefix}_{name}": params[f"{prefix}_{name}"] for name in FREE} | {
            f"{prefix}_{name}": value for name, value in constants.items()
        }
        origin = f"the fit to '{fitted.model.dataset.name}'"
        inherited = ": ".join(part for part in (f"inherited from {origin}", fitted.message) if part)
        status, message = with_units(guide, found, fitted.status, "" if fitted.status is Status.ARRIVED else inherited)
        limit = "with no limit on" if fitted.gap_limit is None else f"at most {fitted.gap_limit:.2g} nats from"
        return Solved(
            found,
            status,
            message,
            solver="carried",
            why=(
                f"nothing is fitted: shared coordinates and function are those of {origin} ({fitted.status.value}; "
                f"there {limit} its best), and each unit's branch is had from its own data"
            ),
            gradients=guide.summaries.evaluations - before,
        )
