"""Verdicts from our own NUTS against verdicts from reference draws that somebody else made.

For each posterior of `benchmarks/posteriors.py` and each of three guides: one fit, the same draws of it, judged once by
NUTS at its default length and once by the reference draws (2,000, nearly independent). A cell is one quantity of one
guide. Where the two decide, they must say the same.

    python benchmarks/verdicts.py [POSTERIOR ...] [--out benchmarks/verdicts.csv] [--seed 0]
    python benchmarks/verdicts.py --summary
"""

from __future__ import annotations

from pathlib import Path

import jax
import pandas as pd
import posteriors
from by_posterior import run

from toolkit import as_reference, default_storage, study
from toolkit.comparison.comparisons import compare
from toolkit.comparison.tables import quantity_verdicts

GUIDES = ("mean_field", "low_rank", "full_rank")
COLUMNS = ["posterior", "seed", "guide", "quantity", "status", "nuts", "by_nuts", "by_reference"]


def cells(name: str, seed: int) -> pd.DataFrame:
    """One row for each quantity of each guide, with both verdicts; empty where nothing was judged."""
    model = posteriors.load(name)
    done = study(model, guides=GUIDES, seed=seed, storage=default_storage())
    given = as_reference(posteriors.reference_draws(name), model, origin="posteriordb")
    other = compare(model, given, done.fits, key=jax.random.PRNGKey(seed + 1_000))
    rows = []
    for guide in GUIDES:
        own, theirs = (
            quantity_verdicts(found.table[found.table["guide"] == guide]) for found in (done.comparison, other)
        )
        status = done.comparison.guides.loc[guide, "status"]
        for quantity in dict.fromkeys(other.table["quantity"]):
            pair = [found[quantity].value if quantity in found else "" for found in (own, theirs)]
            rows.append((name, seed, guide, quantity, status, done.reference.status.name, *pair))
    return pd.DataFrame(rows, columns=COLUMNS)


def summary(table: pd.DataFrame) -> str:
    """How many cells are decided, and how often the two agree where both decide."""
    judged = table[(table["by_nuts"] != "") & (table["by_reference"] != "")]
    own, theirs = judged["by_nuts"] != "cannot tell", judged["by_reference"] != "cannot tell"
    both = judged[own & theirs]
    lines = [
        f"{judged['posterior'].nunique()} posteriors, {len(judged)} cells judged of {len(table)}",
        f"decided by NUTS: {own.mean():.1%} of cells; by the reference draws: {theirs.mean():.1%}",
    ]
    for verdict in ("right", "wrong"):
        called = both[both["by_reference"] == verdict]
        same = (called["by_nuts"] == verdict).mean() if len(called) else float("nan")
        lines.append(
            f"called {verdict} by the reference and decided by NUTS: {len(called)}, of which {same:.1%} the same"
        )
    flipped = both[both["by_nuts"] != both["by_reference"]]
    lines.append(f"flipped: {len(flipped)}")
    for (posterior, guide), own_rows in judged.groupby(["posterior", "guide"], sort=False):
        decided = (own_rows["by_nuts"] != "cannot tell").mean()
        lines.append(f"  {posterior:<52}{guide:<12}{len(own_rows):>5} cells, {decided:.0%} decided")
    return "\n".join([*lines, *(" ".join(map(str, row)) for row in flipped.itertuples(index=False))])


if __name__ == "__main__":
    run(__doc__, Path(__file__).with_suffix(".csv"), cells, summary)
