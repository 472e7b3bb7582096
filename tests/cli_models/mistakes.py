"""Models that cannot be studied, each for one reason."""

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from toolkit import Dataset, Model

NUMBER = 3


def observes_nothing(y):
    numpyro.sample("mu", dist.Normal(jnp.mean(y), 1))


def endless(y=None):
    rate = numpyro.sample("rate", dist.Gamma(2, 1))
    count = numpyro.sample("count", dist.Poisson(rate))
    numpyro.sample("y", dist.Normal(count, 1), obs=y)


def wrong_plate(y=None):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("row", 3):
        numpyro.sample("y", dist.Normal(mu, 1), obs=y)


def wrong_shape(y=None):
    beta = numpyro.sample("beta", dist.Normal(0, 1).expand([7]))
    numpyro.sample("y", dist.Normal(jnp.ones((2, 5)) @ beta, 1), obs=y)


def impossible(y=None):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.factor("never", -jnp.inf)
    numpyro.sample("y", dist.Normal(mu, 1), obs=y)


def broken_factory(y):
    return Model(observes_nothing, Dataset("numbers", {"y": y}))
