"""Write population.csv and population_tuning.csv from pynapple's session: `python models/data/make_population.py`.

Needs h5py, SciPy and pip, which downloads the source distribution of pynapple 0.6.6 (95 MB) unless `--sdist` names it.
Its test data hold the session A2929-200711 of the Peyrache laboratory: one mouse, ten minutes of sleep and ten of
running in an open field, spikes of units of the anterodorsal thalamic nucleus (ADN) and of the hippocampus (CA1), and
the direction of the head.

What is done: of the time awake, in bins of 0.25 s, the 60 s are taken in which the head's directions are spread most
evenly. Counts of all other bins say by Poisson regression on the direction's cosine and sine how each unit is tuned.
Units with fewer than 50 spikes in the 60 s are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from scipy.optimize import minimize

VERSION = "0.6.6"
SHA256 = "9d12d00bfc702faccedfcf42f2716a7429cf04041e30ef276c3965dd45af510c"
MEMBER = f"pynapple-{VERSION}/tests/nwbfilestest/neurosuite/pynapplenwb/A2929-200711.nwb"
BIN, BINS, STRIDE = 0.25, 240, 20  # seconds, bins of the extract, bins between the extracts that are tried
SECTORS = 24
LEAST_SPIKES = 50
HERE = Path(__file__).parent


def main() -> None:
    """Write the two files beside this script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sdist", type=Path, help="the source distribution, if it is here already")
    given = parser.parse_args().sdist
    with tempfile.TemporaryDirectory() as folder:
        starts, counts, angle, names = _binned(given or _downloaded(Path(folder)))
    begin = max(range(0, len(counts) - BINS, STRIDE), key=lambda first: _evenness(angle[first : first + BINS]))
    inside = np.zeros(len(counts), dtype=bool)
    inside[begin : begin + BINS] = True
    kept = counts[inside].sum(0) >= LEAST_SPIKES
    outside = ~inside & np.isfinite(angle)
    tuning = [_tuned(row, angle[outside]) for row in counts[outside][:, kept].T]
    names = [name for name, keep in zip(names, kept, strict=True) if keep]
    table = pd.DataFrame({"start": starts[inside], "direction": angle[inside].round(4)})
    counted = pd.DataFrame(counts[inside][:, kept], columns=names)
    pd.concat([table, counted], axis=1).to_csv(HERE / "population.csv", index=False)
    columns = ["baseline", "cosine", "sine"]
    pd.DataFrame(np.round(tuning, 4), columns=columns).assign(neuron=names)[["neuron", *columns]].to_csv(
        HERE / "population_tuning.csv", index=False
    )


def _downloaded(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*command, "--dest", str(folder), f"pynapple=={VERSION}"], check=True)
    return folder / f"pynapple-{VERSION}.tar.gz"


def _binned(sdist: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Starts of the bins awake, counts (bin, unit), the head's mean direction (NaN where not tracked), unit names."""
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"Expected {sdist.name} with sha256 {SHA256}; got {digest}.")
    with tarfile.open(sdist) as archive:
        member = archive.extractfile(MEMBER)
        content = member.read() if member else b""
    with h5py.File(io.BytesIO(content)) as session:
        units, compass = session["units"], session["acquisition/CompassDirection/ry"]
        trains = np.split(units["spike_times"][()], units["spike_times_index"][()][:-1].astype(int))
        names = [f"{place.decode()} {number}" for number, place in enumerate(units["location"][()])]
        times, angles = compass["timestamps"][()], compass["data"][()]
        support = session["intervals/position_time_support"]
        start, stop = (float(support[name][0]) for name in ("start_time", "stop_time"))
    start = float(np.ceil(start))
    edges = start + BIN * np.arange(int((stop - start) / BIN) + 1)
    counts = np.stack([np.histogram(train, edges)[0] for train in trains], axis=1)
    where = np.digitize(times, edges) - 1
    tracked = (where >= 0) & (where < len(edges) - 1)
    mean = np.zeros(len(edges) - 1, complex)
    np.add.at(mean, where[tracked], np.exp(1j * angles[tracked]))
    return edges[:-1], counts, np.where(mean == 0, np.nan, np.mod(np.angle(mean), 2 * np.pi)), names


def _evenness(angle: np.ndarray) -> float:
    """The entropy of the directions in sectors, in nats."""
    share = np.histogram(angle, np.linspace(0, 2 * np.pi, SECTORS + 1))[0] / len(angle)
    return float(-(share[share > 0] * np.log(share[share > 0])).sum())


def _tuned(counts: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Baseline (log spikes a bin) and the coefficients of cosine and sine, by maximum likelihood."""
    x = np.column_stack([np.ones(len(angle)), np.cos(angle), np.sin(angle)])

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        rate = np.exp(x @ weights)
        return float((rate - counts * (x @ weights)).sum()), x.T @ (rate - counts)

    begin = np.array([np.log(counts.mean()), 0.0, 0.0])
    return minimize(loss, begin, jac=True, method="BFGS").x


if __name__ == "__main__":
    main()
