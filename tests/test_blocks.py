"""Structured Gaussian guides: which blocks a model has, and that NumPyro's machinery works with them."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import scipy.linalg
import scipy.stats
from numpyro import handlers
from numpyro.infer import SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal
from numpyro.infer.reparam import LocScaleReparam
from targets import line, pair

from models import hierarchical_regression
from toolkit import Dataset, Model, fit
from toolkit.modelling.space import latent_space
from toolkit.variational.block_guides import AutoBlockNormal, gaussian_from, params_from
from toolkit.variational.block_normals import BlockCholesky, BlockNormal, _BlockCholeskyTransform
from toolkit.variational.block_search import named_blocks, plate_blocks
from toolkit.variational.blocks import Blocks, Run
from toolkit.variational.guides import GUIDES, block_guide
from toolkit.variational.objectives import StickTheLandingELBO

KEY = jax.random.PRNGKey(0)
GROUPS = 4


def intercepts_and_slopes(x: Any, group: Any, y: Any = None) -> None:
    """Everything normal with known scales: the posterior is normal, with groups independent given mu and slope."""
    mu = numpyro.sample("mu", dist.Normal(0, 2))
    with numpyro.plate("group", GROUPS):
        alpha = numpyro.sample("alpha", dist.Normal(mu, 1.0))
    slope = numpyro.sample("slope", dist.Normal(0, 2))
    with numpyro.plate("group", GROUPS):
        beta = numpyro.sample("beta", dist.Normal(slope, 0.5))
    with numpyro.plate("row", len(x)):
        numpyro.sample("y", dist.Normal(alpha[group] + beta[group] * x, 0.7), obs=y)


@functools.cache
def conjugate() -> Model:
    rng = np.random.default_rng(0)
    group = np.arange(24) % GROUPS
    arrays = {"x": rng.normal(1, 1, 24), "group": group, "y": rng.normal(size=24) + group}
    charts = {"noncentred": {"alpha": LocScaleReparam(0), "beta": LocScaleReparam(0)}}
    return Model(intercepts_and_slopes, Dataset("conjugate", arrays), charts=charts, log_concave=True)


@functools.cache
def exact() -> tuple[np.ndarray, np.ndarray]:
    """Mean and precision of the conjugate model's posterior: its log density is a quadratic."""
    model = conjugate()
    space = latent_space(model)

    def log_density(vector: Any) -> Any:
        return model.log_density(space.unravel(vector), model.arrays)

    zero = jnp.zeros(space.size)
    precision = -np.asarray(jax.hessian(log_density)(zero))
    return np.linalg.solve(precision, np.asarray(jax.grad(log_density)(zero))), precision


def kl(loc: np.ndarray, covariance: np.ndarray) -> float:
    """KL(q || p) in nats, from a Gaussian to the conjugate model's posterior."""
    mean, precision = exact()
    product, apart = precision @ covariance, loc - mean
    return 0.5 * float(np.trace(product) - len(loc) - np.linalg.slogdet(product)[1] + apart @ precision @ apart)


def least_kl(blocks: Blocks) -> float:
    """Of the family: each column of the factor has its best values in closed form."""
    mean, precision = exact()
    ordered = precision[np.ix_(blocks.order, blocks.order)]
    factor = np.zeros_like(ordered)
    for k in range(blocks.size):
        support = np.flatnonzero(blocks.pattern[:, k])
        column = np.linalg.inv(ordered[np.ix_(support, support)])[:, 0]
        factor[support, k] = column / math.sqrt(column[0])
    covariance = factor @ factor.T
    return kl(mean, covariance[np.ix_(blocks.places, blocks.places)])


def fitted(structure: Any, loss: Any = None, **options: Any) -> tuple[AutoBlockNormal, dict[str, Any]]:
    guide = AutoBlockNormal(intercepts_and_slopes, structure, **options)
    optimiser = optax.adam(optax.exponential_decay(0.05, 4_000, 0.003))
    svi = SVI(intercepts_and_slopes, guide, optimiser, loss or StickTheLandingELBO(8))
    return guide, svi.run(KEY, 4_000, progress_bar=False, **conjugate().arrays).params


def random_params(guide: AutoBlockNormal) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    size = guide.blocks.size
    factor = np.where(guide.blocks.pattern, rng.normal(size=(size, size)), 0.0)
    np.fill_diagonal(factor, rng.uniform(0.5, 2.0, size))
    return params_from(guide, rng.normal(size=size), factor)


def set_up(model: Model, **options: Any) -> AutoBlockNormal:
    guide = AutoBlockNormal(model.bound(), **options)
    with handlers.seed(rng_seed=0):
        guide(**model.arrays)
    return guide


@functools.cache
def arrow() -> AutoBlockNormal:
    return set_up(conjugate())


# -- NumPyro's SVI with it --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_svi_recovers_a_posterior_that_has_the_pattern() -> None:
    guide, params = fitted("coupled")
    loc, covariance = np.asarray(params["auto_loc"]), np.asarray(guide.get_posterior(params).covariance_matrix)
    # The gradient's noise vanishes at the posterior itself: what is left is the last steps' size.
    bound = 1e-7
    assert kl(loc, covariance) < bound
    # An eigenvalue 1 + e of the whitened covariance costs e^2 / 4 nats, a location off by a sd half a nat.
    mean, precision = exact()
    truth = np.linalg.inv(precision)
    sds = np.sqrt(np.diag(truth))
    assert np.abs((covariance - truth) / np.outer(sds, sds)).max() < 2 * math.sqrt(bound)
    assert np.abs((loc - mean) / sds).max() < math.sqrt(2 * bound)


def test_blocks_lack_what_theory_says_and_families_contain_one_another() -> None:
    guide, params = fitted("blocks")
    least = least_kl(guide.blocks)
    reached = kl(np.asarray(params["auto_loc"]), np.asarray(guide.get_posterior(params).covariance_matrix))
    # Nothing in the family is below its least KL; the last steps' noise leaves about a hundredth of a nat above.
    assert least <= reached < least + 0.02
    alone = Blocks(tuple(range(10)), 0, (Run(10, 1, ("all",)),))
    named = named_blocks(conjugate(), [("alpha", "beta")])
    lacking = [least_kl(chosen) for chosen in (alone, guide.blocks, arrow().blocks)]
    assert lacking[0] > lacking[1] + 0.1
    assert lacking[1] > lacking[2] + 0.1
    assert abs(lacking[2]) < 1e-10
    assert least_kl(named) < lacking[0] - 0.1


def test_numpyros_own_elbo_climbs_too() -> None:
    guide, params = fitted("coupled", Trace_ELBO(8))
    assert kl(np.asarray(params["auto_loc"]), np.asarray(guide.get_posterior(params).covariance_matrix)) < 0.02


@pytest.mark.parametrize("structure", ["blocks", "coupled"])
def test_svi_moves_only_what_lies_in_the_pattern(structure: str) -> None:
    guide = AutoBlockNormal(intercepts_and_slopes, structure)
    svi = SVI(intercepts_and_slopes, guide, optax.adam(0.05), Trace_ELBO(2))
    params = svi.run(KEY, 20, progress_bar=False, **conjugate().arrays).params
    factor = np.asarray(params["auto_scale_tril"])
    assert ((factor != 0) == guide.blocks.pattern).all()
    assert (np.diag(factor) > 0).all()


def test_a_dense_factor_has_no_gradient_outside_of_the_pattern() -> None:
    guide = set_up(conjugate(), structure="blocks")
    params = random_params(guide)
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(10, 10)))

    def objective(factor: Any) -> Any:
        written = params | {"auto_scale_tril": factor}
        draw = guide.get_transform(written)(noise[0])
        return guide.get_posterior(written).log_prob(draw) + (draw**2).sum()

    gradient = np.asarray(jax.grad(objective)(params["auto_scale_tril"] + jnp.abs(noise)))
    assert ((gradient != 0) == guide.blocks.pattern).all()


def test_the_first_guide_is_that_of_full_rank() -> None:
    ours = set_up(conjugate(), init_scale=0.3)
    theirs = AutoMultivariateNormal(conjugate().bound(), init_scale=0.3)
    with handlers.seed(rng_seed=0):
        theirs(**conjugate().arrays)

    def start(guide: Any) -> Any:
        return handlers.substitute(handlers.seed(guide._get_posterior, 0), data={"auto_loc": jnp.zeros(10)})()

    np.testing.assert_allclose(start(ours).covariance_matrix, start(theirs).covariance_matrix, rtol=1e-12)


# -- the distribution -------------------------------------------------------------------------------------------------


def test_given_the_shared_coordinates_the_blocks_are_independent_and_conversely() -> None:
    guide = arrow()
    blocks, params = guide.blocks, random_params(guide)
    precision = np.linalg.inv(guide.get_posterior(params).covariance_matrix)[np.ix_(blocks.order, blocks.order)]
    number = np.repeat(np.arange(1 + GROUPS), (blocks.shared, *blocks.sizes))
    between = (number[:, None] != number[None, :]) & (number[:, None] > 0) & (number[None, :] > 0)
    assert np.abs(precision[between]).max() < 1e-12 * np.abs(precision).max()
    assert np.abs(precision[~between]).min() > 1e-6 * np.abs(precision).max()
    # Any precision with these zeros, such as the posterior's, comes from a factor with the pattern.
    _, posterior = exact()
    factor = np.linalg.cholesky(np.linalg.inv(posterior)[np.ix_(blocks.order, blocks.order)])
    assert np.abs(factor[~blocks.pattern]).max() < 1e-14
    params = params_from(guide, np.zeros(10), np.where(blocks.pattern, factor, 0.0))
    np.testing.assert_allclose(guide.get_posterior(params).covariance_matrix, np.linalg.inv(posterior), atol=1e-12)


@pytest.mark.parametrize("structure", ["blocks", "coupled"])
def test_log_prob_is_that_of_scipys_normal_in_program_order(structure: str) -> None:
    guide = set_up(conjugate(), structure=structure)
    assert guide.blocks.order != tuple(range(10))  # or the order could be forgotten
    params = random_params(guide)
    posterior = guide.get_posterior(params)
    factor = np.zeros((10, 10))  # L of z = loc + L eps, in the order of the program
    factor[np.ix_(guide.blocks.order, guide.blocks.order)] = params["auto_scale_tril"]
    np.testing.assert_allclose(posterior.covariance_matrix, factor @ factor.T, rtol=1e-12)
    np.testing.assert_allclose(posterior.variance, np.diag(factor @ factor.T), rtol=1e-12)
    np.testing.assert_array_equal(posterior.mean, params["auto_loc"])
    points = np.random.default_rng(2).normal(size=(3, 5, 10))
    expected = scipy.stats.multivariate_normal(params["auto_loc"], factor @ factor.T).logpdf(points)
    np.testing.assert_allclose(posterior.log_prob(points), expected, rtol=1e-10)
    np.testing.assert_allclose(posterior.log_prob(points[0, 0]), expected[0, 0], rtol=1e-10)


def test_log_prob_takes_one_triangular_solve() -> None:
    guide = arrow()
    program = jax.make_jaxpr(lambda p, z: guide.get_posterior(p).log_prob(z))(random_params(guide), jnp.zeros(10))
    steps = str(program)
    assert steps.count("triangular_solve[") == 1
    assert not any(name in steps for name in ("cholesky[", "lu[", "dot_general[", "eigh[", "qr["))


def test_draws_have_the_covariance() -> None:
    guide = arrow()
    params, count = random_params(guide), 40_000
    draws = guide.sample_posterior(KEY, params, sample_shape=(count,))
    rows = np.concatenate([np.asarray(draws[name]).reshape(count, -1) for name in guide._init_locs], axis=1)
    truth = np.asarray(guide.get_posterior(params).covariance_matrix)
    variances = np.diag(truth)
    assert (np.abs(rows.mean(0) - params["auto_loc"]) < 5 * np.sqrt(variances / count)).all()
    se = np.sqrt((np.outer(variances, variances) + truth**2) / count)
    assert (np.abs(np.cov(rows.T) - truth) < 5 * se).all()


def test_sites_are_drawn_alike_by_guide_and_predictive() -> None:
    guide, params = arrow(), random_params(arrow())
    one = guide.sample_posterior(KEY, params)
    assert {name: np.shape(one[name]) for name in one} == {"mu": (), "alpha": (4,), "slope": (), "beta": (4,)}
    many = Predictive(guide, params=params, num_samples=3)(KEY, **conjugate().arrays)
    assert many["alpha"].shape == (3, 4)


def test_the_transform_makes_the_posterior_from_standard_normals() -> None:
    guide = arrow()
    params = random_params(guide)
    transform, base = guide.get_transform(params), guide.get_base_dist()
    noise = np.random.default_rng(3).normal(size=10)
    draw = transform(noise)
    places = guide.blocks.places
    np.testing.assert_allclose(draw, params["auto_loc"] + (params["auto_scale_tril"] @ noise)[places], rtol=1e-12)
    np.testing.assert_allclose(transform.inv(draw), noise, rtol=1e-9)
    log_q = base.log_prob(noise) - transform.log_abs_det_jacobian(noise, draw)
    np.testing.assert_allclose(guide.get_posterior(params).log_prob(draw), log_q, rtol=1e-12)


def test_the_distribution_survives_jax_and_expansion() -> None:
    normal = BlockNormal(jnp.arange(3.0), jnp.eye(3), (2, 0, 1))
    leaves, structure = jax.tree.flatten(normal)
    again = jax.tree.unflatten(structure, leaves)
    np.testing.assert_array_equal(again.sample(KEY, (2,)), normal.sample(KEY, (2,)))
    expanded = normal.expand_by((4,))
    assert expanded.sample(KEY).shape == (4, 3)
    assert expanded.log_prob(jnp.zeros((4, 3))).shape == (4,)


def noise_then_scale(y: Any = None) -> None:
    with numpyro.plate("item", 3):
        noise = numpyro.sample("noise", dist.Normal(0, 1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    with numpyro.plate("item", 3):
        numpyro.sample("y", dist.Normal(sigma * noise, 1.0), obs=y)


def test_median_and_quantiles_are_those_of_the_constrained_marginals() -> None:
    guide = set_up(Model(noise_then_scale, Dataset("items", {"y": np.array([0.1, -0.4, 2.0])})))
    assert guide.blocks.order == (3, 0, 1, 2)
    params = random_params(guide)
    loc, sds = params["auto_loc"], np.sqrt(np.asarray(guide.get_posterior(params).variance))
    median = guide.median(params)
    np.testing.assert_allclose(median["sigma"], np.exp(loc[3]), rtol=1e-12)
    np.testing.assert_allclose(median["noise"], loc[:3], rtol=1e-12)
    given = np.array([0.05, 0.5, 0.9])
    found = guide.quantiles(params, given.tolist())
    np.testing.assert_allclose(found["sigma"], np.exp(scipy.stats.norm(loc[3], sds[3]).ppf(given)), rtol=1e-9)
    np.testing.assert_allclose(found["noise"], scipy.stats.norm(loc[:3], sds[:3]).ppf(given[:, None]), rtol=1e-9)
    np.testing.assert_allclose(guide.quantiles(params, 0.5)["noise"], loc[:3], atol=1e-12)


# -- parameters -------------------------------------------------------------------------------------------------------


def test_params_and_gaussian_are_inverses() -> None:
    guide = arrow()
    params = random_params(guide)
    assert set(params) == {"auto_loc", "auto_scale_tril"}
    loc, factor = gaussian_from(guide, params)
    again = params_from(guide, loc, factor)
    for name in params:
        np.testing.assert_array_equal(again[name], params[name])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda loc, factor: (loc[1:], factor), "Expected shapes (10,) and (10, 10); got (9,) and (10, 10)."),
        (lambda loc, factor: (loc, factor + 1), "Expected a factor that is zero outside of the pattern: bring it into"),
        (lambda loc, factor: (loc, -factor), "Expected a factor with a positive diagonal; its least entry is -"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(change: Callable[..., Any], text: str) -> None:
    guide = arrow()
    with pytest.raises(ValueError, match="Expected") as raised:
        params_from(guide, *change(*gaussian_from(guide, random_params(guide))))
    assert text in str(raised.value)


def test_the_free_entries_are_a_bijection_with_its_jacobian() -> None:
    blocks = arrow().blocks
    transform = _BlockCholeskyTransform(blocks)
    free = jnp.asarray(np.random.default_rng(0).normal(size=transform.inverse_shape((10, 10))))
    factor = transform(free)
    assert factor.shape == transform.forward_shape(free.shape)
    assert bool(BlockCholesky(blocks)(factor))
    assert not bool(BlockCholesky(blocks)(factor + 1.0))
    assert not bool(BlockCholesky(blocks)(-factor))
    np.testing.assert_allclose(transform.inv(factor), free, rtol=1e-9)
    entries = np.nonzero(blocks.pattern)
    jacobian = jax.jacobian(lambda x: transform(x)[entries])(free)
    log_volume = np.linalg.slogdet(jacobian)[1]
    np.testing.assert_allclose(transform.log_abs_det_jacobian(free, factor), log_volume, rtol=1e-9)
    assert bool(BlockCholesky(blocks)(BlockCholesky(blocks).feasible_like(factor)))


# -- which blocks a model has -----------------------------------------------------------------------------------------


def test_groups_with_intercept_and_slope_make_an_arrow() -> None:
    blocks = plate_blocks(conjugate())
    # In the program: mu, alpha 1-4, slope, beta 1-4.
    assert blocks.order == (0, 5, 1, 6, 2, 7, 3, 8, 4, 9)
    assert blocks.shared == 2
    assert blocks.sizes == (2, 2, 2, 2)
    assert blocks.words == "4 blocks of 2 along 'group' (alpha, beta); 2 shared coordinates coupled to all"
    local = scipy.linalg.block_diag(*[np.tril(np.ones((2, 2)))] * 5).astype(bool)
    arrow = local.copy()
    arrow[2:, :2] = True
    np.testing.assert_array_equal(blocks.pattern, arrow)
    separate = plate_blocks(conjugate(), coupled=False)
    np.testing.assert_array_equal(separate.pattern, local)
    assert separate.words.endswith("; 2 shared coordinates in a block of their own")
    assert not blocks.full
    assert hash(blocks) == hash(plate_blocks(conjugate()))


def test_the_guide_finds_what_the_model_finds() -> None:
    model = conjugate()
    assert set_up(model).blocks == plate_blocks(model)
    assert set_up(model, structure="blocks").blocks == plate_blocks(model, coupled=False)
    assert set_up(model, structure=plate_blocks(model)).blocks == plate_blocks(model)
    positional = AutoBlockNormal(model.bound())
    with handlers.seed(rng_seed=0):
        positional(*model.arrays.values())
    assert positional.blocks == plate_blocks(model)


def test_another_chart_and_a_given_gradient() -> None:
    model = conjugate()
    blocks = plate_blocks(model, "noncentred")
    assert blocks.words.startswith("4 blocks of 2 along 'group' (alpha_decentered, beta_decentered); 2 shared")
    calls = []

    def no_dependence(vector: np.ndarray) -> np.ndarray:
        calls.append(vector.shape)
        return -vector

    assert plate_blocks(model, gradient=no_dependence).sizes == (2, 2, 2, 2)
    assert set(calls) == {(10,)}


@pytest.mark.parametrize("chart", ["centred", "noncentred", "learned"])
def test_axes_named_by_the_model_count_as_plates_in_every_chart(chart: str) -> None:
    model = hierarchical_regression.model(hierarchical_regression.simulate(KEY, groups=5))
    blocks = plate_blocks(model, chart)
    assert blocks.sizes == (2,) * 5
    assert "5 blocks of 2 along 'group' (group_effects" in blocks.words
    # The common effects and the groups' sds lie in plates, too, and are what all groups share.
    assert blocks.shared == 5


def regression(x: Any, y: Any = None) -> None:
    with numpyro.plate("feature", 3):
        beta = numpyro.sample("beta", dist.Normal(0, 1))
    with numpyro.plate("row", len(x)):
        numpyro.sample("y", dist.Normal(x @ beta, 1), obs=y)


def test_values_that_are_dependent_given_the_rest_are_shared() -> None:
    rng = np.random.default_rng(0)
    model = Model(regression, Dataset("rows", {"x": rng.normal(size=(9, 3)), "y": rng.normal(size=9)}))
    blocks = plate_blocks(model)
    assert blocks.full
    assert blocks.words == (
        "3 shared coordinates in one full block, as in full rank: what lies along 'feature' is not independent given "
        "the rest"
    )
    forced = plate_blocks(model, along=["feature"])
    assert forced.words == "3 blocks of 1 along 'feature' (beta)"
    assert set_up(model, along=["feature"]).blocks == forced
    # The density decides, even where a guide is set up on the program with its data hidden to save time.
    masked = AutoBlockNormal(model.bound())
    masked.model = handlers.mask(handlers.block(model.bound(), hide=["y"]), mask=False)
    with handlers.block(), handlers.seed(rng_seed=0):
        masked._setup_prototype(**model.arrays)
    assert masked.blocks == blocks
    # With orthogonal columns they are independent, and one takes the plate at its word.
    orthogonal = Model(regression, Dataset("rows", {"x": np.eye(9, 3), "y": rng.normal(size=9)}))
    assert plate_blocks(orthogonal).sizes == (1, 1, 1)


def test_a_plate_of_one_unit_makes_no_blocks_and_says_so() -> None:
    def single(y: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        with numpyro.plate("unit", 1):
            z = numpyro.sample("z", dist.Normal(mu, 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=y)

    model = Model(single, Dataset("single", {"y": np.array([0.3])}))
    assert plate_blocks(model).note == "a plate of one unit makes no blocks"
    assert plate_blocks(model, along=["unit"]).sizes == (1,)


def test_a_model_without_plates_is_full_rank_and_says_so() -> None:
    for coupling in (True, False):
        blocks = plate_blocks(line(), coupled=coupling)
        assert blocks.full
        assert blocks.words == (
            "2 shared coordinates in one full block, as in full rank: no latent site lies in a plate"
        )
    assert plate_blocks(pair()).full
    guide = set_up(line(), structure="blocks")
    params = random_params(guide)
    ours, theirs = (
        posterior.log_prob(jnp.ones(2))
        for posterior in (
            guide.get_posterior(params),
            dist.MultivariateNormal(params["auto_loc"], scale_tril=params["auto_scale_tril"]),
        )
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def classes_in_schools(y: Any = None, *, class_first: bool = False) -> None:
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    school, room = numpyro.plate("school", 3, dim=-1), numpyro.plate("class", 2, dim=-2)
    outer, inner = (room, school) if class_first else (school, room)
    with school:
        effect = numpyro.sample("effect", dist.Normal(mu, 1))
    with outer, inner:
        deviation = numpyro.sample("deviation", dist.Normal(jnp.broadcast_to(effect, (2, 3)), jnp.ones((2, 3))))
        numpyro.sample("y", dist.Normal(deviation, jnp.ones((2, 3))), obs=y)


@pytest.mark.parametrize("class_first", [False, True])
def test_of_nested_plates_the_outer_one_makes_the_blocks(class_first: bool) -> None:
    data = Dataset("schools", {"y": np.arange(6.0).reshape(2, 3)}, static={"class_first": class_first})
    blocks = plate_blocks(Model(classes_in_schools, data))
    # mu; effect of 3 schools; deviation of 2 classes by 3 schools
    assert blocks.order == (0, 1, 4, 7, 2, 5, 8, 3, 6, 9)
    assert blocks.words == "3 blocks of 3 along 'school' (effect, deviation); 1 shared coordinate coupled to all"
    inner = plate_blocks(Model(classes_in_schools, data), along=["class", "school"])
    assert inner.words == (
        "2 blocks of 3 along 'class' (deviation); 3 blocks of 1 along 'school' (effect); 1 shared coordinate coupled "
        "to all"
    )


def crossed(firm: Any, year: Any, y: Any = None, *, meet: bool) -> None:
    with numpyro.plate("firm", 5):
        a = numpyro.sample("a", dist.Normal(0, 1))
    with numpyro.plate("year", 3):
        b = numpyro.sample("b", dist.Normal(0, 1))
    mean = a[firm] + b[year] if meet else jnp.where(np.arange(15) < 8, a[firm], b[year])
    with numpyro.plate("row", len(firm)):
        numpyro.sample("y", dist.Normal(mean, 1), obs=y)


def test_of_crossed_plates_one_is_shared() -> None:
    pairs = np.array(list(itertools.product(range(5), range(3))))
    arrays = {"firm": pairs[:, 0], "year": pairs[:, 1], "y": np.arange(15.0)}
    model = Model(crossed, Dataset("panel", arrays, static={"meet": True}))
    assert plate_blocks(model).words == "5 blocks of 1 along 'firm' (a); 3 shared coordinates coupled to all"
    both = "5 blocks of 1 along 'firm' (a); 3 blocks of 1 along 'year' (b)"
    assert plate_blocks(model, along=["firm", "year"]).words == both
    # Where no row has a firm and a year, neither needs to be shared.
    assert plate_blocks(Model(crossed, Dataset("panel", arrays, static={"meet": False}))).words == both


@pytest.mark.parametrize("dense", [False, True])
def test_only_the_posterior_decides_and_not_how_it_is_computed(dense: bool) -> None:
    rng = np.random.default_rng(0)
    group = np.arange(60) % 7

    def by_product(x: Any, member: Any, y: Any = None) -> None:
        mu = numpyro.sample("mu", dist.Normal(0, 1).expand([2]).to_event(1))
        with numpyro.plate("group", 7):
            effects = numpyro.sample("effects", dist.MultivariateNormal(mu, 1e-3 * jnp.eye(2)))
        eta = ((member @ effects if dense else effects[group]) * x).sum(-1)
        with numpyro.plate("row", 60):
            numpyro.sample("y", dist.Poisson(jnp.exp(eta)), obs=y)

    x = rng.normal(size=(60, 2))
    data = Dataset("counts", {"x": x, "member": np.eye(7)[group], "y": rng.poisson(1.0, 60)})
    with jax.numpy_rank_promotion("allow"):  # NumPyro's multivariate normal in a plate
        blocks = plate_blocks(Model(by_product, data))
    assert blocks.words == "7 blocks of 2 along 'group' (effects); 2 shared coordinates coupled to all"


def levels(y: Any = None, *, walking: bool) -> None:
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    with numpyro.plate("time", 8):
        level = numpyro.sample("level", dist.ImproperUniform(dist.constraints.real, (), ()))
        numpyro.sample("y", dist.Normal(level, sigma), obs=y)
    numpyro.factor("steps", -0.5 * (jnp.diff(level) ** 2 if walking else level**2).sum())


def test_a_prior_that_couples_is_seen_beside_data_in_raw_units() -> None:
    """The data's gradient is some 1e10 and rounds at 1e-6; neighbours change each other's by about one."""
    data = {"y": 1e10 + np.arange(8.0)}
    walk = plate_blocks(Model(levels, Dataset("walk", data, static={"walking": True})))
    assert walk.full
    assert walk.note == "what lies along 'time' is not independent given the rest"
    apart = plate_blocks(Model(levels, Dataset("apart", data, static={"walking": False})))
    assert apart.words == "8 blocks of 1 along 'time' (level); 1 shared coordinate coupled to all"


def test_a_dependence_that_is_at_rest_at_one_pair_of_points_is_seen_at_another() -> None:
    """Where the first is below 0.45, the two are independent, and at the first pair it lies at 0.27."""

    def in_pieces(y: Any = None) -> None:
        with numpyro.plate("item", 2):
            z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(jax.nn.relu(z[0] - 0.45) * z[1], 1), obs=y)

    assert plate_blocks(Model(in_pieces, Dataset("relu", {"y": np.array(0.3)}))).full


@pytest.mark.slow
def test_a_simplex_counts_with_its_unconstrained_coordinates() -> None:
    def topics(counts: Any = None) -> None:
        base = numpyro.sample("base", dist.Normal(0, 1).expand([4]).to_event(1), infer={"event_dims": ["word"]})
        with numpyro.plate("document", 3):
            shares = numpyro.sample("shares", dist.Dirichlet(jnp.exp(base)), infer={"event_dims": ["word"]})
            level = numpyro.sample("level", dist.HalfNormal(1.0))
        with numpyro.plate("cell", 12):
            numpyro.sample("counts", dist.Poisson(10 * (level[:, None] * shares).reshape(-1)), obs=counts)

    # NumPyro's stick-breaking mixes ranks where simplices come in batches.
    with jax.numpy_rank_promotion("allow"):
        model = Model(topics, Dataset("texts", {"counts": np.arange(12)}))
        blocks = plate_blocks(model)
        # base 0-3; shares of 3 documents by 3 free coordinates 4-12; level 13-15
        assert blocks.order == (0, 1, 2, 3, 4, 5, 6, 13, 7, 8, 9, 14, 10, 11, 12, 15)
        assert blocks.words == ("3 blocks of 4 along 'document' (shares, level); 4 shared coordinates coupled to all")
        # The free coordinates of a simplex are not its shares: only `base` has words.
        assert plate_blocks(model, along=["word"]).words == (
            "4 blocks of 1 along 'word' (base); 12 shared coordinates coupled to all"
        )
        guide = set_up(model)
        drawn = guide.sample_posterior(KEY, random_params(guide), sample_shape=(5,))
        assert guide.blocks == blocks
        assert drawn["shares"].shape == (5, 3, 4)
        np.testing.assert_allclose(drawn["shares"].sum(-1), 1, rtol=1e-12)


def test_plates_stand_where_no_gradient_is_finite() -> None:
    def undefined(y: Any = None) -> None:
        with numpyro.plate("item", 2):
            z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.factor("undefined", jnp.sqrt(-1.0 - (z**2).sum()))
        numpyro.sample("y", dist.Normal(0, 1), obs=y)

    blocks = plate_blocks(Model(undefined, Dataset("none", {"y": np.array(0.0)})))
    assert blocks.words == (
        "2 blocks of 1 along 'item' (z); plates taken as they stand, since no point with a finite gradient was found "
        "to try them"
    )


@pytest.mark.slow
def test_single_precision_finds_the_same_blocks() -> None:
    model = conjugate()
    arrays = {
        name: np.asarray(value, dtype=None if name == "group" else np.float32) for name, value in model.arrays.items()
    }
    with jax.enable_x64(False):
        guide = AutoBlockNormal(intercepts_and_slopes)
        svi = SVI(intercepts_and_slopes, guide, optax.adam(0.05), Trace_ELBO(2))
        params = svi.get_params(svi.init(jax.random.PRNGKey(0), **arrays))
        assert params["auto_scale_tril"].dtype == np.float32
        assert guide.get_posterior(params).log_prob(jnp.zeros(10)).dtype == np.float32
    assert guide.blocks == plate_blocks(model)


# -- sites named together ---------------------------------------------------------------------------------------------


def test_named_sites_are_full_and_all_else_is_on_its_own() -> None:
    blocks = named_blocks(conjugate(), [("beta", "mu"), ("slope",)])
    assert blocks.order == (0, 6, 7, 8, 9, 5, 1, 2, 3, 4)
    assert blocks.sizes == (5, 1, 1, 1, 1, 1)
    assert blocks.words == "1 block of 5 (mu, beta); 1 block of 1 (slope); 4 coordinates each on its own (alpha)"
    expected = np.eye(10, dtype=bool)
    expected[:5, :5] = np.tril(np.ones((5, 5)))
    np.testing.assert_array_equal(blocks.pattern, expected)
    assert set_up(conjugate(), groups=[("beta", "mu"), ("slope",)]).blocks == blocks
    assert named_blocks(conjugate(), [("mu", "alpha", "slope", "beta")]).full
    mean_field = named_blocks(conjugate(), [])
    np.testing.assert_array_equal(mean_field.pattern, np.eye(10, dtype=bool))
    assert "mu_decentered" not in named_blocks(conjugate(), [("beta_decentered",)], "noncentred").words


SITES = "Expected groups to name latent sites, of mu, alpha, slope, beta; got "


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: named_blocks(conjugate(), [("alpha", "gamma")]), f"{SITES}'gamma'."),
        (lambda: set_up(conjugate(), groups=[("y",)]), f"{SITES}'y'."),
        (
            lambda: named_blocks(conjugate(), [("alpha", "beta"), ("alpha",)]),
            "Expected each site once, in one group; got 'alpha' 2 times.",
        ),
        (lambda: named_blocks(conjugate(), [("mu",), ()]), "Expected at least one site in each group; got an empty"),
        (
            lambda: named_blocks(conjugate(), ["alpha"]),
            "Expected each group to be a sequence of site names; got 'alpha': write ('alpha',).",
        ),
        (lambda: named_blocks(conjugate(), "alpha"), "got 'alpha': write ('alpha',)."),
        (
            lambda: plate_blocks(conjugate(), along=["row"]),
            "Expected along to name plates around latent sites, one of group; got 'row'.",
        ),
        (
            lambda: plate_blocks(line(), along=["row"]),
            "Expected along to name plates around latent sites, and there is none; got 'row'.",
        ),
        (
            lambda: plate_blocks(conjugate(), along="group"),
            "Expected along to be a sequence of plate names; got 'group': write ('group',).",
        ),
        (
            lambda: set_up(conjugate(), along="group"),
            "Expected along to be a sequence of plate names; got 'group': write ('group',).",
        ),
        (lambda: plate_blocks(conjugate(), "polar"), "Expected chart to be one of"),
        (
            lambda: AutoBlockNormal(intercepts_and_slopes, "arrow"),
            "Expected structure to be 'blocks', 'coupled' or a Blocks; got 'arrow'.",
        ),
        (
            lambda: AutoBlockNormal(intercepts_and_slopes, "blocks", groups=[("mu",)]),
            "Expected groups or else structure and along; got both: leave one out.",
        ),
        (
            lambda: AutoBlockNormal(intercepts_and_slopes, plate_blocks(line()), along=["group"]),
            "Expected along or a Blocks; got both: give along to plate_blocks.",
        ),
        (lambda: AutoBlockNormal(intercepts_and_slopes, init_scale=0.0), "Expected init_scale above 0; got 0.0."),
        (
            lambda: set_up(conjugate(), structure=plate_blocks(line())),
            "Expected blocks of this model's 10 unconstrained coordinates; got blocks of 2: make them for the model",
        ),
        (lambda: Blocks((0, 2), 2), "Expected order to hold each of 0, ..., 1 once; got (0, 2)."),
        (lambda: Blocks((0, 1), 1), "Expected shared coordinates and blocks to add up to 2; got 1."),
    ],
)
def test_misuse_is_told(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match="Expected") as raised:
        make()
    assert text in str(raised.value)


def test_arrays_that_jax_is_tracing_are_refused_and_closed_over_ones_are_not() -> None:
    model = conjugate()

    def begin(**arrays: Any) -> Any:
        guide = AutoBlockNormal(intercepts_and_slopes)
        svi = SVI(intercepts_and_slopes, guide, optax.adam(0.05), Trace_ELBO())
        return svi.get_params(svi.init(KEY, **arrays))["auto_scale_tril"]

    with pytest.raises(ValueError, match="call the guide, or `svi.init`, once outside of `jax.jit`"):
        jax.jit(begin)(**model.arrays)
    np.testing.assert_allclose(jax.jit(lambda: begin(**model.arrays))(), 0.1 * np.eye(10), atol=1e-12)


# -- families by name -------------------------------------------------------------------------------------------------


def test_the_families_contain_one_another() -> None:
    blocks, coupling = GUIDES["blocks"], GUIDES["coupled"]
    assert (blocks.name, coupling.name) == ("blocks", "coupled")
    assert set(blocks.contains) == {"mean_field", "diagonal"}
    assert set(coupling.contains) == {"mean_field", "diagonal", "blocks", "amortised"}
    assert blocks.title == "blocks (AutoBlockNormal)"
    model = conjugate()
    for guide, expected in ((blocks, False), (coupling, True)):
        built = guide.build(model.bound())
        with handlers.seed(rng_seed=0):
            built(**model.arrays)
        assert built.blocks == plate_blocks(model, coupled=expected)


def test_a_fit_draws_and_weighs_by_one_density() -> None:
    model = conjugate()
    result = fit(model, block_guide("intercepts", [("mu", "alpha")]), key=KEY)
    assert result.autoguide.blocks == named_blocks(model, [("mu", "alpha")])
    draws = result.draw(KEY, 20)
    space = latent_space(model)
    log_p = [model.log_density({name: draws[name][i] for name in space.names}, model.arrays) for i in range(20)]
    weights = np.array(log_p) - result.log_density({name: draws[name] for name in space.names})
    np.testing.assert_allclose(weights, result.log_weights(KEY, 20), rtol=1e-9)
