"""Families that contain one another: the larger one's best can never be lower."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter

from toolkit.estimate import Estimate
from toolkit.modelling.model import Model
from toolkit.modelling.space import latent_space
from toolkit.status import Status
from toolkit.variational.amortised_guides import AutoAmortisedNormal
from toolkit.variational.block_guides import AutoBlockNormal
from toolkit.variational.certificates import Scope
from toolkit.variational.chain_guides import AutoChainNormal
from toolkit.variational.fits import Fit
from toolkit.variational.guides import BY_GAIN, FULL_RANK, LOW_RANK, MIXTURE, Guide, default_rank

_SE_LIMIT = 3.0
# The classes of guides that a user may name as he likes.
_GAUSSIANS = (AutoBlockNormal.__name__, AutoChainNormal.__name__, AutoAmortisedNormal.__name__)


def check_nesting(fits: Sequence[Fit], tolerance: float = 0.1) -> tuple[Fit, ...]:
    """The same fits, each one whose ELBO lies below that of a family that it contains marked as not arrived.

    A difference counts where it exceeds both the tolerance in nats and three standard errors. A certificate whose limit
    it exceeds as well is dropped, and the message says so. Fits without an optimum are not compared: how high they are
    is a matter of when they were stopped.
    """
    return tuple(
        _checked(fit, [other for other in fits if contains(fit.guide, other.guide, fit.model)], tolerance)
        for fit in fits
    )


def smallest_first(guides: Sequence[Guide], model: Model) -> list[Guide]:
    """The guides in an order in which every family comes after those that it contains.

    Raises:
        ValueError: Two families are said to contain each other.
    """
    ordered = sorted(guides, key=lambda guide: (len(guide.contains), _columns(guide, model)))
    inside = {
        number: [other for other, smaller in enumerate(ordered) if other != number and contains(guide, smaller, model)]
        for number, guide in enumerate(ordered)
    }
    try:
        return [ordered[number] for number in TopologicalSorter(inside).static_order()]
    except CycleError as error:
        names = ", ".join(dict.fromkeys(ordered[number].name for number in error.args[1]))
        raise ValueError(f"Expected families of which none contains itself; got a circle: {names}.") from None


def contains(larger: Guide, smaller: Guide, model: Model) -> bool:
    """Whether one family contains the other in the same chart, by whatever name that chart was asked for."""
    if len({guide.chart or model.chart for guide in (larger, smaller)}) > 1:
        return False
    if larger.family == smaller.family == LOW_RANK:
        return _columns(larger, model) > _columns(smaller, model)
    if larger.family == smaller.family == MIXTURE:
        return (larger.components or 0) > (smaller.components or math.inf)
    inside = {name.partition("@")[0] for name in larger.contains}
    if smaller.label in _GAUSSIANS and FULL_RANK in inside | {larger.family}:
        return True
    return smaller.family in inside


def _columns(guide: Guide, model: Model) -> float:
    """Columns of a low-rank guide's covariance, NumPyro's default where none were chosen; 0 for other guides."""
    if guide.family != LOW_RANK:
        return 0
    if guide.rank is None and guide.name.partition("@")[0] == BY_GAIN:
        return math.inf  # not chosen yet
    return guide.rank or default_rank(latent_space(model, guide.chart or model.chart).size)


def _checked(fit: Fit, contained: Sequence[Fit], tolerance: float) -> Fit:
    if fit.elbo is None or not fit.status.has_optimum:
        return fit
    deficits = list[tuple[Estimate, Fit]]()
    for other in contained:
        if other.elbo is not None and other.status.has_optimum:
            deficit = Estimate(other.elbo.value - fit.elbo.value, math.hypot(other.elbo.se, fit.elbo.se))
            if deficit.value > max(tolerance, _SE_LIMIT * deficit.se):
                deficits.append((deficit, other))
    if not deficits:
        return fit
    deficit, smaller = max(deficits, key=lambda one: one[0].value)
    message, certificate = f"{deficit} nats below {smaller.guide.name}, which it contains", fit.certificate
    if certificate and deficit.value - _SE_LIMIT * deficit.se > certificate.limit:
        speaks = "does not hold" if certificate.scope is Scope.GLOBAL else "speaks of a lower optimum"
        message += f"; its certificate, of at most {certificate.limit:.2g} nats, {speaks}"
        certificate = None
    return replace(fit, status=Status.BELOW_SMALLER_FAMILY, message=message, certificate=certificate)
