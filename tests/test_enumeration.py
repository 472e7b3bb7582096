"""Discrete latents are summed out exactly, in plates and in every chart, or refused in words."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from numpyro.infer.reparam import LocScaleReparam

from toolkit import Dataset, Model, Status
from toolkit.sampling.references import reference

Y = np.random.default_rng(0).normal(size=50)
NORMAL = scipy.stats.norm


def mixture(y: np.ndarray | None = None) -> None:
    w = numpyro.sample("w", dist.Beta(2, 1))
    mu = numpyro.sample("mu", dist.Normal(0, 3).expand([2]))
    numpyro.deterministic("gap", mu[1] - mu[0])
    with numpyro.plate("n", len(Y)):
        z = numpyro.sample("z", dist.Bernoulli(w))
        numpyro.deterministic("own", mu[z])
        numpyro.sample("y", dist.Normal(mu[z], 1), obs=y)


def nested(y: np.ndarray) -> None:
    a = numpyro.sample("a", dist.Normal(0, 1))
    with numpyro.plate("g", 3):
        e = numpyro.sample("e", dist.Normal(a, 2))
        k = numpyro.sample("k", dist.Categorical(jnp.array([0.2, 0.3, 0.5])))
        with numpyro.plate("n", 4):
            numpyro.sample("y", dist.Normal(e + k, 1), obs=y)


@pytest.mark.slow
def test_the_density_in_a_plate_is_the_closed_form() -> None:
    model = Model(mixture, Dataset("d", {"y": Y}))
    point = {"w": jnp.array(0.3), "mu": jnp.array([0.1, 1.0])}
    w = 1 / (1 + np.exp(-0.3))
    expected = (
        np.log((1 - w) * NORMAL.pdf(Y, 0.1) + w * NORMAL.pdf(Y, 1.0)).sum()
        + NORMAL.logpdf([0.1, 1.0], 0, 3).sum()
        + scipy.stats.beta.logpdf(w, 2, 1)
        + np.log(w * (1 - w))
    )
    assert float(model.log_density(point, model.arrays)) == pytest.approx(expected, rel=1e-12)
    gradient = jax.grad(model.log_density)(point, model.arrays)["w"]
    step = 1e-5  # central differences err by step^2 and by rounding / step, both near 1e-9 here
    ends = [float(model.log_density({**point, "w": point["w"] + s}, model.arrays)) for s in (-step, step)]
    assert float(gradient) == pytest.approx((ends[1] - ends[0]) / (2 * step), abs=1e-6)


@pytest.mark.slow
def test_sites_that_do_not_depend_on_the_discrete_ones_stay() -> None:
    model = Model(mixture, Dataset("d", {"y": Y}))
    assert model.summed_out == ("z",)
    assert model.in_chart("plain").summed_out == ("z",)
    assert list(model.sites) == ["w", "mu", "gap", "summed_out"]
    sites = model.constrain({"w": jnp.array(0.3), "mu": jnp.array([0.1, 1.0])}, model.arrays)
    assert float(sites["gap"]) == pytest.approx(0.9)


@pytest.fixture
def ranks_promoted():
    """NumPyro's Categorical draws by comparing arrays of unequal rank."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.usefixtures("ranks_promoted")
@pytest.mark.slow
def test_nested_plates_and_another_chart_keep_the_density() -> None:
    y = np.random.default_rng(1).normal(size=(4, 3))
    model = Model(nested, Dataset("d", {"y": y}), charts={"noncentred": {"e": LocScaleReparam(0)}})
    a, e = 0.4, np.array([-0.5, 0.2, 1.5])
    k = np.arange(3)
    likelihood = NORMAL.logpdf(y[..., None], e[None, :, None] + k[None, None], 1).sum(axis=0)
    summed = np.log((np.exp(likelihood) * [0.2, 0.3, 0.5]).sum(axis=-1)).sum()
    plain = NORMAL.logpdf(a) + NORMAL.logpdf(e, a, 2).sum() + summed
    assert float(model.log_density({"a": a, "e": e}, model.arrays)) == pytest.approx(plain, rel=1e-12)
    base = (e - a) / 2
    other = NORMAL.logpdf(a) + NORMAL.logpdf(base).sum() + summed
    point = {"a": jnp.array(a), "e_decentered": jnp.array(base)}
    assert float(model.log_density(point, model.arrays, "noncentred")) == pytest.approx(other, rel=1e-12)
    np.testing.assert_allclose(model.constrain(point, model.arrays, chart="noncentred")["e"], e, rtol=1e-12)


@pytest.mark.slow
def test_nuts_runs_on_what_is_left() -> None:
    y = np.concatenate([Y - 5, Y[:20] + 5])

    def two(y: np.ndarray | None = None) -> None:
        w = numpyro.sample("w", dist.Beta(1, 1))
        with numpyro.plate("n", 70):
            z = numpyro.sample("z", dist.Bernoulli(w))
            numpyro.sample("y", dist.Normal(10.0 * z - 5, 1), obs=y)

    made = reference(Model(two, Dataset("d", {"y": y})), key=jax.random.PRNGKey(0), warmup=500, draws=1_000)
    assert made.status is Status.PASSED
    # The components lie ten sds apart, so that w has a Beta(21, 51) posterior but for terms of order exp(-12).
    exact = scipy.stats.beta(21, 51)
    se = exact.std() / np.sqrt(made.diagnostics.loc["w", "ess_bulk"])
    assert abs(made.draws["w"].mean() - exact.mean()) < 5 * se


def endless(y: np.ndarray | None = None) -> None:
    z = numpyro.sample("z", dist.Poisson(3.0))
    numpyro.sample("y", dist.Normal(z, 1), obs=y)


def unplated(y: np.ndarray | None = None) -> None:
    z = numpyro.sample("z", dist.Bernoulli(0.5).expand([len(Y)]))
    numpyro.sample("y", dist.Normal(z, 1), obs=y)


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (endless, "Expected discrete latent sites with finitely many values; 'z' cannot be enumerated: sum it out of"),
        (unplated, "Expected a plate around each axis of a discrete latent site, .*; 'z' has an axis without: put it"),
    ],
)
def test_what_cannot_be_summed_out_is_refused(fn, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Model(fn, Dataset("d", {"y": Y}))


def test_without_funsor_the_sentence_says_what_to_do(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    expected = r"Expected continuous latent sites; 'z' is discrete: sum it out .* or install the extra 'elbowroom\[enum"
    with pytest.raises(ValueError, match=expected):
        Model(mixture, Dataset("d", {"y": Y}))
