"""The benchmark of certificates: how a fit's true ELBO is measured, and how its table is summed up."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import certificates
import jax
import numpy as np
import pandas as pd
import posteriors
import pytest
from targets import SCALES, pair

from toolkit import Fit, Status, fit
from toolkit.variational.starts import find_starts

CORRELATION = 0.9


@pytest.fixture(scope="module")
def fitted() -> Fit:
    return fit(pair(CORRELATION), "mean_field", key=jax.random.PRNGKey(0))


DISPLACED = {"as fitted": (0.0, 1.0), "shifted": (0.7, 1.0), "too wide": (0.0, 1.5), "both": (-0.4, 0.6)}


@pytest.mark.parametrize("case", DISPLACED)
def test_the_elbo_of_a_displaced_member_is_its_closed_form(case: str, fitted: Fit) -> None:
    """The target is normalised, so that the ELBO is -KL(q || p) of two Gaussians."""
    shift, times = DISPLACED[case]
    loc = fitted.params["z_auto_loc"] + shift * SCALES
    scale = fitted.params["z_auto_scale"] * times
    moved = replace(fitted, params={"z_auto_loc": loc, "z_auto_scale": scale})
    arrays = fitted.model.arrays
    apart, precision = np.asarray(loc) - arrays["loc"], np.asarray(arrays["precision"])
    spread = (np.diag(precision) * np.asarray(scale) ** 2).sum() + apart @ precision @ apart - 2
    volumes = math.log(1 - CORRELATION**2) + 2 * np.log(SCALES).sum() - 2 * np.log(np.asarray(scale)).sum()
    elbo = certificates.measured_elbo(moved, jax.random.PRNGKey(1))
    assert abs(elbo.value + (spread + volumes) / 2) < 5 * elbo.se + 1e-9
    assert elbo.se < 0.002


@pytest.mark.usefixtures("shared_data")
@pytest.mark.parametrize("chart", ["centered", "noncentered"])
@pytest.mark.slow
def test_full_rank_gains_over_a_mean_field_what_theory_says_on_a_radon_hierarchy(chart: str) -> None:
    """On a Gaussian of precision P the gain is (sum of log P_ii - log det P) / 2; this posterior is nearly one."""
    name = f"radon_mn-radon_variable_intercept_slope_{chart}"
    model = posteriors.load(name)
    starts = find_starts(model, key=jax.random.PRNGKey(0), count=8)
    small, full = (fit(model, guide, key=jax.random.PRNGKey(0), starts=starts) for guide in ("mean_field", "full_rank"))
    assert full.status is Status.ARRIVED
    gain = full.elbo.value - small.elbo.value
    inverse = np.linalg.inv(np.asarray(full.params["auto_scale_tril"]))
    theory = 0.5 * np.log((inverse**2).sum(0)).sum() - np.log(np.diag(inverse)).sum()
    assert theory > 2.5
    assert gain == pytest.approx(theory, rel=0.25)
    long_runs = pd.read_csv(certificates.YARDSTICKS).set_index(["posterior", "guide"]).elbo
    expected = long_runs[name, "full_rank"] - long_runs[name, "mean_field"]
    assert abs(gain - expected) < 0.1 + 3 * math.hypot(full.elbo.se, small.elbo.se)


YARDSTICKS = """posterior,guide,elbo,se,newton_gap,newton_gap_se
near,mean_field,-10,0,-0.002,0.001
late,mean_field,-10,0,0.05,0.001
exact,mean_field,-10,0,,
"""


def table(*rows: tuple[str, float, float]) -> pd.DataFrame:
    found = pd.DataFrame(rows, columns=["posterior", "elbo", "limit"])
    return found.assign(guide="mean_field", dimension=2, seed=range(len(rows)), se=0.001, seconds=1.0)


@pytest.fixture
def _yardsticks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "yardsticks.csv"
    path.write_text(YARDSTICKS)
    monkeypatch.setattr(certificates, "YARDSTICKS", path)


CASES = {
    # Rows (posterior, elbo, limit), and what is said of them.
    "covered": ([("near", -10.02, 0.03)], "1 fits, 0 of them unusable", 100, 100, 100),
    "not covered": ([("near", -10.05, 0.03)], "1 fits, 0 of them unusable", 100, 100, 0),
    "too far": ([("near", -10.2, 0.3)], "1 fits, 0 of them unusable", 0, 0, 100),
    "by quadrature": ([("exact", -10.02, 0.03)], "1 fits, 0 of them unusable", 100, 100, 100),
    # 0.02 below the yardstick, which may itself be 0.05 short.
    "short yardstick": ([("late", -10.02, 0.03)], "1 fits, 0 of them unusable", 100, 100, 0),
    "unusable": ([("near", math.nan, math.nan)], "1 fits, 1 of them unusable", 0, 0, 0),
    "unusable with a limit": ([("near", -math.inf, 0.03)], "1 fits, 1 of them unusable", 0, 0, 0),
    "one of two": ([("near", -10.02, 0.03), ("near", math.nan, 0.03)], "2 fits, 1 of them unusable", 50, 50, 50),
}


@pytest.mark.usefixtures("_yardsticks")
@pytest.mark.parametrize("case", CASES)
def test_a_fit_without_a_result_is_a_miss_and_a_short_yardstick_no_excuse(case: str) -> None:
    rows, fits, limited, near, covered = CASES[case]
    (line,) = [line for line in certificates.summary(table(*rows)).splitlines() if line.startswith("d <= 50")]
    assert line == (
        f"d <= 50: {fits}; limit <= 0.1 in {limited:.1f}%; true gap <= 0.1 in {near:.1f}%; "
        f"true gap below the limit in {covered:.1f}%"
    )


@pytest.mark.usefixtures("_yardsticks")
def test_yardsticks_that_have_not_arrived_or_are_missing_are_named() -> None:
    told = certificates.summary(table(("near", -10.0, 0.1), ("late", -10.0, 0.1), ("late", -10.0, 0.1)))
    assert told.splitlines()[-1] == "yardstick not arrived: late mean_field"
    told = certificates.summary(table(("near", -10.0, 0.1), ("exact", -10.0, 0.1), ("unknown", -10.0, 0.1)))
    assert told.splitlines()[-1] == "left out: 1 fits without a yardstick"
    assert "not arrived" not in told
