import itertools
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import scipy.stats
from numpyro.distributions.transforms import AffineTransform
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from numpyro.infer.reparam import TransformReparam
from targets import SCALES, impossible, line, pair

from toolkit import Dataset, Estimate, Fit, Guide, Model, Status, Storage, fit
from toolkit.modelling.space import latent_space
from toolkit.variational import fitting, gaussian_fits
from toolkit.variational import starts as starting
from toolkit.variational.building import build_guide
from toolkit.variational.certificates import Scope
from toolkit.variational.density import LogDensity
from toolkit.variational.draws import matched_draws
from toolkit.variational.gaussians import best_low_rank
from toolkit.variational.guides import GUIDES, find_guide
from toolkit.variational.keeping import fit_key, keep_fit, kept_fit
from toolkit.variational.nesting import check_nesting
from toolkit.variational.objectives import StickTheLandingELBO
from toolkit.variational.solvers.natural import natural_steps
from toolkit.variational.solvers.svi import _careful_adam, optimise
from toolkit.variational.starts import Start, find_starts
from toolkit.variational.stochastic_fits import prepare

KEY = jax.random.PRNGKey(0)
CORRELATION = 0.9


@pytest.fixture(scope="module")
def correlated():
    model = pair(CORRELATION)
    return {name: fit(model, name, key=KEY) for name in ("mean_field", "low_rank", "full_rank")}


def test_a_guide_on_its_own_family_recovers_it(correlated):
    full = correlated["full_rank"]
    assert full.status is Status.ARRIVED
    assert abs(full.elbo.value) < 5 * full.elbo.se + 1e-2
    draws = full.draw(jax.random.PRNGKey(1), 20_000)["z"]
    error = SCALES / math.sqrt(20_000)
    assert (np.abs(draws.mean(0) - [2 * SCALES[0], -3 * SCALES[1]]) < 5 * error + 0.01 * SCALES).all()
    # The sd of a Gaussian's sample sd is sd / sqrt(2 n); the fit itself may be off by a hundredth.
    assert np.abs(draws.std(0) / SCALES - 1).max() < 5 / math.sqrt(40_000) + 0.01
    assert abs(np.corrcoef(draws.T)[0, 1] - CORRELATION) < 5 * (1 - CORRELATION**2) / math.sqrt(20_000) + 0.005


def test_the_mean_field_lacks_what_theory_says(correlated):
    fitted = correlated["mean_field"]
    lacks = 0.5 * math.log(1 - CORRELATION**2) - fitted.elbo.value
    assert -5 * fitted.elbo.se - 1e-9 < lacks < 5 * fitted.elbo.se + fitted.certificate.limit
    draws = fitted.draw(jax.random.PRNGKey(1), 20_000)["z"]
    expected = math.sqrt(1 - CORRELATION**2) * SCALES
    assert np.abs(draws.std(0) / expected - 1).max() < 5 / math.sqrt(40_000) + 0.02


def test_a_family_that_contains_another_is_not_below_it(correlated):
    assert correlated["full_rank"].elbo.value > correlated["mean_field"].elbo.value
    assert correlated["low_rank"].elbo.value > correlated["mean_field"].elbo.value
    assert all(fitted.status is Status.ARRIVED for fitted in check_nesting(list(correlated.values())))


def test_same_key_same_result(correlated):
    again = fit(pair(CORRELATION), "mean_field", key=KEY)
    other = fit(pair(CORRELATION), "mean_field", key=jax.random.PRNGKey(7))
    for name, value in correlated["mean_field"].params.items():
        np.testing.assert_array_equal(value, again.params[name])
        assert not np.array_equal(value, other.params[name])


@pytest.mark.parametrize("name", ["mean_field", "low_rank", "full_rank"])
def test_log_weights_are_log_joint_minus_log_density(correlated, name):
    fitted, model = correlated[name], pair(CORRELATION)
    z = fitted.draw(KEY, 50)
    arrays = model.arrays
    centred = z["z"] - arrays["loc"]
    log_p = -0.5 * np.einsum("ni,ij,nj->n", centred, arrays["precision"], centred) - arrays["log_scale"]
    np.testing.assert_allclose(log_p - fitted.log_density({"z": z["z"]}), fitted.log_weights(KEY, 50), atol=1e-8)


def test_log_density_of_independent_normals_is_one_number_a_draw():
    fitted = fit(line(), "diagonal", key=KEY)
    draws = fitted.draw(KEY, 7)
    assert fitted.log_density({"a": draws["a"], "b": draws["b"]}).shape == (7,)


def test_log_density_counts_the_transform_of_a_constrained_site():
    def scale_only(y=None):
        s = numpyro.sample("s", dist.HalfNormal(1.0))
        with numpyro.plate("row", 5):
            numpyro.sample("y", dist.Normal(0, s), obs=y)

    model = Model(scale_only, Dataset("five", {"y": np.array([0.3, -1.0, 0.5, 0.7, -0.2])}))
    for name in ("mean_field", "full_rank"):
        fitted = fit(model, name, key=KEY)
        grid = np.exp(np.linspace(-6, 4, 4_001))
        density = np.exp(fitted.log_density({"s": grid}))
        # The trapezoid's error is of order step^2 / 12, with steps of 0.0025 in log s; a lost Jacobian would cost 0.1.
        assert abs(np.trapezoid(density, grid) - 1) < 1e-5


@pytest.mark.slow
def test_stick_the_landing_has_the_gradient_of_the_elbo():
    model = line()
    guide = AutoMultivariateNormal(model.bound())
    with numpyro.handlers.seed(rng_seed=0):
        guide(**model.arrays)
    params = {"auto_loc": jnp.array([0.3, 0.1]), "auto_scale_tril": jnp.array([[0.4, 0.0], [0.2, 0.3]])}

    def gradients(loss):
        def one(key):
            gradient = jax.grad(lambda p: loss.loss(key, p, model.bound(), guide, **model.arrays))(params)
            return jnp.concatenate([jnp.ravel(gradient[name]) for name in params])

        return np.asarray(jax.vmap(one)(jax.random.split(KEY, 4_000)))

    difference = gradients(StickTheLandingELBO(4)) - gradients(Trace_ELBO(4))
    upper = [0, 1, 2, 4, 5]  # the entry above the diagonal takes no part
    estimates = [Estimate.of_mean(difference[:, i]) for i in upper]
    assert max(abs(estimate.value) / estimate.se for estimate in estimates) < 5


def test_low_rank_optimum_of_a_gaussian():
    rng = np.random.default_rng(3)
    scale, factor = np.array([1.0, 10.0, 0.1, 2.0, 5.0]), rng.standard_normal((5, 2))
    covariance = np.diag(scale) @ (np.eye(5) + factor @ factor.T) @ np.diag(scale)
    precision = np.linalg.inv(covariance)

    def kl(rank):
        found_scale, found_factor = best_low_rank(precision, rank, rounds=2_000, tolerance=1e-4)
        q = np.diag(found_scale) @ (np.eye(5) + found_factor @ found_factor.T) @ np.diag(found_scale)
        return 0.5 * (np.trace(precision @ q) - 5 - np.linalg.slogdet(precision @ q)[1])

    losses = [kl(rank) for rank in (1, 2, 3)]
    assert losses[0] > losses[1] + 0.01  # one column is too few, and the test can see it
    assert losses[1] < 0.05
    assert losses[2] <= losses[1] + 1e-3


def test_natural_steps_reach_a_gaussian_from_a_wrong_start():
    rng = np.random.default_rng(0)
    root = rng.standard_normal((4, 4))
    precision = root @ root.T + np.eye(4)
    loc = np.array([1.0, -2.0, 3.0, 0.5])
    target = {"loc": loc, "precision": precision}

    def quadratic(loc, precision):
        z = numpyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (4,)))
        numpyro.factor("density", -0.5 * (z - loc) @ precision @ (z - loc))

    density = LogDensity(Model(quadratic, Dataset("four", target)))
    base = matched_draws(256, 4, key=KEY)
    found = natural_steps(density, np.zeros(4), 10 * np.eye(4), base=base)
    apart = found.loc - loc
    ratio = precision @ np.linalg.inv(found.precision)
    kl = 0.5 * (np.trace(ratio) - 4 - np.linalg.slogdet(ratio)[1] + apart @ precision @ apart)
    assert kl < 0.01  # where the steps end by themselves


def test_latents_are_in_program_order():
    def unsorted(y=None):
        z = numpyro.sample("zeta", dist.Normal(0, 1))
        a = numpyro.sample("alpha", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.sample("y", dist.Normal(z + a.sum(), 1), obs=y)

    model = Model(unsorted, Dataset("one", {"y": np.array(1.0)}))
    space = latent_space(model)
    assert space.names == ("zeta", "alpha")
    assert space.shapes == ((), (2,))
    vector = jnp.arange(3.0)
    np.testing.assert_array_equal(space.ravel(space.unravel(vector)), vector)


def test_no_valid_start_is_a_status():
    fitted = fit(impossible(), "mean_field", key=KEY)
    assert fitted.status is Status.NO_VALID_START
    assert not fitted.usable
    with pytest.raises(ValueError, match="no start was found"):
        fitted.draw(KEY, 10)


def test_priors_that_break_numpyros_own_start_are_survived():
    def vague(y=None):
        precision = numpyro.sample("precision", dist.Gamma(1e-3, 1e-3))
        mu = numpyro.sample("mu", dist.Normal(0, 1e3))
        with numpyro.plate("row", 20):
            numpyro.sample("y", dist.Normal(mu, precision**-0.5), obs=y)

    y = 500 + 20 * np.random.default_rng(1).standard_normal(20)
    fitted = fit(Model(vague, Dataset("vague", {"y": y})), "mean_field", key=KEY)
    assert fitted.status is Status.ARRIVED
    mu = fitted.draw(KEY, 4_000)["mu"]
    assert abs(mu.mean() - y.mean()) < 5 * y.std() / math.sqrt(4_000) + 0.1 * y.std()


def test_invalid_steps_are_survived_and_counted():
    def walled(y=None):
        z = numpyro.sample("z", dist.Normal(0, 1))
        # Not a number where z > 1.5: within reach of nearly every block of steps.
        numpyro.factor("wall", jnp.where(z > 1.5, jnp.nan, 0.0))
        numpyro.sample("y", dist.Normal(z, 1), obs=y)

    fitted = fit(Model(walled, Dataset("walled", {"y": np.array(-1.0)})), "mean_field", key=KEY, solver="svi")
    assert fitted.invalid_steps > 0
    assert "skipped" in fitted.message


def test_a_short_budget_is_told():
    by_svi = fit(line(), "mean_field", key=KEY, solver="svi", max_gradients=2_500)
    assert by_svi.status is Status.BUDGET
    assert by_svi.usable
    starts = find_starts(line(), key=KEY, count=4)
    budget = starts.gradient_evaluations + 700
    unproved = fit(line(), "mean_field", key=KEY, max_gradients=budget, starts=starts)
    assert unproved.status is Status.BUDGET
    assert re.fullmatch(r"no bound: of the budget [\d,]+ gradients are left, which do not suffice", unproved.message)
    assert unproved.certificate is None
    assert unproved.usable


def test_climbs_keep_to_the_budget(monkeypatch):
    """What a diagnosis takes, which always runs to its end, is left out here."""
    monkeypatch.setattr(gaussian_fits, "find_failure", lambda *given, **named: None)
    monkeypatch.setattr(fitting, "describe_edge", lambda *given, **named: None)
    model = line()
    starts = find_starts(model, key=KEY, count=4)
    begun = starts.gradient_evaluations
    fitted = fit(model, "low_rank", key=KEY, starts=starts, max_gradients=begun + 1)
    assert fitted.status is Status.BUDGET
    assert fitted.cost.gradient_evaluations - begun < 4_096  # a first look at the start, and the ELBO


@pytest.mark.parametrize(("left", "steps"), [(0, []), (1_999, []), (2_000, [250]), (4_100, [250, 250])])
def test_steps_of_svi_keep_to_the_budget(left, steps):
    """A step has eight gradients and a block 250 steps: what pays for fewer blocks than starts goes to the first."""
    starts = find_starts(line(), key=KEY, count=1)
    starts = replace(starts, points=starts.points * 3)
    begun = starts.gradient_evaluations
    fitted = fit(line(), "mean_field", key=KEY, solver="svi", starts=starts, max_gradients=begun + left)
    assert fitted.status is Status.BUDGET
    assert [trace.steps.tolist() for trace in fitted.traces] == [[count] for count in steps]
    assert fitted.cost.gradient_evaluations == begun + 8 * sum(steps)
    assert fitted.message == f"{max(steps, default=0)} steps"
    assert math.isfinite(fitted.elbo.value)
    assert fitted.draw(KEY, 3)["a"].shape == (3,)


@pytest.mark.parametrize("guide", ["mean_field", "full_rank"])
def test_the_elbo_is_had_from_as_many_draws_as_were_asked_for(guide):
    fitted = fit(pair(CORRELATION), guide, key=KEY, elbo_draws=300)
    assert fitted.fresh_log_weights.shape == (300,)
    least = fit(pair(CORRELATION), guide, key=KEY)
    assert least.fresh_log_weights.shape == (1_024,)
    assert least.elbo.se < 0.01
    with pytest.raises(ValueError, match="Expected elbo_draws to be None or at least 100, so that its error is known"):
        fit(pair(CORRELATION), guide, key=KEY, elbo_draws=3)


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.33, 0.41, 0.6, 5.0, math.inf])
def test_as_many_draws_as_make_the_error_of_an_elbo_small_and_no_more(spread):
    draws, wanted = gaussian_fits._draws_for(SimpleNamespace(spread=spread), 0.01), (spread / 0.01) ** 2
    assert draws in range(1_024, 4_096 + 1, 128)
    assert draws >= min(wanted, 4_096)
    assert draws == 1_024 or draws - 128 < wanted


def test_a_smaller_tolerance_takes_more_draws_where_the_posterior_is_not_gaussian():
    def counts(y=None):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("y", dist.Poisson(jnp.exp(z)), obs=y)

    # With mean -0.6 and sd 0.8, E[exp z] is about 0.7, so that the cubic term of exp z leaves a draw an sd of about
    # 0.7 * 0.8^3 / sqrt(6) = 0.15 nats: for errors of 0.01 and 0.001, hundreds of draws would do and tens of thousands.
    model = Model(counts, Dataset("none", {"y": np.array(0)}), log_concave=True)
    loose, tight = (fit(model, "mean_field", key=KEY, tolerance=tolerance) for tolerance in (0.1, 0.01))
    assert loose.fresh_log_weights.size < tight.fresh_log_weights.size


def test_what_is_done_to_one_fits_guide_is_not_done_to_the_next():
    model = pair(CORRELATION)
    first = fit(model, "mean_field", key=KEY)
    first.autoguide.prefix = "mine"
    second = fit(model, "mean_field", key=KEY)
    assert second.autoguide is not first.autoguide
    assert second.autoguide.prefix == "auto"
    assert first.params.keys() == second.params.keys()


def test_a_guide_need_not_be_hashable():
    mine = Guide("mine", AutoNormal, contains=["map"])
    assert fit(pair(CORRELATION), mine, key=KEY).status is Status.ARRIVED


@pytest.mark.parametrize("count", [1, 8, 60])
def test_starts_are_found_in_a_small_ball_however_many_are_asked_for(count):
    def ball():
        z = numpyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (6,)))
        numpyro.factor("ball", jnp.log1p(-(z**2).sum()))

    starts = find_starts(Model(ball, Dataset("ball", {})), key=KEY, count=count)
    assert starts.searches == count


def test_starts_that_cannot_be_searched_are_refused():
    with pytest.raises(ValueError, match="Expected at least one search for a start; got 0"):
        fit(pair(CORRELATION), "mean_field", key=KEY, starts=0)
    with pytest.raises(ValueError, match="or what `find_starts` gave; got 2.5"):
        fit(pair(CORRELATION), "mean_field", key=KEY, starts=2.5)
    with pytest.raises(ValueError, match="Expected a positive tolerance in nats"):
        fit(pair(CORRELATION), "mean_field", key=KEY, tolerance=math.inf)
    with pytest.raises(ValueError, match="Expected a chart's name behind the @"):
        fit(pair(CORRELATION), "mean_field@", key=KEY)

    def nothing(y=None):
        z = numpyro.sample("z", dist.Normal(0, 1).expand([0]).to_event(1))
        numpyro.sample("y", dist.Normal(z.sum(), 1), obs=y)

    with pytest.raises(ValueError, match="Expected a model with latent scalars; 'nothing' has none"):
        fit(Model(nothing, Dataset("one", {"y": np.array(0.3)})), "mean_field", key=KEY)


def test_a_place_with_a_slope_is_no_mode():
    """Whatever its curvature says: a search may have been cut on its way."""
    density = LogDensity(pair(CORRELATION))
    mode = find_starts(pair(CORRELATION), key=KEY, count=1).points[0].loc
    _, is_mode = starting._curvature(density, mode)
    precision, elsewhere = starting._curvature(density, mode + 3.0)
    assert is_mode
    assert precision is not None
    assert not elsewhere


def test_a_users_guide_and_every_named_one_fit():
    mine = Guide("mine", lambda fn: AutoNormal(fn, init_scale=0.01))
    fitted = fit(line(), mine, key=KEY)
    panel = fit(line(), "mean_field", key=KEY)
    assert abs(fitted.elbo.value - panel.elbo.value) < 5 * math.hypot(fitted.elbo.se, panel.elbo.se) + 0.02
    point = fit(line(), "map", key=KEY)
    assert point.usable
    assert not point.has_density
    assert point.elbo is None
    laplace = fit(line(), "laplace", key=KEY)
    # The posterior is Gaussian: Laplace's approximation is exact, and better than the mean field.
    assert laplace.elbo.value > panel.elbo.value - 5 * panel.elbo.se
    assert laplace.elbo.se < 1e-3


def test_nesting_marks_the_larger_family_that_ends_lower(correlated):
    low = correlated["mean_field"]

    worse = replace(correlated["full_rank"], elbo=Estimate(low.elbo.value - 3, 0.01))
    marked = {fitted.guide.name: fitted for fitted in check_nesting([low, worse])}
    assert marked["full_rank"].status is Status.BELOW_SMALLER_FAMILY
    assert "below mean_field" in marked["full_rank"].message
    assert marked["mean_field"].status is Status.ARRIVED
    noisy = replace(worse, elbo=Estimate(low.elbo.value - 3, 2.0))
    assert check_nesting([low, noisy])[1].status is Status.ARRIVED
    # Fits without an optimum are as high as they were when they were stopped.
    endless = replace(low, status=Status.UNBOUNDED)
    assert check_nesting([endless, worse])[1].status is worse.status
    assert check_nesting([low, replace(worse, status=Status.FLAT)])[1].status is Status.FLAT


def test_a_fit_is_shown_in_one_line(correlated):
    fitted = correlated["mean_field"]
    assert repr(fitted) == (
        f"<Fit of mean_field to correlated: ARRIVED, ELBO {fitted.elbo} nats, gap at most {fitted.gap_limit:.2g} nats>"
    )
    guessed = replace(fitted, certificate=replace(fitted.certificate, scope=Scope.ESTIMATE))
    assert repr(guessed).endswith(f"gap estimated at {fitted.gap_limit:.2g} nats>")
    assert repr(Fit(find_guide("map"), pair(), Status.FAILED)) == "<Fit of map to correlated: FAILED>"


def test_a_kept_fit_draws_the_same(tmp_path, correlated):
    storage, fitted = Storage(tmp_path), correlated["full_rank"]
    keep_fit(storage, "name", fitted)
    again = kept_fit(storage, "name", fitted.model, fitted.guide)
    np.testing.assert_array_equal(fitted.draw(KEY, 20)["z"], again.draw(KEY, 20)["z"])
    assert again.elbo == fitted.elbo
    np.testing.assert_array_equal(again.fresh_log_weights, fitted.fresh_log_weights)
    assert again.status is fitted.status
    np.testing.assert_array_equal(again.traces[0].elbo, fitted.traces[0].elbo)
    assert kept_fit(storage, "another", fitted.model, fitted.guide) is None


@pytest.mark.slow
def test_a_kept_flow_draws_the_same(tmp_path):
    storage, fitted = Storage(tmp_path), fit(line(), "iaf", key=KEY, max_gradients=8_000)
    keep_fit(storage, "flow", fitted)
    again = kept_fit(storage, "flow", fitted.model, fitted.guide)
    np.testing.assert_array_equal(fitted.draw(KEY, 20)["a"], again.draw(KEY, 20)["a"])


@pytest.mark.slow
def test_laplace_where_a_latent_is_indexed_by_data():
    def schools(school, y=None):
        with numpyro.plate("group", 3):
            effect = numpyro.sample("effect", dist.Normal(0, 1))
        with numpyro.plate("row", 6):
            numpyro.sample("y", dist.Normal(effect[school], 1), obs=y)

    arrays = {"school": np.array([0, 0, 1, 1, 2, 2]), "y": np.arange(6.0)}
    fitted = fit(Model(schools, Dataset("six", arrays)), "laplace", key=KEY)
    # The posterior is Gaussian: mean (sum of two rows) / 3, sd 1 / sqrt(3).
    effect = fitted.draw(KEY, 4_000)["effect"]
    assert (np.abs(effect.mean(0) - np.array([1, 5, 9]) / 3) < 5 / math.sqrt(3 * 4_000) + 0.01).all()


@pytest.mark.slow
def test_laplace_keeps_sites_apart_whatever_their_names():
    """NumPyro stacks them in the program's order, a dict of them flattens by the alphabet."""

    def apart(y=None):
        numpyro.sample("wide", dist.Normal(100, 3))
        numpyro.sample("narrow", dist.Normal(-5, 1))
        numpyro.sample("y", dist.Normal(0, 1), obs=y)

    fitted = fit(Model(apart, Dataset("none", {"y": np.array(0.0)})), "laplace", key=KEY)
    draws = fitted.draw(KEY, 1_000)
    for name, loc, sd in (("wide", 100, 3), ("narrow", -5, 1)):
        assert abs(draws[name].mean() - loc) < 5 * sd / math.sqrt(1_000) + 0.01 * sd
        assert draws[name].std() == pytest.approx(sd, rel=5 / math.sqrt(2_000))
    norm = scipy.stats.norm
    log_p = norm.logpdf(draws["wide"], 100, 3) + norm.logpdf(draws["narrow"], -5, 1) + norm.logpdf(0)
    np.testing.assert_allclose(log_p - fitted.log_density(draws), fitted.log_weights(KEY, 1_000), atol=1e-8)
    assert fitted.elbo.value == pytest.approx(norm.logpdf(0), abs=0.01)


def test_a_kept_guide_is_set_up_where_it_began(tmp_path):
    def ball(y=None):
        z = numpyro.sample("z", dist.Normal(0, 1).expand([8]).to_event(1))
        # NumPyro's own starts lie in a box around the origin, of which this ball is a millionth part.
        numpyro.factor("inside", jnp.where(((z - 1.5) ** 2).sum() < 2.0, 0.0, -jnp.inf))
        numpyro.sample("y", dist.Normal(z.sum(), 10.0), obs=y)

    model = Model(ball, Dataset("ball", {"y": np.array(12.0)}))
    space = latent_space(model)
    start = space.unravel(np.full(8, 1.5))
    built = build_guide(model, GUIDES["iaf"], start)
    with numpyro.handlers.seed(rng_seed=0):
        trace = numpyro.handlers.trace(built).get_trace(**model.arrays)
    params = {name: site["value"] for name, site in trace.items() if site["type"] == "param"}
    fitted = Fit(GUIDES["iaf"], model, Status.ARRIVED, autoguide=built, params=params, start=start)
    storage = Storage(tmp_path)
    keep_fit(storage, "ball", fitted)
    again = kept_fit(storage, "ball", model, fitted.guide)
    np.testing.assert_array_equal(fitted.draw(KEY, 4)["z"], again.draw(KEY, 4)["z"])


def test_only_guides_with_known_code_are_kept():
    mine = Guide("mean_field", lambda fn: AutoNormal(fn, init_scale=3.0))
    assert fit_key("model", mine, KEY, {}) is None
    names = {fit_key("model", GUIDES[name], KEY, {}) for name in GUIDES}
    assert len(names) == len(GUIDES)
    assert fit_key("model", GUIDES["map"], KEY, {}) != fit_key("model", GUIDES["map"], jax.random.PRNGKey(1), {})


def annealed():
    model = line()  # NumPyro's annealing itself does not pass under the tests' strict ranks
    return Fit(GUIDES["dais"], model, Status.ARRIVED, autoguide=GUIDES["dais"].build(model.bound()), params={"x": 0})


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: find_guide("meanfield"), "Expected a guide's name, one of mean_field, .*got 'meanfield'"),
        (lambda: fit(line(), "mean_field@centred", key=KEY), r"Expected chart to be one of \['plain'\]"),
        (lambda: annealed().log_density({}), "'dais' gives weights only"),
        (
            lambda: fit(line(), "mean_field", key=KEY, tolerance=0.0),
            "Expected a positive tolerance in nats and a positive whole max_gradients; got 0.0 and 3000000",
        ),
        (lambda: fit(line(), "mean_field", key=KEY, tolerance="0.1"), "whole max_gradients; got '0.1' and"),
        (lambda: fit(line(), "mean_field", key=KEY, max_gradients=2.5), "whole max_gradients; got 0.1 and 2.5"),
        (lambda: fit(line(), AutoNormal, key=KEY), r"Expected a guide's name or a `Guide`; got <class .*AutoNormal"),
        (lambda: fit(line().fn, "mean_field", key=KEY), r"Expected a Model; got <function .*: write Model\("),
        (lambda: fit(line(), "mean_field", key=0), r"Expected a random key of JAX's; got 0: write key=jax.random.key"),
        (lambda: annealed().draw(0, 3), "Expected a random key of JAX's; got 0"),
        (lambda: annealed().log_weights(0, 3), "Expected a random key of JAX's; got 0"),
        (lambda: fit(line(), "mean_field", key=jax.random.split(KEY, 2)), "Expected a random key of JAX's; got Array"),
        (lambda: fit(line(), "mean_field", key=np.array([0.5])), r"Expected a random key of JAX's; got array\(\[0.5"),
        (
            lambda: annealed().draw(KEY, 3, sites="a"),
            r"Expected sites to be a sequence of names; got 'a': write \('a'",
        ),
        (lambda: fit(line(), "full_rank", key=KEY, smaller=annealed()), r"got one fit: write smaller=\[fit\]"),
        (lambda: Model(line().fn, {"y": 1}), r"Expected a Dataset; got dict: write Dataset\("),
    ],
)
def test_misuse_is_told(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_a_chart_of_its_own_learns_and_draws_the_plain_sites():
    from numpyro.infer.reparam import LocScaleReparam

    def groups(y=None):
        mu = numpyro.sample("mu", dist.Normal(0, 5))
        tau = numpyro.sample("tau", dist.HalfNormal(5))
        with numpyro.plate("group", 8):
            theta = numpyro.sample("theta", dist.Normal(mu, tau))
            numpyro.sample("y", dist.Normal(theta, 10.0), obs=y)

    y = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    charts = {"noncentred": {"theta": LocScaleReparam(0)}, "learned": {"theta": LocScaleReparam(None)}}
    model = Model(groups, Dataset("eight", {"y": y}), charts=charts, chart="noncentred")
    fits = {chart: fit(model, f"mean_field@{chart}", key=KEY) for chart in ("plain", "noncentred", "learned")}
    assert "theta_centered" in fits["learned"].params
    assert all(fitted.draw(KEY, 3)["theta"].shape == (3, 8) for fitted in fits.values())
    # What is learned can be no worse than the better of its two ends.
    ends = max(fits["plain"].elbo.value, fits["noncentred"].elbo.value)
    assert fits["learned"].elbo.value > ends - 5 * fits["learned"].elbo.se - 0.1


def two_modes(drop: float) -> Model:
    """A density with modes at 6 and -6, the second lower by so many nats."""

    def two():
        z = numpyro.sample("z", dist.Normal(0, 10))
        numpyro.factor("modes", jnp.logaddexp(-0.5 * (z - 6) ** 2 / 0.25, -drop - 0.5 * (z + 6) ** 2 / 0.25))

    return Model(two, Dataset("two", {}))


@pytest.mark.parametrize("drop", [1.0, 0.0])
def test_starts_find_both_modes_also_where_they_are_of_equal_height(drop):
    starts = find_starts(two_modes(drop), key=KEY, count=6)
    ends = sorted(round(float(point.loc[0]), 1) for point in starts.points)
    assert ends == [-6.0, 6.0]
    if drop:
        assert starts.points[0].loc[0] > 0  # the better one first


def test_one_set_of_programs_serves_every_start_and_changes_nothing():
    model, guide = two_modes(1.0), find_guide("full_rank")
    starts = find_starts(model, key=KEY, count=6)
    before, after = (replace(starts, points=(point,)) for point in starts.points)
    prepared = prepare(model, guide)
    for only in (before, after):
        shared, own = (fit(model, guide, key=KEY, starts=only, prepared=p) for p in (prepared, None))
        for name, value in own.params.items():
            np.testing.assert_array_equal(shared.params[name], value)
    # Each mode's own integral is the log evidence of a fit that lies on it alone: N(z; 0, 10) times a Gaussian bump.
    exact = [
        -drop + 0.5 * math.log(2 * math.pi * 0.25) + float(dist.Normal(0.0, math.sqrt(100.25)).log_prob(6.0))
        for drop in (0.0, 1.0)
    ]
    for only, log_evidence, side in zip((before, after), exact, (1, -1), strict=True):
        fitted = fit(model, guide, key=KEY, starts=only, prepared=prepared)
        assert fitted.elbo.value == pytest.approx(log_evidence, abs=5 * fitted.elbo.se + 1e-3)
        assert side * fitted.draw(KEY, 100)["z"].mean() > 5.0
    both = fit(model, guide, key=KEY, starts=starts, prepared=prepared)
    # The lower mode holds 1 / (1 + e) of the mass; a Gaussian on the upper one lacks the rest.
    assert both.draw(KEY, 100)["z"].mean() > 5.0
    assert len(both.traces) == 2


def test_starts_of_another_chart_are_refused():
    def scaled():
        z = numpyro.sample("z", dist.TransformedDistribution(dist.Normal(), AffineTransform(0.0, 2.0)))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=1.0)

    model = Model(scaled, Dataset("none", {}), charts={"standard": {"z": TransformReparam()}})
    starts = find_starts(model, key=KEY, chart="standard", count=1)
    with pytest.raises(
        ValueError, match=r"Expected starts .* in chart 'plain'; got starts in chart 'standard', .* z_base"
    ):
        fit(model, "mean_field", key=KEY, starts=starts)
    other = prepare(two_modes(0.0), find_guide("mean_field"))
    with pytest.raises(ValueError, match="Expected what `prepare` gave for model"):
        fit(model, "mean_field", key=KEY, prepared=other)


def test_a_user_who_has_not_set_float64_gets_it_all_the_same():
    with jax.enable_x64(False):
        model = two_modes(1.0)
        starts = find_starts(model, key=KEY, count=2)
        fitted = fit(model, "mean_field", key=KEY, starts=starts)
    assert {point.loc.dtype for point in starts.points} == {np.dtype(np.float64)}
    assert {np.asarray(value).dtype for value in fitted.params.values()} == {np.dtype(np.float64)}


@pytest.mark.slow
def test_a_saturated_simplex_does_not_raise_the_elbo_above_the_evidence():
    def sparse(y=None):
        p = numpyro.sample("p", dist.Dirichlet(jnp.full(20, 0.1)))
        numpyro.sample("y", dist.Multinomial(20, p), obs=y)

    y = np.eye(20)[0] * 20
    # Of the Dirichlet-multinomial with all 20 counts in one cell.
    ratio = np.array([math.lgamma(2.0), -math.lgamma(22.0), math.lgamma(20.1), -math.lgamma(0.1)])
    model = Model(sparse, Dataset("sparse", {"y": y}))
    for name in ("mean_field", "diagonal"):
        fitted = fit(model, name, key=KEY, starts=1)
        assert fitted.elbo.value < ratio.sum() + 5 * fitted.elbo.se
        assert fitted.elbo.se < 0.2


@pytest.fixture(scope="module")
def climbing():
    """Programs of the mean field of a line, and what they are called with."""
    model = line()
    prepared = prepare(model, find_guide("mean_field"))
    start = Start(np.zeros(2), np.eye(2), 0.0, 0.0, is_mode=False)
    return prepared.programs(), {"arrays": model.arrays, "frame": prepared.coordinates.frame(start)}


@pytest.mark.parametrize(("last", "arrived"), [(0.0, True), (-0.05, True), (-5.0, False), (-math.inf, False)])
@pytest.mark.slow
def test_steps_that_end_below_the_best_have_not_arrived(climbing, last, arrived):
    """Whatever the blocks do, their averages are said to be worth so many nats, and the start to be worth none."""
    programs, given = climbing
    weights = itertools.chain([np.zeros(8)], itertools.repeat(np.full(8, last)))
    programs = replace(programs, check=lambda key, params, given: next(weights))
    solution = optimise(
        programs, given, key=KEY, step_size=0.01, tolerance=0.1, max_steps=10_000, report=lambda *course: None
    )
    assert solution.arrived == arrived
    assert not solution.exhausted
    # Two blocks without a gain at each step size: at all four, or at two only where a cut made no difference.
    assert len(solution.trace.steps) == (4 if last == 0 else 8)


@pytest.mark.parametrize(("latent", "derived"), [("shift", "spread"), ("centre", "log_scale")])
@pytest.mark.slow
def test_a_model_may_use_the_names_of_svis_own_parameters(latent, derived):
    def named(latent, derived):
        def drawn(x, y=None):
            centre = numpyro.sample(latent, dist.Normal(0, 10))
            slope = numpyro.sample("slope", dist.Normal(0, 10))
            # As many numbers as there are latents: of the size that a parameter of the mean field has.
            spread = numpyro.deterministic(derived, 0.1 * jnp.stack([centre, slope]))
            numpyro.sample("y", dist.Normal(centre + slope * x, jnp.exp(spread.sum())), obs=y)

        return fit(Model(drawn, Dataset("line", line().arrays)), "mean_field", key=KEY, starts=1, solver="svi")

    found, expected = named(latent, derived), named("centre", "spread")
    assert found.status is expected.status
    assert found.elbo.value == pytest.approx(expected.elbo.value, rel=1e-9)
    assert len(found.params) == len(expected.params) == 4
    for name, value in found.params.items():  # the same program but for its names: rounding alone may differ
        np.testing.assert_allclose(value, expected.params[name.replace(latent, "centre")], rtol=1e-9)


def test_noise_that_hides_a_gain_is_told():
    fitted = fit(pair(CORRELATION), "mean_field", key=KEY, tolerance=1e-7, solver="svi")
    assert fitted.status is Status.NOISY
    assert not fitted.status.ok


@pytest.mark.parametrize(("gradient", "loss"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_a_bad_step_is_skipped_and_counted(gradient, loss):
    optimiser = _careful_adam(0.1)
    params = {"a": jnp.zeros(2), "b": jnp.zeros(())}
    state = optimiser.init(params)
    bad = {"a": jnp.array([1.0, gradient]), "b": jnp.array(1.0)}
    updates, state = optimiser.update(bad, state, params, value=jnp.array(loss))
    assert all((np.asarray(update) == 0).all() for update in jax.tree.leaves(updates))
    good = jax.tree.map(jnp.ones_like, params)
    updates, state = optimiser.update(good, state, params, value=jnp.array(1.0))
    # Adam's first step has the step size's length, whatever the gradient's.
    np.testing.assert_allclose(updates["a"], -0.1, rtol=1e-6)
    assert optax.tree.get(state, "total_notfinite") == 1


@pytest.mark.parametrize("name", ["mean_field", "full_rank"])
def test_the_elbo_is_the_mean_of_the_log_weights_beside_it(correlated, name):
    fitted = correlated[name]
    weights = Estimate.of_mean(fitted.fresh_log_weights)
    assert abs(weights.value - fitted.elbo.value) <= 5 * math.hypot(weights.se, fitted.elbo.se) + 1e-9
    assert fitted.elbo.se <= weights.se  # the quadratic part is averaged exactly
    again = fitted.log_weights(jax.random.PRNGKey(5), 4_000)
    error = np.hypot(fitted.elbo.se, again.std() / math.sqrt(4_000))
    assert abs(again.mean() - fitted.elbo.value) < 5 * error


def test_full_rank_takes_over_the_optimum_of_a_guide_in_another_order():
    def grouped(y=None):
        mean = numpyro.sample("mean", dist.Normal(0, 3))
        with numpyro.plate("group", 4):
            effect = numpyro.sample("effect", dist.Normal(mean, 0.5))
            numpyro.sample("y", dist.Normal(effect, 0.7), obs=y)
        numpyro.sample("last", dist.Normal(mean, 1.0))  # shared, and behind the groups in program order

    model = Model(grouped, Dataset("four", {"y": np.array([1.0, -0.5, 0.3, 2.0])}))
    fits = [fit(model, "coupled", key=KEY)]
    assert list(fits[0].autoguide.blocks.order) != list(range(6))
    fits.append(fit(model, "full_rank", key=KEY, smaller=fits))
    # The posterior is Gaussian with the structure of `coupled`: both families hold it.
    assert fits[1].elbo.value == pytest.approx(fits[0].elbo.value, abs=2e-3)
    assert all(fitted.status is Status.ARRIVED for fitted in check_nesting(fits))


@pytest.mark.parametrize("solver", ["svi", "fixed_draws"])
def test_both_forms_of_a_key_give_the_same_fit(solver):
    model = pair(0.5)
    one, other = (
        fit(model, "mean_field", key=key, solver=solver) for key in (jax.random.key(3), jax.random.PRNGKey(3))
    )
    assert one.elbo == other.elbo
    for name, value in other.params.items():
        np.testing.assert_array_equal(one.params[name], value)
