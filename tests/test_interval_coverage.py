"""The 95 % interval of each reported error covers the exact error at its nominal rate, over 200 seeds of NUTS."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from scipy.stats import norm
from targets import divergence

import models
from toolkit import Model, compare, fit, reference
from toolkit.comparison.verdicts import Z, interval
from toolkit.modelling.space import latent_space
from toolkit.variational.autoguides import gaussian_form

REGRESSION = models.load("conjugate_regression")
SEEDS = 200
EXACT_METRICS = ("shift", "sd_ratio", "coverage_50", "coverage_90", "wasserstein_1")


def exactly(model: Model, member: Any) -> dict[str, np.ndarray]:
    """Each metric of each coefficient, of two Gaussians; and of both KLs."""
    posterior = REGRESSION.Posterior(model.arrays["x"], model.arrays["y"], "known", 0.1)
    covariance = 0.1**2 * np.linalg.inv(posterior.precision)
    sd_p, sd_q = np.sqrt(np.diag(covariance)), np.sqrt(np.diag(member.covariance()))
    shift, ratio = (member.loc - posterior.mean) / sd_p, sd_q / sd_p
    levels = norm.ppf((np.arange(200_000) + 0.5) / 200_000)
    own = np.linalg.inv(member.covariance())
    apart = member.loc - posterior.mean
    volumes = np.linalg.slogdet(member.covariance())[1] - np.linalg.slogdet(covariance)[1]
    return {
        "shift": shift,
        "sd_ratio": ratio,
        **{
            f"coverage_{mass}": np.diff(
                norm.cdf([shift + ratio * norm.ppf(0.5 + side * mass / 200) for side in (-1, 1)]), axis=0
            )[0]
            for mass in (50, 90)
        },
        "wasserstein_1": np.array(
            [np.abs(levels - (s + r * levels)).mean() for s, r in zip(shift, ratio, strict=True)]
        ),
        "kl_qp": np.array([divergence(member, posterior.mean, posterior.precision / 0.1**2)]),
        "kl_pq": np.array([0.5 * (np.trace(own @ covariance) - len(shift) + apart @ own @ apart + volumes)]),
    }


@pytest.mark.slow
def test_intervals_cover_the_exact_errors_at_their_nominal_rate() -> None:
    data = REGRESSION.simulate(jax.random.key(3), rows=20, features=3, correlation=0.8, noise="known")
    known = REGRESSION.model(data, noise="known")
    blind = replace(known, exact=None, log_evidence=None)
    fitted = fit(blind, "mean_field", key=jax.random.PRNGKey(0))
    form = gaussian_form(fitted.autoguide, latent_space(blind))
    assert form is not None
    exact = exactly(blind, form.member(fitted.params))
    inside: dict[str, list[np.ndarray]] = {name: [] for name in exact}
    for seed in range(SEEDS):
        key = jax.random.PRNGKey(seed)
        drawn = reference(blind, key=key, chains=4, warmup=300, draws=500)
        if not drawn.status.ok:
            continue  # nothing is judged by it
        # The ELBO is measured anew as well: its error is one of those that KL(q || p) has.
        weights = fitted.log_weights(jax.random.fold_in(key, 1), 4_096)
        elbo = type(fitted.elbo).of_mean(weights)  # type: ignore[union-attr]
        again = replace(fitted, elbo=elbo, fresh_log_weights=weights)
        found = compare(blind, drawn, [again], key=key)
        for metric in EXACT_METRICS:
            rows = found.table[found.table["metric"] == metric]
            ends = [
                interval(value, se, log=metric == "sd_ratio")
                for value, se in zip(rows["value"], rows["se"], strict=True)
            ]
            low, high = np.array(ends).T
            inside[metric].append((low <= exact[metric]) & (exact[metric] <= high))
        row = found.gaps.table.iloc[0]
        for name in ("kl_qp", "kl_pq"):
            inside[name].append(np.abs(row[name] - exact[name]) <= Z * row[f"{name}_se"])
    report: dict[str, tuple[float, int]] = {}
    for name, found_inside in inside.items():
        rows = np.array(found_inside, dtype=float)
        assert len(rows) > 0.9 * SEEDS
        # The rate's own error over seeds; the quantities of one seed are not independent.
        rate = rows.mean()
        error = max(rows.mean(axis=1).std(ddof=1), math.sqrt(0.95 * 0.05 / rows.shape[1])) / math.sqrt(len(rows))
        report[name] = (round(float(rate), 3), rows.size)
        # An error of an error is allowed for: with a few hundred effective draws it is a twentieth or so.
        assert 0.95 - 5 * error - 0.015 < rate, name
        assert rate < 0.95 + 5 * error + 0.015 or name == "wasserstein_1", name  # which counts what noise adds
    sys.stdout.write(f"{report}\n")
