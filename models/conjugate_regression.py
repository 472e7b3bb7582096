r"""Conjugate regression: what do six nearly redundant series say about employment, when the answer is known exactly?

**Question.** Which of six economic series moved the employment of the United States from 1947 to 1962? Most grew
together (correlations up to 0.996), so that each slope alone is known badly and their sums well. Posterior and evidence
have closed forms here: what a guide, NUTS or an estimate of the evidence says can be held against the truth.

**Model**, for rows i and features j, on predictors x and outcomes y as they are given:

    noise_variance ~ InverseGamma(2, 2 noise_sd^2)                           noise "unknown"
    noise_variance = noise_sd^2                                              noise "known"
    intercept      ~ Normal(0, 10 sqrt(noise_variance))
    beta[j]        ~ Normal(0, 30 sqrt(noise_variance))
    y[i]           ~ Normal(intercept + sum_j x[i, j] beta[j], sqrt(noise_variance))

**Why these priors.** They are the conjugate ones, whose scales are the noise's: with the noise near the 0.1 that is
the default (of an outcome with sd 1), a slope is at most a few sds of the outcome for each sd of its predictor, and
the noise sd lies between 0.065 and 0.24 with 90 % prior probability. Conjugacy is the point here; in an analysis of
one's own, slopes on a scale that does not depend on the noise are easier to defend.

**What is exact.** With X = [1, x], the prior precision P0 and n rows, P = P0 + X'X and m = P^-1 X'y,

    (intercept, beta) | noise_variance ~ Normal(m, noise_variance P^-1)
    noise_variance                     ~ InverseGamma(2 + n / 2, 2 noise_sd^2 + (y'y - m'P m) / 2)

and the evidence is the ratio of the normalising constants before and after. With known noise the posterior is a
Gaussian: a full-rank guide is exact, and a mean field lies half the log of prod diag(P) / det(P) below the evidence.

**Charts.** One posterior behind both. `plain` samples the slopes as written, `rotated` their coordinates in which P is
the identity but for the intercept (which stands apart where predictors have mean 0). With known noise a factorised
guide is exact there.

**Guides of its own.** `cavi` and `cavi_joint` are coordinate ascent by the closed-form updates of
`models._conjugate_ascent`: every coefficient a factor of its own, or the coefficients one factor.

References:
    Gelman et al. (2013), Bayesian Data Analysis, third edition, section 14.8 and chapter 3.
    Longley (1967), An appraisal of least squares programs for the electronic computer from the point of view of the
    user, Journal of the American Statistical Association 62(319).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.linalg
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd

from models._conjugate_ascent import guides
from models._predictors import RotatedReparam, checked_regression, equicorrelated, rotation
from toolkit import Dataset, Model, Quantity

NOISES = ("unknown", "known")
NOISE_SHAPE, NOISE_SD = 2.0, 0.1
INTERCEPT_SCALE, SLOPE_SCALE = 10.0, 30.0

_FILE = Path(__file__).parent / "data" / "longley.csv"


def conjugate_regression(x: Any, y: Any = None, *, noise: str = "unknown", noise_sd: float = NOISE_SD) -> None:
    """The NumPyro callable.

    Args:
        x: Predictors `(row, feature)`.
        y: Outcomes `(row,)`; drawn if not given.
        noise: One of `NOISES`.
        noise_sd: The noise's sd, or what its prior is centred near where it is unknown.
    """
    rows, features = x.shape
    if noise == "unknown":
        prior = dist.InverseGamma(NOISE_SHAPE, NOISE_SHAPE * noise_sd**2)
        sd = numpyro.deterministic("noise", jnp.sqrt(numpyro.sample("noise_variance", prior)))
    else:
        sd = jnp.asarray(noise_sd)
    intercept = numpyro.sample("intercept", dist.Normal(0.0, INTERCEPT_SCALE * sd))
    # One draw of a vector and not a plate, since the rotated chart mixes its elements.
    slopes = dist.Normal(jnp.zeros(features), SLOPE_SCALE * sd).to_event(1)
    beta = numpyro.sample("beta", slopes, infer={"event_dims": ["feature"]})
    with numpyro.plate("row", rows):
        numpyro.sample("y", dist.Normal(intercept + x @ beta, sd), obs=y)


@dataclass(frozen=True, eq=False)
class Posterior:
    """The posterior in closed form.

    Attributes:
        x: Predictors `(row, feature)`.
        y: Outcomes `(row,)`.
        noise: One of `NOISES`.
        noise_sd: The noise's sd, or what its prior is centred near.
    """

    x: np.ndarray
    y: np.ndarray
    noise: str
    noise_sd: float

    @cached_property
    def prior_precision(self) -> np.ndarray:
        """The diagonal of P0, times the noise variance, intercept first: `(feature + 1,)`."""
        return np.r_[INTERCEPT_SCALE, np.full(self.x.shape[1], SLOPE_SCALE)] ** -2.0

    @cached_property
    def design(self) -> np.ndarray:
        """X = [1, x], `(row, feature + 1)`."""
        return np.column_stack([np.ones(len(self.x)), self.x])

    @cached_property
    def precision(self) -> np.ndarray:
        """P, the coefficients' precision times the noise variance, `(feature + 1, feature + 1)`."""
        return np.diag(self.prior_precision) + self.design.T @ self.design

    @cached_property
    def mean(self) -> np.ndarray:
        """The coefficients' mean, intercept first: `(feature + 1,)`."""
        # Least squares on the data with the prior as further rows: P itself would square the condition number.
        rows = np.vstack([np.diag(np.sqrt(self.prior_precision)), self.design])
        return np.linalg.lstsq(rows, np.r_[np.zeros(len(self.prior_precision)), self.y], rcond=None)[0]

    @cached_property
    def left(self) -> float:
        """What y'y - m'P m is, as a sum of squares that no rounding makes negative."""
        return float(np.square(self.y - self.design @ self.mean).sum() + self.prior_precision @ self.mean**2)

    @property
    def noise_prior(self) -> tuple[float, float]:
        """Shape and scale of the noise variance's inverse gamma prior, where it is unknown."""
        return NOISE_SHAPE, NOISE_SHAPE * self.noise_sd**2

    @cached_property
    def noise_law(self) -> tuple[float, float]:
        """Shape and scale of the noise variance's inverse gamma, where it is unknown."""
        shape, scale = self.noise_prior
        return shape + len(self.y) / 2, scale + self.left / 2

    @cached_property
    def log_evidence(self) -> float:
        """Log p(y) in nats."""
        rows = len(self.y)
        determinants = 0.5 * (np.log(self.prior_precision).sum() - np.linalg.slogdet(self.precision)[1])
        constant = float(determinants - 0.5 * rows * math.log(2 * math.pi))
        if self.noise == "known":
            return constant - rows * math.log(self.noise_sd) - 0.5 * self.left / self.noise_sd**2
        (shape, scale), (prior_shape, prior_scale) = self.noise_law, self.noise_prior
        gammas = math.lgamma(shape) - math.lgamma(prior_shape)
        return constant + gammas + prior_shape * math.log(prior_scale) - shape * math.log(scale)

    def draw(self, key: jax.Array, draws: int) -> dict[str, Any]:
        """Independent draws of the latent sites, `(draws, ...)`."""
        of_noise, of_coefficients = jax.random.split(key)
        if self.noise == "known":
            variance = jnp.full(draws, self.noise_sd**2)
        else:
            shape, scale = self.noise_law
            variance = scale / jax.random.gamma(of_noise, shape, (draws,))
        base = jax.random.normal(of_coefficients, (draws, len(self.mean)))
        lower = np.linalg.cholesky(self.precision)
        apart = jax.scipy.linalg.solve_triangular(lower, base.T, lower=True, trans=1).T
        coefficients = jnp.asarray(self.mean)[None] + jnp.sqrt(variance)[:, None] * apart
        sites = {"intercept": coefficients[:, 0], "beta": coefficients[:, 1:]}
        return sites if self.noise == "known" else {"noise_variance": variance, **sites}


def series() -> pd.DataFrame:
    """Longley's data in their own units: `year`, `employed` and five more series; one row a year."""
    return pd.read_csv(_FILE)


def dataset() -> Dataset:
    """Longley's data, 16 years x 6 series; y is employment.

    Series and outcome are standardised here, in the open: minus their mean, divided by their sd (of the 16 rows, with
    divisor n). A slope is therefore in sds of employment per sd of the series; `series()` has the values that give
    means and sds back.
    """
    return _longley()


def _longley() -> Dataset:
    table = series()
    standardised = (table - table.mean()) / table.std(ddof=0)
    x = standardised.drop(columns="employed")
    return Dataset(
        "longley",
        {"x": x.to_numpy(), "y": standardised["employed"].to_numpy()},
        coords={"feature": x.columns.to_numpy(dtype=str), "row": table["year"].to_numpy()},
        source="Longley (1967), the US economy from 1947 to 1962, as in statsmodels",
        licence="public domain",
    )


def with_features(data: Dataset, names: Sequence[str]) -> Dataset:
    """The same dataset with some of its features, in the order asked for: what features are chosen between by evidence.

    Raises:
        ValueError: The features have no names, one is unknown or named twice, or there is none.
    """
    known = [str(name) for name in data.coords.get("feature", ())]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"Expected at least one feature, and each feature once; got {', '.join(names) or 'none'}.")
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"Expected each feature to be one of {', '.join(known) or 'none'}; got {', '.join(unknown)}.")
    chosen = [known.index(name) for name in names]
    return replace(
        data,
        name=f"{data.name}: {', '.join(names)}",
        arrays={**data.arrays, "x": data.arrays["x"][:, chosen]},
        coords={**data.coords, "feature": np.array(names)},
        truth={},  # what made the data had all features
    )


def simulate(
    key: jax.Array, *, rows: int = 100, features: int = 5, correlation: float = 0.9, noise: str = "unknown"
) -> Dataset:
    """Data drawn from the model, with the truth that made them.

    Args:
        key: Fixes predictors, truth and outcomes.
        rows: How many rows.
        features: How many predictors; Gaussian, with mean 0 and sd 1.
        correlation: Between any two predictors; from 0 (orthogonal but for chance) to below 1 (copies of one another).
        noise: Whether the noise is drawn (`"unknown"`) or is what the model has by default (`"known"`).

    Raises:
        ValueError: A size is not positive, the correlation is outside [0, 1), or the noise is neither.
    """
    _check_noise(noise, NOISE_SD)
    keys = jax.random.split(key, 3)
    x = equicorrelated(keys[0], keys[1], rows, features, correlation)
    seeded = numpyro.handlers.seed(conjugate_regression, keys[2])
    drawn = numpyro.handlers.trace(seeded).get_trace(jnp.asarray(x), noise=noise)
    latents = ("intercept", "beta") if noise == "known" else ("noise_variance", "noise", "intercept", "beta")
    return Dataset(
        f"simulated_correlation_{correlation:g}",
        {"x": x, "y": np.asarray(drawn["y"]["value"])},
        coords={"feature": np.array([f"x{j + 1}" for j in range(features)])},
        truth={name: np.asarray(drawn[name]["value"]) for name in latents},
        source=f"simulated: {rows} rows, {features} predictors, correlation {correlation:g} between any two",
        licence="none needed",
    )


def model(dataset: Dataset | None = None, *, noise: str = "unknown", noise_sd: float = NOISE_SD) -> Model:
    """The model on a dataset, with its exact draws and log evidence.

    Args:
        dataset: Arrays `x` `(row, feature)` and `y` `(row,)`; Longley's data if not given.
        noise: `"unknown"`, or `"known"`, with which the posterior is a Gaussian.
        noise_sd: The noise's sd where it is known, else what its prior is centred near; in the unit of y.

    Raises:
        ValueError: An option is not what it should be, or x or y do not fit.
    """
    _check_noise(noise, noise_sd)
    data = checked_regression(_longley() if dataset is None else dataset)
    x, y = (data.arrays[name].astype(float) for name in ("x", "y"))
    posterior = Posterior(x, y, noise, noise_sd)
    # The prior as further rows: what is rotated to orthogonal is the posterior and not the predictors alone.
    rotate = rotation(np.vstack([x, np.eye(x.shape[1]) / SLOPE_SCALE]))
    return Model(
        conjugate_regression,
        replace(data, static={**data.static, "noise": noise, "noise_sd": noise_sd}),
        quantities=(
            Quantity("intercept", "intercept: outcome where every predictor is 0", "sd"),
            Quantity("beta", "slope", "sd per sd"),
            *([Quantity("noise", "sd of the noise", "sd")] if noise == "unknown" else []),
        ),
        charts={"rotated": {"beta": RotatedReparam(rotate)}},
        exact=posterior.draw,
        log_evidence=posterior.log_evidence,
        log_concave=noise == "known",
        guides=guides(posterior),
        title="Conjugate regression",
        question="Which series moved employment, when they all grew together?",
    )


def _check_noise(noise: str, noise_sd: float) -> None:
    if noise not in NOISES:
        raise ValueError(f"Expected noise to be one of {', '.join(NOISES)}; got '{noise}'.")
    if not 0 < noise_sd < math.inf:
        raise ValueError(f"Expected noise_sd above 0; got {noise_sd}.")
