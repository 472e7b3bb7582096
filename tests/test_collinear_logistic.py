"""The collinear logistic regression: its density, its charts, its data and its simulation."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from jax.flatten_util import ravel_pytree
from numpyro.infer import MCMC, NUTS
from scipy.stats import qmc

from models import collinear_logistic as collinear
from models._predictors import RotatedReparam, rotation
from toolkit import Dataset, Model


@pytest.fixture(scope="module")
def small() -> Dataset:
    return collinear.simulate(jax.random.key(3), rows=40, features=4, correlation=0.8)


def _point(model: Model, seed: int = 0) -> dict[str, Any]:
    return model.start(jax.random.key(seed), model.arrays)


def _log_likelihood(data: Dataset, intercept: float, beta: np.ndarray) -> float:
    signs = 2 * data.arrays["y"] - 1
    return float(-np.logaddexp(0, -signs * (intercept + data.arrays["x"] @ beta)).sum())


def test_the_normal_prior_s_density_is_the_one_written_down(small: Dataset) -> None:
    model = collinear.model(small)
    point = _point(model)
    intercept, beta = float(point["intercept"]), np.asarray(point["beta"])
    expected = _log_likelihood(small, intercept, beta)
    expected += scipy.stats.norm(0, 5).logpdf(intercept) + scipy.stats.norm(0, 2.5).logpdf(beta).sum()
    np.testing.assert_allclose(model.log_density(point, model.arrays), expected, rtol=1e-12)


def test_the_horseshoe_s_density_is_the_one_written_down(small: Dataset) -> None:
    model = collinear.model(small, prior="horseshoe")
    point = model.start(jax.random.key(1), model.arrays, chart="plain")  # scales enter by their logarithm
    intercept, beta = float(point["intercept"]), np.asarray(point["beta"])
    shared, local, slab = (np.exp(np.asarray(point[n])) for n in ("global_scale", "local_scale", "slab_variance"))
    scale = (1 / (shared * local) ** 2 + 1 / slab) ** -0.5
    expected = _log_likelihood(small, intercept, beta) + scipy.stats.norm(0, 5).logpdf(intercept)
    expected += scipy.stats.norm(0, scale).logpdf(beta).sum()
    expected += scipy.stats.halfcauchy(0, 0.1).logpdf(shared) + np.log(shared)
    expected += (scipy.stats.halfcauchy().logpdf(local) + np.log(local)).sum()
    expected += scipy.stats.invgamma(4, scale=4 * 2.5**2).logpdf(slab) + np.log(slab)
    np.testing.assert_allclose(model.log_density(point, model.arrays, "plain"), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("prior", "chart", "site"),
    [
        ("normal", "rotated", "beta_rotated"),
        ("horseshoe", "noncentred", "beta_decentered"),
        ("horseshoe", "rotated", "beta_decentered_rotated"),
    ],
)
def test_charts_differ_by_their_jacobian_alone(small: Dataset, prior: str, chart: str, site: str) -> None:
    model = collinear.model(small, prior=prior)
    arrays = model.arrays
    point = model.start(jax.random.key(2), arrays, chart=chart)
    others = {name: value for name, value in point.items() if name != site}

    def beta(z: Any) -> Any:
        return model.constrain({**others, site: z}, arrays, chart=chart)["beta"]

    plain = {**others, "beta": beta(point[site])}
    log_jacobian = jnp.linalg.slogdet(jax.jacobian(beta)(point[site]))[1]
    np.testing.assert_allclose(
        model.log_density(point, arrays, chart),
        model.log_density(plain, arrays, "plain") + log_jacobian,
        rtol=1e-12,
    )


def test_the_rotation_makes_predictors_orthogonal(small: Dataset) -> None:
    x = small.arrays["x"]
    factor = rotation(x)
    orthogonal = x @ np.linalg.inv(factor)
    assert (np.triu(factor, 1) == 0).all()
    assert (np.diagonal(factor) > 0).all()
    np.testing.assert_allclose(orthogonal.T @ orthogonal / len(x), np.eye(4), atol=1e-12)


def test_the_options_choose_the_chart_and_say_what_is_log_concave(small: Dataset) -> None:
    found = {
        (p, c): (m.chart, m.log_concave)
        for p in collinear.PRIORS
        for c in collinear.COEFFICIENTS
        for m in [collinear.model(small, prior=p, coefficients=c)]
    }
    assert found == {
        ("normal", "raw"): ("plain", True),
        ("normal", "qr"): ("rotated", True),
        ("horseshoe", "raw"): ("noncentred", False),
        ("horseshoe", "qr"): ("rotated", False),
    }


def test_the_real_data_are_standardised_and_collinear() -> None:
    data = collinear.dataset()
    x = data.arrays["x"]
    assert x.shape == (569, 30)
    assert data.arrays["y"].sum() == 212
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(x.std(0), 1, rtol=1e-12)
    pairs = np.abs(np.corrcoef(x.T)[np.triu_indices(30, 1)])
    assert (pairs > 0.9).sum() == 21
    assert round(float(np.linalg.cond(x))) in (315, 316)
    assert data.coords["feature"][0] == "mean radius"
    assert collinear.model().dims("beta") == ("feature",)


def test_malignant_masses_are_the_larger_ones() -> None:
    by_outcome = collinear.measurements().groupby("malignant")["mean radius"].mean()
    assert by_outcome[1] > by_outcome[0]


def test_the_file_is_scikit_learn_s() -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn comes with elbowroom[data]")
    source = datasets.load_breast_cancer()
    table = collinear.measurements()
    np.testing.assert_array_equal(table.drop(columns="malignant").to_numpy(), source.data)
    np.testing.assert_array_equal(table["malignant"].to_numpy(), 1 - source.target)


def test_the_mean_field_optimum_is_the_one_that_was_measured() -> None:
    """The best ELBO of a factorised Gaussian was found to be -77.31 nats (rounded) by another program."""
    model = collinear.model()
    arrays = {name: jnp.asarray(value) for name, value in model.arrays.items()}
    start, unravel = ravel_pytree(_point(model))
    size = start.size
    log_density = jax.vmap(lambda z: model.log_density(unravel(z), arrays))

    def elbos(parameters: Any, base: Any) -> Any:
        mean, log_sd = parameters[:size], parameters[size:]
        return log_density(mean[None] + jnp.exp(log_sd)[None] * base) + (log_sd + 0.5 * np.log(2 * np.pi * np.e)).sum()

    loss = jax.jit(jax.value_and_grad(lambda parameters, base: -elbos(parameters, base).mean()))

    def sobol(seed: int) -> np.ndarray:
        return scipy.stats.norm.ppf(qmc.Sobol(size, rng=seed).random(256))

    in_sample, fresh = [], []
    for seed in range(4):
        fitted = scipy.optimize.minimize(
            lambda p, base: [np.asarray(v) for v in loss(p, base)],
            np.zeros(2 * size),
            (sobol(seed),),
            jac=True,
            method="L-BFGS-B",
        )
        in_sample.append(-fitted.fun)
        fresh.append(-float(loss(fitted.x, sobol(100 + seed))[0]))
    rounding = 0.005
    # The best over fixed draws is above the family's best in expectation, the same point on fresh draws below it.
    for values, sign in ((in_sample, 1), (fresh, -1)):
        se = float(np.std(values, ddof=1) / 2)
        assert sign * (np.mean(values) - -77.31) > -(5 * se + rounding)
        assert abs(np.mean(values) - -77.31) < 5 * se + rounding + float(np.mean(in_sample) - np.mean(fresh))


@pytest.mark.parametrize("correlation", [0.0, 0.9, 0.99])
def test_simulate_dials_the_collinearity(correlation: float) -> None:
    rows = 4_000
    data = collinear.simulate(jax.random.key(0), rows=rows, features=3, correlation=correlation)
    pairs = np.corrcoef(data.arrays["x"].T)[np.triu_indices(3, 1)]
    # Fisher's z has sd 1 / sqrt(rows - 3) whatever the correlation.
    assert (np.abs(np.arctanh(pairs) - np.arctanh(correlation)) < 5 / np.sqrt(rows - 3)).all()
    model = collinear.model(data)
    assert {name: value.shape for name, value in data.truth.items()} == {
        name: model.sites[name].shape for name in model.latents
    }


def test_simulate_draws_outcomes_from_its_truth() -> None:
    data = collinear.simulate(jax.random.key(1), rows=4_000, features=3, correlation=0.5)
    x = np.column_stack([np.ones(4_000), data.arrays["x"]])
    p = scipy.special.expit(x @ np.append(data.truth["intercept"], data.truth["beta"]))
    score = x.T @ (data.arrays["y"] - p)
    assert (np.abs(score) < 5 * np.sqrt(np.square(x).T @ (p * (1 - p)))).all()


def test_simulate_is_fixed_by_its_key() -> None:
    first, again, other = (collinear.simulate(jax.random.key(k), rows=20, features=2) for k in (0, 0, 1))
    for name in ("x", "y"):
        np.testing.assert_array_equal(first.arrays[name], again.arrays[name])
    assert not np.array_equal(first.arrays["x"], other.arrays["x"])
    assert not np.array_equal(first.truth["beta"], other.truth["beta"])


def _xy(x: Any, y: Any) -> Dataset:
    return Dataset("mine", {"x": np.asarray(x, float), "y": np.asarray(y)})


WIDE = np.random.default_rng(0).normal(size=(3, 5))
COPIED = np.repeat(np.random.default_rng(0).normal(size=(9, 1)), 2, axis=1)
ERRORS = {
    "prior": (lambda: collinear.model(prior="flat"), "one of normal, horseshoe; got 'flat'"),
    "coefficients": (lambda: collinear.model(coefficients="svd"), "one of raw, qr; got 'svd'"),
    "no y": (lambda: collinear.model(Dataset("mine", {"x": WIDE})), "it lacks y"),
    "lengths": (lambda: collinear.model(_xy(WIDE, [0, 1])), "got shapes (3, 5) and (2,)"),
    "vector": (lambda: collinear.model(_xy([1.0, 2.0], [0, 1])), "got shapes (2,) and (2,)"),
    "outcomes": (lambda: collinear.model(_xy(WIDE, [0, 1, 2])), "0 or 1; got 2 among them"),
    "wide": (lambda: collinear.model(_xy(WIDE, [0, 1, 1]), coefficients="qr"), "got rank 3 from 3 rows"),
    "copies": (lambda: collinear.model(_xy(COPIED, [0] * 9), coefficients="qr"), "got rank 1 from 9 rows"),
    "correlation": (lambda: collinear.simulate(jax.random.key(0), correlation=1.0), "below 1; got 1.0"),
    "rows": (lambda: collinear.simulate(jax.random.key(0), rows=0), "at least 1 row and 1 feature; got 0 and 10"),
    "observed": (
        lambda: RotatedReparam(np.eye(2))("y", None, np.zeros(2)),
        "Expected a latent site to rotate; got 'y'",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_misuse_gets_its_sentence(case: str) -> None:
    call: Callable[[], Any] = ERRORS[case][0]
    with pytest.raises(ValueError, match=re.escape(ERRORS[case][1])):
        call()


def test_dependent_columns_are_no_obstacle_without_rotation() -> None:
    model = collinear.model(_xy(COPIED, [0, 1] * 4 + [0]))
    assert "rotated" not in model.charts


@pytest.mark.slow
def test_the_truth_lies_in_90_percent_intervals_at_the_nominal_rate() -> None:
    seeds, size = 50, {"rows": 150, "features": 5, "correlation": 0.9}
    first = collinear.model(collinear.simulate(jax.random.PRNGKey(0), **size))
    sampler = MCMC(NUTS(first.bound()), num_warmup=500, num_samples=1_000, progress_bar=False, jit_model_args=True)
    inside = []
    for seed in range(seeds):
        data = collinear.simulate(jax.random.PRNGKey(seed), **size)
        sampler.run(jax.random.PRNGKey(1_000 + seed), **data.arrays)
        drawn = sampler.get_samples()
        draws = np.column_stack([drawn["intercept"], drawn["beta"]])
        low, high = np.quantile(draws, [0.05, 0.95], axis=0)
        truth = np.append(data.truth["intercept"], data.truth["beta"])
        inside.append((low <= truth) & (truth <= high))
    # The truth is drawn from the prior, so that each number's rate is 0.9 exactly.
    rates = np.mean(inside, axis=0)
    assert (np.abs(rates - 0.9) < 5 * np.sqrt(0.9 * 0.1 / seeds)).all()
    # Over all numbers of a seed the rate varies less; its spread over seeds gives its error.
    share = np.mean(inside, axis=1)
    assert abs(share.mean() - 0.9) < 5 * share.std(ddof=1) / np.sqrt(seeds)
