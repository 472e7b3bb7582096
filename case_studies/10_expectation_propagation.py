# %% [markdown]
"""# Expectation propagation: does matching moments mend what minimising KL(q || p) breaks?

A variational fit minimises KL(q || p), which costs nothing where q has no mass: hence intervals that are too narrow.
Expectation propagation goes the other way. It gives each observation a Gaussian site, and asks that the posterior with
one site replaced by the true likelihood have the mean and the variance of the posterior with the site: moments under
something near p, and not under q. It also approximates the evidence, without a bound and without draws.

**Question.** On a logistic regression with collinear features, has EP the sds that a mean field lacks, is it nearer
than the best Gaussian by KL(q || p), and how near is its evidence to bridge sampling's?
"""

# %%
import argparse
import sys
from pathlib import Path

import jax
import numpy as np
import pandas as pd

import models
from toolkit import Estimate, default_storage, study

parser = argparse.ArgumentParser(description="Does matching moments mend what minimising KL(q || p) breaks?")
parser.add_argument("--quick", action="store_true", help="small simulated data and few draws, for tests")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("reports"))
options = parser.parse_args([] if "ipykernel" in sys.modules else None)

# %% [markdown]
# The same model, prior and data as in case study 01: 30 measurements of breast masses. The quick version has three
# collinear features that were simulated.

# %%
GUIDES = ["mean_field", "ep", "full_rank"]
curated = models.load("collinear_logistic")
if options.quick:
    data = curated.simulate(jax.random.PRNGKey(options.seed), rows=60, features=3, correlation=0.9)
    settings = {"chains": 2, "warmup": 400, "draws": 1_500}
else:
    data = curated.dataset()
    settings = {"draws": 4_000}

done = study(
    curated.model(data),
    guides=GUIDES,
    seed=options.seed,
    storage=None if options.quick else default_storage(),
    command=f"python case_studies/10_expectation_propagation.py --seed {options.seed}",
    **settings,
)
report = done.write(options.out / "expectation_propagation")
comparison, fits = done.comparison, {fit.guide.name: fit for fit in done.fits}

# %% [markdown]
# ## What was found in the model
# Nobody told EP what the likelihood is. It found the one parameter of the observed site that moves with the latents,
# and the link under which it is linear in them.

# %%
ep = fits["ep"]
print(f"ep: {ep.why}.")
if ep.message:
    print(f"ep: {ep.message}.")
for name in GUIDES:
    print(f"{name}: {comparison.guides.loc[name, 'sentence']}")

# %% [markdown]
# ## The sds, side by side
# A ratio of 1 is right, below 1 too narrow. The root mean square runs over all quantities, on the log scale for sds;
# noise alone would make it about as large as the last column.


# %%
def errors(guide: str, metric: str) -> pd.DataFrame:
    """One metric of one guide, a row for each quantity."""
    table = comparison.table
    return table[(table["guide"] == guide) & (table["metric"] == metric)].set_index("quantity")


def size(guide: str, metric: str) -> tuple[float, float]:
    """Root mean square of an error over all quantities, and of its Monte Carlo error."""
    rows = errors(guide, metric)
    if rows.empty:
        return np.nan, np.nan
    ratio = metric == "sd_ratio"
    values = np.log(rows["value"]) if ratio else rows["value"]
    noise = rows["se"] / rows["value"] if ratio else rows["se"]
    return float(np.sqrt((values**2).mean())), float(np.sqrt((noise**2).mean()))


ratios = pd.DataFrame({name: errors(name, "sd_ratio")["value"] for name in GUIDES})
summary = pd.DataFrame(
    [
        (
            name,
            ratios[name].min(),
            ratios[name].median(),
            ratios[name].max(),
            *size(name, "sd_ratio"),
            *size(name, "shift"),
        )
        for name in GUIDES
    ],
    columns=["guide", "smallest sd", "median sd", "largest sd", "rms log sd", "noise", "rms shift", "noise "],
)
print(f"\nSds as multiples of the reference's:\n{summary.round(3).to_string(index=False)}")
if not ratios.empty:
    worst = ratios["mean_field"].sort_values().index[:5]
    print(f"\nThe five quantities that the mean field makes narrowest:\n{ratios.loc[worst].round(2).to_string()}")

# %% [markdown]
# ## The evidence
# An ELBO is a lower bound. EP's number is an approximation that may lie on either side. Both are held against the
# evidence that is bridged between NUTS's draws and Gaussians.

# %%
evidence = comparison.gaps.evidence
print(f"Log evidence: {evidence.estimate or evidence.problem} nats, by {evidence.how or 'nothing'}")
for name in GUIDES:
    print(f"ELBO of {name}: {fits[name].elbo} nats")
print("EP's own approximation: " + ("none" if ep.log_evidence is None else f"{ep.log_evidence:.3f} nats"))
off = {}
if evidence.estimate is not None:
    said = {f"the ELBO of {name}": fits[name].elbo for name in GUIDES if fits[name].elbo}
    if ep.log_evidence is not None:
        said["EP's own number"] = Estimate(ep.log_evidence, 0.0)
    for what, (value, se) in said.items():
        off[what] = Estimate(value - evidence.estimate.value, float(np.hypot(se, evidence.estimate.se)))
        print(f"{what} minus the log evidence: {off[what]} nats")

# %% [markdown]
# ## Both directions
# KL(q || p) is what variational fits minimise, so that full rank must be the smallest there but for what its optimiser
# left. KL(p || q) is the direction that moment matching speaks of.

# %%
both = comparison.gaps.table.set_index("guide")[["kl_qp", "kl_qp_se", "kl_pq", "kl_pq_se"]]
print(both.round(3).to_string())

# %% [markdown]
# ## Decision
# Mended is what has less than a fifth of the mean field's error in its sds. EP is nearer than full rank where the
# difference of their errors exceeds the noise in both.

# %%
if not comparison.reference_ok:
    print(f"\nDecision: none yet. {done.reference.status.value}.")
elif not ep.status.ok:
    print(f"\nDecision: none yet. EP gave nothing to judge: {ep.message}.")
else:
    own, noise = size("ep", "sd_ratio")
    broken, gaussian = size("mean_field", "sd_ratio")[0], size("full_rank", "sd_ratio")[0]
    mended = own < broken / 5
    apart = own - gaussian
    beside = "nearer than" if apart < -noise else "further off than" if apart > noise else "as near as"
    verdicts = comparison.guides["verdict"]
    told = [f"{what} is off by {difference} nats" for what, difference in off.items() if "mean_field" not in what]
    print(
        f"\nDecision: {'yes' if mended else 'no'}. Matching moments leaves {own:.3f} of error in the log sds where the "
        f"mean field has {broken:.3f}, and is {beside} full rank ({gaussian:.3f}; noise {noise:.3f}). "
        f"Of the log evidence, {'; '.join(told) or 'nothing is known'}."
    )
    usable = [name for name in GUIDES if verdicts[name] == "right"]
    print(f"Take the intervals of single slopes from {usable[0] if usable else 'NUTS'}.")
print(f"\nReport: {report}")
