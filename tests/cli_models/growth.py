"""Heights of children by age and school: what a user might bring."""

import numpyro
import numpyro.distributions as dist


def growth(age, school, height=None, noise=3.0):
    at_birth = numpyro.sample("at_birth", dist.Normal(60, 20))
    per_year = numpyro.sample("per_year", dist.Normal(0, 10))
    with numpyro.plate("school", 2):
        offset = numpyro.sample("offset", dist.Normal(0, 5))
    mean = at_birth + per_year * age + offset[school]
    numpyro.sample("height", dist.Normal(mean, noise), obs=height)
