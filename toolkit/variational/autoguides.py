"""NumPyro's Gaussian autoguides as families: their parameters from a member, and a member from their parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpyro.infer import autoguide

from toolkit.modelling.space import Space
from toolkit.variational.amortised_fits import Amortised, AmortisedMember, amortised_member
from toolkit.variational.amortised_guides import AutoAmortisedNormal
from toolkit.variational.block_guides import AutoBlockNormal, gaussian_from, params_from
from toolkit.variational.gaussians import Diagonal, Family, Frame, LowRank, Member, Triangular
from toolkit.variational.guides import default_rank

Params = dict[str, Any]


@dataclass(frozen=True)
class GaussianForm:
    """A Gaussian autoguide as a family.

    Attributes:
        family: The family, measured by a frame.
        params: The autoguide's own parameters, constrained, of a member.
        member: The member with the autoguide's parameters.
        concave: Whether the ELBO is concave in location and factor where the posterior is log-concave.
        full: Whether every Gaussian is a member.
        around: A family that contains this one, where to shift or stretch a coordinate leads out of this one; None
            where it does not. What a fit without an optimum is told by, is looked for there.
    """

    family: Callable[[Frame], Family]
    params: Callable[[Member], Params]
    member: Callable[[Mapping[str, Any]], Member]
    concave: bool = True
    full: bool = False
    around: Callable[[Frame], Family] | None = None


def gaussian_form(guide: Any, space: Space) -> GaussianForm | None:
    """The autoguide as a family; None for one that is not Gaussian or whose Gaussian is not its own to choose.

    Args:
        guide: An autoguide that has been set up on its model.
        space: The model's latent sites in the guide's chart.
    """
    kind = type(guide)  # exactly these: a subclass may give the parameters another meaning
    if kind is autoguide.AutoNormal:
        return GaussianForm(Diagonal, *_by_site(guide.prefix, space))
    if kind is autoguide.AutoDiagonalNormal:
        return GaussianForm(Diagonal, *_by_name({"loc": f"{guide.prefix}_loc", "scale": f"{guide.prefix}_scale"}))
    if kind is autoguide.AutoMultivariateNormal:
        names = {"loc": f"{guide.prefix}_loc", "factor": f"{guide.prefix}_scale_tril"}
        return GaussianForm(Triangular, *_by_name(names), full=True)
    if kind is autoguide.AutoLowRankMultivariateNormal:
        rank = default_rank(space.size) if guide.rank is None else guide.rank
        params, member = _by_name({name: f"{guide.prefix}_{own}" for name, own in _LOW_RANK.items()})
        return GaussianForm(
            lambda frame: LowRank(frame, rank), lambda found: params(_positive(found)), member, concave=False
        )
    if kind is AutoBlockNormal:
        return _blocks(guide)
    if kind is AutoAmortisedNormal:
        return _amortised(guide)
    return None


_LOW_RANK = {"loc": "loc", "scale": "scale", "columns": "cov_factor"}


def _positive(member: Member) -> Member:
    """The same low-rank Gaussian with positive scales."""
    assert member.scale is not None
    assert member.columns is not None
    signs = np.sign(member.scale)
    return replace(member, scale=np.abs(member.scale), columns=member.columns * signs[:, None])


def _by_name(names: Mapping[str, str]) -> tuple[Callable[[Member], Params], Callable[[Mapping[str, Any]], Member]]:
    """Both directions, where an autoguide has one parameter for each part of a member."""

    def params(member: Member) -> Params:
        return {own: getattr(member, part) for part, own in names.items()}

    def member(params: Mapping[str, Any]) -> Member:
        return Member(**{part: np.asarray(params[own]) for part, own in names.items()})

    return params, member


def _by_site(prefix: str, space: Space) -> tuple[Callable[[Member], Params], Callable[[Mapping[str, Any]], Member]]:
    """Both directions for AutoNormal, which has two parameters for each site."""

    def params(member: Member) -> Params:
        locs, scales = space.unravel(member.loc), space.unravel(member.scale)
        return {f"{name}_{prefix}_loc": locs[name] for name in space.names} | {
            f"{name}_{prefix}_scale": scales[name] for name in space.names
        }

    def member(params: Mapping[str, Any]) -> Member:
        parts = {
            part: np.concatenate([np.ravel(params[f"{name}_{prefix}_{part}"]) for name in space.names])
            for part in ("loc", "scale")
        }
        return Member(**parts)

    return params, member


def _blocks(guide: AutoBlockNormal) -> GaussianForm:
    """Both directions for a structured guide, whose factor is kept in the order of its blocks."""
    blocks = guide.blocks
    order = np.array(blocks.order)

    def params(member: Member) -> Params:
        assert member.factor is not None
        return params_from(guide, member.loc, member.factor[order])

    def member(params: Mapping[str, Any]) -> Member:
        loc, ordered = gaussian_from(guide, params)
        factor = np.empty_like(ordered)
        factor[order] = ordered
        return Member(loc, factor=factor)

    pattern = None if blocks.full else blocks.pattern
    return GaussianForm(lambda frame: Triangular(frame, order, pattern), params, member, full=blocks.full)


def _amortised(guide: AutoAmortisedNormal) -> GaussianForm:
    """Both directions for amortised branches, whose members know their parameters."""

    def params(member: Member) -> Params:
        if not isinstance(member, AmortisedMember) or member.params is None:
            raise ValueError("Expected a Gaussian with amortised branches; got another, which no weights give.")  # noqa: TRY004
        return dict(member.params)

    order, blocks = np.array(guide.blocks.order), guide.blocks
    pattern = None if blocks.full else blocks.pattern
    return GaussianForm(
        lambda frame: Amortised(frame, guide),
        params,
        lambda found: amortised_member(guide, found),
        concave=False,
        around=lambda frame: Triangular(frame, order, pattern),
    )
