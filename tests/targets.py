"""Small models with known answers, for tests."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import scipy.optimize
from scipy.special import logsumexp

from toolkit import Dataset, Fit, Labels, Model
from toolkit.variational.density import LogDensity
from toolkit.variational.gaussians import Member
from toolkit.variational.starts import Starts, find_starts

KEY = jax.random.PRNGKey(0)
SCALES = np.array([1e3, 1e-3])
MIX = np.array([[1.0, 0.6, -0.4], [0.0, 0.9, 0.5], [0.3, -0.2, 0.8]])
SHAPES = np.array([1.5, 0.8, 2.0])


def pair(correlation: float = 0.9) -> Model:
    """Two correlated Gaussians in units a million apart; log evidence 0, mean (2000, -0.003)."""

    def correlated(loc, precision, log_scale):
        with numpyro.plate("coordinate", 2):
            z = numpyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
        centred = z - loc
        quadratic = centred @ precision @ centred
        numpyro.factor("density", -0.5 * quadratic - log_scale)

    covariance = np.array([[1.0, correlation], [correlation, 1.0]]) * np.outer(SCALES, SCALES)
    log_scale = np.log(2 * np.pi) + 0.5 * np.linalg.slogdet(covariance)[1]
    arrays = {
        "loc": np.array([2.0, -3.0]) * SCALES,
        "precision": np.linalg.inv(covariance),
        "log_scale": np.array(log_scale),
    }
    return Model(correlated, Dataset("pair", arrays), log_concave=True)


def line(rows: int = 20) -> Model:
    """A straight line with known noise: a conjugate posterior, nearly uncorrelated."""

    def straight(x, y=None):
        a = numpyro.sample("a", dist.Normal(0, 10))
        b = numpyro.sample("b", dist.Normal(0, 10))
        with numpyro.plate("row", x.shape[0]):
            numpyro.sample("y", dist.Normal(a + b * x, 0.5), obs=y)

    x = np.linspace(-1, 1, rows)
    y = 1 + 2 * x + 0.5 * np.random.default_rng(0).standard_normal(rows)
    return Model(straight, Dataset("line", {"x": x, "y": y}), log_concave=True)


def impossible() -> Model:
    """A density that is zero everywhere."""

    def nowhere(y=None):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.factor("never", -jnp.inf * jnp.ones(()))
        numpyro.sample("y", dist.Normal(z, 1), obs=y)

    return Model(nowhere, Dataset("none", {"y": np.array(0.0)}))


def quadratic(loc: Any, precision: Any) -> None:
    z = numpyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (loc.shape[0],)))
    numpyro.factor("density", -0.5 * (z - loc) @ precision @ (z - loc))


@functools.cache
def five() -> tuple[LogDensity, np.ndarray, np.ndarray]:
    """A Gaussian in five dimensions, its mean and its precision; its covariance is a diagonal plus two columns."""
    rng = np.random.default_rng(0)
    scale, columns = np.array([1.0, 10.0, 0.1, 2.0, 0.5]), rng.standard_normal((5, 2))
    precision = np.linalg.inv((np.eye(5) + columns @ columns.T) * np.outer(scale, scale))
    loc = 3 * scale * rng.standard_normal(5)
    return LogDensity(Model(quadratic, Dataset("five", {"loc": loc, "precision": precision}))), loc, precision


def divergence(member: Member, loc: np.ndarray, precision: np.ndarray) -> float:
    """KL(q || p) in nats, from a member to N(loc, precision^-1)."""
    product, apart = precision @ member.covariance(), member.loc - loc
    return 0.5 * float(np.trace(product) - len(loc) - np.linalg.slogdet(product)[1] + apart @ precision @ apart)


def log_gammas(mix: Any, shape: Any) -> None:
    """Three log-gamma densities, mixed: log-concave, and skewed in every direction."""
    z = numpyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (3,)))
    numpyro.factor("density", (shape * (mix @ z) - jnp.exp(mix @ z)).sum())


@functools.cache
def skewed() -> tuple[Model, Starts]:
    model = Model(log_gammas, Dataset("log gammas", {"mix": MIX, "shape": SHAPES}), log_concave=True)
    return model, find_starts(model, key=KEY, count=2)


def skewed_elbo(loc: np.ndarray, factor: np.ndarray) -> float:
    """In nats, in closed form: the mean of a linear function's exponential over a Gaussian is known."""
    spread = 0.5 * ((MIX @ factor) ** 2).sum(1)
    entropy = np.log(np.abs(np.diag(factor))).sum() + 1.5 * (1 + math.log(2 * math.pi))
    return float(SHAPES @ (MIX @ loc) - np.exp(MIX @ loc + spread).sum() + entropy)


@functools.cache
def skewed_best(name: str) -> float:
    """The highest ELBO of a family, by SciPy on the closed form."""
    places = np.diag_indices(3) if name == "mean_field" else np.tril_indices(3)

    def loss(x: np.ndarray) -> float:
        factor = np.zeros((3, 3))
        factor[places] = x[3:]
        return -skewed_elbo(x[:3], factor)

    begin = np.concatenate([np.zeros(3), 0.5 * np.eye(3)[places]])
    found = scipy.optimize.minimize(loss, begin, method="BFGS", options={"gtol": 1e-7})
    # The ELBO is strictly concave here, with a curvature of about one in these units.
    assert np.abs(found.jac).max() < 1e-5
    return -float(found.fun)


def skewed_gap(fitted: Fit) -> float:
    """What the best of the family truly gains over a fit, in nats."""
    name = fitted.guide.name
    if name == "mean_field":
        loc, factor = fitted.params["z_auto_loc"], np.diag(fitted.params["z_auto_scale"])
    else:
        loc, factor = fitted.params["auto_loc"], fitted.params["auto_scale_tril"]
    return skewed_best(name) - skewed_elbo(np.asarray(loc), np.asarray(factor))


def two_clusters(apart: float) -> np.ndarray:
    """Thirty numbers, fifteen around each of two places."""
    rng = np.random.default_rng(0)
    return np.concatenate([rng.normal(-0.5 * apart, 1.0, 15), rng.normal(0.5 * apart, 1.0, 15)])


def two_means(y: np.ndarray) -> Model:
    """A mixture of two normals whose labels may switch."""

    def mixture(y: Any = None) -> None:
        means = numpyro.sample("means", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
        parts = dist.Normal(jnp.broadcast_to(means, (30, 2)), 1.0)
        with numpyro.plate("row", 30):
            numpyro.sample("y", dist.MixtureSameFamily(dist.Categorical(jnp.full((30, 2), 0.5)), parts), obs=y)

    return Model(mixture, Dataset("two clusters", {"y": y}), labels=Labels({"means": -1}, "means", 2))


def two_means_evidence(y: np.ndarray) -> float:
    """Log p(y) of the mixture with all its labellings, on a grid of both means."""
    grid = np.linspace(-12, 12, 1_201)
    log_prior = -0.5 * (grid / 5) ** 2 - np.log(5 * np.sqrt(2 * np.pi))
    each = np.exp(-0.5 * (y[:, None] - grid) ** 2) / np.sqrt(2 * np.pi)
    likelihood = sum(np.log(0.5 * row[:, None] + 0.5 * row[None]) for row in each)
    step = np.log(grid[1] - grid[0])
    return float(logsumexp(likelihood + log_prior[:, None] + log_prior[None] + 2 * step))
