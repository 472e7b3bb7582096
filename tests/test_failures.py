"""Fits that have no optimum to arrive at, and fits that only look as if they had none."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions.distribution import validation_enabled
from targets import impossible, pair

from toolkit import Dataset, Estimate, Model, Status, fit
from toolkit.modelling.density import invalid_sites
from toolkit.modelling.space import Space
from toolkit.variational.autoguides import GaussianForm
from toolkit.variational.certificates import Certificate, Scope
from toolkit.variational.density import LogDensity
from toolkit.variational.failures import coordinate_names, describe_edge, find_failure, find_ridge
from toolkit.variational.gaussian_proofs import Proof
from toolkit.variational.gaussians import Diagonal, Frame, LowRank, Member, Quadratic, Triangular

KEY = jax.random.PRNGKey(0)
BUDGET = 100_000
BOTH = ["mean_field", "full_rank"]
THREE = ["mean_field", "low_rank", "full_rank"]
DIAGONAL = GaussianForm(Diagonal, vars, lambda params: Member(**params))
FULL = GaussianForm(Triangular, vars, lambda params: Member(**params), full=True)


def gdp(centre, prior_sd=None):
    """A sum in dollars: an ordinary posterior with a mean of `centre` and an sd of 2e10."""

    def national(y=None):
        mu = numpyro.sample("mu", flat() if prior_sd is None else dist.Normal(0, prior_sd))
        with numpyro.plate("row", 20):
            numpyro.sample("y", dist.Normal(mu, 1e11), obs=y)

    noise = np.random.default_rng(0).standard_normal(20)
    return Model(national, Dataset("gdp", {"y": centre + 1e11 * (noise - noise.mean())}), log_concave=True)


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


def separable_in(size, rows, seed):
    """Classes that a plane through the origin tells apart, its normal no coordinate's own."""

    def logistic(x, y=None):
        beta = numpyro.sample("beta", dist.ImproperUniform(dist.constraints.real_vector, (), (size,)))
        with numpyro.plate("row", rows):
            numpyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)

    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, size))
    x[:, 0] = 1
    y = (x @ rng.standard_normal(size) > 0).astype(float)
    return Model(logistic, Dataset("separable plane", {"x": x, "y": y}), log_concave=True)


def one_datum(prior_sd=None, y=1.7):
    """A mean and a log scale of one datum: flat priors leave a log scale that is uniform over all numbers."""

    def normal(y=None):
        mu = numpyro.sample("mu", flat())
        log_sigma = numpyro.sample("log_sigma", flat() if prior_sd is None else dist.Normal(0, prior_sd))
        numpyro.sample("y", dist.Normal(mu, jnp.exp(log_sigma)), obs=y)

    return Model(normal, Dataset("one", {"y": np.array(y)}))


def interpolated():
    """As many coefficients as data, which leave nothing to know a scale by."""

    def regression(x, y=None):
        beta = numpyro.sample("beta", dist.ImproperUniform(dist.constraints.real_vector, (), (3,)))
        sigma = numpyro.sample("sigma", dist.ImproperUniform(dist.constraints.positive, (), ()))
        numpyro.factor("reference prior", -jnp.log(sigma))
        with numpyro.plate("row", 3):
            numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)

    x = np.random.default_rng(0).standard_normal((3, 3))
    return Model(regression, Dataset("interpolated", {"x": x, "y": np.array([1.0, 2.0, 5.0])}))


def ramp():
    """A density that is linear in a coordinate, on all of its line."""

    def rising(y=None):
        a, b = numpyro.sample("a", flat()), numpyro.sample("b", dist.Normal(0, 1))
        numpyro.factor("ramp", 2.0 * a)
        numpyro.sample("y", dist.Normal(b, 1), obs=y)

    return Model(rising, Dataset("ramp", {"y": np.array(0.3)}))


def box(size, steepness):
    """Nearly uniform between steep walls: the fit of a Gaussian hangs on its few outermost draws."""

    def walls(y=None):
        z = numpyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (size,)))
        numpyro.factor("walls", -steepness * jax.nn.relu(jnp.abs(z) - 1).sum())
        numpyro.sample("y", dist.Normal(z.sum(), 10.0), obs=y)

    return Model(walls, Dataset("box", {"y": np.array(0.0)}), log_concave=True)


def broken_everywhere(value):
    """A density that is no finite number at any point."""

    def broken(y=None):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.factor("broken", value + 0 * z)
        numpyro.sample("y", dist.Normal(z, 1), obs=y)

    return Model(broken, Dataset("broken", {"y": np.array(0.0)}))


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


def test_what_numpyros_validation_raises_is_told():
    def rates(y=None):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("y", dist.NegativeBinomial2(jnp.exp(z), 1.0), obs=y)

    with validation_enabled():
        (clause,) = invalid_sites(Model(rates, Dataset("rates", {"y": np.array(3)})), {"z": np.array(1e4)})
    assert re.fullmatch(r"the program raises '\w+ distribution got invalid \w+ parameter\.'", clause)


@pytest.mark.parametrize("solver", ["auto", "svi"])
def test_a_start_that_cannot_be_found_names_the_site(solver):
    fitted = fit(impossible(), "mean_field", key=KEY, solver=solver)
    assert fitted.status is Status.NO_VALID_START
    assert "site 'never' has a log density of -inf" in fitted.message


@pytest.mark.parametrize("solver", ["auto", "svi"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_density_that_is_no_number_at_any_start_names_the_site(value, solver):
    fitted = fit(broken_everywhere(value), "mean_field", key=KEY, solver=solver)
    assert fitted.status is Status.NO_VALID_START
    assert not fitted.usable
    assert f"site 'broken' has a log density of {value}" in fitted.message


@pytest.mark.parametrize("guide", BOTH)
def test_an_edge_that_no_gaussian_may_cross_names_the_site(guide):
    fitted = fit(walled(), guide, key=KEY, max_gradients=BUDGET)
    assert fitted.status is Status.DIVERGED
    assert not fitted.usable
    assert "draws of a Gaussian" in fitted.message
    assert "site 'wall' has a log density of nan" in fitted.message


def bursting(flat):
    """A density that rises like the exponential of an exponential: no Gaussian of any width has a finite mean of it."""

    def burst(y):
        prior = dist.ImproperUniform(dist.constraints.real_vector, (), (2,)) if flat else dist.Normal(jnp.zeros(2), 1.0)
        z = numpyro.sample("z", prior if flat else prior.to_event(1))
        numpyro.factor("burst", jnp.exp(z.sum() if flat else z[0]) + 0 * y)

    return Model(burst, Dataset("one", {"y": np.array(1.0)}))


@pytest.mark.parametrize("guide", THREE)
@pytest.mark.parametrize("flat", [True, False])
def test_a_density_that_bursts_is_a_status_and_no_exception(flat, guide):
    fitted = fit(bursting(flat), guide, key=KEY, max_gradients=BUDGET)
    assert not fitted.status.ok
    assert fitted.certificate is None or fitted.certificate.limit > 2


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


@pytest.mark.parametrize(
    ("sds", "share"),
    [
        (3.0, "0.00[01][0-9]* of 4,096 draws of a Gaussian have"),  # 0.0013, and a few draws are an edge
        (4.0, "0.00[34][0-9]* of 4,096 draws of a Gaussian half as wide again have"),  # P(z > 4 / 1.5) = 0.0038
        (4.4, None),  # P(z > 4.4 / 1.5) = 0.0017, less than squeezing by any number of draws leaves
    ],
)
def test_an_edge_is_told_as_near_as_a_squeezed_fit_comes(sds, share):
    model = walled(sds)
    family = Diagonal(Frame.of(np.zeros(1), np.ones(1)))
    edge = describe_edge(LogDensity(model), model, "plain", family, Member(np.zeros(1), np.ones(1)), key=KEY)
    assert (edge is None) == (share is None)
    assert edge is None or re.match(share, edge.message)


def test_draws_of_numpyros_low_rank_parameters_are_told_beyond_an_edge():
    # As SVI has them: a scale and columns, without the factor by which the family draws. The variance is 1.
    model, frame = walled(), Frame.of(np.zeros(1), np.ones(1))
    member = Member(np.zeros(1), np.array([0.6]), np.array([[4 / 3]]))
    edge = describe_edge(LogDensity(model), model, "plain", LowRank(frame, 1), member, key=KEY)
    assert edge.message.startswith("0.16 of 4,096 draws")


@pytest.mark.parametrize("guide", THREE)
@pytest.mark.parametrize(
    ("model", "status", "names"),
    [
        (separable, Status.IMPROPER, "ab"),
        (one_datum, Status.IMPROPER, ["mu", "log_sigma"]),
        (interpolated, Status.IMPROPER, ["beta[0]", "sigma"]),
        (ramp, Status.UNBOUNDED, ["a"]),
        (ties, Status.UNBOUNDED, ["mu"]),
        (unused, Status.FLAT, ["a"]),
    ],
)
def test_a_posterior_that_cannot_be_normalised(model, status, names, guide):
    fitted = fit(model(), guide, key=KEY, max_gradients=BUDGET)
    assert fitted.status is status
    assert not fitted.status.ok
    assert fitted.certificate is None
    assert all(name in fitted.message for name in names)


@pytest.mark.parametrize("guide", THREE)
@pytest.mark.parametrize(("model", "names"), [(ridge, ("a", "b")), (duplicated, ("beta[0]", "beta[1]"))])
def test_what_only_a_sum_is_known_of_is_flat(model, names, guide):
    fitted = fit(model(), guide, key=KEY, max_gradients=BUDGET)
    assert fitted.status is Status.FLAT
    assert not fitted.status.ok
    assert fitted.certificate is None
    assert "moving {} one way and {} the other changes nothing".format(*names) in fitted.message


@pytest.mark.parametrize("guide", THREE)
@pytest.mark.parametrize("shape", [(2, 12, 0), (5, 30, 2), (10, 60, 3)], ids=str)
def test_separable_classes_are_told_before_a_proof_is_tried(shape, guide):
    fitted = fit(separable_in(*shape), guide, key=KEY)
    assert fitted.status is Status.IMPROPER
    assert "beta" in fitted.message
    assert fitted.cost.gradient_evaluations < 200_000


@pytest.mark.parametrize("guide", THREE)
def test_a_scale_that_runs_to_zero_at_a_pole(guide):
    fitted = fit(spike(2.0), guide, key=KEY, max_gradients=BUDGET)
    assert fitted.status is Status.UNBOUNDED
    assert "the guide's sd of z runs to zero" in fitted.message


def test_separable_classes_are_told_by_svi_too():
    fitted = fit(separable(), "mean_field", key=KEY, solver="svi", max_gradients=BUDGET)
    assert fitted.status is Status.IMPROPER


@pytest.mark.parametrize("guide", BOTH)
@pytest.mark.parametrize(
    "model",
    [
        lambda: ridge(1e3),
        lambda: separable(10.0),
        pair,
        lambda: one_datum(10.0),
        lambda: one_datum(100.0),
        lambda: gdp(1e13),
        lambda: gdp(1e13, prior_sd=1e14),
        lambda: gdp(0.0),
    ],
)
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


@pytest.mark.parametrize("form", [DIAGONAL, FULL])
@pytest.mark.parametrize("centre", [0.0, 1e13])
@pytest.mark.parametrize(("apart", "wider"), [(0.0, 1.0), (30.0, 0.1)])
def test_a_proper_posterior_in_large_units_is_no_failure(apart, wider, centre, form):
    """Neither at its best Gaussian nor tens of sds away, although nothing less than 10^9 changes its density."""
    sd = 1e11 / math.sqrt(20)
    assert at(np.array([centre + apart * sd]), np.array([[(wider * sd) ** -2.0]]), gdp(centre), form) is None


@pytest.mark.parametrize("form", [DIAGONAL, FULL])
@pytest.mark.parametrize(
    ("model", "loc", "status", "names"),
    [
        (ramp, [1e13, 0.15], Status.UNBOUNDED, "a runs"),
        (separable, [-1.8e12, 1e13], Status.IMPROPER, "a and b grow"),  # halfway between the classes' nearest rows
    ],
)
def test_a_run_off_is_told_where_units_end(model, loc, status, names, form):
    sds = np.maximum(0.7, np.abs(loc) / 100)
    found = at(np.array(loc), np.diag(sds**-2.0), model(), form)
    assert found.status is status
    assert names in found.message


def test_where_numbers_end_the_density_is_compared_with_a_finite_one():
    def beyond_one(y=None):
        a, b = numpyro.sample("a", flat()), numpyro.sample("b", dist.Normal(0, 1))
        numpyro.factor("level", jnp.where(jnp.abs(a) < 1, -jnp.inf, 1e4))
        numpyro.sample("y", dist.Normal(b, 1), obs=y)

    # Ten thousand nats are more than the 180 of the volume, and as many at 10 as at 10^80.
    model = Model(beyond_one, Dataset("level", {"y": np.array(0.0)}))
    found = at(np.array([1e80, 0.0]), np.diag([1e-158, 2.0]), model, DIAGONAL)
    assert found.status is Status.IMPROPER
    assert "a grows without end" in found.message


def test_a_pole_that_can_be_normalised_is_no_failure():
    assert at(np.array([0.3, 0.1]), np.diag([4.0, 1.0]), spike(0.5), FULL) is None
    assert at(np.array([0.3, 0.1]), np.diag([4.0, 1.0]), spike(1.5), FULL).status is Status.UNBOUNDED


def test_a_vague_prior_on_a_ridge_is_not_flat_and_no_prior_is():
    precision = 15 * np.ones((2, 2)) + 1e-6 * np.eye(2)
    loc = np.array([1.0, 1.0])
    assert at(loc, precision, ridge(1e3), FULL) is None
    assert at(loc, precision, ridge(), FULL).status is Status.FLAT


def test_all_of_an_endless_row_of_gaussians_are_told_and_no_end_is():
    # The ELBO is stationary at any mean m of log sigma, with sds of e^(m - 1/2) and sqrt(1/2).
    member = Member(np.array([1.7, 2.0]), np.array([math.exp(1.5), math.sqrt(0.5)]))
    assert find_ridge(LogDensity(one_datum()), member, key=KEY).status is Status.IMPROPER
    for prior_sd in (1.0, 10.0, 300.0):
        assert find_ridge(LogDensity(one_datum(prior_sd)), member, key=KEY) is None


def test_the_elbo_of_one_datum_has_a_bound():
    fitted = fit(one_datum(), "mean_field", key=KEY)
    # E log p = -log(2 pi) / 2 - m - s^2 exp(2 t^2 - 2 m) / 2, plus the entropy: highest at t^2 = 1/2, log s = m - 1/2.
    highest = 0.5 * math.log(2 * math.pi) + 0.5 * math.log(0.5) - 0.5 + 0.5
    assert fitted.elbo.value == pytest.approx(highest, abs=0.03 + 5 * fitted.elbo.se)


def test_the_foot_of_a_steep_wall_is_no_pole():
    fitted = fit(box(3, 1e12), "mean_field", key=KEY, starts=1, max_gradients=BUDGET)
    assert fitted.status is not Status.UNBOUNDED


def test_too_few_draws_for_a_family_are_told_with_their_number():
    fitted = fit(box(10, 1e6), "mean_field", key=KEY, starts=1)
    assert fitted.status is Status.TOO_FEW_DRAWS
    assert not fitted.status.ok
    assert fitted.message.endswith(
        " nats, an estimate: 16,384 draws are too few for 20 parameters; the posterior may be improper, as the priors "
        "of z are"
    )
    assert fitted.message.startswith(f"up to {fitted.certificate.limit:.2g}")
    assert fitted.certificate.limit > 2
    assert fitted.usable  # it may be looked at, and is not judged


@pytest.mark.parametrize(
    ("limit", "ended", "status"),
    [
        (0.05, Status.ARRIVED, Status.ARRIVED),
        (0.3, Status.TOO_FEW_DRAWS, Status.UNPROVEN),
        (1.99, Status.BUDGET, Status.UNPROVEN),
        (2.01, Status.TOO_FEW_DRAWS, Status.TOO_FEW_DRAWS),
        (37.0, Status.BUDGET, Status.BUDGET),
        (math.inf, Status.BUDGET, Status.BUDGET),
        (None, Status.BUDGET, Status.BUDGET),
        (None, Status.TOO_FEW_DRAWS, Status.TOO_FEW_DRAWS),
    ],
)
def test_a_limit_that_says_nothing_leaves_no_verdict(limit, ended, status):
    certificate = None if limit is None else Certificate(Estimate(limit, 0.0), limit, Scope.LOCAL, 512, 4)
    proof = Proof(certificate, ended, "" if ended is Status.ARRIVED else "something ran out")
    assert proof.status is status
    assert status.ok == (limit is not None and limit <= 2)
    assert bool(proof.message) == (ended is not Status.ARRIVED)


def test_a_budget_that_ends_before_any_limit_is_told_as_a_budget():
    # Room for the climb and not for a certificate.
    fitted = fit(box(10, 1e6), "mean_field", key=KEY, starts=1, max_gradients=30_000)
    assert fitted.status is Status.BUDGET
    assert re.search(r"of the budget [\d,]+ gradients are left, which do not suffice", fitted.message)


def test_coordinates_are_named_by_site_and_place():
    space = Space(("mu", "beta", "lift"), ((), (2,), (1, 2)))
    assert coordinate_names(space) == ["mu", "beta[0]", "beta[1]", "lift[0,0]", "lift[0,1]"]
