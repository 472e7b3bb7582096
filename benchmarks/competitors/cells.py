"""One cell of the table in a process of its own: a solver on a posterior, cold and warm, and the ELBO where it ended.

`solvers.py` starts it, with empty caches and a folder, and ends it where a run exceeds its limit.

    python -m competitors.cells POSTERIOR GUIDE SOLVER FOLDER --runs cold,warm --limit 600 --seed 0

In the folder: `running` while a run is under way, `<run>.pickle` with what it gave, and in the end `cell.json`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import pickle
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from competitors.gaussians import DRAWS, Space, measurer
from competitors.runs import Clock, Problem, Run, Solver

RUNS = ("cold", "warm")
_MEMORY = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_PROGRAMS = ("posteriors", "targets_large")


def load(posterior: str) -> Any:
    """The model of that name: from `posteriors`, the larger targets, or the curated models.

    Raises:
        ValueError: There is none.
    """
    import models

    for module in _programs():
        if posterior in module.names():
            return module.load(posterior)
    check_names([posterior])
    return models.load(posterior).model()


def check_names(posteriors: Sequence[str]) -> None:
    """Nothing, if each names a model that `load` finds.

    Raises:
        ValueError: One does not.
    """
    import models

    known = [*(name for module in _programs() for name in module.names()), *models.names()]
    for posterior in posteriors:
        if posterior not in known:
            like = [name for name in known if posterior in name] or known
            raise ValueError(f"Expected a posterior's name, such as {', '.join(like)}; got '{posterior}'.")


def _programs() -> list[Any]:
    return [importlib.import_module(name) for name in _PROGRAMS if importlib.util.find_spec(name)]


def memory(field: str) -> float | None:
    """This process's `VmRSS` (now) or `VmHWM` (its peak) in MB; None where the system does not tell."""
    if not _MEMORY.is_file():
        return None
    for line in _MEMORY.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) / 1024
    return None


def reset_peak() -> bool:
    """Whether the system let `VmHWM` begin anew at what the process holds now, as `proc(5)` says that 5 does."""
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def missing(solver: Solver) -> list[str]:
    """Packages that the solver needs and that are not installed."""
    return [package for package in solver.packages if importlib.util.find_spec(package) is None]


def versions(solver: Solver) -> str:
    """The versions of what the solver is made of."""
    packages = {"elbowroom": "elbowroom", "numpyro": "numpyro", "blackjax": "blackjax", "pymc": "pymc pymc-extras"}
    named = []
    for package in f"{packages[solver.name.partition('_')[0]]} jax".split():
        try:
            named.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            named.append(f"{package} from source")
    return ", ".join(named)


def run_solver(solver: Solver, problem: Problem, folder: Path, *, runs: list[str], limit: float, seed: int) -> None:
    """The solver called once for each run; each result is left in the folder at once."""
    import jax

    solve = solver.prepare(problem)
    jax.block_until_ready(jax.numpy.zeros(1) + 1)  # the backend starts here, not in somebody's seconds
    for number, run in enumerate(runs):
        marker = folder / "running"
        before = memory("VmRSS") if reset_peak() else None
        marker.write_text(run)
        clock = Clock(limit)
        outcome = solve(seed + number, clock)
        seconds = outcome.snapshots[-1].seconds if outcome.snapshots else clock.seconds
        marker.unlink()
        peak = memory("VmHWM")
        added = None if peak is None or before is None else peak - before
        (folder / f"{run}.pickle").write_bytes(pickle.dumps((outcome, seconds, added)))


def measured(problem: Problem, outcome: Run, seconds: float, peak: float | None, *, measure: Any) -> dict[str, Any]:
    """One run as a row: where it ended, what it cost, and the path there."""
    path = [(s.steps, round(s.seconds, 4), measure(s.gaussian)) for s in outcome.snapshots]
    row: dict[str, Any] = {
        "status": "cut" if outcome.cut else "done" if path else "no result",
        "seconds": round(seconds, 4),
        "gradient_evaluations": outcome.gradient_evaluations,
        "peak_mb": None if peak is None else round(peak, 1),
        "note": outcome.note,
    }
    if path:
        steps, _, elbo = path[-1]
        row |= {"steps": steps, "elbo": round(elbo.value, 5), "se": round(elbo.se, 5), "draws": elbo.draws}
        row["path"] = " ".join(f"{steps}:{seconds}:{elbo.value:.4f}" for steps, seconds, elbo in path)
    return row


def _without_runs(arguments: list[str]) -> list[str]:
    """The same arguments, with nothing to run."""
    kept = list(arguments)
    if "--runs" in kept:
        place = kept.index("--runs")
        del kept[place : place + 2]
    return [*kept, "--runs", ""]


def main() -> None:
    """Run the solver, then measure every result that the folder has."""
    from competitors import SOLVERS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("posterior")
    parser.add_argument("guide")
    parser.add_argument("solver", choices=list(SOLVERS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", default=",".join(RUNS), help="comma-separated; empty to measure only")
    parser.add_argument("--limit", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=DRAWS)
    given = parser.parse_args()
    solver = SOLVERS[given.solver]
    model = load(given.posterior)
    problem = Problem(given.posterior, model, given.guide, Space.of_model(model))
    runs = [run for run in given.runs.split(",") if run]
    if runs:
        run_solver(solver, problem, given.folder, runs=runs, limit=given.limit, seed=given.seed)
        if not solver.in_float64:
            # Measured in a process that has never seen float32: JAX 0.12 hands constants of one precision to programs
            # of the other where a model is traced in both.
            os.execv(sys.executable, [sys.executable, "-m", "competitors.cells", *_without_runs(sys.argv[1:])])
    if solver.verify:
        solver.verify(problem)
    measure = measurer(model, problem.space, draws=given.draws)
    rows = {}
    for run in RUNS:
        kept = given.folder / f"{run}.pickle"
        if kept.exists():
            outcome, seconds, peak = pickle.loads(kept.read_bytes())
            rows[run] = measured(problem, outcome, seconds, peak, measure=measure) | {"version": versions(solver)}
    (given.folder / "cell.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
