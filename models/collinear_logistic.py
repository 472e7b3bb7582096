r"""Collinear logistic regression: what do nearly redundant predictors say about a binary outcome?

**Question.** Which cell measurements raise the odds that a breast mass is malignant, when 21 pairs of the 30
measurements are correlated above 0.9? Collinear predictors give strongly correlated slopes: each alone is known
badly, their sums well. A guide that factorises must lose one of the two.

**Model**, for rows i and features j, on predictors x as they are given:

    intercept ~ Normal(0, 5)
    beta[j]   ~ Normal(0, 2.5)                                          prior "normal"
    beta[j]   ~ Normal(0, scale[j])                                     prior "horseshoe"
    y[i]      ~ Bernoulli(logit = intercept + sum_j x[i, j] beta[j])

The regularised horseshoe has

    global_scale   ~ HalfCauchy(0.1)
    local_scale[j] ~ HalfCauchy(1)
    slab_variance  ~ InverseGamma(4, 4 * 2.5^2)
    scale[j]        = 1 / sqrt(1 / (global_scale local_scale[j])^2 + 1 / slab_variance)

**Why these priors.** For predictors of sd 1 a slope of 2.5 multiplies the odds by 12 for each sd, so that
Normal(0, 2.5) allows strong effects and still keeps the posterior proper where the classes are separable; 5 for the
intercept allows a share of one class well below 1 in 10,000. The horseshoe says that most slopes are near nothing
and a few are not (global scale 0.1, local scales with heavy tails), while the slab keeps those few below about the
2.5 of the other prior.

**What is hard about the horseshoe.** A slope is either nearly zero or free, and collinear features compete for being
the free one: margins are skewed, peaked at zero, or have two bumps, so no Gaussian guide is right. Slopes and their
scales form funnels, so that it is sampled by beta / scale. The slab variance must not have a heavy tail: with 4
degrees of freedom (and half-t scales) NUTS met 1 to 7 divergences in 4,000 draws, with 8 and half-Cauchy scales none
in five runs of 4,000. Means of the scales themselves do not exist (half-Cauchy): no report shows them.

**Charts.** One posterior behind all of them. `plain` samples the slopes as written. `rotated` samples
z = R beta with x = Q R (a QR decomposition scaled so that the columns of Q have mean square 1): the predictors of z
are orthogonal, and the prior on beta stays what it was. It cuts NUTS's steps to less than a half. Under the
horseshoe, `noncentred` samples beta / scale, and `rotated` rotates beta / scale; as scales differ from feature to
feature, that no longer makes anything orthogonal, and NUTS meets a few divergences: prefer `coefficients="raw"` there.

References:
    Gelman, Jakulin, Pittau & Su (2008), A weakly informative default prior distribution for logistic and other
    regression models, Annals of Applied Statistics 2(4), section 2.
    Piironen & Vehtari (2017), Sparsity information and regularization in the horseshoe and other shrinkage priors,
    Electronic Journal of Statistics 11(2), sections 2.3 and 3.3.
    Street, Wolberg & Mangasarian (1993), Nuclear feature extraction for breast tumor diagnosis, SPIE 1905.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
from numpyro.infer.reparam import LocScaleReparam, Reparam

from models._predictors import RotatedReparam, checked_regression, equicorrelated, rotation
from toolkit import Dataset, Model, Quantity

PRIORS = ("normal", "horseshoe")
COEFFICIENTS = ("raw", "qr")
INTERCEPT_SD, SLOPE_SD = 5.0, 2.5
GLOBAL_SCALE, SLAB_DF = 0.1, 8.0

_FILE = Path(__file__).parent / "data" / "breast_cancer.csv"


def collinear_logistic(x: Any, y: Any = None, *, prior: str = "normal") -> None:
    """The NumPyro callable.

    Args:
        x: Predictors `(row, feature)`.
        y: Outcomes 0 or 1, `(row,)`; drawn if not given.
        prior: One of `PRIORS`, for the slopes.
    """
    rows, features = x.shape
    intercept = numpyro.sample("intercept", dist.Normal(0.0, INTERCEPT_SD))
    scale = _horseshoe_scale(features) if prior == "horseshoe" else jnp.full(features, SLOPE_SD)
    # One draw of a vector and not a plate, since the rotated chart mixes its elements.
    slopes = dist.Normal(jnp.zeros(features), scale).to_event(1)
    beta = numpyro.sample("beta", slopes, infer={"event_dims": ["feature"]})
    with numpyro.plate("row", rows):
        numpyro.sample("y", dist.Bernoulli(logits=intercept + x @ beta), obs=y)


def _horseshoe_scale(features: int) -> Any:
    """Prior sds of the slopes `(feature,)`, with the sites of the regularised horseshoe."""
    global_scale = numpyro.sample("global_scale", dist.HalfCauchy(GLOBAL_SCALE))
    slab_variance = numpyro.sample("slab_variance", dist.InverseGamma(SLAB_DF / 2, SLAB_DF / 2 * SLOPE_SD**2))
    with numpyro.plate("feature", features):
        local_scale = numpyro.sample("local_scale", dist.HalfCauchy(1.0))
    return 1 / jnp.sqrt(1 / (global_scale * local_scale) ** 2 + 1 / slab_variance)


def measurements() -> pd.DataFrame:
    """The breast-cancer data in their own units: column `malignant` (0 or 1), then the 30 measurements."""
    return pd.read_csv(_FILE)


def dataset() -> Dataset:
    """The breast-cancer data, 569 masses x 30 measurements; y is 1 where the mass is malignant.

    Each measurement is standardised here, in the open: minus its mean, divided by its sd (of the 569 rows, with
    divisor n). A slope is therefore a change in log odds per sd; `measurements()` has the values that give
    means and sds back.
    """
    return _breast_cancer()


def _breast_cancer() -> Dataset:
    table = measurements()
    features = table.drop(columns="malignant")
    standardised = (features - features.mean()) / features.std(ddof=0)
    return Dataset(
        "breast_cancer",
        {"x": standardised.to_numpy(), "y": table["malignant"].to_numpy()},
        coords={"feature": features.columns.to_numpy(dtype=str)},
        source="Wisconsin diagnostic breast cancer data (Street, Wolberg & Mangasarian 1993), as in scikit-learn",
        licence="BSD-3-Clause (scikit-learn's copy)",
    )


def simulate(key: jax.Array, *, rows: int = 300, features: int = 10, correlation: float = 0.9) -> Dataset:
    """Data drawn from the model with the normal prior, with the truth that made them.

    Predictors are Gaussian with mean 0, sd 1 and the same correlation between any two, so that the condition
    number of their correlation matrix is 1 + features * correlation / (1 - correlation).

    Args:
        key: Fixes predictors, truth and outcomes.
        rows: How many rows.
        features: How many predictors.
        correlation: Between any two predictors; from 0 (none) to below 1 (copies of one another).

    Raises:
        ValueError: A size is not positive, or the correlation is outside [0, 1).
    """
    keys = jax.random.split(key, 3)
    x = equicorrelated(keys[0], keys[1], rows, features, correlation)
    drawn = numpyro.handlers.trace(numpyro.handlers.seed(collinear_logistic, keys[2])).get_trace(jnp.asarray(x))
    return Dataset(
        f"simulated_correlation_{correlation:g}",
        {"x": x, "y": np.asarray(drawn["y"]["value"])},
        coords={"feature": np.array([f"x{j + 1}" for j in range(features)])},
        truth={name: np.asarray(drawn[name]["value"]) for name in ("intercept", "beta")},
        source=f"simulated: {rows} rows, {features} predictors, correlation {correlation:g} between any two",
        licence="none needed",
    )


def model(dataset: Dataset | None = None, *, prior: str = "normal", coefficients: str = "raw") -> Model:
    """The model on a dataset; the posterior depends on `prior` alone, `coefficients` only choose its chart.

    Args:
        dataset: Arrays `x` `(row, feature)` and `y` `(row,)`; the breast-cancer data if not given.
        prior: `"normal"`, whose posterior is log-concave, or `"horseshoe"` (sparse).
        coefficients: `"raw"` samples the slopes (divided by their prior sd under the horseshoe), `"qr"` samples
            them rotated to orthogonal predictors.

    Raises:
        ValueError: An option is unknown, x or y do not fit, or `"qr"` meets linearly dependent columns.
    """
    if prior not in PRIORS:
        raise ValueError(f"Expected prior to be one of {', '.join(PRIORS)}; got '{prior}'.")
    if coefficients not in COEFFICIENTS:
        raise ValueError(f"Expected coefficients to be one of {', '.join(COEFFICIENTS)}; got '{coefficients}'.")
    data = _checked(_breast_cancer() if dataset is None else dataset)
    charts = _charts(data.arrays["x"], prior, coefficients)
    return Model(
        collinear_logistic,
        replace(data, static={**data.static, "prior": prior}),
        quantities=(
            Quantity("intercept", "intercept: log odds where every predictor is 0", "log odds"),
            Quantity("beta", "slope", "log odds per sd"),
        ),
        charts=charts,
        chart="rotated" if coefficients == "qr" else "noncentred" if prior == "horseshoe" else "plain",
        log_concave=prior == "normal",
        title="Collinear logistic regression",
        question="Which predictors raise the odds, when they carry nearly the same information?",
    )


def _charts(x: np.ndarray, prior: str, coefficients: str) -> dict[str, Mapping[str, Reparam]]:
    charts: dict[str, Mapping[str, Reparam]] = {}
    if prior == "horseshoe":
        charts["noncentred"] = {"beta": LocScaleReparam(0.0)}
    if coefficients == "qr" or np.linalg.matrix_rank(x) == x.shape[1]:
        site = "beta_decentered" if prior == "horseshoe" else "beta"
        charts["rotated"] = {**charts.get("noncentred", {}), site: RotatedReparam(rotation(x))}
    return charts


def _checked(data: Dataset) -> Dataset:
    y = checked_regression(data).arrays["y"]
    other = sorted(set(np.unique(y)) - {0, 1})
    if other:
        raise ValueError(f"Expected outcomes y of 0 or 1; got {', '.join(f'{v:g}' for v in other[:5])} among them.")
    return data
