from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from numpyro import handlers
from numpyro.infer import MCMC, NUTS
from scipy.stats import laplace, norm, poisson

from models import names
from models._spike_design import Filters, filtered, low_pass_noise, pairs, raised_cosines, reported
from models.poisson_glm import dataset, model, poisson_glm, simulate
from toolkit import Dataset, Model

BINS = 400


def key(seed: int = 0) -> jax.Array:
    return jax.random.PRNGKey(seed)


def point(bound: Model, seed: int = 0, scale: float = 0.3) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: scale * random.standard_normal(bound.sites[name].shape) for name in bound.latents}


def density(bound: Model, latents: dict[str, np.ndarray]) -> float:
    return float(bound.log_density(latents, bound.arrays))


# --- data ---------------------------------------------------------------------------------------------------------


def test_the_model_is_found_by_its_file() -> None:
    assert "poisson_glm" in names()


@pytest.mark.parametrize(("recording", "spikes", "neighbours"), [("slow", 929, 0.5), ("fast", 868, 0.0)])
def test_the_recordings_have_their_spikes_and_only_the_slow_one_is_collinear(
    recording: str, spikes: int, neighbours: float
) -> None:
    data = dataset(recording)
    stimulus = data.arrays["stimulus"]
    assert data.arrays["counts"].shape == (10_000, 1)
    assert data.arrays["counts"].sum() == spikes
    np.testing.assert_allclose([stimulus.mean(), stimulus.std()], [0, 1], atol=1e-12)
    correlation = float(np.corrcoef(stimulus[1:], stimulus[:-1])[0, 1])
    # 10,000 independent bins give a correlation of standard error 0.01.
    assert correlation > neighbours + 0.05 if neighbours else abs(correlation) < 0.05


def test_the_shipped_files_are_what_the_script_makes(shared_data: Any) -> None:
    from models.data.make_grasshopper import binned

    with np.load(shared_data / "spikes" / "grasshopper.npz") as raw:
        for number, recording in ((1, "slow"), (2, "fast")):
            level, counts = binned(raw[f"stim{number}"], raw[f"spikes{number}"])
            shipped = dataset(recording).arrays
            np.testing.assert_array_equal(counts, shipped["counts"][:, 0])
            standardised = (level - level.mean(dtype=float)) / level.std(dtype=float)
            np.testing.assert_allclose(standardised, shipped["stimulus"], atol=1e-4)


# --- bumps and designs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lags", "functions"), [((1, 21), 6), ((5, 21), 7), ((0, 2), 2), ((3, 40), 9)])
def test_bumps_sum_to_one_peak_in_order_and_tell_apart(lags: tuple[int, int], functions: int) -> None:
    bumps = raised_cosines(np.arange(*lags), functions)
    np.testing.assert_allclose(bumps.sum(axis=1), 1, atol=1e-12)
    assert bumps.min() >= 0
    assert np.linalg.matrix_rank(bumps) == functions
    peaks = bumps.argmax(axis=0)
    assert (np.diff(peaks) > 0).all()
    assert peaks[0] == 0
    assert peaks[-1] == len(bumps) - 1
    # No more than two bumps are at work at any lag, and the first and last alone at the ends.
    assert (bumps > 1e-12).sum(axis=1).max() <= 2
    np.testing.assert_allclose([bumps[0, 0], bumps[-1, -1]], 1, atol=1e-12)


def test_what_a_function_sees_is_the_sum_over_its_lags() -> None:
    random = np.random.default_rng(1)
    series, basis, lags = random.standard_normal(30), random.standard_normal((4, 2)), np.arange(2, 6)
    seen = filtered(series, lags, basis, np.arange(5, 30))
    by_hand = [[sum(series[t - lag] * basis[i, j] for i, lag in enumerate(lags)) for t in range(5, 30)] for j in (0, 1)]
    np.testing.assert_allclose(seen, by_hand, atol=1e-12)


def test_no_count_explains_itself() -> None:
    """History ends one bin before: changing a bin's count changes only what later bins see."""
    data = simulate(key(), bins=BINS)
    changed = {**data.arrays, "counts": data.arrays["counts"].copy()}
    changed["counts"][100, 0] += 1
    reach = Filters().reach(1e-3)
    before, after = (model(replace(data, arrays=a, truth={})).arrays["design"] for a in (data.arrays, changed))
    differs = np.flatnonzero((before != after).any(axis=0)) + reach
    assert differs[0] == 101
    assert differs[-1] == 120


def test_a_slow_stimulus_makes_the_filter_collinear_and_a_fast_one_does_not() -> None:
    condition = {}
    for recording in ("slow", "fast"):
        stimulus = model(recording=recording).arrays["design"][:7]
        condition[recording] = np.linalg.cond(np.corrcoef(stimulus))
    assert condition["slow"] > 10 * condition["fast"]


def test_low_pass_noise_has_nothing_above_its_cut_off() -> None:
    noise = low_pass_noise(np.random.default_rng(0).standard_normal(1000), 200.0, 1e-3)
    power = np.abs(np.fft.rfft(noise)) ** 2
    assert power[201:].max() < 1e-20 * power.max()
    np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=1e-12)


def test_reported_lags_are_few_and_keep_both_ends() -> None:
    assert reported(np.arange(1, 6)).tolist() == [0, 1, 2, 3, 4]
    shown = reported(np.arange(1, 201))
    assert len(shown) <= 12
    assert shown[0] == 0
    assert shown[-1] == 199
    assert (np.diff(shown) > 0).all()


# --- the density --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prior", "log_prior"),
    [("normal", lambda w, sd: norm.logpdf(w, 0, sd)), ("laplace", lambda w, sd: laplace.logpdf(w, 0, sd / 4))],
)
def test_density_is_the_formula_of_the_docstring(prior: str, log_prior: Callable[..., Any]) -> None:
    data = simulate(key(2), bins=60, neurons=2)
    bound = model(data, prior=prior)
    z = point(bound, 3)
    stimulus, counts = data.arrays["stimulus"], data.arrays["counts"]
    stimulus_filter = raised_cosines(np.arange(5, 21), 7) @ z["stimulus_weight"]
    own, other = (raised_cosines(np.arange(1, 21), 6) @ z[name] for name in ("history_weight", "coupling_weight"))
    expected = norm.logpdf(z["log_baseline"], np.log(50), 1.5).sum()
    expected += sum(
        log_prior(z[name], sd).sum()
        for name, sd in (("stimulus_weight", 1), ("history_weight", 2), ("coupling_weight", 1))
    )
    for t in range(20, 60):
        for target in (0, 1):
            log_rate = z["log_baseline"][target] + stimulus_filter[:, target] @ stimulus[t - np.arange(5, 21)]
            past = counts[t - np.arange(1, 21)]
            log_rate += own[:, target] @ past[:, target] + other[:, 1 - target] @ past[:, 1 - target]
            expected += poisson.logpmf(counts[t, target], 1e-3 * np.exp(log_rate))
    # Sums of 80 terms of order 1 to 10 in float64.
    np.testing.assert_allclose(density(bound, z), expected, rtol=1e-11)


def test_wider_bins_of_the_same_rate_say_the_same() -> None:
    """Where the rate is constant, merging two bins changes the likelihood by a constant: the width is the exposure."""
    data = model(simulate(key(4), bins=BINS), filters=Filters()).dataset
    even = len(data.arrays["counts"]) // 2
    design = data.arrays["design"][:, :even]
    counts = data.arrays["counts"][: 2 * even].reshape(even, 2, 1)
    split = _with(data, np.repeat(design, 2, axis=1), counts.reshape(-1, 1), 1e-3)
    merged = _with(data, design, counts.sum(axis=1), 2e-3)
    differences = [density(split, z) - density(merged, z) for z in (point(split, seed) for seed in range(4))]
    np.testing.assert_allclose(differences, differences[0], rtol=1e-10)
    narrow = _with(data, design, counts.sum(axis=1), 1e-3)
    for seed in range(4):
        z = point(split, seed)
        unlike = density(split, z) - density(narrow, z) - differences[0]
        # Half the exposure: half of the expected counts are missing, and each count costs log 2 more.
        by_hand = counts.sum() * np.log(2) - _rates(narrow, z).sum()
        np.testing.assert_allclose(unlike, by_hand, rtol=1e-9)


def _with(data: Dataset, design: np.ndarray, counts: np.ndarray, bin_seconds: float) -> Model:
    arrays = {**data.arrays, "design": design, "counts": counts}
    return Model(poisson_glm, replace(data, arrays=arrays, static={"bin_seconds": bin_seconds}))


def test_bin_width_and_baseline_trade_one_for_one() -> None:
    data = model(simulate(key(4), bins=BINS)).dataset
    ten = _with(data, data.arrays["design"], data.arrays["counts"], 1e-2)
    one = _with(data, data.arrays["design"], data.arrays["counts"], 1e-3)
    z = point(one)
    shifted = {**z, "log_baseline": z["log_baseline"] - np.log(10)}
    prior = [norm.logpdf(v["log_baseline"], np.log(50), 1.5).sum() for v in (z, shifted)]
    np.testing.assert_allclose(density(one, z) - prior[0], density(ten, shifted) - prior[1], rtol=1e-10)


@pytest.mark.parametrize("prior", ["normal", "laplace"])
def test_density_is_concave_along_every_segment(prior: str) -> None:
    bound = model(simulate(key(5), bins=BINS, neurons=2), prior=prior)
    assert bound.log_concave
    for seed in range(5):
        a, b = point(bound, seed, 1.0), point(bound, seed + 100, 1.0)
        middle = {name: (a[name] + b[name]) / 2 for name in a}
        assert density(bound, middle) > (density(bound, a) + density(bound, b)) / 2


# --- coupling and quantities --------------------------------------------------------------------------------------


def test_a_coupling_filter_reaches_its_target_alone() -> None:
    bound = model(simulate(key(6), bins=BINS, neurons=3))
    labels = bound.dataset.coords["pair"].tolist()
    assert [f"neuron{m + 1} to neuron{n + 1}" for m, n in zip(*pairs(3), strict=True)] == labels
    assert bound.dims("coupling_gain") == ("history_lag_ms", "pair")
    assert bound.sites["coupling_weight"].shape == (6, 6)
    weight = np.zeros((6, 6))
    weight[:, labels.index("neuron3 to neuron1")] = 0.7
    rates = _rates(bound, {**point(bound), "coupling_weight": weight})
    silent = _rates(bound, {**point(bound), "coupling_weight": np.zeros((6, 6))})
    heard = bound.arrays["design"][7 + 12 :].sum(axis=0)  # The bumps sum to 1: neuron 3's spikes in the window.
    assert heard.max() >= 1
    np.testing.assert_allclose(rates[:, 0], silent[:, 0] * np.exp(0.7 * heard), rtol=1e-10)
    np.testing.assert_allclose(rates[:, 1:], silent[:, 1:], rtol=1e-12)


def _rates(bound: Model, latents: dict[str, np.ndarray]) -> np.ndarray:
    """Expected counts `(bin, neuron)`; with the counts left out, as for prediction."""
    arguments = {name: value for name, value in bound.kwargs.items() if name != "counts"}
    seeded = handlers.seed(handlers.substitute(poisson_glm, data=latents), 0)
    site = handlers.trace(seeded).get_trace(**arguments)["counts"]
    return np.asarray(site["fn"].base_dist.rate)


def test_without_coupling_the_density_is_the_sum_over_neurons() -> None:
    data = simulate(key(7), bins=BINS, neurons=2)
    both = model(data, coupling=False)
    assert "coupling_weight" not in both.latents
    z = point(both)
    alone = [
        density(
            model(Dataset("one", {**data.arrays, "counts": data.arrays["counts"][:, [n]]}, static=data.static)),
            {name: value[..., [n]] for name, value in z.items()},
        )
        for n in (0, 1)
    ]
    np.testing.assert_allclose(density(both, z), sum(alone), rtol=1e-11)


def test_quantities_have_units_and_are_few() -> None:
    bound = model()
    assert sum(int(np.prod(bound.sites[q.site].shape)) for q in bound.quantities) < 60
    assert all(quantity.unit and quantity.label for quantity in bound.quantities)
    assert all(dim in bound.dataset.coords for q in bound.quantities for dim in bound.dims(q.site))
    assert not any(bound.local(site) for site in bound.latents)


def test_reported_sites_are_what_they_are_called() -> None:
    bound = model(simulate(key(8), bins=BINS))
    z = point(bound)
    values = bound.values(z, bound.arrays)
    stimulus_filter = (raised_cosines(np.arange(5, 21), 7) @ z["stimulus_weight"])[:, 0]
    gain = np.exp(raised_cosines(np.arange(1, 21), 6) @ z["history_weight"])[:, 0]
    coords = bound.dataset.coords
    np.testing.assert_allclose(values["stimulus_filter"][:, 0], stimulus_filter[coords["stimulus_lag_ms"] - 5])
    np.testing.assert_allclose(values["history_gain"][:, 0], gain[coords["history_lag_ms"] - 1])
    rate = float(np.exp(z["log_baseline"][0]))
    np.testing.assert_allclose(values["baseline_rate"], [rate])
    assert coords["situation"].tolist()[2] == "-1 sd 5 ms after a spike"
    up, down = np.exp(stimulus_filter.sum()), np.exp(-stimulus_filter.sum())
    expected = rate * np.array([down, up, down * gain[4], up * gain[4]])
    np.testing.assert_allclose(values["predicted_rate"][:, 0], expected)


# --- simulation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("neurons", [1, 3])
def test_truth_has_the_shape_of_its_site_and_the_same_key_gives_the_same(neurons: int) -> None:
    data = simulate(key(9), bins=BINS, neurons=neurons)
    bound = model(data)
    assert set(bound.dataset.truth) == set(bound.sites) - {"counts"}
    for name, value in data.truth.items():
        assert value.shape == bound.sites[name].shape, name
    again = simulate(key(9), bins=BINS, neurons=neurons)
    np.testing.assert_array_equal(data.arrays["counts"], again.arrays["counts"])
    assert not np.array_equal(data.arrays["counts"], simulate(key(10), bins=BINS, neurons=neurons).arrays["counts"])


def test_counts_follow_the_rates_of_the_truth() -> None:
    """Spikes minus expected spikes form a martingale, and so do their products with covariates: the score is near 0."""
    data = simulate(key(11), bins=2_000, neurons=2)
    bound = model(data)
    latents = {name: data.truth[name] for name in bound.latents}
    design, counts = bound.arrays["design"], bound.arrays["counts"]
    expected = _rates(bound, latents)
    covariates = np.concatenate([np.ones((1, design.shape[1])), design])
    score = covariates @ (counts - expected)
    sd = np.sqrt(covariates**2 @ expected)
    assert counts.sum() > 100
    assert (np.abs(score) < 5 * sd).all()


def test_many_neurons_stay_within_what_neurons_do() -> None:
    rates = 1e3 * simulate(key(12), bins=2_000, neurons=6).arrays["counts"].mean(axis=0)
    assert (rates > 1).all()
    assert (rates < 400).all()


@pytest.mark.slow
@pytest.mark.parametrize(("prior", "neurons"), [("normal", 1), ("laplace", 2)])
def test_nuts_recovers_the_truth(prior: str, neurons: int) -> None:
    data = simulate(key(13), bins=8_000, neurons=neurons, cutoff_hz=500.0)
    bound = model(data, prior=prior)
    chains = MCMC(NUTS(bound.bound()), num_warmup=500, num_samples=500, progress_bar=False)
    chains.run(key(14), **bound.arrays, extra_fields=("diverging",))
    assert int(chains.get_extra_fields()["diverging"].sum()) == 0
    draws = chains.get_samples()
    for name in bound.latents:
        values = np.asarray(draws[name])
        assert (np.abs(values.mean(0) - data.truth[name]) < 5 * values.std(0)).all(), name


# --- misuse -------------------------------------------------------------------------------------------------------


def _data(**arrays: Any) -> Dataset:
    default = {"stimulus": np.linspace(-1, 1, BINS), "counts": np.ones((BINS, 1), int)}
    given = {name: value for name, value in {**default, **arrays}.items() if value is not None}
    return Dataset("mine", given, static={"bin_seconds": 1e-3})


ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "unknown prior": (
        lambda: model(prior="horseshoe"),
        "Expected prior to be one of normal, laplace; got 'horseshoe'.",
    ),
    "unknown recording": (
        lambda: model(recording="loud"),
        "Expected recording to be one of slow, fast; got 'loud'.",
    ),
    "both": (
        lambda: model(_data(), recording="slow"),
        "Expected a dataset or a recording; got both ('mine' and 'slow').",
    ),
    "no counts": (
        lambda: model(_data(counts=None)),
        "Expected arrays 'stimulus' and 'counts' in dataset 'mine'; it lacks counts.",
    ),
    "flat counts": (
        lambda: model(_data(counts=np.ones(BINS, int))),
        "Expected stimulus as (bin,) and counts as (bin, neuron); got shapes (400,) and (400,): "
        "one neuron's counts are counts[:, None].",
    ),
    "negative counts": (
        lambda: model(_data(counts=-np.ones((BINS, 1), int))),
        "Expected whole counts of 0 or more; got negative or fractional ones: give spikes in each bin.",
    ),
    "no bin width": (
        lambda: model(replace(_data(), static={})),
        "Expected bin_seconds above 0 among the static values of 'mine', or as an array of one number; got 0.",
    ),
    "names": (
        lambda: model(replace(_data(), coords={"neuron": np.array(["a", "b"])})),
        "Expected 1 neuron names, one for each column of counts; got 2.",
    ),
    "too short": (
        lambda: model(_data(stimulus=np.zeros(20), counts=np.zeros((20, 1), int))),
        "Expected more than 20 bins, as filters reach back so far; got 20: use a longer recording or shorter filters.",
    ),
    "simulated too short": (
        lambda: simulate(key(), bins=3),
        "Expected more than 20 bins, as filters reach back so far; got 3: use a longer recording or shorter filters.",
    ),
    "no neurons": (
        lambda: simulate(key(), neurons=0),
        "Expected neurons, cutoff_hz and bin_seconds above 0; got 0, 200 and 0.001.",
    ),
    "other filters": (
        lambda: model(simulate(key(), bins=30), filters=Filters(history_functions=5)),
        "Expected the truth of 'history_weight' shaped (5, 1); got (6, 1): give model the filters that simulate had.",
    ),
    "empty window": (
        lambda: Filters(first_lag_ms=9, last_lag_ms=9),
        "Expected stimulus lags with 0 <= first_lag_ms < last_lag_ms; got 9 and 9.",
    ),
    "no history": (lambda: Filters(history_ms=0), "Expected history_ms above 0; got 0."),
    "too many functions": (
        lambda: raised_cosines(np.arange(4), 5),
        "Expected from 2 to 4 functions over 4 lags; got 5.",
    ),
    "functions between lags": (
        lambda: raised_cosines(np.arange(1, 21), 15),
        "Expected functions that 20 lags can tell apart; got 15, some of them between two lags: "
        "use fewer functions, or finer bins.",
    ),
    "wide bins": (
        lambda: model(replace(_data(), static={"bin_seconds": 4e-3})),
        "Expected from 2 to 5 functions over 5 lags; got 7.",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_misuse_gets_its_sentence(case: str) -> None:
    call, sentence = ERRORS[case]
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        call()


def test_a_file_of_arrays_holds_the_bin_width_too() -> None:
    data = _data()
    file = replace(data, arrays={**data.arrays, "bin_seconds": np.array(1e-3)}, static={})
    assert model(file).fingerprint() == model(data).fingerprint()
