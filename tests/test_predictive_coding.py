"""Predictive coding: prediction errors against exact inference, both against SciPy and finite differences."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np
import pytest
import scipy.stats

import models
from models import predictive_coding as coding
from models._hierarchy import Hierarchy
from models._receptive_fields import learned, receptive_fields
from toolkit import Dataset, Model, Scope, Status, check, fit, reference, study

KEY = jax.random.key(0)
DATA: dict[str, Callable[[], Dataset]] = {
    "digit": coding.dataset,
    "one_level": lambda: coding.simulate(jax.random.key(1), sizes=(6, 3)),
    "four_levels": lambda: coding.simulate(jax.random.key(2), sizes=(20, 10, 6, 4, 2), noise=0.3),
}


@pytest.fixture(params=DATA, scope="module")
def data(request: pytest.FixtureRequest) -> Dataset:
    return DATA[request.param]()


def hierarchy_of(data: Dataset) -> Hierarchy:
    return Hierarchy.unpacked(data.arrays["weights"], data.arrays["sds"], data.static["sizes"])


def dense(hierarchy: Hierarchy) -> tuple[np.ndarray, np.ndarray]:
    """Prior covariance of all causes, level 1 first, and the matrix by which they predict the pixels."""
    sizes = hierarchy.sizes
    to_noise = [np.eye(sizes[-1]) * hierarchy.sds[-1]]  # causes of a level as a function of standard normals
    width = sum(sizes[1:])
    begin = width - sizes[-1]
    maps = [np.hstack([np.zeros((sizes[-1], begin)), to_noise[0]])]
    for level in range(len(sizes) - 2, 0, -1):
        begin -= sizes[level]
        own = np.zeros((sizes[level], width))
        own[:, begin : begin + sizes[level]] = np.diag(hierarchy.sds[level])
        maps.insert(0, hierarchy.weights[level] @ maps[0] + own)
    stacked = np.vstack(maps)
    predict = np.hstack([hierarchy.weights[0], np.zeros((sizes[0], width - sizes[1]))])
    return stacked @ stacked.T, predict


def test_mean_covariance_and_evidence_are_those_of_joint_normals(data: Dataset) -> None:
    hierarchy, y = hierarchy_of(data), data.arrays["y"]
    prior, predict = dense(hierarchy)
    marginal = predict @ prior @ predict.T + np.diag(hierarchy.sds[0] ** 2)
    gain = np.linalg.solve(marginal, predict @ prior).T
    posterior = hierarchy.posterior(y)
    np.testing.assert_allclose(posterior.mean, gain @ y, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(np.linalg.inv(posterior.precision), prior - gain @ predict @ prior, atol=1e-9)
    evidence = scipy.stats.multivariate_normal(np.zeros(len(y)), marginal).logpdf(y)
    assert posterior.log_evidence == pytest.approx(evidence, rel=1e-9)


def test_density_and_gradient_are_those_of_the_program(data: Dataset) -> None:
    """Pushes are the gradient of NumPyro's log density, and the free energy differs from it as it should."""
    model, hierarchy = coding.model(data), hierarchy_of(data)
    levels = range(1, len(hierarchy.sizes))
    causes = hierarchy.split(np.random.default_rng(0).standard_normal(sum(hierarchy.sizes[1:])))
    point = {f"causes_{level}": causes[level - 1] for level in levels}
    value, gradient = jax.value_and_grad(lambda p: model.log_density(p, model.arrays))(point)
    errors = hierarchy.errors(data.arrays["y"], causes)
    for level, push in zip(levels, hierarchy.pushes(errors), strict=True):
        np.testing.assert_allclose(push, gradient[f"causes_{level}"], rtol=1e-8, atol=1e-8)
    precisions = np.concatenate(hierarchy.local_precisions)
    np.testing.assert_allclose(precisions, np.diag(hierarchy.precision), rtol=1e-12)
    entropy = 0.5 * np.log(2 * np.pi * np.e / precisions).sum()
    assert -hierarchy.free_energy(errors) == pytest.approx(float(value) - 0.5 * len(precisions) + entropy, rel=1e-12)


def test_units_settle_on_the_exact_means_and_the_mean_fields_variances(data: Dataset) -> None:
    model, hierarchy = coding.model(data), hierarchy_of(data)
    posterior = hierarchy.posterior(data.arrays["y"])
    fitted = fit(model, "predictive_coding", key=KEY, tolerance=1e-9)
    assert fitted.status is Status.ARRIVED
    sds = np.sqrt(np.diag(np.linalg.inv(posterior.precision)))
    levels = range(1, len(hierarchy.sizes))
    means = np.concatenate([fitted.params[f"causes_{level}_auto_loc"] for level in levels])
    np.testing.assert_allclose((means - posterior.mean) / sds, 0.0, atol=1e-4)
    scales = np.concatenate([fitted.params[f"causes_{level}_auto_scale"] for level in levels])
    np.testing.assert_allclose(scales, np.diag(posterior.precision) ** -0.5, rtol=1e-12)
    assert (scales < sds).all()


def test_the_free_energy_never_rises_and_ends_a_known_kl_above(data: Dataset) -> None:
    model, posterior = coding.model(data), hierarchy_of(data).posterior(data.arrays["y"])
    fitted = fit(model, "predictive_coding", key=KEY)
    (trace,) = fitted.traces
    assert (np.diff(trace.elbo) > -1e-10 * abs(trace.elbo[-1])).all()
    known = posterior.log_evidence - posterior.mean_field_kl
    assert fitted.certificate is not None
    assert fitted.gap_limit is not None
    assert trace.elbo[-1] + fitted.certificate.gap.value == pytest.approx(known, abs=1e-9)
    assert fitted.gap_limit >= 0.01 * 0.1  # of the tolerance
    # In closed form, and held against draws.
    assert fitted.elbo is not None
    assert fitted.elbo.se == 0
    assert fitted.elbo.value == trace.elbo[-1]
    assert fitted.certificate.scope is Scope.GLOBAL
    assert fitted.certificate.words == "global bound, in closed form"


def test_rates_keep_every_step_below_the_parabola(data: Dataset) -> None:
    """Else a step could go too far: D - P must have no negative eigenvalue."""
    hierarchy = hierarchy_of(data)
    above = np.diag(1 / np.concatenate(hierarchy.rates)) - hierarchy.precision
    assert np.linalg.eigvalsh(above)[0] > -1e-9 * np.abs(above).max()


def test_the_general_mean_field_finds_the_same() -> None:
    model = coding.model()
    own, general = (fit(model, name, key=KEY) for name in ("predictive_coding", "mean_field"))
    assert own.elbo is not None
    assert general.elbo is not None
    assert own.elbo.value + 0.01 + 5 * (own.elbo.se + general.elbo.se) > general.elbo.value
    for name in ("causes_1_auto_scale", "causes_2_auto_scale"):
        np.testing.assert_allclose(general.params[name], own.params[name], rtol=0.05)


def test_a_budget_that_ends_is_told() -> None:
    fitted = fit(coding.model(), "predictive_coding", key=KEY, max_gradients=5)
    assert fitted.status is Status.BUDGET
    assert re.fullmatch(r"[\d.e+]+ nats are left after 5 steps", fitted.message)
    assert fitted.cost.gradient_evaluations == 5


def test_draws_have_the_posteriors_moments(data: Dataset) -> None:
    model, hierarchy = coding.model(data), hierarchy_of(data)
    posterior = hierarchy.posterior(data.arrays["y"])
    assert model.exact is not None
    drawn = model.exact(KEY, 20_000)
    rows = np.hstack([np.asarray(drawn[f"causes_{level}"]) for level in range(1, len(hierarchy.sizes))])
    white = (rows - posterior.mean) @ posterior.lower
    assert np.abs(white.mean(0)).max() < 5 / np.sqrt(20_000)
    assert np.abs(np.cov(white.T) - np.eye(white.shape[1])).max() < 5 * np.sqrt(2 / 20_000)


@pytest.mark.slow
def test_nuts_agrees_with_the_exact_posterior() -> None:
    model = coding.model()
    posterior = hierarchy_of(model.dataset).posterior(model.arrays["y"])
    drawn = reference(model, key=KEY, chains=2, warmup=300, draws=1_000, force=True)
    assert drawn.status is Status.PASSED
    sds = np.sqrt(np.diag(np.linalg.inv(posterior.precision)))
    means = np.concatenate([drawn.draws[f"causes_{level}"].mean((0, 1)) for level in (1, 2)])
    sites = [f"causes_{level}" for level in (1, 2)]
    ess = np.concatenate(
        [drawn.diagnostics.loc[drawn.diagnostics.index.str.startswith(site), "ess_bulk"] for site in sites]
    )
    assert (np.abs(means - posterior.mean) < 5 * sds / np.sqrt(ess)).all()


@pytest.mark.slow
def test_a_study_says_what_is_known() -> None:
    model = coding.model()
    posterior = hierarchy_of(model.dataset).posterior(model.arrays["y"])
    done = study(model, guides=["predictive_coding", "full_rank"])
    gaps = done.comparison.gaps.table.set_index("guide")
    found = gaps.loc["predictive_coding"]
    assert abs(found["kl_qp"] - posterior.mean_field_kl) < 5 * found["kl_qp_se"] + found["optimisation_limit"]
    table = done.comparison.table.query("guide == 'predictive_coding'")
    shifts = table[table["metric"] == "shift"]
    # What is left of 1/2 d'Pd bounds each mean's error d by so many sds.
    certificate = done.fits[0].certificate
    assert certificate is not None
    assert (shifts["value"].abs() < 5 * shifts["se"] + (2 * certificate.gap.value) ** 0.5).all()
    known = (np.diag(posterior.precision) * np.diag(np.linalg.inv(posterior.precision))) ** -0.5
    ratios = table[table["metric"] == "sd_ratio"]
    in_order = np.r_[known[16:], known[:16]]  # the report's order: the top level first
    assert (np.abs(ratios["value"] - in_order) < 5 * ratios["se"]).all()
    assert done.comparison.guides.loc["full_rank", "verdict"] == "right"
    assert done.comparison.guides.loc["predictive_coding", "verdict"] == "wrong"


def test_the_digit_is_one_that_was_not_learned_from() -> None:
    images, shown = coding.digits()
    assert images.shape == (1_797, 64)
    assert (images.min(), images.max()) == (0, 16)
    data = coding.dataset(3)
    mean = images[:1_500].mean(0)
    np.testing.assert_array_equal(data.arrays["y"] + mean, images[1_503])
    assert data.name == f"digit_{shown[1_503]}_image_3"
    assert coding.model(image=3).dataset.name == data.name


def test_what_was_learned_makes_new_images_likely_and_sees_its_own_window_only() -> None:
    images, _ = coding.digits()
    mean = images[:1_500].mean(0)
    hierarchy = learned(images[:1_500] - mean)
    assert not hierarchy.weights[0][~receptive_fields()].any()
    prior, _ = dense(hierarchy)
    np.testing.assert_allclose(np.diag(prior), 1.0, rtol=1e-12)
    covariance = np.cov(images[:1_500].T)
    new = images[1_500:1_560] - mean
    levels = np.mean([hierarchy.posterior(image).log_evidence for image in new])
    apart = scipy.stats.norm(0, np.maximum(np.sqrt(np.diag(covariance)), 0.5)).logpdf(new).sum(1).mean()
    assert levels > apart + 10


@pytest.mark.slow
def test_simulated_truth_is_what_made_the_data() -> None:
    data = coding.simulate(KEY, sizes=(30, 10, 3), noise=0.01)
    assert {name: value.shape for name, value in data.truth.items()} == {"causes_1": (10,), "causes_2": (3,)}
    model = coding.model(data)
    assert all(rung.passed for rung in check(model))
    posterior = hierarchy_of(data).posterior(data.arrays["y"])
    truth = np.concatenate([data.truth["causes_1"], data.truth["causes_2"]])
    errors = (truth - posterior.mean) @ posterior.lower
    assert np.abs(errors).max() < 5


def test_the_same_name_means_the_same_density() -> None:
    assert "predictive_coding" in models.names()
    model = coding.model()
    point = {"causes_2": np.linspace(-1, 1, 4), "causes_1": np.linspace(1, -1, 16)}
    assert float(model.log_density(point, model.arrays)) == pytest.approx(DENSITY, rel=1e-6)
    assert model.log_evidence == pytest.approx(EVIDENCE, rel=1e-6)


DENSITY, EVIDENCE = -333.7162592, -132.2960612


def broken(**arrays: object) -> Dataset:
    good = coding.simulate(KEY, sizes=(3, 2))
    static = {"sizes": arrays.pop("sizes")} if "sizes" in arrays else good.static
    return replace(good, arrays={**good.arrays, **arrays}, static=static)  # type: ignore[dict-item]


def other() -> Model:
    return models.load("gaussian_target").model(dimensions=2)


MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "image": (lambda: coding.dataset(297), "Expected an image from 0 to 296; got 297."),
    "half an image": (lambda: coding.dataset(1.5), "Expected an image from 0 to 296; got 1.5."),  # type: ignore[arg-type]
    "image as text": (lambda: coding.dataset("7"), "Expected an image from 0 to 296; got '7'."),  # type: ignore[arg-type]
    "image true": (lambda: coding.model(image=True), "Expected an image from 0 to 296; got True."),
    "another model": (
        lambda: fit(other(), coding.PREDICTIVE_CODING, key=KEY),
        "Expected a hierarchy of causes as in `predictive_coding`, whose prediction errors this guide follows; got "
        "model 'gaussian_target' with latent sites z.",
    ),
    "another chart": (
        lambda: fit(
            replace(coding.model(), charts={"turned": {}}), replace(coding.PREDICTIVE_CODING, chart="turned"), key=KEY
        ),
        "Expected chart 'plain', in which the prediction errors are a gradient; got 'turned'.",
    ),
    "both": (
        lambda: coding.model(coding.simulate(KEY), image=1),
        "Expected a dataset, or an image to make one of; got both.",
    ),
    "sizes of a simulation": (
        lambda: coding.simulate(KEY, sizes=(3,)),
        "Expected two or more positive sizes and a noise above 0; got (3,) and 0.5.",
    ),
    "noise": (
        lambda: coding.simulate(KEY, noise=0.0),
        "Expected two or more positive sizes and a noise above 0; got (30, 10, 3) and 0.0.",
    ),
    "lacks": (
        lambda: coding.model(Dataset("mine", {"y": np.zeros(3)})),
        "Expected arrays weights, sds and y and the static value sizes in dataset 'mine'; "
        "it lacks weights, sds, sizes.",
    ),
    "sizes": (
        lambda: coding.model(broken(sizes=(3, 0))),
        "Expected sizes as a tuple of two or more positive whole numbers; got (3, 0).",
    ),
    "shape": (
        lambda: coding.model(broken(weights=np.zeros(5))),
        "Expected weights of shape (6,) for sizes (3, 2); got (5,).",
    ),
    "sd": (lambda: coding.model(broken(sds=np.array([1.0, 1, 1, 0, 1]))), "Expected sds above 0; got 0 among them."),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told(name: str) -> None:
    wrong, text = MISTAKES[name]
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        wrong()


def test_it_is_a_model_like_any_other() -> None:
    model = coding.model()
    assert isinstance(model, Model)
    assert model.dims("causes_1") == ("cause_1",)
    assert list(model.latents) == ["causes_2", "causes_1"]
    assert all(rung.passed for rung in check(model))
