# %% [markdown]
"""# Varying slopes: which chart suits the mean field?

In a hierarchical model the effects of the groups and their spread go together. A factorised guide must ignore that.
How much it loses depends on the chart: centred (effects as written), non-centred (effects minus their mean, divided
by their sd), or learned, which lets the fit choose a point between for each effect. The posterior is the same in all.

**Question.** Which chart makes a mean field good enough, when groups are rich in data and when they are poor?
"""

# %%
import argparse
import sys
from pathlib import Path

import jax
import pandas as pd

import models
from toolkit import Dataset, Estimate, Study, default_storage, study

parser = argparse.ArgumentParser(description="Which chart suits a mean field of a hierarchical regression?")
parser.add_argument("--quick", action="store_true", help="smaller data and few draws, for tests")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("reports"))
options = parser.parse_args([] if "ipykernel" in sys.modules else None)

# %% [markdown]
# Two data sets. *Rich*: the investment of 11 firms over 20 years (Grunfeld), where a firm's own rows say nearly all
# about its slopes. *Poor*: simulated groups of three rows, where most is learnt from the other groups.

# %%
curated = models.load("hierarchical_regression")
CHARTS = ("centred", "noncentred") if options.quick else ("centred", "noncentred", "learned")
quick = {"chains": 2, "warmup": 600, "draws": 1_500, "tolerance": 0.5}


def data_sets() -> dict[str, Dataset]:
    """The data sets by name; the poor one alone in the quick version."""
    key = jax.random.PRNGKey(options.seed + 1)  # seed 1 draws noisy rows: groups that are poor indeed
    poor = curated.simulate(key, groups=12 if options.quick else 20, rows_per_group=3)
    return {"poor": poor} if options.quick else {"rich": curated.dataset("grunfeld"), "poor": poor}


def run(name: str, data: Dataset) -> Study:
    """The mean field in three charts against NUTS, its report written."""
    done = study(
        curated.model(data),
        guides=[f"mean_field@{chart}" for chart in CHARTS],
        seed=options.seed,
        storage=None if options.quick else default_storage(),
        command=f"python case_studies/03_varying_slopes.py --seed {options.seed}",
        **(quick if options.quick else {}),
    )
    print(f"{name}: {done.write(options.out / f'varying_slopes_{name}')}")
    return done


studies = {name: run(name, data) for name, data in data_sets().items()}

# %% [markdown]
# ## What the ELBO says, and what the quantities say
# The ELBO ranks charts of one model, because the evidence behind it is the same. It does not say which quantities are
# wrong.

# %%
columns = ["elbo", "elbo_se", "worst_shift", "worst_sd_ratio", "worst_coverage_90", "right", "wrong", "cannot_tell"]
for name, done in studies.items():
    print(f"\n{name} ({done.model.dataset.source}); {done.reference.status.value}")
    print(done.comparison.guides[columns].round(2).to_string())

# %% [markdown]
# ## The hard part: the spread of the effects
# The sds over groups decide how much groups borrow from one another. They are where centred guides fail first.


# %%
def site_table(done: Study, ending: str) -> pd.DataFrame:
    """Shift and sd ratio of the scalars of sites with this ending, by guide."""
    table = done.comparison.table
    site = table["quantity"].str.split("[").str[0]
    own = table[site.str.endswith(ending) & table["metric"].isin(["shift", "sd_ratio"])]
    return own.pivot_table(index=["quantity", "metric"], columns="guide", values="value", sort=False)


for name, done in studies.items():
    print(f"\n{name}: sds over groups")
    print(site_table(done, "_sd").round(2).to_string())

# %% [markdown]
# ## Decision
# For each data set: the chart with the highest ELBO, and whether its verdict allows to report it.


# %%
def decide(done: Study) -> str:
    """What to use for this data set."""
    guides = done.comparison.guides
    if guides["elbo"].isna().all():
        return "nothing: no fit has an ELBO."
    best = str(guides["elbo"].idxmax())
    lead = guides["elbo"].drop(best)
    margin = "alone"
    if len(lead.dropna()):
        pair = guides.loc[[best, str(lead.idxmax())]]
        ahead = Estimate(pair["elbo"].iloc[0] - pair["elbo"].iloc[1], float((pair["elbo_se"] ** 2).sum() ** 0.5))
        margin = f"{ahead} nats above the next chart"
    if not done.comparison.reference_ok:
        return f"the ELBO prefers {best} ({margin}); no verdict, as {done.reference.status.value}."
    row = guides.loc[best]
    counts = f"{row['right']} right, {row['wrong']} wrong, {row['cannot_tell']} undecided of {row['quantities']}"
    if row["verdict"] == "right":
        return f"report {best} ({margin}; {counts})."
    return f"{best} is the best chart ({margin}), and still not to be reported as it is ({counts}): report NUTS."


def wrong_sites(done: Study, guide: str) -> str:
    """The sites in which a guide is wrong, with how many of their scalars."""
    if not done.comparison.guides.loc[guide, "verdict"]:
        return "anything, as it could not be judged"
    table = done.comparison.table
    own = table[(table["guide"] == guide) & (table["verdict"] == "wrong")].drop_duplicates("quantity")
    counts = own["quantity"].str.split("[").str[0].value_counts()
    return ", ".join(f"{site} ({count})" for site, count in counts.items()) or "nothing"


print()
for name, done in studies.items():
    print(f"Decision for {name} groups: {decide(done)}")
    for guide in done.comparison.guides.index:
        print(f"  would not trust {guide} for: {wrong_sites(done, str(guide))}")
winners = {name: str(done.comparison.guides["elbo"].fillna(float("-inf")).idxmax()) for name, done in studies.items()}
told = ", ".join(f"{winner} for {name} groups" for name, winner in winners.items())
print(f"Highest ELBO: {told}.{' The chart depends on the data.' if len(set(winners.values())) > 1 else ''}")
