"""Write the two grasshopper recordings in bins of 1 ms: `python models/data/make_grasshopper.py`.

Needs the extra `elbowroom[data]`. The source has the sound's amplitude every 50 us and the times of the spikes in
us, over 10 s. Here each bin has the mean level (20 log10 of the amplitude, in dB) of its 20 samples and its number
of spikes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

FILES = {"slow": 1, "fast": 2}
BINS = 10_000
BIN_MICROSECONDS = 1_000


def binned(amplitude: np.ndarray, spike_times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean level in dB and number of spikes, both `(bin,)`, of a recording that fills `BINS` bins.

    Args:
        amplitude: The sound's amplitude, evenly sampled over the whole recording.
        spike_times: In microseconds from the recording's start.
    """
    level = 20 * np.log10(amplitude.reshape(BINS, -1)).mean(axis=1)
    counts, _ = np.histogram(spike_times, bins=np.arange(BINS + 1) * BIN_MICROSECONDS)
    return level.astype(np.float32), counts.astype(np.uint8)


def main() -> None:
    """Write grasshopper_slow.npz and grasshopper_fast.npz beside this script."""
    import nitime

    source = Path(nitime.__file__).parent / "data"
    for name, number in FILES.items():
        amplitude = np.loadtxt(source / f"grasshopper_stimulus{number}.txt")[:, 1]
        level, counts = binned(amplitude, np.loadtxt(source / f"grasshopper_spike_times{number}.txt"))
        target = Path(__file__).with_name(f"grasshopper_{name}.npz")
        np.savez_compressed(target, level_db=level, counts=counts)


if __name__ == "__main__":
    main()
