"""Correlations under the reference and under a guide, and the pairs whose correlation differs most."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from toolkit.comparison.sides import CONSTANT
from toolkit.influence import chain_error, independent_error


class Pairs(NamedTuple):
    """The pairs whose correlation differs most, the largest difference first.

    Attributes:
        first: Index of one scalar, (pair,).
        second: Index of the other, (pair,).
        reference: Correlation under the reference.
        guide: Correlation under the guide.
        se: Monte Carlo standard error of guide minus reference.
    """

    first: np.ndarray
    second: np.ndarray
    reference: np.ndarray
    guide: np.ndarray
    se: np.ndarray


def correlations(draws: np.ndarray) -> np.ndarray:
    """Correlation matrix of draws (draws, scalar); NaN for scalars that do not vary."""
    mean = draws.mean(axis=0)
    centred = draws - mean
    covariance = centred.T @ centred / draws.shape[0]
    sd = np.sqrt(np.diag(covariance))
    # The mean of equal numbers is not quite their value.
    sd = np.where(sd > CONSTANT * np.abs(mean), sd, np.nan)
    return np.clip(covariance / np.multiply.outer(sd, sd), -1.0, 1.0)


def worst_pairs(reference: np.ndarray, guide: np.ndarray, effective: np.ndarray, count: int = 50) -> Pairs:
    """The pairs with the largest differences of correlation beyond two of their errors.

    All pairs are screened with the error that normal draws would have, (1 - r^2) / sqrt(n); the error that is returned
    stands on the influence z_a z_b - r (z_a^2 + z_b^2) / 2 of each draw, autocorrelation included.

    Args:
        reference: Draws of p, (chain, draw, scalar).
        guide: Independent draws of q, (draws, scalar).
        effective: Effective draws of each reference mean, (scalar,); NaN leaves a scalar out.
        count: How many pairs at most.
    """
    known = np.flatnonzero(np.isfinite(effective))
    if known.size < effective.size:
        reference, guide = reference[:, :, known], guide[:, known]
    chains, length = reference.shape[:2]
    of_reference, of_guide = correlations(reference.reshape(chains * length, known.size)), correlations(guide)
    difference = of_guide - of_reference
    draws = np.sqrt(np.multiply.outer(effective[known], effective[known]))
    screen = np.sqrt((1 - of_reference**2) ** 2 / draws + (1 - of_guide**2) ** 2 / guide.shape[0])
    a, b = _largest(np.abs(difference) - 2.0 * screen, count)
    order = np.argsort(-np.abs(difference[a, b]), kind="stable")
    a, b = a[order], b[order]
    se = [_error(reference[:, :, [i, j]], guide[:, [i, j]]) for i, j in zip(a, b, strict=True)]
    return Pairs(known[a], known[b], of_reference[a, b], of_guide[a, b], np.array(se))


def _largest(matrix: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the largest elements above the diagonal, in no order, NaN left out."""
    upper = np.flatnonzero(~np.tri(matrix.shape[0], dtype=bool))
    if not upper.size:
        return upper, upper
    values = -matrix.ravel()[upper]
    values[np.isnan(values)] = np.inf
    chosen = np.argpartition(values, min(count, values.size - 1))[:count]
    chosen = upper[chosen[np.isfinite(values[chosen])]]
    return chosen // matrix.shape[0], chosen % matrix.shape[0]


def _error(reference: np.ndarray, guide: np.ndarray) -> float:
    p = _influence(_standardised(reference.reshape(-1, 2))).reshape(reference.shape[:2])
    return float(np.hypot(chain_error(p), independent_error(_influence(_standardised(guide)))))


def _influence(standard: np.ndarray) -> np.ndarray:
    product = standard[:, 0] * standard[:, 1]
    return product - product.mean() * 0.5 * (standard**2).sum(axis=1)


def _standardised(draws: np.ndarray) -> np.ndarray:
    centred = draws - draws.mean(axis=0)
    sd = centred.std(axis=0)
    return centred / np.where(sd > 0, sd, np.nan)
