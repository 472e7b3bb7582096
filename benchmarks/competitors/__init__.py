"""Solvers of the same densities, side by side: what each is called, needs, and can fit."""

from __future__ import annotations

from competitors import blackjax_vi, elbowroom_fit, numpyro_svi, pymc_vi
from competitors.runs import Solver

SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (*elbowroom_fit.SOLVERS, *numpyro_svi.SOLVERS, *blackjax_vi.SOLVERS, *pymc_vi.SOLVERS)
}
"""In the order in which a posterior and guide's cells are run and shown."""

GRID = tuple(solver.name for solver in numpyro_svi.GRID)
"""The members of the step-size grid."""
