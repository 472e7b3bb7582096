"""Coordinates for SVI: at zero the family's best member for a start's curvature, and from there all the others."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from jax.flatten_util import ravel_pytree
from numpyro.infer.autoguide import AutoDelta, AutoMultivariateNormal

from toolkit import Dataset, Model, Status, fit
from toolkit.modelling.space import latent_space
from toolkit.variational import coordinates as chosen
from toolkit.variational.autoguides import GaussianForm, gaussian_form
from toolkit.variational.building import build_guide
from toolkit.variational.coordinates import Coordinates, coordinates
from toolkit.variational.gaussians import Frame, Member, best_low_rank
from toolkit.variational.guides import find_guide
from toolkit.variational.starts import Start

KEY = jax.random.PRNGKey(0)
SIZE, GROUPS = 8, 3
WITH_FACTOR = ("mean_field", "diagonal", "blocks", "coupled", "full_rank")
GUIDES = (*WITH_FACTOR, "low_rank", "low_rank_1")
# Up to which size a factor is a product, and a location has the curvature's own units.
LAYOUTS = {"products": (400, 1_500), "sums": (2, 1_500), "one scale": (2, 2)}


@functools.cache
def grouped() -> Model:
    """A normal posterior in odd units, with blocks of two that lie apart in program order, and the last site shared."""

    def units_apart(unit, y=None):
        mean = numpyro.sample("mean", dist.Normal(0, 3 * unit))
        with numpyro.plate("group", GROUPS):
            effect = numpyro.sample("effect", dist.Normal(mean, 0.5 * unit))
            slope = numpyro.sample("slope", dist.Normal(0, unit))
            numpyro.sample("y", dist.Normal(effect + slope, 0.7 * unit), obs=y)
        numpyro.sample("last", dist.Normal(mean, unit))

    arrays = {"unit": np.array(1e3), "y": 1e3 * np.array([1.0, -0.5, 2.0])}
    return Model(units_apart, Dataset("grouped", arrays), log_concave=True)


@functools.cache
def parts(name: str) -> tuple[Any, GaussianForm, Coordinates]:
    space = latent_space(grouped())
    guide = build_guide(grouped(), find_guide(name), space.unravel(np.zeros(SIZE)))
    form, found = gaussian_form(guide, space), coordinates(guide, space)
    assert form is not None
    assert found is not None
    return guide, form, found


def start_in(*units: float, known: bool = True) -> Start:
    rng, scale = np.random.default_rng(0), np.resize(units, SIZE)
    root = rng.standard_normal((SIZE, SIZE))
    precision = (root @ root.T + np.eye(SIZE)) / np.outer(scale, scale)
    return Start(rng.standard_normal(SIZE) * scale, precision if known else None, 0.0, 0.0, is_mode=True)


def zeros(found: Coordinates) -> dict[str, np.ndarray]:
    return {name: np.zeros_like(value) for name, value in found.initial.items()}


def order_and_pattern(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Which entries of a factor are free, in which order of the coordinates."""
    if name in ("blocks", "coupled"):
        blocks = parts(name)[0].blocks
        return np.array(blocks.order), blocks.pattern
    pattern = np.tril(np.ones((SIZE, SIZE))) if name == "full_rank" else np.eye(SIZE)
    return np.arange(SIZE), pattern.astype(bool)


def factor_of(member: Member) -> np.ndarray:
    if member.factor is not None:
        return member.factor
    assert member.scale is not None
    return np.diag(member.scale)


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    product, dense = LAYOUTS[request.param]
    monkeypatch.setattr(chosen, "_PRODUCT_LIMIT", product)
    monkeypatch.setattr(chosen, "DENSE_LIMIT", dense)
    return str(request.param)


def test_the_blocks_are_in_an_order_of_their_own() -> None:
    assert list(order_and_pattern("coupled")[0]) == [0, 7, 1, 4, 2, 5, 3, 6]


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("name", WITH_FACTOR)
def test_zero_is_the_familys_best_member_for_the_starts_precision(name: str) -> None:
    _, form, found = parts(name)
    start = start_in(1e3, 1.0, 1e-3)
    assert start.precision is not None
    member = form.member(found.to_params(zeros(found), found.frame(start)))
    np.testing.assert_allclose(member.loc, start.loc, rtol=1e-12)
    order, pattern = order_and_pattern(name)
    factor, precision = factor_of(member)[order], start.precision[np.ix_(order, order)]
    assert not factor[~pattern].any()
    # KL(q || p) = tr(L' P L) / 2 - log |L| + const is convex in L, with gradient P L - diag(1 / L) where L is free.
    slope = (precision @ factor - np.diag(1 / np.diag(factor))) / np.sqrt(np.diag(precision))[:, None]
    # Rounding is 1e-16 times the precision's condition number in units of its own, some hundreds.
    np.testing.assert_allclose(slope[pattern], 0.0, atol=1e-11)


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize(("name", "rank"), [("low_rank", 3), ("low_rank_1", 1)])
def test_zero_is_the_best_low_rank_member(name: str, rank: int) -> None:
    _, form, found = parts(name)
    start = start_in(1e3, 1.0, 1e-3)
    assert start.precision is not None
    member = form.member(found.to_params(zeros(found), found.frame(start)))
    scale, columns = best_low_rank(start.precision, rank)
    np.testing.assert_allclose(member.loc, start.loc, rtol=1e-12)
    np.testing.assert_allclose(member.scale, scale, rtol=1e-12)
    np.testing.assert_allclose(member.columns, columns, rtol=1e-12)


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("name", GUIDES)
def test_without_a_curvature_zero_is_a_ball(name: str) -> None:
    _, form, found = parts(name)
    start = start_in(1.0, known=False)
    member = form.member(found.to_params(zeros(found), found.frame(start)))
    np.testing.assert_allclose(member.loc, start.loc, rtol=1e-12)
    np.testing.assert_allclose(member.covariance(), 0.1**2 * np.eye(SIZE), rtol=1e-12)


@pytest.mark.parametrize("name", GUIDES)
def test_a_location_is_measured_by_the_curvature_or_beyond_dense_matrices_by_one_scale(name: str, layout: str) -> None:
    _, form, found = parts(name)
    start, shift = start_in(1e3, 1.0, 1e-3), np.random.default_rng(1).standard_normal(SIZE)
    moved = form.member(found.to_params(zeros(found) | {"shift": shift}, found.frame(start))).loc - start.loc
    if layout == "one scale":
        # A difference of locations up to 1e3, each with a rounding of 1e-13.
        np.testing.assert_allclose(moved, 0.1 * shift, rtol=1e-9, atol=1e-11)
    else:
        np.testing.assert_allclose(moved @ start.precision @ moved, shift @ shift, rtol=1e-9)


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("name", GUIDES)
def test_the_coordinates_move_all_of_the_family_and_nothing_beyond(name: str) -> None:
    guide, form, found = parts(name)
    start = start_in(1.0)
    assert start.precision is not None
    rng, frame = np.random.default_rng(2), found.frame(start)
    given = {part: 0.1 * rng.standard_normal(value.shape) for part, value in found.initial.items()}
    flat, given_again = ravel_pytree(given)
    slopes = jax.jacobian(lambda vector: ravel_pytree(found.to_params(given_again(vector), frame))[0])(flat)
    free = form.family(Frame.of(start.loc, start.precision)).parameters
    assert np.linalg.matrix_rank(np.asarray(slopes)) == free
    params = found.to_params(given, frame)
    if name in ("blocks", "coupled", "full_rank"):  # as it is, before the guide itself leaves out what is outside
        factor = np.asarray(params[f"{guide.prefix}_scale_tril"])
        assert not factor[~order_and_pattern(name)[1]].any()
        assert (np.diag(factor) > 0).all()


@pytest.mark.parametrize("name", GUIDES)
def test_steps_begin_at_zero_but_for_columns_which_have_no_gradient_there(name: str) -> None:
    initial = dict(parts(name)[2].initial)
    columns = initial.pop("columns", None)
    assert not any(value.any() for value in initial.values())
    assert columns is None or (np.abs(columns) > 0).all()
    assert columns is None or np.abs(columns).max() < 0.1


def test_guides_with_parameters_of_another_meaning_have_none() -> None:
    class Halved(AutoMultivariateNormal):
        def get_posterior(self, params: dict[str, Any]) -> Any:
            return dist.MultivariateNormal(params["auto_loc"] / 2, scale_tril=params["auto_scale_tril"])

    space = latent_space(grouped())
    assert coordinates(AutoMultivariateNormal(grouped().bound()), space) is not None
    assert coordinates(Halved(grouped().bound()), space) is None
    assert coordinates(AutoDelta(grouped().bound()), space) is None


@pytest.mark.slow
def test_svi_fits_blocks_in_the_posteriors_own_units() -> None:
    fitted = fit(grouped(), "coupled", key=KEY, starts=1, solver="svi")
    assert fitted.status is Status.ARRIVED
    # Each y has the mean's variance 9 in common with the others, and 0.25 + 1 + 0.49 of its own.
    covariance = 1e6 * (9.0 * np.ones((GROUPS, GROUPS)) + 1.74 * np.eye(GROUPS))
    evidence = scipy.stats.multivariate_normal(np.zeros(GROUPS), covariance).logpdf(grouped().arrays["y"])
    assert abs(fitted.elbo.value - evidence) < 5 * fitted.elbo.se + 0.1
    # In the model's units, sds of hundreds are 10,000 steps of 0.01 away and more, of eight gradients each.
    assert fitted.cost.gradient_evaluations < 8 * 10_000
