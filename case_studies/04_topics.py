# %% [markdown]
"""# Topics: may I publish the word lists?

Latent Dirichlet allocation describes texts by topics, and a topic by its most probable words. It is nearly always
fitted by a factorised guide, and its lists of words are printed without a word on how sure they are.

**Question.** Are the word lists and the topics' shares the same by a mean field as by NUTS, and are their intervals?
"""

# %%
import argparse
import sys
from pathlib import Path

import pandas as pd

import models
from toolkit import Estimate, default_storage, study

parser = argparse.ArgumentParser(description="Are the word lists of a topic model the same by a mean field?")
parser.add_argument("--quick", action="store_true", help="fewer texts, words and draws, for tests")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("reports"))
options = parser.parse_args([] if "ipykernel" in sys.modules else None)

# %% [markdown]
# Books of the King James Bible of four kinds: law, kings, poetry, gospels. Four topics. Their order means nothing:
# draws of NUTS and of guides are brought to one order before anything is compared. We ask for the shares of two topics,
# and which of them is the larger.

# %%
curated = models.load("lda")
WORDS = 8
if options.quick:
    data = curated.dataset(documents=8, words=30)
    settings = {"guides": ["mean_field"], "chains": 2, "warmup": 300, "draws": 600}
else:
    data = curated.dataset()
    settings = {"guides": ["mean_field", "low_rank"]}
done = study(
    curated.model(data),
    focus=["share[topic 1]", "share[topic 2]", "share[topic 1] > share[topic 2]"],
    seed=options.seed,
    storage=None if options.quick else default_storage(),
    command=f"python case_studies/04_topics.py --seed {options.seed}",
    **settings,
)
report = done.write(options.out / "topics")
comparison = done.comparison
for name, row in comparison.guides.iterrows():
    print(f"{name}: {row['sentence']}")

# %% [markdown]
# ## The topics, with the posterior's uncertainty
# `in_top` is the probability that a word belongs on the list at all. Far from 1, the list's end is an accident.

# %%
sure: dict[str, float] = {}
if done.reference.usable:
    words = curated.top_words(done.reference.draws["topics"], data.coords["word"], WORDS)
    for topic, group in words.groupby("topic", sort=False):
        listed = ", ".join(f"{w} ({p:.2f})" for w, p in zip(group["word"], group["in_top"], strict=True))
        print(f"{topic}: {listed}")
        sure[str(topic)] = float((group["in_top"] > 0.9).mean())

# %% [markdown]
# ## The same lists by the guides
# Which of the words that the reference lists are on the guide's list too?


# %%
def lists(source: str) -> dict[str, list[str]]:
    """The most probable words of each topic by posterior mean."""
    rows = comparison.quantities[comparison.quantities["source"] == source]
    rows = rows[rows["quantity"].str.startswith("topics[")]
    inside = rows["quantity"].str.removeprefix("topics[").str.removesuffix("]")
    parts = inside.str.partition(", ")
    frame = pd.DataFrame({"topic": parts[0], "word": parts[2], "mean": rows["mean"]})
    return {
        str(topic): group.nlargest(WORDS, "mean")["word"].tolist()
        for topic, group in frame.groupby("topic", sort=False)
    }


sources = list(dict.fromkeys(comparison.quantities["source"]))
by_source = {source: lists(source) for source in sources}
shared: dict[str, float] = {}
for source in sources[1:] if "reference" in sources else []:
    overlap = {
        topic: len(set(listed) & set(by_source[source][topic])) / WORDS
        for topic, listed in by_source["reference"].items()
    }
    shared[source] = min(overlap.values())
    print(f"{source}: {'; '.join(f'{topic} {part:.0%}' for topic, part in overlap.items())} of the words are the same")

# %% [markdown]
# ## The intervals, site by site

# %%
judged = comparison.table[comparison.table["metric"].isin(["shift", "sd_ratio", "coverage_90"])].copy()
judged["site"] = judged["quantity"].str.split("[").str[0]
summary = judged.groupby(["guide", "site", "metric"], sort=False)["value"].describe(percentiles=[0.05, 0.5, 0.95])
print(summary[["5%", "50%", "95%"]].round(3).to_string() if len(summary) else "No reference draws to compare with.")
for _, row in comparison.focus[comparison.focus["event"].astype(bool)].iterrows():
    print(f"P({row['item']}) = {Estimate(row['probability'], row['probability_se'])} by {row['source']}")

# %% [markdown]
# ## Decision
# Word lists need means only; shares and their order need intervals.

# %%
print()
for guide, part in shared.items():
    if not comparison.reference_ok:
        print(f"{guide}'s word lists share {part:.0%} with draws that failed their checks: no evidence either way.")
    elif part == 1:
        print(f"Would trust {guide} for the word lists: they are the same words in every topic.")
    else:
        print(f"Would check {guide}'s word lists: in its worst topic {part:.0%} of the words are the reference's.")
unsure = [f"{topic} ({part:.0%} sure)" for topic, part in sure.items() if part < 1]
print(f"Would shorten the lists, whoever made them: {', '.join(unsure) or 'no, every word is sure of its place'}.")

if not comparison.reference_ok:
    print(f"Decision: no intervals are published yet; {done.reference.status.value}.")
    for reason in done.reference.reasons:
        print(f"  {reason}")
else:
    for guide in comparison.guides.index:
        own = judged[(judged["guide"] == guide) & (judged["site"] == "share")]
        wrong = sorted(set(own.loc[own["verdict"] == "wrong", "quantity"]))
        right = set(own["verdict"]) - {""} == {"right"}
        use = "not publish" if wrong else "publish" if right else "publish NUTS's rather than"
        print(f"Decision: {use} {guide}'s intervals of the shares (wrong: {', '.join(wrong) or 'none'}).")
print(f"\nReport: {report}")
