"""The course of each optimisation, zoomed to where it ended."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from toolkit.comparison.sentences import climbs, ended
from toolkit.reporting.arrival import bounded, by_density, by_svi, on_fixed_draws
from toolkit.reporting.contents import Picture
from toolkit.reporting.figures.canvas import blank, plain, styled
from toolkit.reporting.palette import SOFT, Look

_LATE = 0.5
_LEAST_NATS = 1.0
_DASHES = ("-", "--", "-.", ":")
_FEW_POINTS = 60  # up to which each evaluation gets a mark
_EVALUATIONS, _STEPS, _SWEEPS = "evaluations of the ELBO", "optimisation steps", "sweeps over the data"


def elbo_traces(fits: Sequence[Any], looks: Mapping[str, Look]) -> Picture:
    """ELBO against step or evaluation, a panel for each guide, a line for each optimum; the scale of the second half.

    A line belongs to a distinct optimum that starts led to, or for SVI, which does not tell them apart, to a start.

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
        units = {_unit(fit) for fit in fits}
        several = "step, evaluation or sweep" if _SWEEPS in units else "step or evaluation"
        figure.supxlabel(units.pop() if len(units) == 1 else several, fontsize=9)
        heights = dict.fromkeys(
            "log density" if by_density(fit) else "ELBO" if climbs(fit) else "log evidence" for fit in fits
        )
        what = " or ".join(sorted(heights))
        figure.supylabel(f"{what} (nats)", fontsize=9)
    title = what if "ELBO" in heights else what.capitalize()
    return Picture("elbo_traces", figure, f"{title} in the course of each fit. {'; '.join(said)}.", _reading(fits))


def _unit(fit: Any) -> str:
    """What a trace's first column counts."""
    return _EVALUATIONS if on_fixed_draws(fit) else _STEPS if climbs(fit) else _SWEEPS


def _lines(fit: Any) -> str:
    """What the lines of a panel belong to."""
    return "starts" if by_svi(fit) else "optima"


def _reading(fits: Sequence[Any]) -> str:
    """How to read the figure, by what is in it."""
    own = [fit.guide.name for fit in fits if not climbs(fit)]
    said = (
        f"Of {', '.join(own)} the line is the algorithm's own approximation of the log evidence, after each sweep over "
        "the data: it may rise or fall and lie on either side of the log evidence; the grey line is the ELBO."
        if own
        else ""
    )
    fits = [fit for fit in fits if climbs(fit)]
    if not fits:
        return said
    kinds = list(dict.fromkeys(_lines(fit) for fit in fits))
    lines = {"optima": "distinct optimum that the starts led to", "starts": "start"}
    words = f"One line for each {lines[kinds[0]]}" + (" (SVI: for each start)" if len(kinds) > 1 else "")
    fixed = [fit for fit in fits if on_fixed_draws(fit)]
    over = {fit.guide.name: _unit(fit) for fit in fits}
    if len(set(over.values())) > 1:
        counted = ", ".join(name for name, unit in over.items() if unit == _EVALUATIONS)
        words += f", over evaluations of the ELBO ({counted}) or over optimisation steps (the others)"
    else:
        words += f", over {next(iter(over.values()))}"
    words += (
        "; higher is better. The scale shows the second half of each run, what came before leaves the panel below. "
        "The grey line is the ELBO of the fit that is reported, on fresh draws; the band above it, where there is one, "
        "is how far the family's best may still lie above, by the fit's certificate. "
    )
    if fixed:
        words += (
            "On fixed draws a line ends a little off the grey one: above it by what the fit owes to its own draws, "
            "which it was fitted to, and to either side by the error that these few draws have. "
        )
    points = [fit.guide.name for fit in fits if by_density(fit)]
    if points:
        words += f"For a mode ({', '.join(points)}) it is the log density that rises; a point has no grey line. "
    if len(fixed) < len(fits):
        words += "Lines of steps that end flat and together have arrived."
    return f"{words.strip()} {said}".strip()


def _panel(axes: Axes, fit: Any, look: Look) -> str:
    """Draws one guide's courses; gives the words for the alt text."""
    colour = look.mark.light
    for number, trace in enumerate(fit.traces):
        steps, elbo, se = (np.asarray(a, dtype=float) for a in (trace.steps, trace.elbo, trace.se))
        marker, size = "o" if steps.size <= _FEW_POINTS else "", 3.4 if steps.size <= _FEW_POINTS / 3 else 2.4
        dashes = _DASHES[number % len(_DASHES)]
        axes.plot(steps, elbo, dashes, color=colour, linewidth=1.2, marker=marker, markersize=size, markeredgewidth=0)
        if (se > 0).any():
            axes.fill_between(steps, elbo - se, elbo + se, color=colour, alpha=0.2, linewidth=0)
    final = fit.elbo if fit.status.has_optimum else None
    low, high = _limits([np.asarray(trace.elbo, dtype=float) for trace in fit.traces], final)
    if final is not None and math.isfinite(final.value):
        axes.axhline(final.value, color=SOFT.light, linewidth=0.9, zorder=1)
        if bounded(fit):
            top = final.value + max(fit.certificate.limit, 0.0)
            axes.axhspan(final.value, top, color=SOFT.light, alpha=0.22, linewidth=0, zorder=0)
            # A band that is far too high for the panel says no more than one that leaves it.
            high = max(high, min(top + 0.05 * (high - low), high + (high - low)))
    axes.set_ylim(low, high)
    axes.set_title(plain(fit.guide.name + ("" if climbs(fit) else ": log evidence")), color=look.text.light)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.03)
    hidden = [trace for trace in fit.traces if not trace.elbo[-1] >= low]
    if hidden:
        axes.text(
            0.98,
            0.04,
            f"{len(hidden)} of {len(fit.traces)} {_lines(fit)} {'are' if _lines(fit) == 'optima' else 'ended'} below",
            transform=axes.transAxes,
            ha="right",
            fontsize=8,
            color=SOFT.light,
        )
    if not fit.status.has_optimum:
        return f"{fit.guide.name}: {ended(fit)}; where its lines end is when it was stopped"
    ends = [f"{trace.elbo[-1]:.1f}" for trace in fit.traces]
    if not climbs(fit):
        return f"{fit.guide.name}: {ended(fit)}; its approximate log evidence ended at {', '.join(ends)} nats"
    one = _lines(fit) == "optima" and len(ends) == 1
    where = "its climb ended" if one else "its climbs ended" if _lines(fit) == "optima" else "its starts ended"
    return f"{fit.guide.name}: {ended(fit)}; {where} at {', '.join(ends)} nats"


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
