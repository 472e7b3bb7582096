"""The hierarchical regression: formula to arrays, density, charts, data, simulation, and a sentence for each misuse."""

import importlib.util
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pandas as pd
import pytest
from numpyro import handlers
from numpyro.infer import MCMC, NUTS
from scipy import stats

from models import hierarchical_regression as hierarchical
from models.hierarchical_regression import LIKELIHOODS, Grouping, design, model, simulate
from toolkit import Dataset, Model

FORMULA = "y ~ x + (x | g)"


def _frame(seed: int = 0, rows: int = 24) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "y": rng.normal(3.0, 2.0, rows),
            "x": rng.normal(10.0, 4.0, rows),
            "g": np.repeat(list("abcd"), rows // 4),
            "h": np.tile(list("uvw"), rows // 3),
            "kind": np.tile(["m", "f"], rows // 2),
            "count": rng.poisson(3.0, rows),
            "event": np.tile([True, False, False], rows // 3),
            "exposure": 1.0 + rng.random(rows),
        }
    )


def _small(likelihood: str = "gaussian", correlated: bool = False) -> Dataset:
    return simulate(jax.random.PRNGKey(3), groups=5, rows_per_group=4, likelihood=likelihood, correlated=correlated)


def _point(data: Dataset) -> dict[str, Any]:
    """The truth in unconstrained space of the plain chart: sds and sigma by their logarithms."""
    point = {"beta": data.truth["beta"], "group_effects": data.truth["group_effects"]}
    point["group_sd"] = np.log(data.truth["group_sd"])
    if "sigma" in data.truth:
        point["sigma"] = np.log(data.truth["sigma"])
    if "group_cholesky" in data.truth:
        cholesky = numpyro.distributions.biject_to(numpyro.distributions.constraints.corr_cholesky)
        point["group_cholesky"] = cholesky._inverse(jnp.asarray(data.truth["group_cholesky"]))
    return {name: jnp.asarray(value) for name, value in point.items()}


def _density(tested: Model, point: dict[str, Any], chart: str) -> float:
    return float(jax.jit(lambda at: tested.log_density(at, tested.arrays, chart))(point))


def _predictor(data: Dataset) -> np.ndarray:
    effects = data.truth["group_effects"][data.arrays["group"][:, 0]]
    return np.sum(data.arrays["varying"] * effects, axis=1)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_density_is_the_one_written_down(likelihood: str) -> None:
    data = _small(likelihood)
    truth, y, eta = data.truth, data.arrays["response"], _predictor(data)
    expected = stats.norm.logpdf(truth["beta"], data.arrays["prior_loc"], data.arrays["prior_scale"]).sum()
    expected += stats.norm.logpdf(truth["group_effects"], truth["beta"][None], truth["group_sd"][None]).sum()
    expected += stats.halfnorm.logpdf(truth["group_sd"], scale=0.5).sum() + np.log(truth["group_sd"]).sum()
    if likelihood == "gaussian":
        expected += stats.halfnorm.logpdf(truth["sigma"]) + np.log(truth["sigma"])
        expected += stats.norm.logpdf(y, eta, truth["sigma"]).sum()
    elif likelihood == "poisson":
        expected += stats.poisson.logpmf(y, np.exp(eta)).sum()
    else:
        expected += stats.bernoulli.logpmf(y, 1 / (1 + np.exp(-eta))).sum()
    tested = model(data)
    assert _density(tested, _point(data), "plain") == pytest.approx(expected, rel=1e-10)


@pytest.mark.slow
def test_correlated_effects_are_normal_with_the_correlation_that_is_reported() -> None:
    """A difference of densities at two effects of one group, in which priors and likelihood of the rest cancel."""
    data = _small(correlated=True)
    tested, truth, point = model(data), data.truth, _point(data)
    moved = {**point, "group_effects": point["group_effects"].at[1].add(jnp.array([0.4, -0.7]))}
    r = float(truth["group_correlation"][0])
    covariance = np.outer(truth["group_sd"], truth["group_sd"]) * np.array([[1, r], [r, 1]])
    prior = stats.multivariate_normal(truth["beta"], covariance)
    rows = data.arrays["group"][:, 0] == 1

    def expected(effects: np.ndarray) -> float:
        eta = data.arrays["varying"][rows] @ effects
        likelihood = stats.norm.logpdf(data.arrays["response"][rows], eta, truth["sigma"]).sum()
        return float(likelihood + prior.logpdf(effects))

    # NumPyro's triangular solve broadcasts over ranks.
    with jax.numpy_rank_promotion("allow"):
        change = _density(tested, moved, "plain") - _density(tested, point, "plain")
    difference = expected(np.asarray(moved["group_effects"][1])) - expected(np.asarray(point["group_effects"][1]))
    assert change == pytest.approx(difference, rel=1e-9)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize(("chart", "centring"), [("centred", 1.0), ("noncentred", 0.0), ("learned", 0.5)])
def test_charts_are_one_posterior(likelihood: str, chart: str, centring: float) -> None:
    """Densities at mapped points differ by the Jacobian alone, and every quantity is the same there."""
    data = _small(likelihood)
    tested, point = model(data), _point(data)
    mean, sd = point["beta"][None], jnp.exp(point["group_sd"])[None]
    site = "group_effects" if centring == 1 else "group_effects_decentered"
    mapped = {name: value for name, value in point.items() if name != "group_effects"}
    mapped[site] = centring * mean + (point["group_effects"] - mean) / sd ** (1 - centring)
    jacobian = (1 - centring) * 5 * jnp.log(sd).sum()
    plain = _density(tested, point, "plain")
    assert _density(tested, mapped, chart) == pytest.approx(plain + float(jacobian), rel=1e-10)
    values = tested.in_chart(chart).constrain(mapped, tested.arrays)
    for quantity in tested.quantities:
        np.testing.assert_allclose(values[quantity.site], data.truth[quantity.site], rtol=1e-9)


@pytest.mark.slow
def test_charts_of_correlated_effects_are_one_posterior() -> None:
    data = _small("poisson", correlated=True)
    tested, point = model(data), _point(data)
    factor = data.truth["group_sd"][:, None] * data.truth["group_cholesky"]
    mapped = {name: value for name, value in point.items() if name != "group_effects"}
    mapped["group_effects_base"] = jnp.asarray(
        np.linalg.solve(factor, (data.truth["group_effects"] - data.truth["beta"][None]).T).T
    )
    with jax.numpy_rank_promotion("allow"):
        plain = _density(tested, point, "centred")
        other = _density(tested, mapped, "noncentred")
        values = tested.constrain(mapped, tested.arrays)
    assert other == pytest.approx(plain + 5 * np.log(np.diag(factor)).sum(), rel=1e-10)
    for quantity in tested.quantities:
        np.testing.assert_allclose(values[quantity.site], data.truth[quantity.site], rtol=1e-8)


def test_the_learned_chart_has_a_centring_for_each_effect() -> None:
    tested = model(_small())
    with handlers.block(), handlers.trace() as trace:
        handlers.seed(tested.bound("learned"), 0)(**tested.arrays)
    params = {name: np.shape(m["value"]) for name, m in trace.items() if m["type"] == "param"}
    assert params == {"group_effects_centered": (5, 2)}


def test_the_learned_chart_is_not_offered_for_correlated_effects() -> None:
    tested = model(_small(correlated=True))
    with pytest.raises(ValueError, match=r"^Expected chart to be one of \['centred', 'noncentred', 'plain'\]"):
        tested.bound("learned")


def test_a_formula_becomes_columns_groups_and_means() -> None:
    frame = _frame()
    data = design(frame, "y ~ x + kind + (x | g) + (1 | h)")
    arrays = data.arrays
    assert data.coords["effect"].tolist() == ["Intercept", "x", "kind[m]"]
    np.testing.assert_array_equal(arrays["common"].T, [np.ones(24), frame["x"], frame["kind"] == "m"])
    np.testing.assert_array_equal(arrays["varying"].T, [np.ones(24), frame["x"], np.ones(24)])
    np.testing.assert_array_equal(data.coords["g"][arrays["group"][:, 0]], frame["g"])
    np.testing.assert_array_equal(data.coords["h"][arrays["group"][:, 1]], frame["h"])
    assert data.static["groupings"] == (
        Grouping("g", 4, ("Intercept", "x"), (0, 1)),
        Grouping("h", 3, ("Intercept",), (-1,)),
    )


def test_each_effect_is_added_once() -> None:
    """With two groupings, an offset and a column that does not vary, against the sum written out."""
    frame = _frame()
    tested = model(
        frame, formula="count ~ x + kind + offset(np.log(exposure)) + (x | g) + (1 | h)", likelihood="poisson"
    )
    rng = np.random.default_rng(1)
    latents = {"beta": rng.normal(size=3), "g_effects": rng.normal(size=(4, 2)), "h_effects": rng.normal(size=(3, 1))}
    latents |= {"g_sd": np.ones(2), "h_sd": np.ones(1)}
    with handlers.block(), handlers.trace() as trace:
        handlers.substitute(tested.bound("plain"), data=latents)(**tested.arrays)
    own = latents["g_effects"][frame["g"].map("abcd".index)]
    eta = np.log(frame["exposure"]) + own[:, 0] + own[:, 1] * frame["x"] + latents["beta"][2] * (frame["kind"] == "m")
    eta += latents["h_effects"][frame["h"].map("uvw".index), 0]
    np.testing.assert_allclose(np.log(trace["response"]["fn"].rate), eta, rtol=1e-12)


def test_groups_without_rows_are_left_out() -> None:
    frame = _frame()
    frame["g"] = pd.Categorical(frame["g"], categories=list("abcdz"))
    frame = frame[~((frame["g"] == "a") & (frame["h"] == "u"))]
    data = design(frame, "y ~ x + (1 | g:h) + (1 | g)")
    assert len(data.coords["g:h"]) == 11
    assert data.coords["g"].tolist() == ["a", "b", "c", "d"]
    labels = (frame["g"].astype(str) + ":" + frame["h"]).to_numpy()
    np.testing.assert_array_equal(data.coords["g:h"][data.arrays["group"][:, 0]], labels)


def test_prior_scales_follow_the_scale_of_the_data() -> None:
    frame = _frame()
    arrays = design(frame, FORMULA).arrays
    s, mean, sd = frame["y"].std(ddof=0), frame["x"].mean(), frame["x"].std(ddof=0)
    np.testing.assert_allclose(arrays["prior_loc"], [frame["y"].mean(), 0.0])
    np.testing.assert_allclose(arrays["prior_scale"], [2.5 * s * np.sqrt(1 + (mean / sd) ** 2), 2.5 * s / sd])
    np.testing.assert_allclose(arrays["sd_scale"], [s, s / sd])
    assert float(arrays["sigma_scale"]) == pytest.approx(s)
    counts = design(frame, "count ~ x + offset(np.log(exposure)) + (1 | g)", "poisson").arrays
    rate = frame["count"].mean() / frame["exposure"].mean()
    assert counts["prior_loc"][0] == pytest.approx(np.log(rate))
    assert counts["prior_scale"][1] == pytest.approx(2.5 / sd)
    zeros_and_ones = design(frame, "event ~ x + (1 | g)", "bernoulli").arrays
    assert zeros_and_ones["prior_loc"][0] == pytest.approx(np.log(1 / 2))


def _with(**columns: Any) -> pd.DataFrame:
    return _frame().assign(**columns)


def _one_alone() -> pd.DataFrame:
    return _with(g=["z", *["a"] * 11, *["b"] * 12])


MISUSE = {
    "missing column": lambda: model(_frame(), formula="y ~ z + (x | g)"),
    "nan": lambda: model(_with(x=[np.nan, *range(23)]), formula=FORMULA),
    "infinite": lambda: model(_with(x=[np.inf, *range(23)]), formula=FORMULA),
    "missing group": lambda: model(_with(g=[None, *"abc" * 7, "a", "b"]), formula=FORMULA),
    "numbers as text": lambda: model(_with(x=[str(i) for i in range(24)]), formula=FORMULA),
    "text as number": lambda: model(_with(x=[f"t{i}" for i in range(24)]), formula=FORMULA),
    "dates": lambda: model(_with(x=pd.date_range("2020-01-01", periods=24)), formula=FORMULA),
    "text response": lambda: model(_frame(), formula="kind ~ x + (1 | g)"),
    "fractional groups": lambda: model(_frame(), formula="y ~ 1 + (1 | x)"),
    "one row in a group": lambda: model(_one_alone(), formula=FORMULA),
    "every row a group": lambda: model(_with(g=range(24)), formula="y ~ x + (1 | g)"),
    "one group": lambda: model(_with(g="a"), formula=FORMULA),
    "unknown likelihood": lambda: model(_frame(), formula=FORMULA, likelihood="gamma"),
    "not counts": lambda: model(_frame(), formula=FORMULA, likelihood="poisson"),
    "not zero or one": lambda: model(_frame(), formula="count ~ x + (x | g)", likelihood="bernoulli"),
    "constant response": lambda: model(_with(y=1.0), formula=FORMULA),
    "constant column": lambda: model(_with(x=1.0), formula=FORMULA),
    "does not parse": lambda: model(_frame(), formula="y ~ x + (x | g"),
    "no response": lambda: model(_frame(), formula="x + (x | g)"),
    "no parentheses": lambda: model(_frame(), formula="y ~ x | g"),
    "unknown function": lambda: model(_frame(), formula="y ~ curl(x) + (x | g)"),
    "no common effect": lambda: model(_frame(), formula="y ~ 0 + (1 | g)"),
    "reserved name": lambda: model(_frame().rename(columns={"g": "row"}), formula="y ~ x + (x | row)"),
    "no formula": lambda: model(_frame()),
    "no frame": lambda: design([1, 2], FORMULA),
    "formula no text": lambda: design(_frame(), 3),
    "few rows": lambda: design(_frame().head(2), FORMULA),
    "formula twice": lambda: model(_small(), formula=FORMULA),
    "two likelihoods": lambda: model(_small(), likelihood="poisson"),
    "another dataset": lambda: model(Dataset("mine", {"x": np.ones(3)})),
    "nothing to correlate": lambda: model(_frame(), formula="y ~ x + (1 | g)", correlated=True),
    "unknown data": lambda: model("cheese"),
    "simulated unknown": lambda: simulate(jax.random.PRNGKey(0), likelihood="gamma"),
    "too few groups": lambda: simulate(jax.random.PRNGKey(0), groups=1),
    "simulated alone": lambda: simulate(jax.random.PRNGKey(0), covariates=0, correlated=True),
}
SENTENCES = {
    "missing column": "Expected columns 'z' for 'y ~ z + (x | g)'; the data frame has y, x, g, h,",
    "nan": "Expected a finite value in every row of column 'x'; got 1 missing or infinite of 24: drop those rows",
    "infinite": "Expected a finite value in every row of column 'x'; got 1 missing or infinite of 24: drop those rows",
    "missing group": "Expected a finite value in every row of column 'g'; got 1 missing or infinite of 24",
    "numbers as text": "Expected numbers in column 'x'; got numbers written as text: use pandas.to_numeric.",
    "text as number": "Expected numbers, or text with few levels, in column 'x'; got 24 different texts in 24 rows",
    "dates": "Expected numbers or text in column 'x'; got dtype datetime64",
    "text response": "Expected a numeric response; 'kind' is categoric: convert it to numbers.",
    "fractional groups": "Expected whole numbers or text in grouping column 'x'; got fractions",
    "one row in a group": "Expected at least 2 rows in each group of 'g', whose slopes vary; got 1 row in 1 of 3,",
    "every row a group": "Expected groups of rows in 'g'; every row is a group of its own",
    "one group": "Expected at least 2 groups in 'g'; got 1: leave the grouping term out.",
    "unknown likelihood": "Expected likelihood to be one of gaussian, poisson, bernoulli; got 'gamma'.",
    "not counts": "Expected counts 0, 1, 2, ... in response 'y' for 'poisson'",
    "not zero or one": "Expected only 0 and 1 in response 'count' for 'bernoulli'",
    "constant response": "Expected response 'y' to vary; every row has 1.",
    "constant column": "Expected column 'x' to vary; it is constant: leave it out of the formula.",
    "does not parse": "Expected a formula; 'y ~ x + (x | g' does not parse (",
    "no response": "Expected a response and a '~' in the formula; got 'x + (x | g)': write it like",
    "no parentheses": "Expected a grouping term in parentheses in the formula; got 'y ~ x | g': write it like",
    "unknown function": "Expected a formula that fits the data; 'y ~ curl(x) + (x | g)' stops with: 'curl'.",
    "no common effect": "Expected at least one common effect, such as the intercept; the formula is 'y ~ 0 + (1 | g)'.",
    "reserved name": "Expected a grouping column not called 'row', a name of the model: rename the column.",
    "no formula": "Expected a formula with the data frame; got none: write it like",
    "no frame": "Expected a pandas DataFrame; got list: wrap it as pandas.DataFrame(...).",
    "formula no text": "Expected the formula as text; got int: write it like",
    "few rows": "Expected at least 3 rows; got 2.",
    "formula twice": "Expected no formula beside dataset 'simulated_gaussian', which has one",
    "two likelihoods": "Expected likelihood 'gaussian', for which dataset 'simulated_gaussian' was made; got 'poisson'",
    "another dataset": "Expected a dataset made by design(frame, formula); 'mine' was not.",
    "nothing to correlate": "Expected a grouping term with at least two varying columns for correlated=True",
    "unknown data": "Expected a data set called 'grunfeld' or 'radon'; got 'cheese'.",
    "simulated unknown": "Expected likelihood to be one of gaussian, poisson, bernoulli; got 'gamma'.",
    "too few groups": "Expected groups of at least 2; got 1.",
    "simulated alone": "Expected a grouping term with at least two varying columns for correlated=True",
}


def test_every_misuse_has_its_sentence() -> None:
    assert set(MISUSE) == set(SENTENCES)


@pytest.mark.parametrize("case", MISUSE)
def test_misuse(case: str) -> None:
    with pytest.raises(ValueError, match=r"^Expected .*\S$") as caught:
        MISUSE[case]()
    assert str(caught.value).startswith(SENTENCES[case])


def test_a_group_with_one_row_is_fine_where_it_is_asked_for_or_only_the_intercept_varies() -> None:
    assert design(_one_alone(), FORMULA, allow_single_rows=True).static["groupings"][0].groups == 3
    assert design(_one_alone(), "y ~ x + (1 | g)").static["groupings"][0].groups == 3


def test_the_default_model_names_what_it_reports() -> None:
    tested = model()
    assert tested.chart == "centred"
    assert [quantity.site for quantity in tested.quantities] == ["beta", "firm_sd", "firm_effects", "sigma"]
    assert tested.dims("beta") == ("effect",)
    assert tested.dims("firm_effects") == ("firm", "firm_term")
    assert sum(int(np.prod(tested.sites[q.site].shape)) for q in tested.quantities) == 28
    assert tested.dataset.coords["effect"].tolist() == ["Intercept", "log_value", "log_capital"]
    assert tested.dataset.coords["firm_term"].tolist() == ["Intercept", "log_capital"]
    assert "General Motors" in tested.dataset.coords["firm"]
    assert not any(tested.local(site) for site in tested.latents)


def test_a_formula_of_ones_own_takes_the_usual_chart() -> None:
    tested = model(formula="log_invest ~ log_value + (1 | firm) + (1 | year)")
    assert tested.chart == "noncentred"
    assert tested.dataset.coords["year"][0] == "1935"
    correlated = model(correlated=True)
    assert correlated.dims("firm_correlation") == ("firm_pair",)
    assert correlated.dataset.coords["firm_pair"].tolist() == ["Intercept:log_capital"]


def test_grunfeld_is_statsmodels_copy_on_the_log_scale() -> None:
    from statsmodels.datasets import grunfeld

    source, frame = grunfeld.load_pandas().data, hierarchical.frame()
    np.testing.assert_allclose(np.exp(frame["log_invest"]), source["invest"])
    for column in ("value", "capital"):
        ratio = np.exp(frame[f"log_{column}"]) / source[column]
        np.testing.assert_allclose(ratio, 1 / stats.gmean(source[column]))
    assert (frame["firm"] == source["firm"]).all()


def test_radon_comes_through_the_extra() -> None:
    tested = model("radon")
    assert tested.chart == "noncentred"
    assert tested.dataset.coords["effect"].tolist() == ["Intercept", "floor", "log_uranium"]
    assert tested.sites["county_effects"].shape == (85, 2)
    assert tested.dataset.arrays["common"][:, 1].sum() == 153
    assert tested.dataset.arrays["response"].shape == (919,)


def test_radon_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'elbowroom\[radon\]'\.$"):
        hierarchical.dataset("radon")


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_simulate_keeps_the_truth_of_every_site(likelihood: str) -> None:
    key = jax.random.PRNGKey(5)
    data = simulate(key, groups=40, rows_per_group=25, covariates=2, likelihood=likelihood, correlated=True)
    tested = model(data)
    assert set(data.truth) == {site.name for site in tested.sites.values() if site.kind in ("latent", "deterministic")}
    assert all(data.truth[name].shape == tested.sites[name].shape for name in data.truth)
    again = simulate(key, groups=40, rows_per_group=25, covariates=2, likelihood=likelihood, correlated=True)
    np.testing.assert_array_equal(data.arrays["response"], again.arrays["response"])
    eta, y = _predictor(data), data.arrays["response"]
    if likelihood == "gaussian":
        scores = (y - eta) / data.truth["sigma"]
    elif likelihood == "poisson":
        scores = (y - np.exp(eta)) / np.exp(eta / 2)
    else:
        chance = 1 / (1 + np.exp(-eta))
        scores = (y - chance) / np.sqrt(chance * (1 - chance))
    # Standardised residuals of the true model: mean 0 and variance 1, by their own standard errors.
    assert abs(scores.mean()) < 5 / np.sqrt(scores.size)
    assert abs((scores**2).mean() - 1) < 5 * (scores**2).std() / np.sqrt(scores.size)


def _nuts(tested: Model, seed: int) -> MCMC:
    sampler = MCMC(
        NUTS(tested.bound()), num_warmup=1_000, num_samples=1_000, num_chains=4,
        chain_method="sequential", progress_bar=False,
    )  # fmt: skip
    sampler.run(jax.random.PRNGKey(seed), **tested.arrays)
    return sampler


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grunfeld", "radon"])
@pytest.mark.parametrize("seed", range(5))
def test_nuts_passes_every_check(name: str, seed: int) -> None:
    from arviz_stats.base import array_stats

    tested = model(name)
    sampler = _nuts(tested, seed)
    assert int(sampler.get_extra_fields()["diverging"].sum()) == 0
    draws = sampler.get_samples(group_by_chain=True)
    for quantity in tested.quantities:
        values = np.asarray(draws[quantity.site]).reshape(4, 1_000, -1)
        for scalar in np.moveaxis(values, -1, 0):
            assert array_stats.rhat(scalar, chain_axis=0, draw_axis=1) <= 1.01
            assert array_stats.ess(scalar, chain_axis=0, draw_axis=1, method="bulk") >= 400
            assert array_stats.ess(scalar, chain_axis=0, draw_axis=1, method="tail", prob=(0.05, 0.95)) >= 400


@pytest.mark.slow
def test_the_truth_lies_in_90_percent_intervals_at_the_nominal_rate() -> None:
    seeds = 50
    first = model(simulate(jax.random.PRNGKey(0), groups=10, rows_per_group=8))
    sampler = MCMC(NUTS(first.bound()), num_warmup=500, num_samples=1_000, progress_bar=False, jit_model_args=True)
    inside: dict[str, list[np.ndarray]] = {"beta": [], "group_sd": [], "sigma": []}
    for seed in range(seeds):
        data = simulate(jax.random.PRNGKey(seed), groups=10, rows_per_group=8)
        sampler.run(jax.random.PRNGKey(1_000 + seed), **data.arrays)
        for site, draws in sampler.get_samples().items():
            if site in inside:
                low, high = np.quantile(draws, [0.05, 0.95], axis=0)
                inside[site].append((low <= data.truth[site]) & (data.truth[site] <= high))
    for hits in inside.values():
        rate = np.mean(hits, axis=0)
        assert (np.abs(rate - 0.9) < 5 * np.sqrt(0.9 * 0.1 / seeds)).all()


@pytest.mark.parametrize("code", [-1, 5])
def test_a_group_that_is_not_there_is_refused(code: int) -> None:
    data = _small()
    group = data.arrays["group"].copy()
    group[0, 0] = code
    with pytest.raises(ValueError, match="Expected groups 0 to 4 of 'group' in array 'group' .*; got "):
        model(replace(data, arrays={**data.arrays, "group": group}))
