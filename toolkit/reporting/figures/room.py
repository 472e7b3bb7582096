"""How much room there is below the log evidence, and whose it is: one bar for each guide."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from toolkit.comparison.gaps import NOT_CLIMBED
from toolkit.reporting.contents import Picture
from toolkit.reporting.figures.canvas import blank, plain, styled
from toolkit.reporting.nats import room_in_words
from toolkit.reporting.palette import BAND, LINE, SOFT, Look

_HEIGHT, _BELOW = 0.34, 0.2  # of a bar, in rows; how far it lies below the middle of its row


def room(gaps: Any, looks: Mapping[str, Look]) -> Picture | None:
    """The bars, in the order of the guides; None where nothing is known of any.

    Args:
        gaps: The comparison's `Gaps`.
        looks: How the guides are shown.
    """
    table = gaps.table.set_index("guide")
    rows = [name for name in looks if name in table.index and math.isfinite(table.loc[name, "kl_qp_low"])]
    if not rows:
        return None
    known = gaps.evidence.estimate is not None
    longest = max(_reach(table.loc[name]) for name in rows)
    with styled():
        figure, grid = blank(4.6, 0.55 + 0.4 * len(rows))
        axes = grid[0, 0]
        for place, name in enumerate(rows):
            _bar(axes, place, table.loc[name], looks[name], longest)
            label = f"{plain(name, 26)}:  {room_in_words(table.loc[name])}"
            text = axes.text(0, place - 0.2, label, va="center", fontsize=8, color=looks[name].text.light)
            text.set_in_layout(False)  # a long one may stand over the margin, and is not to make the bars shorter
        axes.set_ylim(len(rows) - 0.45, -0.5)
        axes.set_xlim(0, 1.04 * longest if longest > 0 else 1.0)
        axes.set_yticks([])
        axes.spines["left"].set_color(LINE.light)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.set_xlabel(f"nats below the log evidence{'' if known else ' (between limits)'}", fontsize=8.5)
    reading = _reading(table.loc[rows], known)
    alt = f"Nats below the log evidence. {'; '.join(f'{name}: {room_in_words(table.loc[name])}' for name in rows)}."
    return Picture("room", figure, alt, reading)


def _reach(row: pd.Series) -> float:
    ends = [row["kl_qp_low"], row["kl_qp_high"]]
    return max((max(end, 0.0) for end in ends if math.isfinite(end)), default=0.0)


def _bar(axes: Axes, place: int, row: pd.Series, look: Look, longest: float) -> None:
    """The family's part, then what may be the optimiser's, then equal labellings; what is uncertain is pale."""
    known = math.isfinite(row["kl_qp"])
    total, colour = max(row["kl_qp"] if known else row["kl_qp_low"], 0.0), look.mark.light
    labels = min(max(row["labels"], 0.0), total)
    limit = row["optimisation_limit"]
    left = min(limit, total - labels) if math.isfinite(limit) else 0.0
    family = total - labels - left
    height = place + _BELOW
    # Whose it is, is not known without a certificate: the bar has an outline alone.
    split = (
        {"facecolor": colour} if math.isfinite(limit) else {"facecolor": "none", "edgecolor": colour, "linewidth": 1}
    )
    axes.barh(height, family, _HEIGHT, **split)
    # A limit too small to be seen is still there: at least a hairline.
    if left > 0:
        axes.barh(
            height, max(left, 0.004 * longest), _HEIGHT, family, facecolor=BAND.light, edgecolor=colour, linewidth=0.8
        )
    if labels > 0:
        axes.barh(
            height, labels, _HEIGHT, family + left, facecolor="none", edgecolor=SOFT.light, linewidth=0.8, linestyle=":"
        )
    beyond = _reach(row) - total
    if beyond > 0 and not known:
        axes.plot([total, total + beyond], [height, height], color=colour, linewidth=1.2, linestyle=(0, (2, 2)))


def _reading(table: pd.DataFrame, known: bool) -> str:
    text = "KL(q || p): full colour is the family's"
    if table["optimisation_limit"].notna().any():
        text += ", grey at most the optimiser's"
    if (table["labels"] > 0).any():
        text += ", dotted lies in equal labellings"
    unknown = table["optimisation_limit"].isna()
    unclimbed = table["optimisation_scope"] == NOT_CLIMBED
    if (unknown & ~unclimbed).any():
        text += ", an outline the one's or the other's"
    if unclimbed.any():
        text += f", that of {', '.join(table.index[unclimbed])} (an outline) is not split: {NOT_CLIMBED}"
    return f"{text}{'' if known else '; dashes: as far as it may reach'}."
