"""What a reader sees without scrolling: the verdicts, the reference's health, what next."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from typing import Any

import pandas as pd

from toolkit.comparison.sentences import sampled, seeks_elbo, whose
from toolkit.reporting.contents import Answer
from toolkit.reporting.palette import Look
from toolkit.reporting.tables import seconds
from toolkit.sampling.diagnostics import EBFMI_LIMIT, ESS_LIMIT, rounded_rhat
from toolkit.status import Status

_ROOM = 1.5  # times the effective draws that are asked for, since a longer run may mix worse than it seemed to
_MOST_TIMES = 8  # as many draws: if that is too few, it is another trouble
_DEFAULTS = {"draws": 1_000, "warmup": 1_000, "target_accept": 0.9}  # of a study


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
        fit.guide.name: whose(
            table[table["guide"] == fit.guide.name],
            fit.certificate,
            thresholds,
            climbs=seeks_elbo(fit),
            sampled=sampled(fit),
        )
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
    known = f"R-hat ≤ {rounded_rhat(rhat)}" if math.isfinite(rhat) else ""
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


def next_commands(study: Any) -> tuple[str, ...]:
    """What to run next: the study's command with the next seed; where its reference failed, with what may mend that.

    None for a program's own command, whose arguments are not known, and where no option of a study would help: a
    reference from a file, no valid start, an error, chains that are stuck or sit in different modes, a slow energy
    where there is no other chart.
    """
    command, reference = study.command, study.reference
    changes: dict[str, str] = {}
    if study.comparison.reference_ok:
        changes = {"seed": f"{study.seed + 1}"}
    elif reference.usable and reference.origin.startswith("NUTS") and not reference.modes:
        changes = _mended(reference, command)
    for option, value in changes.items():
        command = _changed(command, option, value)
    return (command,) if changes and command != study.command else ()


def _mended(reference: Any, command: str) -> dict[str, str]:
    """The options of a study that may let NUTS pass, with their values; by what it failed."""
    narrow = bool(reference.divergences) or (reference.ebfmi is not None and min(reference.ebfmi) < EBFMI_LIMIT)
    if narrow or reference.status in (Status.DIVERGENCES, Status.LOW_ENERGY):
        # What a chain cannot enter is not entered by a longer one.
        others = _other_charts(reference)
        if others:
            return {"chart": others[0]}
        if reference.status is Status.DIVERGENCES:
            # A fifth of the rejections: smaller steps follow a narrow part of the posterior further.
            return {"target_accept": f"{1 - (1 - float(_given(command, 'target_accept'))) / 5:.3g}"}
        if reference.status is Status.LOW_ENERGY:
            return {}
    chains, kept = next(iter(reference.draws.values())).shape[:2]
    least = reference.diagnostics[["ess_bulk", "ess_tail"]].min(axis=None)
    wanted = ESS_LIMIT / least if least > 0 else math.inf
    factor = 2 if wanted < 2 / _ROOM else 4 if wanted < 4 / _ROOM else _MOST_TIMES
    longer = {"draws": f"{max(factor * kept, int(_DEFAULTS['draws']))}"}
    warmup, usual = int(_given(command, "warmup")), int(_DEFAULTS["warmup"])
    if reference.status is not Status.FEW_DRAWS or warmup < usual:
        longer["warmup"] = f"{max(2 * warmup, usual)}"
    return longer


def _other_charts(reference: Any) -> list[str]:
    """Charts that NUTS has not run in: the model's own choice first, then those that the author gave a name."""
    model = reference.model
    named = dict.fromkeys([model.chart, *(chart for chart in model.charts if chart != "plain")])
    return [
        chart for chart in named if model.charts[chart] != model.charts[reference.chart] and not model.parameters(chart)
    ]


def _given(command: str, option: str) -> str:
    """The value that a study's command gives an option, or the default."""
    found = re.search(_pattern(command, option), command)
    return found[2] if found else f"{_DEFAULTS[option]}"


def _changed(command: str, option: str, value: str) -> str:
    """A study's command, or its call in Python, with another value of an option; any other command as it is."""
    by_command = command.startswith("elbowroom ")
    text = shlex.quote(value) if by_command or re.fullmatch(r"[\d.]+", value) else repr(value)
    changed, found = re.subn(_pattern(command, option), lambda match: match[1] + text, command, count=1)
    if found:
        return changed
    if by_command:
        return f"{command} --{option.replace('_', '-')} {text}"
    return f"{command[:-1]}, {option}={text})" if command.startswith("toolkit.study(") else command


def _pattern(command: str, option: str) -> str:
    """Finds an option and its value; `--option seed=1` on the command line is a model's own."""
    flag = rf"--{option.replace('_', '-')}[ =]"
    named = flag if command.startswith("elbowroom ") else rf"{flag}|\b{option}="
    return rf"((?:^|(?<=[ (]))(?:{named}))('[^']*'|[^\s,)]+)"
