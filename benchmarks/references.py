"""Whether each default study's reference passes every check from dispersed starts, over several seeds.

python benchmarks/references.py [MODEL ...] [--seeds 5] [--out benchmarks/references.csv]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import pandas as pd

import models
from toolkit import reference
from toolkit.compilation import keep_compiled_programs
from toolkit.studies import named_key


def measure(name: str, seed: int) -> dict[str, object]:
    """One row: how the reference ended, by which figures, in how long."""
    begun = time.perf_counter()
    drawn = reference(models.load(name).model(), key=named_key(jax.random.PRNGKey(seed), "reference"))
    table = drawn.diagnostics
    return {
        "model": name,
        "seed": seed,
        "status": drawn.status.name,
        "worst_rhat": round(float(table["rhat"].max()), 4),
        "least_ess_bulk": round(float(table["ess_bulk"].min())),
        "least_ess_tail": round(float(table["ess_tail"].min())),
        "divergences": drawn.divergences,
        "least_ebfmi": None if drawn.ebfmi is None else round(float(drawn.ebfmi.min()), 2),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(models.names()))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    given = parser.parse_args()
    keep_compiled_programs()
    rows = []
    for name in given.models:
        for seed in range(given.seeds):
            rows.append(measure(name, seed))
            print(rows[-1], flush=True)
    pd.DataFrame(rows).to_csv(given.out, index=False)


if __name__ == "__main__":
    main()
