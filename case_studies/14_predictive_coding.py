# %% [markdown]
"""# Predictive coding: can local prediction errors alone do Bayes?

In predictive coding a cause of an image is a unit. It is pushed by how far it is from what the level above predicts of
it, and by how far what it predicts is from what is there; it knows nothing but these errors and its own connections.
In a linear-Gaussian hierarchy the exact posterior is known, so that one can see what such units get right.

**Question.** Which part of the posterior over a digit's causes do prediction errors find, and what do they miss?
"""

# %%
import argparse
import math
import sys
from pathlib import Path

import jax
import numpy as np

import models
from models._hierarchy import Hierarchy
from toolkit import default_storage, study

parser = argparse.ArgumentParser(description="Can local prediction errors alone do Bayes?")
parser.add_argument("--quick", action="store_true", help="a small simulated hierarchy, for tests")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("reports"))
options = parser.parse_args([] if "ipykernel" in sys.modules else None)

# %% [markdown]
# ## Inference three ways
# `predictive_coding` goes along prediction errors; `mean_field` is the same family by the general solver; `full_rank`
# can hold every Gaussian. The reference is exact. The image is one that the weights were not learned from.

# %%
curated = models.load("predictive_coding")
if options.quick:
    data = curated.simulate(jax.random.PRNGKey(options.seed), sizes=(20, 6, 2), noise=0.3)
else:
    data = curated.dataset()
model = curated.model(data)
guides = ["predictive_coding", "full_rank"] if options.quick else ["predictive_coding", "mean_field", "full_rank"]
done = study(
    model,
    guides=guides,
    seed=options.seed,
    storage=None if options.quick else default_storage(),
    command=f"python case_studies/14_predictive_coding.py --seed {options.seed}",
)
report = done.write(options.out / "predictive_coding")
comparison = done.comparison
for name, row in comparison.guides.iterrows():
    print(f"{name}: {row['sentence']}")

# %% [markdown]
# ## How the units settle
# The free energy is minus the ELBO. The best mean field's lies half of (sum of log diag P - log det P) above minus the
# log evidence, with P the posterior's precision, and no member of the family is lower.

# %%
hierarchy = Hierarchy.unpacked(data.arrays["weights"], data.arrays["sds"], data.static["sizes"])
posterior = hierarchy.posterior(data.arrays["y"])
(course,) = done.fits[0].traces
lowest = posterior.mean_field_kl - posterior.log_evidence
print(f"minus the log evidence {-posterior.log_evidence:.3f} nats; the best mean field's free energy {lowest:.3f}")
for step, elbo in zip(course.steps, course.elbo, strict=True):
    if step in course.steps[:: max(1, len(course.steps) // 10)] or step == course.steps[-1]:
        print(f"after {step:5,} steps the free energy is {-elbo:10.3f} nats, {-elbo - lowest:.2g} above the lowest")
fastest, slowest = np.linalg.eigvalsh(posterior.precision)[[-1, 0]]
print(f"The precision's largest eigenvalue is {fastest / slowest:.0f} times the least one: that is what takes steps.")

# %% [markdown]
# ## Means and sds against exact inference

# %%
metrics = comparison.table.set_index(["guide", "metric", "quantity"])
for guide in guides:
    shifts, ratios = (metrics.loc[guide].loc[metric] for metric in ("shift", "sd_ratio"))
    print(
        f"{guide}: largest shift of a mean {shifts['value'].abs().max():.3f} sd (its error {shifts['se'].max():.3f}); "
        f"sds from {ratios['value'].min():.2f} to {ratios['value'].max():.2f} of the exact ones"
    )
exact_sds = np.sqrt(np.diag(np.linalg.inv(posterior.precision)))
theory = np.diag(posterior.precision) ** -0.5 / exact_sds
print(f"by theory, mean-field sds are from {theory.min():.2f} to {theory.max():.2f} of the exact ones")

# %% [markdown]
# ## Decision
# Right or wrong are the report's verdicts; the gap is that of its table, beside the one that theory says.

# %%
own = comparison.table[comparison.table["guide"] == "predictive_coding"]


def verdicts(metric: str) -> dict[str, int]:
    """How many quantities have which verdict in a metric."""
    return own.loc[(own["metric"] == metric) & (own["verdict"] != ""), "verdict"].value_counts().to_dict()


gap = comparison.gaps.table.set_index("guide").loc["predictive_coding"]
allowed = 3 * gap["kl_qp_se"] + gap["optimisation_limit"]
agrees = "which cannot be held against theory"
if math.isfinite(gap["kl_qp"]):
    near = abs(gap["kl_qp"] - posterior.mean_field_kl) < allowed
    agrees = "as theory says" if near else "which is not what theory says"
print(f"\nKL(q || p) is {gap['kl_qp']:.3f} ± {gap['kl_qp_se']:.3f} nats, by theory {posterior.mean_field_kl:.3f}.")
means, sds = verdicts("shift"), verdicts("sd_ratio")
words = {
    name: ", ".join(f"{count} {word}" for word, count in found.items())
    for name, found in (("means", means), ("sds", sds))
}
trusted = [name for name, found in (("means", means), ("sds", sds)) if set(found) == {"right"}]
wrong = [name for name, found in (("means", means), ("sds", sds)) if "wrong" in found]
unclear = [name for name in ("means", "sds") if name not in trusted + wrong]
said = [
    f"{verb} {' and '.join(names)}"
    for verb, names in (
        ("trust their", trusted),
        ("do not trust their", wrong),
        ("more draws must judge their", unclear),
    )
    if names
]
print(f"Means: {words['means'] or 'not judged'}. Sds: {words['sds'] or 'not judged'}.")
print(
    f"Decision: prediction errors alone do {'the' if len(trusted) == 2 else 'half of the' if trusted else 'no'} "
    f"inference here{' that can be told' if unclear else ''}: {', '.join(said)}. The family lacks "
    f"{gap['kl_qp']:.2f} nats, {agrees}; the steps left {done.fits[0].certificate.gap.value:.1g}."
)
for sentence in comparison.advice:
    print(f"- {sentence}")
print(f"\nReport: {report}")
