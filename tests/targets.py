"""Small models with known answers, for tests."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from toolkit import Dataset, Model

SCALES = np.array([1e3, 1e-3])


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
