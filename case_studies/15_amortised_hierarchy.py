# %% [markdown]
"""# Amortised hierarchies: must every group have numbers of its own?

In a hierarchical model the groups are independent once the shared parameters are known. A Gaussian guide may know that:
q(shared) prod_i q(group i | shared). `coupled` fits location, width and coupling of every group; `amortised` has one
function that gives them from the group's own data, so that its size does not grow with the groups, and a group that
comes later has its branch at once. `blocks` leaves the coupling out; the full rank couples everything.

**Questions.** How much of the room between blocks and full rank does the coupling close? What does amortising it cost?
And is the branch of a new group the one that a new fit would have given it?
"""

# %%
import argparse
import dataclasses
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pandas as pd

import models
from toolkit import Dataset, Estimate, Fit, Guide, Model, Study, default_storage, fit, study
from toolkit.variational.amortised_guides import AutoAmortisedNormal
from toolkit.variational.carried_guides import carried

parser = argparse.ArgumentParser(description="What do coupling and amortisation do for a hierarchical regression?")
parser.add_argument("--quick", action="store_true", help="small data and few draws, for tests")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("reports"))
options = parser.parse_args([] if "ipykernel" in sys.modules else None)
curated = models.load("hierarchical_regression")
key = jax.random.PRNGKey(options.seed)

# %% [markdown]
# ## Three data sets
# *Investment*: 11 firms over 20 years, which say nearly all about themselves, in the centred chart. *Radon*: 919 houses
# in 85 counties, most of which say little, in the non-centred one. *Counts*: simulated groups of four counts each,
# with a likelihood that is no Gaussian. (The quick version has only counts, in fewer groups, and no mean field.)

# %%
GUIDES = ["mean_field", "blocks", "amortised", "coupled", "full_rank"]


def data_sets() -> dict[str, Dataset]:
    """The data sets by name; radon where its package is installed."""
    size = 10 if options.quick else 40
    counts = curated.simulate(jax.random.PRNGKey(options.seed + 1), groups=size, rows_per_group=4, likelihood="poisson")
    if options.quick:
        return {"counts": counts}
    real = {"investment": curated.dataset("grunfeld")}
    try:
        real["radon"] = curated.dataset("radon")
    except ValueError as error:
        print(f"Without radon: {error}")
    return {**real, "counts": counts}


def run(name: str, data: Dataset) -> Study:
    """The panel against NUTS, its report written."""
    quick = {"chains": 2, "warmup": 200, "draws": 200, "tolerance": 0.3}
    done = study(
        curated.model(data),
        guides=GUIDES[1:] if options.quick else GUIDES,
        seed=options.seed,
        target_accept=0.98,  # groups of four counts leave NUTS few divergent transitions even so
        storage=None if options.quick else default_storage(),
        command=f"python case_studies/15_amortised_hierarchy.py --seed {options.seed}",
        **(quick if options.quick else {}),
    )
    print(f"{name}: {done.write(options.out / f'amortised_{name}')}")
    return done


studies = {name: run(name, data) for name, data in data_sets().items()}

# %% [markdown]
# ## What coupling closes, and what amortisation costs
# ELBOs of one model differ by what a family lacks, as long as every fit has arrived. The room is that between blocks
# and the full rank; coupling closes a share of it; amortisation takes a share back.


# %%
def fit_of(done: Study, guide: str) -> Fit:
    """A guide's fit."""
    return next(one for one in done.fits if one.guide.name == guide)


def free_numbers(done: Study, guide: str) -> int:
    """Parameters that a guide fits: those of the shared coordinates and of all branches."""
    fitted = fit_of(done, guide)
    if guide == "amortised":
        own = fitted.autoguide.layout
        return own.shared * (own.shared + 3) // 2 + own.weights
    if guide in ("blocks", "coupled"):
        return int(fitted.autoguide.blocks.pattern.sum()) + fitted.autoguide.blocks.size
    size = sum(np.size(value) for value in fitted.start.values())
    return 2 * size if guide == "mean_field" else size * (size + 3) // 2


def ahead(done: Study, one: str, other: str) -> Estimate:
    """How far one guide's ELBO lies above another's, in nats."""
    pair = done.comparison.guides.loc[[one, other]]
    return Estimate(pair["elbo"].iloc[0] - pair["elbo"].iloc[1], float((pair["elbo_se"] ** 2).sum() ** 0.5))


for name, done in studies.items():
    guides = done.comparison.guides
    table = guides[["elbo", "elbo_se", "worst_shift", "worst_sd_ratio", "verdict"]].round(3)
    table.insert(0, "parameters", [free_numbers(done, str(guide)) for guide in guides.index])
    print(f"\n{name} ({done.model.dataset.source}); {done.reference.status.value}")
    print(table.to_string())
    room, closed = ahead(done, "full_rank", "blocks"), ahead(done, "coupled", "blocks")
    print(f"room between blocks and full rank {room} nats; coupling closes {closed} of it")
    print(f"amortisation costs {ahead(done, 'coupled', 'amortised')} nats; {fit_of(done, 'amortised').autoguide.words}")

# %% [markdown]
# ## What the function needs
# Constants and gains alone, or two hidden units, or four: on counts, whose groups are not Gaussian. (Not in the quick
# version.)


# %%
def with_hidden(hidden: int) -> Estimate:
    """How far the amortised guide with so many hidden units lies above the one of the panel, in nats."""
    guide = Guide(f"hidden_{hidden}", partial(AutoAmortisedNormal, hidden=hidden))
    other = fit(studies["counts"].model, guide, key=key)
    panel = fit_of(studies["counts"], "amortised")
    return Estimate(other.elbo.value - panel.elbo.value, float(np.hypot(other.elbo.se, panel.elbo.se)))


if not options.quick:
    print(f"counts without a network: {with_hidden(0)} nats; with four hidden units instead of two: {with_hidden(4)}")

# %% [markdown]
# ## A group that comes later
# The guide is fitted without the last group and carried to the data with it: q(shared) and the function stay, the new
# group's branch is the function of its four counts. Beside it the guide fitted anew.


# %%
def without_last(data: Dataset) -> Dataset:
    """The data without its last group."""
    (grouping,) = data.static["groupings"]
    rows = data.arrays["group"][:, 0] < grouping.groups - 1
    arrays = {n: value[rows] if len(np.shape(value)) and len(value) == len(rows) else value
              for n, value in data.arrays.items()}  # fmt: skip
    static = {**data.static, "groupings": (dataclasses.replace(grouping, groups=grouping.groups - 1),)}
    return Dataset(f"{data.name}_before", arrays, static=static)


whole: Model = studies["counts"].model
before = fit(curated.model(without_last(whole.dataset)), "amortised", key=key, starts=2 if options.quick else 8)
late = fit(whole, carried(before), key=key)
anew = fit_of(studies["counts"], "amortised")
drawn = {way: one.draw(key, 20_000)["group_effects"][:, -1] for way, one in (("carried", late), ("fitted anew", anew))}
rows = [(way, *values.mean(0).round(3), *values.std(0).round(3)) for way, values in drawn.items()]
columns = ["last group", "mean Intercept", "mean x1", "sd Intercept", "sd x1"]
print(pd.DataFrame(rows, columns=columns).to_string(index=False))
apart = np.abs(drawn["carried"].mean(0) - drawn["fitted anew"].mean(0)) / drawn["fitted anew"].std(0)
price = Estimate(anew.elbo.value - late.elbo.value, float(np.hypot(anew.elbo.se, late.elbo.se)))
wide = np.expm1(np.abs(np.log(drawn["carried"].std(0) / drawn["fitted anew"].std(0))).max())
spent = late.cost.gradient_evaluations, anew.cost.gradient_evaluations
print(f"at most {apart.max():.2f} sds apart, widths within {wide:.0%}; {spent[0]:,} gradients instead of {spent[1]:,}")
print(f"the ELBO on all groups is lower by {price} nats, since q(shared) has not seen the last one")

# %% [markdown]
# ## Decision
# Amortise where it costs less than a tenth of a nat, or than what its errors allow to see; couple where the coupling is
# worth as much.

# %%
worth = 0.1


def decide(done: Study) -> str:
    """Which of the structured guides to use for this data set."""
    cost, gain, rest = (ahead(done, *pair) for pair in (("coupled", "amortised"), ("coupled", "blocks"),
                                                        ("full_rank", "coupled")))  # fmt: skip
    if not gain.value > max(worth, 2 * gain.se):
        return f"blocks are enough: coupling gains {gain} nats"
    choice = "amortise" if cost.value < max(worth, 2 * cost.se) else "couple every group by itself"
    left = "nothing is left to the full rank" if rest.value < max(worth, 2 * rest.se) else f"{rest} nats are left"
    return f"{choice} (coupling gains {gain} nats, amortising it costs {cost}, and {left})"


decisions = {name: decide(done) for name, done in studies.items()}
grown = {name: f"{free_numbers(done, 'amortised'):,} for {free_numbers(done, 'coupled'):,}"
         for name, done in studies.items()}  # fmt: skip
for name, words in decisions.items():
    print(f"{name}: {words}; parameters {grown[name]}.")
same = apart.max() < 0.2 and wide < 0.1 and price.value < max(worth, 2 * price.se)
told = "as a new fit would have it" if same else f"not a new fit's ({apart.max():.2f} sds, {wide:.0%}, {price} nats)"
summary = "; ".join(f"{name}: {words.partition(' (')[0].partition(':')[0]}" for name, words in decisions.items())
right = [name for name, done in studies.items() if done.comparison.guides.loc["full_rank", "verdict"] == "right"]
report = f"report a Gaussian for {', '.join(right)}" if right else "report NUTS, as no Gaussian is right in everything"
print(f"Decision: {summary}. A later group's branch is {told}. Beyond the ELBO: {report}.")
