"""Gradients' variances against closed forms, and the law that all estimators have one mean."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest
import scipy.stats
from numpyro.distributions import constraints

import models
from toolkit import Dataset, GradientNoise, Guide, Model, expectation_gradients, fit, gradient_noise
from toolkit.variational.building import build_guide
from toolkit.variational.gradient_estimators import (
    ESTIMATORS,
    Pieces,
    Sums,
    add_batch,
    leave_out_error,
    reparameterised,
    score_function,
    score_with_baseline,
)
from toolkit.variational.guide_gradients import guide_gradients
from toolkit.variational.guides import find_guide
from toolkit.variational.objectives import log_weight

KEY = jax.random.key(0)
TARGETS = models.load("gaussian_target")


def normal(p: Any) -> dist.Distribution:
    return dist.Normal(p["mu"], p["sigma"])


def square(z: Any) -> Any:
    return z**2


def row(noise: GradientNoise, estimator: str, draws: int, parameter: str, element: str = "") -> pd.Series:
    table = noise.table
    chosen = table[
        (table["estimator"] == estimator)
        & (table["draws"] == draws)
        & (table["parameter"] == parameter)
        & (table["element"] == element)
    ]
    assert len(chosen) == 1
    return chosen.iloc[0]


def assert_near(found: pd.Series, known: float) -> None:
    assert abs(found["variance"] - known) < 5 * found["variance_se"], f"{found.to_dict()} is not {known}"


@pytest.mark.parametrize(("mu", "sigma"), [(1.0, 0.5), (0.0, 1.0), (-2.0, 2.0)])
def test_variances_for_a_square_under_a_normal_are_the_known_ones(mu: float, sigma: float) -> None:
    """Of the gradient in mu; a baseline makes a sample covariance, whose variance is known for any number of draws."""
    at = {"mu": mu, "sigma": sigma}
    noise = expectation_gradients(square, normal, at, key=KEY, draws=(1, 2, 8, 512), repeats=200)
    assert_near(row(noise, "reparameterised", 1, "mu"), 4 * sigma**2)
    assert_near(row(noise, "reparameterised", 1, "sigma"), 4 * mu**2 + 8 * sigma**2)
    assert_near(row(noise, "score", 1, "mu"), mu**4 / sigma**2 + 14 * mu**2 + 15 * sigma**2)
    for draws in (2, 8, 512):
        of_f, mixed = 4 * mu**2 * sigma**2 + 2 * sigma**4, 12 * mu**2 + 10 * sigma**2
        known = mixed - (draws - 2) / (draws - 1) * 4 * mu**2 + of_f / sigma**2 / (draws - 1)
        assert_near(row(noise, "score_baseline", draws, "mu"), known / draws)
    # The other draw's f alone is what two draws know of the best constant; many know it to be mu^2 + 3 sigma^2.
    two = [row(noise, name, 2, "mu")["variance"] for name in ("score_baseline", "score_control_variate")]
    assert two[0] == pytest.approx(two[1], rel=1e-9)
    assert_near(row(noise, "score_control_variate", 512, "mu"), (8 * mu**2 + 6 * sigma**2) / 512)
    for estimator in ESTIMATORS[:4]:
        found = row(noise, estimator, 8, "mu")
        assert abs(found["mean"] - 2 * mu) < 5 * found["mean_se"]
    share = noise.equivalent_draws("score", of="score")
    assert (share.value, share.se) == (1.0, 0.0)


def test_the_number_of_equivalent_draws_is_the_ratio_of_the_known_variances() -> None:
    noise = expectation_gradients(square, lambda p: dist.Normal(p["mu"], 1.0), {"mu": 1.0}, key=KEY, draws=(1, 16))
    found = noise.equivalent_draws("score")
    assert abs(found.value - 30 / 4) < 5 * found.se
    totals = noise.totals.set_index(["estimator", "draws"])
    assert (
        abs(totals.loc[("reparameterised", 1), "relative"] - 1.0)
        < 5 * totals.loc[("reparameterised", 1), "relative_se"]
    )
    assert abs(noise.square.value - 4.0) < 5 * noise.square.se
    assert noise.estimates == 400
    for name in ("score", "reparameterised"):
        one, many = (row(noise, name, draws, "mu") for draws in (1, 16))
        assert abs(16 * many["variance"] - one["variance"]) < 5 * np.hypot(16 * many["variance_se"], one["variance_se"])


def test_draws_that_cannot_be_moved_leave_the_score_function() -> None:
    rate = 3.0
    noise = expectation_gradients(
        lambda z: 1.0 * z, lambda p: dist.Poisson(p["rate"]), {"rate": rate}, key=KEY, draws=(1,)
    )
    assert noise.absent["reparameterised"] == "Poisson has no draws that move with its parameters"
    counts = np.arange(60)
    terms = counts * (counts / rate - 1)
    probabilities = scipy.stats.poisson(rate).pmf(counts)
    known = probabilities @ terms**2 - 1.0
    found = row(noise, "score", 1, "rate")
    assert_near(found, float(known))
    assert abs(found["mean"] - 1.0) < 5 * found["mean_se"]
    assert set(noise.table["estimator"]) == {"score"}
    with pytest.raises(ValueError, match="one of score; got 'reparameterised'"):
        noise.equivalent_draws("score")


def test_a_support_that_moves_leaves_the_path() -> None:
    """The mean of z^2 under Uniform(0, a) is a^2 / 3; the score, -1 / a everywhere, would say -a / 3."""
    noise = expectation_gradients(square, lambda p: dist.Uniform(0.0, p["a"]), {"a": 2.0}, key=KEY, draws=(1,))
    assert set(noise.table["estimator"]) == {"reparameterised"}
    assert noise.absent["score"] == "the support of Uniform moves with its parameters"
    found = row(noise, "reparameterised", 1, "a")
    assert abs(found["mean"] - 4 / 3) < 5 * found["mean_se"]
    assert_near(found, 4**2 * (1 / 5 - 1 / 9))  # 2 a u^2


# The ELBO's gradient.


def counts_model() -> Model:
    """Counts with a positive rate."""

    def program(y: Any = None) -> None:
        rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
        numpyro.sample("y", dist.Poisson(rate).expand([4]).to_event(1), obs=y)

    return Model(program, Dataset("counts", {"y": np.array([1, 0, 3, 2])}))


def gamma_guide(fn: Any) -> Any:
    def guide(y: Any = None) -> None:
        shape = numpyro.param("shape", 5.0, constraint=constraints.positive)
        numpyro.sample("rate", dist.Gamma(shape, numpyro.param("speed", 4.0, constraint=constraints.positive)))

    return guide


def stretched_guide(fn: Any) -> Any:
    """Its transforms have parameters, so that what lies before them moves although the draw is held."""

    def guide(y: Any = None) -> None:
        loc, scale = numpyro.param("loc", 0.1), numpyro.param("scale", 0.4, constraint=constraints.positive)
        transforms = [dist.transforms.AffineTransform(loc, scale), dist.transforms.ExpTransform()]
        numpyro.sample("rate", dist.TransformedDistribution(dist.Normal(0.0, 1.0), transforms))

    return guide


def guide_of(law: Callable[[Any], dist.Distribution]) -> Callable[[Any], Any]:
    def build(fn: Any) -> Any:
        def guide(y: Any = None) -> None:
            numpyro.sample("rate", law(numpyro.param("a", 3.0, constraint=constraints.positive)))

        return guide

    return build


def shares_model() -> Model:
    """Shares of which most lie at an edge of the simplex."""

    def program(y: Any = None) -> None:
        shares = numpyro.sample("shares", dist.Dirichlet(jnp.full(3, 0.1)))
        numpyro.sample("y", dist.Multinomial(4, probs=shares), obs=y)

    return Model(program, Dataset("shares", {"y": np.array([3, 1, 0])}))


def simplex_guide(fn: Any) -> Any:
    """A normal in unconstrained space, wide enough for many a share to be all but 0 or 1."""

    def guide(y: Any = None) -> None:
        loc = numpyro.param("loc", jnp.zeros(2))
        scale = numpyro.param("scale", jnp.full(2, 30.0), constraint=constraints.positive)
        law = dist.Normal(loc, scale).to_event(1)
        numpyro.sample("shares", dist.TransformedDistribution(law, dist.transforms.StickBreakingTransform()))

    return guide


PAIRS: dict[str, Callable[[], tuple[Model, str | Guide]]] = {
    "mean_field": lambda: (models.load("conjugate_regression").model(), "mean_field"),
    "full_rank": lambda: (TARGETS.model(target="student_t", dimensions=2), "full_rank"),
    "low_rank": lambda: (TARGETS.model(dimensions=3), "low_rank_1"),
    "iaf": lambda: (TARGETS.model(dimensions=2), "iaf"),
    "gamma": lambda: (counts_model(), Guide("gamma", gamma_guide)),
    "stretched": lambda: (counts_model(), Guide("stretched", stretched_guide)),
    "simplex": lambda: (shares_model(), Guide("simplex", simplex_guide)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_all_estimators_of_a_gradient_have_one_mean(name: str) -> None:
    model, guide = PAIRS[name]()
    noise = gradient_noise(model, guide, key=KEY, draws=(2, 16), repeats=40)
    assert not noise.absent
    assert list(dict.fromkeys(noise.table["estimator"])) == list(ESTIMATORS)
    table = noise.table[noise.table["draws"] == 16].set_index(["parameter", "element"])
    ours = table[table["estimator"] == "reparameterised"]
    for estimator in ESTIMATORS:
        theirs = table[table["estimator"] == estimator]
        apart = (theirs["mean"] - ours["mean"]).abs()
        assert (apart <= 5 * np.hypot(theirs["mean_se"], ours["mean_se"])).all(), estimator


@pytest.mark.parametrize("name", ["full_rank", "gamma", "stretched", "simplex"])
@pytest.mark.slow
def test_they_are_the_gradients_that_optimisers_take(name: str) -> None:
    """Path and score add up to the gradient of `StickTheLandingELBO`, draw by draw."""
    model, guide = PAIRS[name]()
    program = build_guide(model, find_guide(guide))
    found = guide_gradients(model, find_guide(guide), program, {})
    value, score, path = found.single(found.vector, KEY)

    def weight(vector: Any, *, hold: bool) -> Any:
        return log_weight(KEY, found.constrain(vector), model.bound(), program, model.arrays, hold_guide=hold)

    assert float(value) == pytest.approx(float(weight(found.vector, hold=False)), rel=1e-10)
    for ours, hold in ((path, False), (path + score, True)):
        theirs = jax.grad(lambda v, hold=hold: weight(v, hold=hold))(found.vector)
        np.testing.assert_allclose(ours, theirs, rtol=1e-8, atol=1e-10)


def test_at_the_posterior_stick_the_landing_does_not_vary_and_the_others_vary_as_known() -> None:
    """Where log p - log q is constant, a baseline takes all of it away, too."""
    model = TARGETS.model(dimensions=3, correlation=0.7)
    factor = model.arrays["scale_tril"]
    at = {"auto_loc": model.arrays["loc"], "auto_scale_tril": factor}
    noise = gradient_noise(model, "full_rank", at=at, key=KEY, draws=(1, 8))
    totals = noise.totals.set_index(["estimator", "draws"])["variance"]
    assert totals["stick_the_landing", 1] < 1e-25 * totals["reparameterised", 1]
    assert totals["score_baseline", 8] < 1e-25 * totals["score", 8]
    precision = np.linalg.inv(factor @ factor.T)
    for i in range(3):
        found = row(noise, "reparameterised", 1, "auto_loc", f"[{i}]")
        assert_near(found, precision[i, i])
        # The score's own variance is the precision, and log p - log q is the log evidence.
        assert_near(row(noise, "score", 1, "auto_loc", f"[{i}]"), TARGETS.LOG_EVIDENCE**2 * precision[i, i])
    assert noise.totals["relative"].isna().all()
    still = GradientNoise(noise.table, noise.totals, noise.square, {}, 1, {("score", 1): _still()})
    with pytest.raises(ValueError, match="Expected an estimator that varies"):
        still.equivalent_draws("score", of="score")


def _still() -> Sums:
    sums = Sums(np.zeros(1))
    sums.add(np.zeros((5, 1)))
    sums.add(np.zeros((5, 1)))
    return sums


def test_a_fit_is_where_its_parameters_are_and_may_be_moved() -> None:
    model = TARGETS.model(dimensions=2)
    fitted = fit(model, "mean_field", key=KEY)
    settings: dict[str, Any] = {"key": KEY, "draws": (1, 4), "repeats": 40}
    there = gradient_noise(model, "mean_field", at=fitted, **settings)
    by_name = gradient_noise(model, "mean_field", at=fitted.params, **settings)
    pd.testing.assert_frame_equal(there.table, by_name.table)
    moved = {**fitted.params, "z_auto_loc": fitted.params["z_auto_loc"] + 3 * fitted.params["z_auto_scale"]}
    far = gradient_noise(model, "mean_field", at=fitted, moved=3.0, **settings)
    pd.testing.assert_frame_equal(far.table, gradient_noise(model, "mean_field", at=moved, **settings).table)
    # The slope there is -P (3 sds): the gradient in the mean is known.
    precision = np.linalg.inv(model.arrays["scale_tril"] @ model.arrays["scale_tril"].T)
    away = moved["z_auto_loc"] - model.arrays["loc"]
    for i, known in enumerate(-precision @ away):
        found = row(far, "stick_the_landing", 4, "z_auto_loc", f"[{i}]")
        assert abs(found["mean"] - known) < 5 * found["mean_se"]


ABSENT: dict[str, tuple[Callable[[], tuple[Model, str | Guide]], dict[str, str]]] = {
    "moving support": (
        lambda: (counts_model(), Guide("uniform", guide_of(lambda a: dist.Uniform(0.0, a)))),
        {"score": "a support or a point mass of the guide moves with the parameters"},
    ),
    "no path": (
        lambda: (counts_model(), Guide("opaque", guide_of(_opaque))),
        {"reparameterised": "draws of site 'rate' do not move with the parameters"},
    ),
    "factor": (
        lambda: (TARGETS.model(dimensions=2), "dais"),
        {"score": "the density of site 'auto_momentum' is masked or scaled"},
    ),
    "no inverse": (
        lambda: (TARGETS.model(dimensions=2), "bnaf"),
        {"score": "the guide's density at a point that is given is not known: its transform has no inverse"},
    ),
}


def _opaque(a: Any) -> dist.Distribution:
    class Opaque(dist.LogNormal):
        """A law whose sampler is not differentiable."""

        has_rsample = False

    return Opaque(jnp.log(a), 0.5)


@pytest.mark.parametrize("name", ABSENT)
@pytest.mark.slow
def test_what_would_be_wrong_is_absent_with_its_reason(name: str) -> None:
    pair, reasons = ABSENT[name]
    with jax.numpy_rank_promotion("allow"):  # NumPyro's flows and annealing rely on it
        noise = gradient_noise(*pair(), key=KEY, draws=(1, 2), repeats=40)
    for estimator, reason in reasons.items():
        assert noise.absent[estimator] == reason
    assert "stick_the_landing" in noise.absent
    assert set(noise.absent) | set(noise.table["estimator"]) == set(ESTIMATORS)
    assert not set(noise.absent) & set(noise.totals["estimator"])


def shifted(p: Any) -> dist.Distribution:
    return dist.TransformedDistribution(dist.Exponential(1.0), dist.transforms.AffineTransform(p["a"], 1.0))


def test_a_support_that_moves_without_being_declared_shows_in_the_score() -> None:
    """NumPyro takes it to be the whole line. The mean of z is a + 1, whose slope is 1; the score would say a + 1."""
    noise = expectation_gradients(lambda z: 1.0 * z, shifted, {"a": 2.0}, key=KEY, draws=(1, 4))
    assert set(noise.table["estimator"]) == {"reparameterised"}
    assert noise.absent["score"].startswith("the score's own mean is not 0 but, over the draws, 1 in a: a support or")
    assert noise.absent["score_baseline"] == noise.absent["score"]
    assert row(noise, "reparameterised", 1, "a")["mean"] == pytest.approx(1.0)


@pytest.mark.slow
def test_a_skewed_score_of_mean_zero_is_none_the_worse() -> None:
    for seed in (17, 18):
        noise = expectation_gradients(
            lambda z: 1.0 * z,
            lambda p: dist.Gamma(p["a"], p["b"]),
            {"a": 0.1, "b": 1.0},
            key=jax.random.key(seed),
            draws=(1,),
            repeats=40,
        )
        assert "score" not in noise.absent


def test_gradients_that_are_no_numbers_are_told() -> None:
    noise = expectation_gradients(jnp.log, normal, {"mu": 0.0, "sigma": 1.0}, key=KEY, draws=(1,), repeats=40)
    assert re.fullmatch(r"of 40 draws, [12]\d have no finite value or gradient", noise.absent["score"])
    assert noise.absent["reparameterised"] == noise.absent["score"]
    assert noise.table.empty
    assert np.isnan(noise.square.value)


def test_a_key_decides_every_number() -> None:
    one, same, other = (
        expectation_gradients(square, normal, {"mu": 1.0, "sigma": 1.0}, key=jax.random.key(seed), draws=(3, 2))
        for seed in (0, 0, 1)
    )
    pd.testing.assert_frame_equal(one.table, same.table)
    assert not one.table.equals(other.table)
    assert repr(one) == (
        "<GradientNoise: score, score_baseline, score_control_variate, reparameterised from 2, 3 draws>"
    )


# The arithmetic.


def test_moments_are_those_of_all_estimates_together() -> None:
    rng = np.random.default_rng(0)
    batches = [1e6 + rng.standard_normal((20, 3)) for _ in range(5)]
    sums = Sums(batches[0].mean(0))
    for batch in batches:
        sums.add(batch)
    (mean, variance), (means, variances) = sums.moments()
    together = np.concatenate(batches)
    np.testing.assert_allclose(mean[0], together.mean(0), rtol=1e-14)
    np.testing.assert_allclose(variance[0], together.var(0, ddof=1), rtol=1e-9)
    np.testing.assert_allclose(variances[2], np.concatenate([*batches[:2], *batches[3:]]).var(0, ddof=1), rtol=1e-9)
    of_batches = np.stack([batch.mean(0) for batch in batches])
    np.testing.assert_allclose(leave_out_error(means), of_batches.std(0, ddof=1) / 5**0.5, rtol=1e-6)


def test_the_error_of_a_variance_is_as_large_as_the_variance_errs() -> None:
    """Over 300 sets of heavy-tailed estimates, whose variance is 5 / 3."""
    rng, errors = np.random.default_rng(1), []
    for _ in range(300):
        sums = Sums(np.zeros(1))
        for batch in rng.standard_t(9, (40, 50, 1)) * np.sqrt(7 / 9 * 5 / 3):
            sums.add(batch)
        (_, variance), (_, without) = sums.moments()
        errors.append((variance[0, 0] - 5 / 3) / leave_out_error(without)[0])
    # A squared z has mean 1 and, of 300, sd 0.08; Student's t of 39 batches makes it 1.05.
    assert abs(np.mean(np.square(errors)) - 1.05) < 5 * 0.1


def test_smaller_numbers_of_draws_take_rows_in_parts() -> None:
    rng = np.random.default_rng(0)
    pieces = Pieces(rng.standard_normal((4, 7)), rng.standard_normal((4, 7, 2)), rng.standard_normal((4, 7, 2)))
    sums: dict[tuple[str, int], Sums] = {}
    add_batch(sums, pieces, (1, 3), set(ESTIMATORS))
    assert ("score_baseline", 1) not in sums
    assert [sums["score", draws].estimates for draws in (1, 3)] == [28, 8]
    assert pieces.score is not None
    baseline = [np.cov(f, s)[0, 1] for f, s in zip(pieces.value[:, :3], pieces.score[:, :3, 1], strict=True)]
    rest = [np.cov(f, s)[0, 1] for f, s in zip(pieces.value[:, 3:6], pieces.score[:, 3:6, 1], strict=True)]
    add_batch(sums, pieces, (1, 3), set(ESTIMATORS))
    (mean, variance), _ = sums["score_baseline", 3].moments()
    # A sample covariance divides by one less than the draws, and so does leaving one out.
    np.testing.assert_allclose(mean[0, 1], np.mean([*baseline, *rest]), rtol=1e-12)
    np.testing.assert_allclose(variance[0, 1], np.var([*baseline, *rest] * 2, ddof=1), rtol=1e-9)


MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "draws": (
        lambda: expectation_gradients(square, normal, {"mu": 0, "sigma": 1}, key=KEY, draws=(0,)),
        "Expected draws to be positive whole numbers, such as (1, 16); got (0,).",
    ),
    "repeats": (
        lambda: expectation_gradients(square, normal, {"mu": 0, "sigma": 1}, key=KEY, repeats=10),
        "Expected repeats to be a whole number of at least 40; got 10.",
    ),
    "key": (
        lambda: gradient_noise(counts_model(), "mean_field", key=0),  # type: ignore[arg-type]
        "Expected a random key of JAX's; got 0: write key=jax.random.key(0).",
    ),
    "point mass": (
        lambda: gradient_noise(counts_model(), "map", key=KEY),
        "Expected a guide that draws; 'map' is a point mass while it is fitted, and its gradient has no noise.",
    ),
    "parameter": (
        lambda: gradient_noise(counts_model(), "mean_field", at={"auto_loc": 1.0}, key=KEY),
        "Expected parameters of 'mean_field', which are rate_auto_loc, rate_auto_scale; got 'auto_loc'.",
    ),
    "shape": (
        lambda: gradient_noise(counts_model(), "mean_field", at={"rate_auto_loc": np.zeros(2)}, key=KEY),
        "Expected 'rate_auto_loc' of shape (); got (2,).",
    ),
    "at": (
        lambda: gradient_noise(counts_model(), "mean_field", at=3, key=KEY),  # type: ignore[arg-type]
        "Expected at to be a fit, or parameters by name; got 3.",
    ),
    "outside": (
        lambda: gradient_noise(TARGETS.model(dimensions=2), "mean_field", at={"z_auto_scale": [-1, 1]}, key=KEY),
        "Expected 'z_auto_scale' inside its support, as the guide constrains it; got [-1  1].",
    ),
    "moved by a word": (
        lambda: gradient_noise(counts_model(), "mean_field", moved="a", key=KEY),  # type: ignore[arg-type]
        "Expected moved to be a number of sds; got 'a'.",
    ),
    "one draw": (
        lambda: score_with_baseline(Pieces(np.zeros((2, 1)), np.zeros((2, 1, 1)), None)),
        "Expected at least 2 draws behind a gradient, so that others give the baseline; got 1.",
    ),
    "no score": (
        lambda: score_function(Pieces(np.zeros((2, 1)), None, None)),
        "Expected pieces with a score, which this estimator needs; they have none.",
    ),
    "no path": (
        lambda: reparameterised(Pieces(np.zeros((2, 1)), None, None)),
        "Expected pieces with a path's gradient, which this estimator needs; they have none.",
    ),
    "moved": (
        lambda: gradient_noise(counts_model(), Guide("gamma", gamma_guide), moved=2.0, key=KEY),
        "Expected a Gaussian guide and a finite number of sds to move it by; got 'gamma' and 2.0: give the parameters "
        "themselves instead.",
    ),
    "fit": (
        lambda: gradient_noise(counts_model(), "full_rank", at=fit(counts_model(), "mean_field", key=KEY), key=KEY),
        "Expected a fit of 'full_rank' to this very model 'program'; got one of 'mean_field' to 'program'.",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told(name: str) -> None:
    wrong, text = MISTAKES[name]
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        wrong()
