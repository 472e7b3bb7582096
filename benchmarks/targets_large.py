"""Targets of about 1,000 dimensions: a Gaussian whose optima are known, a hierarchy, and the default LDA study."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import models
from toolkit import Dataset, Model

SIZE = 1_000
CORRELATION = 0.9
GROUPS = 497
ROWS_PER_GROUP = 8


def correlated_gaussian(loc: Any, scale: Any, *, correlation: float) -> None:
    """The NumPyro callable: scalars of very different scales, each correlated with the one before it.

    Args:
        loc: Posterior means, `(scalar,)`.
        scale: Posterior sds, `(scalar,)`.
        correlation: Between neighbours; between scalars i and j it is this to the power of |i - j|.
    """
    x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real_vector, (), (loc.shape[0],)))
    standard = (x - loc) / scale
    steps = dist.Normal(correlation * standard[:-1], jnp.sqrt(1 - correlation**2)).log_prob(standard[1:])
    numpyro.factor("density", dist.Normal().log_prob(standard[0]) + steps.sum() - jnp.log(scale).sum())


def gaussian(size: int = SIZE, correlation: float = CORRELATION) -> Model:
    """A normalised Gaussian with sds from 0.001 to 1,000 in random order: log evidence 0, best full rank ELBO 0.

    Args:
        size: How many scalars.
        correlation: Between neighbours.
    """
    random = np.random.default_rng(0)
    scale = random.permutation(np.geomspace(1e-3, 1e3, size))
    loc = scale * random.normal(0.0, 10.0, size)

    def exact(key: jax.Array, draws: int) -> dict[str, np.ndarray]:
        noise = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel()).standard_normal((draws, size))
        standard = np.empty_like(noise)
        standard[:, 0] = noise[:, 0]
        for i in range(1, size):
            standard[:, i] = correlation * standard[:, i - 1] + np.sqrt(1 - correlation**2) * noise[:, i]
        return {"x": loc + scale * standard}

    data = Dataset(
        f"gaussian_{size}",
        {"loc": loc, "scale": scale},
        static={"correlation": correlation},
        source="constructed",
        licence="none needed",
    )
    return Model(correlated_gaussian, data, exact=exact, log_evidence=0.0, log_concave=True)


def best_mean_field_elbo(size: int = SIZE, correlation: float = CORRELATION) -> float:
    """The highest ELBO of a factorised Gaussian on `gaussian(size, correlation)`, in nats.

    The best factorised q has the precision's diagonal as its precisions (Bishop 2006, section 10.1.2), so that
    KL(q || p) = 1/2 (log det R + sum log diag(R^-1)) for the correlation matrix R, whose inverse is tridiagonal.
    """
    return -0.5 * ((size - 2) * np.log1p(correlation**2) - np.log1p(-(correlation**2)))


def varying_lines(x: Any, group: Any, y: Any = None, *, groups: int) -> None:
    """The NumPyro callable: a line for each group, intercepts and slopes non-centred.

    Args:
        x: Predictor, `(row,)`.
        group: Which group each row belongs to, from 0, `(row,)`.
        y: Outcome, `(row,)`; drawn if not given.
        groups: How many groups.
    """
    with numpyro.plate("coefficient", 2):
        mean = numpyro.sample("mean", dist.Normal(0.0, 5.0))
        sd = numpyro.sample("sd", dist.HalfNormal(2.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0))
    with numpyro.plate("group", groups):
        standard = numpyro.sample("standard", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    line = (mean + sd * standard)[group]
    with numpyro.plate("row", x.shape[0]):
        numpyro.sample("y", dist.Normal(line[:, 0] + line[:, 1] * x, sigma), obs=y)


def hierarchy(groups: int = GROUPS, rows: int = ROWS_PER_GROUP) -> Model:
    """A simulated hierarchy of 2 x `groups` + 5 scalars.

    Args:
        groups: How many groups.
        rows: How many rows each has.
    """
    random = np.random.default_rng(1)
    group = np.repeat(np.arange(groups), rows)
    x = random.normal(size=groups * rows)
    truth = {"mean": np.array([1.0, -0.5]), "sd": np.array([0.8, 0.3]), "sigma": np.array(1.0)}
    standard = random.normal(size=(groups, 2))
    line = (truth["mean"] + truth["sd"] * standard)[group]
    y = line[:, 0] + line[:, 1] * x + truth["sigma"] * random.normal(size=len(x))
    data = Dataset(
        f"varying_lines_{groups}",
        {"x": x, "group": group, "y": y},
        static={"groups": groups},
        truth=truth | {"standard": standard},
        source=f"simulated: {groups} groups of {rows} rows",
        licence="none needed",
    )
    return Model(varying_lines, data)


def _lda() -> Model:
    return models.load("lda").model()


_TARGETS = {"gaussian_1000": gaussian, "hierarchy_999": hierarchy, "lda_976": _lda}


def names() -> tuple[str, ...]:
    """The targets' names; the number is that of their scalars."""
    return tuple(_TARGETS)


def load(name: str) -> Model:
    """The target of that name.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in _TARGETS:
        raise ValueError(f"Expected one of {', '.join(_TARGETS)}; got '{name}'.")
    return _TARGETS[name]()
