"""Expectation propagation: exact where it must be, moments matched elsewhere, and refused with a sentence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.scipy.special import expit, ndtr
from scipy.integrate import quad
from scipy.special import gammaln, log_ndtr, logsumexp
from scipy.stats import multivariate_normal, norm

import models
from toolkit import Dataset, Estimate, Fit, Model, Status, Storage, compare, fit, reference, study
from toolkit.comparison.sentences import ended
from toolkit.reporting.arrival import gap_cell, unclimbed_sentences
from toolkit.reporting.nats import own_evidence_sentences
from toolkit.sampling.evidence import LogEvidence
from toolkit.variational.expectation_propagation import Run, Sites, laplace, propagate
from toolkit.variational.linear_predictor import linear_predictor
from toolkit.variational.tilted_moments import tilted_moments

KEY = jax.random.key(0)
MEAN, PRIOR = np.array([1.0, -0.5]), np.array([[2.0, 1.2], [1.2, 1.0]])
X = np.array([[1.0, 0.2], [1.0, -1.1], [1.0, 1.9], [1.0, 0.6], [1.0, -0.4]])


def regression(likelihood: Callable[[object], object]) -> Callable[..., None]:
    """A model with a correlated Gaussian prior that is not centred, and observations of one linear predictor each."""

    def model(x: object, y: object = None) -> None:
        beta = numpyro.sample("beta", dist.MultivariateNormal(jnp.asarray(MEAN), jnp.asarray(PRIOR)))
        numpyro.sample("y", likelihood(x @ beta), obs=y)

    return model


def bound(likelihood: Callable[[object], object], y: np.ndarray, x: np.ndarray = X) -> Model:
    return Model(regression(likelihood), Dataset("small", {"x": x, "y": np.asarray(y)}))


def moments(fitted: Fit) -> tuple[np.ndarray, np.ndarray]:
    factor = np.asarray(fitted.params["auto_scale_tril"])
    return np.asarray(fitted.params["auto_loc"]), factor @ factor.T


def run(model: Model, **options: object) -> tuple[Run, np.ndarray, np.ndarray]:
    """The sweeps themselves, with the place that they are told from, and all linear predictors there."""
    found = linear_predictor(model)
    mode, sites, _ = laplace(found)
    offset = found.offset + found.design @ mode
    sites = options.pop("sites", sites)
    ended = propagate(
        lambda s: found.log_likelihood(s + offset), found.prior.seen_from(mode), found.design, sites, **options
    )
    assert ended is not None
    return ended, mode, offset


# Where it is exact.


def test_a_gaussian_likelihood_is_matched_exactly() -> None:
    sd, y = np.array([0.5, 1.0, 0.2, 2.0, 0.7]), np.array([0.3, 2.0, -1.0, 0.4, 1.5])
    model = bound(lambda eta: dist.Normal(eta + 0.25, jnp.asarray(sd)), y)
    fitted = fit(model, "ep", key=KEY)
    precision = np.linalg.inv(PRIOR) + X.T @ (X / sd[:, None] ** 2)
    mean = np.linalg.solve(precision, np.linalg.solve(PRIOR, MEAN) + X.T @ ((y - 0.25) / sd**2))
    evidence = multivariate_normal(X @ MEAN + 0.25, X @ PRIOR @ X.T + np.diag(sd**2)).logpdf(y)
    assert (fitted.status, fitted.message) == (Status.ARRIVED, "")
    loc, covariance = moments(fitted)
    assert loc == pytest.approx(mean, abs=1e-9)
    assert covariance == pytest.approx(np.linalg.inv(precision), abs=1e-9)
    assert fitted.log_evidence == pytest.approx(evidence, abs=1e-9)
    assert fitted.elbo is not None
    assert fitted.elbo.value == pytest.approx(evidence, abs=1e-6)
    assert fitted.certificate is None


@pytest.mark.parametrize("outcome", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_one_probit_observation_is_its_closed_form(outcome: int) -> None:
    """The moments of a Gaussian times a probit: Rasmussen & Williams (2006), section 3.9."""
    mean, sd, sign = 0.4, 3.0, 2 * outcome - 1

    def model(y: object) -> None:
        z = numpyro.sample("z", dist.Normal(mean, sd))
        numpyro.sample("y", dist.Bernoulli(probs=ndtr(z)), obs=y)

    fitted = fit(Model(model, Dataset("one", {"y": np.array(outcome)})), "ep", key=KEY)
    ratio = sign * mean / math.sqrt(1 + sd**2)
    hazard = norm.pdf(ratio) / norm.cdf(ratio)
    loc, covariance = moments(fitted)
    assert loc[0] == pytest.approx(mean + sign * sd**2 * hazard / math.sqrt(1 + sd**2), abs=1e-8)
    assert covariance[0, 0] == pytest.approx(sd**2 - sd**4 * hazard * (ratio + hazard) / (1 + sd**2), abs=1e-7)
    assert fitted.log_evidence == pytest.approx(norm.logcdf(ratio), abs=1e-9)


def test_of_one_observation_the_evidence_is_the_integral() -> None:
    model = bound(lambda eta: dist.Bernoulli(logits=eta), np.array([1]), X[2:3])
    fitted = fit(model, "ep", key=KEY)
    centre, sd = float(X[2] @ MEAN), math.sqrt(X[2] @ PRIOR @ X[2])
    mass, _ = quad(lambda s: norm.pdf(s, centre, sd) / (1 + math.exp(-s)), -60, 60, epsabs=1e-13, points=[0, centre])
    assert fitted.log_evidence == pytest.approx(math.log(mass), abs=1e-9)


# Tilted moments.

TILTED = {
    "logistic, wide": (lambda s: -np.logaddexp(0, -s), 3.0, 1e4),
    "logistic, narrow": (lambda s: -np.logaddexp(0, -s), -2.0, 1e-3),
    "logistic, far": (lambda s: -np.logaddexp(0, -s), -40.0, 4.0),
    "probit, wide": (log_ndtr, -5.0, 400.0),
    "count of 700": (lambda s: 700 * s - np.exp(s) - gammaln(701), 0.0, 25.0),
    "count of 0": (lambda s: -np.exp(s), 1.0, 9.0),
    "two modes": (lambda s: -np.log1p((s - 4) ** 2 / 1e-2), -4.0, 1.0),
}


@pytest.mark.parametrize("case", TILTED)
def test_tilted_moments_are_integrals(case: str) -> None:
    """A sum over two million points is the yardstick, which needs no adaptation."""
    log_likelihood, mean, variance = TILTED[case]
    with np.errstate(over="ignore"):
        found = tilted_moments(
            log_likelihood, np.array([mean]), np.array([variance]), np.array([mean - 1]), np.array([mean + 2])
        )
        places = np.linspace(mean - 14 * variance**0.5, mean + 14 * variance**0.5, 2_000_001)
        density = norm.logpdf(places, mean, variance**0.5) + log_likelihood(places)
    whole = logsumexp(density) + math.log(28 * variance**0.5 / 2_000_000)
    weights = np.exp(density - logsumexp(density))
    centre = weights @ places
    spread = weights @ (places - centre) ** 2
    assert found.valid.all()
    assert found.log_constant[0] == pytest.approx(whole, abs=1e-10)
    assert found.mean[0] == pytest.approx(centre, abs=1e-10 * spread**0.5)
    assert found.variance[0] == pytest.approx(spread, rel=1e-9)


def test_a_likelihood_that_is_no_number_where_it_counts_is_told() -> None:
    found = tilted_moments(
        lambda s: np.where(s > 0.0, np.nan, 0.0), np.zeros(1), np.ones(1), np.full(1, -8.0), np.full(1, 8.0)
    )
    assert not found.valid.any()


# The fixed point.

COUNTS, OUTCOMES = np.array([3, 0, 240, 9, 1]), np.array([1, 0, 1, 0, 1])
LIKELIHOODS = {
    "logistic": (
        lambda eta: dist.Bernoulli(logits=eta),
        OUTCOMES,
        lambda y, s: -np.logaddexp(0.0, -(2 * y - 1) * s),
        ("logits", "identity"),
    ),
    "logistic by probability": (
        lambda eta: dist.Bernoulli(probs=expit(eta)),
        OUTCOMES,
        lambda y, s: -np.logaddexp(0.0, -(2 * y - 1) * s),
        ("probs", "logit"),
    ),
    "probit": (
        lambda eta: dist.Bernoulli(probs=ndtr(eta)),
        OUTCOMES,
        lambda y, s: log_ndtr((2 * y - 1) * s),
        ("probs", "probit"),
    ),
    "poisson": (
        lambda eta: dist.Poisson(2.5 * jnp.exp(eta)),
        COUNTS,
        lambda y, s: y * (s + math.log(2.5)) - 2.5 * np.exp(s) - gammaln(y + 1),
        ("rate", "log"),
    ),
    "binomial": (
        lambda eta: dist.Binomial(300, logits=eta),
        COUNTS,
        lambda y, s: (
            gammaln(301) - gammaln(y + 1) - gammaln(301 - y) - y * np.logaddexp(0, -s) - (300 - y) * np.logaddexp(0, s)
        ),
        ("logits", "identity"),
    ),
    "gamma": (
        lambda eta: dist.Gamma(3.0, 3.0 * jnp.exp(-eta)),
        COUNTS + 0.5,
        lambda y, s: 3 * (math.log(3) + s) + 2 * math.log(y) - 3 * y * np.exp(s) - gammaln(3),  # of minus eta
        ("rate", "log"),
    ),
}


@pytest.mark.parametrize("case", LIKELIHOODS)
def test_at_the_fixed_point_every_marginal_has_its_tilted_moments(case: str) -> None:
    """Cavities by leaving sites out of the precision, tilted moments by a fine sum: nothing of the algorithm's own."""
    likelihood, y, log_likelihood, (parameter, link) = LIKELIHOODS[case]
    model = bound(likelihood, y)
    part = linear_predictor(model).likelihoods[0]
    assert (part.parameter, part.link) == (parameter, link)
    found, mode, _ = run(model)
    assert found.status is Status.ARRIVED
    sites, design = found.sites, part.design
    at_mode = design @ mode
    assert np.abs(design) == pytest.approx(np.abs(X), rel=1e-12)
    base = np.linalg.inv(PRIOR)
    total = base + design.T @ (sites.precisions[:, None] * design)
    linear = base @ (MEAN - mode) + design.T @ sites.shifts
    for n, row in enumerate(design):
        covariance = np.linalg.inv(total - sites.precisions[n] * np.outer(row, row))
        centre = at_mode[n] + row @ covariance @ (linear - sites.shifts[n] * row)
        places = np.linspace(-14, 14, 400_001) * math.sqrt(row @ covariance @ row) + centre
        with np.errstate(over="ignore"):
            density = norm.logpdf(places, centre, math.sqrt(row @ covariance @ row)) + log_likelihood(y[n], places)
        weights = np.exp(density - logsumexp(density))
        whole = np.linalg.inv(total)
        mean, variance = row @ whole @ linear + at_mode[n], row @ whole @ row
        tilted = weights @ places
        assert tilted == pytest.approx(mean, abs=1e-6 * variance**0.5)
        assert weights @ (places - tilted) ** 2 == pytest.approx(variance, rel=2e-6)


def test_damping_changes_the_way_and_not_the_end() -> None:
    model = bound(LIKELIHOODS["poisson"][0], COUNTS)
    at_once, _, _ = run(model)
    damped, _, _ = run(model, damping=0.3)
    from_nothing, _, _ = run(model, sites=Sites(np.zeros(5), np.zeros(5)))
    assert len(damped.course) > 2 * len(at_once.course)
    assert damped.damping == 0.3
    for other in (damped, from_nothing):
        assert other.whole.mean == pytest.approx(at_once.whole.mean, abs=1e-7)
        assert other.whole.sds == pytest.approx(at_once.whole.sds, rel=1e-7)
        assert other.last.log_evidence == pytest.approx(at_once.last.log_evidence, abs=1e-9)


def heavy_tails(seed: int, rows: int, scale: float) -> Model:
    """A regression whose likelihood is not log-concave: sites may have negative precisions, and full steps cycle."""

    def model(x: object, y: object = None) -> None:
        beta = numpyro.sample("beta", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
        numpyro.sample("y", dist.StudentT(0.5, x @ beta, scale), obs=y)

    source = np.random.default_rng(seed)
    x = np.column_stack([np.ones(rows), source.normal(size=rows)])
    return Model(model, Dataset("heavy", {"x": x, "y": x @ [1.0, 2.0] + source.standard_t(1.0, size=rows)}))


@pytest.mark.slow
def test_sweeps_that_cycle_are_damped_until_they_settle() -> None:
    found, _, _ = run(heavy_tails(0, 10, 0.5))
    assert found.status is Status.ARRIVED
    assert found.damping < 1
    assert found.last.residual < 1e-7


@pytest.mark.slow
def test_where_no_damping_helps_it_is_told() -> None:
    fitted = fit(heavy_tails(4, 8, 0.3), "ep", key=KEY)
    assert fitted.status is Status.DIVERGED
    assert ended(fitted) == "the algorithm did not settle"
    assert "with damping down to 0.0625" in fitted.message
    assert (fitted.usable, fitted.log_evidence) == (False, None)
    with pytest.raises(ValueError, match="'ep' has none: the algorithm did not settle"):
        fitted.draw(KEY, 3)


def test_skipped_observations_are_told_and_leave_no_evidence() -> None:
    def model(x: object, y: object = None) -> None:
        beta = numpyro.sample("beta", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
        numpyro.sample("y", dist.StudentT(1.0, x @ beta, 0.01), obs=y)

    source = np.random.default_rng(0)
    x = np.column_stack([np.ones(4), source.normal(size=4)])
    y = x @ [1.0, 2.0] + source.standard_t(1.0, size=4)
    fitted = fit(Model(model, Dataset("few", {"x": x, "y": y})), "ep", key=KEY)
    assert "2 of 4 observations were skipped in the end" in fitted.message
    assert fitted.status is Status.UNPROVEN
    assert ended(fitted) == "the algorithm settled in part: what is left open is said beside it"
    assert fitted.log_evidence is None


def test_where_every_observation_was_skipped_there_is_no_answer() -> None:
    """Under so wide a prior what an exact likelihood leaves of a cavity is rounding."""

    def model(y: object = None) -> None:
        z = numpyro.sample("z", dist.Normal(0.0, 1e3))
        numpyro.sample("y", dist.Normal(z, 1e-3).expand([1]).to_event(1), obs=y)

    fitted = fit(Model(model, Dataset("one", {"y": np.array([0.5])})), "ep", key=KEY)
    assert fitted.status in (Status.ARRIVED, Status.DIVERGED)
    assert (fitted.log_evidence is None) == (fitted.status is Status.DIVERGED)


def test_a_budget_that_is_used_up_is_told() -> None:
    fitted = fit(bound(LIKELIHOODS["logistic"][0], OUTCOMES), "ep", key=KEY, max_gradients=1)
    assert fitted.status is Status.BUDGET
    assert ended(fitted) == "the budget was used up before the algorithm had settled"
    assert fitted.message.startswith("one more sweep would move a mean or a sd by up to")
    assert fitted.usable


# What a program may say.


def test_masked_observations_count_for_nothing() -> None:
    seen, y = np.array([True, True, False, True, False]), OUTCOMES.astype(float)

    def masked(eta: object) -> object:
        return dist.Bernoulli(logits=eta).mask(jnp.asarray(seen)).to_event(1)

    whole = fit(bound(masked, np.where(seen, y, 1.0)), "ep", key=KEY)
    rest = fit(bound(LIKELIHOODS["logistic"][0], y[seen], X[seen]), "ep", key=KEY)
    assert linear_predictor(whole.model).design.shape == (3, 2)
    for one, other in zip(moments(whole), moments(rest), strict=True):
        assert one == pytest.approx(other, abs=1e-9)
    assert whole.log_evidence == pytest.approx(rest.log_evidence, abs=1e-9)
    nothing = fit(bound(lambda eta: dist.Bernoulli(logits=eta).mask(False), y), "ep", key=KEY)
    assert nothing.log_evidence == pytest.approx(0.0, abs=1e-9)
    assert moments(nothing)[1] == pytest.approx(PRIOR, abs=1e-9)


def test_several_sites_plates_hierarchies_weights_and_factors() -> None:
    """All is Gaussian, so that there is a closed form: a prior of two levels, two observed sites, one of weight 3."""
    groups, y, more = np.array([0, 0, 1, 1, 1]), np.array([0.3, 1.0, -0.4, 0.1, 0.8]), 1.7

    def model(groups: object, y: object = None, more: object = None) -> None:
        level = numpyro.sample("level", dist.Normal(1.0, 2.0))
        with numpyro.plate("group", 2):
            effect = numpyro.sample("effect", dist.Normal(level, 0.7))
        numpyro.factor("known", -0.5 * (effect[0] - effect[1]) ** 2)
        with numpyro.plate("row", 5), numpyro.handlers.scale(scale=3.0):
            numpyro.sample("y", dist.Normal(effect[groups], 0.5), obs=y)
        numpyro.sample("more", dist.Normal(2.0 * level + 0.1, 0.4), obs=more)

    data = Dataset("two", {"groups": groups, "y": y, "more": np.array(more)})
    fitted = fit(Model(model, data), "ep", key=KEY)

    def log_density(level: float, effect: np.ndarray) -> float:
        prior = norm.logpdf(level, 1, 2) + norm.logpdf(effect, level, 0.7).sum() - 0.5 * (effect[0] - effect[1]) ** 2
        return float(prior + 3 * norm.logpdf(y, effect[groups], 0.5).sum() + norm.logpdf(more, 2 * level + 0.1, 0.4))

    loc, covariance = moments(fitted)
    # A Gaussian's log density at its mean is the evidence plus its own normalisation.
    own = multivariate_normal(loc, covariance)
    for point in (loc, loc + [0.3, -0.2, 0.5], loc - [1.0, 0.1, 0.0]):
        assert log_density(point[0], point[1:]) - own.logpdf(point) == pytest.approx(fitted.log_evidence, abs=1e-8)
    assert "of y sees" in fitted.why
    assert "the one observation of more" in fitted.why


def test_a_latent_with_a_gaussian_logarithm_is_one_in_unconstrained_space() -> None:
    def model(y: object) -> None:
        rate = numpyro.sample("rate", dist.LogNormal(0.5, 1.0))
        numpyro.sample("y", dist.Poisson(rate), obs=y)

    fitted = fit(Model(model, Dataset("count", {"y": np.array(4)})), "ep", key=KEY)
    places = np.linspace(-8, 8, 200_001)
    density = norm.logpdf(places, 0.5, 1.0) + 4 * places - np.exp(places) - gammaln(5)
    assert fitted.log_evidence == pytest.approx(logsumexp(density) + math.log(places[1] - places[0]), abs=1e-9)
    weights = np.exp(density - logsumexp(density))
    assert np.log(fitted.draw(KEY, 20_000)["rate"]).mean() == pytest.approx(weights @ places, abs=0.02)


def test_a_flat_prior_is_no_obstacle_where_the_data_pin_it() -> None:
    def model(x: object, y: object = None) -> None:
        beta = numpyro.sample("beta", dist.ImproperUniform(dist.constraints.real_vector, (), event_shape=(2,)))
        numpyro.sample("y", dist.Normal(x @ beta, 0.5), obs=y)

    y = np.array([0.3, 2.0, -1.0, 0.4, 1.5])
    fitted = fit(Model(model, Dataset("flat", {"x": X, "y": y})), "ep", key=KEY)
    loc, covariance = moments(fitted)
    assert loc == pytest.approx(np.linalg.lstsq(X, y, rcond=None)[0], abs=1e-8)
    assert covariance == pytest.approx(np.linalg.inv(X.T @ X) * 0.25, abs=1e-8)


def test_a_posterior_that_nothing_pins_is_told() -> None:
    def model(x: object, y: object = None) -> None:
        beta = numpyro.sample("beta", dist.ImproperUniform(dist.constraints.real_vector, (), event_shape=(2,)))
        numpyro.sample("y", dist.Normal(x * beta.sum(), 0.5), obs=y)

    fitted = fit(Model(model, Dataset("flat", {"x": np.ones(3), "y": np.ones(3)})), "ep", key=KEY)
    assert fitted.status is Status.IMPROPER
    assert not fitted.usable


def test_where_nothing_is_observed_the_factors_are_all() -> None:
    model = models.load("gaussian_target").model()
    fitted = fit(model, "ep", key=KEY)
    assert fitted.log_evidence == pytest.approx(model.log_evidence, abs=1e-9)
    assert moments(fitted)[0] == pytest.approx(model.dataset.arrays["loc"], abs=1e-9)


def test_units_do_not_matter() -> None:
    units = np.array([1e6, 1e-5])

    def model(x: object, y: object = None) -> None:
        beta = numpyro.sample("beta", dist.Normal(0.0, jnp.asarray(2.0 / units)).to_event(1))
        numpyro.sample("y", dist.Poisson(jnp.exp(x @ beta)), obs=y)

    def plain(x: object, y: object = None) -> None:
        beta = numpyro.sample("beta", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
        numpyro.sample("y", dist.Poisson(jnp.exp(x @ beta)), obs=y)

    one = fit(Model(plain, Dataset("plain", {"x": X, "y": COUNTS})), "ep", key=KEY)
    other = fit(Model(model, Dataset("scaled", {"x": X * units, "y": COUNTS})), "ep", key=KEY)
    assert moments(other)[0] * units == pytest.approx(moments(one)[0], abs=1e-7)
    assert moments(other)[1] * np.outer(units, units) == pytest.approx(moments(one)[1], abs=1e-7)
    # In other units the evidence is the same.
    assert other.log_evidence == pytest.approx(one.log_evidence, abs=1e-7)


@pytest.mark.slow
def test_a_rotated_chart_gives_the_same_gaussian() -> None:
    """Moments are matched along linear predictors, which no linear map of the latents changes."""
    curated = models.load("collinear_logistic")
    model = curated.model(curated.simulate(jax.random.PRNGKey(1), rows=40, features=2))
    plain, rotated = (fit(model, guide, key=KEY) for guide in ("ep", "ep@rotated"))
    assert rotated.log_evidence == pytest.approx(plain.log_evidence, abs=1e-8)
    draws = plain.draw(KEY, 50)
    assert rotated.log_weights_at(draws) == pytest.approx(plain.log_weights_at(draws), abs=1e-6)


def two_predictors(x: object, y: object = None) -> None:
    a = numpyro.sample("a", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    numpyro.sample("y", dist.Normal(x @ a, jnp.exp(x @ a[::-1])), obs=y)


def sum_of_rates(x: object, y: object = None) -> None:
    a = numpyro.sample("a", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    numpyro.sample("y", dist.Poisson(jnp.exp(x[:, 0] * a[0]) + jnp.exp(x[:, 1] * a[1])), obs=y)


def latent_scale(x: object, y: object = None) -> None:
    a = numpyro.sample("a", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    sigma = numpyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(x @ a, sigma), obs=y)


def prior_of_a_scale(x: object, y: object = None) -> None:
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    a = numpyro.sample("a", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    numpyro.sample("y", dist.Bernoulli(logits=tau * (x @ a)), obs=y)


def product(x: object, y: object = None) -> None:
    tau = numpyro.sample("tau", dist.LogNormal(0.0, 1.0))
    a = numpyro.sample("a", dist.Normal(0.0, tau).expand([2]).to_event(1))
    numpyro.sample("y", dist.Bernoulli(logits=x @ a), obs=y)


def laplace_prior(x: object, y: object = None) -> None:
    a = numpyro.sample("a", dist.Laplace(0.0, 1.0).expand([2]).to_event(1))
    numpyro.sample("y", dist.Bernoulli(logits=x @ a), obs=y)


def by_factor(x: object, y: object = None) -> None:
    a = numpyro.sample("a", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    numpyro.factor("likelihood", -jnp.logaddexp(0.0, -(2 * y - 1) * (x @ a)).sum())


def vectors(x: object, y: object = None) -> None:
    a = numpyro.sample("a", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    numpyro.sample("y", dist.MultivariateNormal(x @ a, jnp.eye(5)), obs=y)


def mixture(x: object, y: object = None) -> None:
    a = numpyro.sample("a", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    parts = [dist.Normal(x @ a, 1.0), dist.Normal(0.0, jnp.ones(5))]
    numpyro.sample("y", dist.MixtureGeneral(dist.Categorical(jnp.full(2, 0.5)), parts), obs=y)


def categories(x: object, y: object = None) -> None:
    a = numpyro.sample("a", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    numpyro.sample("y", dist.Categorical(logits=x * a[None]), obs=y)


REFUSED = {
    "two predictors": (two_predictors, "both loc and scale of site 'y' (Normal) depend on the latents"),
    "sum of rates": (
        sum_of_rates,
        "rate of site 'y' (Poisson) is affine in the latents under none of the links identity, log, logit, probit",
    ),
    "latent scale": (latent_scale, "both loc and scale of site 'y' (Normal) depend on the latents"),
    "prior of a scale": (prior_of_a_scale, "that of site 'tau' (HalfNormal) is not"),
    "product": (product, "that of site 'a' (Normal) is not, given the sites before it: take full_rank"),
    "Laplace prior": (laplace_prior, "that of site 'a' (Laplace) is not"),
    "likelihood by factor": (by_factor, "factor 'likelihood' is not quadratic in the latents"),
    "vectors": (vectors, "an observation of site 'y' is a vector (MultivariateNormal)"),
    "mixture": (mixture, "the distribution of site 'y' (MixtureGeneral) has no parameter to read"),
    "categories": (categories, "logits of site 'y' (CategoricalLogits) is a vector for each observation"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_regression_is_refused_with_its_site(case: str) -> None:
    program, text = REFUSED[case]
    model = Model(program, Dataset("small", {"x": X, "y": OUTCOMES}))
    with pytest.raises(ValueError, match="for expectation propagation") as caught:
        fit(model, "ep", key=KEY)
    assert text in str(caught.value)


def test_a_refusal_is_a_row_of_a_study_and_loses_nothing() -> None:
    def program(y: object) -> None:
        a = numpyro.sample("a", dist.Laplace(0.0, 1.0))
        numpyro.sample("y", dist.Normal(a, 1.0).mask(False), obs=y)

    def exact(key: jax.Array, draws: int) -> dict[str, jax.Array]:
        return {"a": jax.random.laplace(key, (draws,))}

    model = Model(program, Dataset("nothing seen", {"y": np.array(0.0)}), exact=exact, log_evidence=0.0)
    done = study(model, guides=["ep", "mean_field"], draws=100)
    assert done.fits[0].status is Status.FAILED
    assert "that of site 'a' (Laplace) is not" in done.fits[0].message
    assert done.fits[1].usable


# Beside the mean field, full rank and a reference.


@pytest.fixture(scope="module")
def collinear() -> tuple[Model, dict[str, Fit], np.ndarray, np.ndarray, float]:
    """A logistic regression of three dimensions, its fits, and its posterior's means, sds and evidence on a grid."""
    curated = models.load("collinear_logistic")
    model = curated.model(curated.simulate(jax.random.PRNGKey(3), rows=40, features=2, correlation=0.95))
    fits = {name: fit(model, name, key=KEY) for name in ("mean_field", "ep", "full_rank")}
    loc, factor = fits["ep"].params["auto_loc"], fits["ep"].params["auto_scale_tril"]
    steps = np.linspace(-9, 9, 91)
    away = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    points = loc + away @ np.asarray(factor).T
    x, y = model.dataset.arrays["x"], model.dataset.arrays["y"]
    prior = norm.logpdf(points, 0, [5.0, 2.5, 2.5]).sum(1)
    density = prior.copy()
    for row, outcome in zip(x, y, strict=True):
        density -= np.logaddexp(0, (1 - 2 * outcome) * (points[:, 0] + points[:, 1:] @ row))
    evidence = logsumexp(density) + 3 * math.log(0.2) + float(np.log(np.diag(factor)).sum())
    weights = np.exp(density - logsumexp(density))
    mean = weights @ points
    return model, fits, mean, np.sqrt(weights @ (points - mean) ** 2), float(evidence)


def gaussian_of(fitted: Fit) -> tuple[np.ndarray, np.ndarray]:
    """Means and sds by the parameters of a mean field, or of a Gaussian with a factor."""
    params = fitted.params
    if "auto_loc" in params:
        return np.asarray(params["auto_loc"]), np.sqrt((np.asarray(params["auto_scale_tril"]) ** 2).sum(1))
    sites = ("intercept", "beta")
    return tuple(np.concatenate([np.ravel(params[f"{s}_auto_{part}"]) for s in sites]) for part in ("loc", "scale"))  # type: ignore[return-value]


def test_it_mends_what_the_mean_field_breaks(
    collinear: tuple[Model, dict[str, Fit], np.ndarray, np.ndarray, float],
) -> None:
    _, fits, mean, sd, evidence = collinear
    shifts, widths = {}, {}
    for name, fitted in fits.items():
        loc, scale = gaussian_of(fitted)
        shifts[name], widths[name] = np.abs(loc - mean).max() / sd.min(), np.abs(np.log(scale / sd)).max()
    assert widths["mean_field"] > 0.5
    assert widths["ep"] < 0.1 * widths["mean_field"]
    assert widths["ep"] < widths["full_rank"]
    assert shifts["ep"] < shifts["mean_field"]
    assert shifts["ep"] <= shifts["full_rank"]
    own = fits["ep"].log_evidence
    assert own is not None
    assert fits["full_rank"].elbo is not None
    assert fits["mean_field"].elbo is not None
    assert abs(own - evidence) < evidence - fits["full_rank"].elbo.value < evidence - fits["mean_field"].elbo.value


def test_full_rank_is_never_left_below_it(
    collinear: tuple[Model, dict[str, Fit], np.ndarray, np.ndarray, float],
) -> None:
    model, fits, *_ = collinear
    best = fit(model, "full_rank", key=KEY, smaller=[fits["ep"]])
    assert best.elbo is not None
    assert fits["ep"].elbo is not None
    assert best.elbo.value > fits["ep"].elbo.value - 5 * math.hypot(best.elbo.se, fits["ep"].elbo.se)


@pytest.mark.slow
def test_on_the_breast_cancer_data_it_is_right_where_the_mean_field_is_not() -> None:
    model = models.load("collinear_logistic").model()
    fits = [fit(model, name, key=KEY) for name in ("mean_field", "ep", "full_rank")]
    compared = compare(model, reference(model, key=jax.random.PRNGKey(0)), fits, key=jax.random.PRNGKey(1))
    table, worst = compared.table, {}
    for metric in ("sd_ratio", "shift"):
        for name in ("mean_field", "ep", "full_rank"):
            rows = table[(table["guide"] == name) & (table["metric"] == metric)]
            errors = np.log(rows["value"]) if metric == "sd_ratio" else rows["value"]
            worst[metric, name] = float(np.sqrt((errors**2).mean())), float(rows["se"].max())
        assert worst[metric, "ep"][0] < worst[metric, "mean_field"][0] / 3
        assert worst[metric, "ep"][0] < worst[metric, "full_rank"][0] + worst[metric, "full_rank"][1]
    evidence, own = compared.gaps.evidence.estimate, fits[1].log_evidence
    assert evidence is not None
    assert own is not None
    assert abs(own - evidence.value) < 0.2 + 5 * evidence.se


# As a guide like any other.


@pytest.mark.slow
def test_a_study_judges_it_and_keeps_it(tmp_path: Path) -> None:
    x, y = X + [0.0, 3.0], np.array([3.3, 2.0, 5.0, 3.4, 2.5])
    precision = np.linalg.inv(PRIOR) + x.T @ x / 0.25
    mean = np.linalg.solve(precision, np.linalg.solve(PRIOR, MEAN) + x.T @ y / 0.25)
    covariance = np.linalg.inv(precision)

    def exact(key: jax.Array, draws: int) -> dict[str, jax.Array]:
        return {"beta": jax.random.multivariate_normal(key, mean, covariance, (draws,))}

    evidence = float(multivariate_normal(x @ MEAN, x @ PRIOR @ x.T + 0.25 * np.eye(5)).logpdf(y))
    program, data = regression(lambda eta: dist.Normal(eta, 0.5)), Dataset("small", {"x": x, "y": y})
    model = Model(program, data, exact=exact, log_evidence=evidence)
    settings = {"guides": ["mean_field", "ep"], "draws": 10_000, "seed": 1}
    storage = Storage(tmp_path / "kept")
    done = study(model, storage=storage, **settings)  # type: ignore[arg-type]
    assert done.comparison.guides.loc["mean_field", "verdict"] == "wrong"
    assert done.comparison.guides.loc["ep", "verdict"] == "right"
    assert done.fits[1].traces[0].elbo[-1] == pytest.approx(done.fits[1].log_evidence)
    again = study(model, storage=storage, **settings)  # type: ignore[arg-type]
    assert "fit ep" in again.resumed
    assert again.fits[1].log_evidence == done.fits[1].log_evidence
    assert again.fits[1].draw(KEY, 5)["beta"] == pytest.approx(done.fits[1].draw(KEY, 5)["beta"])
    page = (done.write(tmp_path / "report").parent / "report.md").read_text(encoding="utf-8")
    assert "ep's own approximation of the log evidence is" in page
    assert "ep does not climb the ELBO" in page
    assert "the algorithm settled" in page


def test_what_does_not_climb_the_elbo_is_not_asked_for_its_gap(
    collinear: tuple[Model, dict[str, Fit], np.ndarray, np.ndarray, float],
) -> None:
    _, fits, _, _, evidence = collinear
    ep = fits["ep"]
    assert ep.log_evidence is not None
    assert ended(ep) == "the algorithm settled: going on no longer changes the approximation"
    assert gap_cell(ep).note == "ELBO not climbed"
    assert unclimbed_sentences([fits["mean_field"]]) == []
    (said,) = unclimbed_sentences([fits["mean_field"], ep])
    assert said.startswith("ep does not climb the ELBO: how far it may lie below")
    known = LogEvidence(Estimate(ep.log_evidence - 0.03, 0.004), "bridge")
    (said,) = own_evidence_sentences(fits.values(), known)
    assert "nats, 0.030 ± 0.004 nats above that" in said
    (said,) = own_evidence_sentences([replace(ep, log_evidence=-1.0)], LogEvidence(None, problem="none"))
    assert said == "ep's own approximation of the log evidence is −1.000 nats. It is no bound."
    assert abs(evidence) < 100
