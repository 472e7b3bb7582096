"""The study's verdict: may a variational answer be used here, and whose?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from toolkit.comparison.verdicts import Verdict, combine


@dataclass(frozen=True)
class Overall:
    """What a study says as a whole.

    Attributes:
        verdict: Right if some guide is right in what was asked for, wrong if each that was judged is wrong in it, else
            cannot tell; None where nothing was judged.
        guide: The cheapest guide that is right; empty if there is none.
        sentence: The same in words.
        chosen: Each judged guide's verdict on what was asked for.
    """

    verdict: Verdict | None
    guide: str
    sentence: str
    chosen: Mapping[str, Verdict]


def overall(guides: pd.DataFrame, focus: pd.DataFrame, problem: str) -> Overall:
    """The study's verdict on the user's own quantities, or on all where there are none of these.

    Args:
        guides: The comparison's table of guides.
        focus: The comparison's table of the user's own quantities; empty if nothing was asked for.
        problem: Why the reference gives no verdict; empty if it does.
    """
    judged = {str(name): row for name, row in guides.iterrows() if row["verdict"]}
    if problem or not judged:
        return Overall(None, "", f"No verdict: {problem or 'no guide could be judged'}.", {})
    chosen = {name: Verdict(row["verdict"]) for name, row in judged.items()}
    own = focus[focus["verdict"] != ""] if len(focus) else focus
    if len(own):
        chosen = {name: _on_focus(own, name) for name in chosen}
    right = [name for name, verdict in chosen.items() if verdict is Verdict.RIGHT]
    if right:
        best = min(right, key=lambda name: judged[name]["seconds"])
        sentence = f"Yes, from {best}: {_all_right(judged[best], own['item'].nunique() if len(own) else 0)}."
        return Overall(Verdict.RIGHT, best, sentence, chosen)
    unknown = [name for name, verdict in chosen.items() if verdict is Verdict.CANNOT_TELL]
    if unknown:
        nearest = max(unknown, key=lambda name: judged[name]["right"])
        return Overall(Verdict.CANNOT_TELL, "", f"Not known yet: {_nearest(nearest, judged[nearest], own)}.", chosen)
    return Overall(Verdict.WRONG, "", f"No: {_least_wrong(judged, own)}.", chosen)


def _on_focus(own: pd.DataFrame, name: str) -> Verdict:
    return combine([Verdict(verdict) for verdict in own.loc[own["source"] == name, "verdict"]])


def _all_right(row: pd.Series, asked: int) -> str:
    if asked:
        others = int(row["wrong"])
        subjects = {1: "what you asked for is", 2: "both quantities that you asked for are"}
        said = f"{subjects.get(asked, f'all {asked} quantities that you asked for are')} right"
        return f"{said}{f' (of all its {row.quantities} quantities {others} are wrong)' if others else ''}"
    count = int(row["quantities"])
    return {1: "its only quantity is right", 2: "both quantities are right"}.get(
        count, f"all {count} quantities are right"
    )


def _nearest(name: str, row: pd.Series, own: pd.DataFrame) -> str:
    if len(own):
        rows = own[own["source"] == name]
        settled = int((rows["verdict"] == Verdict.RIGHT.value).sum())
        return f"{name} is right in {settled} of {len(rows)} that you asked for, and the draws are too few for the rest"
    return f"{name} comes nearest, with {row['right']} of {row['quantities']} quantities right and none wrong"


def _least_wrong(judged: Mapping[str, pd.Series], own: pd.DataFrame) -> str:
    count, least = len(judged), min(judged, key=lambda name: judged[name]["wrong"])
    every = f"none of {count} guides is right in" if count > 1 else f"{least} is not right in"
    if len(own):
        return f"{every} all that you asked for"
    row = judged[least]
    fewest = f"; {least} is wrong in the fewest, {row['wrong']} of {row['quantities']}" if count > 1 else ""
    return f"{every} every quantity{fewest}"
