"""Predictors of a regression: checked, simulated with any correlation, and the chart in which they are orthogonal."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions.transforms import LowerCholeskyAffine
from numpyro.infer.reparam import Reparam

from toolkit import Dataset


def equicorrelated(shared: jax.Array, own: jax.Array, rows: int, features: int, correlation: float) -> np.ndarray:
    """Gaussian predictors `(row, feature)` with mean 0, sd 1 and the same correlation between any two.

    Args:
        shared: Random key of what all predictors share.
        own: Random key of what each has alone.
        rows: How many rows.
        features: How many predictors.
        correlation: Between any two predictors; from 0 (none) to below 1 (copies of one another).

    Raises:
        ValueError: A size is not positive, or the correlation is outside [0, 1).
    """
    if min(rows, features) < 1:
        raise ValueError(f"Expected at least 1 row and 1 feature; got {rows} and {features}.")
    if not 0 <= correlation < 1:
        raise ValueError(f"Expected a correlation from 0 to below 1; got {correlation}.")
    together = np.asarray(jax.random.normal(shared, (rows, 1)))
    alone = np.asarray(jax.random.normal(own, (rows, features)))
    return np.sqrt(correlation) * together + np.sqrt(1 - correlation) * alone


def checked_regression(data: Dataset) -> Dataset:
    """The dataset, if it holds predictors x `(row, feature)` and outcomes y `(row,)`.

    Raises:
        ValueError: One of them is missing, or their shapes do not fit.
    """
    missing = [name for name in ("x", "y") if name not in data.arrays]
    if missing:
        raise ValueError(f"Expected arrays 'x' and 'y' in dataset '{data.name}'; it lacks {' and '.join(missing)}.")
    x, y = data.arrays["x"], data.arrays["y"]
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise ValueError(f"Expected x as (row, feature) and y as (row,); got shapes {x.shape} and {y.shape}.")
    return data


class RotatedReparam(Reparam):
    """A chart that samples z = R beta for a vector site beta whose prior stays as it is.

    Attributes:
        rotation: R, lower triangular with a positive diagonal, `(feature, feature)`.
    """

    def __init__(self, rotation: np.ndarray) -> None:
        self.rotation = rotation

    def __call__(self, name: str, fn: dist.Distribution, obs: Any) -> tuple[None, Any]:
        """Sample `<name>_rotated` in place of `name`; gives no distribution and the value of `name`."""
        if obs is not None:
            raise ValueError(f"Expected a latent site to rotate; got '{name}', which is observed.")
        rotate = LowerCholeskyAffine(jnp.zeros(len(self.rotation)), jnp.asarray(self.rotation))
        rotated = numpyro.sample(f"{name}_rotated", dist.TransformedDistribution(fn, rotate))
        return None, rotate.inv(rotated)

    def inverse(self, fn: dist.Distribution, value: Any) -> Any:
        """The rotated value that gives the site its value."""
        return jnp.asarray(self.rotation) @ value


def rotation(x: np.ndarray) -> np.ndarray:
    """R of x = Q R with R lower triangular, its diagonal positive, and Q'Q / rows the identity; `(feature, feature)`.

    Raises:
        ValueError: The columns of x are linearly dependent, as they must be with fewer rows than columns.
    """
    rows, features = x.shape
    # NumPy's R is upper triangular, NumPyro's affine transform wants lower: turn the columns' order round and back.
    factor = np.linalg.qr(x[:, ::-1], mode="r")[::-1, ::-1] / np.sqrt(rows)
    if rows < features or np.linalg.matrix_rank(x) < features:
        raise ValueError(
            f"Expected {features} linearly independent columns in x to rotate the coefficients; "
            f"got rank {np.linalg.matrix_rank(x)} from {rows} rows: leave columns out, or use coefficients='raw'."
        )
    return factor * np.sign(np.diagonal(factor))[:, None]
