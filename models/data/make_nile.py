"""Write nile.csv from statsmodels' copy: `python models/data/make_nile.py`.

Needs the extra `elbowroom[data]`. Values and order of rows are the source's; whole numbers are written as such.
"""

from __future__ import annotations

from pathlib import Path

TARGET = Path(__file__).with_name("nile.csv")


def main() -> None:
    """Write the file beside this script."""
    from statsmodels.datasets import nile

    nile.load_pandas().data.astype(int).to_csv(TARGET, index=False)


if __name__ == "__main__":
    main()
