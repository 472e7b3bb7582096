"""Posteriors with several modes: their optima are found, told apart, and told."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import posteriors
import pytest

from toolkit import Dataset, Estimate, Labels, Model, Status, fit
from toolkit.reporting.arrival import as_high, optima_cell, optima_sentences
from toolkit.variational import gaussian_fits, gaussian_optima
from toolkit.variational.autoguides import GaussianForm
from toolkit.variational.certificates import Certificate, Scope
from toolkit.variational.gaussian_fits import _best_for
from toolkit.variational.gaussian_optima import Optimum, is_same
from toolkit.variational.gaussians import Diagonal, Frame, LowRank, Quadratic
from toolkit.variational.solvers.svi import Trace
from toolkit.variational.starts import Start, Starts, find_starts

KEY = jax.random.PRNGKey(0)
SEVERAL = "as high as each other, within 0.1 nats or three standard errors, as where labels may switch or the posterior"
CORRELATION = 0.8
WEIGHTS = np.array([0.7, 0.3])


def gaussians(weights: np.ndarray, locs: np.ndarray, covariances: np.ndarray) -> Model:
    """A mixture of Gaussians as the density itself; its log evidence is 0."""

    def mixed(locs: Any, precisions: Any, heights: Any) -> None:
        with numpyro.plate("coordinate", locs.shape[1]):
            z = numpyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
        apart = z[None] - locs
        quadratic = jnp.einsum("ki,kij,kj->k", apart, precisions, apart)
        numpyro.factor("density", jax.nn.logsumexp(heights - 0.5 * quadratic))

    heights = np.log(weights) - 0.5 * np.linalg.slogdet(2 * np.pi * covariances)[1]
    arrays = {"locs": locs, "precisions": np.linalg.inv(covariances), "heights": heights}
    return Model(mixed, Dataset("gaussians", arrays))


@functools.cache
def two_modes() -> Model:
    """The heavy mode is wide and the light one narrow, so that the light one has the higher peak; far apart."""
    locs = np.array([[-2.0, 1.0], [2.0, -1.0]])
    unit = np.array([[1.0, CORRELATION], [CORRELATION, 1.0]])
    return gaussians(WEIGHTS, locs, np.stack([0.45**2 * unit, 0.25**2 * unit]))


@functools.cache
def starts_of(seed: int = 0) -> Starts:
    return find_starts(two_modes(), key=jax.random.PRNGKey(seed))


@functools.cache
def three_dimensions() -> Model:
    """Two modes of one height in three dimensions, in units a thousand apart."""
    units = np.array([1.0, 30.0, 0.03])
    locs = np.array([[-1.5, 0.0, 0.0], [1.5, 0.0, 0.0]])
    return gaussians(np.array([0.5, 0.5]), locs, np.stack([np.diag((0.2 * units) ** 2)] * 2))


def mixture(y: Any) -> None:
    mu = numpyro.sample("mu", dist.Normal(0, 5).expand([2]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = numpyro.sample("theta", dist.Dirichlet(5.0 * jnp.ones(2)))
    parts = jnp.log(theta)[None] + dist.Normal(mu[None], sigma[None]).log_prob(y[:, None])
    numpyro.factor("y", jax.nn.logsumexp(parts, axis=1).sum())


def mixed_heights(labels: Labels | None = None) -> Model:
    rng = np.random.default_rng(0)
    y = np.concatenate([rng.normal(-2.0, 0.7, 24), rng.normal(2.0, 1.2, 36)])
    return Model(mixture, Dataset("heights", {"y": y}), labels=labels)


# -- two modes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_searches_find_both_modes_and_grow_both(seed: int) -> None:
    found = starts_of(seed)
    assert len(found.ends) == 2
    assert [start.is_mode for start in found.points] == [True, True]
    # The best start is that of the heavy mode, although the light one's peak is the higher one.
    heavy, light = found.points
    assert heavy.log_density < light.log_density
    np.testing.assert_allclose(heavy.loc, [-2.0, 1.0], atol=1e-2)
    np.testing.assert_allclose(light.loc, [2.0, -1.0], atol=1e-2)


@pytest.mark.parametrize(
    ("guide", "lost"), [("full_rank", 0.0), ("mean_field", -0.5 * np.log(1 - CORRELATION**2))], ids=str
)
def test_both_optima_are_found_with_their_heights_and_the_best_is_reported(guide: str, lost: float) -> None:
    fitted = fit(two_modes(), guide, key=KEY, starts=starts_of())
    # In a mode of weight w far from the other, p is w times a Gaussian: the ELBO is log w less that Gaussian's KL.
    np.testing.assert_allclose([optimum.value for optimum in fitted.optima], np.log(WEIGHTS) - lost, atol=2e-3)
    assert fitted.elbo == fitted.optima[0]
    assert len(fitted.traces) == 2
    assert fitted.certificate is not None
    assert fitted.certificate.scope is Scope.LOCAL
    # One mode is described and nothing lies between the two.
    draws = fitted.draw(KEY, 400)["z"]
    width = 0.45 * (1.0 if guide == "full_rank" else np.sqrt(1 - CORRELATION**2))
    np.testing.assert_allclose(draws.mean(0), [-2.0, 1.0], atol=5 * width / 20)
    np.testing.assert_allclose(draws.std(0), width, rtol=5 / np.sqrt(800))


def test_the_report_tells_them_as_different_optima() -> None:
    fitted = fit(two_modes(), "full_rank", key=KEY, starts=starts_of())
    assert optima_sentences([fitted]) == [
        "full_rank: its starts led to 2 distinct optima, 0.8473 nats apart (ELBO −0.3567 and −1.2040). The best one is "
        "reported and the lower ones are local optima; nothing is averaged. Where each is a mode of the posterior's "
        "own, about 30 % of its mass lies at the others, and the guide leaves that out. That no start found a better "
        "one does not exclude one."
    ]
    cell = optima_cell(fitted)
    assert (cell.text, cell.note) == ("2", "0.8473 nats apart")


@pytest.mark.parametrize(
    ("guide", "solver"), [("mean_field", "auto"), ("full_rank", "auto"), ("full_rank", "natural_gradient")]
)
def test_modes_of_one_height_are_told_as_such(guide: str, solver: str) -> None:
    fitted = fit(three_dimensions(), guide, key=KEY, solver=solver)
    np.testing.assert_allclose([optimum.value for optimum in fitted.optima], 2 * [np.log(0.5)], atol=2e-3)
    (sentence,) = optima_sentences([fitted])
    assert f"They are {SEVERAL}" in sentence
    assert "local optima" not in sentence
    assert "nothing is averaged" in sentence


def test_places_are_compared_by_the_gaussians_own_widths() -> None:
    """What is near log p may be bent upwards, or not bent at all: nothing to measure a distance with."""
    frame = Frame.of(np.zeros(2), np.diag([4.0, 1.0]))
    family, course = Diagonal(frame), Trace(np.ones(1), np.ones(1), np.full(1, np.nan))

    def optimum(shift: float, elbo: float, bend: float) -> Optimum:
        bent = Quadratic(np.zeros(2), np.zeros(2), bend * np.eye(2))
        return Optimum(family, np.array([shift, 0.0, 0.0, 0.0]), bent, Estimate(elbo, 0.01), 0.1, course)

    for bend in (-1.0, 0.0, 1.0):
        here = optimum(0.0, -3.0, bend)
        assert is_same(here, optimum(0.4, -3.0, bend))
        assert not is_same(here, optimum(0.6, -3.0, bend))
        assert not is_same(here, optimum(5.0, -3.0, bend))
        assert not is_same(here, optimum(0.0, -4.0, bend))


def test_a_climb_that_was_stopped_goes_on_where_it_may_lead_to_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit(two_modes(), "mean_field", key=KEY, starts=starts_of())
    monkeypatch.setattr(gaussian_optima, "_SCREENED", 1)
    far = replace(starts_of(), points=tuple(replace(point, precision=None) for point in starts_of().points))
    cut = fit(two_modes(), "mean_field", key=KEY, starts=far)
    assert [round(end.value, 1) for end in cut.optima] == [round(end.value, 1) for end in whole.optima]
    monkeypatch.setattr(gaussian_fits, "EVALUATIONS", 1)  # nothing goes on: what was stopped is no optimum
    assert len(fit(two_modes(), "mean_field", key=KEY, starts=far).optima) == 1


@pytest.mark.parametrize(
    "precision", [np.array([4.0, 1.0]), np.array([[4.0, 1.0], [1.0, 1.0]])], ids=["diagonal", "full"]
)
def test_the_best_of_a_family_around_a_quadratic(precision: np.ndarray) -> None:
    form = GaussianForm(lambda frame: LowRank(frame, 1), dict, lambda params: params["member"])
    centre, sign = np.array([3.0, -2.0]), np.ones(2)
    found = _best_for(form, Quadratic(centre, np.zeros(2), precision))
    whole = precision if precision.ndim == 2 else np.diag(precision)
    np.testing.assert_allclose(found.loc, centre)
    # One column makes a Gaussian in two dimensions full, but for what moves columns off their saddle.
    np.testing.assert_allclose(found.covariance(), np.linalg.inv(whole), rtol=0.02, atol=2e-3)
    sign[0] = -1
    bent = precision * (sign if precision.ndim == 1 else sign[:, None])
    assert _best_for(form, Quadratic(centre, np.zeros(2), bent)) is None


def test_a_density_with_one_mode_has_one_optimum() -> None:
    near = gaussians(WEIGHTS, np.array([[-0.4, 0.0], [0.4, 0.0]]), np.stack([np.eye(2)] * 2))
    fitted = fit(near, "full_rank", key=KEY)
    assert len(fitted.optima) == 1
    assert optima_sentences([fitted]) == []


def test_svi_tells_of_the_ends_of_starts_and_not_of_optima() -> None:
    fitted = fit(two_modes(), "mean_field", key=KEY, starts=starts_of(), solver="svi")
    lost = -0.5 * np.log(1 - CORRELATION**2)
    np.testing.assert_allclose([end.value for end in fitted.optima], np.log(WEIGHTS) - lost, atol=0.1)
    (sentence,) = optima_sentences([fitted])
    assert sentence.startswith("mean_field: 2 starts ended 0.8")
    assert sentence.endswith("whether at one optimum is not known. The best one is reported; nothing is averaged.")
    assert optima_cell(fitted).text == "2 starts"


# -- mixtures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guide", ["mean_field", "full_rank"])
def test_a_mixtures_labellings_are_optima_of_one_height(guide: str) -> None:
    model = mixed_heights()
    found = find_starts(model, key=KEY)
    one, other = (start.loc for start in found.points)
    np.testing.assert_allclose(other, [*one[[1, 0, 3, 2]], -one[4]], atol=0.1)  # mu, log sigma, logit theta
    fitted = fit(model, guide, key=KEY, starts=found)
    first, second = fitted.optima
    assert abs(first.value - second.value) < 5 * np.hypot(first.se, second.se)
    (sentence,) = optima_sentences([fitted])
    assert f"{guide}: its starts led to 2 distinct optima, 0.0" in sentence
    assert f"They are {SEVERAL}" in sentence


def test_labellings_that_the_model_declares_are_one_optimum() -> None:
    fitted = fit(
        mixed_heights(Labels(axes={"mu": -1, "sigma": -1, "theta": -1}, by="mu", count=2)), "full_rank", key=KEY
    )
    assert len(fitted.optima) == 1
    assert optima_sentences([fitted]) == []


def test_a_lower_optimum_of_a_real_mixture_is_told_and_not_reported() -> None:
    """With ordered means no labels switch; but the components may have the wrong widths (posteriordb's mixture)."""
    name = "low_dim_gauss_mix-low_dim_gauss_mix"
    if not posteriors.folder(name).is_dir():
        pytest.skip(f"{posteriors.folder(name)} is not there: set ELBOWROOM_SHARED_DATA")
    model = posteriors.load(name)
    found = find_starts(model, key=KEY)
    # One search in a hundred ends here: mu, its log difference, log sigma (a wide component first), logit theta.
    poor = Start(np.array([-2.33, -5.16, 1.41, -0.25, 0.70]), None, -np.inf, -2555.2, is_mode=True)
    fitted = fit(model, "full_rank", key=KEY, starts=replace(found, points=(poor, found.points[0])))
    best, lower = fitted.optima
    assert fitted.elbo == best
    assert abs(best.value - -2115.688) < 0.02
    assert abs(lower.value - -2561.80) < 0.2
    assert fitted.certificate is not None
    assert fitted.certificate.limit < 0.1
    (sentence,) = optima_sentences([fitted])
    assert "2 distinct optima, 446.1" in sentence
    assert "the lower ones are local optima" in sentence


# -- words ------------------------------------------------------------------------------------------------------------


def finished(*heights: float, se: float = 0.01, scope: Scope = Scope.LOCAL) -> Any:
    """What the sentence reads of a fit."""
    return SimpleNamespace(
        usable=True,
        guide=SimpleNamespace(name="mean_field"),
        status=Status.ARRIVED,
        optima=tuple(Estimate(height, se) for height in heights),
        certificate=Certificate(Estimate(0.01, 0.01), 0.05, scope, 256, 4),
        solver="fixed_draws",
    )


def test_optima_as_high_as_the_best_are_told_from_lower_ones() -> None:
    (sentence,) = optima_sentences([finished(-5.0, -5.02, -9.0)])
    assert f"The best 2 are {SEVERAL} has several modes" in sentence
    assert "One of them is reported and the lower ones are local optima; nothing is averaged." in sentence
    assert "as high as" not in optima_sentences([finished(-5.0, -5.2, -9.0)])[0]
    # Where the ELBO is concave there is one optimum, however near the ends of climbs are.
    assert "as high as" not in optima_sentences([finished(-5.0, -5.02, scope=Scope.GLOBAL)])[0]


@pytest.mark.parametrize(
    ("heights", "se", "expected"),
    [
        ((-5.0,), 0.01, 1),
        ((-5.0, -5.09), 0.01, 2),
        ((-5.0, -5.5), 0.01, 1),
        ((-5.5, -5.0), 0.2, 2),
        ((1.0, np.nan), 0.1, 1),
    ],
)
def test_heights_are_compared_with_their_errors(heights: tuple[float, ...], se: float, expected: int) -> None:
    assert as_high(tuple(Estimate(height, se) for height in heights)) == expected


def test_an_error_of_rounding_is_no_error() -> None:
    assert str(Estimate(-0.35667495926915727, 5e-18)) == "-0.3567"
    assert str(Estimate(0.0, 5e-18)) == "0.000000000000000000 ± 0.000000000000000005"
    assert str(Estimate(2e6, 0.3)) == "2000000.0 ± 0.3"


def test_which_mode_is_the_better_one_may_depend_on_the_family():
    """The heavy mode's pairs are so correlated that a mean field loses more there than at a mode 105 nats lighter."""
    pairs, correlation = 26, 1 - 1e-4
    tight = np.kron(np.eye(pairs), np.array([[1, correlation], [correlation, 1]]))
    apart = np.full(2 * pairs, 4.0)
    model = gaussians(np.array([1.0, np.exp(-105.0)]), np.stack([-apart, apart]), np.stack([tight, 2e-4 * np.eye(52)]))
    starts = find_starts(model, key=KEY)
    assert len(starts.ends) == 2
    fitted = {guide: fit(model, guide, key=KEY, starts=starts) for guide in ("mean_field", "full_rank")}
    loss = -0.5 * pairs * np.log1p(-(correlation**2))
    assert loss > 105
    assert fitted["mean_field"].elbo.value == pytest.approx(-105.0, abs=0.1)
    assert [round(optimum.value) for optimum in fitted["mean_field"].optima] == [-105, round(-loss)]
    assert fitted["full_rank"].elbo.value == pytest.approx(0.0, abs=0.1)
