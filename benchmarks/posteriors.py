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

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

from toolkit import Dataset, Model

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
    """

    fn: Callable[..., None]
    dimension: int
    arrays: Mapping[str, Callable[[Arrays], np.ndarray]] = field(default_factory=dict)
    static: tuple[str, ...] = ()
    latents: Mapping[str, Callable[[Arrays], np.ndarray]] = field(default_factory=dict)
    coefficients: tuple[str, ...] = ()
    log_concave: bool = False


def _standardised_height(data: Arrays) -> np.ndarray:
    return (data["height"] - data["height"].mean()) / data["height"].std(ddof=1)


def _centred_columns(data: Arrays) -> np.ndarray:
    """Without the first column, which is the intercept's ones."""
    return data["X"][:, 1:] - data["X"][:, 1:].mean(axis=0)


_MOTHER = ("intercept", "mom_hs", "mom_iq")
_BUSH = ("intercept", "log volume", "log area", "log shape", "log total_height", "log density", "group")
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
        latents={"z": lambda drawn: (drawn["theta"] - drawn["mu"][..., None]) / drawn["tau"][..., None]},
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
    return Model(entry.fn, dataset, log_concave=entry.log_concave, name=name, title=info["title"])


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
        site, index = re.fullmatch(r"(\w+)(?:\[([\d,]+)\])?", text).groups()  # type: ignore[union-attr]
        place = tuple(int(i) - 1 for i in index.split(",")) if index else ()
        places.setdefault(site, []).append((place, column))
    stacked = {}
    for site, found in places.items():
        shape = tuple(1 + max(indices) for indices in zip(*(place for place, _ in found), strict=True))
        stacked[site] = np.empty((*values.shape[:2], *shape))
        for place, column in found:
            stacked[site][(slice(None), slice(None), *place)] = values[..., column]
    return stacked
