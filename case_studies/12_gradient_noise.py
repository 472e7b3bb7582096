# %% [markdown]
"""# Gradient noise: which estimator would have found the optimum?

Stochastic optimisers climb by gradients that are estimated from draws of the guide. The score function works for any
guide, the reparameterised gradient only where draws move with the parameters. How much the freedom costs is seldom
measured where it matters: at one's own posterior, far from the optimum and at it.

**Question.** With as many gradients as the fit took, which estimators would have found the optimum of a mean field for
a logistic regression?
"""

# %%
import argparse
import sys
from pathlib import Path

import jax
from matplotlib.figure import Figure

import models
from toolkit import Estimate, default_storage, gradient_noise, study

parser = argparse.ArgumentParser(description="How many draws of the score function equal one reparameterised draw?")
parser.add_argument("--quick", action="store_true", help="small simulated data and few draws, for tests")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("reports"))
options = parser.parse_args([] if "ipykernel" in sys.modules else None)

# %% [markdown]
# ## The fit
# A study first: what is fitted is compared with NUTS like any guide.

# %%
curated = models.load("collinear_logistic")
if options.quick:
    data = curated.simulate(jax.random.PRNGKey(options.seed), rows=200, features=6, correlation=0.9)
    settings = {"chains": 2, "warmup": 300, "draws": 500}
else:
    data, settings = curated.dataset(), {}
TOLERANCE, GUIDE = 0.1, "mean_field"
done = study(
    curated.model(data),
    guides=[GUIDE],
    tolerance=TOLERANCE,
    seed=options.seed,
    storage=None if options.quick else default_storage(),
    command=f"python case_studies/12_gradient_noise.py --seed {options.seed}",
    **settings,
)
folder = options.out / "gradient_noise"
report = done.write(folder)
fitted = done.fits[0]
print(f"{fitted}\n{fitted.cost.gradient_evaluations:,} gradients by the solver '{fitted.solver}'")

# %% [markdown]
# ## How much each estimator varies, far from the optimum and at it
# Far is where the guide begins: at zero, with sds of 0.1 in unconstrained space. `relative` is the sum of the variances
# over the gradient's squared length: below 1, one gradient is more signal than noise. At the optimum there is hardly
# any signal.

# %%
draws = (1, 4, 16) if options.quick else (1, 4, 16, 64, 256)
places = {"where it begins": None, "at the fit": fitted}
noises = {
    place: gradient_noise(
        done.model, GUIDE, at=at, key=jax.random.key(options.seed), draws=draws, repeats=40 if options.quick else 200
    )
    for place, at in places.items()
}
for place, noise in noises.items():
    print(f"\n{place}: squared length of the gradient {noise.square} (nats per unit)²")
    print(noise.totals.to_string(index=False, float_format="{:.3g}".format))
    for estimator, reason in noise.absent.items():
        print(f"no {estimator}: {reason}")

# %%
figure = Figure(figsize=(10, 4.2), layout="constrained")
panels = figure.subplots(1, 2, sharey=True)
for panel, (place, noise) in zip(panels, noises.items(), strict=True):
    for (estimator, own), marker in zip(noise.totals.groupby("estimator", sort=False), "osDv^", strict=False):
        panel.errorbar(own["draws"], own["variance"], 1.96 * own["variance_se"], marker=marker, label=estimator)
    panel.set(xscale="log", yscale="log", xlabel="draws behind one gradient", title=f"{place[0].upper()}{place[1:]}")
panels[0].set_ylabel("variance, all parameters (nats per unit)²")
panels[0].legend(frameon=False, fontsize=8)
picture = folder / "gradient_noise.png"
figure.savefig(picture, dpi=150)

# %% [markdown]
# ## What noise costs in nats
# Averaged steps on n noisy gradients end, at best, 1/2 trace(H^-1 C) / n nats below the optimum, with C the covariance
# of one gradient and H the ELBO's curvature (Polyak & Juditsky 1992). In a location, a mean field's curvature at its
# optimum is one over the guide's variance. Locations and diagonals only are counted here, so that it costs more yet.

# %%
budget = fitted.cost.gradient_evaluations
scales = {name.replace("scale", "loc"): value for name, value in fitted.params.items() if name.endswith("scale")}
variances = {
    (name, str([i]) if value.ndim else ""): float(one) ** 2
    for name, value in scales.items()
    for i, one in enumerate(value.reshape(-1))
}
table = noises["at the fit"].table
left = {}
for estimator, own in table.groupby("estimator", sort=False):
    # Per draw, since the average of n gradients of S draws is one of n S draws; baselines are best with many.
    count = own["draws"].max() if estimator.startswith("score_") else own["draws"].min()
    rows = [
        (variances[parameter, element] * count * variance, variances[parameter, element] * count * se)
        for parameter, element, variance, se in own.loc[
            own["draws"] == count, ["parameter", "element", "variance", "variance_se"]
        ].itertuples(index=False)
        if (parameter, element) in variances
    ]
    # The errors of variances that come from the same draws are added as if they always went together.
    left[estimator] = Estimate(*(sum(column) / (2 * budget) for column in zip(*rows, strict=True)))
    print(f"{estimator}: {left[estimator]} nats left after {budget:,} draws")

# %% [markdown]
# ## Decision

# %%
for place, noise in noises.items():
    prices = {estimator: noise.equivalent_draws(estimator) for estimator in noise.totals["estimator"].unique()}
    told = ", ".join(f"{name} {price}" for name, price in prices.items() if name != "reparameterised")
    print(f"{place}, draws that vary as little as one reparameterised draw: {told}")
found = [name for name, loss in left.items() if loss.value + 1.96 * loss.se < TOLERANCE]
missed = [name for name, loss in left.items() if loss.value - 1.96 * loss.se > TOLERANCE]
price = {place: noise.equivalent_draws("score") for place, noise in noises.items()}
print(
    f"Decision: one reparameterised draw is worth {price['at the fit']} draws of the score function at the optimum and "
    f"{price['where it begins']} where the guide begins. Within {TOLERANCE} nats after {budget:,} draws would be: "
    f"{', '.join(found) or 'none'}; certainly not: {', '.join(missed) or 'none'}."
)
print(f"\nReport: {report}\nFigure: {picture}")
