"""Write digits.npz from scikit-learn's copy: `python models/data/make_digits.py`.

Needs the extra `elbowroom[data]`. Values and order are the source's; pixels, whole numbers from 0 to 16, are kept as
bytes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

TARGET = Path(__file__).with_name("digits.npz")


def main() -> None:
    """Write the file beside this script."""
    from sklearn.datasets import load_digits

    source = load_digits()
    images = source.data.astype(np.uint8)
    assert (images == source.data).all()
    np.savez_compressed(TARGET, images=images, digits=source.target.astype(np.uint8))


if __name__ == "__main__":
    main()
