"""Whether the reference may be trusted, in four panels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from scipy.stats import rankdata

from toolkit.reporting.contents import Picture
from toolkit.reporting.figures.canvas import MANY_MARKS, blank, plain, styled
from toolkit.reporting.palette import BAND, DOTS, INK, RIGHT, SOFT
from toolkit.sampling.diagnostics import ESS_LIMIT, RHAT_LIMIT, rounded_rhat

_DASHES = ("-", "--", "-.", ":")
_POINTS = 200


def reference_health(reference: Any, worst: str, draws: np.ndarray) -> Picture:
    """R-hat against ESS of all quantities; ranks, log density and energy by chain.

    Args:
        reference: The reference, with its diagnostics.
        worst: The quantity with the largest R-hat.
        draws: Its draws, `(chain, draw)`.
    """
    panels = [lambda axes: _rhat_and_ess(axes, reference), lambda axes: _ranks(axes, worst, draws, reference)]
    if reference.log_density is not None:
        panels.append(lambda axes: _log_density(axes, reference.log_density))
    if reference.energy is not None:
        panels.append(lambda axes: _energy(axes, reference.energy))
    rows = math.ceil(len(panels) / 2)
    with styled():
        figure, grid = blank(8.8, 0.2 + 2.75 * rows, rows, 2)
        for axes, draw in zip(grid.flat, panels, strict=False):
            draw(axes)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
    table = reference.diagnostics
    alt = (
        f"Reference: largest R-hat {rounded_rhat(float(table['rhat'].max()))} ({worst}), smallest bulk ESS "
        f"{table['ess_bulk'].min() // 1:,.0f}, "
        f"smallest tail ESS {table['ess_tail'].min() // 1:,.0f}"
        f"{'' if reference.divergences is None else f', {reference.divergences:,} divergences'}."
    )
    reading = (
        "Top left: every quantity should lie in the shaded corner. Ranks: each line is a chain's "
        "share of small ranks less what it would be "
        "if all chains agreed; lines should stay in the grey band, where all of them lie with 95 % if they do. "
        "Log density: chains at one level sit in one mode. Energy: the outlined shape should be "
        "about as wide as the filled one."
    )
    return Picture("reference_health", figure, alt, reading)


def _rhat_and_ess(axes: Axes, reference: Any) -> None:
    table = reference.diagnostics
    ess = table[["ess_bulk", "ess_tail"]].min(axis=1).to_numpy(dtype=float)
    excess = np.maximum(table["rhat"].to_numpy(dtype=float) - 1, 1e-5)
    finite = np.isfinite(ess) & np.isfinite(excess)
    ess, excess = ess[finite], excess[finite]
    low, high = min([*ess, ESS_LIMIT / 2]) / 1.3, max([*ess, 2 * ESS_LIMIT]) * 1.3
    bottom, top = min([*excess, 1e-3]) / 1.5, max([*excess, 0.02]) * 2
    axes.fill_between([ESS_LIMIT, high], bottom, RHAT_LIMIT - 1, color=RIGHT.light)
    axes.plot(
        ess,
        excess,
        "o",
        color=INK.light,
        markersize=3.2,
        alpha=0.6,
        markeredgewidth=0,
        rasterized=ess.size > MANY_MARKS,
    )
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, top))
    ticks = [t for t in (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0) if bottom <= t <= top]
    axes.set_yticks(ticks, [f"{1 + t:.10g}" for t in ticks])
    steps = [t for t in (1, 4, 10, 40, 100, 400, 1_000, 4_000, 10_000, 40_000, 100_000) if low <= t <= high]
    axes.set_xticks(steps, [f"{t:,}" for t in steps])
    axes.minorticks_off()
    axes.set_title("R-hat and ESS of every quantity")
    axes.set_xlabel("smaller of bulk and tail ESS (draws, log)")
    axes.set_ylabel("R-hat (log of R-hat − 1)")


def _ranks(axes: Axes, worst: str, draws: np.ndarray, reference: Any) -> None:
    """Each chain's ECDF of fractional ranks among all draws, minus the diagonal.

    The band is Dvoretzky, Kiefer and Wolfowitz's with Massart's constant at the chain's share of the effective draws,
    shared among the chains by Bonferroni.
    """
    chains, count = draws.shape
    ranks = rankdata(draws.ravel()).reshape(draws.shape) / draws.size
    points = np.linspace(0, 1, _POINTS)
    effective = float(reference.diagnostics["ess_bulk"].get(worst, draws.size))
    effective = max(min(effective, draws.size) / chains, 1.0) if math.isfinite(effective) else count
    band = math.sqrt(math.log(2 * chains / 0.05) / (2 * effective))
    axes.fill_between([0, 1], -band, band, color=BAND.light, linewidth=0)
    reach = band
    for chain in range(chains):
        difference = np.searchsorted(np.sort(ranks[chain]), points, side="right") / count - points
        reach = max(reach, float(np.abs(difference).max()))
        axes.plot(points, difference, _DASHES[chain % len(_DASHES)], color=INK.light, linewidth=0.9)
    axes.set(xlim=(0, 1), ylim=(-1.25 * reach, 1.25 * reach))
    axes.set_title(f"Ranks by chain: {plain(worst, 30)}")
    axes.set_xlabel("rank among all draws (share)")
    axes.set_ylabel("ECDF − rank")


def _log_density(axes: Axes, log_density: np.ndarray) -> None:
    chains, count = log_density.shape
    every = max(1, count // 120)
    for chain in range(chains):
        at = chain * count + np.arange(count)[::every]
        axes.plot(at, log_density[chain, ::every], color=INK.light if chain % 2 == 0 else DOTS.light, linewidth=0.6)
        axes.plot(
            [chain * count, (chain + 1) * count], [np.median(log_density[chain])] * 2, color=SOFT.light, linewidth=1.6
        )
    axes.set_xticks((np.arange(chains) + 0.5) * count, [str(c + 1) for c in range(chains)])
    axes.margins(x=0.01)
    axes.set_title("Log density by chain")
    axes.set_xlabel("chain, its draws from left to right")
    axes.set_ylabel("log p(x, z) (nats)")


def _energy(axes: Axes, energy: np.ndarray) -> None:
    marginal = (energy - energy.mean()).ravel()
    changes = np.diff(energy, axis=1).ravel()
    low, high = np.quantile(np.concatenate([marginal, changes]), [0.001, 0.999])
    edges = np.linspace(float(low), float(high), 46).tolist()
    axes.hist(marginal, edges, density=True, color=BAND.light)
    axes.hist(changes, edges, density=True, histtype="step", color=INK.light, linewidth=1)
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.text(0.02, 0.93, "filled: all draws", transform=axes.transAxes, fontsize=8, color=SOFT.light)
    axes.text(0.02, 0.84, "outlined: change per draw", transform=axes.transAxes, fontsize=8, color=SOFT.light)
    axes.set_title("Energy")
    axes.set_xlabel("energy − mean, and its change per draw (nats)")
