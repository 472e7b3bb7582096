"""This project's own `fit`, at its defaults."""

from __future__ import annotations

from competitors.numpyro_svi import guide_gaussian
from competitors.runs import Clock, Problem, Run, Snapshot, Solve, Solver


def prepare(problem: Problem) -> Solve:
    """`toolkit.fit` as a user calls it."""
    import jax

    from toolkit import fit

    def solve(seed: int, clock: Clock) -> Run:
        fitted = fit(problem.model, problem.guide, key=jax.random.PRNGKey(seed), tolerance=0.1)
        seconds = clock.seconds
        evaluations = int(fitted.cost.gradient_evaluations)
        if not fitted.params:
            return Run((), evaluations, note=fitted.status.name)
        gaussian = guide_gaussian(fitted.autoguide, fitted.params, problem.space)
        return Run((Snapshot(0, seconds, gaussian),), evaluations, note=fitted.status.name)

    return solve


SOLVERS = (Solver("elbowroom", ("mean_field", "low_rank", "full_rank"), prepare, in_float64=True),)
