"""The pure parts of the benchmark that puts solvers side by side."""

from __future__ import annotations

import csv
import importlib.util
import math
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import autoguide
from targets import line, pair

from toolkit import Dataset, Model, fit

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import hierarchy_optimum  # noqa: E402
import posteriors  # noqa: E402
import solvers  # noqa: E402
import targets_large  # noqa: E402
from competitors import GRID, SOLVERS, blackjax_vi, cells, pymc_programs, pymc_vi, results  # noqa: E402
from competitors.gaussians import Elbo, Gaussian, Space, measurer  # noqa: E402
from competitors.numpyro_svi import guide_gaussian  # noqa: E402
from competitors.results import Ratio, Seconds, completed, geometric_mean, grid_best, is_finished, summarise  # noqa: E402
from competitors.runs import Clock, Problem, Run, Snapshot, Solver, checkpoints, run_blocks  # noqa: E402


def row(solver: str, seconds: str, **given: str) -> results.Row:
    cell = {"posterior": "line", "guide": "mean_field", "solver": solver, "run": "cold", "status": "done"}
    return {**dict.fromkeys(results.COLUMNS, ""), **cell, "seconds": seconds, "limit": "600", **given}


# The ELBO of a Gaussian


def closed_form(gaussian: Gaussian, loc: np.ndarray, covariance: np.ndarray) -> float:
    """-KL(q || p) of two Gaussians, which is the ELBO where log p is normalised."""
    own = gaussian.factor @ gaussian.factor.T
    precision = np.linalg.inv(covariance)
    apart = gaussian.loc - loc
    trace = np.trace(precision @ own) + apart @ precision @ apart - len(loc)
    return -0.5 * (trace + np.linalg.slogdet(covariance)[1] - 2 * gaussian.log_determinant)


def test_elbo_of_a_gaussian_pair_is_its_closed_form() -> None:
    model = pair(0.9)
    space = Space.of_model(model)
    loc = model.arrays["loc"]
    covariance = np.linalg.inv(model.arrays["precision"])
    sds = np.sqrt(np.diag(covariance))
    measure = measurer(model, space, draws=50_000)
    cases = {
        "mean field's best": Gaussian.of_scales(loc, sds * math.sqrt(1 - 0.9**2)),
        "the posterior's own sds": Gaussian.of_scales(loc, sds),
        "beside it": Gaussian.of_scales(loc + 0.3 * sds, 0.5 * sds),
        "another correlation": Gaussian.of_covariance(loc, covariance * np.array([[1, 0.5], [0.5, 1]])),
    }
    for name, gaussian in cases.items():
        elbo = measure(gaussian)
        assert abs(elbo.value - closed_form(gaussian, loc, covariance)) < 5 * elbo.se, name
        assert elbo.se < 0.05, name


def test_elbo_of_the_posterior_itself_has_no_error_and_few_draws() -> None:
    model = pair(0.9)
    elbo = measurer(model, Space.of_model(model))(
        Gaussian.of_covariance(model.arrays["loc"], np.linalg.inv(model.arrays["precision"]))
    )
    assert elbo.value == pytest.approx(0, abs=1e-6)
    assert elbo.draws == 20_000


def scalar(log_density: Callable[[jax.Array], jax.Array]) -> Model:
    """One real site with that log density."""

    def program(unit):
        z = numpyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
        numpyro.factor("density", log_density(unit * z))

    return Model(program, Dataset("scalar", {"unit": np.array(1.0)}))


def test_an_elbo_loses_noise_and_gains_no_bias_by_its_quadratic() -> None:
    """On z - exp(z), whose mean is known; the plain mean's error comes from draws made here."""
    model, sd = scalar(lambda z: z - jax.numpy.exp(z)), 0.5
    elbo = measurer(model, Space.of_model(model), draws=20_000)(Gaussian.of_scales([0.0], [sd]))
    exact = -math.exp(sd**2 / 2) + 0.5 * math.log(2 * math.pi * math.e * sd**2)
    noise = np.random.default_rng(0).standard_normal(20_000)
    plain = sd * noise - np.exp(sd * noise) + noise**2 / 2
    assert elbo.draws == 20_000
    assert abs(elbo.value - exact) < 5 * elbo.se
    # What is left of the terms' sd is that of the exponential's Hermite terms from the third on: 0.06 of 0.51.
    assert elbo.se < plain.std() / math.sqrt(20_000) / 4


def test_a_quadratic_that_would_add_noise_is_not_taken_out() -> None:
    """Gradients of 10,000 times a cosine say nothing of a wave ten nats high."""
    model = scalar(lambda z: 10 * jax.numpy.sin(1_000 * z))
    elbo = measurer(model, Space.of_model(model), draws=20_000)(Gaussian.of_scales([0.0], [1.0]))
    assert abs(elbo.value - 0.5 * math.log(2 * math.pi * math.e)) < 5 * elbo.se
    assert elbo.se == pytest.approx(math.sqrt(10**2 / 2 + 1 / 2) / math.sqrt(20_000), rel=0.05)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_parameters_that_ran_away_have_an_elbo_of_minus_infinity(broken: float) -> None:
    model = line()
    gaussian = Gaussian.of_scales(np.array([0.0, broken]), np.ones(2))
    assert measurer(model, Space.of_model(model))(gaussian).value == -math.inf


def test_mass_outside_the_density_is_an_elbo_of_minus_infinity() -> None:
    def edge(y=None):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.factor("wall", jax.numpy.where(z < 3, 0.0, -jax.numpy.inf))
        numpyro.sample("y", dist.Normal(z, 1), obs=y)

    model = Model(edge, Dataset("one", {"y": np.array(0.0)}))
    space = Space.of_model(model)
    assert measurer(model, space)(Gaussian.of_scales(np.zeros(1), np.ones(1))).value == -math.inf
    assert measurer(model, space)(Gaussian.of_scales(np.zeros(1), np.full(1, 0.1))).value > -math.inf


# What solvers hand over


def two_sites(y=None):
    """Sites whose alphabetical order is not the program's, one of them positive, one a vector."""
    scale = numpyro.sample("scale", dist.HalfNormal(2.0))
    with numpyro.plate("group", 3):
        effect = numpyro.sample("effect", dist.Normal(0, 1))
    with numpyro.plate("row", 3):
        numpyro.sample("y", dist.Normal(effect, scale), obs=y)


@pytest.fixture(scope="module")
def grouped() -> Model:
    return Model(two_sites, Dataset("grouped", {"y": np.array([0.5, -1.0, 2.0])}))


AUTOGUIDES = {
    "mean_field": autoguide.AutoNormal,
    "diagonal": autoguide.AutoDiagonalNormal,
    "low_rank": autoguide.AutoLowRankMultivariateNormal,
    "full_rank": autoguide.AutoMultivariateNormal,
}


@pytest.mark.parametrize("name", AUTOGUIDES)
def test_an_autoguide_draws_from_the_gaussian_that_is_measured(name: str, grouped: Model) -> None:
    guide = AUTOGUIDES[name](grouped.bound())
    svi = numpyro.infer.SVI(grouped.bound(), guide, numpyro.optim.Adam(0.1), numpyro.infer.Trace_ELBO())
    begun = svi.optim.get_params(svi.init(jax.random.PRNGKey(0), **grouped.arrays).optim_state)
    noise = np.random.default_rng(0)
    params = svi.constrain_fn({name: value + noise.normal(size=value.shape) for name, value in begun.items()})
    gaussian = guide_gaussian(guide, params, Space.of_model(grouped))
    keys = jax.random.split(jax.random.PRNGKey(1), 40_000)
    draws = jax.vmap(lambda key: guide.sample_posterior(key, params))(keys)
    stacked = np.column_stack([np.log(draws["scale"]), draws["effect"]])
    sds = np.linalg.norm(gaussian.factor, axis=1)
    covariance = gaussian.factor @ gaussian.factor.T
    assert np.allclose((stacked.mean(axis=0) - gaussian.loc) / sds, 0, atol=5 / 200)
    assert np.allclose((np.cov(stacked.T) - covariance) / np.outer(sds, sds), 0, atol=5 * math.sqrt(2) / 200)
    assert gaussian.log_determinant == pytest.approx(0.5 * np.linalg.slogdet(covariance)[1])


def test_a_fit_and_its_measure_agree() -> None:
    fitted = fit(line(), "mean_field", key=jax.random.PRNGKey(0), tolerance=0.1)
    space = Space.of_model(fitted.model)
    elbo = measurer(fitted.model, space)(guide_gaussian(fitted.autoguide, fitted.params, space))
    assert abs(elbo.value - fitted.elbo.value) < 5 * math.hypot(elbo.se, fitted.elbo.se) + 1e-6


def test_a_guide_that_is_no_gaussian_is_refused(grouped: Model) -> None:
    guide = autoguide.AutoIAFNormal(grouped.bound())
    with pytest.raises(ValueError, match="Expected a Gaussian autoguide; got AutoIAFNormal"):
        guide_gaussian(guide, {"auto_loc": np.zeros(4)}, Space.of_model(grouped))


def test_sites_in_another_order_are_put_in_the_models(grouped: Model) -> None:
    space = Space.of_model(grouped)
    assert space.names == ("scale", "effect")
    order = space.order([("effect", 3), ("scale", 1)])
    moved = Gaussian.of_factor(np.array([1.0, 2.0, 3.0, 4.0]), np.tril(np.arange(1.0, 17).reshape(4, 4)))
    own = moved.reordered(order)
    assert own.loc.tolist() == [4, 1, 2, 3]
    whole = moved.factor @ moved.factor.T
    assert np.allclose(own.factor @ own.factor.T, whole[np.ix_(order, order)])
    with pytest.raises(ValueError, match="Expected the sites"):
        space.order([("effect", 4), ("scale", 1)])


def test_blackjax_keeps_its_factor_row_by_row() -> None:
    state = SimpleNamespace(mu=np.zeros(3), chol_params=np.array([0.0, math.log(2), math.log(3), 4, 5, 6]))
    assert np.allclose(blackjax_vi.unpacked(state), [[1, 0, 0], [4, 2, 0], [5, 6, 3]])


def test_a_singular_covariance_is_no_gaussian() -> None:
    with pytest.raises(np.linalg.LinAlgError):
        Gaussian.of_covariance(np.zeros(2), np.ones((2, 2)))


def test_blocks_stop_at_the_limit_and_keep_where_they_were() -> None:
    def gaussian(state: int) -> Gaussian:
        return Gaussian.of_scales(np.array([float(state)]), np.ones(1))

    whole = run_blocks(lambda s: s + 10, 0, gaussian, Clock(60), block=10, steps=100, draws=2)
    assert [(s.steps, s.gaussian.loc[0]) for s in whole.snapshots] == [
        (10, 10),
        (20, 20),
        (40, 40),
        (80, 80),
        (100, 100),
    ]
    assert (whole.gradient_evaluations, whole.cut) == (200, False)
    clock = Clock(60)
    cut = run_blocks(lambda s: setattr(clock, "limit", 0.0) or s + 10, 0, gaussian, clock, block=10, steps=100, draws=2)
    assert [s.steps for s in cut.snapshots] == [10]
    assert cut.cut


def test_checkpoints_double_and_end_at_the_budget() -> None:
    assert checkpoints(1_000, 10_000) == (1_000, 2_000, 4_000, 8_000, 10_000)
    assert checkpoints(1_000, 8_000) == (1_000, 2_000, 4_000, 8_000)
    assert checkpoints(10, 10) == (10,)
    with pytest.raises(ValueError, match="whole number of blocks"):
        checkpoints(1_000, 1_500)


# Rows


def test_a_row_is_completed_from_its_yardstick() -> None:
    path = "1000:2.5:-12.0 2000:4.5:-10.08 4000:8.5:-10.05"
    found = completed(row("numpyro_grid_0.1", "8.5", elbo="-10.05", path=path), {("line", "mean_field"): -10.0})
    assert (found["optimum"], found["nats"], found["seconds_to_target"]) == ("-10.0000", "0.0500", "4.361")
    short = completed(row("numpyro_2000", "8.5", elbo="-12", path="2000:8.5:-12"), {("line", "mean_field"): -10.0})
    assert (short["nats"], short["seconds_to_target"]) == ("2.0000", ">8.5")
    unknown = completed(short, {})
    assert (unknown["optimum"], unknown["nats"], unknown["seconds_to_target"]) == ("", "", "")
    over = completed(row("pymc_advi", ">600"), {("line", "mean_field"): -10.0})
    assert (over["nats"], over["seconds_to_target"]) == ("", ">600")


REACHES = {
    "no error": (0.0, 0.1),
    "three errors more": (0.01, 0.13),
    "no more than the target again": (0.04, 0.2),
    "a huge error": (50.0, 0.2),
    "an infinite error": (math.inf, 0.1),
    "no error known": (math.nan, 0.1),
}


@pytest.mark.parametrize("case", REACHES)
def test_an_error_helps_an_arrival_up_to_a_cap(case: str) -> None:
    se, reach = REACHES[case]
    assert results.reach(se) == pytest.approx(reach)
    assert results.has_arrived(reach - 1e-6, se)
    assert not results.has_arrived(reach + 1e-6, se)
    assert not results.has_arrived(math.nan, se)


# Paths to an optimum of -10: where the arrival lies between two looks is the crossing of a straight line in the
# logarithm of the distance.
ARRIVALS = {
    "between two looks": ("1000:2:-12 2000:4:-10.05", "0", f"{2 + 2 * math.log(20) / math.log(40):.4g}"),
    "a look beyond the optimum counts as 0.01 from it": ("1000:2:-11 2000:4:-9.9", "0", "3"),
    "at the first look": ("1000:2:-10.05 2000:4:-10", "0", "2"),
    "from no density": ("1000:2:-inf 2000:4:-10.05", "0", "4"),
    "within its error": ("1000:2:-11 2000:4:-10.15", "0.02", f"{2 + 2 * math.log(0.16) / math.log(0.15):.4g}"),
    "never": ("1000:2:-11 2000:4:-10.5", "0", ">4"),
    "never, with a large error": ("1000:2:-11 2000:4:-10.5", "50", ">4"),
    "never, with no error": ("1000:2:-10.15 2000:4:-inf", "nan", ">4"),
    "never, from a table without errors": ("1000:2:-11 2000:4:-10.15", "", ">4"),
}


@pytest.mark.parametrize("case", ARRIVALS)
def test_a_path_arrives_between_looks(case: str) -> None:
    path, se, seconds = ARRIVALS[case]
    found = completed(row("numpyro_grid_0.1", "4", se=se, path=path), {("line", "mean_field"): -10.0})
    assert found["seconds_to_target"] == seconds


@pytest.mark.parametrize("nats", [0.05, 0.12, 0.14, 0.19, 0.21])
@pytest.mark.parametrize("se", ["0", "0.01", "0.02", "50", "nan", ""])
def test_elbowroom_arrives_where_a_competitor_would(nats: float, se: str) -> None:
    given = {"elbo": f"{-10 - nats}", "se": se, "path": f"0:1:{-10 - nats}"}
    optima = {("line", "mean_field"): -10.0}
    ours, theirs = (completed(row(name, "1", **given), optima) for name in ("elbowroom", results.GRID_BEST))
    reason, ratio = results.ratio_of(theirs, ours, "seconds_to_target")
    assert (ratio is None) == theirs["seconds_to_target"].startswith(">")
    assert reason == ("where elbowroom did not arrive" if ratio is None else "")


def test_a_table_from_before_a_column_was_there_is_read_and_completed(tmp_path: Path) -> None:
    path, columns = tmp_path / "solvers.csv", [column for column in results.COLUMNS if column != "draws"]
    old = row("numpyro_grid_0.1", "4", elbo="-10.05", se="0.01", path="1000:2:-12 2000:4:-10.05")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerow(old)
    found = [completed(one, {("line", "mean_field"): -10.0}) for one in results.read_rows(path)]
    assert (found[0]["draws"], found[0]["nats"]) == ("", "0.0500")
    assert not found[0]["seconds_to_target"].startswith(">")
    results.write_rows(path, found)
    assert results.read_rows(path) == found


def test_a_row_says_how_many_draws_are_behind_its_elbo() -> None:
    gaussian = Gaussian.of_scales([0.0], [1.0])
    elbos = iter([Elbo(-2.0, 0.01, 20_000), Elbo(-1.0, 0.02, 30_000)])
    outcome = Run((Snapshot(10, 0.5, gaussian), Snapshot(20, 1.0, gaussian)), 20)
    found = cells.measured(None, outcome, 1.0, None, measure=lambda _: next(elbos))
    assert (found["elbo"], found["se"], found["draws"]) == (-1.0, 0.02, 30_000)
    assert found["path"] == "10:0.5:-2.0000 20:1.0:-1.0000"
    assert not set(found) - set(results.COLUMNS)


def members(*times: str, elbos: tuple[str, ...]) -> list[results.Row]:
    return [
        row(name, "20", elbo=elbo, seconds_to_target=seconds)
        for name, seconds, elbo in zip(GRID, times, elbos, strict=True)
    ]


def test_the_best_of_the_grid_arrived_first_not_highest() -> None:
    best = grid_best(members(">20", "7", "3", ">20", elbos=("-50", "-10.01", "-10.09", "-11")))
    assert (best["seconds_to_target"], best["note"], best["elbo"]) == ("3", GRID[2], "-10.09")


def test_a_grid_that_never_arrived_is_a_lower_bound_by_its_quickest_that_did_not_diverge() -> None:
    best = grid_best(members(">2", ">31", ">30", ">32", elbos=("-inf", "-11", "-12", "-13")))
    assert (best["seconds_to_target"], best["note"]) == (">30", GRID[1])


def test_the_grids_best_is_shown_once_all_members_are_there() -> None:
    rows = members(">2", ">31", "3", ">32", elbos=("-inf", "-11", "-12", "-13"))
    assert results.with_grid_best(rows[:3], GRID) == rows[:3]
    assert [r["solver"] for r in results.with_grid_best(rows, GRID)] == [*GRID, results.GRID_BEST]


def test_the_table_has_a_line_for_each_cell() -> None:
    rows = [row("numpyro_2000", "3.2"), row("elbowroom", "1.2", nats="0.034"), row("elbowroom", ">600", run="warm")]
    shown = solvers.table(rows)
    assert list(shown.index) == [("line", "mean_field", "elbowroom"), ("line", "mean_field", "numpyro_2000")]
    assert shown.loc[("line", "mean_field", "elbowroom"), ["nats", "cold", "warm"]].tolist() == ["0.03", "1.2", ">600"]


# Ratios


def test_a_geometric_mean_takes_bounds_at_their_value() -> None:
    assert geometric_mean([]) is None
    assert geometric_mean([Ratio(4.0), Ratio(9.0)]) == pytest.approx(6)
    assert geometric_mean([Ratio(2.0), Ratio(0.5), Ratio(8.0, bound=True)]) == pytest.approx(2)


def test_a_summary_counts_its_bounds_and_what_it_leaves_out() -> None:
    rows = []
    for name, ours, theirs in (("a", "2", "8"), ("b", "2", ">36"), ("c", ">600", "8"), ("d", "2", ""), ("e", "1", "")):
        rows += [row("elbowroom", ours, posterior=name), row("numpyro_20000", theirs, posterior=name)]
    rows.append(row("numpyro_20000", "1000", posterior="f"))  # without a cell of ours
    rows.append(row("numpyro_20000", "1000", posterior="a", run="warm"))
    found = summarise(rows, solver="numpyro_20000", run="cold")
    assert found.mean == pytest.approx(math.sqrt(4 * 18))
    assert (found.cells, found.bounds) == (2, 1)
    assert str(found) == (
        "numpyro_20000, seconds, cold / elbowroom, cold: >8.49 (2 cells, 1 of them lower bounds; "
        "left out: 2 without a time; left out: 1 where elbowroom ran into the limit)"
    )


def test_time_to_the_target_is_compared_only_where_elbowroom_arrived() -> None:
    near = {"optimum": "-10", "nats": "0.11", "se": "0.01"}
    far = {"optimum": "-10", "nats": "0.2", "se": "0.01"}
    rows = []
    for name, ours in (("a", near), ("b", far), ("c", {}), ("d", {"optimum": "-10"})):
        rows.append(row("elbowroom", "2", posterior=name, **ours))
        rows.append(row(results.GRID_BEST, "99", posterior=name, seconds_to_target="10"))
    found = summarise(rows, solver=results.GRID_BEST, run="cold", column="seconds_to_target")
    assert (found.mean, found.cells) == (pytest.approx(5), 1)
    assert found.left_out["where elbowroom did not arrive"] == 2
    assert found.left_out["without a yardstick"] == 1


def test_numbers_are_rounded_for_reading() -> None:
    numbers = {0.0123: "0.012", 0.5: "0.50", 3.14: "3.1", 24.68: "25", 1234.5: "1234", 0.0: "0"}
    assert {number: results.readable(number) for number in numbers} == numbers
    assert (str(Ratio(24.68)), str(Ratio(24.68, bound=True))) == ("25", ">25")


def test_ratios_are_written_a_line_for_each_posterior_and_guide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, ratios, yardsticks = (tmp_path / name for name in ("solvers.csv", "ratios.csv", "yardsticks.csv"))
    yardsticks.write_text("posterior,guide,elbo\nline,mean_field,-10\n")
    measured = {"elbo": "-9.996", "se": "0.001", "path": "0:0.5:-9.996"}
    far = {"elbo": "-11", "se": "0.001", "path": "200000:20:-11"}
    rows = [
        row("elbowroom", ">600", guide="low_rank"),
        row("elbowroom", "0.5", **measured),
        row("elbowroom", "0.0123", run="warm", **measured),
        row("numpyro_20000", "12.34"),
        row("numpyro_20000", ">6.15", run="warm"),
        row("pymc_advi", "3", day="2026-11-21"),
        *(row(name, "20", **far) for name in GRID),
        row("numpyro_20000", "7", posterior="other"),
    ]
    results.write_rows(out, rows)
    options = ["--summary", "--out", str(out), "--yardsticks", str(yardsticks), "--ratios", str(ratios)]
    monkeypatch.setattr(sys, "argv", ["solvers.py", *options])
    solvers.main()
    assert ratios.read_text().splitlines() == [
        "posterior,guide,fit cold (s),fit warm (s),nats,grid to target,20000 steps cold,20000 steps warm,ADVI cold",
        "line,mean_field,0.50,0.012,0.00,≥ 40,25,≥ 500,",
        "line,low_rank,≥ 600,,,,,,",
    ]


def test_seconds_of_two_days_are_not_divided() -> None:
    ours = row("elbowroom", "1.0", day="2026-11-28")
    rows = [ours, row("numpyro_20000", "3.0", day="2026-11-28"), row("pymc_advi", "30.0", day="2026-11-21")]
    assert summarise(rows, solver="numpyro_20000", run="cold").mean == pytest.approx(3.0)
    other = summarise(rows, solver="pymc_advi", run="cold")
    assert (other.mean, other.cells, other.left_out["of another day"]) == (None, 0, 1)


def test_seconds_are_read_as_they_are_written() -> None:
    for seconds in (Seconds(12.34), Seconds(600.0, censored=True)):
        assert Seconds.read(str(seconds)) == seconds
    assert str(Seconds(600.0, censored=True)) == ">600"
    assert Seconds.read("") is None


# Resuming


CELL = ("line", "mean_field", "elbowroom")
FINISHED = {
    "not there": ([], False),
    "done": ([row("elbowroom", "3")], True),
    "over the same limit": ([row("elbowroom", ">600")], True),
    "over a shorter limit": ([row("elbowroom", ">60", limit="60")], False),
    "failed": ([row("elbowroom", "", status="failed")], False),
    "not installed": ([row("elbowroom", "", status="not installed")], False),
    "another cell": ([row("numpyro_2000", "3")], False),
}


@pytest.mark.parametrize("case", FINISHED)
def test_a_cell_is_run_again_only_if_it_could_end_otherwise(case: str) -> None:
    rows, finished = FINISHED[case]
    assert is_finished(rows, CELL, limit=600) is finished


def test_an_interrupted_table_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    out, begun = tmp_path / "solvers.csv", []

    def measure(cell: results.Cell, *, limit: float, seed: int, draws: int) -> list[dict[str, object]]:
        begun.append(cell)
        if len(begun) == 2:
            raise KeyboardInterrupt
        names = dict(zip(("posterior", "guide", "solver"), cell, strict=True))
        told = {"status": "done", "seconds": "1.5", "limit": f"{limit:g}", "seed": seed}
        return [names | told | {"run": run} for run in ("cold", "warm")]

    monkeypatch.setattr(solvers, "measure", measure)
    options = ["lda", "--solvers", "elbowroom", "--out", str(out), "--yardsticks", str(tmp_path / "none.csv")]
    monkeypatch.setattr(sys, "argv", ["solvers.py", *options])
    with pytest.raises(KeyboardInterrupt):
        solvers.main()
    assert len(results.read_rows(out)) == 2
    solvers.main()
    assert [guide for _, guide, _ in begun] == ["mean_field", "low_rank", "low_rank", "full_rank"]
    assert len(results.read_rows(out)) == 6
    assert "[2/2] lda full_rank elbowroom: done 1.5 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        pytest.param(["radon"], "radon_variable_intercept_slope_noncentered; got 'radon'.", id="posterior"),
        pytest.param(["lda", "--solvers", "stan"], "pymc_pathfinder; got 'stan'.", id="solver"),
    ],
)
def test_a_wrong_name_ends_the_benchmark_before_it_begins(
    wrong: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    out = tmp_path / "solvers.csv"
    monkeypatch.setattr(sys, "argv", ["solvers.py", *wrong, "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        solvers.main()
    assert ended.value.code == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_solvers_are_chosen_by_name_or_first_part() -> None:
    assert solvers.chosen_solvers([]) == list(SOLVERS)
    assert solvers.chosen_solvers(["pymc", "numpyro_grid"]) == [
        name for name in SOLVERS if name.startswith(("pymc_", "numpyro_grid_"))
    ]
    assert solvers.chosen_solvers(["numpyro_2000"]) == ["numpyro_2000"]
    with pytest.raises(ValueError, match="got 'stan'"):
        solvers.chosen_solvers(["stan"])


def test_cells_stand_side_by_side_and_only_where_a_solver_can() -> None:
    known = "wells_data-wells_dist"
    found = solvers.cells([known, "other"], ["mean_field", "low_rank"], list(SOLVERS))
    assert [solver for posterior, guide, solver in found if (posterior, guide) == (known, "mean_field")] == [
        *("elbowroom", "numpyro_2000", "numpyro_20000", *GRID, "blackjax_meanfield", "pymc_advi", "pymc_dadvi")
    ]
    assert not any(solver.startswith("pymc") for posterior, _, solver in found if posterior == "other")
    assert not any(solver.startswith(("pymc", "blackjax")) for _, guide, solver in found if guide == "low_rank")


def test_a_solver_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = replace(SOLVERS["blackjax_meanfield"], packages=("no_such_package",))
    monkeypatch.setitem(solvers.SOLVERS, "blackjax_meanfield", absent)
    rows = solvers.measure(("line", "mean_field", "blackjax_meanfield"), limit=1, seed=0, draws=1)
    assert [(row["run"], row["status"], row["note"]) for row in rows] == [
        ("cold", "not installed", "no_such_package"),
        ("warm", "not installed", "no_such_package"),
    ]


# A cell's process, with a script in the solver's place


def script(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "script.py"
    path.write_text(f"import pathlib, sys, time\nfolder = pathlib.Path({str(tmp_path)!r})\n{text}")
    return [sys.executable, str(path)]


def test_a_run_over_its_limit_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solvers, "_GRACE", 0.0)
    command = script(tmp_path, "(folder / 'running').write_text('cold')\ntime.sleep(60)")
    assert solvers._watch(command, tmp_path, limit=0.3) == ("", True)
    assert not (tmp_path / "running").exists()


def test_what_lies_between_runs_has_no_limit(tmp_path: Path) -> None:
    assert solvers._watch(script(tmp_path, "time.sleep(0.5)"), tmp_path, limit=-100.0) == ("", False)


def test_a_process_that_fails_gives_its_last_line(tmp_path: Path) -> None:
    error, over = solvers._watch(script(tmp_path, "raise FloatingPointError('NaN in step 3')"), tmp_path, limit=60)
    assert (error, over) == ("FloatingPointError: NaN in step 3", False)


# Its memory


MEGABYTES = 64


def memory_of(tmp_path: Path) -> list[float | None]:
    """What is kept of a solver that holds 64 MB for a moment in its first run, and nothing in its second."""

    def solve(seed: int, clock: Clock) -> Run:
        if seed == 0:
            np.ones(MEGABYTES * 2**17)
        return Run((), None)

    solver = Solver("elbowroom", ("mean_field",), lambda problem: solve)
    problem = Problem("line", None, "mean_field", Space((), ()))
    cells.run_solver(solver, problem, tmp_path, runs=["cold", "warm"], limit=60, seed=0)
    return [pickle.loads((tmp_path / f"{run}.pickle").read_bytes())[2] for run in ("cold", "warm")]


@pytest.mark.skipif(not cells.reset_peak(), reason="the system does not let a process reset its peak of memory")
def test_a_runs_peak_of_memory_is_its_own(tmp_path: Path) -> None:
    np.ones(2 * MEGABYTES * 2**17)  # before the runs, and in neither's peak
    cold, warm = memory_of(tmp_path)
    # Linux counts pages in batches for each thread, which is a few MB at most.
    assert cold == pytest.approx(MEGABYTES, abs=MEGABYTES / 4)
    assert warm == pytest.approx(0, abs=MEGABYTES / 4)


def test_a_peak_of_memory_that_cannot_be_reset_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "_RESET", tmp_path / "no_folder" / "clear_refs")
    assert memory_of(tmp_path) == [None, None]


# PyMC's programs


@pytest.mark.skipif(
    importlib.util.find_spec("pymc") is None, reason="PyMC is not installed: it comes with the extra 'bench'"
)
@pytest.mark.parametrize("posterior", pymc_programs.PROGRAMS)
def test_a_pymc_program_has_the_models_density(posterior: str, shared_data: Path) -> None:
    model = posteriors.load(posterior)
    pymc_vi.verify(Problem(posterior, model, "mean_field", Space.of_model(model)))


# The optimum of the large hierarchy


@pytest.mark.parametrize("guide", hierarchy_optimum.GUIDES)
@pytest.mark.slow
def test_the_optimum_by_quadrature_is_what_a_fit_of_the_whole_factor_reaches(guide: str) -> None:
    """Two ways that share nothing: few numbers on Sobol points, and the whole family on draws."""
    with jax.numpy_rank_promotion("allow"):  # as users' models may be written
        model = targets_large.hierarchy(groups=3)
        with jax.enable_x64(True):
            best = hierarchy_optimum.measure(model, guide, 256)
        fitted = fit(model, guide, key=jax.random.PRNGKey(0), tolerance=0.05)
    assert fitted.elbo
    assert fitted.certificate
    error = math.hypot(fitted.elbo.se, float(best["se"]))
    assert fitted.elbo.value < best["elbo"] + 4 * error
    assert best["elbo"] < fitted.elbo.value + fitted.certificate.limit + 4 * error
