"""The table's rows: kept in a CSV file, completed from the yardsticks, and summed up in a few ratios."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGET = 0.1  # nats from the family's optimum at which a solver has arrived
_ERRORS = 3  # standard errors that an ELBO may lie beyond it
_NEAREST = TARGET / 10  # nats: as near as the looks' errors let one tell, see `_arrival`
GRID_BEST = "numpyro_grid_best"
COLUMNS = (
    *("posterior", "guide", "solver", "run", "status", "nats", "elbo", "se", "optimum", "seconds", "seconds_to_target"),
    *("draws", "steps", "gradient_evaluations", "peak_mb", "limit", "seed", "version", "day", "note", "path"),
)
OUTRUN = "outrun"  # ended once a sibling in the step-size grid had arrived sooner
REPEATED = ("failed", "not installed")  # a cell that ended so is run again

Row = dict[str, str]
Cell = tuple[str, str, str]


def readable(value: float) -> str:
    """A positive number with two significant digits, or all that stand before the point."""
    places = max(0, 1 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{places}f}"


@dataclass(frozen=True)
class Seconds:
    """A time, or, written with `>`, what it exceeds."""

    value: float
    censored: bool = False

    @classmethod
    def read(cls, text: str) -> Seconds | None:
        """From a table's cell; None if that is empty."""
        return cls(float(text.removeprefix(">")), text.startswith(">")) if text else None

    def __str__(self) -> str:
        return f"{'>' if self.censored else ''}{self.value:.4g}"


@dataclass(frozen=True)
class Ratio:
    """How many times as long; `bound` where the true figure can only be larger."""

    value: float
    bound: bool = False

    def __str__(self) -> str:
        return f"{'>' if self.bound else ''}{readable(self.value)}"


@dataclass(frozen=True)
class Summary:
    """A geometric mean of ratios.

    Attributes:
        title: What was divided by what.
        mean: Geometric mean; None without cells. Censored cells enter at their limit.
        cells: How many entered.
        bounds: How many of them are lower bounds, which makes a lower bound of the mean.
        left_out: Why other cells did not enter, and how many.
    """

    title: str
    mean: float | None
    cells: int
    bounds: int
    left_out: Mapping[str, int]

    def __str__(self) -> str:
        mean = "-" if self.mean is None else f"{'>' if self.bounds else ''}{self.mean:.3g}"
        reasons = "".join(f"; left out: {count} {reason}" for reason, count in self.left_out.items() if count)
        return f"{self.title}: {mean} ({self.cells} cells, {self.bounds} of them lower bounds{reasons})"


def read_rows(path: Path) -> list[Row]:
    """What the file holds; nothing if there is none."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """The file, written beside its place and moved there, so that an interruption leaves the old one."""
    beside = path.with_suffix(".part")
    with beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    beside.replace(path)


def is_finished(rows: Sequence[Row], cell: Cell, *, limit: float) -> bool:
    """Whether a cell need not be run: it is there, did not fail, and was not cut off by a shorter limit than now."""
    own = [row for row in rows if cell_of(row) == cell]
    if not own or any(row["status"] in REPEATED for row in own):
        return False
    cut = [row for row in own if row["seconds"].startswith(">") and row["status"] != OUTRUN]
    return not any(float(row["limit"]) < limit for row in cut)


def cell_of(row: Mapping[str, str]) -> Cell:
    """Posterior, guide and solver."""
    return row["posterior"], row["guide"], row["solver"]


def read_optima(path: Path) -> dict[tuple[str, str], float]:
    """The best ELBO in nats by posterior and guide; empty if there is no file yet."""
    return {(row["posterior"], row["guide"]): float(row["elbo"]) for row in read_rows(path)}


def completed(row: Mapping[str, Any], optima: Mapping[tuple[str, str], float]) -> Row:
    """A row with what follows from the yardstick: its optimum, the nats to it, and the seconds until close to it."""
    text = {column: "" if row.get(column) is None else str(row.get(column, "")) for column in COLUMNS}
    optimum = optima.get((text["posterior"], text["guide"]))
    for column in ("optimum", "nats", "seconds_to_target"):
        text[column] = ""
    if optimum is None:
        return text
    text["optimum"] = f"{optimum:.4f}"
    if text["elbo"]:
        text["nats"] = f"{optimum - float(text['elbo']):.4f}"
    ended = Seconds.read(text["seconds"])
    if ended:
        arrival = _arrival(text["path"], optimum, _number(text["se"]))
        text["seconds_to_target"] = str(arrival or Seconds(ended.value, censored=True))
    return text


def has_arrived(nats: float, se: float) -> bool:
    """Whether an ELBO so far below the optimum has reached the target: one rule for every solver, ours included."""
    return nats <= reach(se)


def reach(se: float) -> float:
    """How many nats below the optimum an ELBO with that standard error may seem to lie and have arrived.

    The target and three errors, but at most the target twice, and no errors where there is no number: a run that
    diverged has a large error or none, and must not arrive by it.
    """
    return TARGET + (min(_ERRORS * se, TARGET) if math.isfinite(se) else 0.0)


def _arrival(path: str, optimum: float, se: float) -> Seconds | None:
    """When a path came within reach: between its first look there and the look before, if there is one.

    Between two looks the logarithm of the distance is taken to fall evenly, which puts the arrival earlier than a
    straight line between the distances would. A look nearer than a tenth of the target counts as being just there.
    """
    before = None
    for point in path.split():
        _, seconds, elbo = point.split(":")
        look = float(seconds), optimum - float(elbo)
        if has_arrived(look[1], se):
            return Seconds(look[0] if before is None else _crossing(before, look, reach(se)))
        before = look
    return None


def _crossing(before: tuple[float, float], after: tuple[float, float], distance: float) -> float:
    """The seconds at which a distance is crossed, between two looks `(seconds, distance)`."""
    if not math.isfinite(before[1]):
        return after[0]  # from a density of zero there is no known way down
    share = math.log(before[1] / distance) / math.log(before[1] / max(after[1], _NEAREST))
    return before[0] + share * (after[0] - before[0])


def _number(text: str) -> float:
    return float(text or "nan")


def grid_best(members: Sequence[Row]) -> Row:
    """The member of a step-size grid that came within the target first; the highest ELBO if none did.

    It is the member that one would have taken had one known: nothing is charged for the others. If none arrived, the
    time is a lower bound: the least that any of them ran, diverged ones apart.

    Args:
        members: Rows of one posterior, guide and run.
    """
    reached = [(Seconds.read(row["seconds_to_target"]), row) for row in members]
    arrived = [(seconds.value, row) for seconds, row in reached if seconds and not seconds.censored]
    if arrived:
        best = min(arrived, key=lambda pair: pair[0])[1]
        seconds_to_target = best["seconds_to_target"]
    else:
        best = max(members, key=lambda row: float(row["elbo"] or "-inf"))
        usable = [s.value for s, row in reached if s and math.isfinite(float(row["elbo"] or "nan"))]
        usable = usable or [s.value for s, _ in reached if s]
        seconds_to_target = str(Seconds(min(usable), censored=True)) if usable else ""
    return {**best, "solver": GRID_BEST, "seconds_to_target": seconds_to_target, "note": best["solver"]}


def with_grid_best(rows: Sequence[Row], grid: Sequence[str]) -> list[Row]:
    """The rows, and one more for each posterior, guide and run of which all members of the grid are there."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["solver"] in grid:
            groups.setdefault((row["posterior"], row["guide"], row["run"]), []).append(row)
    whole = [group for group in groups.values() if len(group) == len(grid)]
    return [*rows, *(grid_best(group) for group in whole)]


def geometric_mean(ratios: Sequence[Ratio]) -> float | None:
    """The geometric mean, lower bounds entering at their value; None without ratios."""
    if not ratios:
        return None
    return math.exp(sum(math.log(ratio.value) for ratio in ratios) / len(ratios))


def summarise(rows: Sequence[Row], *, solver: str, run: str, column: str = "seconds") -> Summary:
    """How many times elbowroom's seconds a solver took, over the posteriors and guides that both have.

    Only rows of one day are compared. With the column `seconds_to_target` elbowroom must have arrived as well
    (`has_arrived`): where it has not, or where no yardstick says, the cell is left out and counted.

    Args:
        rows: The table.
        solver: The numerator.
        run: `"cold"` or `"warm"`, of both.
        column: The numerator's seconds; the denominator is always the whole fit.
    """
    own = {row_key(row): row for row in rows if row["solver"] == "elbowroom" and row["run"] == run}
    left_out = {
        "of another day": 0,
        "without a time": 0,
        "without a yardstick": 0,
        "where elbowroom did not arrive": 0,
        "where elbowroom ran into the limit": 0,
    }
    ratios = []
    for row in rows:
        if row["solver"] != solver or row["run"] != run or row_key(row) not in own:
            continue
        ours = own[row_key(row)]
        reason, ratio = ratio_of(row, ours, column)
        if ratio is None:
            left_out[reason] += 1
        else:
            ratios.append(ratio)
    title = f"{solver}, {column.replace('_', ' ')}, {run} / elbowroom, {run}"
    return Summary(title, geometric_mean(ratios), len(ratios), sum(ratio.bound for ratio in ratios), left_out)


def row_key(row: Mapping[str, str]) -> tuple[str, str]:
    """Posterior and guide."""
    return row["posterior"], row["guide"]


def ratio_of(row: Row, ours: Row, column: str) -> tuple[str, Ratio | None]:
    """The ratio of one cell, or why there is none: seconds of two days may be those of two machines."""
    if row["day"] != ours["day"]:
        return "of another day", None
    if column == "seconds_to_target":
        if not ours["optimum"]:
            return "without a yardstick", None
        if not has_arrived(_number(ours["nats"]), _number(ours["se"])):
            return "where elbowroom did not arrive", None
    theirs, seconds = Seconds.read(row[column]), Seconds.read(ours["seconds"])
    if theirs is None or seconds is None:
        return "without a time", None
    if seconds.censored:
        return "where elbowroom ran into the limit", None
    return "", Ratio(theirs.value / seconds.value, theirs.censored)
