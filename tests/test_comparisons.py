"""Closed-form approximations compared with exact draws: what is accused, what is not, and in which words."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest
import xarray as xr
from scipy.stats import multivariate_normal

from toolkit import Dataset, Estimate, Labels, Model, Quantity, Status, fit
from toolkit.comparison.comparisons import Comparison, compare
from toolkit.comparison.sentences import probability
from toolkit.comparison.verdicts import Thresholds
from toolkit.cost import Cost
from toolkit.sampling.references import Reference, reference
from toolkit.variational.guides import Guide

RHO = 0.8
COVARIANCE = np.array([[1.0, RHO, 0.0], [RHO, 1.0, 0.0], [0.0, 0.0, 1.0]])
KEY = jax.random.PRNGKey(0)


def _observe_flat(y: np.ndarray) -> None:
    """A likelihood that says nothing: the posterior is the prior, known exactly."""
    numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def _correlated(y: np.ndarray) -> None:
    beta = numpyro.sample("beta", dist.MultivariateNormal(jnp.zeros(3), jnp.asarray(COVARIANCE)))
    numpyro.deterministic("total", beta.sum())
    _observe_flat(y)


def _exact(key: jax.Array, draws: int) -> dict[str, np.ndarray]:
    return _sites(_gaussian(key, draws, np.linalg.cholesky(COVARIANCE)))


def _gaussian(key: jax.Array, draws: int, factor: np.ndarray, mean: float = 0.0) -> np.ndarray:
    return mean + np.asarray(jax.random.normal(key, (draws, 3))) @ factor.T


def _sites(beta: np.ndarray) -> dict[str, np.ndarray]:
    return {"beta": beta, "total": beta.sum(-1)}


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(
        _correlated,
        Dataset("prior", {"y": np.array(0.0)}, coords={"term": ["worst area", "mean/area", "floor"]}),
        quantities=(Quantity("beta", "Slope", "per sd", dims=("term",)), Quantity("total")),
        exact=_exact,
        name="correlated",
    )


@dataclass(frozen=True)
class Gaussian:
    """A closed-form approximation N(mean, factor factor'): it has what `Approximation` lists, and no optimiser."""

    guide: Guide
    factor: np.ndarray
    mean: float = 0.0
    status: Status = Status.ARRIVED
    message: str = ""
    elbo: Estimate | None = None
    cost: Cost = field(default_factory=lambda: Cost(0.5, 0.25, 100))
    usable: bool = True
    has_density: bool = True

    @property
    def fresh_log_weights(self) -> np.ndarray | None:
        if not (self.usable and self.has_density):
            return None
        z = _gaussian(jax.random.PRNGKey(11), 4_000, self.factor, self.mean)
        q = multivariate_normal(np.full(3, self.mean), self.factor @ self.factor.T)
        return multivariate_normal(np.zeros(3), COVARIANCE).logpdf(z) - q.logpdf(z)

    def draw(self, key: jax.Array, draws: int, sites: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
        every = _sites(_gaussian(key, draws, self.factor, self.mean))
        return {site: every[site] for site in sites or every}


def _named(name: str, factor: np.ndarray, **options: object) -> Gaussian:
    return Gaussian(Guide(name, lambda fn: fn, label=f"Auto{name}"), factor, **options)


FULL = np.linalg.cholesky(COVARIANCE)
# The optimum of KL(q || p) over factorised Gaussians: the precision's diagonal, inverted.
NARROW = np.diag(np.diag(np.linalg.inv(COVARIANCE)) ** -0.5)


def _mean_field(**options: object) -> Gaussian:
    return _named("mean_field", NARROW, **options)


def _full_rank(**options: object) -> Gaussian:
    return _named("full_rank", FULL, **options)


@pytest.fixture(scope="module")
def truth(model: Model) -> Reference:
    return reference(model, key=jax.random.PRNGKey(1), chains=4, draws=2_500)


@pytest.fixture(scope="module")
def comparison(model: Model, truth: Reference) -> Comparison:
    failed = _named("low_rank", FULL, usable=False, status=Status.NO_VALID_START, has_density=False)
    late = _named("laplace", FULL, status=Status.BUDGET, message="still 3 nats a block")
    items = ["beta[worst area]", "beta[worst area] + beta[mean/area] > 2", "total"]
    return compare(model, truth, [_mean_field(), _full_rank(), failed, late], key=KEY, focus=items)


def _value(comparison: Comparison, guide: str, quantity: str, metric: str) -> pd.Series:
    table = comparison.table
    return table[(table["guide"] == guide) & (table["quantity"] == quantity) & (table["metric"] == metric)].iloc[0]


def test_mean_field_is_too_narrow_by_the_known_amount(comparison: Comparison) -> None:
    for quantity in ("beta[worst area]", "beta[mean/area]"):
        row = _value(comparison, "mean_field", quantity, "sd_ratio")
        assert abs(row["value"] - math.sqrt(1 - RHO**2)) < 5 * row["se"]
        assert row["se"] < 0.02
        assert row["verdict"] == "wrong"
    assert _value(comparison, "mean_field", "beta[floor]", "sd_ratio")["verdict"] == "right"


def test_mean_field_is_accused_in_words_with_its_number(comparison: Comparison) -> None:
    row = comparison.guides.loc["mean_field"]
    assert (row["verdict"], row["quantities"], row["wrong"], row["right"]) == ("wrong", 4, 3, 1)
    assert row["sentence"].startswith("no: 3 of 4 too narrow (sd 0.")
    assert "x the reference), worst beta[" in row["sentence"]
    assert row["sentence"].endswith("; the means are right")


def test_the_worst_is_one_of_the_correlated(comparison: Comparison) -> None:
    row, total = comparison.guides.loc["mean_field"], _value(comparison, "mean_field", "total", "sd_ratio")
    assert row["worst_sd_ratio_quantity"] in ("beta[worst area]", "beta[mean/area]")
    assert abs(row["worst_sd_ratio"] - math.sqrt(1 - RHO**2)) < 5 * row["worst_sd_ratio_se"]
    assert abs(total["value"] - math.sqrt((2 * (1 - RHO**2) + 1) / COVARIANCE.sum())) < 5 * total["se"]


def test_full_rank_is_not_accused(comparison: Comparison) -> None:
    row = comparison.guides.loc["full_rank"]
    assert (row["verdict"], row["right"], row["wrong"], row["cannot_tell"]) == ("right", 4, 0, 0)
    assert row["sentence"].startswith("yes: all 4 quantities are right (shifts below 0.")


def test_no_seed_flips_a_verdict_between_right_and_wrong(model: Model) -> None:
    for seed in range(8):
        truth = reference(model, key=jax.random.PRNGKey(100 + seed), chains=4, draws=1_000)
        fits = [_mean_field(), _full_rank()]
        guides = compare(model, truth, fits, key=jax.random.PRNGKey(seed), draws=4_000).guides
        assert guides.loc["mean_field", "verdict"] == "wrong"
        assert guides.loc["full_rank", "verdict"] != "wrong"


def test_failed_and_late_fits_are_rows_with_their_sentences(comparison: Comparison) -> None:
    failed, late = comparison.guides.loc["low_rank"], comparison.guides.loc["laplace"]
    assert failed["sentence"] == f"not judged: {Status.NO_VALID_START.value}"
    assert (failed["status"], failed["verdict"], failed["quantities"]) == ("NO_VALID_START", "", 0)
    assert math.isnan(failed["worst_shift"])
    assert failed["worst_shift_quantity"] == ""
    assert late["sentence"] == f"not judged: {Status.BUDGET.value} (still 3 nats a block)"
    assert late["verdict"] == ""
    assert math.isfinite(late["worst_shift"])
    assert set(comparison.table.loc[comparison.table["guide"] == "laplace", "verdict"]) == {""}


def test_every_number_of_the_table_has_its_error(comparison: Comparison) -> None:
    assert set(comparison.table["guide"]) == {"mean_field", "full_rank", "laplace"}
    assert np.isfinite(comparison.table[["value", "se"]].to_numpy()).all()
    assert (comparison.table["se"] > 0).all()


def test_adding_a_guide_changes_no_other_guides_numbers(model: Model, truth: Reference, comparison: Comparison) -> None:
    alone = compare(model, truth, [_full_rank()], key=KEY).table
    together = comparison.table[comparison.table["guide"] == "full_rank"].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone[["quantity", "metric", "value", "se"]], together[alone.columns[1:5]])


def test_focus_stands_side_by_side(comparison: Comparison) -> None:
    focus = comparison.focus.set_index(["item", "source"])
    event = "beta[worst area] + beta[mean/area] > 2"
    p, q = focus.loc[(event, "reference")], focus.loc[(event, "mean_field")]
    for row, variance in ((p, 2 + 2 * RHO), (q, 2 * (1 - RHO**2))):
        expected = 1 - 0.5 * (1 + math.erf(2 / math.sqrt(2 * variance)))
        assert abs(row["probability"] - expected) < 5 * row["probability_se"]
        assert math.isnan(row["mean"])
    assert q["sentence"].startswith("would mislead: ")
    assert focus.loc[("beta[worst area]", "mean_field"), "sentence"].startswith("too narrow: ")
    assert focus.loc[("beta[worst area]", "full_rank"), "sentence"].startswith("may be reported from this guide alone")
    # Why these two are not judged is said once, in the table of guides.
    assert focus.loc[("total", "low_rank"), "sentence"] == focus.loc[("total", "laplace"), "sentence"] == ""
    assert math.isnan(focus.loc[("total", "low_rank"), "mean"])
    assert math.isfinite(focus.loc[("total", "laplace"), "mean"])
    assert focus.loc[("beta[worst area]", "reference"), "sentence"] == ""


def test_a_number_has_one_error_wherever_it_stands(comparison: Comparison) -> None:
    focus = comparison.focus.set_index(["item", "source"])
    quantities = comparison.quantities.set_index(["quantity", "source"])
    for source in ("reference", "mean_field"):
        key = ("total", source)
        assert focus.loc[key, "mean_se"] == pytest.approx(quantities.loc[key, "mean_se"], rel=1e-12)
    event = focus.loc[("beta[worst area] + beta[mean/area] > 2", "mean_field")]
    shown, se = event["probability"], event["probability_se"]
    assert se == pytest.approx(math.sqrt(shown * (1 - shown) / 9_999), rel=1e-9)
    assert probability(shown, se) in event["sentence"]


def test_quantities_have_titles_units_and_moments(comparison: Comparison) -> None:
    row = comparison.quantities.set_index(["source", "quantity"]).loc[("reference", "beta[worst area]")]
    assert (row["title"], row["unit"]) == ("Slope[worst area]", "per sd")
    assert abs(row["mean"]) < 5 * row["mean_se"]
    assert abs(row["sd"] - 1.0) < 5 * row["sd_se"]
    assert row["q5"] < row["q25"] < row["q50"] < row["q75"] < row["q95"]


def test_the_lost_correlation_leads_the_pairs(comparison: Comparison) -> None:
    pairs = comparison.pairs[comparison.pairs["guide"] == "mean_field"].iloc[0]
    assert {pairs["quantity_a"], pairs["quantity_b"]} == {"beta[worst area]", "beta[mean/area]"}
    assert abs(pairs["difference"] + RHO) < 5 * pairs["se"]
    matrix = comparison.correlations["reference"]
    assert list(matrix.index) == ["beta[worst area]", "beta[mean/area]", "beta[floor]", "total"]
    assert matrix.shape == comparison.correlations["mean_field"].shape


def test_khat_is_small_for_the_posterior_itself_and_larger_for_less(comparison: Comparison) -> None:
    # Weights p / q are unbounded where q is narrower: their tail index is 1 - (variance of q / variance of p) along
    # the direction in which q is narrowest beside p, here of 1 - RHO^2 against 1 + RHO.
    row = comparison.guides.loc["mean_field"]
    assert abs(row["khat"] - (1 - (1 - RHO**2) / (1 + RHO))) < 5 * row["khat_se"]
    assert math.isnan(comparison.guides.loc["full_rank", "khat"]) or comparison.guides.loc["full_rank", "khat"] < 0.5


def test_advice_names_the_guide_that_is_right(comparison: Comparison) -> None:
    assert comparison.advice[0].startswith("Report full_rank's intervals: all 4 of its quantities are right")
    assert any(text.startswith("mean_field may be used for means") for text in comparison.advice)
    assert any(text.startswith("Give laplace a larger budget (`--max-gradients`)") for text in comparison.advice)


def test_advice_compares_seconds_with_nuts_alone(model: Model, truth: Reference) -> None:
    assert truth.status is Status.EXACT
    assert not any("NUTS" in text for text in compare(model, truth, [_full_rank()], key=KEY).advice)
    sampled = Reference(model, truth.draws, Status.PASSED, cost=Cost(1.0, 2.0))
    (report,) = compare(model, sampled, [_full_rank()], key=KEY).advice
    assert report.endswith(" It took 0.75 s, NUTS 3 s.")


def test_advice_goes_up_the_ladder(model: Model, truth: Reference) -> None:
    advice = compare(model, truth, [_mean_field()], key=KEY).advice
    assert advice[0].startswith("Report the reference's intervals")
    assert "`--guides low_rank`" in advice[1]


def _walk(y: np.ndarray) -> None:
    numpyro.sample("z", dist.GaussianRandomWalk(1.0, 8))
    _observe_flat(y)


def _walked(key: jax.Array, draws: int) -> dict[str, np.ndarray]:
    return {"z": np.cumsum(np.asarray(jax.random.normal(key, (draws, 8))), axis=1)}


def test_advice_names_the_chain_that_a_model_has() -> None:
    model = Model(_walk, Dataset("prior", {"y": np.array(0.0)}), exact=_walked, name="walk")
    advice = compare(model, reference(model, key=KEY), [fit(model, "mean_field", key=KEY)], key=KEY).advice
    assert "a cost linear in its length (`--guides chain`); a family with a few" in advice[1]


def test_advice_goes_beyond_one_gaussian_where_that_is_wrong(model: Model, truth: Reference) -> None:
    advice = compare(model, truth, [_named("full_rank", NARROW)], key=KEY).advice
    assert "`--guides mixture`" in advice[1]
    assert "`--guides chain`" not in advice[1]


def test_advice_blames_no_family_whose_fit_is_unproven(model: Model, truth: Reference) -> None:
    unproven = _mean_field(status=Status.UNPROVEN, message="up to 0.3 nats: the budget is used up")
    few = _full_rank(status=Status.TOO_FEW_DRAWS)
    advice = compare(model, truth, [unproven, few], key=KEY).advice
    assert any(text.startswith("Before the family of mean_field is blamed, a larger budget") for text in advice)
    assert any("draws seldom run out, as they did for full_rank" in text for text in advice)


def test_advice_names_no_other_solver_for_a_guide_with_its_own(model: Model, truth: Reference) -> None:
    few = [_named(name, NARROW, status=Status.TOO_FEW_DRAWS) for name in ("chain", "mixture_3@plain")]
    assert not any("--solver svi" in text for text in compare(model, truth, few, key=KEY).advice)


@pytest.mark.parametrize(
    ("status", "modes", "wanted", "not_wanted"),
    [
        (Status.RHAT, False, "Run NUTS longer, or write the model in other coordinates", "mixture"),
        (Status.RHAT, True, "Longer chains mend that only where they cross", "Run NUTS longer"),
        (Status.LOW_ENERGY, False, "Write the model in other coordinates, such as non-centred ones", "Run NUTS longer"),
    ],
)
def test_advice_mends_what_the_reference_failed(
    model: Model, truth: Reference, status: Status, modes: bool, wanted: str, not_wanted: str
) -> None:
    (advice,) = compare(model, Reference(model, truth.draws, status, modes=modes), [_full_rank()], key=KEY).advice
    assert wanted in advice
    assert not_wanted not in advice


def test_advice_mends_no_reference_that_is_not_there(model: Model) -> None:
    (advice,) = compare(model, None, [_full_rank()], key=KEY).advice
    assert advice.startswith(
        "No guide can be judged yet: there is no reference. Until then read where the guides agree"
    )


def test_advice_says_how_many_more_draws_would_decide(model: Model) -> None:
    few = reference(model, key=jax.random.PRNGKey(1), chains=4, draws=200)
    result = compare(model, few, [_full_rank()], key=KEY)
    assert result.guides["verdict"].item() == "cannot tell"
    assert result.guides["sentence"].item().startswith("cannot tell: ")
    assert result.advice[0].startswith("Draw more from the reference: ")
    assert "times as many draws would decide them" in result.advice[0]


def test_a_failed_reference_gives_no_verdict_but_agreement(model: Model, truth: Reference) -> None:
    failed = Reference(model, truth.draws, Status.RHAT, cost=Cost())
    result = compare(model, failed, [_mean_field(), _full_rank()], key=KEY, focus=["total"])
    assert not result.reference_ok
    assert set(result.table["verdict"]) == {""}
    assert set(result.guides["verdict"]) == {""}
    assert result.guides["sentence"].str.startswith("not judged: the reference failed its checks: the chains dis").all()
    agreement = result.agreement.set_index("quantity")["sentence"]
    assert agreement["beta[floor]"].startswith("the guides agree: means 0.0")
    assert agreement["total"].startswith("the guides disagree: ")
    assert (result.focus["sentence"] == "").all()
    assert result.advice[0].startswith("No guide can be judged yet: the reference failed its checks")


def _flat(y: np.ndarray) -> None:
    mu = numpyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
    numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def test_a_flat_prior_is_named_where_the_reference_failed(model: Model, truth: Reference) -> None:
    flat = Model(_flat, Dataset("one", {"y": np.array(0.0)}))
    draws = {"mu": truth.draws["total"]}

    class Narrow(Gaussian):
        def draw(self, key: jax.Array, draws: int, sites: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
            return {"mu": np.asarray(jax.random.normal(key, (draws,)))}

    narrow = Narrow(Guide("narrow", lambda fn: fn), FULL, has_density=False)
    (advice,) = compare(flat, Reference(flat, draws, Status.RHAT), [narrow], key=KEY).advice
    assert "Give mu a proper prior, since with a flat one the posterior may be improper; or run NUTS longer" in advice
    (other,) = compare(model, Reference(model, truth.draws, Status.RHAT), [_full_rank()], key=KEY).advice
    assert "proper" not in other


NUMBERS = ["elbo", "elbo_se", "khat", "worst_shift", "worst_shift_se", "worst_sd_ratio", "worst_coverage_90"]


@pytest.mark.parametrize("status", [s for s in Status if not s.has_optimum])
def test_a_fit_without_an_optimum_has_no_numbers(model: Model, truth: Reference, status: Status) -> None:
    elbo = Estimate(276.9, 0.04)
    failed = Reference(model, truth.draws, Status.RHAT)
    fits = [_full_rank(status=status, elbo=elbo), _mean_field()]
    result = compare(model, failed, fits, key=KEY, focus=["total"])
    assert result.agreement.empty  # of two guides one has nothing to say
    assert result.focus.set_index("source")["mean"].isna().to_dict() == {
        "reference": False, "mean_field": False, "full_rank": True,
    }  # fmt: skip
    row = compare(model, truth, fits, key=KEY).guides.loc["full_rank"]
    assert row[NUMBERS].isna().all()
    assert row["worst_shift_quantity"] == ""
    assert row["sentence"] == f"not judged: {status.value}"
    for kept in (Status.BUDGET, Status.UNPROVEN, Status.TOO_FEW_DRAWS):
        row = compare(model, truth, [_full_rank(status=kept, elbo=elbo)], key=KEY).guides.loc["full_rank"]
        assert (row["elbo"], row["elbo_se"]) == elbo
        assert np.isfinite(row["worst_shift"])


@pytest.mark.parametrize("absent", ["none", "empty"])
def test_a_missing_reference_leaves_the_guides(model: Model, absent: str) -> None:
    nothing = None if absent == "none" else Reference(model, {}, Status.FAILED)
    result = compare(model, nothing, [_mean_field(), _full_rank()], key=KEY)
    assert result.table.empty
    assert set(result.sample) == {"mean_field", "full_rank"}
    assert len(result.agreement) == 4
    assert result.guides["sentence"].str.startswith("not judged: ").all()


def test_a_guide_that_raises_is_a_row(model: Model, truth: Reference) -> None:
    class Broken(Gaussian):
        def draw(self, key: jax.Array, draws: int, sites: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
            raise RuntimeError("out of memory")

    broken = Broken(Guide("broken", lambda fn: fn), FULL)
    guides = compare(model, truth, [broken, _full_rank()], key=KEY).guides
    assert guides.loc["broken", "sentence"] == "not judged: an error stopped it: out of memory"
    assert guides.loc["full_rank", "verdict"] == "right"


def test_a_point_mass_has_no_spread(model: Model, truth: Reference) -> None:
    point = _named("map", np.zeros((3, 3)), has_density=False)
    row = compare(model, truth, [point], key=KEY).guides.loc["map"]
    assert (row["verdict"], row["worst_sd_ratio"], row["wrong"]) == ("wrong", 0.0, 4)
    assert row["sentence"].startswith("no: 4 of 4 have no spread at all: the guide is a point there")


def test_a_shift_is_told_with_its_direction(model: Model, truth: Reference) -> None:
    row = compare(model, truth, [_named("moved", FULL, mean=-0.5)], key=KEY).guides.loc["moved"]
    assert row["sentence"].startswith("no: 4 of 4 shifted down (by -0.")
    assert row["sentence"].endswith("; the sds are right")


def test_looser_thresholds_let_more_pass(model: Model, truth: Reference) -> None:
    loose = Thresholds(shift=0.5, sd_ratio=(0.3, 2.0), coverage_90=(0.3, 0.99))
    assert compare(model, truth, [_mean_field()], key=KEY, thresholds=loose).guides["verdict"].item() == "right"


def test_the_tree_comes_back_from_a_file(comparison: Comparison, tmp_path: Path) -> None:
    tree = comparison.to_datatree()
    tree.to_netcdf(tmp_path / "comparison.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "comparison.nc", engine="h5netcdf") as back:
        assert set(back.children) == {"reference", "mean_field", "full_rank", "low_rank", "laplace"}
        xr.testing.assert_identical(back.load(), tree)
        assert back["full_rank"].attrs["verdict"] == "right"
        assert back["reference"]["beta"].dims == ("chain", "draw", "term")
        ratio = back["mean_field/errors"]["sd_ratio"].sel(quantity="total")
        assert float(ratio) == _value(comparison, "mean_field", "total", "sd_ratio")["value"]


def test_samples_are_thinned_evenly(comparison: Comparison) -> None:
    assert comparison.sample["reference"].values.shape == (4, 250, 4)
    assert comparison.sample["mean_field"].values.shape == (1, 1_000, 4)


def _simplex(y: np.ndarray) -> None:
    numpyro.sample("weights", dist.Dirichlet(jnp.ones(1)))
    numpyro.sample("mu", dist.Normal(0.0, 1.0))
    _observe_flat(y)


def test_a_constant_scalar_is_left_out() -> None:
    model = Model(_simplex, Dataset("prior", {"y": np.array(0.0)}), exact=_ones)
    result = compare(model, reference(model, key=KEY, draws=2_500), [Ones(Guide("ones", lambda fn: fn), FULL)], key=KEY)
    constant = result.table[result.table["quantity"] == "weights[0]"]
    assert constant["value"].isna().all()
    assert set(constant["verdict"]) == {""}
    assert result.guides.loc["ones", "quantities"] == 1
    assert result.guides.loc["ones", "sentence"].startswith("yes: the only quantity is right")


def _ones(key: jax.Array, draws: int) -> dict[str, np.ndarray]:
    return {"weights": np.ones((draws, 1)), "mu": np.asarray(jax.random.normal(key, (draws,)))}


class Ones(Gaussian):
    def draw(self, key: jax.Array, draws: int, sites: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
        return _ones(key, draws)

    fresh_log_weights = None


def _topics(y: np.ndarray) -> None:
    with numpyro.plate("topic", 2):
        numpyro.sample("centre", dist.Normal(0.0, 5.0))
    _observe_flat(y)


def _two_centres(key: jax.Array, draws: int) -> dict[str, np.ndarray]:
    return {"centre": np.array([-3.0, 3.0]) + np.asarray(jax.random.normal(key, (draws, 2)))}


class Switched(Gaussian):
    def draw(self, key: jax.Array, draws: int, sites: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
        return {"centre": _two_centres(key, draws)["centre"][:, ::-1]}

    fresh_log_weights = None


@pytest.mark.parametrize("with_reference", [True, False])
def test_guides_are_brought_to_the_references_labels(with_reference: bool) -> None:
    labels = Labels({"centre": -1}, by="centre", count=2)
    model = Model(_topics, Dataset("prior", {"y": np.array(0.0)}), labels=labels, exact=_two_centres)
    truth = reference(model, key=KEY, draws=2_500) if with_reference else None
    result = compare(model, truth, [Switched(Guide("switched", lambda fn: fn), FULL)], key=KEY)
    centres = result.sample["switched"].values.mean(axis=(0, 1))
    assert sorted(np.round(centres / 3)) == [-1, 1]
    if truth is not None:
        assert result.guides.loc["switched", "verdict"] == "right"
        np.testing.assert_array_equal(np.sign(centres), np.sign(truth.draws["centre"].mean(axis=(0, 1))))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m, r: compare(m, r, [_full_rank(), _full_rank()], key=KEY), "with different names, none 'reference'"),
        (lambda m, r: compare(m, r, [_named("reference", FULL)], key=KEY), "got reference again"),
        (lambda m, r: compare(m, r, [_full_rank()], key=KEY, draws=10), "Expected at least 1,000 draws of each guide"),
        (lambda m, r: compare(m, r, [_full_rank()], key=KEY, focus=["gamma"]), "got 'gamma'"),
    ],
    ids=["repeated", "reserved", "draws", "focus"],
)
def test_misuse_has_its_sentence(
    model: Model, truth: Reference, call: Callable[[Model, Reference], Comparison], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        call(model, truth)
