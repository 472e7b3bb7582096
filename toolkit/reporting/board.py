"""A leaderboard as one HTML page: what share each guide is right in, then every cell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from markupsafe import Markup

from toolkit.estimate import rounded
from toolkit.reporting.html import environment, style
from toolkit.reporting.tables import minus, seconds, significant

_MARKS = {"right": "✓", "wrong": "✗", "cannot tell": "?"}
_SHOWN = ("verdict", "right", "elbo", "optimisation_limit", "kl_qp", "worst_shift", "worst_sd_ratio", "khat", "seconds")
_TITLES = {
    "right": "right of",
    "elbo": "ELBO (nats)",
    "optimisation_limit": "optimiser, at most (nats)",
    "kl_qp": "KL(q || p) (nats)",
    "worst_shift": "worst shift (sd)",
    "worst_sd_ratio": "worst sd ratio",
    "khat": "k-hat",
}


def board(table: pd.DataFrame, meanings: Mapping[str, str]) -> str:
    """The page.

    Args:
        table: A leaderboard's table.
        meanings: What each column says.
    """
    template = environment().get_template("leaderboard.html.j2")
    return template.render(
        style=Markup(style()),
        guides=_by_guide(table),
        models=_by_model(table),
        columns=[(_TITLES.get(name, name), meanings[name]) for name in _SHOWN],
        count=len(table),
    )


def _by_guide(table: pd.DataFrame) -> list[dict[str, Any]]:
    """For each guide: in how many studies it is right, wrong, undecided, not judged."""
    rows = []
    for guide, own in table.groupby("guide", sort=False):
        counts = own["verdict"].fillna("").value_counts()
        rows.append(
            {
                "guide": guide,
                "studies": len(own),
                **{name.replace(" ", "_"): int(counts.get(name, 0)) for name in _MARKS},
                "not_judged": int(counts.get("", 0)),
                "seconds": seconds(float(own["seconds"].median())),
            }
        )
    return rows


def _by_model(table: pd.DataFrame) -> list[dict[str, Any]]:
    """For each model and seed: the reference, and a row of cells for each guide."""
    found = []
    for (model, seed), own in table.groupby(["model", "seed"], sort=False):
        first = own.iloc[0]
        status = first["reference_status"]
        took = first["reference_seconds"]
        told = "" if pd.isna(status) else f"reference {status}, {seconds(float(took)) if pd.notna(took) else ''}"
        size = "" if pd.isna(first["dimensions"]) else f"{first['dimensions']:,} quantities"
        rows = [
            {"guide": row["guide"], "cells": _cells(row), "sentence": _text(row["sentence"])}
            for _, row in own.iterrows()
        ]
        found.append({"model": model, "facts": [f"seed {seed}", _text(first["dataset"]), size, told], "rows": rows})
    return found


def _cells(row: pd.Series) -> list[tuple[str, str]]:
    """Text and class of each shown column."""
    verdict = _text(row["verdict"])
    counted = "–"
    if verdict and not any(pd.isna(row[name]) for name in ("right", "wrong", "cannot_tell")):
        counted = f"{row['right']:,} of {row['right'] + row['wrong'] + row['cannot_tell']:,}"
    return [
        (f"{_MARKS.get(verdict, '–')} {verdict}".strip(), verdict.replace(" ", "-")),
        (counted, "number"),
        (_estimate(row, "elbo"), "number"),
        (_number(row["optimisation_limit"]), "number"),
        (_estimate(row, "kl_qp"), "number"),
        (_estimate(row, "worst_shift"), "number"),
        (_estimate(row, "worst_sd_ratio"), "number"),
        (_number(row["khat"]), "number"),
        (seconds(float(row["seconds"])) if pd.notna(row["seconds"]) else "–", "number"),
    ]


def _text(value: Any) -> str:
    return "" if pd.isna(value) else str(value)


def _number(value: Any) -> str:
    return "–" if pd.isna(value) else significant(float(value), 2)


def _estimate(row: pd.Series, name: str) -> str:
    value, se = row[name], row[f"{name}_se"]
    if pd.isna(value) or not math.isfinite(value):
        return "–"
    text, error = rounded(float(value), math.nan if pd.isna(se) else max(float(se), 5e-4))
    return f"{minus(text)} ± {error}" if error else minus(text)
