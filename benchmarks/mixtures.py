"""Whether the limits of mixtures hold: what a longer climb gains on draws of its own, beside the limit of the fit.

From each fit a climb goes on to 1e-8 nats, on 4,096 draws of each component that the fit has not seen; what it has
gained is then measured on eight sets of as many fresh draws. That is at most what the best near the fit lies above it,
so that a limit below it is refuted, but for the standard error, and one above it is not proved. A row is written as
soon as it is there, and finished rows are skipped.

    python benchmarks/mixtures.py [TARGET ...] [--guides ...] [--seeds 10] [--out benchmarks/mixtures.csv]
    python benchmarks/mixtures.py --summary
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
from rows import filled

import models
from toolkit import Dataset, Estimate, Model, fit
from toolkit.variational.density import LogDensity
from toolkit.variational.mixture_climbs import Mixture, StratifiedELBO, ascend

_DRAWS, _SETS = 4_096, 8
_RESIDUAL, _EVALUATIONS = 1e-8, 1_000


def banana(nothing: object) -> None:
    """Two coordinates, one bent along the other's square."""
    bend = numpyro.sample("bend", dist.Normal(0.0, 1.0))
    numpyro.sample("z", dist.Normal(bend**2, 0.5))
    numpyro.factor("none_observed", 0.0 * jnp.sum(nothing))


def load(name: str) -> tuple[Model, str]:
    """The target of that name, and the chart in which it is fitted."""
    if name == "banana":
        return Model(banana, Dataset("none", {"nothing": np.zeros(1)})), ""
    targets = models.load("gaussian_target")
    weight = {"weight": 0.7} if name == "two_modes" else {}
    chart = "@plain" if name == "funnel" else ""
    return targets.model(target=name, dimensions=2, correlation=0.0, **weight), chart


def measure(name: str, guide: str, seed: int) -> dict[str, object]:
    """One row: how the fit ended, its limit, and what a longer climb gains."""
    model, chart = load(name)
    begun = time.perf_counter()
    fitted = fit(model, guide + chart, key=jax.random.PRNGKey(seed))
    seconds = time.perf_counter() - begun
    weights, locs, factors = (np.asarray(fitted.params[f"auto_{part}"]) for part in ("weights", "locs", "scale_trils"))
    mixture = Mixture(np.log(weights), locs, factors)
    density = LogDensity(model, fitted.chart)
    with jax.enable_x64(True):
        objective = StratifiedELBO(density, mixture, _DRAWS, key=(1_000 + seed,))
        end = ascend(objective, residual=_RESIDUAL, max_evaluations=_EVALUATIONS)
        higher = objective.mixture(end.x)
        gains = []
        for number in range(_SETS):
            pair = [StratifiedELBO(density, one, _DRAWS, key=(2_000 + seed, number)) for one in (mixture, higher)]
            before, after = (one(np.zeros(one.parameters))[0] for one in pair)
            gains.append(after - before)
    gain, certificate = Estimate.of_mean(np.array(gains)), fitted.certificate
    return {
        "target": name,
        "guide": guide,
        "seed": seed,
        "status": fitted.status.name,
        "scope": certificate.scope.name if certificate else "",
        "limit": round(certificate.limit, 6) if certificate else math.nan,
        "gain": round(gain.value, 6),
        "se": round(gain.se, 6),
        "in_sample": round(end.elbo - end.begun, 6),
        "evaluations": len(end.course),
        "gradients": fitted.cost.gradient_evaluations,
        "seconds": round(seconds, 2),
    }


def summary(table: pd.DataFrame) -> str:
    """For each target and guide: the gains and limits, and in how many fits the limit is not refuted."""
    table = table.assign(covered=(table.gain - 2 * table.se <= table.limit).astype(float))
    rows = table.groupby(["target", "guide"]).agg(
        fits=("seed", "size"),
        local=("scope", lambda scopes: (scopes == "LOCAL").mean()),
        worst_gain=("gain", "max"),
        median_limit=("limit", "median"),
        worst_limit=("limit", "max"),
        covered=("covered", "mean"),
        gradients=("gradients", "median"),
        seconds=("seconds", "median"),
    )
    bounds = table[table.scope == "LOCAL"]
    return (
        f"{rows.round(4).to_string()}\n{len(table)} fits, {len(bounds)} with a bound; not refuted: "
        f"{table.covered.mean():.1%} of all limits, {bounds.covered.mean():.1%} of the bounds"
    )


def main() -> None:
    """Write the rows that are missing and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=["student_t", "banana", "two_modes", "funnel"])
    parser.add_argument("--guides", nargs="+", default=["mixture", "mixture_3"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--summary", action="store_true", help="print what is there already")
    given = parser.parse_args()
    table = pd.read_csv(given.out, keep_default_na=False, na_values=["nan"]) if given.out.exists() else pd.DataFrame()
    names = () if given.summary else given.targets
    cells = itertools.product(names, given.guides, range(given.seeds))
    print(summary(filled(table, given.out, ("target", "guide", "seed"), cells, measure)))


if __name__ == "__main__":
    main()
