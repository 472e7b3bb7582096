"""Whether fits arrive and their certificates hold: each reference posterior and curated model, each guide, many seeds.

The true gap is the yardstick's ELBO, from `yardsticks.csv`, minus the fit's, measured on many draws. The yardstick's
`newton_gap`, by which that may be too small, is added where it is positive. A row is written as soon as it is there,
and finished rows are skipped. In the summary a fit without a usable result counts as a miss in every share.

    python benchmarks/certificates.py [POSTERIOR ...] [--guides ...] [--seeds 20] [--out benchmarks/certificates.csv]
    python benchmarks/certificates.py --summary
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import posteriors
import targets_large
import yardsticks
from rows import filled

from toolkit import Fit, Model, fit
from toolkit.estimate import Estimate
from toolkit.variational.autoguides import gaussian_form
from toolkit.variational.building import build_guide
from toolkit.variational.chain_guides import AutoChainNormal
from toolkit.variational.chains import whitened
from toolkit.variational.density import LogDensity
from toolkit.variational.draws import generator
from toolkit.variational.gaussians import Frame, Quadratic
from toolkit.variational.guides import DEFAULT_GUIDES, find_guide
from toolkit.variational.projection import project
from toolkit.variational.solvers.fixed_draws import FixedDrawsELBO

_DRAWS = 100_000  # at most, behind a fit's ELBO
_AT_ONCE = 10_000
_SMALL = 0.002  # nats: a standard error for which no more draws are asked
_MANY_SEEDS = 50  # dimensions up to which all seeds are run, and above it a quarter of them
YARDSTICKS = Path(__file__).with_name("yardsticks.csv")


def load(name: str) -> Model:
    """The model of that name: a curated one, a reference posterior, or a large target."""
    if name in targets_large.names():
        return targets_large.load(name)
    return yardsticks.curated(name) if name in yardsticks.CURATED else posteriors.load(name)


def measured_elbo(fitted: Fit, key: jax.Array) -> Estimate:
    """The ELBO of a Gaussian fit in nats, on draws of its own, with a quadratic control variate."""
    density = LogDensity(fitted.model, fitted.chart)
    guide, params = (
        _dense(fitted) if isinstance(fitted.autoguide, AutoChainNormal) else (fitted.autoguide, fitted.params)
    )
    form = gaussian_form(guide, density.space)
    if form is None:
        raise ValueError(f"Expected a Gaussian guide; got '{fitted.guide.name}'.")
    member = form.member(params)
    frame = Frame.of(member.loc, np.linalg.inv(member.covariance()))
    family = form.family(frame)
    x = family.near(member)
    around = Quadratic(member.loc, np.zeros(density.size), frame.precision)
    quadratic = project(density, family, family.member(x), around, key=jax.random.fold_in(key, 0), draws=4_096)
    rng, terms = generator(jax.random.fold_in(key, 1)), []
    for _ in range(_DRAWS // _AT_ONCE):
        base = rng.standard_normal((_AT_ONCE, family.base))
        terms.append(FixedDrawsELBO(density, family, quadratic, base).each(x))
        elbo = Estimate.of_mean(np.concatenate(terms))
        if elbo.se < _SMALL:
            break
    return elbo


def _dense(fitted: Fit) -> tuple[Any, dict[str, np.ndarray]]:
    """A Gaussian along a chain as a full-rank one, by NumPyro's guide and its parameters."""
    with jax.enable_x64(True):
        posterior = fitted.autoguide.get_posterior(fitted.params)
        chain = posterior.chain
        columns = whitened(posterior.factor, *chain.split(chain.into_places(jnp.eye(chain.size))))
        factor = np.asarray(chain.joined(*columns))  # F with F F' the precision, whatever the chain's order
    scale_tril = np.linalg.cholesky(np.linalg.inv(factor @ factor.T))
    full_rank = build_guide(fitted.model, find_guide("full_rank"), fitted.start)
    prefix = full_rank.prefix
    return full_rank, {f"{prefix}_loc": np.asarray(posterior.loc), f"{prefix}_scale_tril": scale_tril}


def measure(name: str, guide: str, seed: int) -> dict[str, object]:
    """One row: how the fit ended, its certificate, its true ELBO, its cost."""
    model = load(name)
    begun = time.perf_counter()
    fitted = fit(model, guide, key=jax.random.PRNGKey(seed))
    seconds = time.perf_counter() - begun
    certificate = fitted.certificate
    elbo = measured_elbo(fitted, jax.random.PRNGKey(seed + 10_000)) if fitted.usable else Estimate(math.nan, math.nan)
    return {
        "posterior": name,
        "guide": guide,
        "dimension": sum(np.size(value) for value in fitted.start.values()),
        "seed": seed,
        "status": fitted.status.name,
        "elbo": round(elbo.value, 5),
        "se": round(elbo.se, 5),
        "gap": round(certificate.gap.value, 5) if certificate else math.nan,
        "limit": round(certificate.limit, 5) if certificate else math.nan,
        "scope": certificate.scope.name if certificate else "",
        "draws": certificate.draws if certificate else 0,
        "optima": len(fitted.optima),
        "gradients": fitted.cost.gradient_evaluations,
        "seconds": round(seconds, 2),
    }


def summary(table: pd.DataFrame) -> str:
    """For each posterior and guide: the largest true gap, the limits, and in how many fits the gap was below.

    `unusable` fits have no finite ELBO: they are misses, whatever their limit says. `yardstick` says whether the
    yardstick itself has arrived; cells where it has not, or where there is none, are named or counted at the end.
    """
    joined = table.merge(_best(), on=["posterior", "guide"], how="left", suffixes=("", "_best"))
    joined["yardstick"] = joined.yardstick.fillna("none")
    joined["unusable"] = ~np.isfinite(joined.elbo)
    joined["true_gap"] = joined.elbo_best + joined.short - joined.elbo
    # The true gap's two Monte Carlo errors; by what the yardstick may be short it is not excused.
    error = np.hypot(joined.se, joined.se_best)
    covered = ~joined.unusable & (joined.true_gap - 2 * error <= joined.limit)
    joined["covered"] = covered.astype(float).where(joined.elbo_best.notna())
    rows = joined.groupby(["dimension", "posterior", "guide"], sort=True).agg(
        fits=("seed", "size"),
        unusable=("unusable", "sum"),
        worst_gap=("true_gap", "max"),
        median_limit=("limit", "median"),
        worst_limit=("limit", "max"),
        covered=("covered", "mean"),
        seconds=("seconds", "median"),
        yardstick=("yardstick", "first"),
    )
    known = joined[joined.elbo_best.notna()]
    small, large = known[known.dimension <= _MANY_SEEDS], known[known.dimension > _MANY_SEEDS]
    lines = [rows.round(4).to_string()]
    for part, words, bar in ((small, f"d <= {_MANY_SEEDS}", 0.1), (large, f"d > {_MANY_SEEDS}", 0.5)):
        if len(part):
            lines.append(
                f"{words}: {len(part)} fits, {part.unusable.sum()} of them unusable; "
                f"limit <= {bar} in {(~part.unusable & (part.limit <= bar)).mean():.1%}; "
                f"true gap <= 0.1 in {(~part.unusable & (part.true_gap <= 0.1)).mean():.1%}; "
                f"true gap below the limit in {part.covered.mean():.1%}"
            )
    late = rows[rows.yardstick == "not arrived"].index
    if len(late):
        lines.append("yardstick not arrived: " + ", ".join(f"{posterior} {guide}" for _, posterior, guide in late))
    if len(known) < len(joined):
        lines.append(f"left out: {len(joined) - len(known)} fits without a yardstick")
    return "\n".join(lines)


def _best() -> pd.DataFrame:
    """The yardsticks: ELBO and error, by how much they may be `short`, and whether they have arrived."""
    best = pd.read_csv(YARDSTICKS)
    # One without a Newton gap was found by quadrature, see `hierarchy_optimum.py`.
    gaps = zip(best.newton_gap.fillna(0), best.newton_gap_se.where(best.newton_gap.notna(), 0), strict=True)
    best["yardstick"] = ["arrived" if yardsticks.has_arrived(*gap) else "not arrived" for gap in gaps]
    best["short"] = best.newton_gap.clip(lower=0).fillna(0)
    # Where a model has a chain no Gaussian is better than the best one along it.
    best = pd.concat([best, best[best.guide == "full_rank"].assign(guide="chain")])
    return best[["posterior", "guide", "elbo", "se", "short", "yardstick"]]


def main() -> None:
    """Write the rows that are missing and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("posteriors", nargs="*", default=[*posteriors.names(), *yardsticks.CURATED])
    parser.add_argument("--guides", nargs="+", default=list(DEFAULT_GUIDES))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--summary", action="store_true", help="print what is there already, of these guides")
    given = parser.parse_args()
    table = pd.read_csv(given.out) if given.out.exists() else pd.DataFrame()

    def seeds(name: str) -> range:
        few = LogDensity(load(name)).size > _MANY_SEEDS
        return range(max(1, given.seeds // 4) if few else given.seeds)

    names = () if given.summary else given.posteriors
    cells = ((name, guide, seed) for name in names for guide, seed in itertools.product(given.guides, seeds(name)))
    table = filled(table, given.out, ("posterior", "guide", "seed"), cells, measure)
    print(summary(table[table.guide.isin(given.guides)]))


if __name__ == "__main__":
    main()
