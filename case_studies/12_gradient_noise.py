# %% [markdown]
"""# Gradient noise: which estimator could have found the optimum?

Stochastic optimisers climb by gradients that are estimated from draws of the guide. The score function works for any
guide, the reparameterised gradient only where draws move with the parameters. How much the freedom costs is seldom
measured where it matters: at one's own posterior, far from the optimum and at it.

**Question.** With as many gradients as the fit took, which estimators could have found the optimum of a mean field for
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
from toolkit.variational.averaging import averaging_costs

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
# Averaged steps on n noisy gradients end, at best, 1/2 tr(H^-1 C) / n nats below the optimum, with C the covariance of
# one gradient and H minus the ELBO's Hessian, in all parameters (Polyak & Juditsky 1992). So an estimator that is left
# far away by this would have missed the optimum; one that is not might have found it. The average of n gradients of S
# draws is one of n S draws; baselines are taken as they are with 64.

# %%
budget = fitted.cost.gradient_evaluations
costs = averaging_costs(
    done.model,
    GUIDE,
    at=fitted,
    key=jax.random.key(options.seed),
    draws=16 if options.quick else 64,
    repeats=80 if options.quick else 400,
)
left = {name: Estimate(cost.value / budget, cost.se / budget) for name, cost in costs.items()}
for name, loss in left.items():
    print(f"{name}: {loss} nats left, at best, after {budget:,} draws")

# %% [markdown]
# ## Decision

# %%
for place, noise in noises.items():
    prices = {estimator: noise.equivalent_draws(estimator) for estimator in noise.totals["estimator"].unique()}
    told = ", ".join(f"{name} {price}" for name, price in prices.items() if name != "reparameterised")
    print(f"{place}, draws that vary as little as one reparameterised draw: {told}")
possible = [name for name, loss in left.items() if loss.value + 1.96 * loss.se < TOLERANCE]
missed = [name for name, loss in left.items() if loss.value - 1.96 * loss.se > TOLERANCE]
price = {place: noise.equivalent_draws("score") for place, noise in noises.items()}
print(
    f"Decision: one reparameterised draw is worth {price['at the fit']} draws of the score function at the optimum and "
    f"{price['where it begins']} where the guide begins. After {budget:,} draws, {', '.join(missed) or 'none'} would "
    f"have missed the optimum by more than {TOLERANCE} nats; within it, at best: {', '.join(possible) or 'none'}."
)
print(f"\nReport: {report}\nFigure: {picture}")
