"""Tails that cannot be integrated, of posteriors that a Gaussian sits in without noticing; and tails that can."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from targets import SCALES, pair

from toolkit import Dataset, Model, Status, fit
from toolkit.modelling.sites import trace_sites
from toolkit.variational.density import LogDensity
from toolkit.variational.gaussians import Frame, Member
from toolkit.variational.starts import find_starts
from toolkit.variational.tails import (
    FlatCoordinate,
    _is_held,
    _Place,
    _Ray,
    find_heavy_tail,
    find_level_edge,
    flat_coordinates,
)

BUDGET = 60_000
THREE = ["mean_field", "low_rank", "full_rank"]
CHEAP, DEAR = 200, 2_000  # gradients, in a handful of dimensions


def flat():
    return dist.ImproperUniform(dist.constraints.real, (), ())


def flat_positive():
    return dist.ImproperUniform(dist.constraints.positive, (), ())


def dummy(exceptions=0):
    """A logistic regression whose second column tells classes apart, but for so many exceptions."""

    def logistic(x, y=None):
        beta = numpyro.sample("beta", dist.ImproperUniform(dist.constraints.real_vector, (), (3,)))
        with numpyro.plate("row", 80):
            numpyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)

    rng = np.random.default_rng(9)
    column, other = (rng.random(80) < 0.2).astype(float), rng.standard_normal(80)
    y = (rng.random(80) < 1 / (1 + np.exp(-other))).astype(float)
    y[column == 1] = 1
    y[np.flatnonzero(column == 1)[:exceptions]] = 0
    return Model(logistic, Dataset("dummy", {"x": np.stack([np.ones(80), column, other], 1), "y": y}))


def groups(count, centred=False):
    """Means of groups about a common one: with a flat prior on its scale, p(tau | y) falls like tau^(1 - groups)."""

    def hierarchy(y=None):
        mu, tau = numpyro.sample("mu", flat()), numpyro.sample("tau", flat_positive())
        with numpyro.plate("group", count):
            if centred:
                theta = numpyro.sample("theta", dist.Normal(mu, tau))
            else:
                theta = mu + tau * numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    return Model(hierarchy, Dataset("groups", {"y": 1.3 * np.linspace(-1, 1, count)}))


def flat_log_scale(centred):
    """A hierarchy with p(tau) = 1 / tau, whose likelihood does not vanish at tau = 0."""

    def hierarchy(y=None):
        mu, tau = numpyro.sample("mu", dist.Normal(0, 5)), jnp.exp(numpyro.sample("log_tau", flat()))
        with numpyro.plate("group", 6):
            if centred:
                theta = numpyro.sample("theta", dist.Normal(mu, tau))
            else:
                theta = mu + tau * numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    return Model(hierarchy, Dataset("groups", {"y": 1.3 * np.linspace(-1, 1, 6)}))


def mixture():
    """Two components with flat scales: what one of them leaves to the other knows nothing of its scale."""

    def two(y=None):
        weight = numpyro.sample("weight", dist.Beta(2, 2))
        with numpyro.plate("component", 2):
            mean, scale = numpyro.sample("mean", dist.Normal(0, 3)), numpyro.sample("scale", flat_positive())
        with numpyro.plate("row", 100):
            first, second = (dist.Normal(mean[i], scale[i]).log_prob(y) for i in range(2))
            numpyro.factor("y", jnp.logaddexp(jnp.log(weight) + first, jnp.log1p(-weight) + second))

    rng = np.random.default_rng(7)
    y = np.concatenate([rng.normal(-1.5, 1, 60), rng.normal(1.5, 0.6, 40)])
    return Model(two, Dataset("two", {"y": y}))


def sample(count, power=0.0, family=dist.Normal):
    """Location and scale of so many data, with flat priors times sigma^-power."""

    def location_scale(y=None):
        mu, sigma = numpyro.sample("mu", flat()), numpyro.sample("sigma", flat_positive())
        numpyro.factor("prior", -power * jnp.log(sigma))
        with numpyro.plate("row", count):
            numpyro.sample("y", family(mu, sigma), obs=y)

    return Model(location_scale, Dataset("sample", {"y": np.random.default_rng(1).standard_normal(count)}))


def cauchy(count):
    """A location by so many Cauchy data: tails like mu^(-2 count)."""

    def location(y=None):
        mu = numpyro.sample("mu", flat())
        with numpyro.plate("row", count):
            numpyro.sample("y", dist.Cauchy(mu, 1.0), obs=y)

    return Model(location, Dataset("cauchy", {"y": np.linspace(-0.5, 0.5, count)}))


def regression():
    """Raw units and a flat scale: coefficients have Student's tails."""

    def linear(x, y=None):
        beta = numpyro.sample("beta", dist.ImproperUniform(dist.constraints.real_vector, (), (3,)))
        sigma = numpyro.sample("sigma", flat_positive())
        with numpyro.plate("row", 12):
            numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)

    rng = np.random.default_rng(2)
    x = np.stack([np.ones(12), 1e3 + 1e2 * rng.standard_normal(12), 1e-3 * rng.standard_normal(12)], 1)
    return Model(linear, Dataset("units", {"x": x, "y": x @ [5.0, 0.1, 1e4] + 20 * rng.standard_normal(12)}))


def looked_for(model, seed=0):
    """What is found from a start of a model, with its covariance and with conditional sds, and at what gradients."""
    start = find_starts(model, key=jax.random.PRNGKey(seed)).points[0]
    full = Member(start.loc, factor=Frame.of(start.loc, start.precision).factor)
    for member in (full, Member(start.loc, np.diag(start.precision) ** -0.5)):
        density = LogDensity(model)
        found = find_heavy_tail(density, flat_coordinates(model), member)
        yield found, density.evaluations


IMPROPER = [
    (dummy, "beta[1] goes to +infinity"),
    (lambda: groups(2), "log(tau) goes to +infinity"),
    (lambda: groups(2, centred=True), "log(tau) goes to +infinity"),
    (lambda: flat_log_scale(False), "log_tau goes to -infinity"),
    (lambda: flat_log_scale(True), "log_tau goes to -infinity"),
    (lambda: sample(2), "log(sigma) goes to +infinity"),
    (lambda: sample(2, family=dist.Cauchy), "log(sigma) goes to +infinity"),
]


@pytest.mark.parametrize(("model", "where"), IMPROPER)
def test_a_tail_without_an_integral_is_told_with_its_coordinate(model, where):
    for found, _ in looked_for(model()):
        assert found.status is Status.IMPROPER
        assert where in found.message


def clamped(*, predictor: bool) -> Model:
    """A proper posterior whose program is level far out: NumPyro clamps probabilities, and users clip predictors."""

    def logistic(x, y=None):
        a = numpyro.sample("a", flat())
        b = numpyro.sample("b", dist.Normal(0, 1))
        eta = jnp.clip(a + b * x, -30.0, 30.0) if predictor else a + b * x
        likelihood = dist.Bernoulli(logits=eta) if predictor else dist.Bernoulli(probs=jax.nn.sigmoid(eta))
        with numpyro.plate("row", 20):
            numpyro.sample("y", likelihood, obs=y)

    random = np.random.default_rng(3)
    x = random.normal(size=20)
    y = random.binomial(1, 1 / (1 + np.exp(-x)))
    return Model(logistic, Dataset("clamped", {"x": x, "y": y}))


PROPER = [
    lambda: clamped(predictor=False),
    lambda: clamped(predictor=True),
    lambda: dummy(exceptions=1),
    lambda: groups(3),
    lambda: groups(3, centred=True),
    lambda: groups(6, centred=True),
    lambda: sample(2, power=1.0),  # mu has a Cauchy's tails, sigma a half-Cauchy's
    lambda: sample(3),
    lambda: sample(3, family=dist.Cauchy),
    lambda: sample(20),
    lambda: cauchy(1),
    lambda: cauchy(2),
    regression,
]


@pytest.mark.parametrize("model", PROPER)
def test_a_tail_that_can_be_integrated_is_none(model):
    for found, gradients in looked_for(model()):
        assert found is None
        assert gradients < DEAR


def test_coordinates_that_are_held_cost_little():
    for found, gradients in looked_for(dummy(exceptions=1)):
        assert found is None
        assert gradients < CHEAP


def test_a_walk_along_a_gaussian_ends_where_it_has_fallen_by_far_more_than_it_must():
    covariance = np.array([[1.0, 0.9], [0.9, 1.0]]) * np.outer(SCALES, SCALES)
    loc = np.array([2.0, -3.0]) * SCALES
    ray = _Ray(LogDensity(pair()), FlatCoordinate(0, "z[0]"), 1.0, loc, covariance)
    places = ray._walk(ray._beginning(0.0, loc), 1.0)
    assert [place.distance for place in places] == [1.0, 3.0, 7.0]
    # -x^2 / 2 at 3 and at 7
    assert places[1].log_marginal - places[2].log_marginal == pytest.approx(20.0, abs=1e-3)


@pytest.mark.parametrize(
    ("heights", "held"),
    [
        ({1.0: -0.5, 3.0: -4.5, 7.0: -24.5}, True),
        ({1.0: -0.5, 2.5: -24.5}, False),  # too near
        ({1.0: -0.5, 3.0: -4.5, 7.0: -22.5}, False),  # a tail that may be level from there on is still of weight
        ({1.0: -0.5, 3.0: -4.5, 5.0: -12.5, 6.0: -18.0, 7.0: -24.5}, True),  # short steps add up
        ({1.0: -0.5, 3.0: -12.5, 10.0: -24.5}, False),  # over a whole decade
        ({3.0: -3.3, 10.0: -4.8, 32.0: -6.3}, True),  # like 1 / x^1.3
        ({3.0: -3.3, 10.0: -4.4, 32.0: -5.5}, False),  # like 1 / x^0.95
    ],
)
def test_what_is_held_has_fallen_by_twenty_nats_in_half_a_decade_or_faster_than_it_must_in_a_whole(heights, held):
    nothing = np.empty(0)
    places = [_Place(distance, nothing, nothing, nothing, height, 0.0) for distance, height in heights.items()]
    assert _is_held(places) == held


def test_where_the_density_itself_rises_there_is_no_bound():
    model = mixture()
    for seed in range(3):
        for found, _ in looked_for(model, seed):
            assert found.status is Status.UNBOUNDED
            assert "log(scale[" in found.message


def test_proper_priors_are_not_followed():
    def proper(y=None):
        a, b = numpyro.sample("a", dist.Normal(0, 1)), numpyro.sample("b", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(a + b, 1.0), obs=y)

    model = Model(proper, Dataset("one", {"y": np.array(0.3)}))
    density = LogDensity(model)
    assert flat_coordinates(model, "plain") == ()
    assert find_heavy_tail(density, (), Member(np.zeros(2), np.ones(2))) is None
    assert density.evaluations == 0


def test_flat_coordinates_are_found_under_shells_and_named_by_their_supports():
    ordered = dist.ImproperUniform(dist.constraints.ordered_vector, (), (2,))
    shifted = dist.TransformedDistribution(flat(), dist.transforms.AffineTransform(1.0, 2.0))

    def shells(y=None):
        numpyro.sample("proper", dist.LogNormal(0, 1))
        with numpyro.plate("pair", 2):
            scale = numpyro.sample("scale", flat_positive())
        masked = numpyro.sample("masked", flat().mask(True))
        vector = numpyro.sample("vector", flat().expand([2]).to_event(1))
        cut, moved = numpyro.sample("cut", ordered), numpyro.sample("moved", shifted)
        numpyro.sample("y", dist.Normal(scale.sum() + masked + vector.sum() + cut.sum() + moved, 1.0), obs=y)

    model = Model(shells, Dataset("shells", {"y": np.array(0.3)}))
    assert model.flat_priors == ("scale", "masked", "vector", "cut", "moved")
    found = flat_coordinates(model, "plain")
    assert [one.name for one in found] == [
        *("log(scale[0])", "log(scale[1])", "masked", "vector[0]", "vector[1]"),
        *("cut[0] in unconstrained space", "cut[1] in unconstrained space", "moved"),
    ]
    assert [one.number for one in found] == list(range(1, 9))
    assert trace_sites(shells, {"y": np.array(0.3)})["proper"].proper


def test_a_gaussian_that_is_no_numbers_is_nothing_to_set_out_from():
    density = LogDensity(cauchy(1))
    for member in (Member(np.array([np.nan]), np.ones(1)), Member(np.zeros(1), np.array([np.inf]))):
        assert find_heavy_tail(density, [FlatCoordinate(0, "mu")], member) is None


@pytest.mark.parametrize("guide", THREE)
def test_fits_of_separated_classes_are_improper(guide):
    fitted = fit(dummy(), guide, key=jax.random.PRNGKey(3), max_gradients=BUDGET)
    assert fitted.status is Status.IMPROPER
    assert "beta[1] goes to +infinity" in fitted.message
    assert fitted.certificate is None


def counts(events=(3.0, 1.5, 0.0)):
    """A Poisson regression on classes with flat log rates; one without events holds its rate from above only."""

    def poisson(row, y=None):
        with numpyro.plate("class", len(events)):
            log_rate = numpyro.sample("log_rate", flat())
        with numpyro.plate("row", 20 * len(events)):
            numpyro.sample("y", dist.Poisson(jnp.exp(log_rate[row])), obs=y)

    row = np.repeat(np.arange(len(events)), 20)
    return Model(poisson, Dataset("counts", {"row": row, "y": np.random.default_rng(0).poisson(np.array(events)[row])}))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
@pytest.mark.parametrize("guide", THREE)
def test_a_class_without_events_is_improper_although_its_rate_underflows_on_the_way(guide, seed):
    """Below -745 the rate is zero and the gradient no number: the Gaussian spreads as far as these."""
    fitted = fit(counts(), guide, key=jax.random.PRNGKey(seed))
    assert fitted.status is Status.IMPROPER
    assert "log_rate[2]" in fitted.message


def test_a_scale_where_numbers_end_has_run_off_and_one_in_small_units_has_not():
    density = LogDensity(cauchy(1))
    scale = FlatCoordinate(0, "log(nu)", 2.0)
    found = find_heavy_tail(density, [scale], Member(np.array([448.0]), np.ones(1)))
    assert found.status is Status.IMPROPER
    assert found.message == "log(nu) has run off towards +infinity, to 448, near where numbers end"

    def spread(y=None):
        variance = numpyro.sample("variance", flat_positive())
        with numpyro.plate("row", 30):
            numpyro.sample("y", dist.Normal(0, jnp.sqrt(variance)), obs=y)

    y = 1e-23 * np.random.default_rng(0).standard_normal(30)
    fitted = fit(Model(spread, Dataset("spread", {"y": y})), "mean_field", key=jax.random.PRNGKey(0))
    assert fitted.status is Status.ARRIVED


def test_a_level_edge_is_one_where_numbers_end_and_the_density_does_not():
    wide = Member(np.array([1.1, 0.6, -350.0]), np.array([0.1, 0.1, 120.0]))

    def found(model, member):
        density = LogDensity(model)
        return find_level_edge(density, flat_coordinates(model, model.chart), member)

    failure = found(counts(), wide)
    assert failure.status is Status.IMPROPER
    assert "as log_rate[2] goes to -infinity, the log density stays level" in failure.message
    assert "up to about -7" in failure.message
    narrow = Member(wide.loc, np.array([0.1, 0.1, 1.0]))
    assert found(counts(), narrow) is None, "numbers do not end within six sds"
    held = Member(np.array([1.1, 0.6, 0.0]), np.array([0.1, 0.1, 350.0]))
    assert found(counts((3.0, 1.5, 1.0)), held) is None, "numbers end, and the density had fallen long before"


@pytest.mark.parametrize("outside", [-np.inf, np.nan])
def test_a_posterior_that_is_level_up_to_a_wall_of_its_own_is_not_improper(outside):
    """Uniform, since its only observations are bounds; the wall is where the model put it."""

    def bounded(y=None):
        mu = numpyro.sample("mu", flat())
        numpyro.factor("inside", jnp.where(jnp.abs(mu - y).max() < 1, 0.0, outside))

    model = Model(bounded, Dataset("bounded", {"y": np.array([-0.3, 0.2, 0.4])}))
    fitted = fit(model, "mean_field", key=jax.random.PRNGKey(0), max_gradients=BUDGET)
    assert fitted.status is Status.DIVERGED
    assert fitted.certificate is None


def test_a_fit_by_svi_is_improper_too():
    fitted = fit(groups(2), "mean_field", key=jax.random.PRNGKey(0), solver="svi", max_gradients=5_000)
    assert fitted.status is Status.IMPROPER


def test_a_fit_of_a_proper_neighbour_arrives():
    assert fit(dummy(exceptions=1), "full_rank", key=jax.random.PRNGKey(0)).status is Status.ARRIVED
