r"""Poisson state space: which state runs behind the spikes of many neurons, and how surely is it known at each moment?

**Question.** A mouse runs about, and 13 neurons fire; some of them fire when its head points in their direction. Take
the head's direction away: what do the spikes of all neurons say of the state behind them, bin by bin, and how far can
each bin's interval be trusted? The direction was filmed, so that the answer can be held against it (it is no input).

**Model**, for bins t, neurons n and two coordinates k of the state:

    state[1, k] ~ Normal(0, state_sd)
    state[t, k] ~ Normal(persistence state[t - 1, k], state_sd sqrt(1 - persistence^2))
    baseline[n], loading[n, k] ~ Normal(their values from other minutes, tuning_sd)     tuning "unknown"
    baseline[n], loading[n, k] = their values from other minutes                        tuning "known"
    counts[t, n] ~ Poisson(exp(baseline[n] + sum_k loading[n, k] state[t, k]))

**Why these values.** A direction that wanders over the circle has a cosine and a sine of sd 0.7 each; of this mouse
their correlation from one bin of a quarter of a second to the next is 0.9. Baselines and loadings come from a
regression on the head's direction in the rest of the session, which fixes what is otherwise free: a rotation of states
and loadings. Where they are unknown, a tuning_sd of 0.1 lets a rate differ by a tenth or so.

**What is known of the posterior.** Given the tuning it is log-concave: Poisson counts whose log rate is linear in a
Gaussian chain. A step depends on its neighbours and the tuning alone, so that the guide `chain`, with a block of two
for each bin, holds the best Gaussian of all. A mean field takes each bin for itself.

References:
    Paninski et al. (2010), A new look at state-space models for neural data, Journal of Computational Neuroscience 29.
    Macke et al. (2011), Empirical models of spiking in neural populations, NIPS 24.
    Archer et al. (2015), Black box variational inference for state space models, arXiv:1511.07367 (the guide).
    Viejo et al. (2023), Pynapple, a toolbox for data analysis in neuroscience, eLife 12 (the recording).
"""

from __future__ import annotations

import math
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

from toolkit import Dataset, Model, Quantity

TUNINGS = ("known", "unknown")
PERSISTENCE, STATE_SD, TUNING_SD = 0.9, 0.7, 0.1

_DATA = Path(__file__).parent / "data"


def poisson_state_space(
    baseline_before: Any,
    loading_before: Any,
    bins: int,
    counts: Any = None,
    *,
    tuning: str = "known",
    persistence: float = PERSISTENCE,
    state_sd: float = STATE_SD,
    tuning_sd: float = TUNING_SD,
) -> None:
    """The NumPyro callable.

    Args:
        baseline_before: Log spikes a bin where the state is zero, as known from elsewhere, `(neuron,)`.
        loading_before: What a neuron's log rate gains with each coordinate of the state, `(neuron, coordinate)`.
        bins: How many bins of time there are.
        counts: Spikes `(bin, neuron)`; drawn if not given.
        tuning: One of `TUNINGS`.
        persistence: Correlation of a state with the one a bin before.
        state_sd: Of each coordinate of the state, before any spike is seen.
        tuning_sd: Of the prior around what is known of baselines and loadings, where they are unknown.
    """
    neurons, coordinates = loading_before.shape
    baseline, loading = baseline_before, loading_before
    if tuning == "unknown":
        with numpyro.plate("neuron", neurons):
            baseline = numpyro.sample("baseline", dist.Normal(baseline_before, tuning_sd))
            about = dist.Normal(loading_before, tuning_sd).to_event(1)
            loading = numpyro.sample("loading", about, infer={"event_dims": ["coordinate"]})

    def step(before: Any, first: Any) -> tuple[Any, Any]:
        sd = state_sd * jnp.where(first, 1.0, math.sqrt(1 - persistence**2))
        now = numpyro.sample("state", dist.Normal(persistence * before, sd).to_event(1))
        return now, now

    _, state = scan(step, jnp.zeros(coordinates), jnp.arange(bins) == 0)
    # Of the direction: how far the state lies from the origin, on average, is what rotations leave alone.
    numpyro.deterministic("distance", jnp.sqrt(jnp.square(state).sum(-1)).mean())
    log_rate = jnp.broadcast_to(baseline, (bins, neurons)) + state @ loading.T
    with numpyro.plate("bin", bins, dim=-2), numpyro.plate("unit", neurons, dim=-1):
        numpyro.sample("counts", dist.Poisson(jnp.exp(log_rate)), obs=counts)


def recording() -> pd.DataFrame:
    """One minute: `start` of each bin in seconds, `direction` of the head in radians, and counts by neuron."""
    return pd.read_csv(_DATA / "population.csv")


def dataset(*, bins: int = 240) -> Dataset:
    """A running mouse's thalamic and hippocampal neurons, in bins of a quarter of a second.

    Args:
        bins: How many, from the first one; all 240 if not given.

    Raises:
        ValueError: There are fewer than 2 bins or more than 240.
    """
    return _mouse(bins)


def _mouse(bins: int) -> Dataset:
    table, tuning = recording(), pd.read_csv(_DATA / "population_tuning.csv", index_col="neuron")
    if not 2 <= bins <= len(table):
        raise ValueError(f"Expected from 2 to {len(table)} bins; got {bins}.")
    names = tuning.index.to_numpy(dtype=str)
    return Dataset(
        "head_direction" if bins == len(table) else f"head_direction_{bins}_bins",
        {
            "baseline_before": tuning["baseline"].to_numpy(),
            "loading_before": tuning[["cosine", "sine"]].to_numpy(),
            "counts": table[list(names)].to_numpy()[:bins],
        },
        static={"bins": bins},
        coords={
            "bin": table["start"].to_numpy()[:bins],
            "neuron": names,
            "unit": names,
            "coordinate": np.array(["cosine", "sine"]),
        },
        source="session A2929-200711 of the Peyrache laboratory, as in pynapple 0.6.6 (Viejo et al. 2023)",
        licence="MIT",
    )


def simulate(
    key: jax.Array,
    *,
    bins: int = 200,
    neurons: int = 20,
    coordinates: int = 2,
    tuning: str = "known",
    persistence: float = PERSISTENCE,
) -> Dataset:
    """Counts drawn from the model, with the truth that made them.

    Args:
        key: Fixes tuning, truth and counts.
        bins: How many bins of time.
        neurons: How many neurons, whose loadings have sd 1 and whose baseline is half a spike a bin.
        coordinates: Of the state.
        tuning: Whether the tuning is drawn around what the model is told (`"unknown"`) or is that (`"known"`).
        persistence: Correlation of a state with the one a bin before.

    Raises:
        ValueError: A size is too small, or an option is not what it should be.
    """
    options = _options(tuning, persistence, STATE_SD, TUNING_SD)
    if bins < 2 or neurons < 1 or coordinates < 1:
        raise ValueError(
            f"Expected at least 2 bins, 1 neuron and 1 coordinate; got {bins}, {neurons} and {coordinates}."
        )
    of_loading, of_rest = jax.random.split(key)
    loading = np.asarray(jax.random.normal(of_loading, (neurons, coordinates)))
    baseline = np.full(neurons, math.log(0.5))
    seeded = numpyro.handlers.seed(poisson_state_space, of_rest)
    drawn = numpyro.handlers.trace(seeded).get_trace(jnp.asarray(baseline), jnp.asarray(loading), bins, **options)
    own = ("baseline", "loading") if tuning == "unknown" else ()
    return Dataset(
        f"simulated_{bins}_bins",
        {"baseline_before": baseline, "loading_before": loading, "counts": np.asarray(drawn["counts"]["value"])},
        static={"bins": bins},
        coords={"bin": np.arange(bins)},
        truth={name: np.asarray(drawn[name]["value"]) for name in (*own, "state", "distance")},
        source=f"simulated: {bins} bins, {neurons} neurons, a state of {coordinates}",
        licence="none needed",
    )


def model(
    dataset: Dataset | None = None,
    *,
    tuning: str = "known",
    persistence: float = PERSISTENCE,
    state_sd: float = STATE_SD,
    tuning_sd: float = TUNING_SD,
) -> Model:
    """The model on a recording.

    Args:
        dataset: Arrays `baseline_before` `(neuron,)`, `loading_before` `(neuron, coordinate)` and `counts`
            `(bin, neuron)`; the mouse's if not given.
        tuning: `"known"`, with which the posterior is log-concave, or `"unknown"`.
        persistence: Correlation of a state with the one a bin before, from 0 to below 1.
        state_sd: Of each coordinate of the state, before any spike is seen.
        tuning_sd: Of the prior around what is known of baselines and loadings, where they are unknown.

    Raises:
        ValueError: An option is not what it should be, or the arrays do not fit.
    """
    options = _options(tuning, persistence, state_sd, tuning_sd)
    data = _checked(_mouse(len(recording())) if dataset is None else dataset)
    known = tuning == "known"
    return Model(
        poisson_state_space,
        replace(data, static={**data.static, **options}),
        quantities=(
            Quantity("distance", "mean distance of the state from the origin"),
            *(() if known else (Quantity("baseline", "log spikes a bin at the origin"), Quantity("loading"))),
            Quantity("state", dims=("bin", "coordinate")),
        ),
        log_concave=known,
        title="Poisson state space",
        question="Which state runs behind the spikes of many neurons?",
    )


def _options(tuning: str, persistence: float, state_sd: float, tuning_sd: float) -> dict[str, Any]:
    """The options as the callable takes them."""
    if tuning not in TUNINGS:
        raise ValueError(f"Expected tuning to be one of {', '.join(TUNINGS)}; got '{tuning}'.")
    if not 0 <= persistence < 1:
        raise ValueError(f"Expected persistence from 0 to below 1; got {persistence}.")
    for name, value in (("state_sd", state_sd), ("tuning_sd", tuning_sd)):
        if not 0 < value < math.inf:
            raise ValueError(f"Expected {name} above 0; got {value}.")
    return {"tuning": tuning, "persistence": persistence, "state_sd": state_sd, "tuning_sd": tuning_sd}


def _checked(data: Dataset) -> Dataset:
    """The dataset, with `bins` filled in."""
    wanted = ("baseline_before", "loading_before", "counts")
    missing = [name for name in wanted if name not in data.arrays]
    if missing:
        raise ValueError(
            f"Expected arrays {', '.join(wanted)} in dataset '{data.name}'; it lacks {', '.join(missing)}."
        )
    baseline, loading, counts = (data.arrays[name] for name in wanted)
    if counts.ndim != 2 or loading.ndim != 2 or not len(baseline) == len(loading) == counts.shape[1]:
        raise ValueError(
            "Expected baseline_before as (neuron,), loading_before as (neuron, coordinate), counts as (bin, neuron); "
            f"got shapes {baseline.shape}, {loading.shape} and {counts.shape}."
        )
    if len(counts) < 2 or (counts < 0).any() or (counts != np.round(counts)).any():
        raise ValueError("Expected counts of 0 or more, whole, in at least 2 bins; got others, or fewer bins.")
    if data.static.get("bins", len(counts)) != len(counts):
        raise ValueError(f"Expected static bins to be the rows of counts, {len(counts)}; got {data.static['bins']}.")
    return replace(data, static={**data.static, "bins": len(counts)})
