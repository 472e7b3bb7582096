r"""Gaussian mixture: how many kinds are there, when nobody has told which is which?

**Question.** 342 penguins were measured, and their species left out. What do the measurements say about groups, and how
surely? Which group a bird belongs to is a discrete unknown of each row; it is summed out of the density.

**Model**, for components k, features j and rows i, on features x that are standardised:

    weights         ~ Dirichlet(2, ..., 2)                                       shares of the components
    variances[k, j] ~ InverseGamma(2, components^(-2 / features))
    means[k, j]     ~ Normal(0, sqrt(variances[k, j] / 0.01))
    x[i]            ~ sum_k weights[k] Normal(means[k], diag(variances[k]))
    sds[k, j]       = sqrt(variances[k, j])

**Why these priors.** They are the conjugate ones of Fraley & Raftery (2007), which keep the density bounded: without a
prior on variances a component that sits on one row has a likelihood without end. Components tile the data, so that
a variance has the prior mean components^(-2 / features) of the data's own, 1; means lie within some ten of their
component's sds; the weight of 0.01 is that of a hundredth of a row. The Dirichlet's 2 keeps components from being
empty, of which the data would say nothing. As the features come standardised, priors look at the data's place and
width, and at nothing else.

**Labels.** The density is the same for every order of the components. Draws are brought to one order by matching means
before anything is summarised; with 2 components a posterior has 2 equal copies.

**More than one mode.** With more components than the data hold apart there are further modes that no relabelling joins:
one component takes two groups while two share a third. Guides, NUTS and EM each find some of them.

**Guide of its own.** `em` is expectation maximisation (`models._mixture_em`): in turn, the exact distribution of the
assignments given the parameters, and the best parameters given those. It ends at a maximum of the posterior density,
from several starts; with the priors left out it would be one of the likelihood.

References:
    Dempster, Laird & Rubin (1977), Maximum likelihood from incomplete data via the EM algorithm, Journal of the Royal
    Statistical Society B 39(1).
    Fraley & Raftery (2007), Bayesian regularization for normal mixture estimation and model-based clustering, Journal
    of Classification 24(2).
    Gorman, Williams & Fraser (2014), Ecological sexual dimorphism and environmental variability within a community of
    Antarctic penguins (genus Pygoscelis), PLoS ONE 9(3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd

from models._mixture_em import Mixture, PseudoData, guide
from toolkit import Dataset, Labels, Model, Quantity
from toolkit.variational.expectation_maximisation import STARTS

CONCENTRATION, MEAN_WEIGHT, VARIANCE_SHAPE = 2.0, 0.01, 2.0

_FILE = Path(__file__).parent / "data" / "penguins.csv"


def gaussian_mixture(
    x: Any = None, *, rows: int, features: int, components: int = 2, concentration: float = CONCENTRATION
) -> None:
    """The NumPyro callable.

    Args:
        x: Standardised features `(row, feature)`; drawn if not given.
        rows: How many rows.
        features: How many features.
        components: How many components.
        concentration: Dirichlet parameter of the weights.
    """
    weights = numpyro.sample(
        "weights", dist.Dirichlet(jnp.full(components, concentration)), infer={"event_dims": ["component"]}
    )
    with numpyro.plate("component", components, dim=-2), numpyro.plate("feature", features, dim=-1):
        variances = numpyro.sample("variances", dist.InverseGamma(VARIANCE_SHAPE, components ** (-2 / features)))
        means = numpyro.sample("means", dist.Normal(0.0, jnp.sqrt(variances / MEAN_WEIGHT)))
        sds = numpyro.deterministic("sds", jnp.sqrt(variances))
    # With an axis for rows, so that all that meets has one rank.
    kinds = dist.Normal(means[None], sds[None]).to_event(1)
    mixture = dist.MixtureSameFamily(dist.Categorical(probs=weights[None]), kinds)
    with numpyro.plate("row", rows):
        numpyro.sample("x", mixture, obs=x, infer={"event_dims": ["feature"]})


def penguins() -> pd.DataFrame:
    """The birds in their own units: `species`, `bill length`, `bill depth`, `flipper length` (mm), `body mass` (g)."""
    return pd.read_csv(_FILE)


def dataset(*features: str) -> Dataset:
    """The penguins without their species: 342 birds, by flipper length or by the features that are named.

    Features are standardised here, in the open: minus their mean, divided by their sd (of the 342 birds, with divisor
    n), so that a sd of flipper length is 14.0 mm. `penguins()` has the values that give means and sds back, and the
    species.

    Args:
        features: Of `bill length`, `bill depth`, `flipper length` and `body mass`; flipper length if none is named.

    Raises:
        ValueError: A feature is unknown or named twice.
    """
    return _penguins(features or ("flipper length",))


def _penguins(features: Sequence[str]) -> Dataset:
    table = penguins().drop(columns="species")
    if unknown := [name for name in features if name not in table]:
        raise ValueError(f"Expected features among {', '.join(map(str, table))}; got {', '.join(unknown)}.")
    if len(set(features)) < len(features):
        raise ValueError(f"Expected each feature once; got {', '.join(features)}.")
    measured = table[list(features)]
    return Dataset(
        "penguins",
        {"x": ((measured - measured.mean()) / measured.std(ddof=0)).to_numpy()},
        coords={"feature": np.array(features)},
        source="Gorman, Williams & Fraser (2014), penguins near Palmer Station, as in palmerpenguins",
        licence="CC0 1.0",
    )


def simulate(
    key: jax.Array, *, rows: int = 300, features: int = 1, components: int = 2, distance: float = 4.0
) -> Dataset:
    """Data from a mixture with components a known distance apart, with the truth that made them.

    Means lie in a random order on a line with equal steps, in every feature another; components have weights drawn from
    their prior, and sds of 1 before everything is standardised.

    Args:
        key: Fixes truth and rows.
        rows: How many rows.
        features: How many features.
        components: How many components.
        distance: Between neighbouring means in each feature, in sds of a component: at 4 few rows are in doubt.

    Raises:
        ValueError: A size is out of range, or the distance is not positive.
    """
    if min(rows, components) < 2 or features < 1:
        raise ValueError(
            f"Expected at least 2 rows and components and 1 feature; got {rows} rows, {components} components and "
            f"{features} features."
        )
    if not 0 < distance < math.inf:
        raise ValueError(f"Expected a distance above 0; got {distance}.")
    of_order, of_weights, of_kinds, of_noise = jax.random.split(key, 4)
    orders = jax.vmap(lambda k: jax.random.permutation(k, components))(jax.random.split(of_order, features))
    means = distance * np.asarray(orders).T.astype(float)
    weights = np.asarray(jax.random.dirichlet(of_weights, jnp.full(components, CONCENTRATION)), float)
    weights = weights / weights.sum()
    kinds = np.asarray(jax.random.choice(of_kinds, components, (rows,), p=jnp.asarray(weights)))
    x = means[kinds] + np.asarray(jax.random.normal(of_noise, (rows, features)))
    centre, width = x.mean(axis=0), x.std(axis=0)
    sds = np.tile(1 / width, (components, 1))
    return Dataset(
        f"simulated_{components}_components",
        {"x": (x - centre) / width},
        coords={"feature": np.array([f"x{j + 1}" for j in range(features)])},
        truth={"weights": weights, "means": (means - centre) / width, "variances": sds**2, "sds": sds},
        source=f"simulated: {rows} rows, {components} components, neighbours {distance:g} sds apart",
        licence="none needed",
    )


def model(
    dataset: Dataset | None = None, *, components: int = 2, concentration: float = CONCENTRATION, starts: int = STARTS
) -> Model:
    """The model on a dataset, with expectation maximisation among its guides.

    Args:
        dataset: Array `x` `(row, feature)`, standardised; coords `feature` if there are any. The penguins' flippers if
            not given.
        components: How many components.
        concentration: Dirichlet parameter of the weights; at least 1, below which their density is highest where a
            component is empty.
        starts: Random starts of `em`.

    Raises:
        ValueError: An option is out of range, or x is not what it should be.
    """
    if components < 2:
        raise ValueError(f"Expected at least 2 components; got {components}: one has nothing to assign.")
    if not 1 <= concentration < math.inf:
        raise ValueError(f"Expected a concentration of at least 1; got {concentration}.")
    data = _penguins(("flipper length",)) if dataset is None else dataset
    x = _checked(data, components)
    static = {"rows": x.shape[0], "features": x.shape[1], "components": components, "concentration": concentration}
    return Model(
        gaussian_mixture,
        replace(
            data,
            static=static,
            coords={**data.coords, "component": np.array([f"component {k + 1}" for k in range(components)])},
        ),
        quantities=(
            Quantity("weights", "share of the component", "share of rows"),
            Quantity("means", "mean of the component", "sd"),
            Quantity("sds", "sd of the component", "sd", dims=("component", "feature")),
        ),
        labels=Labels({"weights": -1, "means": -2, "variances": -2, "sds": -2}, by="means", count=components),
        guides=(guide(mixture(x, components, concentration), starts),),
        title="Gaussian mixture",
        question="Which groups are there, when nobody has told which row belongs to which?",
    )


def mixture(x: np.ndarray, components: int = 2, concentration: float = CONCENTRATION) -> Mixture:
    """The density of the model with the steps of expectation maximisation.

    Args:
        x: Features `(row, feature)`.
        components: How many components.
        concentration: Dirichlet parameter of the weights.
    """
    scale = components ** (-2 / x.shape[1])
    prior = PseudoData.of_priors(components, x.shape[1], concentration, MEAN_WEIGHT, VARIANCE_SHAPE, scale)
    return Mixture(x, components, prior)


def _checked(data: Dataset, components: int) -> np.ndarray:
    if "x" not in data.arrays:
        raise ValueError(f"Expected an array 'x' in dataset '{data.name}'; it has {', '.join(data.arrays) or 'none'}.")
    x = np.asarray(data.arrays["x"], float)
    if x.ndim != 2 or min(x.shape) < 1:
        raise ValueError(f"Expected x as (row, feature); got shape {x.shape}.")
    if len(x) < components:
        raise ValueError(f"Expected at least as many rows as components; got {len(x)} and {components}.")
    mean, sd = x.mean(axis=0), x.std(axis=0)
    off = np.flatnonzero((np.abs(mean) > 1) | (sd < 0.5) | (sd > 2))
    if len(off):
        j = off[0]
        raise ValueError(
            f"Expected standardised features, as the priors are made for; feature {j + 1} of {x.shape[1]} has mean "
            f"{mean[j]:.3g} and sd {sd[j]:.3g}: subtract its mean and divide by its sd."
        )
    return x
