"""Guide families: how each is built for any model, and which other families it contains."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from numpyro.infer import autoguide

from toolkit.variational.amortised_guides import AutoAmortisedNormal
from toolkit.variational.block_guides import BLOCKS, COUPLED, AutoBlockNormal
from toolkit.variational.chain_fits import solve_chain
from toolkit.variational.chain_guides import CHAIN, AutoChainNormal
from toolkit.variational.expectation_propagation import solve_ep
from toolkit.variational.flow_guides import AutoBNAF, AutoIAF
from toolkit.variational.mixture_guides import AutoMixtureNormal

if TYPE_CHECKING:
    from toolkit.modelling.model import Model
    from toolkit.variational.own_solvers import Problem, Solved

Build = Callable[[Callable[..., Any]], Callable[..., Any]]

LOW_RANK, BY_GAIN, FULL_RANK = "low_rank", "low_rank_auto", "full_rank"
MIXTURE, AMORTISED = "mixture", "amortised"
_RANKED = re.compile(rf"{LOW_RANK}_([1-9]\d*)")
_COUNTED = re.compile(rf"{MIXTURE}_([1-9]\d*)")


@dataclass(frozen=True)
class Guide:
    """A variational family, for any model.

    Attributes:
        name: What the report calls it; a family's name says what it can express.
        build: Makes the NumPyro guide from the model's callable, such as
            `lambda fn: AutoMultivariateNormal(fn)`.
        contains: Names of the families that this one contains in the same chart; none of them can have the higher
            optimum.
        chart: The model's chart that it looks at; the model's own choice if None.
        label: NumPyro's class, shown beside the name.
        rank: Columns of a low-rank covariance, where they were chosen by the user or by the fit; None otherwise.
        climbs: Whether fitting raises the ELBO. False for an algorithm that seeks something else, such as matched
            moments: then how far the family's highest ELBO lies above is not asked.
        solve: The algorithm that finds a member, where the guide brings its own, such as coordinate ascent
            (`toolkit.variational.own_solvers`); None where the solvers of `fit` do.
        from_gaussian: Whether its fit begins at the best full-rank Gaussian, which it contains: that of the panel, or
            else one that is fitted before it.
    """

    name: str
    build: Build
    contains: tuple[str, ...] = ()
    chart: str | None = None
    label: str = ""
    rank: int | None = None
    solve: Callable[[Problem], Solved] | None = None
    climbs: bool = True
    from_gaussian: bool = False

    @property
    def title(self) -> str:
        """The name with NumPyro's class beside it."""
        label = self.label if self.rank is None else f"{self.label}, rank {self.rank}"
        return f"{self.name} ({label})" if label else self.name

    @property
    def family(self) -> str:
        """The name without chart and rank."""
        name = self.name.partition("@")[0]
        if name == BY_GAIN or _RANKED.fullmatch(name):
            return LOW_RANK
        return MIXTURE if _COUNTED.fullmatch(name) else name

    @property
    def components(self) -> int | None:
        """Of a mixture whose name says it; None for other guides, and where the modes decide."""
        return self.solve.components if isinstance(self.solve, _Mixture) else None

    @property
    def is_named(self) -> bool:
        """Whether `find_guide` gives this very guide for its name: then the name says all there is to say."""
        try:
            named = find_guide(self.name)
        except ValueError:
            return False
        # A fit by gain has put its own rank in.
        return named == self or (named.name == BY_GAIN and named.of_rank(self.rank or 1) == self)

    def in_chart(self, chart: str) -> Guide:
        """The same family over another chart of the model, named `<name>@<chart>`."""
        contained = tuple(f"{name}@{chart}" for name in self.contains)
        return replace(self, name=f"{self.name}@{chart}", chart=chart, contains=contained)

    def of_rank(self, rank: int) -> Guide:
        """The same guide with so many columns of its covariance."""
        return replace(self, build=_Ranked(rank), rank=rank)


@dataclass(frozen=True)
class _Ranked:
    """Builds a low-rank guide; two of one rank are equal."""

    rank: int

    def __call__(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return autoguide.AutoLowRankMultivariateNormal(fn, rank=self.rank)


@dataclass(frozen=True)
class _Mixture:
    """Fits a mixture of Gaussians, for `Guide.solve`; two of as many components are equal."""

    components: int | None = None

    def __call__(self, problem: Problem) -> Solved:
        from toolkit.variational.mixture_fits import fit_mixture  # which knows fits, and these know guides

        return fit_mixture(problem, self.components)


def _auto(name: str, class_name: str, contains: tuple[str, ...] = (), **options: Any) -> Guide:
    return Guide(name, partial(getattr(autoguide, class_name), **options), contains, label=class_name)


def _structured(structure: str, contains: tuple[str, ...]) -> Guide:
    build = partial(AutoBlockNormal, structure=structure)
    return Guide(structure, build, contains, label=AutoBlockNormal.__name__)


_IN_FULL_RANK = (CHAIN, "coupled", AMORTISED, "blocks", "low_rank", "mean_field", "diagonal", "laplace", "ep")
_IN_RICHER = (FULL_RANK, *_IN_FULL_RANK)

GUIDES: dict[str, Guide] = {
    guide.name: guide
    for guide in (
        _auto("mean_field", "AutoNormal"),
        _auto(LOW_RANK, "AutoLowRankMultivariateNormal", ("mean_field", "diagonal")),
        _auto(BY_GAIN, "AutoLowRankMultivariateNormal", ("mean_field", "diagonal")),
        _structured(BLOCKS, ("mean_field", "diagonal")),
        Guide(AMORTISED, AutoAmortisedNormal, label=AutoAmortisedNormal.__name__),
        _structured(COUPLED, (AMORTISED, "blocks", "mean_field", "diagonal")),
        Guide(CHAIN, AutoChainNormal, ("mean_field", "diagonal"), label=AutoChainNormal.__name__, solve=solve_chain),
        _auto(FULL_RANK, "AutoMultivariateNormal", _IN_FULL_RANK),
        replace(_auto("ep", "AutoMultivariateNormal"), solve=solve_ep, climbs=False),
        _auto("map", "AutoDelta"),
        _auto("laplace", "AutoLaplaceApproximation"),
        _auto("diagonal", "AutoDiagonalNormal"),
        Guide(
            MIXTURE,
            AutoMixtureNormal,
            _IN_RICHER,
            label=AutoMixtureNormal.__name__,
            solve=_Mixture(),
            from_gaussian=True,
        ),
        Guide("iaf", AutoIAF, _IN_RICHER, label=AutoIAF.__name__, from_gaussian=True),
        Guide("bnaf", AutoBNAF, _IN_RICHER, label=AutoBNAF.__name__, from_gaussian=True),
        _auto("dais", "AutoDAIS"),
    )
}
"""The guides that can be asked for by name; `DEFAULT_GUIDES` are the default panel.

Also `low_rank_<columns>`, such as `low_rank_8`; `low_rank` has NumPyro's default, about the square root of the
dimension, `low_rank_auto` as many columns as gain something. And `mixture_<components>`, such as `mixture_3`; `mixture`
has as many as there are modes, and at least two.
"""

DEFAULT_GUIDES = ("mean_field", "low_rank", "full_rank")


def default_rank(size: int) -> int:
    """NumPyro's own choice of the columns of a low-rank covariance in so many dimensions."""
    return round(size**0.5)


def find_guide(guide: str | Guide, model: Model | None = None) -> Guide:
    """The guide of that name, with `@chart` behind it where another chart is wanted; a `Guide` passes through.

    Args:
        guide: A name, or a guide.
        model: One whose own guides (`Model.guides`) may be asked for by name, too.

    Raises:
        ValueError: There is no guide of that name, or it is neither a name nor a `Guide`.
    """
    if isinstance(guide, Guide):
        return guide
    if not isinstance(guide, str):
        raise ValueError(  # noqa: TRY004 - misuse is a ValueError everywhere
            f"Expected a guide's name or a `Guide`; got {guide!r}: wrap what makes a NumPyro guide, as in "
            "Guide('mine', lambda fn: AutoNormal(fn))."
        )
    name, _, chart = guide.partition("@")
    ranked, counted = _RANKED.fullmatch(name), _COUNTED.fullmatch(name)
    known = GUIDES | {own.name: own for own in (model.guides if model else ())}
    if name not in known and not ranked and not counted:
        raise ValueError(
            f"Expected a guide's name, one of {', '.join(known)}, {MIXTURE}_<components> or {LOW_RANK}_<columns>; got "
            f"'{name}'."
        )
    if ranked:
        found = replace(GUIDES[LOW_RANK].of_rank(int(ranked[1])), name=name)
    elif counted:
        found = replace(GUIDES[MIXTURE], name=name, solve=_Mixture(int(counted[1])))
    else:
        found = known[name]
    if guide.endswith("@"):
        raise ValueError(f"Expected a chart's name behind the @ of '{guide}'; got none: leave the @ out.")
    return found.in_chart(chart) if chart else found


def block_guide(name: str, groups: Sequence[Sequence[str]]) -> Guide:
    """The family that is a full Gaussian over the sites named together and factorised otherwise (`named_blocks`).

    Args:
        name: What the report calls it.
        groups: Such as `[("alpha", "beta"), ("sigma",)]`: latent sites by their names in the guide's chart.
    """
    build = partial(AutoBlockNormal, groups=tuple(tuple(group) for group in groups))
    return Guide(name, build, ("mean_field", "diagonal"), label=AutoBlockNormal.__name__)
