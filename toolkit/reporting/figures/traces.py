"""The course of each optimisation, zoomed to where it ended."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from toolkit.reporting.contents import Picture
from toolkit.reporting.figures.canvas import blank, plain, styled
from toolkit.reporting.palette import SOFT, Look

_LATE = 0.5
_LEAST_NATS = 1.0
_DASHES = ("-", "--", "-.", ":")


def elbo_traces(fits: Sequence[Any], looks: Mapping[str, Look]) -> Picture:
    """ELBO against step, one panel for each guide and one line for each start; the scale is that of the second half.

    Args:
        fits: Fits with at least one trace.
        looks: How the guides are shown.
    """
    columns = min(len(fits), 3)
    rows = math.ceil(len(fits) / columns)
    with styled():
        figure, grid = blank(3.1 * columns + (1.2 if columns == 1 else 0), 0.35 + 2.45 * rows, rows, columns)
        said = []
        for axes, fit in zip(grid.flat, fits, strict=False):
            said.append(_panel(axes, fit, looks[fit.guide.name]))
        for axes in grid.flat[len(fits) :]:
            axes.set_visible(False)
        figure.supxlabel("optimisation step", fontsize=9)
        figure.supylabel("ELBO (nats)", fontsize=9)
    reading = (
        "One line for each start, in steps of the optimiser; higher is better. The scale shows the "
        "second half of each run, "
        "earlier steps leave the panel below. Lines that end flat and together have arrived; the grey line is the "
        "ELBO on fresh draws."
    )
    return Picture("elbo_traces", figure, f"ELBO against step. {'; '.join(said)}.", reading)


def _panel(axes: Axes, fit: Any, look: Look) -> str:
    """Draws one guide's starts; gives the words for the alt text."""
    for start, trace in enumerate(fit.traces):
        steps, elbo, se = (np.asarray(a, dtype=float) for a in (trace.steps, trace.elbo, trace.se))
        axes.plot(steps, elbo, _DASHES[start % len(_DASHES)], color=look.mark.light, linewidth=1.2)
        axes.fill_between(steps, elbo - se, elbo + se, color=look.mark.light, alpha=0.2, linewidth=0)
    low, high = _limits([np.asarray(trace.elbo, dtype=float) for trace in fit.traces], fit.elbo)
    axes.set_ylim(low, high)
    axes.set_title(plain(fit.guide.name), color=look.text.light)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.02)
    if fit.elbo is not None:
        axes.axhline(fit.elbo.value, color=SOFT.light, linewidth=0.7, zorder=1)
    hidden = [trace for trace in fit.traces if not trace.elbo[-1] >= low]
    if hidden:
        axes.text(
            0.98,
            0.04,
            f"{len(hidden)} of {len(fit.traces)} starts ended below",
            transform=axes.transAxes,
            ha="right",
            fontsize=8,
            color=SOFT.light,
        )
    ends = [f"{trace.elbo[-1]:.1f}" for trace in fit.traces]
    return f"{fit.guide.name}: {fit.status.value}; its starts ended at {', '.join(ends)} nats"


def _limits(elbos: Sequence[np.ndarray], final: Any) -> tuple[float, float]:
    """A range that shows the second half of the starts that ended near the best one."""
    late = [e[np.isfinite(e)][int(_LATE * np.isfinite(e).sum()) :] for e in elbos]
    late = [e for e in late if e.size]
    if not late:
        return (final.value - 1, final.value + 1) if final is not None else (0.0, 1.0)
    best = max(late, key=lambda e: float(np.median(e)))
    near = [e for e in late if np.median(e) > np.median(best) - 10 * max(float(np.ptp(best)), _LEAST_NATS)]
    values = np.concatenate(near)
    low, high = float(np.quantile(values, 0.02)), float(values.max())
    if final is not None and math.isfinite(final.value) and final.value > low - 10 * max(high - low, _LEAST_NATS):
        low, high = min(low, final.value), max(high, final.value)
    room = 0.25 * max(high - low, _LEAST_NATS)
    return low - room, high + room
