# %% [markdown]
"""# Which way KL points: what does a Gaussian do that must stand for something else?

KL(q || p) averages over the guide: it punishes a guide for lying where the posterior is not, and says nothing of what
the guide leaves out. KL(p || q) averages over the posterior: it punishes what is left out, and lets the guide lie where
nothing is. The first is the ELBO seen from the evidence, and needs no draws of the posterior; the second is least for
the Gaussian with the posterior's own moments (`forward_kl_guide`), and needs them.

**Question.** On correlated coordinates, on two modes and on heavy tails: which of the two gives a Gaussian whose means,
sds and intervals may be used?
"""

# %%
import argparse
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl

if "ipykernel" not in sys.modules:
    mpl.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist

import models
from toolkit import Estimate, Model, Study, study
from toolkit.comparison.divergences import kl_divergence
from toolkit.variational.forward_kl import forward_kl_guide

parser = argparse.ArgumentParser(description="Which way should KL point?")
parser.add_argument("--quick", action="store_true", help="few draws, for tests")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("reports"))
options = parser.parse_args([] if "ipykernel" in sys.modules else None)
targets = models.load("gaussian_target")
# Of the posterior, to fit to: by a key of its own, since the reference draws are what the fit is judged by.
of_moments, of_figure = jax.random.split(jax.random.key(options.seed + 1))
fitted_to = 4_000 if options.quick else 100_000

# %% [markdown]
# ## A die
# One face of a loaded die falls half of the time, each other one in ten. How far it is from a fair one depends on which
# of the two is rolled.

# %%
loaded, fair = dist.Categorical(jnp.array([0.5] + 5 * [0.1])), dist.Categorical(jnp.full(6, 1 / 6))
print(f"KL(loaded || fair) = {kl_divergence(loaded, fair).value:.4f} nats")
print(f"KL(fair || loaded) = {kl_divergence(fair, loaded).value:.4f} nats")


# %% [markdown]
# ## Both directions on one target
# The same family twice: `mean_field` or `full_rank` by KL(q || p), and `forward_...` of the same form by KL(p || q).


# %%
def both(target: Model, structure: str, name: str) -> Study:
    """The study of one target with a family fitted in both directions, its report written."""
    assert target.exact is not None
    done = study(
        target,
        guides=[structure, forward_kl_guide(target.exact(of_moments, fitted_to), structure=structure)],
        focus=["z[1] > 0"],
        seed=options.seed,
        draws=1_000 if options.quick else 10_000,
        command=f"python case_studies/06_which_way_kl_points.py --seed {options.seed}",
    )
    print(f"\n{name}: {done.write(options.out / f'which_way_kl_points_{name}')}")
    for row in done.comparison.gaps.table.itertuples():
        back = row.kl_pq_problem or f"{Estimate(row.kl_pq, row.kl_pq_se)} nats"
        print(f"  {row.guide}: KL(q || p) {Estimate(row.kl_qp, row.kl_qp_se)} nats, KL(p || q) {back}")
    table = done.comparison.table.query("metric == 'sd_ratio' and verdict != ''")  # none where there is no sd
    for guide, rows in table.groupby("guide", sort=False):
        print(f"  {guide}: sds {rows['value'].min():.3f} to {rows['value'].max():.3f} of the posterior's")
    for row in done.comparison.focus.itertuples():
        print(f"  P({row.item}) = {Estimate(row.probability, row.probability_se)} by {row.source}")
    return done


# %% [markdown]
# ## Correlated coordinates, a factorised guide
# By KL(q || p) its sds are sqrt(1 - rho^2) of the truth, by KL(p || q) they are right. Each costs
# -1/2 log(1 - rho^2) nats in its own direction. (The quick version leaves this target out.)

# %%
rho = 0.9
studies = {}
if not options.quick:
    studies["correlated"] = both(targets.model(dimensions=2, correlation=rho), "mean_field", "correlated")
print(f"  by theory: sds {math.sqrt(1 - rho**2):.3f} or 1, and {-0.5 * math.log1p(-(rho**2)):.4f} nats either way")

# %% [markdown]
# ## Two modes
# Eight sds apart, of equal weight. By KL(q || p) a Gaussian sits on one of them and lacks log 2 nats; by KL(p || q) it
# covers both and what lies between them.

# %%
studies["two_modes"] = both(targets.model(target="two_modes", dimensions=2, correlation=0.0), "full_rank", "two_modes")
print(
    f"  by theory: KL(q || p) {math.log(2):.4f} of one mode, KL(p || q) {0.5 * math.log(17) - math.log(2):.4f} of both"
)

# %% [markdown]
# ## Heavy tails
# A Cauchy has no variance. KL(q || p) is finite, and its Gaussian fits the middle. KL(p || q) is infinite for every
# Gaussian, and a mean over draws is no estimate of it: it grows with their number, and with the draws that it is fitted
# to the Gaussian grows.

# %%
cauchy = targets.model(target="cauchy", dimensions=1, correlation=0.0)
studies["cauchy"] = both(cauchy, "mean_field", "cauchy")
middle, wide = studies["cauchy"].fits
counts = 2 ** np.arange(5, 12 if options.quick else 17)
sets = 16
assert cauchy.exact is not None
seen = {name: np.asarray(value) for name, value in cauchy.exact(of_figure, sets * int(counts[-1])).items()}
assert cauchy.log_evidence is not None
course = middle.log_weights_at(seen).reshape(sets, -1) - cauchy.log_evidence
means = np.array([course[:, :n].mean(1) for n in counts])
sds = np.array([seen["z"].reshape(sets, -1)[:, :n].std(1) for n in counts])
positive = (means > 0).all(1)  # few draws of the middle alone may have any mean
powers = Estimate.of_mean(np.polyfit(np.log(counts[positive]), np.log(means[positive]), 1)[0])  # of each set

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
for axes, values, title in (
    (left, means, "KL(p || q) of the fit by the ELBO,\nas a mean over draws (nats)"),
    (right, sds, "sd of the Gaussian\nfitted by KL(p || q) to the draws"),
):
    axes.loglog(counts, values, color="0.75", linewidth=0.8)
    axes.loglog(counts, np.median(values, 1), color="black", marker="o", markersize=4)
    axes.set(xlabel=f"draws of the Cauchy (grey: {sets} sets, black: median)", title=title)
picture = options.out / "which_way_kl_points_cauchy" / "growth.png"
figure.savefig(picture, dpi=120)
plt.close(figure)
# Squares of a Cauchy's draws have tail index 1/2: their sum grows as the square of their number, the mean as that.
print(f"  the mean over draws grows as their number to the power {powers} (by theory 1): {picture}")

# %% [markdown]
# ## Decision

# %%
verdicts = {}
for name, done in studies.items():
    for guide, row in done.comparison.guides.iterrows():
        verdicts[name, "KL(p || q)" if str(guide).startswith("forward") else "KL(q || p)"] = row
for (name, way), row in verdicts.items():
    print(f"{name}, by {way}: {row['sentence']}")
ways = ("KL(q || p)", "KL(p || q)")
right_on = {way: [name for name in studies if verdicts[name, way]["verdict"] == "right"] for way in ways}
wrong_on = {way: [name for name in studies if verdicts[name, way]["verdict"] == "wrong"] for way in ways}
neither = [name for name in studies if all(name in wrong_on[way] for way in ways)]
unclear = [f"{name} by {way}" for (name, way), row in verdicts.items() if row["verdict"] not in ("right", "wrong")]
said = [
    f"by {way} a Gaussian is right on {', '.join(right_on[way]) or 'none'} and wrong on "
    f"{', '.join(wrong_on[way]) or 'none'} of these targets"
    for way in ways
]
print(f"\nDecision: {'; '.join(said)}.")
if unclear:
    print(f"It cannot be told for {', '.join(unclear)}: more draws would.")
if neither:
    print(f"On {', '.join(neither)} take another family: turning KL round does not make up for a wrong one.")
