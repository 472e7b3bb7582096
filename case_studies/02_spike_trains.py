# %% [markdown]
"""# Spike trains: is the stimulus to blame?

A grasshopper's auditory receptor hears noise, and fires. A Poisson regression asks which part of the last 20 ms of
sound drives it. Two recordings differ in one thing: the slow sound changes little from one millisecond to the next, so
that its lags are nearly collinear; the fast one changes from bin to bin.

**Question.** Is the mean field's answer on the stimulus filter spoilt by the model, or by the stimulus?
"""

# %%
import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

import models
from toolkit import Dataset, Study, default_storage, study

parser = argparse.ArgumentParser(description="Does a slow stimulus spoil a factorised guide?")
parser.add_argument("--quick", action="store_true", help="the first two seconds and few draws, for tests")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("reports"))
options = parser.parse_args([] if "ipykernel" in sys.modules else None)

# %% [markdown]
# The same model, the same guides and the same prior on both recordings.

# %%
curated = models.load("poisson_glm")
quick = {"chains": 2, "warmup": 300, "draws": 600}


def recording(name: str) -> Dataset:
    """One recording; its first two seconds in the quick version."""
    data = curated.dataset(name)
    bins = 2_000 if options.quick else len(data.arrays["counts"])
    return replace(data, arrays={key: values[:bins] for key, values in data.arrays.items()})


def run(name: str) -> Study:
    """The study of one recording, its report written."""
    done = study(
        curated.model(recording(name)),
        guides=["mean_field", "full_rank"],
        seed=options.seed,
        storage=None if options.quick else default_storage(),
        command=f"python case_studies/02_spike_trains.py --seed {options.seed}",
        **(quick if options.quick else {}),
    )
    print(f"{name}: {done.write(options.out / f'spike_trains_{name}')}")
    return done


studies = {name: run(name) for name in ("slow", "fast")}

# %% [markdown]
# ## How collinear are the lags?
# The correlation of the stimulus with itself one bin later says how different the two recordings are.

# %%
for name in studies:
    level = recording(name).arrays["stimulus"]
    print(f"{name}: correlation of neighbouring lags {np.corrcoef(level[1:], level[:-1])[0, 1]:.2f}")

# %% [markdown]
# ## The filter's sd, guide against NUTS
# A ratio of 1 is right, below 1 too narrow. Summaries run over all lags of the filter.


# %%
def metric_of(name: str, metric: str, site: str) -> pd.DataFrame:
    """One metric of one site's scalars in one study."""
    table = studies[name].comparison.table
    return table[(table["metric"] == metric) & table["quantity"].str.startswith(site)]


rows = [
    (name, guide, site, group["value"].median(), group["value"].min(), (group["verdict"] == "wrong").sum(), len(group))
    for name in studies
    for site in ("stimulus_filter", "history_gain", "predicted_rate")
    for guide, group in metric_of(name, "sd_ratio", site).groupby("guide", sort=False)
]
ratios = pd.DataFrame(rows, columns=["recording", "guide", "site", "median", "smallest", "wrong", "of"])
print(ratios.round(2).to_string(index=False))

# %% [markdown]
# ## Where the mean field is wrong, is it wrong in its means too?

# %%
for name in studies:
    shifts = metric_of(name, "shift", "stimulus_filter")
    own = shifts[shifts["guide"] == "mean_field"]
    worst = own.loc[own["value"].abs().idxmax()]
    print(f"{name}: worst shift {worst['value']:.2f} ± {worst['se']:.2f} sd ({worst['quantity']})")

# %% [markdown]
# ## Decision
# The verdict on a site is wrong as soon as one of its quantities is; it is right when all of them are.


# %%
def verdict(name: str, guide: str, site: str) -> str:
    """The verdict over all deciding metrics of a site."""
    table = studies[name].comparison.table
    own = table[(table["guide"] == guide) & table["quantity"].str.startswith(site)]
    given = set(own["verdict"]) - {""}
    if not given:
        return "not judged"
    return "wrong" if "wrong" in given else "right" if given == {"right"} else "cannot tell"


trusted, refused = [], []
for name in studies:
    for guide in ("mean_field", "full_rank"):
        for site in ("stimulus_filter", "history_gain", "predicted_rate"):
            said = f"{guide}'s {site} on the {name} stimulus ({verdict(name, guide, site)})"
            (trusted if verdict(name, guide, site) == "right" else refused).append(said)
print(f"\nWould trust: {'; '.join(trusted) or 'nothing'}.")
print(f"Would not trust: {'; '.join(refused) or 'nothing'}.")

if not all(done.comparison.reference_ok for done in studies.values()):
    failed = [
        f"{name} ({done.reference.status.value})" for name, done in studies.items() if not done.reference.status.ok
    ]
    print(f"Decision: none yet. No verdict without a reference: {', '.join(failed)}.")
else:
    medians = ratios[(ratios["guide"] == "mean_field") & (ratios["site"] == "stimulus_filter")].set_index("recording")
    slow, fast = float(medians["median"]["slow"]), float(medians["median"]["fast"])
    culprit = "the stimulus" if abs(np.log(slow)) > 2 * abs(np.log(fast)) else "the model as much as the stimulus"
    print(
        f"Decision: the mean field's filter has {slow:.2f} of NUTS's sd (median over lags) when the stimulus is slow "
        f"and {fast:.2f} when it is fast: {culprit} is to blame."
    )
    usable = [guide for guide in ("mean_field", "full_rank") if verdict("slow", guide, "stimulus_filter") == "right"]
    print(f"For the slow recording, take the filter's intervals from {usable[0] if usable else 'NUTS'}.")
