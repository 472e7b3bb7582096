"""The command of a benchmark that measures posterior by posterior: what it has measured stays in its table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import posteriors


def run(
    doc: str | None, out: Path, cells: Callable[[str, int], pd.DataFrame], summary: Callable[[pd.DataFrame], str]
) -> None:
    """Measure and write the table, or tell what it says.

    Args:
        doc: The benchmark's docstring, for `--help`.
        out: Where its table is, unless told otherwise.
        cells: The rows of a posterior with a seed; they have columns `posterior` and `seed`.
        summary: What a table says.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("posteriors", nargs="*", default=list(posteriors.names()))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--summary", action="store_true", help="only tell what the table says")
    options = parser.parse_args()
    # An empty verdict is a text, and not a missing number.
    known = pd.read_csv(options.out, keep_default_na=False) if options.out.is_file() else pd.DataFrame()
    for name in () if options.summary else options.posteriors:
        rest = known[(known["posterior"] != name) | (known["seed"] != options.seed)] if len(known) else known
        known = pd.concat([rest, cells(name, options.seed)], ignore_index=True)
        known.to_csv(options.out, index=False, lineterminator="\n")
        sys.stdout.write(f"{name}\n")
        sys.stdout.flush()
    sys.stdout.write(summary(known) + "\n")
