"""Leave-one-out densities of the few observations whose weights cannot be trusted, by ArviZ's moment matching."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import arviz_base
import numpy as np
import xarray as xr
from scipy.special import logsumexp

from toolkit.comparison.leave_one_out import LeaveOneOut, leave_one_out, smoothed
from toolkit.influence import effective_draws
from toolkit.modelling.model import Model
from toolkit.modelling.observations import log_likelihoods
from toolkit.modelling.points import log_density_at, points, sites_at

MOST_OBSERVATIONS = 30
"""Observations that are matched, a quarter of a second each."""

RELIABLE = 0.5
"""Tail index up to which a mended observation is taken: below it weights have a variance, and a mean its error. Of 28
observations with high leverage whose density is known, those with more were off by up to a hundred errors."""

_DRAWS = 2_000
_AXES = ("chain", "draw")
_LEAST_DRAWS = 10  # for each coordinate: with fewer ArviZ matches no covariance


def moment_matched(
    model: Model,
    draws: Mapping[str, np.ndarray],
    chosen: dict[str, np.ndarray],
    given: LeaveOneOut,
    likelihoods: np.ndarray,
    scales: np.ndarray | None = None,
) -> LeaveOneOut:
    """The same with the observations mended whose weights could not be trusted; those that cannot be, stay as they are.

    The draws are moved, in the plain chart's unconstrained space, until the weights fit them (Paananen, Piironen,
    Bürkner & Vehtari 2021, Implicitly adaptive importance sampling). Nothing is done where more than 30 observations,
    or where too many coordinates, are at hand.

    Args:
        model: The model.
        draws: The posterior's draws of the latent sites, `(chain * draw, ...)` each, chains behind one another.
        chosen: Site to the places of its observations, as for `log_likelihoods`.
        given: What plain importance weights say.
        likelihoods: Log p(y_i | z) that it was made from, `(chain * draw, observation)`.
        scales: As it was made with.
    """
    bad = np.flatnonzero(given.unreliable)
    if not 0 < bad.size <= MOST_OBSERVATIONS or not np.isfinite(likelihoods[:, bad]).all():
        return given
    chains, length = given.influence.shape
    kept = np.unique(np.linspace(0, length - 1, min(length, _DRAWS // chains)).astype(int))
    vectors = points(model, draws, "plain").vectors.reshape(chains, length, -1)[:, kept]
    if vectors.shape[2] * _LEAST_DRAWS > chains * kept.size:
        return given
    sites = _among(chosen, bad)
    last: dict[int, np.ndarray] = {}

    def log_prob(upars: Any) -> Any:
        return _array(log_density_at(model, _flat(upars), "plain"), upars)

    def log_lik(upars: Any, i: int) -> Any:
        at = sites_at(model, _flat(upars), model.latents, "plain")
        last[int(i)] = log_likelihoods(model, at, sites)[:, i]
        return _array(last[int(i)], upars)

    matched = _by_arviz(vectors, likelihoods[:, bad].reshape(chains, length, -1)[:, kept], log_prob, log_lik)
    elpd, khat, errors = given.elpd.copy(), given.khat.copy(), given.errors.copy()
    mended, own = [], np.zeros(vectors.shape[:2])
    for i, place in enumerate(bad):
        value, tail = float(matched.elpd_i.values[i]), float(matched.pareto_k.values[i])
        weights = matched.log_weights.isel(observation=i).transpose(*_AXES).values
        # What ArviZ looked at last is what its answer rests on, unless it took a step back.
        if i not in last or not np.isclose(logsumexp(weights.ravel() + last[i]), value, atol=1e-6):
            continue
        # ArviZ's index is of the weights before it split the draws, not of those that it took.
        tail = max(tail, float(smoothed(weights.reshape(-1, 1), 1.0)[1][0]))
        if not tail <= RELIABLE:
            continue
        elpd[place], khat[place] = value, tail
        scale = 1.0 if scales is None else scales[place]
        moved = np.exp(weights) * np.expm1(last[i].reshape(weights.shape) - value)
        errors[place] = np.sqrt(np.square(moved).sum())
        own += scale * moved
        mended.append(place)
    if not mended:
        return given
    # Half of the draws were moved, so that their series is no chain's: its autocorrelation is that of what they were.
    effective = effective_draws(likelihoods[:, mended].sum(axis=1).reshape(chains, length)[:, kept])
    # What these observations had added to the error of the draws goes, and their own error takes its place.
    share = None if scales is None else scales[mended]
    without = leave_one_out(likelihoods[:, mended], given.influence.shape, scales=share)
    return replace(
        given,
        elpd=elpd,
        khat=khat,
        errors=errors,
        influence=given.influence - without.influence,
        seen_influence=given.seen_influence - without.seen_influence,
        own_error=float(np.hypot(given.own_error, np.sqrt(np.square(own).sum() * own.size / effective))),
    )


def _by_arviz(vectors: np.ndarray, likelihoods: np.ndarray, log_prob: Any, log_lik: Any) -> Any:
    from arviz_stats import loo, loo_moment_match

    coords = {"chain": np.arange(vectors.shape[0]), "draw": np.arange(vectors.shape[1])}
    upars = xr.DataArray(vectors, dims=(*_AXES, "coordinate"), coords=coords)
    tree = arviz_base.from_dict(
        {"posterior": {"z": vectors}, "log_likelihood": {"y": likelihoods}}, dims={"y": ["observation"]}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they tell of single observations is in the result
        plain = loo(tree, pointwise=True, reff=1.0)
        return loo_moment_match(
            tree, plain, log_prob, log_lik, upars=upars, reff=1.0, k_threshold=RELIABLE, pointwise=True
        )


def _among(chosen: dict[str, np.ndarray], bad: np.ndarray) -> dict[str, np.ndarray]:
    """Site to the places of the observations that are `bad`, counted over all sites."""
    found, begin = {}, 0
    for site, places in chosen.items():
        own = bad[(bad >= begin) & (bad < begin + places.size)] - begin
        begin += places.size
        if own.size:
            found[site] = places[own]
    return found


def _flat(upars: Any) -> np.ndarray:
    values = upars.transpose(*_AXES, "coordinate").values
    return np.asarray(values.reshape(-1, values.shape[2]))


def _array(values: np.ndarray, upars: Any) -> Any:
    shape = tuple(upars.sizes[axis] for axis in _AXES)
    return xr.DataArray(values.reshape(shape), dims=_AXES, coords={axis: upars[axis] for axis in _AXES})
