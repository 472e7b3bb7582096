"""Gaussian families against NumPy's dense algebra and SciPy's optimiser, and the base draws that they are made of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.linalg
import scipy.optimize
import scipy.stats
from numpyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from scipy.stats import multivariate_normal

from toolkit import Dataset, Guide, Model
from toolkit.modelling.space import latent_space
from toolkit.variational import draws as drawing
from toolkit.variational.autoguides import GaussianForm, gaussian_form
from toolkit.variational.block_guides import AutoBlockNormal
from toolkit.variational.blocks import Blocks, Run
from toolkit.variational.building import build_guide
from toolkit.variational.draws import base_draws, matched_draws, mirrored_draws
from toolkit.variational.gaussians import (
    Diagonal,
    Family,
    Frame,
    LowRank,
    Member,
    Quadratic,
    Triangular,
    best_factor,
    inverse_factor,
)
from toolkit.variational.solvers.fixed_draws import Units

KEY = jax.random.PRNGKey(0)
SIZE = 5
UNITS = np.array([1.0, 100.0, 0.01, 3.0, 0.3])
ARROW = Blocks((3, 0, 4, 1, 2), 1, (Run(2, 2, ("z",)),), coupled=True)
APART = Blocks((2, 4, 1, 0, 3), 2, (Run(3, 1, ("z",)),))

FAMILIES: dict[str, Callable[[Frame], Family]] = {
    "diagonal": Diagonal,
    "full": Triangular,
    "ordered": lambda frame: Triangular(frame, np.array(ARROW.order)),
    "arrow": lambda frame: Triangular(frame, np.array(ARROW.order), ARROW.pattern),
    "blocks": lambda frame: Triangular(frame, np.array(APART.order), APART.pattern),
    "low_rank": lambda frame: LowRank(frame, 2),
    "low_rank_sum": lambda frame: LowRank(frame, 2, dense=False),
}


def random_precision(seed: int, size: int = SIZE) -> np.ndarray:
    root = np.random.default_rng(seed).standard_normal((size, size))
    units = np.resize(UNITS, size)
    return (root @ root.T + 0.5 * np.eye(size)) / np.outer(units, units)


def frame_of(seed: int = 0, *, diagonal: bool = False) -> Frame:
    loc = UNITS * np.random.default_rng(100 + seed).standard_normal(SIZE)
    precision = random_precision(seed)
    return Frame.of(loc, np.diag(precision) if diagonal else precision)


def parameters(family: Family, seed: int = 1) -> np.ndarray:
    return 0.3 * np.random.default_rng(seed).standard_normal(family.parameters)


def quadratic_of(seed: int, *, diagonal: bool = False) -> Quadratic:
    rng = np.random.default_rng(200 + seed)
    precision = random_precision(seed)
    slope = rng.standard_normal(SIZE) / UNITS
    return Quadratic(UNITS * rng.standard_normal(SIZE), slope, np.diag(precision) if diagonal else precision)


def dense(quadratic: Quadratic) -> np.ndarray:
    return np.diag(quadratic.precision) if quadratic.precision.ndim == 1 else quadratic.precision


def numerical(function: Callable[[np.ndarray], float], x: np.ndarray) -> np.ndarray:
    """The gradient by central differences, with an error of about 1e-9 of the function."""
    steps = 1e-5 * np.eye(len(x))
    return np.array([(function(x + step) - function(x - step)) / 2e-5 for step in steps])


def kl(member: Member, loc: np.ndarray, precision: np.ndarray) -> float:
    """KL(q || p) in nats, from a member to N(loc, precision^-1)."""
    product, apart = precision @ member.covariance(), member.loc - loc
    return 0.5 * float(np.trace(product) - len(loc) - np.linalg.slogdet(product)[1] + apart @ precision @ apart)


every_family = pytest.mark.parametrize("name", list(FAMILIES))
every_frame = pytest.mark.parametrize("diagonal", [False, True], ids=["dense_frame", "diagonal_frame"])


# -- quadratics and frames --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_quadratic_is_its_formula(diagonal: bool) -> None:
    quadratic = quadratic_of(3, diagonal=diagonal)
    points = UNITS * np.random.default_rng(0).standard_normal((7, SIZE))
    values, gradients = quadratic.at(points)
    for point, value, gradient in zip(points, values, gradients, strict=True):
        apart = point - quadratic.centre
        expected = quadratic.gradient @ apart - 0.5 * apart @ dense(quadratic) @ apart
        assert value == pytest.approx(expected, rel=1e-12)
        np.testing.assert_allclose(gradient, quadratic.gradient - dense(quadratic) @ apart, rtol=1e-9)
        one, slope = quadratic.at_one(point)
        assert one == pytest.approx(value, rel=1e-12)
        np.testing.assert_allclose(slope, gradient, rtol=1e-12)
    stacked = np.random.default_rng(1).standard_normal((2, 3, SIZE))
    np.testing.assert_allclose(quadratic.times(stacked), stacked @ dense(quadratic), rtol=1e-12)
    np.testing.assert_array_equal(quadratic.diagonal, np.diag(dense(quadratic)))


@every_frame
def test_a_frame_moves_and_measures(diagonal: bool) -> None:
    frame = frame_of(diagonal=diagonal)
    covariance = np.diag(1 / frame.precision) if diagonal else np.linalg.inv(frame.precision)
    factor = np.linalg.cholesky(covariance)
    for shape in ((SIZE,), (SIZE, 2)):
        vector = np.random.default_rng(0).standard_normal(shape)
        np.testing.assert_allclose(frame.move(vector), factor @ vector, rtol=1e-9)
        np.testing.assert_allclose(frame.measure(factor @ vector), vector, rtol=1e-8)
        np.testing.assert_allclose(frame.pull(vector), factor.T @ vector, rtol=1e-9)
    np.testing.assert_allclose(frame.diagonal, np.diag(frame.precision) if not diagonal else frame.precision)


def test_the_factor_of_an_inverse() -> None:
    precision = random_precision(5)
    np.testing.assert_allclose(
        inverse_factor(precision), np.linalg.cholesky(np.linalg.inv(precision)), rtol=1e-8, atol=1e-12
    )


# -- families ---------------------------------------------------------------------------------------------------------


@every_frame
@every_family
def test_a_member_names_its_parameters(name: str, diagonal: bool) -> None:
    family = FAMILIES[name](frame_of(diagonal=diagonal))
    x = parameters(family)
    np.testing.assert_allclose(family.near(family.member(x)), x, atol=1e-9)


@every_frame
@every_family
def test_draws_and_scores_are_those_of_the_members_covariance(name: str, diagonal: bool) -> None:
    family = FAMILIES[name](frame_of(diagonal=diagonal))
    member = family.member(parameters(family))
    covariance = member.covariance()
    # A draw is linear in its base: unit vectors show the root, whose square must be the covariance.
    root = (family.points(member, np.eye(family.base)) - member.loc).T
    np.testing.assert_allclose(root @ root.T / np.outer(UNITS, UNITS), covariance / np.outer(UNITS, UNITS), rtol=1e-8)
    base = np.random.default_rng(2).standard_normal((6, family.base))
    apart = family.points(member, base) - member.loc
    np.testing.assert_allclose(
        family.scores(member, base) * UNITS, np.linalg.solve(covariance, apart.T).T * UNITS, rtol=1e-7, atol=1e-9
    )


@every_frame
@every_family
def test_a_members_density_is_scipys(name: str, diagonal: bool) -> None:
    family = FAMILIES[name](frame_of(diagonal=diagonal))
    member = family.member(parameters(family))
    points = family.points(member, np.random.default_rng(3).standard_normal((6, family.base)))
    # In units in which the covariance is well conditioned; the volume of the units is put back.
    law = multivariate_normal(member.loc / UNITS, member.covariance() / np.outer(UNITS, UNITS))
    expected = law.logpdf(points / UNITS) - np.log(UNITS).sum()
    np.testing.assert_allclose(member.log_density(points), expected, rtol=1e-9)


@pytest.mark.parametrize("blocks", [ARROW, APART], ids=["arrow", "blocks"])
def test_a_factor_is_zero_outside_of_the_pattern_in_the_familys_order(blocks: Blocks) -> None:
    order = np.array(blocks.order)
    family = Triangular(frame_of(), order, blocks.pattern)
    factor = family.member(parameters(family)).factor[order]
    assert (factor[~blocks.pattern] == 0).all()
    assert (factor[blocks.pattern] != 0).all()
    assert family.parameters == SIZE + blocks.pattern.sum()


@every_frame
@every_family
def test_pull_is_the_gradient_of_a_mean_over_draws(name: str, diagonal: bool) -> None:
    family = FAMILIES[name](frame_of(diagonal=diagonal))
    quadratic = quadratic_of(4)
    base = np.random.default_rng(3).standard_normal((16, family.base))
    x = parameters(family)

    def mean(at: np.ndarray) -> float:
        return float(quadratic.at(family.points(family.member(at), base))[0].mean())

    member = family.member(x)
    _, gradients = quadratic.at(family.points(member, base))
    expected = numerical(mean, x)
    np.testing.assert_allclose(
        family.pull(x, member, base, gradients), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max()
    )


@pytest.mark.parametrize("known", ["dense", "diagonal"])
@every_frame
@every_family
def test_exact_is_entropy_plus_mean_in_closed_form(name: str, diagonal: bool, known: str) -> None:
    family = FAMILIES[name](frame_of(diagonal=diagonal))
    quadratic = quadratic_of(6, diagonal=known == "diagonal")
    x = parameters(family)
    member = family.member(x)

    def closed(at: np.ndarray) -> float:
        one = family.member(at)
        covariance, apart = one.covariance(), one.loc - quadratic.centre
        units = np.outer(UNITS, UNITS)
        log_det = np.linalg.slogdet(covariance / units)[1] + 2 * np.log(UNITS).sum()
        entropy = 0.5 * (SIZE * (1 + np.log(2 * np.pi)) + log_det)
        spread = np.trace(dense(quadratic) @ covariance)
        return float(entropy + quadratic.gradient @ apart - 0.5 * (apart @ dense(quadratic) @ apart + spread))

    value, gradient = family.exact(x, member, quadratic)
    assert value == pytest.approx(closed(x), rel=1e-9)
    expected = numerical(closed, x)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    nothing = Quadratic(member.loc, np.zeros(SIZE), np.zeros(SIZE))
    assert family.exact(x, member, nothing)[0] == pytest.approx(family.entropy(member), rel=1e-12)


@every_family
def test_zero_is_the_best_member_for_the_frames_gaussian(name: str) -> None:
    frame = frame_of(7)
    family = FAMILIES[name](frame)
    x = np.zeros(family.parameters)
    target = Quadratic(frame.loc, np.zeros(SIZE), frame.precision)
    _, gradient = family.exact(x, family.member(x), target)
    # A low-rank family's frame stops where a round gains less than a hundredth of a nat.
    assert np.abs(gradient).max() < (0.3 if "low_rank" in name else 1e-9)
    best = scipy.optimize.minimize(
        lambda at: tuple(-part for part in family.exact(at, family.member(at), target)), x, jac=True, tol=1e-12
    )
    begun = kl(family.member(x), frame.loc, frame.precision)
    ended = kl(family.member(best.x), frame.loc, frame.precision)
    assert begun - ended < (0.1 if "low_rank" in name else 1e-8)
    assert begun < kl(family.member(parameters(family)), frame.loc, frame.precision) - 0.1


def test_curvature_at_zero_is_one_in_location_and_factor_on_a_gaussian() -> None:
    frame = frame_of(8)
    for name in ("diagonal", "full", "ordered"):
        family = FAMILIES[name](frame)
        target = Quadratic(frame.loc, np.zeros(SIZE), frame.precision)

        def slope(at: np.ndarray, family: Family = family, target: Quadratic = target) -> np.ndarray:
            return family.exact(at, family.member(at), target)[1]

        steps = 1e-5 * np.eye(family.parameters)
        zero = np.zeros(family.parameters)
        curvature = np.array([(slope(zero - step) - slope(zero + step)) / 2e-5 for step in steps])
        np.testing.assert_allclose(curvature, np.eye(family.parameters), atol=1e-6)


@pytest.mark.parametrize("known", [False, True], ids=["dense", "diagonal"])
@pytest.mark.parametrize("diagonal", [False, True])
def test_bend_is_the_hessian_of_what_is_known_exactly(diagonal: bool, known: bool) -> None:
    family, quadratic = LowRank(frame_of(diagonal=diagonal), 2), quadratic_of(3, diagonal=known)
    x = parameters(family)

    def slope(at: np.ndarray) -> np.ndarray:
        return family.exact(at, family.undrawn(at), quadratic)[1]

    steps = 1e-5 * np.eye(len(x))
    hessian = np.stack([(slope(x + step) - slope(x - step)) / 2e-5 for step in steps])
    bent = family.bend(x, quadratic)
    np.testing.assert_allclose(bent, -hessian[SIZE:, SIZE:], atol=1e-6 * np.abs(bent).max())
    np.testing.assert_allclose(hessian[:SIZE, SIZE:], 0, atol=1e-6 * np.abs(bent).max())  # shifts stand alone


def test_units_pull_what_they_move_and_even_out_the_curvature() -> None:
    family, quadratic = LowRank(frame_of(), 2), quadratic_of(3)
    x = family.near(family.member(np.zeros(family.parameters)))
    units = Units(family, x, quadratic)
    first, second = np.random.default_rng(0).standard_normal((2, family.parameters))
    assert units.pull(first) @ second == pytest.approx(first @ units.move(second))
    moved = np.stack([units.move(unit) for unit in np.eye(family.parameters)])[SIZE:, SIZE:]
    curvature = np.linalg.eigvalsh(moved @ family.bend(x, quadratic) @ moved.T)
    assert curvature.max() == pytest.approx(1, abs=0.2)
    assert curvature.max() < 1
    plain = Units(Diagonal(frame_of()), np.zeros(2 * SIZE), quadratic)
    np.testing.assert_array_equal(plain.move(first), first)
    np.testing.assert_array_equal(plain.pull(first), first)


@pytest.mark.parametrize("family", [LowRank(frame_of(), 2), Triangular(frame_of())], ids=["low rank", "full rank"])
def test_units_learn_the_curvature_along_a_climbs_steps(family: LowRank | Triangular) -> None:
    """After a pair, the inverse Hessian that the units stand for takes its bend to its step; flat ones are left out."""
    random = np.random.default_rng(0)
    size = family.parameters
    units = Units(family, family.near(family.member(np.zeros(size))), quadratic_of(3))
    root = random.standard_normal((size, size)) / np.sqrt(size) + np.eye(size)
    hessian = root @ root.T
    steps = random.standard_normal((8, size))
    units.learn([(step, hessian @ step) for step in steps])
    known = units.move(first := random.standard_normal(size))
    units.learn([(steps[0], least * steps[0]) for least in (-1.0, 0.0, 1e-6)])  # bent upwards, flat, nearly flat
    np.testing.assert_array_equal(units.move(first), known)
    first, second = random.standard_normal((2, size))
    assert units.pull(first) @ second == pytest.approx(first @ units.move(second))
    last = steps[-1]
    np.testing.assert_allclose(units.move(units.pull(hessian @ last)), last, atol=1e-8 * np.abs(last).max())
    before = Units(family, family.near(family.member(np.zeros(size))), quadratic_of(3))

    def missed(units: Units) -> float:
        return float(np.mean([np.linalg.norm(units.move(units.pull(hessian @ step)) - step) for step in steps]))

    assert missed(units) < 0.5 * missed(before)


def test_larger_families_name_members_of_smaller_ones() -> None:
    frame = frame_of()
    diagonal, low, full = Diagonal(frame), LowRank(frame, 2), Triangular(frame, np.array(ARROW.order))
    smaller = [diagonal.member(parameters(diagonal)), low.member(parameters(low))]
    one_column = LowRank(frame, 1)
    pairs = [(full, member) for member in smaller]
    pairs += [(low, smaller[0]), (low, one_column.member(parameters(one_column)))]
    for family, member in pairs:
        same = family.member(family.near(member))
        np.testing.assert_allclose(same.loc, member.loc, rtol=1e-9)
        units = np.sqrt(np.diag(member.covariance()))
        np.testing.assert_allclose(
            same.covariance() / np.outer(units, units), member.covariance() / np.outer(units, units), atol=1e-9
        )


def test_the_mean_of_low_rank_members_does_not_depend_on_how_columns_are_turned() -> None:
    family = LowRank(frame_of(), 2)
    members = [family.member(parameters(family, seed)) for seed in (1, 2, 3)]
    angles = (0.4, 2.0, -1.3)

    def turned(member: Member, angle: float, sign: float = 1.0) -> Member:
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        return Member(member.loc, member.scale, member.columns @ rotation * np.array([1.0, sign]))

    plain = family.member(family.mean([family.near(member) for member in members]))
    other = [turned(member, angle, -1.0) for member, angle in zip(members, angles, strict=True)]
    again = family.member(family.mean([family.near(member) for member in other]))
    np.testing.assert_allclose(again.loc, plain.loc, rtol=1e-9)
    np.testing.assert_allclose(again.scale, plain.scale, rtol=1e-9)
    units = np.outer(plain.scale, plain.scale)
    np.testing.assert_allclose(again.covariance() / units, plain.covariance() / units, atol=1e-9)
    # The test can tell: a mean of parameters as they are would be another Gaussian.
    naive = family.member(np.mean([family.near(member) for member in other], axis=0))
    assert np.abs(naive.covariance() / units - plain.covariance() / units).max() > 0.1
    same = family.member(family.mean([family.near(turned(members[0], angle)) for angle in angles]))
    np.testing.assert_allclose(same.covariance() / units, members[0].covariance() / units, atol=1e-9)


@pytest.mark.parametrize("name", ["diagonal", "full", "arrow"])
def test_the_mean_of_other_members_is_that_of_their_parameters(name: str) -> None:
    family = FAMILIES[name](frame_of())
    members = [parameters(family, seed) for seed in (1, 2)]
    np.testing.assert_allclose(family.mean(members), (members[0] + members[1]) / 2, rtol=1e-12)


@pytest.mark.parametrize("dense", [True, False])
def test_a_scale_on_the_other_side_of_zero_is_the_same_gaussian(dense: bool) -> None:
    family = LowRank(frame_of(), 2, dense=dense)
    x = parameters(family)
    member = family.member(x)
    signs = np.array([1.0, -1.0, 1.0, 1.0, -1.0])
    mirrored = Member(member.loc, member.scale * signs, member.columns * signs[:, None])
    target = quadratic_of(6)
    other = family.near(mirrored)
    mirrored = family.member(other)
    np.testing.assert_allclose(mirrored.scale, member.scale * signs, rtol=1e-12)
    assert family.entropy(mirrored) == pytest.approx(family.entropy(member), rel=1e-12)
    assert family.exact(other, mirrored, target)[0] == pytest.approx(family.exact(x, member, target)[0], rel=1e-12)
    np.testing.assert_allclose(mirrored.covariance(), member.covariance(), rtol=1e-12)
    base = np.random.default_rng(0).standard_normal((4, family.base))
    apart = family.points(mirrored, base) - mirrored.loc
    np.testing.assert_allclose(
        family.scores(mirrored, base) * UNITS,
        np.linalg.solve(member.covariance(), apart.T).T * UNITS,
        rtol=1e-7,
        atol=1e-9,
    )


@pytest.mark.parametrize("own", [1e-2, 1e-4, 1e-5])
def test_slope_and_bend_are_exact_where_a_coordinate_has_hardly_a_scale_of_its_own(own: float) -> None:
    """Its row of W is then huge, but the covariance S S + B B' and its inverse K are ordinary: slopes are S (K - P)."""
    rng = np.random.default_rng(0)
    size, rank = 12, 3
    family = LowRank(Frame(np.zeros(size), np.ones(size), np.ones(size)), rank)
    scale, columns = np.r_[own, np.ones(size - 1)], rng.standard_normal((size, rank))
    x = family.near(Member(np.zeros(size), scale, columns / scale[:, None]))
    target = Quadratic(np.zeros(size), np.zeros(size), np.diag(np.full(size, 0.7)))
    inverse = np.linalg.inv(np.diag(scale**2) + columns @ columns.T)
    left = inverse - target.precision
    _, gradient = family.exact(x, family.undrawn(x), target)
    _, by_stretch, by_columns = np.split(gradient, [size, 2 * size])
    np.testing.assert_allclose(by_stretch * np.sqrt(2), scale * np.diag(left), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(by_columns, (left @ columns).ravel(), rtol=1e-6, atol=1e-8)
    step = 1e-5 * np.eye(family.parameters)[size]  # of that scale alone
    slopes = [family.exact(at, family.undrawn(at), target)[1] for at in (x - step, x + step)]
    differences = (slopes[0] - slopes[1])[size:] / 2e-5
    np.testing.assert_allclose(family.bend(x, target)[0], differences, rtol=1e-3, atol=1e-3)


def test_a_member_of_another_family_is_refused() -> None:
    frame = frame_of()
    diagonal, full, low = Diagonal(frame), Triangular(frame), LowRank(frame, 1)
    triangular, sds = (family.member(np.zeros(family.parameters)) for family in (full, diagonal))
    for call, text in (
        (lambda: diagonal.entropy(triangular), "got a Cholesky factor"),
        (lambda: full.entropy(sds), "got one without"),
        (lambda: low.entropy(sds), "got one without columns"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


def test_best_factor_is_the_optimum_that_scipy_finds() -> None:
    precision = random_precision(9, 4) * np.outer(np.resize(UNITS, 4), np.resize(UNITS, 4))
    allowed = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]], dtype=bool)
    places = np.nonzero(allowed)

    def filled(entries: np.ndarray) -> np.ndarray:
        factor = np.zeros((4, 4))
        factor[places] = entries
        return factor

    def loss(entries: np.ndarray) -> float:
        factor = filled(entries)
        return float(0.5 * np.trace(factor.T @ precision @ factor) - np.log(np.abs(np.diag(factor))).sum())

    best = best_factor(precision, allowed)
    assert (best[~allowed] == 0).all()
    found = scipy.optimize.minimize(loss, np.eye(4)[places], method="BFGS", options={"gtol": 1e-7})
    assert loss(best[places]) < found.fun + 1e-10
    assert loss(best[places]) > found.fun - 1e-8
    np.testing.assert_allclose(best, filled(found.x), atol=1e-4)
    # With everything allowed it is the Cholesky factor of the covariance.
    full = best_factor(precision, np.tril(np.ones((4, 4), dtype=bool)))
    np.testing.assert_allclose(full, np.linalg.cholesky(np.linalg.inv(precision)), rtol=1e-9, atol=1e-12)


def column_by_column(precision: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """The best factor with a dense solve for each column."""
    factor = np.zeros_like(precision)
    for k in range(len(precision)):
        support = np.flatnonzero(allowed[:, k])
        column = np.linalg.inv(precision[np.ix_(support, support)])[:, 0]
        factor[support, k] = column / np.sqrt(column[0])
    return factor


def random_pattern(seed: int, size: int, share: float) -> np.ndarray:
    allowed = np.tril(np.random.default_rng(seed).uniform(size=(size, size)) < share)
    np.fill_diagonal(allowed, val=True)
    return allowed


PATTERNS = {
    "arrow": (ARROW.pattern, 3),
    "blocks": (APART.pattern, 4),
    "no shared coordinates": (Blocks(tuple(range(7)), 0, (Run(2, 3, ("z",)), Run(1, 1, ("y",)))).pattern, 3),
    "coupled": (Blocks(tuple(range(24)), 6, (Run(4, 4, ("z",)), Run(2, 1, ("y",))), coupled=True).pattern, 7),
    "one coupled block": (Blocks(tuple(range(6)), 2, (Run(1, 4, ("z",)),), coupled=True).pattern, 1),
    "full": (np.tril(np.ones((9, 9), dtype=bool)), 1),
    "diagonal": (np.eye(9, dtype=bool), 9),
    "one": (np.ones((1, 1), dtype=bool), 1),
    "nothing shared": (np.tril(np.add.outer(np.arange(9), np.arange(9)) % 2 == 0), 9),
    **{f"sparse {seed}": (random_pattern(seed, 12, 0.5), None) for seed in range(3)},
    **{f"nearly full {seed}": (random_pattern(seed, 30, 0.98), None) for seed in range(3)},
}


@pytest.mark.parametrize("name", PATTERNS)
def test_best_factor_takes_one_decomposition_for_columns_with_nested_supports(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed, decompositions = PATTERNS[name]
    precision = random_precision(3, len(allowed))
    expected = column_by_column(precision, allowed)
    taken = []
    cholesky = scipy.linalg.cholesky
    monkeypatch.setattr(scipy.linalg, "cholesky", lambda a, **options: taken.append(len(a)) or cholesky(a, **options))
    best = best_factor(precision, allowed)
    units = np.sqrt(np.diag(precision))[:, None]
    np.testing.assert_allclose(best * units, expected * units, rtol=1e-9, atol=1e-11)
    assert (best[~allowed] == 0).all()
    assert decompositions in (None, len(taken))


# -- NumPyro's autoguides ---------------------------------------------------------------------------------------------


def sites_of_all_shapes(y: Any) -> None:
    """Not in alphabetical order, with a plate, an event, and a transform."""
    mu = numpyro.sample("mu", dist.Normal(0, 2))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("group", 2):
        numpyro.sample("alpha", dist.Normal(mu, scale))
    pair = numpyro.sample("a_pair", dist.Normal(0, 1).expand([2]).to_event(1))
    numpyro.sample("y", dist.Normal(mu + pair.sum(), 1), obs=y)


@functools.cache
def model_of_all_shapes() -> Model:
    return Model(sites_of_all_shapes, Dataset("one", {"y": np.array(0.3)}))


AUTOGUIDES = {
    "normal": AutoNormal,
    "diagonal": AutoDiagonalNormal,
    "full": AutoMultivariateNormal,
    "low_rank": lambda fn: AutoLowRankMultivariateNormal(fn, rank=2),
    "low_rank_by_default": AutoLowRankMultivariateNormal,
    "arrow": AutoBlockNormal,
    "blocks": lambda fn: AutoBlockNormal(fn, "blocks"),
    "another_prefix": lambda fn: AutoNormal(fn, prefix="mine"),
}


@functools.cache
def form_of(name: str) -> tuple[Any, GaussianForm]:
    model = model_of_all_shapes()
    space = latent_space(model)
    guide = build_guide(model, Guide(name, AUTOGUIDES[name]), space.unravel(np.zeros(space.size)))
    form = gaussian_form(guide, space)
    assert form is not None
    return guide, form


def random_member(form: GaussianForm) -> Member:
    rng = np.random.default_rng(5)
    root = rng.standard_normal((6, 6))
    family = form.family(Frame.of(rng.standard_normal(6), root @ root.T + np.eye(6)))
    return family.member(0.3 * rng.standard_normal(family.parameters))


@pytest.mark.parametrize("name", list(AUTOGUIDES))
def test_an_autoguide_has_the_members_location_and_covariance(name: str) -> None:
    guide, form = form_of(name)
    member = random_member(form)
    params = form.params(member)
    if name in ("normal", "another_prefix"):
        # This one has a posterior for each site and none of all: their order is the program's.
        prefix = guide.prefix
        sites = latent_space(model_of_all_shapes()).names
        loc = np.concatenate([np.ravel(params[f"{site}_{prefix}_loc"]) for site in sites])
        covariance = np.diag(np.concatenate([np.ravel(params[f"{site}_{prefix}_scale"]) for site in sites]) ** 2)
        traced = numpyro.handlers.trace(numpyro.handlers.substitute(numpyro.handlers.seed(guide, 0), params))
        used = [site for site in traced.get_trace(**model_of_all_shapes().arrays).values() if site["type"] == "param"]
        assert {site["name"] for site in used} == set(params)
        for site in used:
            np.testing.assert_array_equal(site["value"], params[site["name"]])
    else:
        posterior = guide.get_posterior(params)
        loc = np.asarray(posterior.mean)
        covariance = np.diag(posterior.variance) if name == "diagonal" else np.asarray(posterior.covariance_matrix)
    np.testing.assert_allclose(loc, member.loc, rtol=1e-9)
    np.testing.assert_allclose(covariance, member.covariance(), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", list(AUTOGUIDES))
def test_parameters_of_an_autoguide_name_their_member(name: str) -> None:
    _, form = form_of(name)
    member = random_member(form)
    again = form.member(form.params(member))
    np.testing.assert_allclose(again.loc, member.loc, rtol=1e-12)
    # A low-rank Gaussian's factor is made of the other two.
    for part in ("scale", "columns") if member.columns is not None else ("scale", "factor"):
        one, other = getattr(member, part), getattr(again, part)
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_allclose(other, one, rtol=1e-12, atol=1e-15)


def test_draws_of_an_autoguide_are_those_of_the_member() -> None:
    for name in ("normal", "low_rank"):
        guide, form = form_of(name)
        member = random_member(form)
        params = {key: np.asarray(value) for key, value in form.params(member).items()}
        space = latent_space(model_of_all_shapes())
        draw = jax.jit(jax.vmap(functools.partial(guide.sample_posterior, params=params)))
        latents = {site: np.asarray(value) for site, value in draw(jax.random.split(KEY, 20_000)).items()}
        latents["scale"] = np.log(latents["scale"])
        drawn = np.concatenate([latents[site].reshape(20_000, -1) for site in space.names], axis=1)
        sds = np.sqrt(np.diag(member.covariance()))
        assert (np.abs(drawn.mean(0) - member.loc) < 5 * sds / np.sqrt(20_000)).all(), name
        # A sample covariance of unit normals has entries with an sd of at most sqrt(2 / n).
        apart = (np.cov(drawn.T) - member.covariance()) / np.outer(sds, sds)
        assert np.abs(apart).max() < 5 * np.sqrt(2 / 20_000), name


def test_which_forms_are_full_and_which_concave() -> None:
    facts = {name: (form_of(name)[1].full, form_of(name)[1].concave) for name in AUTOGUIDES}
    assert {name for name, (full, _) in facts.items() if full} == {"full"}
    assert {name for name, (_, concave) in facts.items() if not concave} == {"low_rank", "low_rank_by_default"}


def test_other_guides_have_no_gaussian_form() -> None:
    class Mine(AutoMultivariateNormal):
        """A subclass, whose parameters may mean something else."""

    model = model_of_all_shapes()
    space = latent_space(model)
    for build in (AutoDelta, Mine):
        guide = build_guide(model, Guide("other", build), space.unravel(np.zeros(space.size)))
        assert gaussian_form(guide, space) is None


# -- base draws -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [base_draws, matched_draws, mirrored_draws])
def test_a_key_is_its_draws(make: Callable[..., np.ndarray]) -> None:
    one, again = make(64, 3, key=KEY), make(64, 3, key=jax.random.PRNGKey(0))
    np.testing.assert_array_equal(one, again)
    np.testing.assert_array_equal(one, make(64, 3, key=jax.random.key(0)))
    other = make(64, 3, key=jax.random.fold_in(KEY, 1))
    assert np.abs(one - other).min() > 0
    # Independent scrambles: the correlation of the two sets has an sd of 1 / sqrt(192).
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(192)
    assert one.shape == (64, 3)
    assert np.isfinite(one).all()


def test_mirrored_draws_have_no_odd_moments_and_halves_that_are_base_draws() -> None:
    draws = mirrored_draws(64, 3, key=KEY)
    np.testing.assert_array_equal(draws[:32], base_draws(32, 3, key=KEY))
    np.testing.assert_allclose(np.einsum("ni,nj,nk->ijk", draws, draws, draws), 0, atol=1e-12)
    np.testing.assert_allclose(draws.mean(0), 0, atol=1e-14)


def test_base_draws_are_more_even_than_independent_ones() -> None:
    keys = [jax.random.PRNGKey(i) for i in range(20)]
    means = np.array([base_draws(256, 3, key=key).mean(0) for key in keys])
    assert np.abs(means).max() < 0.2 / np.sqrt(256)
    squares = np.array([(base_draws(256, 3, key=key) ** 2).mean(0) for key in keys])
    assert np.abs(squares - 1).max() < np.sqrt(2 / 256)


def test_beyond_sobols_dimensions_draws_are_independent_normals() -> None:
    drawn = base_draws(16, 21_202, key=KEY)
    assert scipy.stats.kstest(drawn.ravel(), "norm").pvalue > 1e-3
    assert np.unique(drawn).size == drawn.size


@pytest.mark.parametrize("count", [32, 256, 2_048])
def test_matched_draws_have_the_normals_first_two_moments(count: int) -> None:
    for number in range(5):
        drawn = matched_draws(count, 5, key=jax.random.PRNGKey(number))
        off = max(np.abs(drawn.mean(0)).max(), np.abs(drawn.T @ drawn / count - np.eye(5)).max())
        # Independent draws would be off by several times sqrt(count) / count.
        assert off * count < 2.0


@pytest.mark.parametrize(("count", "size"), [(8, 5), (16, 5), (64, 30)])
def test_few_matched_draws_have_the_normals_variances(count: int, size: int) -> None:
    assert count < 4 * size
    drawn = matched_draws(count, size, key=KEY)
    np.testing.assert_allclose(drawn.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose((drawn**2).mean(0), 1, rtol=1e-12)


def independent(count: int, size: int, *, key: jax.Array) -> np.ndarray:
    return drawing.generator(key).standard_normal((count, size))


def test_a_matched_row_is_a_standard_normal_draw_where_draws_begin_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "base_draws", independent)
    count, size, sets = 16, 4, 3_000
    # One row of each set: these are independent of each other, as the test needs.
    rows = np.stack([matched_draws(count, size, key=np.array([7, i], np.uint32))[0] for i in range(sets)])
    squares = (rows**2).sum(1)
    assert scipy.stats.kstest(squares, scipy.stats.chi2(size).cdf).pvalue > 0.01
    assert scipy.stats.kstest(rows[:, 0], "norm").pvalue > 0.01
    assert abs((rows**4).mean() - 3) < 5 * np.sqrt(96 / rows.size)
    # Rows of a set whitened by its own covariance are too short, and the test would tell.
    shorter = scipy.stats.beta(size / 2, (count - size - 1) / 2, scale=count - 1)
    assert (
        scipy.stats.kstest(shorter.ppf(scipy.stats.chi2(size).cdf(squares)), scipy.stats.chi2(size).cdf).pvalue < 1e-3
    )


def test_matched_rows_from_even_draws_are_standard_normal_draws() -> None:
    count, size, sets = 256, 4, 40
    rows = np.concatenate([matched_draws(count, size, key=jax.random.PRNGKey(i)) for i in range(sets)])
    # Rows of a set are spread more evenly than independent ones; so these bounds for independent rows are wide enough.
    distance = scipy.stats.kstest((rows**2).sum(1), scipy.stats.chi2(size).cdf).statistic
    assert distance < scipy.stats.kstwo.ppf(0.99, len(rows))
    for column in rows.T:
        assert abs((column**4).mean() - 3) < 5 * np.sqrt(96 / len(column))
        assert scipy.stats.kstest(column, "norm").statistic < scipy.stats.kstwo.ppf(0.99, len(column))
