"""Coordinates in which every Gaussian guide is easy to fit: measured from a start, in that start's own scale.

A NumPyro autoguide's parameters have the model's units, so that one step size is too long for one posterior sd and too
short for another. Here the optimiser works on dimensionless parameters that are zero at the start, and the autoguide's
own parameters are a function of them. The start is the family's best approximation of a Gaussian with the
curvature found there, which is exact where the posterior is Gaussian.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpyro.infer import autoguide

from toolkit.modelling.space import Space
from toolkit.variational.block_guides import AutoBlockNormal
from toolkit.variational.flow_guides import AutoFlow
from toolkit.variational.gaussians import best_factor, best_low_rank, inverse_factor
from toolkit.variational.guides import default_rank
from toolkit.variational.starts import DENSE_LIMIT, Start

_PRODUCT_LIMIT = 400  # above it, products of d x d matrices in every step cost more than they save
_UNKNOWN_SCALE = 0.1  # of a posterior of which no curvature is known, in unconstrained units


@dataclass(frozen=True)
class Coordinates:
    """A map from dimensionless parameters, zero at the start, to an autoguide's own.

    Attributes:
        initial: Name to array of zeros (small noise for a low-rank factor).
        frame: From a start to what places and scales the parameters there, by name. Its arrays are arguments of the
            compiled programs, which therefore serve every start.
        to_params: From parameters and frame to the autoguide's parameters by their NumPyro names.
    """

    initial: dict[str, np.ndarray]
    frame: Callable[[Start], dict[str, np.ndarray]]
    to_params: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]


def coordinates(guide: Any, space: Space) -> Coordinates | None:
    """The coordinates for a Gaussian autoguide whose Gaussian is its own to choose; None for any other guide.

    Of a flow they are those of the Gaussian at which it begins; its networks keep their own parameters.

    Args:
        guide: An autoguide that has been set up on its model.
        space: The model's latent sites in the guide's chart.
    """
    kind = type(guide)  # exactly these: a subclass may give the parameters another meaning
    if kind in (autoguide.AutoNormal, autoguide.AutoDiagonalNormal):
        return _diagonal(guide, space)
    if kind is autoguide.AutoMultivariateNormal or (isinstance(guide, AutoFlow) and space.size <= DENSE_LIMIT):
        return _dense(guide, space.size)
    if kind is autoguide.AutoLowRankMultivariateNormal:
        return _low_rank(guide, space.size)
    if kind is AutoBlockNormal:
        return _blocks(guide)
    return None


def _whitening(start: Start) -> dict[str, np.ndarray]:
    """What a location is measured with: the curvature's inverse factor, or one scale in dimensions beyond that."""
    if len(start.loc) > DENSE_LIMIT:
        return {"loc": start.loc, "scales": np.full(len(start.loc), _UNKNOWN_SCALE)}
    return {"loc": start.loc, "factor": _factor(start)}


def _location(shift: Any, frame: dict[str, Any]) -> Any:
    return frame["loc"] + (frame["factor"] @ shift if "factor" in frame else frame["scales"] * shift)


def _factor(start: Start) -> np.ndarray:
    """The lower Cholesky factor of the covariance at a start."""
    size = len(start.loc)
    if start.precision is None:
        return _UNKNOWN_SCALE * np.eye(size)
    return inverse_factor(start.precision)


def _diagonal(guide: Any, space: Space) -> Coordinates:
    def frame(start: Start) -> dict[str, np.ndarray]:
        scale = np.full(space.size, _UNKNOWN_SCALE)
        if start.precision is not None:
            # The best factorised Gaussian has the precision's diagonal (Bishop 2006, section 10.1.2).
            scale = 1 / np.sqrt(np.diag(start.precision))
        return _whitening(start) | {"scale": scale}

    def to_params(given: dict[str, Any], frame: dict[str, Any]) -> dict[str, Any]:
        loc, scales = _location(given["shift"], frame), frame["scale"] * jnp.exp(given["log_scale"])
        if isinstance(guide, autoguide.AutoDiagonalNormal):
            return {f"{guide.prefix}_loc": loc, f"{guide.prefix}_scale": scales}
        locs, per_site = space.unravel(loc), space.unravel(scales)
        return {f"{name}_{guide.prefix}_loc": locs[name] for name in space.names} | {
            f"{name}_{guide.prefix}_scale": per_site[name] for name in space.names
        }

    return Coordinates({"shift": np.zeros(space.size), "log_scale": np.zeros(space.size)}, frame, to_params)


def _dense(guide: Any, size: int) -> Coordinates:
    # Everything is kept as the factor's transpose: a triangular solve reads columns, and turning a matrix of a million
    # entries round in every step takes as long as the rest of the step.
    def frame(start: Start) -> dict[str, np.ndarray]:
        factor = _factor(start)
        if size <= _PRODUCT_LIMIT:
            return {"loc": start.loc, "factor": factor}
        upper = np.ascontiguousarray(np.triu(factor.T, 1))
        row_scale = np.linalg.norm(factor, axis=1)
        whitening = {"loc": start.loc, "factor": factor} if size <= DENSE_LIMIT else _whitening(start)
        return whitening | {"upper": upper, "row_scale": row_scale, "diagonal": np.diag(factor).copy()}

    def to_params(given: dict[str, Any], frame: dict[str, Any]) -> dict[str, Any]:
        # Adam moves each of a row's entries by about a step: divided by sqrt(size), the row as a whole moves so far.
        scales, above = jnp.exp(given["log_diagonal"]), jnp.triu(given["above"], 1) / np.sqrt(size)
        if size <= _PRODUCT_LIMIT:
            scale_triu = (above + jnp.diag(scales)) @ frame["factor"].T
        else:
            scale_triu = frame["upper"] + above * frame["row_scale"][None, :] + jnp.diag(frame["diagonal"] * scales)
        loc = _location(given["shift"], frame)
        return {f"{guide.prefix}_loc": loc, f"{guide.prefix}_scale_tril": scale_triu.T}

    zeros = {"shift": np.zeros(size), "log_diagonal": np.zeros(size), "above": np.zeros((size, size))}
    return Coordinates(zeros, frame, to_params)


def _blocks(guide: AutoBlockNormal) -> Coordinates:
    size, order, pattern = guide.blocks.size, np.array(guide.blocks.order), guide.blocks.pattern
    rows, columns = np.nonzero(np.tril(pattern, -1))
    widest = pattern.sum(1).max()

    def frame(start: Start) -> dict[str, np.ndarray]:
        root = _UNKNOWN_SCALE * np.eye(size)
        if start.precision is not None:
            root = best_factor(start.precision[np.ix_(order, order)], pattern)
        return _whitening(start) | {"root": root}

    def to_params(given: dict[str, Any], frame: dict[str, Any]) -> dict[str, Any]:
        # Divided as in `_dense`, by the most entries that a row has.
        scales, below = jnp.exp(given["log_diagonal"]), given["below"] / np.sqrt(widest)
        root = frame["root"]
        if size <= _PRODUCT_LIMIT:  # a product of two matrices with the pattern has it
            scale_tril = root @ jnp.diag(scales).at[rows, columns].set(below)
        else:
            stretched = root + jnp.diag(jnp.diagonal(root) * (scales - 1))
            scale_tril = stretched.at[rows, columns].add(below * jnp.linalg.norm(root, axis=1)[rows])
        return {f"{guide.prefix}_loc": _location(given["shift"], frame), f"{guide.prefix}_scale_tril": scale_tril}

    zeros = {"shift": np.zeros(size), "log_diagonal": np.zeros(size), "below": np.zeros(len(rows))}
    return Coordinates(zeros, frame, to_params)


def _low_rank(guide: Any, size: int) -> Coordinates:
    rank = default_rank(size) if guide.rank is None else guide.rank
    # A factor of exactly zero is a saddle of the ELBO, from which no gradient leads away.
    noise = 1e-2 * np.random.default_rng(0).standard_normal((size, rank))

    def frame(start: Start) -> dict[str, np.ndarray]:
        scale, columns = np.full(size, _UNKNOWN_SCALE), np.zeros((size, rank))
        if start.precision is not None:
            scale, columns = best_low_rank(start.precision, rank)
        return _whitening(start) | {"scale": scale, "columns": columns}

    def to_params(given: dict[str, Any], frame: dict[str, Any]) -> dict[str, Any]:
        return {
            f"{guide.prefix}_loc": _location(given["shift"], frame),
            f"{guide.prefix}_cov_factor": frame["columns"] + given["columns"] / np.sqrt(rank),
            f"{guide.prefix}_scale": frame["scale"] * jnp.exp(given["log_scale"]),
        }

    zeros = {"shift": np.zeros(size), "log_scale": np.zeros(size), "columns": noise}
    return Coordinates(zeros, frame, to_params)
