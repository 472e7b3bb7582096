"""Covariates of spike-count models: raised-cosine bumps over lags, and what they see of a series' past."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from toolkit import Dataset

REPORTED_LAGS = 12


@dataclass(frozen=True)
class Filters:
    """How far filters reach back, and how much detail they have; milliseconds.

    Attributes:
        first_lag_ms: Shortest stimulus lag; sound needs some milliseconds to become a spike.
        last_lag_ms: Longest stimulus lag.
        stimulus_functions: Raised-cosine bumps over the stimulus lags.
        history_ms: Longest lag of spike history and coupling; the shortest is one bin.
        history_functions: Raised-cosine bumps over the history lags.

    Raises:
        ValueError: A window is empty or reaches into the future.
    """

    first_lag_ms: float = 5.0
    last_lag_ms: float = 20.0
    stimulus_functions: int = 7
    history_ms: float = 20.0
    history_functions: int = 6

    def __post_init__(self) -> None:
        if not 0 <= self.first_lag_ms < self.last_lag_ms:
            raise ValueError(
                f"Expected stimulus lags with 0 <= first_lag_ms < last_lag_ms; "
                f"got {self.first_lag_ms:g} and {self.last_lag_ms:g}."
            )
        if self.history_ms <= 0:
            raise ValueError(f"Expected history_ms above 0; got {self.history_ms:g}.")

    def stimulus_lags(self, bin_seconds: float) -> np.ndarray:
        """Stimulus lags in bins; 0 is the bin of the count itself."""
        first, last = (round(lag / 1e3 / bin_seconds) for lag in (self.first_lag_ms, self.last_lag_ms))
        return np.arange(first, last + 1)

    def history_lags(self, bin_seconds: float) -> np.ndarray:
        """History lags in bins, from 1."""
        return np.arange(1, round(self.history_ms / 1e3 / bin_seconds) + 1)

    def reach(self, bin_seconds: float) -> int:
        """The longest lag in bins: how many bins a recording spends on history alone."""
        return int(max(self.stimulus_lags(bin_seconds)[-1], self.history_lags(bin_seconds).size))

    def check_length(self, bins: int, bin_seconds: float) -> None:
        """Nothing, if a recording is longer than the lags reach back.

        Raises:
            ValueError: It is not.
        """
        if bins <= self.reach(bin_seconds):
            raise ValueError(
                f"Expected more than {self.reach(bin_seconds)} bins, as filters reach back so far; got {bins}: "
                "use a longer recording or shorter filters."
            )


def raised_cosines(lags: np.ndarray, functions: int) -> np.ndarray:
    """Raised-cosine bumps `(lag, function)` that sum to 1 at every lag.

    Peaks run from the first lag to the last, evenly spaced on log(lag - first lag + 2), so that detail is finest at
    the first lags; each bump falls to 0 at its neighbours' peaks. A bump's weight is therefore the value of the
    filter at that peak. (The bumps of Pillow et al. 2008 are twice as wide for the same spacing.)

    Args:
        lags: Consecutive, in bins.
        functions: How many bumps, from 2 to the number of lags.

    Raises:
        ValueError: Too few or too many functions, or bumps that fall between lags, so that their weights cannot be
            told apart.
    """
    if not 2 <= functions <= len(lags):
        raise ValueError(f"Expected from 2 to {len(lags)} functions over {len(lags)} lags; got {functions}.")
    place = np.log(lags - lags[0] + 2.0)
    peaks = np.linspace(place[0], place[-1], functions)
    distance = (place[:, None] - peaks) / (peaks[1] - peaks[0])
    bumps = 0.5 * (1 + np.cos(np.pi * np.clip(distance, -1, 1)))
    if np.linalg.matrix_rank(bumps) < functions:
        raise ValueError(
            f"Expected functions that {len(lags)} lags can tell apart; got {functions}, some of them between two lags: "
            "use fewer functions, or finer bins."
        )
    return bumps


def reported(lags: np.ndarray) -> np.ndarray:
    """Positions of at most `REPORTED_LAGS` lags, evenly spaced on the bumps' own scale, first and last among them."""
    if len(lags) <= REPORTED_LAGS:
        return np.arange(len(lags))
    spaced = np.geomspace(2, len(lags) + 1, REPORTED_LAGS) - 2
    return np.unique(np.round(spaced).astype(int))


def filtered(series: np.ndarray, lags: np.ndarray, basis: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """What each basis function sees of a series' past, `(function, row)` for a series `(bin,)`.

    Args:
        series: The stimulus, or one neuron's counts.
        lags: How many bins back, one for each row of the basis.
        basis: `(lag, function)`.
        rows: Bins to look back from; none may reach before the series' start.
    """
    return np.ascontiguousarray((series[rows[:, None] - lags] @ basis).T)


def pairs(neurons: int) -> tuple[np.ndarray, np.ndarray]:
    """Sources and targets of the coupling filters, `(pair,)` each, with the targets of one source together."""
    sources, targets = np.nonzero(~np.eye(neurons, dtype=bool))
    return sources, targets


def design_from(data: Dataset, filters: Filters) -> Dataset:
    """The covariates of `poisson_glm` in place of a dataset's stimulus and counts.

    Bins whose window reaches before the recording are left out, and serve as history of the others. Coords are
    added for lags (milliseconds), situations, pairs of neurons and, where they have no names, neurons.

    Raises:
        ValueError: The recording is shorter than the filters, or its bins are too wide for their bumps.
    """
    bin_seconds = data.static["bin_seconds"]
    stimulus, counts = data.arrays["stimulus"], data.arrays["counts"]
    filters.check_length(len(stimulus), bin_seconds)
    stimulus_lags, history_lags = filters.stimulus_lags(bin_seconds), filters.history_lags(bin_seconds)
    stimulus_basis = raised_cosines(stimulus_lags, filters.stimulus_functions)
    history_basis = raised_cosines(history_lags, filters.history_functions)
    rows = np.arange(filters.reach(bin_seconds), len(stimulus))
    covariates = [filtered(stimulus, stimulus_lags, stimulus_basis, rows)]
    covariates += [filtered(source, history_lags, history_basis, rows) for source in counts.T]
    heard, felt = reported(stimulus_lags), reported(history_lags)
    situation_names, situations = _situations(stimulus_basis, history_basis, bin_seconds)
    arrays = {
        "design": np.concatenate(covariates),
        "stimulus_basis": stimulus_basis[heard],
        "history_basis": history_basis[felt],
        "situations": situations,
        "counts": counts[rows],
    }
    coords = {
        "stimulus_lag_ms": _milliseconds(stimulus_lags[heard], bin_seconds),
        "history_lag_ms": _milliseconds(history_lags[felt], bin_seconds),
        "situation": situation_names,
        **_neuron_coords(data, counts.shape[1]),
    }
    return replace(data, arrays=arrays, coords=coords)


def _situations(
    stimulus_basis: np.ndarray, history_basis: np.ndarray, bin_seconds: float
) -> tuple[np.ndarray, np.ndarray]:
    """Names `(situation,)` and own covariates `(situation, function)`: a steady stimulus, with a spike or without."""
    after = len(history_basis) // 4
    spike = history_basis[after - 1]
    level, silence = stimulus_basis.sum(axis=0), np.zeros_like(spike)
    ago = f"{1e3 * after * bin_seconds:g} ms after a spike"
    rows = {
        "-1 sd": (-level, silence),
        "+1 sd": (level, silence),
        f"-1 sd {ago}": (-level, spike),
        f"+1 sd {ago}": (level, spike),
    }
    return np.array(list(rows)), np.array([np.concatenate(parts) for parts in rows.values()])


def _milliseconds(lags: np.ndarray, bin_seconds: float) -> np.ndarray:
    """Lags in milliseconds, as integers where they all are."""
    values = np.round(1e3 * bin_seconds * lags, 6)
    return values.astype(int) if (values == np.round(values)).all() else values


def _neuron_coords(data: Dataset, neurons: int) -> dict[str, np.ndarray]:
    names = data.coords.get("neuron", np.array([f"neuron{n + 1}" for n in range(neurons)]))
    if len(names) != neurons:
        raise ValueError(f"Expected {neurons} neuron names, one for each column of counts; got {len(names)}.")
    coords = {"neuron": names}
    if neurons > 1:
        coords["pair"] = np.array([f"{names[m]} to {names[n]}" for m, n in zip(*pairs(neurons), strict=True)])
    return coords


def low_pass_noise(noise: np.ndarray, cutoff_hz: float, bin_seconds: float) -> np.ndarray:
    """The part of white noise `(bin,)` below a cut-off frequency, shifted and scaled to mean 0 and sd 1."""
    spectrum = np.fft.rfft(noise)
    spectrum[np.fft.rfftfreq(len(noise), bin_seconds) > cutoff_hz] = 0
    kept = np.fft.irfft(spectrum, len(noise))
    return (kept - kept.mean()) / kept.std()
