"""The Poisson state space: its density, the recording, simulation, the chain against NUTS, misuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from scipy import stats

import models
from toolkit import Dataset, check, fit, reference
from toolkit.variational.chain_search import find_chain

MODEL = models.load("poisson_state_space")


def test_the_density_is_that_of_the_docstring() -> None:
    data = MODEL.simulate(jax.random.key(0), bins=7, neurons=4, coordinates=3)
    bound = MODEL.model(data)
    state = np.random.default_rng(1).normal(size=(7, 3))
    rate = np.exp(data.arrays["baseline_before"] + state @ data.arrays["loading_before"].T)
    wanted = stats.poisson.logpmf(data.arrays["counts"], rate).sum() + stats.norm.logpdf(state[0], 0, 0.7).sum()
    wanted += stats.norm.logpdf(state[1:], 0.9 * state[:-1], 0.7 * (1 - 0.81) ** 0.5).sum()
    assert float(bound.log_density({"state": state}, bound.arrays)) == pytest.approx(wanted)


def test_the_recording_is_the_minute_that_was_filmed() -> None:
    data, table = MODEL.dataset(), MODEL.recording()
    assert data.arrays["counts"].shape == (240, 13)
    assert data.arrays["counts"].sum() == table[data.coords["neuron"].tolist()].to_numpy().sum()
    assert (data.arrays["counts"].sum(0) >= 50).all()
    np.testing.assert_allclose(np.diff(table["start"]), 0.25)
    # The thalamic units are tuned to the direction, in this minute as in the others that their tuning is from.
    direction = table["direction"].to_numpy()
    for number in range(7):
        counts, loading = data.arrays["counts"][:, number], data.arrays["loading_before"][number]
        log_rate = np.column_stack([np.cos(direction), np.sin(direction)]) @ loading
        assert stats.spearmanr(counts, log_rate).statistic > 0.3


@pytest.mark.parametrize("tuning", MODEL.TUNINGS)
@pytest.mark.slow
def test_simulated_data_have_their_truth_and_every_step_depends_on_its_neighbours(tuning: str) -> None:
    data = MODEL.simulate(jax.random.key(2), bins=30, neurons=5, tuning=tuning)
    assert data.truth["state"].shape == (30, 2)
    assert float(data.truth["distance"]) == pytest.approx(np.linalg.norm(data.truth["state"], axis=1).mean())
    bound = MODEL.model(data, tuning=tuning)
    assert all(rung.passed for rung in check(bound))
    chain = find_chain(bound)
    assert (chain.blocks, chain.block, len(chain.shared)) == (30, 2, 15 if tuning == "unknown" else 0)
    assert bound.log_concave == (tuning == "known")


@pytest.mark.slow
def test_the_chain_has_nuts_s_means_and_sds() -> None:
    """At a size that NUTS can do; a Gaussian is not exact here: 0.03 sd are allowed beside the errors."""
    bound = MODEL.model(MODEL.dataset(bins=40))
    fitted = fit(bound, "chain", key=jax.random.key(0), tolerance=0.01)  # of 0.1 nats any mean may be off by 0.4 sd
    assert fitted.status.ok
    nuts = reference(bound, key=jax.random.key(1), chains=4, warmup=500, draws=1_000)
    assert nuts.status.ok
    drawn, own = nuts.draws["state"], fitted.draw(jax.random.key(2), 20_000, ("state",))["state"]
    ess = nuts.diagnostics["ess_bulk"].filter(like="state[").to_numpy().reshape(drawn.shape[2:])
    error = np.sqrt(1 / ess + 1 / len(own))  # of a mean, in sds; of the logarithm of a sd it is about 1 / sqrt(2) of it
    shifts = (own.mean(0) - drawn.mean((0, 1))) / drawn.std((0, 1))
    assert (np.abs(shifts) < 0.03 + 4 * error).all()
    assert (np.abs(np.log(own.std(0) / drawn.std((0, 1)))) < 0.03 + 4 * error / np.sqrt(2)).all()


@pytest.mark.slow
def test_many_parameters_of_tuning_are_pinned_as_well() -> None:
    """39 shared coordinates, coupled to 240 bins: climbs on few draws run off here, and are not believed."""
    fitted = fit(MODEL.model(tuning="unknown"), "chain", key=jax.random.key(0))
    assert fitted.certificate is not None
    assert fitted.certificate.limit < 0.2
    assert fitted.elbo is not None
    assert abs(fitted.elbo.value + 4_655.8) < 0.5


MISUSE: dict[str, tuple[Callable[[], Any], str]] = {
    "tuning": (lambda: MODEL.model(tuning="guessed"), "Expected tuning to be one of known, unknown; got 'guessed'"),
    "persistence": (lambda: MODEL.model(persistence=1.0), "Expected persistence from 0 to below 1; got 1.0"),
    "sd": (lambda: MODEL.model(state_sd=-1.0), "Expected state_sd above 0; got -1.0"),
    "bins": (lambda: MODEL.dataset(bins=241), "Expected from 2 to 240 bins; got 241"),
    "sizes": (
        lambda: MODEL.simulate(jax.random.key(0), neurons=0),
        "Expected at least 2 bins, 1 neuron and 1 coordinate; got 200, 0 and 2",
    ),
    "arrays": (
        lambda: MODEL.model(Dataset("d", {"counts": np.ones((3, 2))})),
        "it lacks baseline_before, loading_before",
    ),
}


@pytest.mark.parametrize(("call", "text"), MISUSE.values(), ids=MISUSE)
def test_misuse_is_told(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"counts": np.ones((5, 3))}, "Expected baseline_before as"),
        ({"counts": np.full((5, 4), 0.5)}, "Expected counts of 0 or more, whole"),
        ({"counts": np.ones((1, 4))}, "Expected counts of 0 or more, whole, in at least 2 bins"),
    ],
)
def test_arrays_must_fit(changes: dict[str, np.ndarray], text: str) -> None:
    arrays = {"baseline_before": np.zeros(4), "loading_before": np.ones((4, 2)), **changes}
    with pytest.raises(ValueError, match=text):
        MODEL.model(Dataset("d", arrays))
