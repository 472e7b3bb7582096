"""Seconds and memory of fits along a chain of states, against its length.

Series of 100 to 10,000 steps are drawn from `linear_gaussian_ssm`, with known scales (the posterior is a Gaussian) and
with unknown ones. Each fit runs in a process of its own; memory is what the largest compiled program holds, by the
compiler's account (the process's own peak is mostly the compiler's). The exponent is the slope of log seconds, or log
bytes, against log length, by least squares over fits that arrived, with its standard error: 1 is linear, and less is
what does not depend on the length.

    python benchmarks/chains.py [--out chains.csv] [--lengths 100 1000 ...] [--guides chain full_rank]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import numpy as np
import pandas as pd
from scipy import stats

LENGTHS = (100, 300, 1_000, 3_000, 10_000)
FULL_RANK_UP_TO = 300  # beyond, a dense factor takes minutes
MEASURES = ("run_seconds", "seconds_a_gradient", "program_bytes")


def one(guide: str, scales: str, length: int) -> dict[str, object]:
    """The row of one fit, in this process."""
    import jax

    import models
    from toolkit import fit

    curated = models.load("linear_gaussian_ssm")
    bound = curated.model(curated.simulate(jax.random.key(0), steps=length), scales=scales)
    fitted = fit(bound, guide, key=jax.random.key(0), elbo_draws=256)
    elbo, certificate = fitted.elbo, fitted.certificate
    return {
        "guide": guide,
        "scales": scales,
        "length": length,
        "status": fitted.status.name,
        "elbo": elbo.value if elbo else None,
        "elbo_se": elbo.se if elbo else None,
        "lacking": bound.log_evidence - elbo.value if elbo and bound.log_evidence is not None else None,
        "gap_limit": certificate.limit if certificate else None,
        "scope": certificate.scope.value if certificate else "",
        "gradients": fitted.cost.gradient_evaluations,
        "compile_seconds": fitted.cost.compile_seconds,
        "run_seconds": fitted.cost.run_seconds,
        "program_bytes": fitted.cost.peak_bytes,
    }


def main() -> None:
    """Print the table and the exponents, and write the table where that is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--guides", nargs="+", default=("chain", "full_rank"))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.one[0], given.one[1], int(given.one[2]))))
        return
    rows = []
    for scales in ("known", "unknown"):
        for guide in given.guides:
            for length in given.lengths:
                if guide != "chain" and length > FULL_RANK_UP_TO:
                    continue
                call = [sys.executable, __file__, "--one", guide, scales, str(length)]
                done = subprocess.run(call, check=True, capture_output=True, text=True)
                rows.append(json.loads(done.stdout.splitlines()[-1]))
                print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    table["seconds_a_gradient"] = table["run_seconds"] / table["gradients"]
    print(table.drop(columns=["elbo", "elbo_se"]).round(3).to_string(index=False))
    if given.out:
        table.to_csv(given.out, index=False)
    for (guide, scales), group in table[table["status"] == "ARRIVED"].groupby(["guide", "scales"]):
        if len(group) < 3:
            continue
        for measure in MEASURES:
            slope = stats.linregress(np.log(group["length"]), np.log(group[measure]))
            print(f"{guide}, scales {scales}: {measure} grow with the length to the power {slope.slope:.2f} ± "
                  f"{slope.stderr:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
