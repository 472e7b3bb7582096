"""What leave-one-out with a guide's own draws would say of its predictions, beside what these lose.

A guide's draws with weights 1 / p(y_i | z) stand for q(z) / p(y_i | z), which need not be a distribution. The table has
the difference from NUTS's leave-one-out that this gives, and the loss by the predictive distributions themselves.

    python benchmarks/left_out.py [--out left_out.csv] [MODEL ...]
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import pandas as pd

import models
import toolkit
from toolkit.comparison.leave_one_out import leave_one_out
from toolkit.modelling.observations import log_likelihoods, observed
from toolkit.sampling.evidence import latents

MODELS = ("collinear_logistic", "hierarchical_regression", "conjugate_regression", "poisson_glm")


def rows(name: str) -> list[dict[str, object]]:
    """One row for each guide of a curated model."""
    model = models.load(name).model()
    begun = time.perf_counter()
    study = toolkit.study(model)
    seconds = time.perf_counter() - begun
    chosen = {site: np.arange(found.units) for site, found in observed(model).items()}
    shape = next(iter(study.reference.draws.values())).shape[:2]
    of_reference = leave_one_out(log_likelihoods(model, latents(study.reference), chosen), shape)
    scores = study.comparison.predictions.scores.set_index("source")
    found = []
    for guide, drawn in study.comparison.gaps.drawn.items():
        own = leave_one_out(log_likelihoods(model, drawn, chosen), (len(next(iter(drawn.values()))),))
        each = own.elpd - of_reference.elpd
        found.append(
            {
                "model": name,
                "guide": guide,
                "observations": each.size,
                "left_out_difference": float(each.sum()),
                "data_se": float(np.sqrt(each.size) * each.std()),
                "unreliable": int(own.unreliable.sum()),
                "loss": scores.loc[guide, "loss"],
                "loss_se": scores.loc[guide, "loss_se"],
                "study_seconds": seconds,
            }
        )
    return found


def main() -> None:
    """Print the table, and write it where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--out")
    given = parser.parse_args()
    table = pd.DataFrame([row for name in given.models for row in rows(name)])
    print(table.round(3).to_string(index=False))
    if given.out:
        table.to_csv(given.out, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
