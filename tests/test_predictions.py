"""Predictions against closed forms: of a linear regression with known noise everything predictive is Gaussian."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest
from arviz_base import from_dict
from arviz_stats import loo, loo_approximate_posterior
from scipy.special import expit
from scipy.stats import multivariate_normal, norm

from toolkit import Dataset, Model, Status, reference
from toolkit.comparison.leave_one_out import LeaveOneOut, leave_one_out
from toolkit.comparison.moment_matching import moment_matched
from toolkit.comparison.predictions import Predictions, predictions
from toolkit.comparison.predictive import Data
from toolkit.comparison.replicated import IN_SAMPLE, LEFT_OUT
from toolkit.comparison.verdicts import Thresholds
from toolkit.modelling.observations import log_likelihoods, observed, replicates
from toolkit.reporting.figures import calibration
from toolkit.reporting.palette import looks
from toolkit.reporting.predictive import predictions_section
from toolkit.variational.guides import Guide

KEY = jax.random.PRNGKey(0)
ROWS = 40
rng = np.random.default_rng(3)
X = np.column_stack([np.ones(ROWS), rng.normal(size=ROWS)])
Y = X @ [0.5, -1.0] + rng.normal(size=ROWS)


def _linear(x: np.ndarray, y: np.ndarray | None = None) -> None:
    beta = numpyro.sample("beta", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    with numpyro.plate("row", x.shape[0]):
        numpyro.sample("y", dist.Normal(x @ beta, 1.0), obs=y)


def posterior(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    covariance = np.linalg.inv(x.T @ x + np.eye(x.shape[1]) / 4.0)
    return covariance @ x.T @ y, covariance


def linear(y: np.ndarray = Y) -> Model:
    mean, covariance = posterior(X, y)

    def exact(key: jax.Array, draws: int) -> dict[str, np.ndarray]:
        return {"beta": np.asarray(jax.random.multivariate_normal(key, mean, covariance, (draws,)))}

    return Model(_linear, Dataset("line", {"x": X, "y": y}), exact=exact)


def known_elpd(y: np.ndarray = Y) -> np.ndarray:
    """Log density of each row left out."""
    found = []
    for i in range(ROWS):
        others = np.arange(ROWS) != i
        mean, covariance = posterior(X[others], y[others])
        found.append(norm.logpdf(y[i], X[i] @ mean, np.sqrt(1.0 + X[i] @ covariance @ X[i])))
    return np.array(found)


class Named:
    """What a guide is called."""

    name: str

    @property
    def guide(self) -> Guide:
        return Guide(self.name, lambda model: None)


@dataclass(frozen=True)
class Gaussian(Named):
    """A guide with a density, known in closed form."""

    name: str
    mean: np.ndarray
    covariance: np.ndarray
    status: Status = Status.ARRIVED
    certificate: None = None
    usable: bool = True

    @property
    def fresh_log_weights(self) -> np.ndarray:
        return self.log_weights_at(self.draws(9))

    def draws(self, seed: int = 1, count: int = 2_000) -> dict[str, np.ndarray]:
        own = np.random.default_rng(seed)
        return {"beta": own.multivariate_normal(self.mean, self.covariance, count)}

    def log_weights_at(self, draws: Any) -> np.ndarray:
        log_p = multivariate_normal(*posterior(X, Y)).logpdf(draws["beta"])
        return np.asarray(log_p - multivariate_normal(self.mean, self.covariance).logpdf(draws["beta"]))


@dataclass(frozen=True)
class DrawsAlone(Named):
    """A guide without a density."""

    name: str
    status: Status = Status.ARRIVED
    fresh_log_weights: None = None
    usable: bool = True


def guides() -> list[Gaussian]:
    mean, covariance = posterior(X, Y)
    return [
        Gaussian("same", mean, covariance),
        Gaussian("narrow", mean, 0.25 * covariance),
        Gaussian("shifted", mean + np.array([1.0, 0.0]), covariance),
    ]


def known_loss(guide: Gaussian) -> float:
    """KL of each row's predictive normal to the guide's, added up."""
    mean, covariance = posterior(X, Y)
    p, q = (1.0 + np.einsum("ij,jk,ik->i", X, c, X) for c in (covariance, guide.covariance))
    apart = X @ (mean - guide.mean)
    return float(0.5 * (p / q + apart**2 / q - 1.0 + np.log(q / p)).sum())


def predicted(model: Model, fits: list[Any], *, key: jax.Array = KEY, **options: Any) -> Predictions:
    own = options.pop("own", None) or {fit.name: fit.draws() for fit in fits}
    settings: dict[str, Any] = {"thresholds": Thresholds(), "than": "the reference", "judged": True} | options
    return predictions(model, reference(model, key=key), fits, own, key=jax.random.fold_in(key, 1), **settings)


@pytest.fixture(scope="module")
def found() -> Predictions:
    return predicted(linear(), guides())


def scores(found: Predictions) -> pd.DataFrame:
    return found.scores.set_index("source")


# -- what predicting with a guide costs -------------------------------------------------------------------------------


def test_the_loss_is_the_divergence_of_the_predictive_distributions(found: Predictions) -> None:
    for guide in guides():
        row = scores(found).loc[guide.name]
        assert abs(row["loss"] - known_loss(guide)) < 3 * row["loss_se"] < 3 * (0.02 + 0.1 * known_loss(guide)), (
            guide.name
        )
    assert scores(found).loc["shifted", "loss"] > 10.0 > scores(found).loc["narrow", "loss"]


@pytest.mark.slow
def test_the_error_of_the_loss_is_as_large_as_its_spread() -> None:
    model, guide = linear(), guides()[2]
    rows = [
        scores(predicted(model, [guide], key=jax.random.PRNGKey(seed), own={"shifted": guide.draws(seed)})).loc[
            "shifted"
        ]
        for seed in range(12)
    ]
    z = np.array([(row["loss"] - known_loss(guide)) / row["loss_se"] for row in rows])
    assert abs(z.mean()) < 4 / np.sqrt(z.size)
    assert 0.6 < np.sqrt(np.square(z).mean()) < 1.5


def test_verdicts_follow_the_threshold(found: Predictions) -> None:
    assert list(scores(found).loc[["same", "narrow", "shifted"], "verdict"]) == ["right", "right", "wrong"]
    assert "predicts single observations worse than the reference" in scores(found).loc["shifted", "sentence"]
    assert scores(found).loc["reference", "verdict"] == ""
    strict = scores(predicted(linear(), guides()[2:], thresholds=Thresholds(elpd=40.0)))
    assert strict.loc["shifted", "verdict"] == "right"
    silent = scores(predicted(linear(), guides()[2:], judged=False))
    assert silent.loc["shifted", "verdict"] == silent.loc["shifted", "sentence"] == ""


def test_zeros_and_ones_are_summed_over_exactly() -> None:
    def coins(y: np.ndarray | None = None) -> None:
        logit = numpyro.sample("logit", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.BernoulliLogits(logit).expand([30]), obs=y)

    def exact(key: jax.Array, draws: int) -> dict[str, np.ndarray]:
        return {"logit": np.asarray(0.2 + 0.3 * jax.random.normal(key, (draws,)))}

    model = Model(coins, Dataset("coins", {"y": np.array([0, 1, 1] * 10)}), exact=exact)
    own = {"q": {"logit": 0.6 + 0.3 * np.random.default_rng(0).standard_normal(2_000)}}
    found = predicted(model, [DrawsAlone("q")], own=own)
    assert scores(found).loc["q", "loo_problem"] == "its density is not known, which leave-one-out by its draws needs"
    grid = np.random.default_rng(5).standard_normal(400_000)
    p, q = expit(0.2 + 0.3 * grid).mean(), expit(0.6 + 0.3 * grid).mean()
    known = 30 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    row = scores(found).loc["q"]
    assert abs(row["loss"] - known) < 3 * row["loss_se"]
    assert set(found.calibration["measure"]) == {"Brier score"}
    assert set(found.checks["statistic"]) == {"mean"}


# -- leave-one-out ----------------------------------------------------------------------------------------------------


def test_left_out_densities_are_the_known_ones(found: Predictions) -> None:
    row = scores(found).loc["reference"]
    assert abs(row["loo"] - known_elpd().sum()) < 3 * row["loo_se"]
    assert row["loo_se"] < 0.1
    assert row["unreliable"] == 0
    z = (found.left_out["elpd"] - known_elpd()) / found.left_out["elpd_se"]
    assert 0.5 < np.sqrt(np.square(z).mean()) < 1.6
    assert row["loo_data_se"] == pytest.approx(np.sqrt(ROWS) * known_elpd().std(), rel=0.05)


def test_a_guides_draws_are_weighted_to_the_posterior(found: Predictions) -> None:
    """A narrow guide's weights have a heavy tail, which cannot be trusted; a wide one's are bounded."""
    mean, covariance = posterior(X, Y)
    wide = Gaussian("wide", mean, 2.0 * covariance)
    row = scores(predicted(linear(), [wide])).loc["wide"]
    assert abs(row["loo"] - known_elpd().sum()) < 3 * row["loo_se"]
    narrow = scores(found).loc["narrow"]
    assert np.isnan(narrow["loo"])
    assert narrow["loo_problem"].endswith("its draws are too far from the posterior to be weighted")


def gaussian_likelihoods(seed: int, scale: float = 1.0, draws: int = 4_000) -> tuple[np.ndarray, np.ndarray]:
    """Log likelihoods at draws of the posterior, widened, and the log ratios of the posterior to what was drawn."""
    mean, covariance = posterior(X, Y)
    beta = np.random.default_rng(seed).multivariate_normal(mean, scale**2 * covariance, draws)
    ratios = multivariate_normal(mean, covariance).logpdf(beta) - multivariate_normal(
        mean, scale**2 * covariance
    ).logpdf(beta)
    return norm.logpdf(Y, beta @ X.T, 1.0), ratios


def test_leave_one_out_is_arvizs() -> None:
    likelihoods, ratios = gaussian_likelihoods(1, 1.3)
    tree = from_dict(
        {"posterior": {"z": ratios.reshape(4, -1)}, "log_likelihood": {"y": likelihoods.reshape(4, -1, ROWS)}}
    )
    by_arviz = loo(tree, pointwise=True, reff=1.0)
    own = leave_one_out(likelihoods, (4, 1_000))
    assert np.allclose(own.elpd, by_arviz.elpd_i, atol=2e-3)
    log_p = by_arviz.elpd_i.copy(data=np.zeros(ROWS)).sum() + tree["posterior"]["z"]
    weighted = loo_approximate_posterior(tree, log_p=log_p, log_q=0.0 * log_p, pointwise=True)
    mine = leave_one_out(likelihoods, (4_000,), log_ratios=ratios)
    assert np.allclose(mine.elpd, weighted.elpd_i, atol=2e-2)
    assert abs(mine.elpd.sum() - weighted.elpd) < mine.error


@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_the_error_of_leave_one_out_is_as_large_as_its_spread(scale: float) -> None:
    known, z = known_elpd().sum(), []
    for seed in range(100):
        likelihoods, ratios = gaussian_likelihoods(seed, scale, 1_000)
        own = leave_one_out(likelihoods, (1_000,), log_ratios=None if scale == 1.0 else ratios)
        z.append((own.elpd.sum() - known) / own.error)
        assert 0 < own.optimism_error < 1
    assert abs(np.mean(z)) < 0.5
    assert 0.8 < np.std(z) < 1.25


def test_an_impossible_observation_has_no_density() -> None:
    likelihoods, _ = gaussian_likelihoods(0, draws=500)
    likelihoods[3, 7] = -np.inf
    own = leave_one_out(likelihoods, (500,))
    assert own.unreliable.tolist() == [i == 7 for i in range(ROWS)]
    assert own.elpd[7] == -np.inf


def test_moment_matching_mends_what_weights_alone_cannot_and_nothing_by_halves() -> None:
    """One row ever further from all others: left out, the posterior is elsewhere."""
    mended = []
    for away in (5.0, 7.0, 10.0, 12.0):
        y = Y.copy()
        y[np.argmax(np.abs(X[:, 1]))] += away
        model = linear(y)
        drawn = reference(model, key=KEY)
        beta = {"beta": np.asarray(drawn.draws["beta"]).reshape(-1, 2)}
        chosen = {"y": np.arange(ROWS)}
        likelihoods = log_likelihoods(model, beta, chosen)
        plain = leave_one_out(likelihoods, np.asarray(drawn.draws["beta"]).shape[:2])
        found = moment_matched(model, beta, chosen, plain, likelihoods)
        (bad,) = np.flatnonzero(plain.unreliable)
        if found.unreliable.any():
            assert found is plain
            continue
        known = known_elpd(y)[bad]
        assert abs(found.elpd[bad] - known) < 4 * found.own_error < abs(plain.elpd[bad] - known), away
        assert found.error < plain.error
        mended.append(away)
    assert len(mended) >= 2


def test_moment_matching_leaves_alone_what_is_right() -> None:
    likelihoods, _ = gaussian_likelihoods(0)
    plain = leave_one_out(likelihoods, (4, 1_000))
    assert moment_matched(linear(), {}, {}, plain, likelihoods) is plain


# -- data made anew, and calibration ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_ranks_of_left_out_observations_are_uniform_and_shares_nominal() -> None:
    """Over many sets of data, since in one they share its noise."""
    shares, ranks = [], []
    for seed in range(5):
        own = np.random.default_rng(seed)
        y = X @ own.normal(0.0, 2.0, 2) + own.normal(size=ROWS)
        made = predicted(linear(y), [])
        table = made.calibration
        left = table[table["kind"] == LEFT_OUT].set_index("measure")
        shares.append(left.loc[["in the central 50%", "in the central 90%"], "value"].to_numpy())
        ranks.append(made.observations.loc[made.observations["kind"] == LEFT_OUT, "value"].to_numpy())
    count = 5 * ROWS
    for nominal, share in zip((0.5, 0.9), np.mean(shares, axis=0), strict=True):
        assert abs(share - nominal) < 4 * np.sqrt(nominal * (1 - nominal) / count)
    pooled = np.sort(np.concatenate(ranks))
    assert np.abs(pooled - (np.arange(count) + 0.5) / count).max() < np.sqrt(np.log(2 / 0.001) / (2 * count))


def test_a_guide_that_predicts_elsewhere_is_seen_in_its_intervals() -> None:
    mean, covariance = posterior(X, Y)
    far = Gaussian("far", mean + np.array([3.0, 0.0]), covariance)
    table = predicted(linear(), [guides()[0], far]).calibration
    assert set(table["kind"]) == {IN_SAMPLE, LEFT_OUT}
    table = table[(table["measure"] == "in the central 50%") & (table["kind"] == IN_SAMPLE)].set_index("source")
    assert table.loc["far", "difference"] < -3 * table.loc["far", "difference_se"]
    assert abs(table.loc["same", "difference"]) <= 3 * max(table.loc["same", "difference_se"], 0.03)


def test_replicates_are_what_the_model_makes() -> None:
    new = replicates(linear(), {"beta": np.tile([0.5, -1.0], (3_000, 1))}, KEY)["y"]
    assert new.shape == (3_000, ROWS)
    z = (new.mean(axis=0) - X @ [0.5, -1.0]) * np.sqrt(3_000)
    assert np.abs(z).max() < 4.5
    assert abs(np.square(new - X @ [0.5, -1.0]).mean() - 1.0) < 5 * np.sqrt(2 / new.size)


def test_data_that_the_model_would_hardly_make_are_told() -> None:
    """Counts with twice the spread of a Poisson's."""
    own = np.random.default_rng(0)
    counts = own.poisson(own.gamma(2.0, 4.0, 60))

    def poisson(y: np.ndarray | None = None) -> None:
        rate = numpyro.sample("rate", dist.Gamma(1.0, 0.1))
        numpyro.sample("y", dist.Poisson(rate).expand([60]), obs=y)

    def exact(key: jax.Array, draws: int) -> dict[str, np.ndarray]:
        return {"rate": np.asarray(jax.random.gamma(key, 1.0 + counts.sum(), (draws,)) / 60.1)}

    found = predicted(Model(poisson, Dataset("counts", {"y": counts}), exact=exact), [])
    table = found.checks.set_index("statistic")
    assert set(table.index) == {"mean", "share of zeros", "sd", "largest"}
    assert table.loc["sd", "p_value"] < 0.01
    assert 0.2 < table.loc["mean", "p_value"] < 0.8
    assert (table["p_value_se"] > 0).all()


# -- what cannot be looked at -----------------------------------------------------------------------------------------


def test_observations_are_told_by_their_kind() -> None:
    def several(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("a", dist.Bernoulli(logits=z).expand([3]), obs=a)
        numpyro.sample("b", dist.Poisson(jnp.exp(z)).expand([4]), obs=b)
        numpyro.sample("c", dist.Normal(z, 1.0).expand([5, 2]).to_event(1), obs=c)

    data = {"a": np.array([0, 1, 1]), "b": np.array([0, 1, 0, 1]), "c": np.zeros((5, 2))}
    found = observed(Model(several, Dataset("several", data)))
    assert {name: (site.kind, site.units) for name, site in found.items()} == {
        "a": ("binary", 3),
        "b": ("count", 4),
        "c": ("real", 5),
    }
    assert all(np.array_equal(found[name].values, data[name]) for name in data)


def test_without_observed_sites_or_draws_there_is_a_sentence() -> None:
    def factor(y: np.ndarray) -> None:
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.factor("likelihood", -0.5 * (y - z) ** 2)

    model = Model(factor, Dataset("factor", {"y": np.array(1.0)}))
    nothing = predictions(model, None, [], {}, key=KEY, thresholds=Thresholds(), than="it", judged=False)
    assert nothing.problem.endswith("it is a factor")
    none = predictions(linear(), None, [], {}, key=KEY, thresholds=Thresholds(), than="it", judged=False)
    assert none.problem == "there are no reference draws to compare with"
    assert none.scores.empty


def test_a_kept_column_has_the_weights_of_its_observation() -> None:
    likelihoods, _ = gaussian_likelihoods(2, draws=1_000)
    keep = np.array([3, 11])
    own: LeaveOneOut = leave_one_out(likelihoods, (1_000,), keep=keep)
    for column, i in enumerate(keep):
        known = np.exp(own.log_weights[:, column]) @ np.exp(likelihoods[:, i])
        assert np.log(known) == pytest.approx(own.elpd[i])


# -- awkward data -----------------------------------------------------------------------------------------------------


def known(fn: Any, data: dict[str, Any], site: str, draws: np.ndarray) -> Model:
    """A model whose posterior is said to be these draws, all of them."""

    def exact(key: jax.Array, count: int) -> dict[str, np.ndarray]:
        return {site: draws[np.asarray(jax.random.randint(key, (count,), 0, len(draws)))]}

    return Model(fn, Dataset("known", data), exact=exact)


def test_an_observation_of_many_numbers_has_a_loss_or_a_reason() -> None:
    """Exact draws of twenty slopes, known from one vector: few of them explain another one."""
    own = np.random.default_rng(0)
    x = own.normal(size=(100, 20))
    y = x @ own.normal(size=20) + own.normal(size=100)

    def vector(x: np.ndarray, y: np.ndarray | None = None) -> None:
        slope = numpyro.sample("slope", dist.Normal(0.0, 1.0).expand([20]).to_event(1))
        numpyro.sample("y", dist.Normal(x @ slope, 1.0).to_event(1), obs=y)

    covariance = np.linalg.inv(x.T @ x + np.eye(20))
    draws = own.multivariate_normal(covariance @ x.T @ y, covariance, 20_000)
    found = predicted(
        known(vector, {"x": x, "y": y}, "slope", draws), [DrawsAlone("q")], own={"q": {"slope": draws[:2_000]}}
    )
    row = scores(found).loc["q"]
    assert row["verdict"] == ""
    assert row["problem"].startswith("its draws are too few to average the predictive density")
    left_out = found.calibration[found.calibration["kind"] == LEFT_OUT]
    assert found.left_out["elpd_se"].isna().all()
    assert left_out.empty  # the only observation's weights cannot be trusted
    assert found.calibration["se"].isna().all()  # of one observation there is no spread


def masked(y: np.ndarray, known: np.ndarray) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("row", y.shape[0]):
        numpyro.sample("y", dist.Normal(mu, 1.0).mask(known), obs=y)


def test_what_is_masked_is_no_data() -> None:
    own = np.random.default_rng(0)
    y, seen = own.normal(size=90), np.arange(90) % 3 > 0
    y[~seen] = -999.0
    draws = y[seen].mean() + own.normal(size=4_000) / np.sqrt(61)
    found = predicted(known(masked, {"y": y, "known": seen}, "mu", draws), [])
    assert scores(found).loc["reference", "observations"] == 60
    assert set(found.observations["position"]) == set(np.flatnonzero(seen))
    table = found.checks.set_index("statistic")
    assert table.loc["smallest", "observed"] == y[seen].min()
    assert (table["p_value"] > 0.01).all()


def test_whole_numbers_under_a_normal_have_replicates_that_are_not() -> None:
    own = np.random.default_rng(0)
    y = np.round(own.normal(0.0, 1.2, 200)).astype(int)

    def rounded(y: np.ndarray | None = None) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu, 1.2).expand([200]), obs=y)

    found = predicted(known(rounded, {"y": y}, "mu", y.mean() + own.normal(size=4_000) * 1.2 / np.sqrt(200)), [])
    assert 0.05 < found.checks.set_index("statistic").loc["sd", "p_value"] < 0.95


def test_several_sites_are_added_up_and_told_apart() -> None:
    own = np.random.default_rng(0)

    def two(a: np.ndarray | None = None, b: np.ndarray | None = None) -> None:
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("a", dist.Bernoulli(logits=z).expand([30]), obs=a)
        numpyro.sample("b", dist.Normal(z, 1.0).expand([50]), obs=b)

    data = {"a": own.integers(0, 2, 30), "b": own.normal(size=50)}
    draws = own.normal(size=4_000) * 0.13
    wide = DrawsAlone("wide")
    found = predicted(known(two, data, "z", draws), [wide], own={"wide": {"z": 0.6 + draws[:2_000]}})
    assert scores(found).loc["wide", "observations"] == 80
    p, q = 0.5, expit(0.6 + draws).mean()
    coins = 30 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    normals = 50 * 0.5 * 0.6**2 / (1 + 0.13**2)
    row = scores(found).loc["wide"]
    assert abs(row["loss"] - coins - normals) < 3 * row["loss_se"] + 0.1  # draws of a mean that is not quite 0
    assert row["loss_se"] < 2.0
    assert dict(zip(found.calibration["site"], found.calibration["measure"], strict=True)).keys() == {"a", "b"}


def test_a_guide_that_rules_out_what_may_come_loses_without_limit() -> None:
    def upto(y: np.ndarray | None = None) -> None:
        top = numpyro.sample("top", dist.LogNormal(0.0, 1.0))
        numpyro.sample("y", dist.Uniform(0.0, top).expand([10]), obs=y)

    own = np.random.default_rng(0)
    model = known(upto, {"y": own.uniform(size=10)}, "top", 1.5 + own.uniform(size=4_000))
    found = predicted(model, [DrawsAlone("low")], own={"low": {"top": 1.0 + 0.1 * own.uniform(size=2_000)}})
    row = scores(found).loc["low"]
    assert row["loss"] == np.inf
    assert row["verdict"] == "wrong"


def test_a_draw_that_is_no_number_gives_no_verdict() -> None:
    beta = guides()[0].draws()["beta"]
    beta[7] = np.nan
    row = scores(predicted(linear(), [DrawsAlone("broken")], own={"broken": {"beta": beta}})).loc["broken"]
    assert np.isnan(row["loss"])
    assert row["problem"] == "under some draws a density is no number"
    assert row["verdict"] == ""


def test_a_sample_stands_for_all() -> None:
    own = np.random.default_rng(0)
    each = np.r_[own.normal(-50.0, 1.0, 10), own.normal(-1.0, 1.0, 400)]
    sites: Any = {"few": SimpleNamespace(places=np.arange(10)), "many": SimpleNamespace(places=np.arange(4_000))}
    data = Data(sites, {"few": np.arange(10), "many": np.arange(400)})
    total = data.total(each)
    assert abs(total.value - (each[:10].sum() + 4_000 * -1.0)) < 4 * total.se
    assert 0.8 < total.se / np.sqrt(4_000**2 * 0.9 / 400) < 1.2


def test_equal_probabilities_are_taken_together() -> None:
    own = np.random.default_rng(0)
    chance = np.repeat([0.25, 0.75], 100)
    outcomes = own.uniform(size=200) < chance
    values, frequency = calibration._fitted(chance, outcomes)
    assert values.tolist() == [0.25, 0.75]
    assert frequency.tolist() == [outcomes[:100].mean(), outcomes[100:].mean()]


# -- what the report says ---------------------------------------------------------------------------------------------


def told(found: Predictions, *, trusted: bool = True) -> str:
    section = predictions_section(found, looks(["narrow"]), "NUTS", Thresholds(), trusted=trusted)
    return " ".join(block for block in section.blocks if isinstance(block, str))


def test_outliers_and_misfit_are_told_in_sentences() -> None:
    """Noise three times as wide as the model says, and one row far off."""
    y = X @ [0.5, -1.0] + 3.0 * np.random.default_rng(1).normal(size=ROWS)
    y[5] += 20.0
    made = predicted(linear(y), [])
    text = told(made)
    assert "p_loo, " in text
    assert "is larger than the number of parameters, 2:" in text
    assert "NUTS expects observation 5 of y least" in text
    assert "lie in NUTS's central 90% intervals: the model's predictions are too narrow" in text
    assert "The model would hardly make these data: " in text
    untrusted = told(made, trusted=False)
    assert untrusted.startswith("No verdict is given here")
    assert "hardly make" not in untrusted


def test_a_guide_whose_sums_spread_too_little_is_told(found: Predictions) -> None:
    """Half as uncertain of every coefficient, it predicts single rows well, and their mean not."""
    assert scores(found).loc["narrow", "verdict"] == "right"
    rows = found.checks[(found.checks["source"] == "narrow") & (found.checks["statistic"] == "mean")]
    assert rows["sd_ratio"].item() < 0.9
    assert "narrow: the mean of y in new data spreads 0." in told(found)
    assert "No guide" not in told(found)


def test_few_observations_that_all_lie_inside_accuse_nobody() -> None:
    """All of twelve in their 90 % intervals: three chances in ten, and no share without an error."""
    own = np.random.default_rng(0)
    y = np.linspace(-1.2, 1.2, 12)

    def few(y: np.ndarray | None = None) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu, 1.0).expand([12]), obs=y)

    made = predicted(known(few, {"y": y}, "mu", own.normal(size=4_000) / np.sqrt(13)), [])
    share = made.calibration[made.calibration["measure"] == "in the central 90%"]
    assert (share["value"] == 1.0).all()
    assert (share["se"] > 0.1).all()
    assert "intervals: the model's predictions are too" not in told(made)
