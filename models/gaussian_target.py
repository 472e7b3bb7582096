r"""Known targets: correlated Gaussians, heavy tails, two modes, a funnel. Is a report right where the truth is known?

**Question.** What do guides, NUTS, and the numbers of a report say of a posterior that is known exactly? Any number of
dimensions, any correlation, any units; draws and evidence are exact.

**Model**, for coordinates i, with L the given lower triangular factor:

    z ~ MultivariateNormal(loc, L L')                                        target "normal"
    z ~ MultivariateStudentT(df, loc, L L')                                  target "student_t" (df 4), "cauchy" (df 1)
    z ~ weight Normal(loc + a, L L') + (1 - weight) Normal(loc - a, L L')    target "two_modes"
    log_scale ~ Normal(0, 3); z ~ Normal(loc, exp(log_scale) L L')           target "funnel"

with a = separation / 2 times the first column of L, so that the modes lie `separation` sds apart along one direction.
There are no data: a factor adds the log evidence, a constant, so that whoever takes it for 0 is found out.

**Why these.** Each shows one thing that goes wrong. On the normal target a mean field is too narrow by a known
amount: for two coordinates of correlation rho its sd is sqrt(1 - rho^2) of the truth and KL(q || p) is
-1/2 log(1 - rho^2) nats; in general it is 1/2 (sum log P[i, i] - log det P) with P the precision. Under Cauchy tails
KL(p || q) is infinite for every Gaussian q. Of two modes a Gaussian finds one, and lacks log(1 / weight) nats. The
funnel (Neal's) has a neck that no Gaussian reaches in the chart in which it is written.

**Charts.** `noncentred` samples the funnel's L^-1 (z - loc) / exp(log_scale / 2), in which it is a Gaussian without
correlations, so that every guide is exact; the other targets have their own chart alone.

References:
    Neal (2003), Slice sampling, Annals of Statistics 31(3), section 8 (the funnel).
    Margossian & Saul (2023), The shrinkage-delinkage trade-off: an analysis of factorized Gaussian approximations
    for variational inference, UAI (the mean field's optimum).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions.transforms import LowerCholeskyAffine
from numpyro.infer.reparam import TransformReparam

from toolkit import Dataset, Model, Quantity

TARGETS = ("normal", "student_t", "cauchy", "two_modes", "funnel")
FUNNEL_SD = 3.0
LOG_EVIDENCE = -7.5
_DEFAULTS = {"df": 4.0, "separation": 8.0, "weight": 0.5}
_BELONG = {"df": "student_t", "separation": "two_modes", "weight": "two_modes"}


def gaussian_target(
    loc: Any,
    scale_tril: Any,
    log_evidence: Any,
    *,
    target: str = "normal",
    df: float = 4.0,
    separation: float = 8.0,
    weight: float = 0.5,
) -> None:
    """The NumPyro callable.

    Args:
        loc: Centre, `(coordinate,)`.
        scale_tril: The factor L, `(coordinate, coordinate)`.
        log_evidence: What log p(x) is to be, in nats.
        target: One of `TARGETS`.
        df: Degrees of freedom of `"student_t"`.
        separation: How many sds the two modes are apart.
        weight: Of the upper mode.
    """
    if target == "funnel":
        half = 0.5 * numpyro.sample("log_scale", dist.Normal(0.0, FUNNEL_SD))
        base = dist.Normal(jnp.zeros_like(loc), 1.0).to_event(1)
        law: dist.Distribution = dist.TransformedDistribution(
            base, LowerCholeskyAffine(loc, jnp.exp(half) * scale_tril)
        )
    else:
        law = distribution(loc, scale_tril, target=target, df=df, separation=separation, weight=weight)
    numpyro.sample("z", law, infer={"event_dims": ["coordinate"]})
    numpyro.factor("evidence", log_evidence)


def distribution(
    loc: Any, scale_tril: Any, *, target: str, df: float = 4.0, separation: float = 8.0, weight: float = 0.5
) -> dist.Distribution:
    """The law of z for every target but the funnel, which has none in closed form; arguments as in the callable."""
    if target in ("student_t", "cauchy"):
        return dist.MultivariateStudentT(1.0 if target == "cauchy" else df, loc, scale_tril)
    if target == "two_modes":
        apart = 0.5 * separation * scale_tril[:, 0]
        modes = dist.MultivariateNormal(
            jnp.stack([loc + apart, loc - apart]), scale_tril=jnp.stack([scale_tril, scale_tril])
        )
        return dist.MixtureSameFamily(dist.Categorical(jnp.array([weight, 1 - weight])), modes)
    return dist.MultivariateNormal(loc, scale_tril=scale_tril)


def dataset(*, dimensions: int = 10, correlation: float = 0.9) -> Dataset:
    """A target around 0 whose coordinates have scale 1 and the same correlation between any two.

    Args:
        dimensions: How many coordinates.
        correlation: From -1 / (dimensions - 1) to 1, both left out.

    Raises:
        ValueError: There is no coordinate, or no covariance with that correlation.
    """
    return _equicorrelated(dimensions, correlation)


def _equicorrelated(dimensions: int, correlation: float) -> Dataset:
    factor = _factor(dimensions, correlation)
    return _target(
        f"correlation_{correlation:g}",
        np.zeros(dimensions),
        factor,
        source=f"constructed: {dimensions} coordinates, correlation {correlation:g} between any two",
    )


def simulate(key: jax.Array, *, dimensions: int = 10, correlation: float = 0.9) -> Dataset:
    """A target in units from 0.001 to 1,000, with a truth drawn from it.

    There are no data: what is drawn is where the target lies, which coordinate has which unit, and `truth`, which is
    a draw from the normal target.

    Args:
        key: Fixes centre, units and truth.
        dimensions: How many coordinates.
        correlation: Between any two coordinates; from -1 / (dimensions - 1) to 1, both left out.

    Raises:
        ValueError: There is no coordinate, or no covariance with that correlation.
    """
    factor = _factor(dimensions, correlation)
    of_units, of_loc, of_truth = jax.random.split(key, 3)
    units = np.asarray(jax.random.permutation(of_units, np.geomspace(1e-3, 1e3, dimensions)))
    loc = units * np.asarray(10.0 * jax.random.normal(of_loc, (dimensions,)))
    scaled = units[:, None] * factor
    data = _target(
        f"units_correlation_{correlation:g}",
        loc,
        scaled,
        source=f"simulated: {dimensions} coordinates in different units, correlation {correlation:g} between any two",
    )
    return replace(data, truth={"z": loc + scaled @ np.asarray(jax.random.normal(of_truth, (dimensions,)))})


def _factor(dimensions: int, correlation: float) -> np.ndarray:
    if dimensions < 1:
        raise ValueError(f"Expected at least 1 dimension; got {dimensions}.")
    least = -1 / (dimensions - 1) if dimensions > 1 else -1.0
    if not least < correlation < 1:
        raise ValueError(f"Expected a correlation above {least:.3g} and below 1; got {correlation}.")
    return np.linalg.cholesky((1 - correlation) * np.eye(dimensions) + correlation)


def _target(name: str, loc: np.ndarray, scale_tril: np.ndarray, *, source: str) -> Dataset:
    return Dataset(
        name,
        {"loc": loc, "scale_tril": scale_tril, "log_evidence": np.array(LOG_EVIDENCE)},
        coords={"coordinate": np.arange(1, len(loc) + 1)},
        source=source,
        licence="none needed",
    )


def model(
    dataset: Dataset | None = None,
    *,
    target: str = "normal",
    dimensions: int | None = None,
    correlation: float | None = None,
    df: float | None = None,
    separation: float | None = None,
    weight: float | None = None,
) -> Model:
    """The target, with its exact draws and log evidence.

    Args:
        dataset: Arrays `loc` `(coordinate,)`, `scale_tril` `(coordinate, coordinate)` and `log_evidence` (a number);
            made of the next two if not given.
        target: One of `TARGETS`.
        dimensions: How many coordinates, without a dataset; 10 if not given.
        correlation: Between any two coordinates, without a dataset; 0.9 if not given.
        df: Degrees of freedom of `"student_t"`; 4 if not given.
        separation: How many sds the modes of `"two_modes"` lie apart; 8 if not given.
        weight: Of the upper mode of `"two_modes"`; 0.5 if not given.

    Raises:
        ValueError: An option is unknown, out of its range or not the target's, or the arrays do not fit.
    """
    if target not in TARGETS:
        raise ValueError(f"Expected target to be one of {', '.join(TARGETS)}; got '{target}'.")
    own = _own_options(target, df=df, separation=separation, weight=weight)
    if dataset is None:
        data = _equicorrelated(
            10 if dimensions is None else dimensions,
            0.9 if correlation is None else correlation,
        )
    elif dimensions is None and correlation is None:
        data = _checked(dataset)
    else:
        raise ValueError("Expected a dataset, or dimensions and correlation to make one of; got both.")
    loc, scale_tril = (data.arrays[name].astype(float) for name in ("loc", "scale_tril"))

    def exact(key: jax.Array, draws: int) -> dict[str, Any]:
        if target != "funnel":
            law = distribution(jnp.asarray(loc), jnp.asarray(scale_tril), target=target, **own)
            return {"z": jax.vmap(law.sample)(jax.random.split(key, draws))}
        of_scale, of_base = jax.random.split(key)
        log_scale = FUNNEL_SD * jax.random.normal(of_scale, (draws,))
        base = jax.random.normal(of_base, (draws, len(loc))) @ scale_tril.T
        return {"log_scale": log_scale, "z": jnp.asarray(loc)[None] + jnp.exp(0.5 * log_scale)[:, None] * base}

    funnel = target == "funnel"
    return Model(
        gaussian_target,
        replace(data, static={**data.static, "target": target, **own}),
        quantities=(*([Quantity("log_scale", "log of the variance", "nats")] if funnel else []), Quantity("z")),
        charts={"noncentred": {"z": TransformReparam()}} if funnel else {},
        chart="noncentred" if funnel else "plain",
        exact=exact,
        log_evidence=float(data.arrays["log_evidence"]),
        log_concave=target == "normal",
        title=f"Known target: {target.replace('_', ' ')}",
        question="Is a report right where the truth is known?",
    )


def _own_options(target: str, **given: float | None) -> dict[str, float]:
    """The options that belong to a target, with their defaults where they are not given."""
    for name, value in given.items():
        if value is not None and _BELONG[name] != target:
            raise ValueError(f"Expected {name} with target '{_BELONG[name]}' alone; got it with '{target}'.")
    own = {
        name: float(_DEFAULTS[name] if value is None else value)
        for name, value in given.items()
        if _BELONG[name] == target
    }
    for name in ("df", "separation"):
        if not 0 < own.get(name, 1.0) < math.inf:
            raise ValueError(f"Expected {name} above 0; got {own[name]:g}.")
    if not 0 < own.get("weight", 0.5) < 1:
        raise ValueError(f"Expected weight between 0 and 1; got {own['weight']:g}.")
    return own


def _checked(data: Dataset) -> Dataset:
    wanted = ("loc", "scale_tril", "log_evidence")
    missing = [name for name in wanted if name not in data.arrays]
    if missing:
        raise ValueError(
            f"Expected arrays {', '.join(wanted)} in dataset '{data.name}'; it lacks {', '.join(missing)}."
        )
    loc, factor, evidence = (data.arrays[name] for name in wanted)
    if loc.ndim != 1 or factor.shape != (len(loc), len(loc)) or evidence.shape != ():
        raise ValueError(
            "Expected loc as (coordinate,), scale_tril as (coordinate, coordinate) and log_evidence as one number; got "
            f"shapes {loc.shape}, {factor.shape} and {evidence.shape}."
        )
    if np.triu(factor, 1).any() or not (np.diagonal(factor) > 0).all():
        raise ValueError("Expected scale_tril lower triangular with a positive diagonal: take a Cholesky factor.")
    return data
