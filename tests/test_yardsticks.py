"""The yardsticks' algebra on Gaussian targets, where the best of each family and every gap have closed forms."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import yardsticks
from yardsticks import BATCHES, CHUNK, GUIDES, Climb, Family, Moments, Search, Target, frame_of

from toolkit import Dataset, Model

SIZE = 4
LOC = np.array([2.0, -1.0, 0.5, 3.0])
SCALE = np.array([0.5, 2.0, 1.0, 0.1])
COLUMNS = np.array([[1.0, 0.2], [-0.8, 0.5], [0.6, 1.2], [0.3, -0.9]])
COVARIANCE = np.outer(SCALE, SCALE) * (np.eye(SIZE) + COLUMNS @ COLUMNS.T)  # of rank 2, which low rank has at d = 4
PRECISION = np.linalg.inv(COVARIANCE)
# Not the target's own frame, so that nothing is the identity in it.
FRAME = frame_of(
    LOC + 0.2 * SCALE, np.linalg.cholesky(COVARIANCE) @ (np.eye(SIZE) + 0.3 * np.tril(np.ones((SIZE, SIZE)), -1))
)
BENT = FRAME["root"].T @ PRECISION @ FRAME["root"]  # the precision and the location in the frame's coordinates
MIDDLE = FRAME["inverse"] @ (LOC - FRAME["centre"])
LEAST = {  # KL(q || p) at the best member, in nats; the factorised one has the precision's diagonal
    "mean_field": (np.linalg.slogdet(COVARIANCE)[1] + np.log(np.diag(PRECISION)).sum()) / 2,
    "low_rank": 0.0,
    "full_rank": 0.0,
}


@pytest.fixture(autouse=True)
def _ranks() -> Iterator[None]:
    """The yardsticks are a script of their own, with NumPy's broadcasting."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def target() -> Target:
    def gaussian(loc, precision, constant):
        z = numpyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (SIZE,)))
        numpyro.factor("density", constant - (z - loc) @ precision @ (z - loc) / 2)

    constant = -(SIZE * math.log(2 * math.pi) + np.linalg.slogdet(COVARIANCE)[1]) / 2
    arrays = {"loc": LOC, "precision": PRECISION, "constant": np.array(constant)}
    return Target("four", Model(gaussian, Dataset("four", arrays)), {"z": (SIZE,)}, None)


def in_model(family: Family, given: dict[str, Any], frame: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance in the model's own coordinates."""
    factor = frame["root"] @ np.asarray(family.factor(given, frame))
    return frame["centre"] + frame["root"] @ given["a"], factor @ factor.T


def divergence(family: Family, given: dict[str, Any]) -> float:
    """KL(q || p) in nats, which is minus the ELBO, since the target is normalised."""
    loc, covariance = in_model(family, given, FRAME)
    apart = loc - LOC
    volumes = np.linalg.slogdet(COVARIANCE)[1] - np.linalg.slogdet(covariance)[1]
    return float(np.trace(PRECISION @ covariance) + apart @ PRECISION @ apart - SIZE + volumes) / 2


def best(family: Family) -> dict[str, Any]:
    return family.fitted(FRAME, MIDDLE, BENT)


def displaced(given: dict[str, Any], by: float) -> dict[str, Any]:
    """Every parameter moved by a random amount of that size."""
    random = np.random.default_rng(0)
    moved = {name: value + by * random.uniform(-1, 1, np.shape(value)) for name, value in given.items()}
    return moved | ({"lower": np.tril(moved["lower"], -1)} if "lower" in moved else {})


def exact_moments(family: Family, given: dict[str, Any]) -> Moments:
    """What draws without noise would say: log p's gradient is linear."""
    location = BENT @ (MIDDLE - given["a"])
    factor = -BENT @ np.asarray(family.factor(given, FRAME))
    return Moments(np.zeros(1), np.tile(location, (BATCHES, 1)), np.tile(factor, (BATCHES, 1, 1)))


def promised(target: Target, family: Family, given: dict[str, Any]) -> tuple[float, float]:
    return yardsticks.newton_gap(Climb(target, family), given, FRAME, BENT, exact_moments(family, given))


# Families


@pytest.mark.parametrize("guide", GUIDES)
def test_the_best_member_is_fitted(guide: str) -> None:
    family = Family(guide, SIZE)
    # L-BFGS-B stops where a step gains less than 2e-9 of the objective.
    assert divergence(family, best(family)) == pytest.approx(LEAST[guide], abs=1e-6)
    assert LEAST["mean_field"] > 0.3  # a target on which the families differ


@pytest.mark.parametrize("guide", GUIDES)
def test_a_member_is_the_same_gaussian_in_another_frame(guide: str) -> None:
    family = Family(guide, SIZE)
    given = displaced(best(family), 0.3)
    other = frame_of(LOC - SCALE, np.tril(np.random.default_rng(1).uniform(0.5, 1.5, (SIZE, SIZE))))
    before, after = in_model(family, given, FRAME), in_model(family, family.moved(given, FRAME, other), other)
    for one, two in zip(before, after, strict=True):
        assert np.allclose(one, two, rtol=1e-10)
    # The volume is told in the model's coordinates, whatever the frame.
    assert float(family.log_volume(given, FRAME)) == pytest.approx(np.linalg.slogdet(before[1])[1] / 2)


@pytest.mark.parametrize("guide", GUIDES)
def test_draws_of_a_gaussian_target_tell_elbo_and_gradients_exactly(guide: str, target: Target) -> None:
    """Antithetic draws with the quadratic taken out have no noise left where log p is quadratic itself."""
    family = Family(guide, SIZE)
    climb, given = Climb(target, family), displaced(best(family), 0.3)
    moments = climb.moments(given, FRAME, BENT, jax.random.PRNGKey(0), BATCHES * CHUNK)
    expected = exact_moments(family, given)
    assert np.allclose(moments.locations, expected.locations, atol=1e-9)
    assert np.allclose(moments.factors, expected.factors, atol=1e-9)
    elbo, se = climb.elbo(given, FRAME, BENT, moments.values)
    assert elbo == pytest.approx(-divergence(family, given), abs=1e-9)
    assert se < 1e-9


# Newton's gap


@pytest.mark.parametrize("guide", GUIDES)
def test_newton_promises_what_a_displaced_member_lacks(guide: str, target: Target) -> None:
    """Up to third order: of a displacement by 0.01 at most, a few hundredths of it."""
    family = Family(guide, SIZE)
    optimum = best(family)
    assert promised(target, family, optimum)[0] == pytest.approx(0, abs=1e-6)
    given = displaced(optimum, 0.01)
    gap, error = promised(target, family, given)
    lacking = divergence(family, given) - LEAST[guide]
    assert lacking > 1e-5  # far more than L-BFGS-B leaves of the best
    assert gap == pytest.approx(lacking, rel=0.1)
    assert error == pytest.approx(0, abs=1e-12)


def test_newtons_gap_of_a_mean_field_has_a_closed_form(target: Target) -> None:
    """Log sds off by t: slope 1 - exp(2 t), curvature 2 exp(2 t), and so sinh(t)^2 each."""
    family = Family("mean_field", SIZE)
    off, shift = np.array([0.3, -0.2, 0.1, 0.0]), np.array([0.1, 0.2, -0.3, 0.4])
    given = best(family)
    given = {"a": given["a"] + shift, "log_scale": given["log_scale"] + off}
    exact = shift @ BENT @ shift / 2 + (np.sinh(off) ** 2).sum()
    assert promised(target, family, given)[0] == pytest.approx(exact, rel=1e-6)


def test_newtons_gap_of_a_full_rank_has_a_closed_form(target: Target) -> None:
    """In the Fisher metric a factor s times too wide lacks d (1 - s^2)^2 / 4."""
    family, times, shift = Family("full_rank", SIZE), 1.2, np.array([0.1, 0.2, -0.3, 0.4])
    given = best(family)
    wide = {"log_scale": given["log_scale"] + math.log(times), "lower": times * given["lower"]}
    exact = shift @ BENT @ shift / 2 + SIZE * (1 - times**2) ** 2 / 4
    assert promised(target, family, {"a": given["a"] + shift} | wide)[0] == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("guide", ["mean_field", "low_rank"])
def test_curvature_need_not_be_written_down(guide: str, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    family = Family(guide, SIZE)
    climb, given = Climb(target, family), displaced(best(family), 0.1)
    arguments = climb, given, FRAME, BENT, exact_moments(family, given), 100
    dense = yardsticks._scale_products(*arguments)
    monkeypatch.setattr(yardsticks, "DENSE", 0)
    # The damping is 1e-4 of the curvature that most directions have.
    assert np.allclose(yardsticks._scale_products(*arguments), dense, rtol=0.02)


def test_half_a_square_is_unbiased_and_its_error_the_jackknifes() -> None:
    random, mean = np.random.default_rng(0), 0.5
    squares = []
    for _ in range(2_000):
        gradients = mean + random.standard_normal(BATCHES)
        squares.append(yardsticks._half_square(np.outer(gradients, gradients))[0])
    assert abs(np.mean(squares) - mean**2 / 2) < 5 * np.std(squares) / math.sqrt(len(squares))
    gradients = random.standard_normal((BATCHES, 3))
    products = gradients @ gradients.T
    without = [yardsticks._half_square(np.delete(np.delete(products, b, 0), b, 1))[0] for b in range(BATCHES)]
    error = math.sqrt((BATCHES - 1) * np.var(without))
    assert yardsticks._half_square(products)[1] == pytest.approx(error)
    assert yardsticks._half_square(np.full((BATCHES, BATCHES), 3.0)) == pytest.approx((1.5, 0.0))


# Arriving


ENDS = {
    "small and known": (0.008, 0.004, True),
    "small by chance": (0.008, 0.006, False),
    "far below zero": (-0.5, 0.5, False),
    "a little below zero": (-0.008, 0.004, True),
    "too large": (0.02, 0.001, False),
    "without an error": (0.0, math.nan, False),
    "no number": (math.nan, 0.0, False),
}


@pytest.mark.parametrize("case", ENDS)
def test_a_run_arrives_by_a_gap_that_is_small_and_known(case: str) -> None:
    gap, error, arrived = ENDS[case]
    assert yardsticks.has_arrived(gap, error) is arrived


def test_rounds_go_on_while_the_gap_is_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    gaps = iter([(-0.002, 0.5), (0.5, 0.001), (0.002, 0.001), (0.0, 0.0)])
    monkeypatch.setattr(yardsticks, "newton_gap", lambda *_: next(gaps))
    monkeypatch.setattr(yardsticks, "whitened", lambda climb, given, frame, key: frame)
    climb = SimpleNamespace(
        family=SimpleNamespace(size=2, moved=lambda given, old, new: given),
        precision=lambda *_: np.eye(2),
        climb=lambda given, *_: given,
        values=lambda *_: (np.array([0.0, 1.0]), 0),
        constant=lambda *_: 0.0,
        moments=lambda *_: None,
    )
    *_, columns = yardsticks.long_run(climb, {}, Search({}, [{}]), jax.random.PRNGKey(0), 4)
    assert (columns["newton_gap"], columns["newton_gap_se"]) == (0.002, 0.001)
    assert columns["steps"] == yardsticks.SHORT_STEPS + 3 * yardsticks.LONG_STEPS


@pytest.mark.parametrize(("gap", "error", "note"), [(0.002, 0.001, ""), (-0.002, 0.5, "not arrived")])
def test_a_row_says_whether_its_run_arrived(
    gap: float, error: float, note: str, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = Family("mean_field", SIZE)
    ended, columns = best(family), {"newton_gap": gap, "newton_gap_se": error, "steps": 1}
    monkeypatch.setattr(yardsticks, "search", lambda climb, frame, given, precision, key: Search({}, given))
    monkeypatch.setattr(yardsticks, "long_run", lambda *_: (ended, FRAME, BENT, columns))
    monkeypatch.setattr(yardsticks, "FINAL_DRAWS", CHUNK)
    row = yardsticks.measure(target, "mean_field", (FRAME, None), 1, tmp_path)
    assert set(row) <= set(yardsticks.COLUMNS)
    assert row["elbo"] == pytest.approx(-LEAST["mean_field"], abs=1e-4)
    assert row["bad_draws"] == 0
    assert row["note"].partition(":")[0] == note
    with np.load(tmp_path / "four-mean_field.npz") as kept:
        assert np.allclose(kept["loc"], LOC)
        assert np.allclose(kept["scale"], np.diag(PRECISION) ** -0.5)


def test_a_frame_is_the_curvatures_own_down_to_a_thousandth_of_the_median() -> None:
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((SIZE, SIZE)))[0]
    curvatures = np.array([4.0, 2.0, 2.0, 1e-6])
    climb = SimpleNamespace(precision=lambda *_: (turn * curvatures) @ turn.T)
    frame = frame_of(np.ones(SIZE), np.eye(SIZE))
    found = yardsticks.whitened(climb, {"a": np.full(SIZE, 2.0)}, frame, jax.random.PRNGKey(0))
    assert np.allclose(found["centre"], 3.0)
    inverse = np.linalg.inv(found["root"] @ found["root"].T)
    assert np.allclose(np.linalg.eigvalsh(inverse), [2e-3, 2.0, 2.0, 4.0])
