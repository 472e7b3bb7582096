# %% [markdown]
"""# Collinear features: which measurements may I speak of?

A logistic regression on 30 measurements of breast masses. Many of them say nearly the same: radius, perimeter and
area of one cell nucleus go together. The data then know sums of slopes well, and each slope alone badly.

**Question.** May the intervals of single slopes be reported from a variational fit?
"""

# %%
import argparse
import sys
from pathlib import Path

import jax
import pandas as pd

import models
from toolkit import Estimate, default_storage, study

parser = argparse.ArgumentParser(description="Which of 30 collinear measurements may one speak of?")
parser.add_argument("--quick", action="store_true", help="small simulated data and few draws, for tests")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("reports"))
options = parser.parse_args([] if "ipykernel" in sys.modules else None)

# %% [markdown]
# The default guides, the real data, and three quantities of our own: a slope, the sum of three slopes that go together,
# and the claim that the slope is positive. The quick version has six collinear features that were simulated.

# %%
curated = models.load("collinear_logistic")
if options.quick:
    data = curated.simulate(jax.random.PRNGKey(options.seed), rows=200, features=6, correlation=0.9)
    family = ["x1", "x2", "x3"]
    settings = {"guides": ["mean_field", "full_rank"], "chains": 2, "warmup": 400, "draws": 1_000}
else:
    data = curated.dataset()
    family = ["worst radius", "worst perimeter", "worst area"]
    settings = {}
slopes = [f"beta[{name}]" for name in family]
alone, together, claim = slopes[-1], " + ".join(slopes), f"{slopes[-1]} > 0"

done = study(
    curated.model(data),
    focus=[alone, together, claim],
    seed=options.seed,
    storage=None if options.quick else default_storage(),
    command=f"python case_studies/01_collinear_features.py --seed {options.seed}",
    **settings,
)
report = done.write(options.out / "collinear_features")
comparison = done.comparison

# %% [markdown]
# ## What each guide gets wrong
# The sentence of the first screen, guide by guide. "Too narrow" is an sd below the reference's.

# %%
for name, row in comparison.guides.iterrows():
    print(f"{name}: {row['sentence']}")

# %% [markdown]
# ## The slope alone, and the sum
# A factorised guide cannot hold a correlation. What it does to one slope it does not do to the sum.

# %%
shown = comparison.focus[~comparison.focus["event"].astype(bool)].copy()
shown["width"] = shown["high"] - shown["low"]
widths = shown.pivot(index="source", columns="item", values="width")
if "reference" in widths.index:
    print("\nWidth of the 90 % interval, as a multiple of the reference's:")
    print((widths / widths.loc["reference"]).drop(index="reference").round(2).to_string())
for _, row in comparison.focus[comparison.focus["event"].astype(bool)].iterrows():
    print(f"P({row['item']}) = {Estimate(row['probability'], row['probability_se'])} by {row['source']}")

# %% [markdown]
# ## Claims that a guide makes and NUTS does not
# A reader calls a slope "found" when its 90 % interval leaves out 0. Which of these would be false alarms?


# %%
def found(source: str) -> set[str]:
    """The slopes whose 90 % interval leaves out 0."""
    rows = comparison.quantities[comparison.quantities["source"] == source]
    outside = rows[(rows["q5"] > 0) | (rows["q95"] < 0)]
    return {str(name) for name in outside["quantity"] if str(name).startswith("beta")}


supported = found("reference")
alarms = {str(name): sorted(found(str(name)) - supported) for name in comparison.guides.index}
print(f"\nThe reference finds {len(supported)} slopes.")
for name, extra in alarms.items():
    print(f"{name} finds {len(found(name))}, of which the reference does not support {len(extra)}.")


# %% [markdown]
# ## Decision


# %%
def decide(guides: pd.DataFrame) -> str:
    """What to report, from the verdicts alone."""
    if not comparison.reference_ok:
        return f"Decide nothing yet: {done.reference.status.value}."
    right = guides[guides["verdict"] == "right"]
    if len(right):
        cheapest = right.sort_values("seconds").index[0]
        return f"Report the slopes and intervals of {cheapest}; every quantity is right."
    open_ones = guides[guides["verdict"] == "cannot tell"].sort_values("cannot_tell")
    if len(open_ones):
        name, row = open_ones.index[0], open_ones.iloc[0]
        return (
            f"Report NUTS. {name} is close: {row['right']} of {row['quantities']} quantities are right, none is wrong, "
            "and more reference draws would decide the rest."
        )
    return "Report NUTS; each guide is wrong somewhere."


print(f"\nDecision: {decide(comparison.guides)}")
misleading = [name for name, extra in alarms.items() if extra]
print(f"Would not trust for single slopes: {', '.join(misleading) or 'none of the guides made a false claim'}.")
for sentence in comparison.advice:
    print(f"- {sentence}")
print(f"\nReport: {report}")
