"""The 23 reference posteriors of posteriordb as NumPyro programs, with their reference draws.

    load("wells_data-wells_dist")               the `toolkit.Model`
    reference_draws("wells_data-wells_dist")    {"beta": (chain, draw, coefficient)}

Each program is the text of its model, and its arguments bear the names of posteriordb's data, capitals included. Data
are not standardised where the model does not say so. Indices count from 0: `beta[0]` here is `beta[1]` in the texts.
"flat" is density 1 on the constrained scale; in unconstrained space the Jacobian is added, as in Stan.

Data and draws are not part of the repository. They are read from `posteriordb` in the folder that ELBOWROOM_SHARED_DATA
names, `../shared/data` from the repository's root if it is not set.

**Log-concavity** is declared for `wells_data-wells_dist` only, where it is plain: a Bernoulli density is log-concave in
its logit, the logit is linear in the coefficients, and these are flat on the whole line. It is not declared elsewhere:
wherever a scale is unknown its unconstrained coordinate is t = log(scale), and -r^2 exp(-2 t) / 2 is not concave in
(r, t) jointly; a funnel is not log-concave at all; and the Poisson regression has bounded coefficients, whose scaled
logit bends a log density that would be concave in the coefficients themselves.

References:
    Magnusson, Torgander, Burkner, Zhang, Carpenter & Vehtari (2024), posteriordb: Testing, Benchmarking and Developing
        Bayesian Inference Algorithms, arXiv 2407.04967. Data and most draws: BSD-3-Clause.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

from toolkit import Dataset, Labels, Model

Arrays = Mapping[str, np.ndarray]

# -- programs ---------------------------------------------------------------------------------------------------------


def _flat() -> dist.Distribution:
    return dist.ImproperUniform(constraints.real, (), ())


def _flat_positive() -> dist.Distribution:
    return dist.ImproperUniform(constraints.positive, (), ())


def _columns(first: Any, *others: Any) -> Any:
    """A design matrix: ones, then the given columns."""
    return jnp.stack([jnp.ones_like(first), first, *others], axis=1)


def wells_dist(dist: Any, switched: Any = None) -> None:
    """Whether a household switched wells, by its distance in metres to the next safe one."""
    with numpyro.plate("coefficient", 2):
        beta = numpyro.sample("beta", _flat())
    with numpyro.plate("household", len(dist)):
        numpyro.sample("switched", numpyro.distributions.Bernoulli(logits=beta[0] + beta[1] * dist), obs=switched)


def kidscore_momhsiq(mom_hs: Any, mom_iq: Any, kid_score: Any = None) -> None:
    """Children's test scores by their mothers' schooling and IQ."""
    with numpyro.plate("coefficient", 3):
        beta = numpyro.sample("beta", _flat())
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    with numpyro.plate("child", len(mom_hs)):
        numpyro.sample("kid_score", dist.Normal(_columns(mom_hs, mom_iq) @ beta, sigma), obs=kid_score)


def kidscore_interaction(mom_hs: Any, mom_iq: Any, kid_score: Any = None) -> None:
    """The same with the product of schooling and IQ."""
    with numpyro.plate("coefficient", 4):
        beta = numpyro.sample("beta", _flat())
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    design = _columns(mom_hs, mom_iq, mom_hs * mom_iq)
    with numpyro.plate("child", len(mom_hs)):
        numpyro.sample("kid_score", dist.Normal(design @ beta, sigma), obs=kid_score)


def logearn_height_male(height: Any, male: Any, earn: Any = None) -> None:
    """Log earnings by height in inches and sex; log(earn) ~ Normal is stated as earn ~ LogNormal."""
    with numpyro.plate("coefficient", 3):
        beta = numpyro.sample("beta", _flat())
    sigma = numpyro.sample("sigma", _flat_positive())
    with numpyro.plate("person", len(height)):
        numpyro.sample("earn", dist.LogNormal(_columns(height, male) @ beta, sigma), obs=earn)


def logearn_interaction_z(z_height: Any, male: Any, earn: Any = None) -> None:
    """Log earnings by standardised height, sex and their product."""
    with numpyro.plate("coefficient", 4):
        beta = numpyro.sample("beta", _flat())
    sigma = numpyro.sample("sigma", _flat_positive())
    design = _columns(z_height, male, z_height * male)
    with numpyro.plate("person", len(z_height)):
        numpyro.sample("earn", dist.LogNormal(design @ beta, sigma), obs=earn)


def logmesquite_logvas(
    diam1: Any, diam2: Any, canopy_height: Any, total_height: Any, density: Any, group: Any, weight: Any = None
) -> None:
    """Log biomass of mesquite bushes by logarithms of their volume, area, shape, height and density, and by group."""
    with numpyro.plate("coefficient", 7):
        beta = numpyro.sample("beta", _flat())
    sigma = numpyro.sample("sigma", _flat_positive())
    area = diam1 * diam2
    logs = (jnp.log(size) for size in (area * canopy_height, area, diam1 / diam2, total_height, density))
    with numpyro.plate("bush", len(diam1)):
        numpyro.sample("weight", dist.LogNormal(_columns(*logs, group) @ beta, sigma), obs=weight)


def nes(
    real_ideo: Any, race_adj: Any, age_discrete: Any, educ1: Any, gender: Any, income: Any, partyid7: Any = None
) -> None:
    """Party identification by ideology, race, age group (1 to 4), education, gender and income."""
    with numpyro.plate("coefficient", 9):
        beta = numpyro.sample("beta", _flat())
    sigma = numpyro.sample("sigma", _flat_positive())
    ages = ((age_discrete == group).astype(real_ideo.dtype) for group in (2, 3, 4))
    design = _columns(real_ideo, race_adj, *ages, educ1, gender, income)
    with numpyro.plate("voter", len(real_ideo)):
        numpyro.sample("partyid7", dist.Normal(design @ beta, sigma), obs=partyid7)


def diamonds(Xc: Any, Y: Any = None) -> None:
    """Log prices of diamonds by 24 centred, collinear columns."""
    with numpyro.plate("coefficient", Xc.shape[1]):
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    intercept = numpyro.sample("Intercept", dist.StudentT(3.0, 8.0, 10.0))
    # Half a Student t: it is symmetric. NumPyro's truncated one has the same density, but cannot be drawn from here.
    sigma = numpyro.sample("sigma", dist.FoldedDistribution(dist.StudentT(3.0, 0.0, 10.0)))
    with numpyro.plate("diamond", len(Xc)):
        numpyro.sample("Y", dist.Normal(intercept + Xc @ b, sigma), obs=Y)


def blr(X: Any, y: Any = None) -> None:
    """A simulated linear regression without intercept."""
    with numpyro.plate("coefficient", X.shape[1]):
        beta = numpyro.sample("beta", dist.Normal(0.0, 10.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(10.0))
    with numpyro.plate("row", len(X)):
        numpyro.sample("y", dist.Normal(X @ beta, sigma), obs=y)


def ark(y: Any, *, K: int) -> None:
    """An autoregression of order K; the first K values are only conditioned on."""
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    with numpyro.plate("lag", K):
        beta = numpyro.sample("beta", dist.Normal(0.0, 10.0))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    earlier = jnp.stack([y[K - k : len(y) - k] for k in range(1, K + 1)], axis=1)
    with numpyro.plate("time", len(y) - K):
        numpyro.sample("later", dist.Normal(alpha + earlier @ beta, sigma), obs=y[K:])


def eight_schools_centered(sigma: Any, y: Any = None) -> None:
    """Effects of coaching in eight schools, whose errors sigma are known."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", len(sigma)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_noncentered(sigma: Any, y: Any = None) -> None:
    """The same posterior of mu, tau and theta, in other coordinates."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", len(sigma)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        theta = numpyro.deterministic("theta", mu + tau * z)
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def gp_regr(x: Any, y: Any = None) -> None:
    """A Gaussian process through 11 points; sigma is the noise variance, and there is no jitter."""
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    distances = x[:, None] - x[None, :]
    covariance = alpha**2 * jnp.exp(-(distances**2) / (2 * rho**2)) + sigma * jnp.eye(len(x))
    numpyro.sample("y", dist.MultivariateNormal(jnp.zeros_like(x), covariance), obs=y)


def low_dim_gauss_mix(y: Any) -> None:
    """A mixture of two Gaussians with ordered means; theta is the weight of the first."""
    mu = numpyro.sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    numpyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum())
    with numpyro.plate("component", 2):
        sigma = numpyro.sample("sigma", dist.HalfNormal(2.0))
    theta = numpyro.sample("theta", dist.Beta(5.0, 5.0))
    first = jnp.log(theta) + dist.Normal(mu[0], sigma[0]).log_prob(y)
    second = jnp.log1p(-theta) + dist.Normal(mu[1], sigma[1]).log_prob(y)
    numpyro.factor("y", jnp.logaddexp(first, second).sum())


def hmm_drive_0(u: Any, v: Any, alpha: Any) -> None:
    """A hidden Markov model of two states for speeds and distances in basketball drives, its states summed out.

    The first state carries no initial probability: each has weight 1.
    """
    theta1 = numpyro.sample("theta1", dist.Dirichlet(alpha[0]))
    theta2 = numpyro.sample("theta2", dist.Dirichlet(alpha[1]))
    rates = dist.ImproperUniform(constraints.positive_ordered_vector, (), (2,))
    phi = numpyro.sample("phi", rates)
    lambda_ = numpyro.sample("lambda", rates)
    numpyro.factor("phi_prior", dist.Normal(jnp.array([0.0, 3.0]), 1.0).log_prob(phi).sum())
    numpyro.factor("lambda_prior", dist.Normal(jnp.array([0.0, 3.0]), 1.0).log_prob(lambda_).sum())
    emitted = jnp.log(phi * lambda_)[None] - jnp.outer(u, phi) - jnp.outer(v, lambda_)  # two exponential densities
    from_first, from_second = jnp.log(theta1), jnp.log(theta2)

    def forward(before: Any, here: Any) -> tuple[Any, None]:
        return jnp.logaddexp(before[0] + from_first, before[1] + from_second) + here, None

    last, _ = jax.lax.scan(forward, emitted[0], emitted[1:])
    numpyro.factor("drives", jnp.logaddexp(last[0], last[1]))


def radon_noncentered(floor_measure: Any, county_idx: Any, log_radon: Any = None, *, J: int) -> None:
    """Log radon in houses on their floor (0 basement, 1 first), a line for each of J counties."""
    sigma_y, sigma_alpha, sigma_beta, mu_alpha, mu_beta = _radon_population()
    with numpyro.plate("county", J):
        alpha_raw = numpyro.sample("alpha_raw", dist.Normal(0.0, 1.0))
        beta_raw = numpyro.sample("beta_raw", dist.Normal(0.0, 1.0))
        alpha = numpyro.deterministic("alpha", mu_alpha + sigma_alpha * alpha_raw)
        beta = numpyro.deterministic("beta", mu_beta + sigma_beta * beta_raw)
    with numpyro.plate("house", len(floor_measure)):
        line = alpha[county_idx] + beta[county_idx] * floor_measure
        numpyro.sample("log_radon", dist.Normal(line, sigma_y), obs=log_radon)


def radon_centered(floor_measure: Any, county_idx: Any, log_radon: Any = None, *, J: int) -> None:
    """The same posterior of alpha and beta, in other coordinates."""
    sigma_y, sigma_alpha, sigma_beta, mu_alpha, mu_beta = _radon_population()
    with numpyro.plate("county", J):
        alpha = numpyro.sample("alpha", dist.Normal(mu_alpha, sigma_alpha))
        beta = numpyro.sample("beta", dist.Normal(mu_beta, sigma_beta))
    with numpyro.plate("house", len(floor_measure)):
        line = alpha[county_idx] + beta[county_idx] * floor_measure
        numpyro.sample("log_radon", dist.Normal(line, sigma_y), obs=log_radon)


def _radon_population() -> tuple[Any, ...]:
    scales = [numpyro.sample(site, dist.HalfNormal(1.0)) for site in ("sigma_y", "sigma_alpha", "sigma_beta")]
    return (*scales, *(numpyro.sample(site, dist.Normal(0.0, 10.0)) for site in ("mu_alpha", "mu_beta")))


def glm_poisson(year: Any, C: Any = None) -> None:
    """Counts of peregrines over 40 years, a cubic in the year."""
    trend = _cubic(year)
    with numpyro.plate("occasion", len(year)):
        numpyro.sample("C", dist.Poisson(jnp.exp(trend)), obs=C)


def glmm_poisson(year: Any, C: Any = None) -> None:
    """The same with an effect of its own for each year."""
    trend = _cubic(year)
    sigma = numpyro.sample("sigma", dist.Uniform(0.0, 5.0))
    with numpyro.plate("occasion", len(year)):
        eps = numpyro.sample("eps", dist.Normal(0.0, sigma))
        numpyro.sample("C", dist.Poisson(jnp.exp(trend + eps)), obs=C)


def _cubic(year: Any) -> Any:
    alpha = numpyro.sample("alpha", dist.Uniform(-20.0, 20.0))
    beta1 = numpyro.sample("beta1", dist.Uniform(-10.0, 10.0))
    beta2 = numpyro.sample("beta2", dist.Uniform(-10.0, 10.0))
    beta3 = numpyro.sample("beta3", dist.Uniform(-10.0, 10.0))
    return alpha + beta1 * year + beta2 * year**2 + beta3 * year**3


def seeds(N: Any, x1: Any, x2: Any, n: Any = None) -> None:
    """How many of N seeds germinated on each of 21 plates; tau is a precision."""
    alpha0 = numpyro.sample("alpha0", dist.Normal(0.0, 1000.0))
    alpha1 = numpyro.sample("alpha1", dist.Normal(0.0, 1000.0))
    alpha2 = numpyro.sample("alpha2", dist.Normal(0.0, 1000.0))
    alpha12 = numpyro.sample("alpha12", dist.Normal(0.0, 1000.0))
    tau = numpyro.sample("tau", dist.Gamma(0.001, 0.001))
    with numpyro.plate("dish", len(N)):
        b = numpyro.sample("b", dist.Normal(0.0, 1 / jnp.sqrt(tau)))
        logits = alpha0 + alpha1 * x1 + alpha2 * x2 + alpha12 * x1 * x2 + b
        numpyro.sample("n", dist.Binomial(N, logits=logits), obs=n)


def rats(x: Any, rat: Any, xbar: Any, y: Any = None, *, N: int) -> None:
    """Weights of N rats on five days x, a line for each."""
    mu_alpha = numpyro.sample("mu_alpha", dist.Normal(0.0, 100.0))
    mu_beta = numpyro.sample("mu_beta", dist.Normal(0.0, 100.0))
    sigma_y = numpyro.sample("sigma_y", _flat_positive())
    sigma_alpha = numpyro.sample("sigma_alpha", _flat_positive())
    sigma_beta = numpyro.sample("sigma_beta", _flat_positive())
    with numpyro.plate("rat", N):
        alpha = numpyro.sample("alpha", dist.Normal(mu_alpha, sigma_alpha))
        beta = numpyro.sample("beta", dist.Normal(mu_beta, sigma_beta))
    with numpyro.plate("weighing", len(x)):
        numpyro.sample("y", dist.Normal(alpha[rat] + beta[rat] * (x - xbar), sigma_y), obs=y)


def irt_2pl(y: Any) -> None:
    """Answers of persons to items that differ in difficulty b and discrimination a, shapes (item, 1)."""
    items, persons = y.shape
    sigma_theta = numpyro.sample("sigma_theta", dist.HalfCauchy(2.0))
    sigma_a = numpyro.sample("sigma_a", dist.HalfCauchy(2.0))
    mu_b = numpyro.sample("mu_b", dist.Normal(0.0, 5.0))
    sigma_b = numpyro.sample("sigma_b", dist.HalfCauchy(2.0))
    item, person = numpyro.plate("item", items, dim=-2), numpyro.plate("person", persons, dim=-1)
    with person:
        theta = numpyro.sample("theta", dist.Normal(0.0, sigma_theta))
    with item:
        a = numpyro.sample("a", dist.LogNormal(0.0, sigma_a))
        b = numpyro.sample("b", dist.Normal(mu_b, sigma_b))
    with item, person:
        numpyro.sample("y", dist.Bernoulli(logits=a * (theta[None] - b)), obs=y)


def lda_k2(counts: Any) -> None:
    """Two topics in three documents, by how often each holds each word, `(document, word)`; topics are summed out."""
    with numpyro.plate("document", counts.shape[0]):
        theta = numpyro.sample("theta", dist.Dirichlet(jnp.ones(2)))
    with numpyro.plate("topic", 2):
        phi = numpyro.sample("phi", dist.Dirichlet(jnp.ones(counts.shape[1])))
    numpyro.factor("words", (counts * jnp.log(theta @ phi)).sum())


# -- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Posterior:
    """A program, and how posteriordb's data and draws become its arguments and latents.

    Attributes:
        fn: The NumPyro callable. An argument is the data of its name, as real numbers, unless said otherwise.
        dimension: How many unconstrained scalars it has.
        arrays: Argument name to a function of the data, for arguments that are not the data as they are.
        static: Data that decide shapes.
        latents: Latent site to a function of the reported draws, for latents that are not reported as they are.
        coefficients: Labels of plate `coefficient`, where the columns have names.
        log_concave: Whether the posterior density is known to be log-concave in unconstrained space.
        labels: What may be relabelled without changing the density.
    """

    fn: Callable[..., None]
    dimension: int
    arrays: Mapping[str, Callable[[Arrays], np.ndarray]] = field(default_factory=dict)
    static: tuple[str, ...] = ()
    latents: Mapping[str, Callable[[Arrays], np.ndarray]] = field(default_factory=dict)
    coefficients: tuple[str, ...] = ()
    log_concave: bool = False
    labels: Labels | None = None


def _standardised_height(data: Arrays) -> np.ndarray:
    return (data["height"] - data["height"].mean()) / data["height"].std(ddof=1)


def _centred_columns(data: Arrays) -> np.ndarray:
    """Without the first column, which is the intercept's ones."""
    return data["X"][:, 1:] - data["X"][:, 1:].mean(axis=0)


def _from_zero(name: str) -> Callable[[Arrays], np.ndarray]:
    """Indices that count from 0 where the data's count from 1."""
    return lambda data: data[name] - 1


def _whole(name: str) -> Callable[[Arrays], np.ndarray]:
    return lambda data: data[name]


def _word_counts(data: Arrays) -> np.ndarray:
    counts = np.zeros((data["M"], data["V"]))
    np.add.at(counts, (data["doc"] - 1, data["w"] - 1), 1)
    return counts


def _standard(site: str, mean: str, scale: str) -> Callable[[Arrays], np.ndarray]:
    """Standardised effects of a non-centred form, from the effects that are reported."""
    return lambda drawn: (drawn[site] - drawn[mean][..., None]) / drawn[scale][..., None]


def _column(site: str) -> Callable[[Arrays], np.ndarray]:
    """A vector along a plate of dimension -2."""
    return lambda drawn: drawn[site][..., None]


def _shares(site: str) -> Callable[[Arrays], np.ndarray]:
    """Points of a simplex, which float32 left by some 1e-7: enough to spoil a share near 0 that is 1 minus the rest."""
    return lambda drawn: drawn[site] / drawn[site].sum(axis=-1, keepdims=True)


_MOTHER = ("intercept", "mom_hs", "mom_iq")
_BUSH = ("intercept", "log volume", "log area", "log shape", "log total_height", "log density", "group")
_COUNTY = {"county_idx": _from_zero("county_idx")}
_AGES = ("age 2", "age 3", "age 4")

POSTERIORS: Mapping[str, Posterior] = {
    "wells_data-wells_dist": Posterior(wells_dist, 2, coefficients=("intercept", "dist"), log_concave=True),
    "kidiq-kidscore_momhsiq": Posterior(kidscore_momhsiq, 4, coefficients=_MOTHER),
    "kidiq-kidscore_interaction": Posterior(kidscore_interaction, 5, coefficients=(*_MOTHER, "mom_hs x mom_iq")),
    "earnings-logearn_height_male": Posterior(logearn_height_male, 4, coefficients=("intercept", "height", "male")),
    "earnings-logearn_interaction_z": Posterior(
        logearn_interaction_z,
        5,
        arrays={"z_height": _standardised_height},
        coefficients=("intercept", "z_height", "male", "z_height x male"),
    ),
    "mesquite-logmesquite_logvas": Posterior(logmesquite_logvas, 8, coefficients=_BUSH),
    "nes1980-nes": Posterior(
        nes, 10, coefficients=("intercept", "real_ideo", "race_adj", *_AGES, "educ1", "gender", "income")
    ),
    "diamonds-diamonds": Posterior(diamonds, 26, arrays={"Xc": _centred_columns}),
    "sblrc-blr": Posterior(blr, 6),
    "arK-arK": Posterior(ark, 7, static=("K",)),
    "eight_schools-eight_schools_centered": Posterior(eight_schools_centered, 10),
    "eight_schools-eight_schools_noncentered": Posterior(
        eight_schools_noncentered,
        10,
        latents={"z": _standard("theta", "mu", "tau")},
    ),
    "gp_pois_regr-gp_regr": Posterior(gp_regr, 3),
    "low_dim_gauss_mix-low_dim_gauss_mix": Posterior(low_dim_gauss_mix, 5),
    "bball_drive_event_0-hmm_drive_0": Posterior(
        hmm_drive_0, 6, latents={"theta1": _shares("theta1"), "theta2": _shares("theta2")}
    ),
    "radon_mn-radon_variable_intercept_slope_noncentered": Posterior(
        radon_noncentered,
        175,
        arrays=_COUNTY,
        static=("J",),
        latents={
            "alpha_raw": _standard("alpha", "mu_alpha", "sigma_alpha"),
            "beta_raw": _standard("beta", "mu_beta", "sigma_beta"),
        },
    ),
    "radon_mn-radon_variable_intercept_slope_centered": Posterior(radon_centered, 175, arrays=_COUNTY, static=("J",)),
    "GLM_Poisson_Data-GLM_Poisson_model": Posterior(glm_poisson, 4, arrays={"C": _whole("C")}),
    "GLMM_Poisson_data-GLMM_Poisson_model": Posterior(glmm_poisson, 45, arrays={"C": _whole("C")}),
    "seeds_data-seeds_model": Posterior(seeds, 26, arrays={"N": _whole("N"), "n": _whole("n")}),
    "rats_data-rats_model": Posterior(rats, 65, arrays={"rat": _from_zero("rat")}, static=("N",)),
    "irt_2pl-irt_2pl": Posterior(irt_2pl, 144, latents={"a": _column("a"), "b": _column("b")}),
    "three_docs1200-ldaK2": Posterior(
        lda_k2,
        7,
        arrays={"counts": _word_counts},
        latents={"theta": _shares("theta"), "phi": _shares("phi")},
        labels=Labels(axes={"phi": -2, "theta": -1}, by="phi", count=2),
    ),
}


# -- loading ----------------------------------------------------------------------------------------------------------


def names() -> tuple[str, ...]:
    """Names of the posteriors, by dimension and then by the alphabet."""
    return tuple(sorted(POSTERIORS, key=lambda name: (POSTERIORS[name].dimension, name)))


def folder(name: str) -> Path:
    """The folder that holds a posterior's data and draws.

    Raises:
        ValueError: There is no posterior of that name, or its folder is not there.
    """
    _entry(name)
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("ELBOWROOM_SHARED_DATA", default)) / "posteriordb" / name
    if not path.is_dir():
        raise ValueError(
            f"Expected the data of posterior '{name}' at {path}; there is no such folder: set ELBOWROOM_SHARED_DATA to "
            "the folder that holds `posteriordb`."
        )
    return path


def _entry(name: str) -> Posterior:
    if name not in POSTERIORS:
        raise ValueError(f"Expected a posterior's name, one of {', '.join(names())}; got '{name}'.")
    return POSTERIORS[name]


def load(name: str) -> Model:
    """A posterior as a model, with the database's data.

    Raises:
        ValueError: There is no posterior of that name, or its data are not there.
    """
    entry, path = _entry(name), folder(name)
    packed = path / "data.json.gz"
    text = gzip.decompress(packed.read_bytes()).decode() if packed.is_file() else (path / "data.json").read_text()
    data = {key: np.asarray(value) for key, value in json.loads(text).items()}
    arguments = [argument for argument in signature(entry.fn).parameters if argument not in entry.static]
    arrays = {a: entry.arrays[a](data) if a in entry.arrays else data[a].astype(float) for a in arguments}
    info = json.loads((path / "info.json").read_text())
    dataset = Dataset(
        name.partition("-")[0],
        arrays,
        static={key: int(data[key]) for key in entry.static},
        coords={"coefficient": np.array(entry.coefficients)} if entry.coefficients else {},
        source=f"posteriordb, commit {info['posteriordb_commit']}",
        licence=info["licence"],
    )
    return Model(entry.fn, dataset, log_concave=entry.log_concave, labels=entry.labels, name=name, title=info["title"])


def reference_draws(name: str) -> dict[str, np.ndarray]:
    """Reference draws of a posterior's latent sites in constrained space: site to `(chain, draw, ...)`.

    They were stored in float32. Latents that the reference does not report, such as non-centred ones, are computed.

    Raises:
        ValueError: There is no posterior of that name, or its draws are not there.
    """
    entry, drawn = _entry(name), _reported(folder(name) / "draws.npz")
    computed = {site: compute(drawn) for site, compute in entry.latents.items()}
    return {site: computed[site] if site in computed else drawn[site] for site in load(name).latents}


def _reported(path: Path) -> dict[str, np.ndarray]:
    """What the reference reports, `theta[1]`, `theta[2]`, ... stacked: name to `(chain, draw, ...)` in float64."""
    with np.load(path) as file:
        columns, values = file["parameters"].tolist(), file["draws"].astype(float)
    places: dict[str, list[tuple[tuple[int, ...], int]]] = {}
    for column, text in enumerate(columns):
        site, index = re.fullmatch(r"(\w+)(?:\[([\d,]+)\])?", text).groups()
        place = tuple(int(i) - 1 for i in index.split(",")) if index else ()
        places.setdefault(site, []).append((place, column))
    stacked = {}
    for site, found in places.items():
        shape = tuple(1 + max(indices) for indices in zip(*(place for place, _ in found), strict=True))
        stacked[site] = np.empty((*values.shape[:2], *shape))
        for place, column in found:
            stacked[site][(slice(None), slice(None), *place)] = values[..., column]
    return stacked
