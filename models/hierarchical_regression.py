"""Hierarchical regression: how large are effects in the population, and how much do they differ between groups?

A regression whose intercept and slopes vary over groups (firms, counties, subjects), stated as a formula over the
columns of a data frame: `"log_radon ~ floor + log_uranium + (floor | county)"`.

With rows i, common columns x, varying columns z (often some of the x), and g[i] the group of row i:

    eta[i]     = offset[i] + sum_k x[i, k] beta[k] + sum_c z[i, c] <group>_effects[g[i], c]
    response   ~ Normal(eta, sigma)  |  Poisson(exp(eta))  |  Bernoulli(1 / (1 + exp(-eta)))
    beta[k]    ~ Normal(prior_loc[k], prior_scale[k])
    <group>_effects[j, c] ~ Normal(m[c], <group>_sd[c])
    <group>_sd[c] ~ HalfNormal(sd_scale[c])
    sigma      ~ HalfNormal(sigma_scale)                                    (gaussian only)

`<group>` is the grouping column's name. Where a varying column is also a common one, the group's effect is its
*whole* coefficient: m[c] = beta[k], and x[, k] leaves the first sum; else m[c] = 0 and the effect is a deviation. With
several grouping terms the first that can takes the mean, so that nothing is added twice.
With `correlated=True` a group's effects are Normal(m, S R S), S = diag(<group>_sd), R ~ LKJ(2): effects of one group
may go together (by default they are independent, unlike in lme4, whose `(x | g)` is always correlated).

Priors. Data are never centred or scaled silently; the priors take the data's scale instead, as rstanarm's do:
with s the sd of the response (1 on the log and logit scales), a slope has prior sd 2.5 s / sd(x), a group sd has
HalfNormal scale s / sd(z) (s for the intercept), and sigma has s. The intercept is centred on what the mean response
gives and has prior sd 2.5 s sqrt(1 + sum (mean(x) / sd(x))^2), which is 2.5 s where the columns are centred. All of it
stands in the dataset's arrays, where it can be read and replaced. Half-normals have no long tail that few groups would
leave to the posterior, and they do not exclude 0. A zero-avoiding prior is a repair for posterior *modes* and is not
needed here: mass at 0 says that the groups may not differ, and the non-centred chart has no funnel there.

Charts: one posterior, three ways to look at it. `centred` is the model as written; `noncentred`, the default, samples
(effect - m) / sd; `learned` lets a variational fit choose between them for each single effect (uncorrelated only).
Non-centred is right where groups say little about themselves, centred where they say much: Grunfeld's usual formula
(20 precise rows a firm) therefore comes with `centred`.

Data: investment of 11 US firms over 20 years (Grunfeld), and radon in Minnesota's houses by county through the extra
`elbowroom[radon]`.

References:
    Gelman & Hill (2007), Data Analysis Using Regression and Multilevel/Hierarchical Models, chapters 12 and 13.
    Gelman (2006), Prior distributions for variance parameters in hierarchical models, Bayesian Analysis 1, 515-534.
    Papaspiliopoulos, Roberts & Skold (2007), A general framework for the parametrization of hierarchical models,
        Statistical Science 22, 59-73.
    Gorinova, Moore & Hoffman (2020), Automatic reparameterisation of probabilistic programs, ICML.
    Lewandowski, Kurowicka & Joe (2009), Generating random correlation matrices based on vines and extended onion
        method, Journal of Multivariate Analysis 100, 1989-2001.
    Grunfeld (1958), The Determinants of Corporate Investment, PhD thesis, University of Chicago; Kleiber & Zeileis
        (2010), The Grunfeld Data at 50, German Economic Review 11, 404-417.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
from numpyro import handlers
from numpyro.distributions.transforms import LowerCholeskyAffine
from numpyro.infer.reparam import LocScaleReparam, Reparam, TransformReparam

from models._design import LIKELIHOODS as LIKELIHOODS
from models._design import Grouping as Grouping
from models._design import design as design
from models._design import effect_coords
from models._frames import EXAMPLES, example
from models._frames import frame as frame
from toolkit import Dataset, Model, Quantity

_UNITS = {"gaussian": "unit of the response", "poisson": "log rate", "bernoulli": "logit"}


def hierarchical_regression(
    common: Any,
    varying: Any,
    group: Any,
    offset: Any,
    prior_loc: Any,
    prior_scale: Any,
    sd_scale: Any,
    sigma_scale: Any,
    response: Any = None,
    *,
    groupings: tuple[Grouping, ...],
    likelihood: str = "gaussian",
    correlated: bool = False,
) -> None:
    """The NumPyro program; its arguments are the arrays and static values that `design` returns."""
    with numpyro.plate("effect", common.shape[1]):
        beta = numpyro.sample("beta", dist.Normal(prior_loc, prior_scale))
    means = {index for grouping in groupings for index in grouping.means}
    only_common = np.array([k not in means for k in range(common.shape[1])])
    eta = offset + common @ jnp.where(only_common, beta, 0.0)
    first = 0
    for position, grouping in enumerate(groupings):
        columns = slice(first, first + len(grouping.columns))
        effects = _group_effects(grouping, beta, sd_scale[columns], correlated)
        eta = eta + (varying[:, columns] * effects[group[:, position]]).sum(-1)
        first = columns.stop
    if likelihood == "gaussian":
        sigma = numpyro.sample("sigma", dist.HalfNormal(sigma_scale))
        outcome: dist.Distribution = dist.Normal(eta, sigma)
    elif likelihood == "poisson":
        outcome = dist.Poisson(jnp.exp(eta))
    else:
        outcome = dist.Bernoulli(logits=eta)
    with numpyro.plate("row", common.shape[0]):
        numpyro.sample("response", outcome, obs=response)


def _group_effects(grouping: Grouping, beta: Any, sd_scale: Any, correlated: bool) -> Any:
    """The effects of each group, shape (group, column)."""
    name, size = grouping.name, (grouping.groups, len(grouping.columns))
    with numpyro.plate(f"{name}_term", size[1]):
        sd = numpyro.sample(f"{name}_sd", dist.HalfNormal(sd_scale))
    means = np.array(grouping.means)
    mean = jnp.where(means >= 0, beta[means], 0.0)
    if not _correlates(grouping, correlated):
        # Two event dimensions, not a plate: NumPyro then learns one centring for each effect, as Gorinova et al. do.
        effects = dist.Normal(jnp.broadcast_to(mean, size), jnp.broadcast_to(sd, size)).to_event(2)
        return numpyro.sample(f"{name}_effects", effects, infer={"event_dims": [name, f"{name}_term"]})
    cholesky = numpyro.sample(f"{name}_cholesky", dist.LKJCholesky(size[1], concentration=2.0))
    rows, columns = np.tril_indices(size[1], -1)
    numpyro.deterministic(f"{name}_correlation", (cholesky @ cholesky.T)[rows, columns])
    base = dist.Normal(jnp.zeros(size), jnp.ones(size)).to_event(1)
    transform = LowerCholeskyAffine(jnp.broadcast_to(mean, size), sd[:, None] * cholesky)
    with numpyro.plate(name, size[0]):
        effects = dist.TransformedDistribution(base, transform)
        return numpyro.sample(f"{name}_effects", effects, infer={"event_dims": [f"{name}_term"]})


def _correlates(grouping: Grouping, correlated: bool) -> bool:
    return correlated and len(grouping.columns) > 1


def dataset(name: str = "grunfeld") -> Dataset:
    """A real data set with its usual formula: `"grunfeld"`, which ships, or `"radon"`, through `elbowroom[radon]`.

    Raises:
        ValueError: There is no such data set, or the package it comes from is not installed.
    """
    chosen = example(name)
    return design(
        chosen.read(),
        chosen.formula,
        allow_single_rows=chosen.allow_single_rows,
        name=name,
        source=chosen.source,
        licence=chosen.licence,
    )


def simulate(
    key: jax.Array,
    *,
    groups: int = 20,
    rows_per_group: int = 15,
    covariates: int = 1,
    likelihood: str = "gaussian",
    correlated: bool = False,
) -> Dataset:
    """Data from the model itself, parameters drawn from its prior, with the truth at every site.

    Covariates x1, x2, ... are standard normal; intercept and slopes vary over `group`. Prior scales are 1 for common
    effects and sigma (0.5 for common effects of counts and of zeros and ones) and 0.5 for group sds.

    Raises:
        ValueError: A size is too small or the likelihood unknown.
    """
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"Expected likelihood to be one of {', '.join(LIKELIHOODS)}; got '{likelihood}'.")
    for size, least, what in (
        (groups, 2, "groups"),
        (rows_per_group, 2, "rows_per_group"),
        (covariates, 0, "covariates"),
    ):
        if size < least:
            raise ValueError(f"Expected {what} of at least {least}; got {size}.")
    labels = np.array(["Intercept", *(f"x{k + 1}" for k in range(covariates))])
    grouping = Grouping("group", groups, tuple(labels.tolist()), tuple(range(covariates + 1)))
    static = {"groupings": (grouping,), "likelihood": likelihood, "correlated": correlated}
    _check_correlated((grouping,), correlated)
    with jax.enable_x64(True):
        key_x, key_model = jax.random.split(key)
        x = np.asarray(jax.random.normal(key_x, (groups * rows_per_group, covariates)))
        columns = np.hstack([np.ones((len(x), 1)), x])
        arrays = {
            "common": columns,
            "varying": columns,
            "group": np.repeat(np.arange(groups, dtype=np.int32), rows_per_group)[:, None],
            "offset": np.zeros(len(x)),
            "prior_loc": np.zeros(covariates + 1),
            "prior_scale": np.full(covariates + 1, 1.0 if likelihood == "gaussian" else 0.5),
            "sd_scale": np.full(covariates + 1, 0.5),
            "sigma_scale": np.array(1.0),
        }

        def draw(key: jax.Array) -> dict[str, Any]:
            with handlers.trace() as trace:
                handlers.seed(hierarchical_regression, key)(**arrays, **static)
            return {n: m["value"] for n, m in trace.items() if m["type"] in ("sample", "deterministic")}

        sites = {name: np.asarray(value) for name, value in jax.jit(draw)(key_model).items()}
    return Dataset(
        f"simulated_{likelihood}",
        arrays | {"response": sites.pop("response")},
        static=static,
        coords={"effect": labels} | effect_coords(grouping, np.array([f"g{j + 1}" for j in range(groups)])),
        truth=sites,
        source=f"simulated: {groups} groups of {rows_per_group} rows",
        licence="none needed",
    )


def model(
    data: Dataset | pd.DataFrame | str | None = None,
    *,
    formula: str | None = None,
    likelihood: str | None = None,
    correlated: bool | None = None,
    allow_single_rows: bool = False,
) -> Model:
    """The hierarchical regression of a data frame by a formula, or of a dataset made by `design` or `simulate`.

    Args:
        data: A data frame (then give the formula), a dataset, the name of a real data set, or nothing for Grunfeld's.
        formula: See `design`. With a name or nothing as data it replaces that data set's usual formula.
        likelihood: One of `LIKELIHOODS`; for a data frame `"gaussian"` if not given, else as the dataset says.
        correlated: Whether the effects of one group may correlate; if not given, as the dataset says, else not.
        allow_single_rows: See `design`.

    Raises:
        ValueError: Data, formula and likelihood do not fit together, or are not what `design` expects.
    """
    given = _dataset_of(data, formula, likelihood, allow_single_rows)
    if correlated is not None:
        _check_correlated(given.static["groupings"], correlated)
        given = replace(given, static={**given.static, "correlated": correlated})
    groupings: tuple[Grouping, ...] = given.static["groupings"]
    return Model(
        hierarchical_regression,
        given,
        quantities=_quantities(groupings, given.static["likelihood"], given.static["correlated"]),
        charts=_charts(groupings, given.static["correlated"]),
        chart=EXAMPLES[given.name].chart if given.name in EXAMPLES else "noncentred",
        title="Hierarchical regression",
        question=f"How large are the effects, and how do they differ by {' and '.join(g.name for g in groupings)}?",
    )


def _dataset_of(
    data: Dataset | pd.DataFrame | str | None, formula: str | None, likelihood: str | None, allow_single_rows: bool
) -> Dataset:
    if isinstance(data, Dataset):
        if "groupings" not in data.static:
            raise ValueError(f"Expected a dataset made by design(frame, formula); '{data.name}' was not.")
        _check_groups(data)
        if formula is not None:
            raise ValueError(
                f"Expected no formula beside dataset '{data.name}', which has one: give the data frame instead."
            )
        if likelihood not in (None, data.static["likelihood"]):
            raise ValueError(
                f"Expected likelihood '{data.static['likelihood']}', for which dataset '{data.name}' was made; "
                f"got '{likelihood}': give the data frame and the formula instead."
            )
        return data
    if isinstance(data, pd.DataFrame):
        if formula is None:
            raise ValueError("Expected a formula with the data frame; got none: write it like 'y ~ x + (x | group)'.")
        return design(data, formula, likelihood or "gaussian", allow_single_rows=allow_single_rows)
    name = "grunfeld" if data is None else data
    chosen = example(name)
    if formula is None and likelihood is None:
        return dataset(name)
    return design(
        chosen.read(),
        formula or chosen.formula,
        likelihood or "gaussian",
        allow_single_rows=allow_single_rows or chosen.allow_single_rows,
        name=f"{name}_by_formula",
        source=chosen.source,
        licence=chosen.licence,
    )


def _check_groups(data: Dataset) -> None:
    """JAX takes the last group for a row whose group is not there, and says nothing."""
    for grouping, codes in zip(data.static["groupings"], data.arrays["group"].T, strict=True):
        if codes.min() < 0 or codes.max() >= grouping.groups:
            raise ValueError(
                f"Expected groups 0 to {grouping.groups - 1} of '{grouping.name}' in array 'group' of dataset "
                f"'{data.name}'; got {codes.min()} to {codes.max()}: make the dataset anew with design(frame, formula)."
            )


def _check_correlated(groupings: tuple[Grouping, ...], correlated: bool) -> None:
    if correlated and not any(_correlates(grouping, True) for grouping in groupings):
        raise ValueError(
            "Expected a grouping term with at least two varying columns for correlated=True; got one column."
        )


def _charts(groupings: tuple[Grouping, ...], correlated: bool) -> dict[str, Mapping[str, Reparam]]:
    joint = {f"{g.name}_effects": TransformReparam() for g in groupings if _correlates(g, correlated)}
    single = [f"{g.name}_effects" for g in groupings if not _correlates(g, correlated)]
    charts: dict[str, Mapping[str, Reparam]] = {
        "centred": {},
        "noncentred": {**joint, **{site: LocScaleReparam(0) for site in single}},
    }
    # NumPyro has no partial centring of effects that are drawn jointly.
    return charts if joint else {**charts, "learned": {site: LocScaleReparam(centered=None) for site in single}}


def _quantities(groupings: tuple[Grouping, ...], likelihood: str, correlated: bool) -> tuple[Quantity, ...]:
    unit = _UNITS[likelihood]
    found = [Quantity("beta", "common effect", unit)]
    for grouping in groupings:
        name, several = grouping.name, _correlates(grouping, correlated)
        found.append(Quantity(f"{name}_sd", f"sd of effects over {name}", unit))
        if several:
            found.append(Quantity(f"{name}_correlation", f"correlation of effects over {name}", dims=(f"{name}_pair",)))
        found.append(Quantity(f"{name}_effects", f"effect by {name}", unit))
    if likelihood == "gaussian":
        found.append(Quantity("sigma", "residual sd", unit))
    return tuple(found)
