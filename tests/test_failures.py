"""Fits that have no optimum to arrive at, and fits that only look as if they had none."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from targets import impossible, pair

from toolkit import Dataset, Model, Status, fit
from toolkit.variational.autoguides import GaussianForm
from toolkit.variational.density import LogDensity
from toolkit.variational.failures import coordinate_names, describe_edge, find_failure
from toolkit.variational.gaussians import Diagonal, Frame, Member, Quadratic, Triangular
from toolkit.variational.space import Space

KEY = jax.random.PRNGKey(0)
BUDGET = 100_000
BOTH = ["mean_field", "full_rank"]
DIAGONAL = GaussianForm(Diagonal, vars, lambda params: Member(**params))
FULL = GaussianForm(Triangular, vars, lambda params: Member(**params), full=True)


def flat():
    return dist.ImproperUniform(dist.constraints.real, (), ())


def separable(prior_sd=None):
    """Classes that a threshold tells apart: the likelihood rises for ever along a cone of coefficients."""

    def logistic(x, y=None):
        prior = flat() if prior_sd is None else dist.Normal(0, prior_sd)
        a, b = numpyro.sample("a", prior), numpyro.sample("b", prior)
        with numpyro.plate("row", 12):
            numpyro.sample("y", dist.Bernoulli(logits=a + b * x), obs=y)

    x = np.linspace(-1, 1, 12)
    return Model(logistic, Dataset("separable", {"x": x, "y": (x > 0.1).astype(float)}), log_concave=True)


def ties(rows=6):
    """Data of no variance: the density is highest where the scale is zero."""

    def tied(y=None):
        mu = numpyro.sample("mu", dist.Normal(0, 10))
        sigma = numpyro.sample("sigma", dist.ImproperUniform(dist.constraints.positive, (), ()))
        with numpyro.plate("row", rows):
            numpyro.sample("y", dist.Normal(mu, sigma), obs=y)

    return Model(tied, Dataset("ties", {"y": np.ones(rows)}))


def spike(power):
    """A density with a pole; it can be normalised if the power is below one."""

    def poled(y=None):
        z, w = (numpyro.sample(name, dist.Normal(0, 1)) for name in "zw")
        numpyro.factor("pole", -power * jnp.log(jnp.abs(z - 0.3)))
        numpyro.sample("y", dist.Normal(w, 1), obs=y)

    return Model(poled, Dataset("spike", {"y": np.array(0.3)}))


def ridge(prior_sd=None):
    """Only a + b is known."""

    def only_sum(y=None):
        prior = flat() if prior_sd is None else dist.Normal(0, prior_sd)
        a, b = numpyro.sample("a", prior), numpyro.sample("b", prior)
        with numpyro.plate("row", 15):
            numpyro.sample("y", dist.Normal(a + b, 1), obs=y)

    y = 2 + np.random.default_rng(0).standard_normal(15)
    return Model(only_sum, Dataset("ridge", {"y": y}), log_concave=True)


def duplicated():
    """A regression on the same column twice."""

    def twice(x, y=None):
        with numpyro.plate("column", 2):
            beta = numpyro.sample("beta", flat())
        sigma = numpyro.sample("sigma", dist.HalfNormal(1))
        with numpyro.plate("row", 20):
            numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)

    x, noise = np.random.default_rng(0).standard_normal((2, 20))
    return Model(twice, Dataset("twice", {"x": np.stack([x, x], 1), "y": x + noise}))


def unused():
    """A flat prior that no datum speaks to."""

    def never_looked_at(y=None):
        numpyro.sample("a", flat())
        b = numpyro.sample("b", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(b, 1), obs=y)

    return Model(never_looked_at, Dataset("unused", {"y": np.array(0.0)}))


def walled(edge=1.0, y=0.0):
    """Not a number on one side of an edge."""

    def edged(y=None):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.factor("wall", jnp.where(z > edge, jnp.nan, 0.0))
        numpyro.sample("y", dist.Normal(z, 1), obs=y)

    return Model(edged, Dataset("walled", {"y": np.array(y)}))


@pytest.mark.parametrize("solver", ["auto", "svi"])
def test_a_start_that_cannot_be_found_names_the_site(solver):
    fitted = fit(impossible(), "mean_field", key=KEY, solver=solver)
    assert fitted.status is Status.NO_VALID_START
    assert "site 'never' has a log density of -inf" in fitted.message


@pytest.mark.parametrize("guide", BOTH)
def test_an_edge_that_no_gaussian_may_cross_names_the_site(guide):
    fitted = fit(walled(), guide, key=KEY, max_gradients=BUDGET)
    assert fitted.status is Status.DIVERGED
    assert not fitted.usable
    assert "draws of a Gaussian" in fitted.message
    assert "site 'wall' has a log density of nan" in fitted.message


def test_an_edge_that_svi_steps_over_names_the_site():
    fitted = fit(walled(1.5, -1.0), "mean_field", key=KEY, solver="svi")
    assert fitted.status is Status.DIVERGED
    assert "site 'wall' has a log density of nan" in fitted.message
    assert "skipped" in fitted.message


def test_the_share_of_draws_beyond_an_edge():
    density = LogDensity(walled())
    family = Diagonal(Frame.of(np.zeros(1), np.ones(1)))
    edge = describe_edge(density, walled(), "plain", family, Member(np.zeros(1), np.ones(1)), key=KEY)
    # P(z > 1) of a standard normal is 0.1587.
    assert edge.message.startswith("0.16 of 4,096 draws")
    narrow = Member(np.array([-1.0]), np.array([0.1]))
    assert describe_edge(density, walled(), "plain", family, narrow, key=KEY) is None


@pytest.mark.parametrize("guide", BOTH)
@pytest.mark.parametrize(
    ("model", "status", "names"),
    [
        (separable, Status.IMPROPER, "ab"),
        (ties, Status.UNBOUNDED, ["mu"]),
        (ridge, Status.FLAT, "ab"),
        (duplicated, Status.FLAT, ["beta[0]", "beta[1]"]),
        (unused, Status.FLAT, ["a"]),
    ],
)
def test_a_posterior_that_cannot_be_normalised(model, status, names, guide):
    fitted = fit(model(), guide, key=KEY, max_gradients=BUDGET)
    assert fitted.status is status
    assert not fitted.status.ok
    assert fitted.certificate is None
    assert all(name in fitted.message for name in names)


@pytest.mark.parametrize("guide", BOTH)
def test_a_scale_that_runs_to_zero_at_a_pole(guide):
    fitted = fit(spike(2.0), guide, key=KEY, max_gradients=BUDGET)
    assert fitted.status is Status.UNBOUNDED
    assert "the scale of z runs to zero" in fitted.message


def test_separable_classes_are_told_by_svi_too():
    fitted = fit(separable(), "mean_field", key=KEY, solver="svi", max_gradients=BUDGET)
    assert fitted.status is Status.IMPROPER


@pytest.mark.parametrize("guide", BOTH)
@pytest.mark.parametrize("model", [lambda: ridge(1e3), lambda: separable(10.0), pair])
def test_vague_priors_and_raw_units_are_not_failures(model, guide):
    fitted = fit(model(), guide, key=KEY)
    assert fitted.status is Status.ARRIVED


def at(loc, precision, model, form):
    """What is said of a Gaussian, whatever fit it comes from."""
    member = form.family(Frame.of(loc, precision)).member(np.zeros(form.family(Frame.of(loc, precision)).parameters))
    quadratic = Quadratic(loc, np.zeros(len(loc)), precision)
    return find_failure(LogDensity(model), form, member, quadratic, key=KEY, suspected=True)


@pytest.mark.parametrize("form", [DIAGONAL, FULL])
def test_an_unfinished_fit_of_a_proper_posterior_is_no_failure(form):
    # Tens of sds away and ten times too narrow: there is much to gain, and an end to it.
    scales = np.array([1e3, 1e-3])
    loc = np.array([2.0, -3.0]) * scales + 30 * scales
    assert at(loc, np.diag((scales / 10) ** -2.0), pair(), form) is None


def test_a_pole_that_can_be_normalised_is_no_failure():
    assert at(np.array([0.3, 0.1]), np.diag([4.0, 1.0]), spike(0.5), FULL) is None
    assert at(np.array([0.3, 0.1]), np.diag([4.0, 1.0]), spike(1.5), FULL).status is Status.UNBOUNDED


def test_a_vague_prior_on_a_ridge_is_not_flat_and_no_prior_is():
    precision = 15 * np.ones((2, 2)) + 1e-6 * np.eye(2)
    loc = np.array([1.0, 1.0])
    assert at(loc, precision, ridge(1e3), FULL) is None
    assert at(loc, precision, ridge(), FULL).status is Status.FLAT


def test_coordinates_are_named_by_site_and_place():
    space = Space(("mu", "beta", "lift"), ((), (2,), (1, 2)))
    assert coordinate_names(space) == ["mu", "beta[0]", "beta[1]", "lift[0,0]", "lift[0,1]"]
