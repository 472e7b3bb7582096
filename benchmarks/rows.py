"""A table that grows row by row, and goes on where it was stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pandas as pd

Cell = tuple[str, str, int]  # what is fitted, the guide, the seed


def filled(
    table: pd.DataFrame,
    out: Path,
    columns: Sequence[str],
    cells: Iterable[Cell],
    measure: Callable[[str, str, int], dict[str, object]],
) -> pd.DataFrame:
    """The table with the rows that it lacked; each is printed and written as soon as it is there.

    Args:
        table: What is there already.
        out: Where it is written.
        columns: Which of its columns name a cell.
        cells: All that should be there.
        measure: Gives a cell's row.
    """
    done = set() if table.empty else set(zip(*(table[column] for column in columns), strict=True))
    for cell in cells:
        if cell in done:
            continue
        row = measure(*cell)
        print(row, flush=True)
        table = pd.concat([table, pd.DataFrame([row])], ignore_index=True)
        table.to_csv(out, index=False)
    return table
