"""The conjugate regression: density, posterior and evidence against formulas that do not come from its own file."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from models import conjugate_regression as conjugate
from toolkit import Dataset, Model, fit, reference
from toolkit.variational.guides import find_guide
from toolkit.variational.nesting import contains

DRAWS = 20_000


def simulated(noise: str = "unknown", correlation: float = 0.9, seed: int = 3) -> Dataset:
    return conjugate.simulate(jax.random.key(seed), rows=30, features=3, correlation=correlation, noise=noise)


def marginal_covariance(x: np.ndarray, noise_sd: float) -> np.ndarray:
    """Of the outcomes, where the noise variance is what the prior is centred near."""
    prior = np.diag([10.0**2, *[30.0**2] * x.shape[1]])
    design = np.column_stack([np.ones(len(x)), x])
    return noise_sd**2 * (np.eye(len(x)) + design @ prior @ design.T)


@pytest.mark.parametrize("noise", conjugate.NOISES)
def test_the_density_is_the_one_written_down(noise: str) -> None:
    model = conjugate.model(simulated(noise), noise=noise, noise_sd=0.2)
    point = model.start(jax.random.key(1), model.arrays)
    x, y = model.arrays["x"], model.arrays["y"]
    intercept, beta = float(point["intercept"]), np.asarray(point["beta"])
    variance = float(np.exp(point["noise_variance"])) if noise == "unknown" else 0.04
    sd = variance**0.5
    expected = scipy.stats.norm(intercept + x @ beta, sd).logpdf(y).sum()
    expected += scipy.stats.norm(0, 10 * sd).logpdf(intercept) + scipy.stats.norm(0, 30 * sd).logpdf(beta).sum()
    if noise == "unknown":
        expected += scipy.stats.invgamma(2, scale=2 * 0.04).logpdf(variance) + np.log(variance)
    np.testing.assert_allclose(model.log_density(point, model.arrays), expected, rtol=1e-12)


@pytest.mark.parametrize("correlation", [0.0, 0.9, 0.999])
@pytest.mark.parametrize("noise", conjugate.NOISES)
def test_the_evidence_is_the_marginal_density_of_the_outcomes(noise: str, correlation: float) -> None:
    data = simulated(noise, correlation)
    covariance = marginal_covariance(data.arrays["x"], 0.2)
    if noise == "known":
        law = scipy.stats.multivariate_normal(cov=covariance)
    else:
        # Averaged over an InverseGamma(a, b) variance, a normal becomes Student's t: 2 a df, scales times b / a.
        law = scipy.stats.multivariate_t(shape=covariance, df=4)
    found = conjugate.model(data, noise=noise, noise_sd=0.2).log_evidence
    assert found == pytest.approx(law.logpdf(data.arrays["y"]), rel=1e-9)


@pytest.mark.parametrize("noise", conjugate.NOISES)
def test_draws_have_the_density_of_the_posterior(noise: str) -> None:
    """The density's slope has mean 0 at draws of the posterior, and by Stein's identity they have the right scale."""
    model = conjugate.model(simulated(noise), noise=noise)
    assert model.exact is not None
    drawn = {name: np.asarray(value) for name, value in model.exact(jax.random.key(0), DRAWS).items()}
    assert set(drawn) == set(model.latents)
    if noise == "unknown":
        drawn["noise_variance"] = np.log(drawn["noise_variance"])  # as it stands in unconstrained space
    gradients = jax.vmap(jax.grad(model.log_density), (0, None))(drawn, model.arrays)
    for name in model.latents:
        slope, value = np.asarray(gradients[name]), drawn[name]
        for series, expected in ((slope, 0.0), ((value - value.mean(0)) * slope, -1.0)):
            z = (series.mean(0) - expected) / (series.std(0) / np.sqrt(DRAWS))
            assert (np.abs(z) < 5).all(), name


@pytest.mark.slow
def test_nuts_finds_the_exact_posterior() -> None:
    model = conjugate.model(simulated(), noise="unknown")
    key = jax.random.PRNGKey(0)
    exact = reference(model, key=key, chains=4, draws=5_000)
    nuts = reference(model.in_chart("rotated"), key=key, chains=2, warmup=500, draws=1_000, force=True)
    assert exact.status.name == "EXACT"
    assert nuts.status.name == "PASSED", nuts.reasons
    for name in ("intercept", "beta", "noise"):
        table = nuts.diagnostics[nuts.diagnostics.index.str.startswith(name)]
        ess = float(table["ess_bulk"].min())
        ours, theirs = nuts.draws[name], exact.draws[name]
        sd = theirs.std(axis=(0, 1))
        apart = np.abs(ours.mean(axis=(0, 1)) - theirs.mean(axis=(0, 1)))
        assert (apart < 5 * sd * np.sqrt(1 / ess + 1 / 20_000)).all(), name


def test_with_known_noise_full_rank_is_exact_and_the_mean_field_lacks_what_theory_says() -> None:
    data = simulated("known")
    model = conjugate.model(data, noise="known")
    assert model.log_evidence is not None
    precision = conjugate.Posterior(data.arrays["x"], data.arrays["y"], "known", 0.1).precision
    lacking = 0.5 * (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1])
    for name, gap in (("full_rank", 0.0), ("mean_field", lacking)):
        fitted = fit(model, name, key=jax.random.PRNGKey(0))
        assert fitted.elbo is not None
        assert fitted.gap_limit is not None
        difference = model.log_evidence - fitted.elbo.value - gap
        assert -5 * fitted.elbo.se < difference < fitted.gap_limit + 5 * fitted.elbo.se, name


@pytest.mark.slow
def test_the_rotated_chart_is_the_same_posterior_with_uncorrelated_slopes() -> None:
    model = conjugate.model(noise="known")
    point = model.start(jax.random.key(2), model.arrays, chart="rotated")
    rest = {name: value for name, value in point.items() if name != "beta_rotated"}

    def beta(z: Any) -> Any:
        return model.constrain({**rest, "beta_rotated": z}, model.arrays, chart="rotated")["beta"]

    log_jacobian = jnp.linalg.slogdet(jax.jacobian(beta)(point["beta_rotated"]))[1]
    plain = {**rest, "beta": beta(point["beta_rotated"])}
    expected = model.log_density(plain, model.arrays, "plain") + log_jacobian
    np.testing.assert_allclose(model.log_density(point, model.arrays, "rotated"), expected, rtol=1e-9)

    def slope(z: Any) -> Any:
        return jax.grad(lambda v: model.log_density({**rest, "beta_rotated": v}, model.arrays, "rotated"))(z)

    curvature = -np.asarray(jax.jacobian(slope)(point["beta_rotated"]))
    off = curvature - np.diag(np.diag(curvature))
    assert np.abs(off).max() < 1e-8 * np.diag(curvature).min()


def test_the_data_are_longley_s_and_standardised() -> None:
    data = conjugate.dataset()
    assert data.arrays["x"].shape == (16, 6)
    np.testing.assert_allclose(data.arrays["x"].mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(data.arrays["x"].std(0), 1, rtol=1e-12)
    # The certified value of the National Institute of Standards and Technology: R squared of the least-squares fit.
    y, design = data.arrays["y"], np.column_stack([np.ones(16), data.arrays["x"]])
    residual = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    assert 1 - residual @ residual / (y @ y) == pytest.approx(0.995479004577296, abs=1e-12)
    assert conjugate.model().dims("beta") == ("feature",)


@pytest.mark.parametrize("noise", conjugate.NOISES)
def test_simulate_keeps_a_truth_for_each_site(noise: str) -> None:
    data = simulated(noise)
    model = conjugate.model(data, noise=noise)
    assert {name: value.shape for name, value in data.truth.items() if name in model.latents} == {
        name: model.sites[name].shape for name in model.latents
    }
    assert not np.array_equal(data.truth["beta"], simulated(noise, seed=4).truth["beta"])
    np.testing.assert_array_equal(data.arrays["y"], simulated(noise).arrays["y"])


def _xy(x: Any, y: Any) -> Dataset:
    return Dataset("mine", {"x": np.asarray(x, float), "y": np.asarray(y, float)})


ERRORS: dict[str, tuple[Callable[[], Model | Dataset], str]] = {
    "noise": (lambda: conjugate.model(noise="maybe"), "one of unknown, known; got 'maybe'"),
    "noise_sd": (lambda: conjugate.model(noise_sd=0.0), "noise_sd above 0; got 0.0"),
    "no y": (lambda: conjugate.model(Dataset("mine", {"x": np.ones((3, 2))})), "it lacks y"),
    "shapes": (lambda: conjugate.model(_xy([[1.0], [2.0]], [1.0])), "got shapes (2, 1) and (1,)"),
    "simulated": (lambda: conjugate.simulate(jax.random.key(0), noise="no"), "got 'no'"),
    "rows": (lambda: conjugate.simulate(jax.random.key(0), rows=0), "at least 1 row"),
    "features": (lambda: conjugate.with_features(conjugate.dataset(), ["yaer"]), "one of year, price index, "),
    "no features": (lambda: conjugate.with_features(conjugate.dataset(), []), "at least one feature"),
    "repeated": (lambda: conjugate.with_features(conjugate.dataset(), ["year", "year"]), "each feature once"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_misuse_gets_its_sentence(case: str) -> None:
    call, text = ERRORS[case]
    with pytest.raises(ValueError, match=re.escape(text)):
        call()


def test_dependent_predictors_are_no_obstacle() -> None:
    copied = np.repeat(np.random.default_rng(0).normal(size=(9, 1)), 2, axis=1)
    model = conjugate.model(_xy(copied, np.arange(9.0)))
    assert np.isfinite(model.log_evidence or np.nan)


def posterior_of(data: Dataset, noise: str) -> conjugate.Posterior:
    return conjugate.Posterior(data.arrays["x"], data.arrays["y"], noise, 0.1)


def orthogonal(features: int = 3, rows: int = 24) -> Dataset:
    """Predictors that are orthogonal to each other and to the intercept."""
    rng = np.random.default_rng(0)
    mixed = np.linalg.qr(np.column_stack([np.ones(rows), rng.normal(size=(rows, features))]))[0]
    x = mixed[:, 1:] * np.sqrt(rows)
    return _xy(x, 0.3 + x @ np.linspace(1, -1, features) + 0.1 * rng.normal(size=rows))


def test_coordinate_ascent_ends_where_the_mean_field_is_best() -> None:
    """With known noise both are factorised Gaussians: means as the posterior's, variances from P's diagonal."""
    data = simulated("known")
    model, posterior = conjugate.model(data, noise="known"), posterior_of(data, "known")
    ascent = fit(model, "cavi", key=jax.random.key(0), tolerance=1e-8)
    mean_field = fit(model, "mean_field", key=jax.random.PRNGKey(0))
    scale = 0.1 * np.diag(posterior.precision) ** -0.5
    np.testing.assert_allclose(ascent.params["loc"], posterior.mean, atol=1e-4 * scale.min())
    np.testing.assert_allclose(ascent.params["scale"], scale, rtol=1e-12)
    theirs = {part: np.r_[*(mean_field.params[f"{site}_auto_{part}"].ravel() for site in ("intercept", "beta"))]
              for part in ("loc", "scale")}  # fmt: skip
    assert mean_field.gap_limit is not None
    # What a certificate of g nats leaves room for: s posterior sds of the nearest direction cost s^2 / 2.
    whitened = np.linalg.cholesky(posterior.precision).T @ (theirs["loc"] - ascent.params["loc"]) / 0.1
    assert whitened @ whitened / 2 < mean_field.gap_limit
    np.testing.assert_allclose(theirs["scale"], scale, rtol=2 * mean_field.gap_limit**0.5)


def parted(rows: int, size: int) -> float:
    """KL(q || p) in nats of what parts coefficients from noise, by quadrature over the noise variance."""
    exact, shape = 2 + rows / 2, 2 + (rows + size) / 2
    # In units of the scale of the posterior's inverse gamma: the mean of 1 / variance is `exact` under both.
    q, p = scipy.stats.invgamma(shape, scale=shape / exact), scipy.stats.invgamma(exact)

    def integrand(variance: float) -> float:
        ratio = variance * exact
        given = 0.5 * size * (1 / ratio - 1 + np.log(ratio))
        return float(q.pdf(variance) * (q.logpdf(variance) - p.logpdf(variance) + given))

    return scipy.integrate.quad(integrand, 1e-4, 5.0, points=[1 / exact], epsabs=1e-10)[0]


@pytest.mark.parametrize("noise", conjugate.NOISES)
@pytest.mark.parametrize("correlation", [0.0, 0.9, 0.99])
def test_what_coordinate_ascent_lacks_is_known(noise: str, correlation: float) -> None:
    data = simulated(noise, correlation)
    model, posterior = conjugate.model(data, noise=noise), posterior_of(data, noise)
    collinear = 0.5 * (np.log(np.diag(posterior.precision)).sum() - np.linalg.slogdet(posterior.precision)[1])
    assert model.log_evidence is not None
    gaps = {}
    for name in ("cavi", "cavi_joint"):
        fitted = fit(model, name, key=jax.random.key(1), tolerance=1e-5)
        assert fitted.status.name == "ARRIVED"
        assert fitted.elbo is not None
        assert fitted.fresh_log_weights is not None
        drawn = fitted.fresh_log_weights
        assert abs(drawn.mean() - fitted.elbo.value) < 5 * drawn.std() / np.sqrt(len(drawn)) + 1e-9
        assert (np.diff(fitted.traces[0].elbo) > -1e-9).all()
        gaps[name] = model.log_evidence - fitted.elbo.value
    assert gaps["cavi"] - gaps["cavi_joint"] == pytest.approx(collinear, abs=1e-5)
    assert gaps["cavi_joint"] == pytest.approx(0.0 if noise == "known" else parted(30, 4), abs=1e-5)


def test_the_noise_s_factor_is_the_known_inverse_gamma_and_too_narrow() -> None:
    """Its mean of 1 / noise_variance is right, its shape gains half a count for each coefficient."""
    data = simulated("unknown")
    model, (shape, scale) = conjugate.model(data), posterior_of(data, "unknown").noise_law
    for name in ("cavi", "cavi_joint"):
        params = fit(model, name, key=jax.random.key(0), tolerance=1e-8).params
        assert params["noise_shape"] == shape + 4 / 2
        assert params["noise_shape"] / params["noise_scale"] == pytest.approx(shape / scale, rel=1e-4)


def test_no_factorised_gaussian_is_better_than_coordinate_ascent() -> None:
    """A log-normal factor for the noise is one of all that coordinate ascent chose from."""
    model = conjugate.model(simulated("unknown"))
    ascent = fit(model, "cavi", key=jax.random.key(0), tolerance=1e-6)
    mean_field = fit(model, "mean_field", key=jax.random.PRNGKey(0), elbo_draws=20_000)
    assert ascent.elbo is not None
    assert mean_field.elbo is not None
    assert mean_field.elbo.value - ascent.elbo.value < 5 * mean_field.elbo.se


def test_right_on_orthogonal_features_and_too_narrow_on_collinear_ones_by_the_known_amount() -> None:
    for data, right in ((orthogonal(), True), (simulated("known", 0.99), False)):
        model, posterior = conjugate.model(data, noise="known"), posterior_of(data, "known")
        drawn = fit(model, "cavi", key=jax.random.key(0), tolerance=1e-6).draw(jax.random.key(1), DRAWS)
        covariance = np.linalg.inv(posterior.precision)
        theory = (np.diag(posterior.precision) * np.diag(covariance))[1:] ** -0.5
        ratio = drawn["beta"].std(0) / (0.1 * np.diag(covariance)[1:] ** 0.5)
        np.testing.assert_allclose(ratio, theory, rtol=5 / np.sqrt(2 * DRAWS))
        assert (theory > 0.9999).all() if right else (theory < 0.3).all()


@pytest.mark.parametrize("noise", conjugate.NOISES)
def test_densities_of_its_own_guides_at_the_posterior_s_draws(noise: str) -> None:
    """Log q at given values, by SciPy: what KL(p || q) and the bridge ask for."""
    model = conjugate.model(simulated(noise), noise=noise)
    assert model.exact is not None
    drawn = {name: np.asarray(value) for name, value in model.exact(jax.random.key(0), 50).items()}
    coefficients = np.column_stack([drawn["intercept"], drawn["beta"]])
    for name in ("cavi", "cavi_joint"):
        fitted = fit(model, name, key=jax.random.key(0))
        params = fitted.params
        root = params["scale_tril"] if name == "cavi_joint" else np.diag(params["scale"])
        expected = scipy.stats.multivariate_normal(params["loc"], root @ root.T).logpdf(coefficients)
        if noise == "unknown":
            law = scipy.stats.invgamma(params["noise_shape"], scale=params["noise_scale"])
            expected = expected + law.logpdf(drawn["noise_variance"])
        np.testing.assert_allclose(fitted.log_density(drawn), expected, rtol=1e-8)


def test_its_guides_contain_what_their_form_contains() -> None:
    known, unknown = (conjugate.model(noise=noise) for noise in ("known", "unknown"))
    joint, unknown_joint = find_guide("cavi_joint", known), find_guide("cavi_joint", unknown)
    for name in ("cavi", "mean_field"):
        assert contains(joint, find_guide(name, known), known)
        assert contains(unknown_joint, find_guide(name, unknown), unknown)
    assert contains(joint, find_guide("full_rank"), known)
    assert not contains(unknown_joint, find_guide("full_rank"), unknown)
    assert not contains(joint, find_guide("mean_field@rotated"), known)


@pytest.mark.slow
def test_the_elbo_may_rank_features_otherwise_than_the_evidence() -> None:
    """On Longley's data, both exact: a fourth series pays by the evidence, and its collinearity costs the ELBO more."""
    data, ranked = conjugate.dataset(), {}
    for names in (("year", "unemployed", "armed forces"), ("year", "unemployed", "armed forces", "national product")):
        model = conjugate.model(conjugate.with_features(data, names))
        elbo = fit(model, "cavi", key=jax.random.key(0), tolerance=1e-4).elbo
        assert elbo is not None
        assert model.log_evidence is not None
        ranked[len(names)] = (model.log_evidence, elbo.value)
    assert ranked[4][0] - ranked[3][0] == pytest.approx(0.725, abs=0.001)
    assert ranked[4][1] - ranked[3][1] == pytest.approx(-2.378, abs=0.001)
