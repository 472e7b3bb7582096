r"""Linear-Gaussian state space: how did the Nile's level change over a century, and which guide can tell?

**Question.** Each year's flow of the Nile is its level, which changes slowly, and weather. Where was the level, and how
much did it change from the first year to the last? The states of a time series are many, and neighbours share what is
known of them: a mean field takes each for itself. The exact answer is Kalman's.

**Model**, for years t and order p (1 unless coefficients are given):

    observation_sd ~ LogNormal(log(its value below), 1)                      scales "unknown"
    level_sd       ~ LogNormal(log(its value below), 1)
    observation_sd = 122.9; level_sd = 38.3                                  scales "known"
    level[1] ~ Normal(mean, initial_sd)
    level[t] ~ Normal(mean + sum_i coefficients[i] (level[t - i] - mean), level_sd)
    y[t]     ~ Normal(level[t], observation_sd)

with level = mean before the first year. Coefficients (1) make the local level model, whose level is a random walk;
others an autoregression.

**Why these values.** Those of the sds are the Nile's by maximum likelihood (Durbin & Koopman 2012, section 2.10.3). Log
sds with a sd of 1 say that each may be a third or three times that. A mean of 1,000 and an initial sd of 500 (100
million cubic metres) let the first year's level lie anywhere from a trickle to twice what the river ever carried.

**What is exact.** With known scales the posterior is a Gaussian, whose means and sds are the Kalman smoother's, and the
evidence is the product of the filter's one-step predictions. Its precision is zero but between neighbours: the guide
`chain` is exact, in time linear in the number of years, and a mean field lies half the log of prod diag(P) / det(P)
below the evidence.

References:
    Durbin & Koopman (2012), Time Series Analysis by State Space Methods, second edition, chapters 2 and 4.
    Cobb (1978), The problem of the Nile, Biometrika 65(2).
    Turner & Sahani (2011), Two problems with variational expectation maximisation for time series models, in Bayesian
    Time Series Models, chapter 5: what a mean field does to a chain.
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
from numpyro.contrib.control_flow import scan

from models._kalman import KalmanSmoother
from toolkit import Dataset, Model, Quantity

SCALES = ("known", "unknown")
MEAN, INITIAL_SD, OBSERVATION_SD, LEVEL_SD = 1_000.0, 500.0, 122.9, 38.3

_FILE = Path(__file__).parent / "data" / "nile.csv"


def linear_gaussian_ssm(
    steps: int,
    y: Any = None,
    *,
    scales: str = "known",
    coefficients: tuple[float, ...] = (1.0,),
    mean: float = MEAN,
    initial_sd: float = INITIAL_SD,
    observation_sd: float = OBSERVATION_SD,
    level_sd: float = LEVEL_SD,
) -> None:
    """The NumPyro callable.

    Args:
        steps: How many steps of time there are.
        y: Observations `(time,)`; drawn if not given.
        scales: One of `SCALES`.
        coefficients: Of the levels before, the latest first.
        mean: What levels and the first one are counted from.
        initial_sd: Of the first level.
        observation_sd: Of the noise, or what its prior is centred at.
        level_sd: Of what is new in a level, or what its prior is centred at.
    """
    noise, new = jnp.asarray(observation_sd), jnp.asarray(level_sd)
    if scales == "unknown":
        noise = numpyro.sample("observation_sd", dist.LogNormal(jnp.log(noise), 1.0))
        new = numpyro.sample("level_sd", dist.LogNormal(jnp.log(new), 1.0))

    def step(before: Any, first: Any) -> tuple[Any, Any]:
        expected = mean + jnp.asarray(coefficients) @ (before - mean)
        now = numpyro.sample("level", dist.Normal(expected, jnp.where(first, initial_sd, new)))
        return jnp.concatenate([now[None], before[:-1]]), now

    _, level = scan(step, jnp.full(len(coefficients), mean), jnp.arange(steps) == 0)
    numpyro.deterministic("average", level.mean())
    numpyro.deterministic("total_change", level[-1] - level[0])
    with numpyro.plate("time", steps):
        numpyro.sample("y", dist.Normal(level, noise), obs=y)


def flows() -> pd.DataFrame:
    """The Nile at Aswan: `year` and `volume` in 100 million cubic metres, one row a year."""
    return pd.read_csv(_FILE)


def dataset() -> Dataset:
    """The Nile's flow at Aswan from 1871 to 1970, in 100 million cubic metres."""
    return _nile()


def _nile() -> Dataset:
    table = flows()
    return Dataset(
        "nile",
        {"y": table["volume"].to_numpy(float)},
        static={"steps": len(table)},
        coords={"time": table["year"].to_numpy()},
        source="Cobb (1978), the Nile at Aswan from 1871 to 1970, as in statsmodels",
        licence="public domain",
    )


def simulate(
    key: jax.Array,
    *,
    steps: int = 200,
    scales: str = "known",
    coefficients: Sequence[float] = (1.0,),
    observation_sd: float = OBSERVATION_SD,
    level_sd: float = LEVEL_SD,
) -> Dataset:
    """A series drawn from the model, with the truth that made it.

    Args:
        key: Fixes truth and noise.
        steps: How many steps of time.
        scales: Whether the sds are drawn (`"unknown"`) or are those given (`"known"`).
        coefficients: Of the levels before, the latest first.
        observation_sd: Of the noise, or what its prior is centred at.
        level_sd: Of what is new in a level, or what its prior is centred at.

    Raises:
        ValueError: An option is not what it should be.
    """
    options = _options(scales, coefficients, MEAN, INITIAL_SD, observation_sd, level_sd)
    if steps < 2:
        raise ValueError(f"Expected at least 2 steps of time; got {steps}.")
    seeded = numpyro.handlers.seed(linear_gaussian_ssm, key)
    drawn = numpyro.handlers.trace(seeded).get_trace(steps, **options)
    own = ("observation_sd", "level_sd") if scales == "unknown" else ()
    return Dataset(
        f"simulated_{steps}_steps",
        {"y": np.asarray(drawn["y"]["value"])},
        static={"steps": steps},
        coords={"time": np.arange(1, steps + 1)},
        truth={name: np.asarray(drawn[name]["value"]) for name in (*own, "level", "average", "total_change")},
        source=f"simulated: {steps} steps, coefficients {', '.join(f'{value:g}' for value in coefficients)}",
        licence="none needed",
    )


def model(
    dataset: Dataset | None = None,
    *,
    scales: str = "known",
    coefficients: Sequence[float] = (1.0,),
    mean: float = MEAN,
    initial_sd: float = INITIAL_SD,
    observation_sd: float = OBSERVATION_SD,
    level_sd: float = LEVEL_SD,
) -> Model:
    """The model on a series; with known scales it has its exact draws and log evidence.

    Args:
        dataset: Array `y` `(time,)` and static `steps`; the Nile if not given.
        scales: `"known"`, with which the posterior is a Gaussian, or `"unknown"`.
        coefficients: Of the levels before, the latest first; `(1.0,)` is a random walk.
        mean: What levels are counted from, in the unit of y.
        initial_sd: Of the first level.
        observation_sd: Of the noise where scales are known, else what its prior is centred at.
        level_sd: Of what is new in a level where scales are known, else what its prior is centred at.

    Raises:
        ValueError: An option is not what it should be, or y does not fit.
    """
    options = _options(scales, coefficients, mean, initial_sd, observation_sd, level_sd)
    data = _checked(_nile() if dataset is None else dataset)
    known = scales == "known"
    y, steps = data.arrays["y"].astype(float) - mean, data.static["steps"]
    smoother = KalmanSmoother(steps, options["coefficients"], level_sd, initial_sd, observation_sd)

    def exact(key: jax.Array, draws: int) -> dict[str, Any]:
        return {"level": mean + smoother.draw(key, draws, y)}

    unit = "100 million m³" if data.name == "nile" else ""
    return Model(
        linear_gaussian_ssm,
        replace(data, static={**data.static, **options}),
        quantities=(
            *(() if known else (Quantity("observation_sd", "sd of the noise", unit),)),
            *(() if known else (Quantity("level_sd", "sd of a year's change", unit),)),
            Quantity("average", "average level", unit),
            Quantity("total_change", "last level minus the first", unit),
            Quantity("level", "level", unit, dims=("time",)),
        ),
        exact=exact if known else None,
        log_evidence=smoother.log_evidence(y) if known else None,
        log_concave=known,
        title="Linear-Gaussian state space",
        question="How did the Nile's level change over a century?",
    )


def _options(
    scales: str,
    coefficients: Sequence[float],
    mean: float,
    initial_sd: float,
    observation_sd: float,
    level_sd: float,
) -> dict[str, Any]:
    """The options as the callable takes them."""
    if scales not in SCALES:
        raise ValueError(f"Expected scales to be one of {', '.join(SCALES)}; got '{scales}'.")
    given = tuple(coefficients) if isinstance(coefficients, Sequence) and not isinstance(coefficients, str) else ()
    if not given or not all(isinstance(value, int | float) and math.isfinite(value) for value in given):
        raise ValueError(
            f"Expected coefficients to be finite numbers, at least one, as in (1.0,); got {coefficients!r}."
        )
    for name, value in (("initial_sd", initial_sd), ("observation_sd", observation_sd), ("level_sd", level_sd)):
        if not 0 < value < math.inf:
            raise ValueError(f"Expected {name} above 0; got {value}.")
    return {
        "scales": scales,
        "coefficients": tuple(float(value) for value in given),
        "mean": mean,
        "initial_sd": initial_sd,
        "observation_sd": observation_sd,
        "level_sd": level_sd,
    }


def _checked(data: Dataset) -> Dataset:
    """The dataset, with `steps` filled in."""
    if "y" not in data.arrays:
        raise ValueError(f"Expected an array y in dataset '{data.name}'; got {', '.join(data.arrays) or 'none'}.")
    y = data.arrays["y"]
    if y.ndim != 1 or len(y) < 2:
        raise ValueError(f"Expected y as (time,) with at least 2 steps; got shape {y.shape}.")
    if data.static.get("steps", len(y)) != len(y):
        raise ValueError(f"Expected static steps to be the length of y, {len(y)}; got {data.static['steps']}.")
    return replace(data, static={**data.static, "steps": len(y)})
