"""The record of predicted verdicts: what `diagnose` said without a reference, against what reference draws say.

For each posterior of `benchmarks/posteriors.py` and each of three guides: one fit, diagnosed without any reference, and
compared with the reference draws that somebody else made. A row is one quantity.

    python benchmarks/predictions.py [POSTERIOR ...] [--out benchmarks/predictions.csv] [--seed 0]
    python benchmarks/predictions.py --summary
"""

from __future__ import annotations

from pathlib import Path

import jax
import pandas as pd
import posteriors
from by_posterior import run

from toolkit import as_reference, compare, diagnose, fit
from toolkit.comparison.diagnosis import predicted_verdicts
from toolkit.comparison.tables import quantity_verdicts

GUIDES = ("mean_field", "low_rank", "full_rank")
COLUMNS = ["posterior", "seed", "guide", "quantity", "predicted", "by_reference"]
ORDER = ["right", "cannot tell", "wrong"]


def cells(name: str, seed: int) -> pd.DataFrame:
    """One row for each quantity of each guide, with the predicted verdict and the reference's."""
    model, key = posteriors.load(name), jax.random.PRNGKey(seed)
    given = as_reference(posteriors.reference_draws(name), model, origin="posteriordb")
    fits = [fit(model, guide, key=key) for guide in GUIDES]
    other = compare(model, given, fits, key=jax.random.fold_in(key, 1))
    rows = []
    for fitted in fits:
        guide = fitted.guide.name
        own = predicted_verdicts(diagnose(fitted, key=jax.random.fold_in(key, 2)))
        theirs = quantity_verdicts(other.table[other.table["guide"] == guide])
        rows += [
            (name, seed, guide, quantity, own[quantity].value, theirs[quantity].value)
            for quantity in theirs
            if quantity in own
        ]
    return pd.DataFrame(rows, columns=COLUMNS)


def summary(table: pd.DataFrame) -> str:
    """The confusion table, over quantities and over guides, and the record of each predicted verdict."""
    lines = []
    whole = table.groupby(["posterior", "seed", "guide"], sort=False)[["predicted", "by_reference"]].agg(_combined)
    for title, frame in (("quantities", table), ("guides", whole.reset_index())):
        counts = pd.crosstab(frame["predicted"], frame["by_reference"]).reindex(
            index=ORDER, columns=ORDER, fill_value=0
        )
        lines.append(f"{title}: predicted in rows, by the reference in columns\n{counts.to_string()}")
        for verdict in ("right", "wrong"):
            decided = counts.loc[verdict, ["right", "wrong"]].sum()
            lines.append(
                f"predicted {verdict} and decided by the reference: {decided}, agreed {counts.loc[verdict, verdict]}"
            )
    return "\n".join(lines)


def _combined(verdicts: pd.Series) -> str:
    found = set(verdicts)
    return "wrong" if "wrong" in found else "right" if found == {"right"} else "cannot tell"


if __name__ == "__main__":
    run(__doc__, Path(__file__).with_suffix(".csv"), cells, summary)
