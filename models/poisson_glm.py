r"""Poisson regression of spike counts: what in the stimulus, and what in its own past, makes a neuron fire?

**Question.** Which part of a sound's last 20 ms drives an auditory receptor of a grasshopper, and how long does a
spike keep the next one away? Two recordings ask it twice. In the fast one the sound's level changes from bin to bin,
lags carry separate information and the filter's values are nearly independent. In the slow one neighbouring lags
are nearly collinear: the data fix smooth combinations of the filter's values and hardly their differences.
A guide that factorises cannot hold both (for the slow recording some weights' sds come out seven times too small).

**Model**, for bins t of width dt, neurons n and m, bumps j over lags:

    rate[t, n]  = exp(log_baseline[n] + sum_j stimulus[t, j] stimulus_weight[j, n]
                      + sum_j history[t, j, n] history_weight[j, n]
                      + sum_{m != n} sum_j history[t, j, m] coupling_weight[j, m to n])         spikes/s
    counts[t, n] ~ Poisson(rate[t, n] dt)

    log_baseline[n]           ~ Normal(log 50, 1.5)
    stimulus_weight[j, n]     ~ Normal(0, 1)      or Laplace(0, 1/4)
    history_weight[j, n]      ~ Normal(0, 2)      or Laplace(0, 2/4)
    coupling_weight[j, m to n] ~ Normal(0, 1)     or Laplace(0, 1/4)        with more than one neuron

`stimulus[t, j]` is bump j's weighted sum of the stimulus before bin t, `history[t, j, m]` that of neuron m's counts.
Bumps are raised cosines that sum to 1 at every lag, so that a weight is the filter's value at its bump's peak, and
`stimulus_filter = bumps @ stimulus_weight` is the change in log rate for one more sd of the stimulus at that lag
alone. `exp` of a history filter is a gain: what one spike that long ago multiplies the rate by. Bins whose window
reaches before the recording serve as history only. The posterior is log-concave with either prior.

**Why these priors.** The stimulus comes in units of its sd: by Normal(0, 1) one sd at one lag alone multiplies the
rate by at most about 7 either way, in 95 of 100 cases, which is more than neurons show and still holds the collinear
directions. History has twice that room, since a refractory neuron's gain falls below 1/50. The baseline lies
between about 3 and 950 spikes/s in 95 of 100 cases. `"laplace"` says that most bumps do nothing: more mass at 0 and a
heavier tail, with a scale (not an sd) of a quarter of the normal prior's sd.

**What it leaves out.** The receptor adapts (127 and 120 spikes in the first second, 78 and 75 in the last), while
the baseline here is constant.

**Data.** Two recordings of 10 s, 929 and 868 spikes, from the package nitime (BSD-3-Clause): sound whose level is
Gaussian noise of sd 6 dB with a cut-off at 200 Hz (slow) and 800 Hz (fast), here in bins of 1 ms.

References:
    Truccolo, Eden, Fellows, Donoghue & Brown (2005), A point process framework for relating neural spiking activity to
    spiking history, neural ensemble, and extrinsic covariate effects, Journal of Neurophysiology 93(2), section
    "Theory".
    Pillow, Shlens, Paninski, Sher, Litke, Chichilnisky & Simoncelli (2008), Spatio-temporal correlations and visual
    signalling in a complete neuronal population, Nature 454, methods (raised-cosine bases, coupling filters).
    Paninski (2004), Maximum likelihood estimation of cascade point-process neural encoding models, Network 15(4)
    (log-concavity).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from models._spike_design import Filters, design_from, filtered, low_pass_noise, pairs, raised_cosines
from toolkit import Dataset, Model, Quantity

PRIORS = ("normal", "laplace")
RECORDINGS = {"slow": 200, "fast": 800}
BASELINE_RATE, LOG_BASELINE_SD = 50.0, 1.5
STIMULUS_SD, HISTORY_SD, COUPLING_SD = 1.0, 2.0, 1.0
LAPLACE_SCALE = 0.25

_DATA = Path(__file__).parent / "data"


def poisson_glm(
    design: Any,
    stimulus_basis: Any,
    history_basis: Any,
    situations: Any,
    counts: Any = None,
    *,
    bin_seconds: float,
    prior: str = "normal",
    coupling: bool = True,
) -> None:
    """The NumPyro callable.

    With `counts` left out they are drawn bin by bin given the *recorded* history in `design`; `simulate` lets the
    history grow from the draws themselves.

    Args:
        design: What each stimulus function sees, then what each history function sees of each source neuron in
            turn, `(stimulus function + neuron * history function, bin)`; bins come last since products are then faster.
        stimulus_basis: Bumps at the stimulus lags to report, `(lag, stimulus function)`.
        history_basis: Bumps at the history lags to report, `(lag, history function)`.
        situations: Covariates to predict a rate for, `(situation, stimulus function + own history function)`.
        counts: Spikes `(bin, neuron)`; drawn if not given.
        bin_seconds: Width of a bin, the exposure.
        prior: One of `PRIORS`, for all weights.
        coupling: Whether neurons hear one another; without effect on one neuron.
    """
    functions, own_functions = stimulus_basis.shape[1], history_basis.shape[1]
    neurons = (design.shape[0] - functions) // own_functions
    neuron = numpyro.plate("neuron", neurons, dim=-1)
    history_function = numpyro.plate("history_function", own_functions, dim=-2)
    with neuron:
        log_baseline = numpyro.sample("log_baseline", dist.Normal(np.log(BASELINE_RATE), LOG_BASELINE_SD))
    with neuron, numpyro.plate("stimulus_function", functions, dim=-2):
        stimulus_weight = numpyro.sample("stimulus_weight", _weight_prior(prior, STIMULUS_SD))
    with neuron, history_function:
        history_weight = numpyro.sample("history_weight", _weight_prior(prior, HISTORY_SD))
    past_weight = _from_one_to_itself(history_weight)
    if coupling and neurons > 1:
        with numpyro.plate("pair", neurons * (neurons - 1), dim=-1), history_function:
            coupling_weight = numpyro.sample("coupling_weight", _weight_prior(prior, COUPLING_SD))
        numpyro.deterministic("coupling_gain", jnp.exp(history_basis @ coupling_weight))
        past_weight = past_weight + _from_one_to_another(coupling_weight, neurons)
    numpyro.deterministic("baseline_rate", jnp.exp(log_baseline))
    numpyro.deterministic("stimulus_filter", stimulus_basis @ stimulus_weight)
    numpyro.deterministic("history_gain", jnp.exp(history_basis @ history_weight))
    own_weight = jnp.concatenate([stimulus_weight, history_weight])
    numpyro.deterministic("predicted_rate", jnp.exp(log_baseline[None, :] + situations @ own_weight))
    weight = jnp.concatenate([stimulus_weight, past_weight.reshape(-1, neurons)])
    rate = jnp.exp(log_baseline[:, None] + weight.T @ design).T
    with numpyro.plate("bin", design.shape[1], dim=-1):
        # Neurons are one event of the bin and no plate: their weights are global and not local to the observations.
        distribution = dist.Poisson(bin_seconds * rate).to_event(1)
        numpyro.sample("counts", distribution, obs=counts, infer={"event_dims": ["neuron"]})


def _weight_prior(prior: str, sd: float) -> dist.Distribution:
    return dist.Laplace(0.0, LAPLACE_SCALE * sd) if prior == "laplace" else dist.Normal(0.0, sd)


def _from_one_to_itself(weight: Any) -> Any:
    """Own-history weights `(function, neuron)` as `(source, function, target)`, zero where they differ."""
    functions, neurons = weight.shape
    each = np.arange(neurons)
    return jnp.zeros((neurons, functions, neurons)).at[each, :, each].set(weight.T)


def _from_one_to_another(weight: Any, neurons: int) -> Any:
    """Coupling weights `(function, pair)` as `(source, function, target)`, zero from a neuron to itself."""
    sources, targets = pairs(neurons)
    return jnp.zeros((neurons, weight.shape[0], neurons)).at[sources, :, targets].set(weight.T)


def dataset(recording: str = "slow") -> Dataset:
    """One of the grasshopper recordings: 10 s in bins of 1 ms.

    Arrays: `stimulus` `(bin,)`, the sound's level, standardised here, in the open: (level - mean) / sd, where the sd
    is 5.9 dB (slow) or 4.5 dB (fast) at this bin width; `counts` `(bin, neuron)`. Static: `bin_seconds`.

    Args:
        recording: `"slow"` (level changes below 200 Hz) or `"fast"` (below 800 Hz).

    Raises:
        ValueError: There is no such recording.
    """
    return _grasshopper(recording)


def _grasshopper(recording: str) -> Dataset:
    if recording not in RECORDINGS:
        raise ValueError(f"Expected recording to be one of {', '.join(RECORDINGS)}; got '{recording}'.")
    with np.load(_DATA / f"grasshopper_{recording}.npz") as file:
        level, counts = file["level_db"].astype(np.float64), file["counts"].astype(np.int64)
    return Dataset(
        f"grasshopper_{recording}",
        {"stimulus": (level - level.mean()) / level.std(), "counts": counts[:, None]},
        static={"bin_seconds": 1e-3},
        coords={"neuron": np.array(["receptor"])},
        source=f"grasshopper auditory receptor, sound level cut off at {RECORDINGS[recording]} Hz, from nitime 0.12.1",
        licence="BSD-3-Clause (nitime, NIPY Developers)",
    )


def simulate(
    key: jax.Array,
    *,
    bins: int = 10_000,
    neurons: int = 1,
    cutoff_hz: float = 200.0,
    bin_seconds: float = 1e-3,
    filters: Filters | None = None,
) -> Dataset:
    """Spike counts whose history grows bin by bin, with the truth of every site of `model(..., filters=filters)`.

    The truth is not drawn from the priors, under which some neurons excite themselves without end: baselines are
    about 40 spikes/s, stimulus weights Normal(0, 0.15), own history only suppresses (from about -3 at the shortest
    lag to nearly 0), and coupling weights are Normal(0, 0.3 / sqrt(neurons)).

    Args:
        key: Fixes stimulus, truth and counts.
        bins: How many bins; the first ones, as many as the longest lag, serve as history.
        neurons: How many neurons, each of which hears the stimulus and all others.
        cutoff_hz: Highest frequency of the Gaussian stimulus: the lower, the more collinear its lags. From half the
            sampling rate (500 Hz in bins of 1 ms) on it is white.
        bin_seconds: Width of a bin.
        filters: Windows and numbers of bumps; as in `model` if not given.

    Raises:
        ValueError: A number is not positive, or the windows do not fit.
    """
    if min(neurons, cutoff_hz, bin_seconds) <= 0:
        raise ValueError(
            f"Expected neurons, cutoff_hz and bin_seconds above 0; got {neurons}, {cutoff_hz:g} and {bin_seconds:g}."
        )
    filters = filters or Filters()
    with jax.enable_x64(True):
        keys = jax.random.split(key, 3)
        filters.check_length(bins, bin_seconds)
        stimulus = low_pass_noise(np.asarray(jax.random.normal(keys[0], (bins,))), cutoff_hz, bin_seconds)
        truth = _draw_truth(keys[1], neurons, filters)
        data = Dataset(
            f"simulated_{neurons}_neuron{'s' if neurons > 1 else ''}",
            {"stimulus": stimulus, "counts": _spike(keys[2], stimulus, truth, filters, bin_seconds)},
            static={"bin_seconds": bin_seconds},
            source=f"simulated: {bins} bins of {1e3 * bin_seconds:g} ms, stimulus below {cutoff_hz:g} Hz",
            licence="none needed",
        )
        bound = model(data, filters=filters)
        values = bound.values(truth, bound.arrays)
    return replace(data, truth={name: np.asarray(value) for name, value in values.items()})


def _draw_truth(key: jax.Array, neurons: int, filters: Filters) -> dict[str, jax.Array]:
    keys = jax.random.split(key, 4)
    suppression = -3 * jnp.exp(-jnp.arange(filters.history_functions))
    spread = jax.random.uniform(keys[2], (filters.history_functions, neurons), minval=0.5, maxval=1.5)
    truth = {
        "log_baseline": jnp.log(40.0) + 0.3 * jax.random.normal(keys[0], (neurons,)),
        "stimulus_weight": 0.15 * jax.random.normal(keys[1], (filters.stimulus_functions, neurons)),
        "history_weight": suppression[:, None] * spread,
    }
    if neurons > 1:
        shape = (filters.history_functions, neurons * (neurons - 1))
        truth["coupling_weight"] = 0.3 / np.sqrt(neurons) * jax.random.normal(keys[3], shape)
    return truth


def _spike(
    key: jax.Array, stimulus: np.ndarray, truth: dict[str, jax.Array], filters: Filters, bin_seconds: float
) -> np.ndarray:
    """Counts `(bin, neuron)` after silence, each bin drawn given those before it; the stimulus is 0 before bin 0."""
    stimulus_lags, history_lags = filters.stimulus_lags(bin_seconds), filters.history_lags(bin_seconds)
    bins, neurons = len(stimulus), len(truth["log_baseline"])
    basis = raised_cosines(stimulus_lags, filters.stimulus_functions)
    padded = np.concatenate([np.zeros(stimulus_lags[-1]), stimulus])
    drive = filtered(padded, stimulus_lags, basis, np.arange(bins) + stimulus_lags[-1]).T @ truth["stimulus_weight"]
    past_weight = _from_one_to_itself(truth["history_weight"])
    if neurons > 1:
        past_weight = past_weight + _from_one_to_another(truth["coupling_weight"], neurons)
    kernel = jnp.einsum("lf,sft->lst", raised_cosines(history_lags, filters.history_functions), past_weight)

    silence = jnp.zeros((len(history_lags), neurons))
    start = truth["log_baseline"][None, :] + drive
    return np.asarray(_counts(silence, start, kernel, jax.random.split(key, bins), bin_seconds))


@jax.jit
def _counts(past: Any, log_rate: Any, kernel: Any, keys: Any, bin_seconds: Any) -> Any:
    """Counts `(bin, neuron)` from the counts before, latest first, `(lag, neuron)`, and the rest of the log rate."""

    def step(past: Any, given: Any) -> tuple[Any, Any]:
        log_rate, key = given
        log_rate = log_rate + jnp.einsum("ls,lst->t", past, kernel)
        now = jax.random.poisson(key, bin_seconds * jnp.exp(log_rate))
        return jnp.concatenate([now[None, :].astype(past.dtype), past[:-1]]), now

    return jax.lax.scan(step, past, (log_rate, keys))[1]


def model(
    dataset: Dataset | None = None,
    *,
    recording: str | None = None,
    prior: str = "normal",
    coupling: bool = True,
    filters: Filters | None = None,
) -> Model:
    """The model on a dataset.

    Args:
        dataset: Arrays `stimulus` `(bin,)`, in units of its sd since the priors count on that, and `counts`
            `(bin, neuron)`; static `bin_seconds` (or an array of one number, as in an NPZ file); coords `neuron` if
            they have names. The slow grasshopper recording if not given.
        recording: `"slow"` or `"fast"`, in place of a dataset.
        prior: `"normal"`, or `"laplace"` (sparse) for all weights.
        coupling: Whether several neurons hear one another.
        filters: Windows and numbers of bumps; `Filters()` if not given.

    Raises:
        ValueError: An option is unknown, both dataset and recording are given, or the data do not fit.
    """
    if prior not in PRIORS:
        raise ValueError(f"Expected prior to be one of {', '.join(PRIORS)}; got '{prior}'.")
    if dataset is not None and recording is not None:
        raise ValueError(f"Expected a dataset or a recording; got both ('{dataset.name}' and '{recording}').")
    data = _checked(_grasshopper(recording or "slow") if dataset is None else dataset)
    designed = design_from(data, filters or Filters())
    coupled = coupling and data.arrays["counts"].shape[1] > 1
    bound = Model(
        poisson_glm,
        replace(designed, static={**designed.static, "prior": prior, "coupling": bool(coupling)}),
        quantities=_quantities(coupled),
        log_concave=True,
        title="Poisson regression of spike counts",
        question="What in the stimulus, and in the neuron's own past, makes it fire?",
    )
    _check_truth(bound)
    return bound


def _quantities(coupled: bool) -> tuple[Quantity, ...]:
    quantities = (
        Quantity("baseline_rate", "rate at the mean stimulus, long after a spike", "spikes/s", ("neuron",)),
        Quantity("predicted_rate", "predicted rate", "spikes/s", ("situation", "neuron")),
        Quantity("stimulus_filter", "stimulus filter", "log rate per sd", ("stimulus_lag_ms", "neuron")),
        Quantity("history_gain", "gain after an own spike", "times", ("history_lag_ms", "neuron")),
    )
    gain = Quantity("coupling_gain", "gain after another's spike", "times", ("history_lag_ms", "pair"))
    return (*quantities, gain) if coupled else quantities


def _checked(data: Dataset) -> Dataset:
    missing = [name for name in ("stimulus", "counts") if name not in data.arrays]
    if missing:
        raise ValueError(
            f"Expected arrays 'stimulus' and 'counts' in dataset '{data.name}'; it lacks {' and '.join(missing)}."
        )
    stimulus, counts = data.arrays["stimulus"], data.arrays["counts"]
    if stimulus.ndim != 1 or counts.ndim != 2 or len(counts) != len(stimulus):
        raise ValueError(
            f"Expected stimulus as (bin,) and counts as (bin, neuron); got shapes {stimulus.shape} and {counts.shape}: "
            "one neuron's counts are counts[:, None]."
        )
    if (counts < 0).any() or (counts != np.round(counts)).any():
        raise ValueError(
            "Expected whole counts of 0 or more; got negative or fractional ones: give spikes in each bin."
        )
    # A file of arrays can hold the width as an array only.
    bin_seconds = data.static.get("bin_seconds", data.arrays.get("bin_seconds", 0))
    if np.size(bin_seconds) != 1 or not np.all(bin_seconds > 0):
        raise ValueError(
            f"Expected bin_seconds above 0 among the static values of '{data.name}', or as an array of one number; "
            f"got {bin_seconds}."
        )
    return replace(data, arrays={"stimulus": stimulus, "counts": counts}, static={"bin_seconds": float(bin_seconds)})


def _check_truth(bound: Model) -> None:
    for name, value in bound.dataset.truth.items():
        shape = bound.sites[name].shape if name in bound.sites else None
        if shape not in (None, value.shape):
            raise ValueError(
                f"Expected the truth of '{name}' shaped {shape}; got {value.shape}: "
                "give model the filters that simulate had."
            )
