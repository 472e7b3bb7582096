# %% [markdown]
"""# Richer families: when a Gaussian is not enough, is it the skew or the modes?

A full-rank Gaussian can fail in two ways that ask for different cures. Where the posterior bends, as in a funnel, a
flow bends with it. Where it has several modes, a mixture has a component for each. Either family contains the full-rank
Gaussian, so each can only gain; how much each gains says which of the two it was.

**Question.** On two modes and on a funnel, both known exactly: of the nats that the Gaussian lacks, how many does a
flow bring, how many a mixture, and are their intervals right?
"""

# %%
import argparse
import math
import sys
from pathlib import Path

import jax
import matplotlib as mpl

if "ipykernel" not in sys.modules:
    mpl.use("agg")
import matplotlib.pyplot as plt
import numpy as np

import models
from toolkit import Estimate, Model, Study, study

parser = argparse.ArgumentParser(description="Is it the skew or the modes?")
parser.add_argument("--quick", action="store_true", help="few draws and one target, for tests")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("reports"))
options = parser.parse_args([] if "ipykernel" in sys.modules else None)
targets = models.load("gaussian_target")
families = ["full_rank", "mixture", "iaf"] if options.quick else ["full_rank", "mixture", "mixture_6", "iaf", "bnaf"]

# %% [markdown]
# ## Two targets
# Two modes, eight sds apart, the upper one with 0.7 of the mass: a Gaussian on that one lacks log(1 / 0.7) nats. And a
# funnel in the chart in which it is written, whose neck no Gaussian reaches.

# %%
WEIGHT = 0.7
known: dict[str, tuple[Model, str]] = {
    "two_modes": (targets.model(target="two_modes", dimensions=2, correlation=0.0, weight=WEIGHT), ""),
    "funnel": (targets.model(target="funnel", dimensions=2, correlation=0.0), "@plain"),
}
if options.quick:
    del known["funnel"]


# %%
def compared(name: str) -> Study:
    """The study of one target with all families, its report written."""
    target, chart = known[name]
    done = study(
        target,
        guides=[f"{family}{chart}" for family in families],
        focus=["z[1] > 0"],
        seed=options.seed,
        draws=1_000 if options.quick else 10_000,
        command=f"python case_studies/13_richer_families.py --seed {options.seed}",
    )
    print(f"\n{name}: {done.write(options.out / f'richer_families_{name}')}")
    for fitted in done.fits:
        print(f"  {fitted} in {fitted.cost.seconds:.1f} s {fitted.message}")
    return done


studies = {name: compared(name) for name in known}

# %% [markdown]
# ## What each family brings
# KL(q || p) is the log evidence, which is known here, minus the ELBO. What a family gains over the Gaussian is told as
# a share of what the Gaussian lacks.

# %%
lacks: dict[str, dict[str, Estimate]] = {}
for name, done in studies.items():
    evidence = known[name][0].log_evidence
    assert evidence is not None
    lacks[name] = {
        fitted.guide.name.partition("@")[0]: Estimate(evidence - fitted.elbo.value, fitted.elbo.se)
        for fitted in done.fits
        if fitted.elbo is not None and fitted.status.has_optimum
    }
print(f"by theory a Gaussian on the upper mode lacks {math.log(1 / WEIGHT):.4f} nats")

# %% [markdown]
# ## Where the draws lie

# %%
for name, done in studies.items():
    target = known[name][0]
    assert target.exact is not None
    key = jax.random.key(options.seed)
    sites = ("log_scale", "z") if name == "funnel" else ("z",)

    def plane(drawn: dict[str, np.ndarray], sites: tuple[str, ...] = sites) -> np.ndarray:
        """Two coordinates of draws, (draws, 2)."""
        return np.concatenate([np.asarray(drawn[site]).reshape(len(drawn[site]), -1) for site in sites], 1)[:, :2]

    usable = [fitted for fitted in done.fits if fitted.usable]
    figure, panels = plt.subplots(1, len(usable) + 1, figsize=(3 * len(usable) + 3, 3.2), sharex=True, sharey=True)
    shown = [("exact", plane(dict(target.exact(key, 2_000))))]
    shown += [(fitted.guide.name, plane(fitted.draw(key, 2_000, sites))) for fitted in usable]
    for panel, (title, points) in zip(panels, shown, strict=True):
        panel.scatter(*points.T, s=2, alpha=0.4, color="0.3" if title == "exact" else "C0", linewidths=0)
        panel.set(title=title, xlabel="log_scale" if name == "funnel" else "z[1]")
    panels[0].set(ylabel="z[1]" if name == "funnel" else "z[2]", xlim=np.quantile(shown[0][1][:, 0], [0, 1]))
    panels[0].set_ylim(np.quantile(shown[0][1][:, 1], [0.002, 0.998]))
    figure.tight_layout()
    picture = options.out / f"richer_families_{name}" / "draws.png"
    figure.savefig(picture, dpi=120)
    plt.close(figure)
    print(f"{name}: {picture}")

# %% [markdown]
# ## Decision

# %%
said = []
for name, done in studies.items():
    own, verdicts = lacks[name], {str(guide): row for guide, row in done.comparison.guides.iterrows()}
    gaussian = own["full_rank"]
    print(f"{name}: the Gaussian lacks {gaussian} nats")
    for family, left in own.items():
        if family != "full_rank":
            print(f"  {family} lacks {left}: it brings {round(100 * (1 - left.value / gaussian.value))} % of them")
    for row in verdicts.values():
        print(f"  {row['sentence']}")
    flow = min((left for family, left in own.items() if family in ("iaf", "bnaf")), key=lambda left: left.value)
    mixture = own["mixture"]
    apart = Estimate(flow.value - mixture.value, math.hypot(flow.se, mixture.se))
    what = "cannot be told apart" if abs(apart.value) < 3 * apart.se else "the modes" if apart.value > 0 else "the skew"
    best = min(own, key=lambda family: own[family].value)
    right = [guide for guide, row in verdicts.items() if row["verdict"] == "right"]
    said.append(
        f"on {name} it is {what} (a flow lacks {flow} nats, a component for each mode {mixture}), {best} comes "
        f"nearest, and right {'is' if len(right) == 1 else 'are'} {', '.join(right) or 'none'}"
    )
print(f"\nDecision: {'; '.join(said)}.")
