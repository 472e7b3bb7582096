"""Write grunfeld.csv from statsmodels' copy: `python models/data/make_grunfeld.py`.

Needs the extra `elbowroom[data]`. Values, names and order of rows are the source's; the one change is that the year
is written as a whole number and the columns that identify a row come first.
"""

from __future__ import annotations

from pathlib import Path

TARGET = Path(__file__).with_name("grunfeld.csv")


def main() -> None:
    """Write the file beside this script."""
    from statsmodels.datasets import grunfeld

    table = grunfeld.load_pandas().data
    table["year"] = table["year"].astype(int)
    table[["firm", "year", "invest", "value", "capital"]].to_csv(TARGET, index=False)


if __name__ == "__main__":
    main()
