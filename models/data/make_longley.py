"""Write longley.csv from statsmodels' copy: `python models/data/make_longley.py`.

Needs the extra `elbowroom[data]`. Values and order of rows are the source's; the columns get names that can be read,
and numbers that are whole are written as such.
"""

from __future__ import annotations

from pathlib import Path

TARGET = Path(__file__).with_name("longley.csv")
NAMES = {
    "YEAR": "year",
    "TOTEMP": "employed",
    "GNPDEFL": "price index",
    "GNP": "national product",
    "UNEMP": "unemployed",
    "ARMED": "armed forces",
    "POP": "population",
}


def main() -> None:
    """Write the file beside this script."""
    from statsmodels.datasets import longley

    table = longley.load_pandas().data.rename(columns=NAMES)[list(NAMES.values())]
    whole = [name for name in table if name != "price index"]
    table[whole] = table[whole].astype(int)
    table.to_csv(TARGET, index=False)


if __name__ == "__main__":
    main()
