# %% [markdown]
"""# Chains of states: must a Gaussian for a time series be full?

The Nile's flow of a year is its level, which changes slowly, and weather. A mean field takes each year's level for
itself; full rank has a number for each pair of years. Between them lies the guide that a chain needs: a precision that
couples each year with the next.

**Question.** What does a mean field get wrong in a chain of states, and is a guide that is linear in its length exact?
"""

# %%
import argparse
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pandas as pd

import models
from toolkit import Study, default_storage, fit, study

parser = argparse.ArgumentParser(description="What does a chain of states ask of a guide?")
parser.add_argument("--quick", action="store_true", help="fewer years, for tests")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("reports"))
options = parser.parse_args([] if "ipykernel" in sys.modules else None)

# %% [markdown]
# ## The Nile, with known scales: the exact answer is Kalman's
# The reference are draws by the Kalman smoother, and the evidence is exact.

# %%
curated = models.load("linear_gaussian_ssm")
guides = ["mean_field", "chain"] if options.quick else ["mean_field", "chain", "full_rank"]


def run(name: str, **model_options: object) -> Study:
    """The study of the Nile with some options, its report written."""
    done = study(
        curated.model(**model_options),
        guides=guides,
        seed=options.seed,
        focus=["total_change", "average"],
        storage=None if options.quick else default_storage(),
        command=f"python case_studies/08_chains_of_states.py --seed {options.seed}",
    )
    print(f"{name}: {done.write(options.out / f'chains_{name}')}")
    return done


known = run("known")

# %% [markdown]
# ## By how much, and is it the known amount?
# A mean field has the precision's diagonal and lacks half the log of prod diag(P) / det(P).

# %%
log_evidence = known.model.log_evidence
y = known.model.dataset.arrays["y"]
news = np.full(len(y), curated.LEVEL_SD**-2.0)
news[0] = curated.INITIAL_SD**-2.0
steps = np.eye(len(y)) - np.eye(len(y), k=-1)
precision = steps.T @ (news[:, None] * steps) + np.eye(len(y)) / curated.OBSERVATION_SD**2
theory = 0.5 * (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1])
lacks = {fitted.guide.name: log_evidence - fitted.elbo.value for fitted in known.fits}
for name, nats in lacks.items():
    print(f"{name}: {nats:z.4f} nats below the evidence")
print(f"theory for the mean field: {theory:.4f}")

# %% [markdown]
# ## Levels, their average, and the change over the century
# A sum of what a mean field takes for independent is far too narrow, and a difference of far years is not much better.

# %%
table = known.comparison.table
ratios = table[table["metric"] == "sd_ratio"].set_index(["guide", "quantity"])["value"]


def of(guide: str, quantity: str) -> float:
    """The sd of a quantity as a multiple of the exact one; the median over all years for the level."""
    if quantity != "level":
        return float(ratios[guide, quantity])
    own = ratios[guide]
    return float(own[own.index.str.startswith("level[")].median())


widths = pd.DataFrame({q: {g: of(g, q) for g in guides} for q in ("level", "average", "total_change")})
print(widths.round(3).to_string())

# %% [markdown]
# ## Unknown scales: is a Gaussian along the chain as good as any Gaussian?
# The Hessian of log p couples a year with its neighbours and the scales alone; so does the best Gaussian's precision.

# %%
if not options.quick:
    unknown = run("unknown", scales="unknown")
    elbos = {fitted.guide.name: fitted.elbo for fitted in unknown.fits}
    for name, elbo in elbos.items():
        print(f"{name}: ELBO {elbo} nats")

# %% [markdown]
# ## And a long series?
# Seconds for a series of ten times the length; `benchmarks/chains.py` fits the exponent.

# %%
seconds = {}
for length in (50, 500) if options.quick else (1_000, 10_000):
    series = curated.model(curated.simulate(jax.random.key(options.seed), steps=length))
    begun = time.perf_counter()
    long = fit(series, "chain", key=jax.random.key(options.seed), elbo_draws=256)
    seconds[length] = time.perf_counter() - begun
    print(
        f"{length:,} steps: {seconds[length]:.1f} s, evidence - ELBO {series.log_evidence - long.elbo.value:.1e} nats"
    )

# %% [markdown]
# ## Decision

# %%
exact = abs(lacks["chain"]) < 0.01
print(
    f"\nDecision: the mean field lacks {lacks['mean_field']:.1f} nats, its levels have {of('mean_field', 'level'):.2f} "
    f"of the exact sd and their average {of('mean_field', 'average'):.2f}; the chain is "
    f"{'exact' if exact else 'not exact'} ({lacks['chain']:.1e} nats below the evidence)."
)
trusted = [name for name in guides if known.comparison.guides.loc[name, "verdict"] == "right"]
print(f"Would trust for all quantities: {', '.join(trusted) or 'none'}.")
if not options.quick:
    apart = elbos["chain"].value - elbos["full_rank"].value
    error = np.hypot(elbos["chain"].se, elbos["full_rank"].se)
    print(f"With unknown scales the chain's ELBO is {apart:+.2f} ± {error:.2f} nats from full rank's.")
