# %% [markdown]
"""# Coordinate ascent: is it exact, and may its ELBO choose the features?

With conjugate priors the best factor given all others has a closed form: coordinate ascent updates one after the other
and needs no gradient. Posterior and evidence of this regression are known exactly, and so is what a factorised guide
lacks: half the log of prod diag P / det P nats for correlation, and sds that are too small by a known factor.

**Questions.** Does coordinate ascent end where the mean field is best? Are its intervals right? And does its ELBO,
which is often read as the evidence, choose the same features as the evidence does?
"""

# %%
import argparse
import itertools
import sys
from pathlib import Path

import jax
import numpy as np
import pandas as pd

import models
from toolkit import Dataset, default_storage, fit, study

parser = argparse.ArgumentParser(description="Is coordinate ascent exact, and may its ELBO choose features?")
parser.add_argument("--quick", action="store_true", help="few draws and features, for tests")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("reports"))
options = parser.parse_args([] if "ipykernel" in sys.modules else None)
regression = models.load("conjugate_regression")
key = jax.random.PRNGKey(options.seed)

# %% [markdown]
# ## From orthogonal features to copies of one another
# Two features that are correlated by exactly so much, and orthogonal to the intercept. A sweep leaves the fourth power
# of the correlation of the nats that were left. The noise is known: the posterior is a Gaussian, its precision P.


# %%
def pair(correlation: float, slopes: tuple[float, float], rows: int = 60) -> Dataset:
    """Two features with an exact correlation, and an outcome that both move."""
    rng = np.random.default_rng(options.seed)
    apart = np.linalg.qr(np.column_stack([np.ones(rows), rng.normal(size=(rows, 3))]))[0][:, 1:] * np.sqrt(rows)
    x = np.column_stack([apart[:, 0], correlation * apart[:, 0] + np.sqrt(1 - correlation**2) * apart[:, 1]])
    coords = {"feature": np.array(["x1", "x2"])}
    y = x @ np.array(slopes) + regression.NOISE_SD * apart[:, 2]
    return Dataset(
        f"pair_{correlation:g}", {"x": x, "y": y}, coords=coords, source="constructed", licence="none needed"
    )


rows = []
for correlation in (0.0, 0.99) if options.quick else (0.0, 0.5, 0.9, 0.99, 0.999):
    bound = regression.model(pair(correlation, (1.0, -1.0)), noise="known")
    ascent = fit(bound, "cavi", key=key)
    posterior = regression.Posterior(bound.arrays["x"], bound.arrays["y"], "known", regression.NOISE_SD)
    sds = regression.NOISE_SD * np.sqrt(np.diag(np.linalg.inv(posterior.precision)))
    own = np.diag(posterior.precision)
    lacking = 0.5 * (np.log(own).sum() - np.linalg.slogdet(posterior.precision)[1])
    narrow = (own[1] * np.linalg.inv(posterior.precision)[1, 1]) ** -0.5
    found = bound.log_evidence - ascent.elbo.value  # both in closed form
    ratio = ascent.params["scale"][1] / sds[1]
    rows.append((correlation, ascent.cost.gradient_evaluations, lacking, found, narrow, ratio))
columns = ["correlation", "sweeps", "lacking, theory", "lacking (nats)", "sd ratio, theory", "sd ratio"]
print(pd.DataFrame(rows, columns=columns).round(4).to_string(index=False))

# %% [markdown]
# ## Longley's data, noise unknown
# Four guides in one report: everything factorised by coordinate ascent and by Gaussians, the coefficients jointly, and
# a Gaussian over everything. Coordinate ascent chooses from all factors whatever their form, so that no mean field of
# Gaussians can have a higher ELBO.

# %%
longley = regression.dataset()
names = [str(name) for name in longley.coords["feature"]]
kept = ["year", "national product", "unemployed", "armed forces"] if options.quick else names
data = regression.with_features(longley, kept)
done = study(
    regression.model(data),
    guides=["cavi", "mean_field"] if options.quick else ["cavi", "mean_field", "cavi_joint", "full_rank"],
    focus=["beta[year]", "beta[year] > 0", "noise"],
    seed=options.seed,
    draws=1_000 if options.quick else 5_000,
    storage=None if options.quick else default_storage(),
    command=f"python case_studies/07_coordinate_ascent.py --seed {options.seed}",
)
report = done.write(options.out / "coordinate_ascent")
for fitted in done.fits:
    print(f"{fitted.guide.name}: ELBO {fitted.elbo} nats; {done.comparison.guides.loc[fitted.guide.name, 'sentence']}")
print(f"log evidence {done.model.log_evidence:.4f} nats; {report}")

# %% [markdown]
# ## Which features? Occam's razor
# A feature more never fits worse: R squared only rises. The evidence averages the fit over the prior, and so takes off
# what the data did not need (MacKay's Occam factor). The ELBO takes off more: what the guide's form costs, and a
# factorised guide costs the more, the more collinear the features are. Here are all subsets, evidence and ELBO exact.


# %%
def scored(features: tuple[str, ...]) -> dict[str, object]:
    """Fit, evidence and both ELBOs of a model with some of the features, in nats."""
    bound = regression.model(regression.with_features(data, features))
    x, y = bound.arrays["x"], bound.arrays["y"]
    left = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]  # x and y have mean 0
    elbos = {name: fit(bound, name, key=key, elbo_draws=200).elbo.value for name in ("cavi", "cavi_joint")}
    r_squared = 1 - (left @ left) / (y @ y)
    return {
        "features": ", ".join(features),
        "count": len(features),
        "R2": r_squared,
        "evidence": bound.log_evidence,
        **elbos,
    }


sizes = (3, 4) if options.quick else range(1, len(kept) + 1)
subsets = [subset for size in sizes for subset in itertools.combinations(kept, size)]
scores = pd.DataFrame([scored(subset) for subset in subsets])
best_of_size = scores.loc[scores.groupby("count")["evidence"].idxmax()]
print("The best of each size, by the evidence:")
print(best_of_size.round(3).to_string(index=False))
ways = ("evidence", "cavi_joint", "cavi")
chosen = {way: scores.loc[scores[way].idxmax()] for way in ways}
for way in ways:
    print(f"best by {way}: {chosen[way]['features']} (log evidence {chosen[way]['evidence']:.3f})")
agreement = scores[list(ways)].rank().corr()["evidence"]
print(f"rank correlation with the evidence: cavi_joint {agreement['cavi_joint']:.3f}, cavi {agreement['cavi']:.3f}")

# %% [markdown]
# ## Where the ELBO turns
# The same question where the answer is known: both features move the outcome, and their correlation grows.

# %%
turned = []
for correlation in (0.9, 0.999) if options.quick else (0.0, 0.9, 0.99, 0.999, 0.9999):
    data_of_pair = pair(correlation, (1.0, -0.05 / np.sqrt(1 - correlation**2)))
    both = regression.model(data_of_pair, noise="known")
    single = regression.model(regression.with_features(data_of_pair, ["x1"]), noise="known")
    by_elbo = [fit(one, "cavi", key=key, elbo_draws=200).elbo.value for one in (both, single)]
    turned.append((correlation, both.log_evidence - single.log_evidence, by_elbo[0] - by_elbo[1]))
print("nats in favour of both features over one:")
print(pd.DataFrame(turned, columns=["correlation", "by evidence", "by cavi's ELBO"]).round(4).to_string(index=False))

# %% [markdown]
# ## Decision

# %%
lost = {way: chosen["evidence"]["evidence"] - chosen[way]["evidence"] for way in ("cavi_joint", "cavi")}
for way, nats in lost.items():
    same = chosen[way]["features"] == chosen["evidence"]["features"]
    print(
        f"{way}'s ELBO chooses {'what the evidence does' if same else f'features whose evidence is {nats:.2f} lower'}."
    )
usable = [way for way in lost if chosen[way]["features"] == chosen["evidence"]["features"]]
print(
    f"Decision: choose features by {' or by the ELBO of '.join(['the evidence', *usable])}"
    + (
        f", and not by the ELBO of {', '.join(way for way in lost if way not in usable)}."
        if len(usable) < len(lost)
        else "."
    )
)
