"""Metrics against closed forms, and their errors against the spread over replicates."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.signal import lfilter
from scipy.stats import expon, foldnorm, gamma, norm, wasserstein_distance

from toolkit.comparison.metrics import METRICS, QUANTILE_METRICS, khat, metrics
from toolkit.comparison.pairs import correlations, worst_pairs
from toolkit.comparison.wasserstein import _folded_excess, wasserstein
from toolkit.influence import RULE_OF_THREE, chain_error, chain_errors, effective_draws

CHAINS, DRAWS, GUIDE_DRAWS = 4, 1_000, 5_000
Distribution = tuple[Callable[[np.ndarray], np.ndarray], float, float]


def _normals(rng: np.random.Generator, scalars: int, ar: float = 0.0) -> np.ndarray:
    """Standard normal AR(1) chains, (chain, draw, scalar), stationary from the first draw."""
    noise = rng.normal(size=(CHAINS, DRAWS, scalars))
    noise[:, 1:] *= math.sqrt(1 - ar**2)
    return lfilter([1.0], [1.0, -ar], noise, axis=1)


def _wasserstein_of(quantile_p: Callable, quantile_q: Callable) -> float:
    levels = (np.arange(400_000) + 0.5) / 400_000
    return float(np.abs(quantile_p(levels) - quantile_q(levels)).mean())


def _expected(p: object, q: object) -> dict[str, float]:
    """The metrics of two scipy distributions, exactly."""
    ends = {mass: q.ppf([(1 - mass) / 2, (1 + mass) / 2]) for mass in (0.5, 0.9)}
    return {
        "shift": (q.mean() - p.mean()) / p.std(),
        "sd_ratio": q.std() / p.std(),
        "coverage_50": float(np.diff(p.cdf(ends[0.5]))[0]),
        "coverage_90": float(np.diff(p.cdf(ends[0.9]))[0]),
        "wasserstein_1": _wasserstein_of(p.ppf, q.ppf) / p.std(),
        "cdf_difference": _largest_difference(p, q),
    }


def _largest_difference(p: object, q: object) -> float:
    levels = (np.arange(200_000) + 0.5) / 200_000
    places = np.concatenate([p.ppf(levels), q.ppf(levels)])
    return float(np.abs(p.cdf(places) - q.cdf(places)).max())


PAIRS = {
    "narrow": (norm(0, 1), norm(0, 0.6)),
    "wide and moved": (norm(0, 1), norm(0.5, 1.5)),
    "far": (norm(0, 1), norm(4, 1)),
    "skewed reference": (expon(), norm(1, 1)),
    "skewed reference, mode": (gamma(2), norm(1, 1)),
    "skewed guide": (norm(1, 1), expon()),
    "small unit": (norm(0, 1e-9), norm(1e-9, 1.3e-9)),
}


def _from(distribution: object, standard: np.ndarray) -> np.ndarray:
    """Draws of a distribution from standard normal draws, autocorrelation kept."""
    return distribution.ppf(norm.cdf(standard))


@pytest.mark.parametrize("pair", PAIRS)
def test_metrics_are_their_closed_forms(pair: str) -> None:
    p, q = PAIRS[pair]
    rng = np.random.default_rng(1)
    result = metrics(_from(p, _normals(rng, 3, ar=0.5)), _from(q, rng.normal(size=(GUIDE_DRAWS, 3))))
    for name, expected in _expected(p, q).items():
        value, se = result.estimates[name]
        assert (np.abs(value - expected) < 5 * se).all(), name
        assert (se < 0.1 * max(1.0, abs(expected))).all(), name


@pytest.mark.parametrize("ar", [0.0, 0.7])
@pytest.mark.parametrize("pair", ["narrow", "wide and moved", "skewed reference"])
def test_errors_are_as_large_as_the_spread_over_replicates(pair: str, ar: float) -> None:
    replicates = 200
    p, q = PAIRS[pair]
    rng = np.random.default_rng(2)
    result = metrics(_from(p, _normals(rng, replicates, ar)), _from(q, rng.normal(size=(GUIDE_DRAWS, replicates))))
    # The sd of n z-scores has the error 1 / sqrt(2n); se itself is an estimate, so that a tenth is allowed for it.
    allowed = 5 / math.sqrt(2 * replicates) + 0.1
    closed = _expected(p, q)
    del closed["cdf_difference"]  # a maximum over noise: see below
    for name, expected in closed.items():
        value, se = result.estimates[name]
        scores = (value - expected) / se
        assert abs(scores.std() - 1) < allowed, name
        assert abs(scores.mean()) < 5 / math.sqrt(replicates) + 0.2, name


def test_nothing_is_accused_where_nothing_differs() -> None:
    rng = np.random.default_rng(3)
    result = metrics(_normals(rng, 100), rng.normal(size=(GUIDE_DRAWS, 100)))
    value, se = result.estimates["wasserstein_1"]
    floor_error = 5 * value.std() / math.sqrt(value.size)
    assert abs(value.mean() - result.floor.mean()) < floor_error + 0.05 * result.floor.mean()
    # Noise alone raises the distance; its error is as large as that, so that it is not told from zero.
    assert (value < 3 * se).all()
    for name, expected in {"shift": 0, "sd_ratio": 1, "coverage_50": 0.5, "coverage_90": 0.9}.items():
        value, se = result.estimates[name]
        assert (np.abs(value - expected) < 5 * se).all()


def test_the_largest_difference_errs_upwards_and_by_as_much_as_it_says() -> None:
    replicates, rng = 200, np.random.default_rng(8)
    result = metrics(_normals(rng, replicates, ar=0.5), 0.8 + rng.normal(size=(GUIDE_DRAWS, replicates)))
    value, se = result.estimates["cdf_difference"]
    # Two normals of equal sd, 0.8 sd apart, differ most in the middle, by 2 Phi(0.4) - 1.
    scores = (value - (2 * norm.cdf(0.4) - 1)) / se
    assert 0 < scores.mean() < 0.6
    assert abs(scores.std() - 1) < 5 / math.sqrt(2 * replicates) + 0.1
    same = metrics(_normals(rng, replicates), rng.normal(size=(GUIDE_DRAWS, replicates))).estimates["cdf_difference"]
    # Kolmogorov: the largest of a Brownian bridge is 0.87 on average.
    expected = math.sqrt(math.pi / 2) * math.log(2) * math.sqrt(1 / (CHAINS * DRAWS) + 1 / GUIDE_DRAWS)
    assert abs(same[0].mean() / expected - 1) < 0.15


def test_wasserstein_is_scipys() -> None:
    rng = np.random.default_rng(4)
    p, q = rng.normal(size=(4, 100)), rng.gamma(2.0, size=700)
    assert wasserstein(np.sort(p, axis=None), np.sort(q), 400.0).value == pytest.approx(
        wasserstein_distance(p.ravel(), q), rel=1e-12
    )


def test_what_noise_adds_is_the_excess_of_a_folded_normal() -> None:
    # sqrt(difference^2 - variance) is the distance, in every regime: below the noise, about it, and far beyond it.
    ratio, sd, widths = np.array([0.0, 0.0, 0.3, 1.0, 4.0, 30.0, 1.0]), 0.02, np.arange(1.0, 8.0)
    difference = sd * np.sqrt(ratio**2 + 1.0) * np.array([0.0, 0.5, 1.0, -1.0, 1.0, -1.0, 1.0])
    expected = sd * ((foldnorm.mean(ratio) - ratio) * widths)
    found = _folded_excess(difference, np.full(7, sd**2), sd * widths)
    assert found == pytest.approx(expected.sum(), rel=1e-12)


def test_errors_grow_with_autocorrelation() -> None:
    rng = np.random.default_rng(5)
    guide = rng.normal(size=(GUIDE_DRAWS, 20))
    slow, quick = metrics(_normals(rng, 20, ar=0.9), guide), metrics(_normals(rng, 20), guide)
    # An AR(1) series with coefficient a has (1 - a) / (1 + a) effective draws for each draw.
    expected = CHAINS * DRAWS * 0.1 / 1.9
    assert abs(slow.effective.mean() / expected - 1) < 0.25
    for name in ("shift", "sd_ratio", "coverage_90"):
        assert slow.estimates[name][1].mean() > 1.3 * quick.estimates[name][1].mean()


def test_heavy_tails_are_compared_by_quantiles() -> None:
    rng = np.random.default_rng(6)
    heavy, light = rng.standard_t(2.0, size=(CHAINS, DRAWS, 1)), rng.normal(size=(CHAINS, DRAWS, 1))
    reference, guide = np.concatenate([heavy, light], -1), rng.standard_t(2.0, size=(GUIDE_DRAWS, 2))
    guide[:, 1] = 0.3 + 1.5 * rng.normal(size=GUIDE_DRAWS)
    result = metrics(reference, guide)
    assert result.heavy.tolist() == [True, False]
    for name, expected in (("median_shift", 0.0), ("spread_ratio", 1.0)):
        value, se = result.estimates[name]
        assert abs(value[0] - expected) < 5 * se[0]
        assert math.isnan(value[1])


def test_quantile_errors_are_as_large_as_the_spread_over_replicates() -> None:
    replicates = 100
    rng = np.random.default_rng(7)
    guide = 0.5 + 0.7 * rng.standard_t(2.0, size=(GUIDE_DRAWS, replicates))
    result = metrics(rng.standard_t(2.0, size=(CHAINS, DRAWS, replicates)), guide)
    assert result.heavy.all()
    spread = 2 * 2.9199855803537256 / (2 * norm.ppf(0.95))  # of t with 2 degrees of freedom: its 95 % quantile
    for name, expected in (("median_shift", 0.5 / spread), ("spread_ratio", 0.7)):
        value, se = result.estimates[name]
        scores = (value - expected) / se
        assert abs(scores.std() - 1) < 5 / math.sqrt(2 * replicates) + 0.1
        assert abs(scores.mean()) < 5 / math.sqrt(replicates)


def test_an_event_never_seen_has_the_rule_of_threes_error() -> None:
    rng = np.random.default_rng(8)
    result = metrics(_normals(rng, 1), 100.0 + rng.normal(size=(GUIDE_DRAWS, 1)))
    value, se = result.estimates["coverage_90"]
    assert value[0] == 0.0
    assert se[0] == pytest.approx(RULE_OF_THREE / result.effective[0])


def test_constants_and_infinite_draws_give_nan_and_a_point_mass_does_not() -> None:
    rng = np.random.default_rng(9)
    reference, guide = _normals(rng, 3), rng.normal(size=(GUIDE_DRAWS, 3))
    reference[:, :, 0] = 0.1 + 0.2
    guide[0, 1] = np.inf
    guide[:, 2] = 0.0
    result = metrics(reference, guide)
    assert result.judged.tolist() == [False, True, True]
    for name in METRICS:
        assert np.isnan(result.estimates[name][0][:2]).all()
        assert np.isfinite(result.estimates[name][0][2])
    assert result.estimates["sd_ratio"][0][2] == 0.0
    assert all(np.isnan(result.estimates[name][0]).all() for name in QUANTILE_METRICS)


def test_chain_error_is_of_any_scale() -> None:
    series = _normals(np.random.default_rng(10), 1, ar=0.5)[:, :, 0]
    assert chain_error(1e-20 * series) == pytest.approx(1e-20 * chain_error(series), rel=1e-9)
    assert effective_draws(1e-20 * series + 0.0) == pytest.approx(effective_draws(series), rel=1e-9)


def test_errors_of_many_series_are_those_of_each() -> None:
    series = np.moveaxis(_normals(np.random.default_rng(15), 4, ar=0.5), -1, 0).copy()
    series[1] = 3.0
    series[2, 0, 0] = np.nan
    errors = chain_errors(series)
    assert errors[1] == 0.0
    assert np.isnan(errors[2])
    assert errors[[0, 3]] == pytest.approx([chain_error(series[0]), chain_error(series[3])], rel=1e-12)


def test_a_constant_with_rounding_errors_has_no_correlation() -> None:
    draws = np.random.default_rng(16).normal(size=(1_001, 2))
    draws[:, 1] = 0.1
    assert np.isnan(correlations(draws)[1]).all()
    assert correlations(draws)[0, 0] == pytest.approx(1.0, rel=1e-12)


def test_correlation_errors_are_as_large_as_the_spread_over_replicates() -> None:
    replicates, rho = 200, 0.6
    rng = np.random.default_rng(11)
    scores = []
    for _ in range(replicates):
        p, q = _normals(rng, 2, ar=0.5), rng.normal(size=(2_000, 2))
        p[..., 1] = rho * p[..., 0] + math.sqrt(1 - rho**2) * p[..., 1]
        pair = worst_pairs(p, q, np.full(2, 1_000.0))
        scores.append((pair.guide[0] - pair.reference[0] + rho) / pair.se[0])
    assert abs(np.std(scores) - 1) < 5 / math.sqrt(2 * replicates) + 0.1
    assert abs(np.mean(scores)) < 5 / math.sqrt(replicates) + 0.1


def test_worst_pairs_come_first_and_constants_never() -> None:
    rng = np.random.default_rng(12)
    p, q = _normals(rng, 6), rng.normal(size=(GUIDE_DRAWS, 6))
    p[..., 4] = p[..., 1] + 0.5 * p[..., 4]
    p[..., 2] = 1.0
    effective = np.where(np.arange(6) == 2, np.nan, 4_000.0)
    pairs = worst_pairs(p, q, effective, count=5)
    assert (pairs.first[0], pairs.second[0]) == (1, 4)
    assert len(pairs.se) == 5
    assert 2 not in {*pairs.first, *pairs.second}
    assert (np.diff(np.abs(pairs.guide - pairs.reference)) <= 0).all()
    assert np.isnan(correlations(p.reshape(-1, 6))[2]).all()


def test_one_scalar_has_no_pairs() -> None:
    rng = np.random.default_rng(13)
    assert worst_pairs(_normals(rng, 1), rng.normal(size=(100, 1)), np.ones(1)).se.size == 0


@pytest.mark.parametrize("k", [0.3, 0.9])
def test_khat_is_the_tail_index(k: float) -> None:
    weights = np.random.default_rng(14).pareto(1 / k, size=40_000) + 1.0
    estimate = khat(np.log(weights))
    assert abs(estimate.value - k) < 5 * estimate.se
    assert 0.01 < estimate.se < 0.2


@pytest.mark.parametrize(
    "weights",
    [np.zeros(1_000), np.full(1_000, -np.inf), np.array([np.inf, *np.arange(999.0)]), np.arange(50.0)],
    ids=["equal", "none", "infinite", "few"],
)
def test_khat_without_a_tail_is_nan(weights: np.ndarray) -> None:
    assert all(math.isnan(number) for number in khat(weights))


@pytest.mark.parametrize(
    ("reference", "guide", "text"),
    [
        ((4, 100, 3), (100, 2), "of the reference's 3 scalars, .*; got \\(100, 2\\)"),
        ((4, 100), (100, 2), "Expected reference draws \\(chain, draw, scalar\\)"),
        ((4, 3, 2), (100, 2), "with at least 8 draws in a chain"),
    ],
)
def test_wrong_shapes_are_refused(reference: tuple[int, ...], guide: tuple[int, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        metrics(np.zeros(reference), np.zeros(guide))
