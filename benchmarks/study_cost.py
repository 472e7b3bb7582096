"""What a whole study costs beside NUTS alone, for each curated model.

Both sides are fresh processes with empty caches, one after the other: `elbowroom study NAME` (imports, three guides,
NUTS, comparison, report), and a script that imports the model and runs the same NUTS. The bar is twice NUTS plus 15 s.

    python benchmarks/study_cost.py [MODEL ...] [--out benchmarks/study_cost.csv] [--warm]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

ALONE = """
import jax, models
from toolkit import reference
from toolkit.compilation import keep_compiled_programs
keep_compiled_programs()
drawn = reference(models.load({name!r}).model(), key=jax.random.PRNGKey(0))
assert drawn.usable, drawn.reasons
"""


def seconds(command: list[str], cache: Path) -> float:
    """Wall-clock seconds of one process with that cache folder."""
    begun = time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, "ELBOWROOM_CACHE": str(cache)}, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def measure(name: str, *, warm: bool) -> dict[str, object]:
    """One row: NUTS alone, the study, and the study over its bar."""
    with tempfile.TemporaryDirectory() as folder:
        elbowroom = str(Path(sys.executable).with_name("elbowroom"))
        study = [elbowroom, "study", name, "--no-cache", "--out", f"{folder}/report"]
        alone = [sys.executable, "-c", ALONE.format(name=name)]
        caches = [Path(folder) / "alone", Path(folder) / "study"]
        if warm:  # compiled programs are there already, results are not
            seconds(alone, caches[0])
            seconds(study, caches[1])
        nuts, whole = seconds(alone, caches[0]), seconds(study, caches[1])
    return {
        "model": name,
        "compiled": "warm" if warm else "cold",
        "nuts_seconds": round(nuts, 1),
        "study_seconds": round(whole, 1),
        "study_over_bar": round(whole / (2 * nuts + 15), 2),
    }


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", default=["collinear_logistic", "hierarchical_regression", "poisson_glm", "lda"]
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--warm", action="store_true", help="measure with compiled programs kept from an earlier run")
    given = parser.parse_args()
    rows = []
    for name in given.models:
        rows.append(measure(name, warm=given.warm))
        print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    table.to_csv(given.out, index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
