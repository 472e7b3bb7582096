"""Write breast_cancer.csv from scikit-learn's copy: `python models/data/make_breast_cancer.py`.

Needs the extra `elbowroom[data]`. Values are written as they are in the source, whose text has at most seven
significant digits. The one change: scikit-learn codes malignant as 0 and benign as 1; here a column `malignant`
is 1 for malignant.
"""

from __future__ import annotations

from pathlib import Path

TARGET = Path(__file__).with_name("breast_cancer.csv")


def main() -> None:
    """Write the file beside this script."""
    from sklearn.datasets import load_breast_cancer

    source = load_breast_cancer(as_frame=True)
    table = source.data.copy()
    table.insert(0, "malignant", (source.target == list(source.target_names).index("malignant")).astype(int))
    table.to_csv(TARGET, index=False)


if __name__ == "__main__":
    main()
