"""Gaussians along a chain: their algebra against dense matrices, the chain that is found, the guide, and its fits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import posteriors
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Trace_ELBO
from scipy import stats

import models
from toolkit import Dataset, Fit, Model, Status, fit
from toolkit.variational.chain_density import ChainGaussian, _columns, frame_of, member, parameters, precision_of
from toolkit.variational.chain_guides import AutoChainNormal, ChainNormal, chain_params
from toolkit.variational.chain_search import find_chain, pattern_from, pattern_products
from toolkit.variational.chains import (
    Chain,
    Pattern,
    cholesky,
    coloured,
    covariances,
    half_log_determinant,
    inner,
    solved,
    times,
    whitened,
)

SSM = models.load("linear_gaussian_ssm")

# Chains with padding, with and without shared coordinates, in orders of their own.
CHAINS = {
    "scalars": Chain((3, 0, 1, 2, 4), 1),
    "shared": Chain(tuple(range(2, 12)), 2, (0, 1)),
    "padded": Chain((-1, *range(13)), 2, (13, 15, 14), lag=2),
}


@pytest.fixture(params=CHAINS.values(), ids=CHAINS)
def chain(request: pytest.FixtureRequest) -> Chain:
    return request.param


def random_factor(chain: Chain) -> Pattern:
    rng = np.random.default_rng(0)
    blocks, block, shared = chain.blocks, chain.block, len(chain.shared)
    diagonal = np.tril(rng.normal(size=(blocks, block, block)), -1) * 0.5
    diagonal += np.eye(block) * (1 + rng.random((blocks, block, 1)))
    below = rng.normal(size=(blocks, block, block)) * 0.4
    below[-1] = 0
    side = rng.normal(size=(blocks, shared, block)) * 0.3
    for number, place in zip(*np.nonzero(chain.padded), strict=True):  # padding is apart, and one
        diagonal[number, place], diagonal[number, :, place] = 0, 0
        diagonal[number, place, place], below[number, :, place], side[number, :, place] = 1, 0, 0
    corner = np.tril(rng.normal(size=(shared, shared)), -1) + 2 * np.eye(shared)
    return Pattern(*(jnp.asarray(part) for part in (diagonal, below, side, corner)))


def dense(chain: Chain, lower: Pattern, *, symmetric: bool = False) -> np.ndarray:
    """The matrix over places."""
    block, local = chain.block, len(chain.coordinates)
    matrix = np.zeros((chain.places, chain.places))
    for t in range(chain.blocks):
        here = slice(t * block, (t + 1) * block)
        matrix[here, here], matrix[local:, here] = lower.diagonal[t], lower.side[t]
        if t + 1 < chain.blocks:
            matrix[(t + 1) * block : (t + 2) * block, here] = lower.below[t]
    matrix[local:, local:] = lower.corner
    return np.tril(matrix) + np.tril(matrix, -1).T if symmetric else matrix


def patterned(chain: Chain, matrix: np.ndarray) -> Pattern:
    """The pattern's entries of a matrix over places."""
    block, local = chain.block, len(chain.coordinates)
    cut = [slice(t * block, (t + 1) * block) for t in range(chain.blocks)]
    below = [matrix[after, here] for here, after in zip(cut, cut[1:], strict=False)] + [np.zeros((block, block))]
    return Pattern(
        np.stack([matrix[here, here] for here in cut]),
        np.stack(below),
        np.stack([matrix[local:, here] for here in cut]),
        matrix[local:, local:],
    )


def flat(parts: tuple[Any, Any]) -> np.ndarray:
    local, shared = parts
    return np.concatenate([np.asarray(local).reshape(*local.shape[:-2], -1), shared], axis=-1)


def close(found: Pattern, wanted: Pattern) -> None:
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)


# -- algebra against dense matrices -----------------------------------------------------------------------------------


def test_every_operation_is_that_of_the_dense_matrix(chain: Chain) -> None:
    factor = random_factor(chain)
    lower = dense(chain, factor)
    precision, covariance = lower @ lower.T, np.linalg.inv(lower @ lower.T)
    vectors = np.random.default_rng(1).normal(size=(5, chain.places))
    parts = chain.split(jnp.asarray(vectors))
    close(cholesky(patterned(chain, precision)), factor)
    close(precision_of(factor), patterned(chain, precision))
    close(covariances(factor), patterned(chain, covariance))
    np.testing.assert_allclose(flat(whitened(factor, *parts)), vectors @ lower, atol=1e-12)
    np.testing.assert_allclose(flat(coloured(factor, *parts)), np.linalg.solve(lower.T, vectors.T).T, atol=1e-12)
    one = chain.split(jnp.asarray(vectors[0]))
    np.testing.assert_allclose(flat(solved(factor, *one)), covariance @ vectors[0], atol=1e-12)
    matrix = patterned(chain, precision)
    np.testing.assert_allclose(flat(times(matrix, *parts)), vectors @ precision, atol=1e-12)
    assert float(half_log_determinant(factor)) == pytest.approx(np.linalg.slogdet(lower)[1])
    assert float(inner(matrix, covariances(factor))) == pytest.approx(chain.places)


def test_a_matrix_that_is_not_positive_definite_has_no_factor(chain: Chain) -> None:
    matrix = patterned(chain, -np.eye(chain.places))
    assert not all(np.isfinite(np.asarray(part)).all() for part in cholesky(matrix))


def test_a_matrix_is_read_from_its_products(chain: Chain) -> None:
    lower = dense(chain, random_factor(chain))
    order = chain.order[chain.order < chain.size]
    over_places = (lower @ lower.T)[np.ix_(*2 * (chain.order < chain.size,))]
    hessian = np.empty_like(over_places)
    hessian[np.ix_(order, order)] = over_places
    close(pattern_from(chain, jnp.asarray(pattern_products(chain) @ hessian)), patterned(chain, lower @ lower.T))


def test_places_and_coordinates_are_each_others_inverse(chain: Chain) -> None:
    vectors = jnp.asarray(np.random.default_rng(2).normal(size=(3, chain.size)))
    np.testing.assert_array_equal(chain.from_places(chain.into_places(vectors)), vectors)


def test_in_a_frame_the_elbo_bends_by_about_one_in_every_direction(chain: Chain) -> None:
    """KL from the frame's own Gaussian: in whitened parameters its Hessian is one, two on the factor's diagonal."""
    factor = random_factor(chain)
    loc = jnp.zeros(chain.size)
    precision = precision_of(factor)
    frame = frame_of(chain, ChainGaussian(loc, factor, precision))

    def divergence(x: Any) -> Any:
        moved, other = member(chain, frame, x)
        apart = chain.split(chain.into_places(moved))
        squares = sum(jnp.square(part).sum() for part in whitened(factor, *apart))
        spread = inner(precision, covariances(other))
        return 0.5 * (squares + spread) + half_log_determinant(other)

    slope, steps = jax.jit(jax.grad(divergence)), 1e-5 * np.eye(parameters(chain))
    hessian = np.stack([(np.asarray(slope(step)) - np.asarray(slope(-step))) / 2e-5 for step in steps])
    free = np.diag(hessian) > 1e-9
    values = np.linalg.eigvalsh(hessian[np.ix_(free, free)])
    assert values.min() > 0.99
    assert values.max() < 2.01


def test_the_roots_of_a_frame_are_those_of_the_rows_of_each_block() -> None:
    chain = CHAINS["shared"]
    factor = random_factor(chain)
    lower = dense(chain, factor)
    covariance = np.linalg.inv(lower @ lower.T)
    rows = [2, 3, 4, 5, 10, 11]  # the second block, the third, and the shared
    root = np.asarray(_columns(factor))[1]
    np.testing.assert_allclose(root @ root.T, np.linalg.inv(covariance[np.ix_(rows, rows)]), atol=1e-10)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (((0, 2), 1), "Expected each coordinate once"),
        (((0, 1), 1, (1,)), "Expected each coordinate once"),
        (((0, 1, 2), 2), "Expected blocks of 2; got 3 coordinates in blocks"),
    ],
)
def test_coordinates_must_be_there_once(arguments: tuple[Any, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Chain(*arguments)


# -- which chain a model has ------------------------------------------------------------------------------------------

Y = np.random.default_rng(3).normal(size=23)


def by_scan(y: Any) -> None:
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    first = numpyro.sample("first", dist.Normal(0.0, 1.0))

    def step(before: Any, seen: Any) -> tuple[Any, None]:
        now = numpyro.sample("x", dist.Normal(0.9 * before, scale))
        numpyro.sample("y", dist.Normal(now, 1.0), obs=seen)
        return now, None

    scan(step, first, y)


def random_walk(y: Any) -> None:
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    x = numpyro.sample("x", dist.GaussianRandomWalk(scale, len(y)))
    with numpyro.plate("time", len(y)):
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def two_steps_back(y: Any) -> None:
    def step(before: Any, seen: Any) -> tuple[Any, None]:
        now = numpyro.sample("x", dist.Normal(1.2 * before[0] - 0.3 * before[1], 0.5))
        numpyro.sample("y", dist.Normal(now, 1.0), obs=seen)
        return (now, before[0]), None

    scan(step, (0.0, 0.0), y)


def pairs(y: Any) -> None:
    turn = jnp.array([[0.9, 0.2], [-0.2, 0.9]])
    x = numpyro.sample("x", dist.GaussianStateSpace(len(y), turn, scale_tril=jnp.eye(2)))
    with numpyro.plate("time", len(y)):
        numpyro.sample("y", dist.Normal(x[:, 0], 1.0), obs=y)


def plates(y: Any) -> None:
    """Two sites along time, of which one follows the other."""
    with numpyro.plate("time", len(y)):
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        z = numpyro.sample("z", dist.Normal(x, 1.0))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


def sum_of_all(y: Any) -> None:
    with numpyro.plate("time", len(y)):
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(x.sum(), 1.0), obs=y[0])


def scalar(y: Any) -> None:
    numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=y[0])


FOUND = {
    by_scan: "a chain of 23 blocks of 1 along the first axis (x), each coupled to the next; 2 shared coordinates "
    "coupled to all",
    random_walk: "a chain of 23 blocks of 1 along the first axis (x), each coupled to the next; 1 shared coordinate "
    "coupled to all",
    two_steps_back: "a chain of 12 blocks of 2 along the first axis (x), of 2 steps each, coupled to the next",
    pairs: "a chain of 23 blocks of 2 along the first axis (x), each coupled to the next",
    plates: "a chain of 23 blocks of 2 along 'time' (x, z), each coupled to the next",
    sum_of_all: "23 shared coordinates in one full block, as in full rank: along no axis that was tried does a step "
    "depend on its neighbours and the shared coordinates alone",
    scalar: "1 shared coordinate in one full block, as in full rank: no latent site has an axis of 4 steps or more",
}


def a_model(fn: Callable[..., Any]) -> Model:
    return Model(fn, Dataset("d", {"y": Y}))


@pytest.mark.parametrize("fn", FOUND, ids=lambda fn: fn.__name__)
def test_the_chain_is_found_from_the_density(fn: Callable[..., Any]) -> None:
    assert find_chain(a_model(fn)).words == FOUND[fn]


def test_the_axis_may_be_named() -> None:
    assert find_chain(a_model(plates), along="time").words == FOUND[plates]
    assert find_chain(a_model(by_scan), along="x").words == FOUND[by_scan]
    with pytest.raises(ValueError, match="Expected along to be one of time, x, z; got 'week'"):
        find_chain(a_model(plates), along="week")


@pytest.mark.slow
def test_every_axis_is_tried_and_plates_are_told_apart() -> None:
    def panel(y: Any) -> None:
        with numpyro.plate("subject", 3):
            x = numpyro.sample("x", dist.GaussianRandomWalk(jnp.ones(3), len(y)))
        numpyro.sample("y", dist.Normal(x.sum(0), 1.0).to_event(1), obs=y)

    assert find_chain(a_model(panel)).words == (
        "a chain of 23 blocks of 3 along the second axis (x), each coupled to the next"
    )

    def equally_long(y: Any) -> None:
        with numpyro.plate("neuron", len(y)):
            w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        x = numpyro.sample("x", dist.GaussianRandomWalk(1.0, len(y)))
        with numpyro.plate("time", len(y)):
            numpyro.sample("y", dist.Normal(x + w.sum(), 1.0), obs=y)

    found = find_chain(a_model(equally_long))
    assert (found.sites, found.block, len(found.shared)) == (("x",), 1, 23)
    with pytest.raises(ValueError, match="Expected along to be one of neuron, w, x; got 'time'"):
        find_chain(a_model(equally_long), along="time")


def test_a_walk_and_what_a_plate_holds_for_each_of_its_steps_are_one_chain() -> None:
    def robust(y: Any) -> None:
        x = numpyro.sample("x", dist.GaussianRandomWalk(1.0, len(y)))
        with numpyro.plate("time", len(y)):
            scale = numpyro.sample("scale", dist.Gamma(2.0, 2.0))
            numpyro.sample("y", dist.Normal(x, scale**-0.5), obs=y)

    found = find_chain(a_model(robust))
    assert found.words == "a chain of 23 blocks of 2 along the first axis (x, scale), each coupled to the next"
    assert find_chain(a_model(robust), along="time").words == (
        "a chain of 23 blocks of 2 along 'time' (x, scale), each coupled to the next"
    )


def test_a_chain_that_is_no_cheaper_than_full_rank_is_told_as_such() -> None:
    def anchored(y: Any) -> None:
        offsets = numpyro.sample("offsets", dist.Normal(jnp.zeros(40), 1.0).to_event(1))
        x = numpyro.sample("x", dist.GaussianRandomWalk(1.0, len(y)))
        numpyro.sample("y", dist.Normal(x + offsets.sum() ** 2, 1.0).to_event(1), obs=y)

    found = find_chain(a_model(anchored))
    assert (found.sites, len(found.shared), found.saves) == (("x",), 40, False)
    assert "40 shared coordinates coupled to all, as many as lie along it or more: little is saved" in found.words

    def crossed(y: Any) -> None:
        numpyro.sample("x", dist.Normal(jnp.zeros((150, 400)), 1.0).to_event(2))
        numpyro.sample("y", dist.Normal(jnp.zeros(len(y)), 1.0).to_event(1), obs=y)

    assert find_chain(a_model(crossed), along="x").note.startswith(
        "along any axis three blocks and the shared coordinates are more than 300"
    )


def test_a_dependence_that_the_hessian_does_not_see_is_found() -> None:
    def all_pairs(y: Any) -> None:
        x = numpyro.sample("x", dist.GaussianRandomWalk(1.0, len(y)))
        numpyro.factor("apart", -jnp.abs(x[:, None] - x[None, :]).sum())
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    assert "does a step depend on its neighbours" in find_chain(a_model(all_pairs)).note


def test_a_hessian_that_is_not_finite_is_told_as_such() -> None:
    def broken(y: Any) -> None:
        x = numpyro.sample("x", dist.GaussianRandomWalk(1.0, len(y)))
        numpyro.factor("norm", 0.0 * jnp.linalg.norm(jnp.zeros(2) * x[0]))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    assert "its Hessian is finite at fewer than" in find_chain(a_model(broken)).note


# -- the guide --------------------------------------------------------------------------------------------------------


def test_its_distribution_is_the_dense_one(chain: Chain) -> None:
    factor, loc = random_factor(chain), jnp.arange(float(chain.size))
    law = ChainNormal(loc, *factor, chain=chain)
    lower = dense(chain, factor)
    over_places = np.linalg.inv(lower @ lower.T)
    inside = chain.order < chain.size
    covariance = np.empty((chain.size, chain.size))
    covariance[np.ix_(*2 * (chain.order[inside],))] = over_places[np.ix_(inside, inside)]
    points = np.random.default_rng(4).normal(size=(6, chain.size))
    wanted = stats.multivariate_normal(np.asarray(loc), covariance).logpdf(points)
    np.testing.assert_allclose(law.log_prob(points), wanted, rtol=1e-10)
    np.testing.assert_allclose(law.variance, np.diag(covariance), rtol=1e-10)
    draws = np.asarray(law.sample(jax.random.key(0), (40_000,)))
    assert (np.abs(draws.mean(0) - loc) < 5 * np.sqrt(np.diag(covariance) / 40_000)).all()
    reach = np.sqrt((np.outer(np.diag(covariance), np.diag(covariance)) + covariance**2) / 40_000)
    assert (np.abs(np.cov(draws.T) - covariance) < 5 * reach).all()


@pytest.mark.slow
def test_it_works_with_numpyros_own_svi() -> None:
    bound = a_model(random_walk)
    guide = AutoChainNormal(bound.bound())
    svi = SVI(bound.bound(), guide, optax.adam(0.05), Trace_ELBO(num_particles=8))
    done = svi.run(jax.random.key(0), 300, progress_bar=False, **bound.arrays)
    best = fit(bound, "full_rank", key=jax.random.key(0)).elbo
    assert best is not None
    assert -float(done.losses[-50:].mean()) > best.value - 2.0
    params = svi.get_params(done.state)
    wanted = guide.quantiles(params, [0.25, 0.5, 0.75])
    drawn = guide.sample_posterior(jax.random.key(1), params, sample_shape=(4_000,))
    share = (np.asarray(drawn["x"]) < np.asarray(wanted["x"][2])).mean(0)
    assert (np.abs(share - 0.75) < 5 * np.sqrt(0.75 * 0.25 / 4_000)).all()
    np.testing.assert_allclose(guide.median(params)["x"], wanted["x"][1])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"init_scale": 0.0}, "Expected init_scale above 0; got 0.0"),
        ({"chain": CHAINS["shared"], "along": "time"}, "Expected chain or along; got both"),
    ],
)
def test_its_arguments_must_fit(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        AutoChainNormal(random_walk, **options)


def test_a_chain_of_another_model_is_told() -> None:
    guide = AutoChainNormal(random_walk, CHAINS["scalars"])
    seeded = numpyro.handlers.seed(guide, 0)
    with pytest.raises(ValueError, match="Expected a chain of this model's 24 unconstrained coordinates; got one of 5"):
        seeded(**a_model(random_walk).arrays)


def test_a_chain_that_the_model_does_not_have_is_told() -> None:
    steps = np.arange(24)
    guide = AutoChainNormal(random_walk, Chain(tuple(np.append(steps[::2], steps[1::2]).tolist()), 1, along="odd"))
    with pytest.raises(ValueError, match="blocks of 1 along odd .* where blocks depend on others too: leave `chain`"):
        numpyro.handlers.seed(guide, 0)(**a_model(random_walk).arrays)


# -- fits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "coefficients", [(1.0,), pytest.param((1.1, -0.3), marks=pytest.mark.slow)], ids=["level", "two_steps"]
)
def test_on_a_linear_gaussian_chain_the_gap_is_zero(coefficients: tuple[float, ...]) -> None:
    data = SSM.simulate(jax.random.key(5), steps=61, coefficients=coefficients)
    bound = SSM.model(data, coefficients=coefficients)
    fitted = fit(bound, "chain", key=jax.random.key(0))
    assert fitted.status is Status.ARRIVED
    assert fitted.elbo is not None
    assert bound.log_evidence is not None
    assert abs(fitted.elbo.value - bound.log_evidence) < 3 * fitted.elbo.se + 1e-8
    assert fitted.certificate is not None
    assert fitted.certificate.scope.value == "global bound"
    assert fitted.certificate.limit < 0.01


@pytest.mark.slow
def test_where_the_hessian_has_the_pattern_no_gaussian_is_better() -> None:
    """With unknown scales, where natural-gradient steps crawl: as high as full rank."""
    bound = SSM.model(scales="unknown")
    small, large = (fit(bound, name, key=jax.random.key(0)) for name in ("chain", "full_rank"))
    assert small.status is large.status is Status.ARRIVED
    assert small.elbo is not None
    assert large.elbo is not None
    se = np.hypot(small.elbo.se, large.elbo.se)
    assert abs(small.elbo.value - large.elbo.value) < 5 * se + max(small.gap_limit or 0, large.gap_limit or 0)


@pytest.fixture(scope="module")
def walked() -> Fit:
    return fit(a_model(random_walk), "chain", key=jax.random.key(4))


@pytest.mark.slow
def test_the_same_key_gives_the_same_fit(walked: Fit) -> None:
    other = fit(a_model(random_walk), "chain", key=jax.random.key(4))
    for name, value in walked.params.items():
        np.testing.assert_array_equal(value, other.params[name])


def test_parameters_are_those_of_the_guide(walked: Fit) -> None:
    posterior = walked.autoguide.get_posterior(walked.params)
    again = chain_params(walked.autoguide, posterior.loc, posterior.factor)
    assert set(again) == set(walked.params)
    drawn = walked.draw(jax.random.key(0), 3)
    assert drawn["x"].shape == (3, 23)
    assert np.isfinite(walked.log_weights_at(drawn)).all()


def test_a_small_budget_is_kept_and_told() -> None:
    fitted = fit(a_model(random_walk), "chain", key=jax.random.key(0), max_gradients=3_000)
    assert fitted.status in (Status.BUDGET, Status.UNPROVEN)
    assert "of the budget" in fitted.message
    assert fitted.cost.gradient_evaluations <= 3_000


def test_a_model_without_a_chain_is_told() -> None:
    with pytest.raises(ValueError, match="Expected a model with a chain; got one without, since along no axis"):
        fit(a_model(sum_of_all), "chain", key=jax.random.key(0))


def test_a_density_that_is_nowhere_finite_is_told() -> None:
    def nowhere(y: Any) -> None:
        x = numpyro.sample("x", dist.GaussianRandomWalk(1.0, len(y)))
        numpyro.factor("never", jnp.where(x.sum() > 1e9, 0.0, -jnp.inf))
        with numpyro.plate("time", len(y)):
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y)

    fitted = fit(a_model(nowhere), "chain", key=jax.random.key(0))
    assert fitted.status is Status.NO_VALID_START
    assert not fitted.usable


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 17])
def test_a_long_way_to_the_optimum_is_gone(shared_data: Path, seed: int) -> None:
    """170 nats, of which a round of climbs gains a few: rounds that gain are not counted."""
    bound = posteriors.load("GLMM_Poisson_data-GLMM_Poisson_model")
    fitted = fit(bound, "chain", key=jax.random.PRNGKey(seed))
    assert fitted.status is Status.ARRIVED
    assert fitted.elbo is not None
    assert (
        fitted.elbo.value > -173.9926 - 0.1 - 5 * fitted.elbo.se
    )  # full rank's best, from `benchmarks/yardsticks.csv`


@pytest.mark.slow
def test_kinks_do_not_mislead_it() -> None:
    """The mean of the Hessians of a density with kinks is not its curvature: climbs must find the optimum."""

    def robust(y: Any) -> None:
        def step(before: Any, seen: Any) -> tuple[Any, None]:
            now = numpyro.sample("x", dist.Laplace(before, 0.2))
            numpyro.sample("y", dist.Normal(now, 0.5), obs=seen)
            return now, None

        scan(step, 0.0, y)

    bound = a_model(robust)
    mean_field = fit(bound, "mean_field", key=jax.random.key(0))
    for smaller in ((), (mean_field,)):
        fitted = fit(bound, "chain", key=jax.random.key(0), smaller=smaller)
        assert fitted.elbo is not None
        assert mean_field.elbo is not None
        assert fitted.elbo.value > mean_field.elbo.value - 5 * np.hypot(fitted.elbo.se, mean_field.elbo.se)


@pytest.mark.slow
def test_a_posterior_that_may_be_improper_does_not_pass() -> None:
    """Only differences are seen: along a common shift the density stays the same."""

    def differences(y: Any) -> None:
        x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real_vector, (), (len(y) + 1,)))
        numpyro.sample("y", dist.Normal(x[1:] - x[:-1], 1.0).to_event(1), obs=y)

    fitted = fit(a_model(differences), "chain", key=jax.random.key(0), max_gradients=100_000)
    assert not fitted.status.ok
    assert "may be improper, as the priors of x are" in fitted.message


@pytest.mark.slow
@pytest.mark.parametrize("gradients", [1, pytest.param(3_000, marks=pytest.mark.slow)])
def test_the_budget_holds_where_a_look_is_dear(gradients: int) -> None:
    model = models.load("poisson_state_space")
    bound = model.model(model.dataset(bins=20), tuning="unknown")
    fitted = fit(bound, "chain", key=jax.random.key(0), max_gradients=gradients)
    # One look at 16 draws of 1 + 6 + 39 gradients is begun in any case.
    assert fitted.cost.gradient_evaluations <= max(gradients, 16 * 46)
    assert not fitted.status.ok


@pytest.mark.slow
def test_work_and_memory_grow_with_the_length_and_not_with_its_square() -> None:
    costs = []
    for steps in (100, 1_000):
        bound = SSM.model(SSM.simulate(jax.random.key(0), steps=steps))
        costs.append(fit(bound, "chain", key=jax.random.key(0), elbo_draws=100).cost)
    short, long = costs
    assert long.gradient_evaluations < 2 * short.gradient_evaluations
    assert long.peak_bytes < 10.5 * short.peak_bytes
