"""Guide families: how each is built for any model, and which other families it contains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from numpyro.infer import autoguide

from toolkit.variational.blocks import AutoBlockNormal

Build = Callable[[Callable[..., Any]], Callable[..., Any]]


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
    """

    name: str
    build: Build
    contains: tuple[str, ...] = ()
    chart: str | None = None
    label: str = ""

    @property
    def title(self) -> str:
        """The name with NumPyro's class beside it."""
        return f"{self.name} ({self.label})" if self.label else self.name

    def in_chart(self, chart: str) -> Guide:
        """The same family over another chart of the model, named `<name>@<chart>`."""
        contained = tuple(f"{name}@{chart}" for name in self.contains)
        return replace(self, name=f"{self.name}@{chart}", chart=chart, contains=contained)


def _auto(name: str, class_name: str, contains: tuple[str, ...] = (), **options: Any) -> Guide:
    return Guide(name, partial(getattr(autoguide, class_name), **options), contains, label=class_name)


GUIDES: dict[str, Guide] = {
    guide.name: guide
    for guide in (
        _auto("mean_field", "AutoNormal"),
        _auto("low_rank", "AutoLowRankMultivariateNormal", ("mean_field", "diagonal")),
        Guide(
            "blocks", partial(AutoBlockNormal, structure="blocks"), ("mean_field", "diagonal"), label="AutoBlockNormal"
        ),
        Guide(
            "coupled",
            partial(AutoBlockNormal, structure="coupled"),
            ("blocks", "mean_field", "diagonal"),
            label="AutoBlockNormal",
        ),
        _auto(
            "full_rank",
            "AutoMultivariateNormal",
            ("coupled", "blocks", "low_rank", "mean_field", "diagonal", "laplace"),
        ),
        _auto("map", "AutoDelta"),
        _auto("laplace", "AutoLaplaceApproximation"),
        _auto("diagonal", "AutoDiagonalNormal"),
        _auto("iaf", "AutoIAFNormal"),
        _auto("bnaf", "AutoBNAFNormal"),
        _auto("dais", "AutoDAIS"),
    )
}
"""The guides that can be asked for by name; `DEFAULT_GUIDES` are the default panel."""

DEFAULT_GUIDES = ("mean_field", "low_rank", "full_rank")


def find_guide(guide: str | Guide) -> Guide:
    """The guide of that name, with `@chart` behind it where another chart is wanted; a `Guide` passes through.

    Raises:
        ValueError: There is no guide of that name.
    """
    if isinstance(guide, Guide):
        return guide
    name, _, chart = guide.partition("@")
    if name not in GUIDES:
        raise ValueError(f"Expected a guide's name, one of {', '.join(GUIDES)}; got '{name}'.")
    return GUIDES[name].in_chart(chart) if chart else GUIDES[name]
