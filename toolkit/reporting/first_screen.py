"""What a reader sees without scrolling: the verdicts, the reference's health, what next."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import pandas as pd

from toolkit.comparison.sentences import whose
from toolkit.reporting.contents import Answer
from toolkit.reporting.palette import Look
from toolkit.reporting.tables import seconds
from toolkit.status import Status


def against(reference: Any) -> str:
    """What the guides are compared with, in a word."""
    if reference.status is Status.EXACT:
        return "the exact posterior"
    return "NUTS" if reference.origin.startswith("NUTS") else "the loaded draws"


def facts(study: Any) -> tuple[str, ...]:
    """Dataset, seed, machine, seconds and version."""
    version = study.versions.get("elbowroom")
    return (
        study.model.dataset.name,
        f"seed {study.seed}",
        study.machine,
        seconds(sum(study.stages.values())),
        *((f"elbowroom {version}",) if version else ()),
    )


def answers(study: Any, looks: Mapping[str, Look]) -> tuple[Answer, ...]:
    """Each guide's verdict in words, with its seconds and the time saved against NUTS."""
    guides: pd.DataFrame = study.comparison.guides
    cost = study.reference.cost.seconds if study.reference.origin.startswith("NUTS") else math.nan
    table, thresholds = study.comparison.table, study.comparison.thresholds
    clauses = {
        fit.guide.name: whose(table[table["guide"] == fit.guide.name], fit.certificate, thresholds)
        for fit in study.fits
    }
    return tuple(
        Answer(
            str(name),
            looks[str(name)].place,
            str(row["verdict"]) if study.comparison.reference_ok else "",
            str(row["sentence"]),
            _time(float(row["seconds"]), cost if row["verdict"] else math.nan),
            clauses[str(name)],
        )
        for name, row in guides.iterrows()
    )


def _time(own: float, nuts: float) -> str:
    if not math.isfinite(own):
        return ""
    if not (math.isfinite(nuts) and nuts > 0 and own > 0):
        return seconds(own)
    factor = nuts / own
    if factor >= 1.15:
        return f"{seconds(own)}, {_times(factor)} sooner than NUTS"
    return f"{seconds(own)}, {'as long as' if factor > 0.87 else f'{_times(1 / factor)} later than'} NUTS"


def _times(factor: float) -> str:
    return f"{factor:.1f}×" if factor < 9.95 else f"{factor:,.0f}×"


def health(reference: Any) -> str:
    """The reference in one line, with the numbers that its status comes from."""
    words = [reference.status.value]
    if reference.usable and not reference.diagnostics.empty and reference.status is not Status.EXACT:
        words.append(f"({', '.join(_numbers(reference))})")
    return f"{reference.origin}: {' '.join(words)}" + _took(reference)


def _numbers(reference: Any) -> list[str]:
    """What the checks found; nothing is said of what is not known."""
    table, hits, diverged = reference.diagnostics, reference.tree_depth_hits, reference.divergences
    rhat, ess = float(table["rhat"].max()), float(table[["ess_bulk", "ess_tail"]].min(axis=None))
    # Infinite where a chain stands still, NaN where nothing varies.
    known = f"R-hat ≤ {math.ceil(rhat * 1_000) / 1_000:.3f}" if math.isfinite(rhat) else ""
    numbers = [known or f"R-hat {'infinite' if rhat == math.inf else 'unknown'}"]
    numbers.append(f"ESS ≥ {math.floor(ess):,}" if math.isfinite(ess) else "ESS unknown")
    if diverged is not None:
        numbers.append(f"{diverged or 'no'} divergence{'' if diverged == 1 else 's'}")
    if hits:
        numbers.append(f"{hits:,} transition{'' if hits == 1 else 's'} at the largest tree depth")
    return numbers


def _took(reference: Any) -> str:
    return f", {seconds(reference.cost.seconds)}" if reference.cost.seconds else ""


def warning(study: Any) -> tuple[str, tuple[str, ...]]:
    """Why there are no verdicts, with the reasons; empty where there are."""
    if study.comparison.reference_ok:
        return "", ()
    reference = study.reference
    text = (
        f"No verdict: {reference.status.value}."
        if reference.usable
        else f"No verdict: there is no reference ({reference.status.value})."
    )
    return text, tuple(reference.reasons)


def next_commands(command: str, seed: int) -> tuple[str, ...]:
    """The study's command with the next seed; none for a program's own command that does not name its seed."""
    by_command = command.startswith("elbowroom ")
    named = r"--seed[ =]" if by_command else r"--seed[ =]|\bseed="  # `--option seed=1` is a model's own
    again, found = re.subn(rf"({named}){seed}\b", rf"\g<1>{seed + 1}", command, count=1)
    return (again,) if found else (f"{command} --seed {seed + 1}",) if by_command else ()
