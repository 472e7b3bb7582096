"""Solvers side by side on the same densities: how far from the family's optimum, in how long, with how much work.

    python benchmarks/solvers.py [POSTERIOR ...] [--solvers elbowroom numpyro ...] [--guides mean_field ...]
                                 [--limit 600] [--out benchmarks/solvers.csv] [--summary] [--ratios FILE.csv]

Competitors other than NumPyro come with the extra `bench`; without them their cells say `not installed`.

**A cell** is a posterior, a guide and a solver, in a process of its own with empty caches of compiled programs (JAX's,
PyTensor's, Numba's). It has two rows. *cold*: imports are done, the model and its data exist, nothing is compiled; the
seconds hold tracing, compiling and running. *warm*: the same call again in that process with the next seed; what the
solver traces anew it traces anew, and compiled programs come from memory or from the cache. A call that exceeds the
limit is ended and shown as `>600`. Cells run one after another, all solvers of a posterior and guide in one go, so
that a machine's noise is theirs in common; rows are written at once, and what is there is not run again.

**How far a solver ended** is measured by one estimator for all: the Gaussian that it stands for, in the model's
unconstrained space in float64, the mean of log p - log q over up to 200,000 draws common to all solvers. A quadratic of
the draws' noise is taken out, whose mean is known for any Gaussian; it comes from 4,000 draws of its own, so that the
error shrinks and nothing else changes. `nats` is the yardstick's optimum (`yardsticks.csv`) minus that; it is too small
by about the yardstick's `newton_gap` where the `note` there says that it has not arrived. Not in the seconds.

**Arrived** has one meaning for all, elbowroom included: `nats` at most 0.1 plus three standard errors, and at most 0.2.
The error is the row's own, at its end; near the optimum it is about that of the looks before, on the same draws.
The cap is there because a run that diverged has a large error, by which it must not arrive; an error that is no number
counts for nothing. A run is looked at after doubled steps, so that its first look within the target may come as late as
twice the arrival. The arrival is therefore put between that look and the one before, where the logarithm of the
distance would cross the target if it fell evenly; a look nearer than 0.01 nats counts as 0.01. That is sooner than by
distances themselves, and so in the competitor's favour; a path's first look stands as it is. It matters little: on one
table the grid's times shrank by 3 %, and would have by 7 % had the look before been the arrival.

**Solvers.** `elbowroom`: `toolkit.fit(model, guide, key=..., tolerance=0.1)`. `numpyro_2000`, `numpyro_20000`: SVI as
tutorials write it (Adam 1e-2, one draw, float32). `numpyro_grid_*`: up to 200,000 steps at each of four step sizes in
float64, looked at after 1,000, 2,000, 4,000, ... steps; `numpyro_grid_best` is the member that arrived first, and the
other members and all looking are free; once one has arrived, others run no longer than it took (status `outrun`), for
none of them could be the first. The grid has no warm rows. `blackjax_*`: mean-field and full-rank VI with Adam 1e-2 and
10,000 steps of 100 draws, and Pathfinder. `pymc_*`: ADVI, full-rank ADVI, DADVI and Pathfinder at their defaults, for
posteriors with a PyMC program, whose density is compared with the model's in each cell. Pathfinder's Gaussians are in
no family of ours but full rank, and stand there.

**Columns.** `seconds_to_target`: until it arrived, or, with `>`, how long it ran without getting there. `draws`:
averaged for `elbo`. `gradient_evaluations`: draws times steps (for elbowroom, its starts included). `peak_mb`: the most
resident memory during the call minus that before it, cold and warm each for itself; empty where the system does not let
its mark be reset; processes that a solver starts are not in it. `path`: steps, seconds and ELBO at each look. `status`:
done; cut (the limit came before the budget was spent); over limit; not run (the cold call was over the limit); outrun;
no result; failed. Rows without `draws` are of an earlier measurement: their `elbo` is the plain mean, with a larger
error, and their `peak_mb` the process's peak so far, imports included, minus what it held before the cold call.

**Summary.** Geometric means of ratios of seconds over posteriors and guides, of rows measured on one day. Cells with
`>` enter at their limit, and make the mean a lower bound. `--ratios` writes the ratios themselves, a line for each
posterior and guide, rounded for reading.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
from competitors import GRID, SOLVERS
from competitors.cells import RUNS, check_names, missing
from competitors.results import (
    GRID_BEST,
    OUTRUN,
    Cell,
    Row,
    Seconds,
    Summary,
    cell_of,
    completed,
    is_finished,
    ratio_of,
    read_optima,
    read_rows,
    readable,
    summarise,
    with_grid_best,
    write_rows,
)

HERE = Path(__file__).resolve().parent
GUIDES = ("mean_field", "low_rank", "full_rank")
_GRACE = 5.0  # seconds over the limit in which a solver that works in blocks may stop by itself
_SHOWN = ("nats", "se", "cold", "warm", "to target", "gradient evaluations", "peak MB", "status", "note")
_BARS = {  # solver, run and seconds that stand over elbowroom's
    "grid to target": (GRID_BEST, "cold", "seconds_to_target"),
    "20000 steps cold": ("numpyro_20000", "cold", "seconds"),
    "20000 steps warm": ("numpyro_20000", "warm", "seconds"),
    "ADVI cold": ("pymc_advi", "cold", "seconds"),
}
_RATIOS = ("posterior", "guide", "fit cold (s)", "fit warm (s)", "nats", *_BARS)


def cells(posteriors: Sequence[str], guides: Sequence[str], solvers: Sequence[str]) -> list[Cell]:
    """What there is to run, all solvers of a posterior and guide in a row."""
    return [
        (posterior, guide, name)
        for posterior in posteriors
        for guide in guides
        for name in solvers
        if guide in SOLVERS[name].guides and SOLVERS[name].covers(posterior)
    ]


def chosen_solvers(names: Sequence[str]) -> list[str]:
    """Solvers by name, or by the first part of it, such as `pymc`; all if none is named.

    Raises:
        ValueError: A name fits no solver.
    """
    for name in names:
        if not any(_is_called(solver, name) for solver in SOLVERS):
            raise ValueError(f"Expected a solver's name or its first part, of {', '.join(SOLVERS)}; got '{name}'.")
    return [solver for solver in SOLVERS if not names or any(_is_called(solver, name) for name in names)]


def _is_called(solver: str, name: str) -> bool:
    return solver == name or solver.startswith(f"{name}_")


def measure(cell: Cell, *, limit: float, seed: int, draws: int) -> list[dict[str, Any]]:
    """The two rows of a cell, whatever becomes of it."""
    posterior, guide, name = cell
    today = date.today().isoformat()
    given = {"posterior": posterior, "guide": guide, "solver": name, "limit": f"{limit:g}", "day": today}
    runs = runs_of(name)
    absent = missing(SOLVERS[name])
    if absent:
        told = {"status": "not installed", "note": ", ".join(absent)}
        return [given | {"run": run, "seed": seed + number} | told for number, run in enumerate(runs)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        options = ["--limit", f"{limit}", "--seed", f"{seed}", "--draws", f"{draws}"]
        command = [sys.executable, "-m", "competitors.cells", *cell, str(folder), *options]
        error, over = _watch([*command, "--runs", ",".join(runs)], folder, limit=limit)
        stopped_in = next((run for run in runs if not (folder / f"{run}.pickle").exists()), "")
        if stopped_in == RUNS[1]:  # the first run's result is there, and not yet measured
            measuring_error, _ = _watch([*command, "--runs", ""], folder, limit=limit)
            error = error or measuring_error
        kept = folder / "cell.json"
        found = json.loads(kept.read_text()) if kept.exists() else {}
    rows = []
    for number, run in enumerate(runs):
        row = given | {"run": run, "seed": seed + number}
        if run in found:
            row |= found[run]
            row["seconds"] = str(Seconds(row["seconds"], censored=row["status"] == "cut"))
        elif over and run == stopped_in:
            row |= {"status": "over limit", "seconds": str(Seconds(limit, censored=True))}
        elif over:
            row |= {"status": "not run"}
        else:
            row |= {"status": "failed", "note": error}
        rows.append(row)
    return rows


def _watch(command: Sequence[str], folder: Path, *, limit: float) -> tuple[str, bool]:
    """The last line of what a process that failed had to say, and whether it was ended for a run over the limit."""
    caches = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",  # as in `toolkit.compilation`, for all alike
        "ELBOWROOM_CACHE": str(folder / "elbowroom"),
        "PYTENSOR_FLAGS": f"base_compiledir={folder / 'pytensor'}",
        "NUMBA_CACHE_DIR": str(folder / "numba"),
    }
    marker, log = folder / "running", folder / "log"
    with log.open("w") as told:
        process = subprocess.Popen(
            command,
            cwd=HERE,
            env={**os.environ, **caches},
            stdout=subprocess.DEVNULL,
            stderr=told,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                time.sleep(0.05)
                if _age(marker) > limit + _GRACE:
                    return "", True
        finally:
            # Also what the solver started, and also when the user interrupts.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            marker.unlink(missing_ok=True)
    lines = log.read_text().strip().splitlines()
    return (lines[-1] if lines else f"exit {process.returncode}") if process.returncode else "", False


def runs_of(solver: str) -> tuple[str, ...]:
    """Which calls of a solver are measured."""
    return RUNS[:1] if solver in GRID else RUNS


def outrun_after(rows: Sequence[Row], cell: Cell) -> float:
    """The seconds after which a member of the step-size grid can no longer be the first to arrive; else infinity."""
    posterior, guide, name = cell
    if name not in GRID:
        return math.inf
    siblings = [row for row in rows if cell_of(row)[:2] == (posterior, guide) and row["solver"] in GRID]
    times = [Seconds.read(row["seconds_to_target"]) for row in siblings if row["run"] == RUNS[0]]
    return min((time.value for time in times if time and not time.censored), default=math.inf)


def is_over(row: Row) -> bool:
    """Whether the limit ended a run, or left it no time to begin."""
    return row["status"] in ("cut", "over limit", "not run")


def _age(marker: Path) -> float:
    """Seconds since a run began; minus infinity between runs."""
    try:
        return time.time() - marker.stat().st_mtime
    except FileNotFoundError:
        return -float("inf")


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """One line for each cell, cold and warm side by side; nats, work and memory are the cold run's."""
    both: dict[Cell, dict[str, Row]] = {}
    for row in rows:
        both.setdefault(cell_of(row), {})[row["run"]] = row
    lines = {}
    for cell, runs in both.items():
        cold, warm = runs.get("cold", {}), runs.get("warm", {})
        lines[cell] = [
            *(_rounded(cold.get("nats", ""), 2), _rounded(cold.get("se", ""), 2)),
            *(cold.get("seconds", ""), warm.get("seconds", ""), cold.get("seconds_to_target", "")),
            *(cold.get("gradient_evaluations", ""), _rounded(cold.get("peak_mb", ""), 0)),
            *(cold.get("status", ""), cold.get("note", "")),
        ]
    posteriors = list(dict.fromkeys(posterior for posterior, _, _ in lines))
    order = [*SOLVERS, GRID_BEST]
    index = sorted(lines, key=lambda cell: (posteriors.index(cell[0]), GUIDES.index(cell[1]), order.index(cell[2])))
    names = pd.MultiIndex.from_tuples(index, names=["posterior", "guide", "solver"])
    return pd.DataFrame([lines[cell] for cell in index], index=names, columns=list(_SHOWN))


def _rounded(text: str, digits: int) -> str:
    # Adding zero turns -0.00 into 0.00.
    return f"{round(float(text), digits) + 0.0:.{digits}f}" if text else ""


def summaries(rows: Sequence[Row]) -> list[Summary]:
    """The ratios that matter."""
    return [summarise(rows, solver=solver, run=run, column=column) for solver, run, column in _BARS.values()]


def ratios(rows: Sequence[Row]) -> list[dict[str, str]]:
    """A line for each posterior and guide that elbowroom was run on: its seconds and nats, and how many times as long.

    What `summaries` takes means of, rounded; empty where it leaves a cell out, and with `>` where the ratio can only be
    larger.
    """
    by_run = {(*cell_of(row), row["run"]): row for row in rows}
    posteriors = list(dict.fromkeys(row["posterior"] for row in rows))
    own = {cell_of(row)[:2] for row in rows if row["solver"] == "elbowroom"}
    lines = []
    for cell in sorted(own, key=lambda cell: (posteriors.index(cell[0]), GUIDES.index(cell[1]))):
        ours = {run: by_run.get((*cell, "elbowroom", run), {}) for run in RUNS}
        posterior, guide = cell
        line = {"posterior": posterior.rpartition("-")[2], "guide": guide}  # the program's part of its name
        line |= {f"fit {run} (s)": _readable_seconds(row.get("seconds", "")) for run, row in ours.items()}
        line["nats"] = _rounded(ours["cold"].get("nats", ""), 2)
        for name, (solver, run, column) in _BARS.items():
            theirs = by_run.get((*cell, solver, run))
            ratio = ratio_of(theirs, ours[run], column)[1] if theirs and ours[run] else None
            line[name] = "" if ratio is None else str(ratio)
        lines.append(line)
    return lines


def _readable_seconds(text: str) -> str:
    seconds = Seconds.read(text)
    return f"{'>' if seconds.censored else ''}{readable(seconds.value)}" if seconds else ""


def write_ratios(path: Path, rows: Sequence[Row]) -> None:
    """The `ratios` as a file for a table in the documentation, where a `>` would begin a quotation."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, _RATIOS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: text.replace(">", "≥ ") for name, text in line.items()} for line in ratios(rows))


def show(rows: Sequence[Row]) -> None:
    """Print table and summary."""
    if rows:
        print(table(rows).to_string())
    print()
    for summary in summaries(rows):
        print(summary)


def main() -> None:
    """Run what is missing, write it, print all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("posteriors", nargs="*", help="names of benchmarks/posteriors.py (all if none) or of `models`")
    parser.add_argument("--solvers", nargs="+", default=[], help="names, or first parts such as numpyro or pymc")
    parser.add_argument("--guides", nargs="+", choices=GUIDES, default=list(GUIDES))
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for one call of a solver")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=200_000, help="for an ELBO, at most")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--yardsticks", type=Path, default=HERE / "yardsticks.csv")
    parser.add_argument("--again", action="store_true", help="run the chosen cells though they are there")
    parser.add_argument("--summary", action="store_true", help="run nothing: complete, print and sum up what is there")
    parser.add_argument("--ratios", type=Path, help="a file for the ratios of each posterior and guide")
    given = parser.parse_args()
    optima = read_optima(given.yardsticks)
    rows = [completed(row, optima) for row in read_rows(given.out)]
    if not given.summary:
        try:
            check_names(given.posteriors)
            wanted = cells(given.posteriors or all_posteriors(), given.guides, chosen_solvers(given.solvers))
        except ValueError as wrong:
            parser.error(str(wrong))
        todo = [cell for cell in wanted if given.again or not is_finished(rows, cell, limit=given.limit)]
        for number, cell in enumerate(todo, start=1):
            limit = min(given.limit, outrun_after(rows, cell))
            found = measure(cell, limit=limit, seed=given.seed, draws=given.draws)
            if limit < given.limit:
                found = [row | {"status": OUTRUN} if is_over(row) else row for row in found]
            rows = [row for row in rows if cell_of(row) != cell] + [completed(row, optima) for row in found]
            write_rows(given.out, rows)
            cold = rows[-len(found)]
            print(f"[{number}/{len(todo)}] {' '.join(cell)}: {cold['status']} {cold['seconds']} s", flush=True)
    write_rows(given.out, rows)
    everything = with_grid_best(rows, GRID)
    show(everything)
    if given.ratios:
        write_ratios(given.ratios, everything)


def all_posteriors() -> list[str]:
    """The names of `benchmarks/posteriors.py`.

    Raises:
        ValueError: There is no such file.
    """
    if importlib.util.find_spec("posteriors") is None:
        raise ValueError("Expected benchmarks/posteriors.py; there is none: name curated models on the command line.")
    return list(importlib.import_module("posteriors").names())


if __name__ == "__main__":
    # Being ended becomes an exception, as the keyboard's interruption is: a cell's process must not outlive this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    main()
