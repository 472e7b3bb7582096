"""Whether a comparison has decided, and with how many draws it would."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd

from toolkit.comparison.verdicts import Verdict

ROOM = 1.3
"""More draws than are reckoned to be needed: the numbers will move a little."""


def draws_wanted(
    chosen: Mapping[str, Verdict], table: pd.DataFrame, focus: pd.DataFrame, draws: int, most: int
) -> tuple[int | None, str]:
    """The draws of a next reference, a chain; None with the reason where none is wanted.

    Args:
        chosen: Each judged guide's verdict on what was asked for; those that cannot be told are worked on.
        table: The comparison's long table, whose `more_draws` says how many times as many each number needs.
        focus: What was asked for, with `more_draws` too; where something was, only that counts.
        draws: What the reference had, a chain.
        most: The limit.
    """
    unknown = [name for name, verdict in chosen.items() if verdict is Verdict.CANNOT_TELL]
    if not unknown:
        return None, ""
    if draws >= most:
        return None, f"the limit of {most:,} draws a chain was reached; still undecided: {', '.join(unknown)}"
    rows, whose = (focus, "source") if (focus["verdict"] != "").any() else (table, "guide")
    rows = rows[rows[whose].isin(unknown) & (rows["verdict"] == Verdict.CANNOT_TELL.value)]
    needed = rows["more_draws"].dropna().to_numpy(dtype=float)
    within = needed[needed * draws * ROOM <= most]
    if not within.size:
        return None, (
            f"{', '.join(unknown)} would stay undecided: what is left lies so near a threshold that it needs over "
            f"{most:,} draws a chain, or is no finite number"
        )
    return min(most, math.ceil(max(2.0, ROOM * float(within.max())) * draws)), ""
