"""A hierarchy learned from images: causes with receptive fields of their own, and common causes of these."""

from __future__ import annotations

import numpy as np

from models._hierarchy import Hierarchy

SIDE, WINDOW, STRIDE = 8, 5, 3
PER_WINDOW, COMMON = 4, 4
WINDOWS = ("upper left", "upper right", "lower left", "lower right")

_STEPS = 50
_LEAST_SD = 0.5  # half a step of ink: some pixels never have any


def receptive_fields() -> np.ndarray:
    """Which pixel each cause of level 1 may predict, `(pixel, cause)`: windows of 5 x 5 that overlap by 2."""
    fields = np.zeros((SIDE, SIDE, len(WINDOWS) * PER_WINDOW), bool)
    for window in range(len(WINDOWS)):
        row, column = (STRIDE * place for place in divmod(window, 2))
        fields[row : row + WINDOW, column : column + WINDOW, window * PER_WINDOW : (window + 1) * PER_WINDOW] = True
    return fields.reshape(SIDE**2, -1)


def learned(images: np.ndarray) -> Hierarchy:
    """The two-level hierarchy that makes images `(image, pixel)`, less their mean, likely: 50 steps of EM.

    Each pixel has noise of its own, each cause of level 1 has variance 1 in all.

    Reference: Dempster, Laird & Rubin (1977), Maximum likelihood from incomplete data via the EM algorithm;
        Rubin & Thayer (1982), EM algorithms for ML factor analysis.
    """
    hierarchy = _begun(images)
    for _ in range(_STEPS):
        hierarchy = _improved(images, hierarchy)
    return hierarchy


def _begun(images: np.ndarray) -> Hierarchy:
    """Principal components of each window, and of what they say together."""
    fields, weights = receptive_fields(), np.zeros((SIDE**2, len(WINDOWS) * PER_WINDOW))
    for window in range(len(WINDOWS)):
        causes = slice(window * PER_WINDOW, (window + 1) * PER_WINDOW)
        pixels = fields[:, causes.start]
        weights[pixels, causes] = _principal(images[:, pixels], PER_WINDOW)
    noise = 2.0
    said = images @ np.linalg.solve(weights @ weights.T + noise**2 * np.eye(SIDE**2), weights)
    common = _principal(said, COMMON)
    return Hierarchy((weights, common), (np.full(SIDE**2, noise), np.full(len(common), 0.7), np.ones(COMMON)))


def _principal(rows: np.ndarray, count: int) -> np.ndarray:
    """The first principal components `(column, component)`, each as long as its sd and with its largest entry positive.

    They are known up to signs, which are fixed so that every machine has the same.
    """
    values, vectors = np.linalg.eigh(np.cov(rows.T))
    found = (vectors[:, -count:] * np.sqrt(values[-count:]))[:, ::-1]
    return np.asarray(found * np.sign(found[np.abs(found).argmax(0), np.arange(count)]))


def _improved(images: np.ndarray, old: Hierarchy) -> Hierarchy:
    """One step of EM: what all images' causes are, by the old weights, and the weights that predict best from them."""
    number, first = len(images), old.sizes[1]
    covariance = np.linalg.inv(old.precision)
    means = np.hstack([images / old.sds[0] ** 2 @ old.weights[0], np.zeros((number, old.sizes[2]))]) @ covariance
    second = means.T @ means + number * covariance
    causes, mixed, above = second[:first, :first], second[:first, first:], second[first:, first:]
    seen, fields = images.T @ means[:, :first], receptive_fields()
    weights, noise = np.zeros_like(old.weights[0]), np.zeros(SIDE**2)
    for pixel, field in enumerate(fields):
        own = np.flatnonzero(field)
        weights[pixel, own] = np.linalg.solve(causes[np.ix_(own, own)], seen[pixel, own])
        noise[pixel] = (images[:, pixel] @ images[:, pixel] - weights[pixel] @ seen[pixel]) / number
    common = np.linalg.solve(above, mixed.T).T
    left = np.sqrt((np.diag(causes) - np.einsum("ij,ij->i", common, mixed)) / number)
    # The scale of a cause is not told by the data: it is given variance 1.
    scale = np.sqrt(np.square(common).sum(1) + left**2)
    sds = np.sqrt(np.maximum(noise, _LEAST_SD**2)), left / scale, old.sds[2]
    return Hierarchy((weights * scale, common / scale[:, None]), sds)
