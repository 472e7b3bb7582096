"""Many studies at once: models x seeds, each with a panel of guides, as one table and one page."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

import pandas as pd

from toolkit.modelling.model import Model
from toolkit.progress import Progress, silent
from toolkit.storage import Storage
from toolkit.studies import Study, study
from toolkit.variational.guides import find_guide

TABLE, PAGE, CELLS = "leaderboard.parquet", "leaderboard.html", "cells"

_SETTINGS = frozenset(signature(study).parameters)

COLUMNS: Mapping[str, str] = {
    "model": "Name, with its options.",
    "dataset": "What it was conditioned on.",
    "dimensions": "Scalars that are compared.",
    "seed": "Makes every random number of the study.",
    "guide": "The family; `reference` never stands here.",
    "verdict": "right, wrong, cannot tell, or empty where nothing was judged.",
    "right": "Quantities that are right.",
    "wrong": "Quantities that are wrong.",
    "cannot_tell": "Quantities that are undecided.",
    "elbo": "In nats.",
    "elbo_se": "Its standard error.",
    "optimisation_limit": "What the optimiser left at most, in nats.",
    "kl_qp": "KL(q || p): how far the ELBO lies below the log evidence, in nats.",
    "kl_qp_se": "Its standard error.",
    "worst_shift": "The shift that is furthest from 0, in reference sd.",
    "worst_shift_se": "Its standard error.",
    "worst_sd_ratio": "The sd ratio that is furthest from 1.",
    "worst_sd_ratio_se": "Its standard error.",
    "khat": "Pareto tail index of the importance weights.",
    "seconds": "Of the fit.",
    "reference_seconds": "Of NUTS, or of exact draws.",
    "status": "How the fit ended.",
    "reference_status": "How the reference ended.",
    "sentence": "The verdict in words; for a cell that failed, why.",
}
"""What each column of the table says."""


@dataclass(frozen=True)
class Entry:
    """A model of a leaderboard: what it is called, and how it is made."""

    name: str
    make: Callable[[], Model]


def leaderboard(
    entries: Sequence[Entry],
    folder: str | Path,
    *,
    guides: Sequence[str],
    seeds: Sequence[int] = (0,),
    settings: Mapping[str, Any] | None = None,
    storage: Storage | None = None,
    progress: Progress = silent,
) -> pd.DataFrame:
    """One row for each model, seed and guide, written as Parquet and as a page.

    A cell, which is a model with a seed, is kept as soon as it is done: the same call after an interruption goes on
    with what is missing, and makes anew what a change of the model or the settings concerns. A cell that fails, by
    whatever error, is rows with its sentence; the others stand.

    Args:
        entries: The models.
        folder: Where the table, the page and the cells that are done are written.
        guides: Guides by name.
        seeds: Seeds; each gives a study of its own.
        settings: Further arguments of `study`, the same for all.
        storage: Where fits and references are kept; nowhere if None.
        progress: Called before each cell and between blocks of its work.

    Raises:
        ValueError: There is nothing to do, a name is given twice, a guide or a setting is unknown, or the folder cannot
            be written.
    """
    names = [entry.name for entry in entries]
    if not (entries and guides and seeds):
        raise ValueError("Expected at least one model, one guide and one seed; got none of one of them.")
    if len(set(names)) < len(names) or len(set(guides)) < len(guides) or len(set(seeds)) < len(seeds):
        raise ValueError("Expected each model, guide and seed once; got one of them more than once.")
    folder, settings = Path(folder), dict(settings or {})
    for guide in guides:
        find_guide(guide)
    unknown = sorted(set(settings) - _SETTINGS)
    if unknown:
        raise ValueError(f"Expected settings of a study; got {', '.join(unknown)}.")
    try:
        (folder / CELLS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"Expected a folder that can be written; '{folder}' cannot: {error.strerror}.") from error
    cells = [(entry, seed) for entry in entries for seed in seeds]
    frames = []
    for i, (entry, seed) in enumerate(cells):
        progress("leaderboard", i, len(cells), f"{entry.name}, seed {seed}")
        frames.append(_cell(entry, seed, folder, guides, settings, storage, progress))
    progress("leaderboard", len(cells), len(cells), "done")
    table = pd.concat(frames, ignore_index=True)
    table.to_parquet(folder / TABLE, index=False)
    (folder / PAGE).write_text(page(table), encoding="utf-8")
    return table


def _cell(
    entry: Entry,
    seed: int,
    folder: Path,
    guides: Sequence[str],
    settings: Mapping[str, Any],
    storage: Storage | None,
    progress: Progress,
) -> pd.DataFrame:
    """The rows of one model with one seed, as they were kept if nothing has changed; of one that failed, with why."""
    try:
        model = entry.make()
        known = [entry.name, model.log_evidence, model.exact is not None, version("elbowroom")]
        key = json.dumps([model.fingerprint(), *known, seed, list(guides), sorted(settings.items())], default=str)
        kept = _kept(folder, entry.name, seed, key)
        if kept is not None:
            return kept
        done = study(model, guides=guides, seed=seed, storage=storage, progress=progress, **settings)
        rows = _typed(pd.DataFrame(_rows(entry.name, done)))
        _keep(folder, entry.name, seed, key, rows)
        return rows
    except Exception as error:  # whatever a model of somebody's raises: the other cells are not lost to it
        text = (str(error).strip() or type(error).__name__).split("\n")[0]
        failed = {"model": entry.name, "seed": seed, "status": "FAILED", "sentence": text}
        return _typed(pd.DataFrame([failed | {"guide": guide, "verdict": ""} for guide in guides]))


def _rows(name: str, done: Study) -> Iterator[dict[str, Any]]:
    guides, gaps = done.comparison.guides, done.comparison.gaps.table.set_index("guide")
    for guide, row in guides.iterrows():
        gap = gaps.loc[[guide]].iloc[0]
        yield {
            "model": name,
            "dataset": done.model.dataset.name,
            "dimensions": done.comparison.quantities["quantity"].nunique(),
            "seed": done.seed,
            "guide": guide,
            "reference_seconds": done.reference.cost.seconds,
            "reference_status": done.reference.status.name,
            **{column: row[column] for column in COLUMNS if column in row.index},
            **{column: gap[column] for column in ("optimisation_limit", "kl_qp", "kl_qp_se")},
        }


_TEXTS = ("model", "dataset", "guide", "verdict", "status", "reference_status", "sentence")
_COUNTS = ("dimensions", "seed", "right", "wrong", "cannot_tell")


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns in their order, with the same types whatever is missing."""
    frame = frame.reindex(columns=list(COLUMNS))
    kinds = {name: "string" if name in _TEXTS else "Int64" if name in _COUNTS else "float64" for name in COLUMNS}
    return frame.astype(kinds)


def _place(folder: Path, name: str, seed: int) -> Path:
    safe = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
    own = hashlib.sha256(name.encode()).hexdigest()[:8]  # two names may look alike as files
    return folder / CELLS / f"{safe}-{own}-{seed}.parquet"


def _kept(folder: Path, name: str, seed: int, key: str) -> pd.DataFrame | None:
    """The cell as an earlier call kept it with the same guides and settings; None if there is none."""
    path = _place(folder, name, seed)
    try:
        if path.with_suffix(".json").read_text(encoding="utf-8") != key:
            return None
        return _typed(pd.read_parquet(path))
    except (OSError, ValueError):  # not there, or cut short while it was written: made again
        return None


def _keep(folder: Path, name: str, seed: int, key: str, rows: pd.DataFrame) -> None:
    path = _place(folder, name, seed)
    # The key goes first and comes last, so that rows of two kinds or a part of them are never taken for a whole cell.
    path.with_suffix(".json").unlink(missing_ok=True)
    rows.to_parquet(path, index=False)
    path.with_suffix(".json").write_text(key, encoding="utf-8")


def page(table: pd.DataFrame) -> str:
    """The table as one HTML page that needs nothing else."""
    from toolkit.reporting.board import board  # its templates are read only when a page is written

    return board(table, COLUMNS)
