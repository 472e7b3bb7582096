"""Everything that a name on the command line may be, and likelihoods and priors of several kinds."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from toolkit import Dataset, Model

DATA = np.array([0.3, -1.2, 0.8, 0.1])


def mean(y=None):
    mu = numpyro.sample("mu", dist.Normal(0, 10))
    numpyro.sample("y", dist.Normal(mu, 1), obs=y)


bound = Model(mean, Dataset("four_numbers", {"y": DATA}))


def factory(*, scale=1.0):
    return Model(mean, Dataset("four_numbers", {"y": scale * DATA}))


def regression(design, y=None):
    beta = numpyro.sample("beta", dist.Normal(0, 5).expand([design.shape[1]]).to_event(1))
    numpyro.sample("y", dist.Normal(design @ beta, 1), obs=y)


def factor_only(y):
    mu = numpyro.sample("mu", dist.Normal(0, 10))
    numpyro.factor("likelihood", -0.5 * jnp.sum((y - mu) ** 2))


def flat(y=None):
    mu = numpyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
    numpyro.sample("y", dist.Normal(mu, 1), obs=y)


def mixture(y=None):
    low = numpyro.sample("low", dist.Normal(-2, 1))
    with numpyro.plate("row", len(y)):
        high = numpyro.sample("high", dist.Bernoulli(0.5))
        numpyro.sample("y", dist.Normal(jnp.where(high == 1, 2.0, low), 1), obs=y)


def rescaled(y, scale=1.0):
    return Model(mean, Dataset("four_numbers", {"y": scale * y}))
