"""Searches side by side: each ends where it would alone, walls turn it away, rounding does not keep it going."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize, rosen, rosen_der

from toolkit.variational.solvers.lockstep import minimise_each

RNG = np.random.default_rng(0)


def rosenbrock(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.array([rosen(x) for x in points]), np.array([rosen_der(x) for x in points])


def quadratic(scales: np.ndarray, offset: float = 0.0):
    def losses(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return 0.5 * (points**2 * scales).sum(1) + offset, points * scales

    return losses


@pytest.mark.parametrize("size", [2, 7, 40])
def test_searches_end_at_rosenbrocks_minimum(size):
    begin = RNG.uniform(0, 2, (5, size))
    found = minimise_each(rosenbrock, begin, decrease=1e-15)
    np.testing.assert_allclose(found.x, 1.0, atol=1e-4)
    assert (found.losses < 1e-8).all()


@pytest.mark.parametrize("decades", [2, 6])
def test_badly_scaled_bowls_take_about_as_many_points_as_scipys(decades):
    scales = np.logspace(-decades / 2, decades / 2, 12)
    begin = RNG.uniform(-2, 2, (6, 12))
    found = minimise_each(quadratic(scales), begin)
    assert (found.losses < 1e-6).all()
    scipys = [
        minimize(lambda x: (0.5 * x @ (scales * x), scales * x), x, jac=True, method="L-BFGS-B", options={"gtol": 1e-6})
        for x in begin
    ]
    assert found.rounds < 2 * max(one.nfev for one in scipys)


def test_no_search_knows_of_the_others():
    begin = RNG.uniform(-2, 2, (4, 6))
    together = minimise_each(rosenbrock, begin)
    for row, x, loss in zip(begin, together.x, together.losses, strict=True):
        alone = minimise_each(rosenbrock, row[None])
        np.testing.assert_array_equal(alone.x[0], x)
        assert alone.losses[0] == loss


def test_points_of_a_round_are_those_of_live_searches():
    asked: list[int] = []

    def counted(points):
        asked.append(len(points))
        return rosenbrock(points)

    begin = np.vstack([np.ones(3), RNG.uniform(-2, 2, (3, 3))])  # the first begins at the minimum
    found = minimise_each(counted, begin)
    assert asked[:2] == [4, 3]
    assert asked == sorted(asked, reverse=True)
    assert found.rounds == len(asked)


@pytest.mark.parametrize("beyond", [np.nan, np.inf, -np.inf])
def test_a_wall_turns_searches_away(beyond):
    """Minus the log density of a Gamma(3, 1): not a number on the far side of zero."""

    def losses(points):
        with np.errstate(invalid="ignore", divide="ignore"):
            values, slopes = points[:, 0] - 2 * np.log(points[:, 0]), 1 - 2 / points
        return np.where(points[:, 0] > 0, values, beyond), slopes

    found = minimise_each(losses, np.array([[0.01], [1.0], [50.0], [-1.0]]))
    np.testing.assert_allclose(found.x[:3], 2.0, rtol=1e-4)
    assert found.losses[3] == np.inf, "a search that begins behind the wall has nowhere to go"
    assert found.x[3] == -1.0


def test_rounding_of_a_large_loss_does_not_keep_a_search_going():
    found = minimise_each(quadratic(np.array([1.0, 3.0]), offset=1e9), np.array([[3.0, -4.0]]))
    np.testing.assert_allclose(found.x, 0.0, atol=1e-3)
    assert found.rounds < 60


def test_a_linear_run_off_ends_far_out_and_not_where_it_began():
    found = minimise_each(lambda points: (-points[:, 0], np.tile([[-1.0, 0.0]], (len(points), 1))), np.ones((1, 2)))
    assert found.ended.all()
    assert found.losses[0] < -1e10
    assert found.rounds < 60


def test_searches_that_are_cut_are_told_from_those_that_ended():
    begin = np.array([[1.0, 1.0], [-1.2, 1.0]])  # the first begins at the minimum
    found = minimise_each(rosenbrock, begin, max_rounds=5)
    assert found.ended.tolist() == [True, False]
    assert found.rounds == 5


def test_a_run_off_comes_to_an_end():
    calls = 0

    def losses(points):
        nonlocal calls
        calls += 1
        return -np.log1p(points[:, 0] ** 2), -2 * points / (1 + points**2)

    found = minimise_each(losses, np.array([[1.0]]))
    assert found.rounds == calls <= 500
    assert found.losses[0] < -10
