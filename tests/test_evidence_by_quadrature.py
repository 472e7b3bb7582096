"""The log evidence of real posteriors in at most four dimensions, against quadrature."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import posteriors
import pytest
from scipy.special import logsumexp

from toolkit import Model, as_reference
from toolkit.modelling.points import log_density_at, points
from toolkit.sampling.evidence import latents, log_evidence

pytestmark = pytest.mark.usefixtures("shared_data")
SMALL = [name for name in posteriors.names() if posteriors.POSTERIORS[name].dimension <= 4]


def quadrature(model: Model, vectors: np.ndarray, nodes: int) -> float:
    """By Gauss and Hermite's rule over unconstrained space, in units of the draws' own covariance, widened a little."""
    size = vectors.shape[1]
    places, weights = np.polynomial.hermite_e.hermegauss(nodes)
    factor = 1.3 * np.linalg.cholesky(np.cov(vectors.T).reshape(size, size))
    grid = np.array(list(itertools.product(places, repeat=size)))
    log_weights = np.log(np.array(list(itertools.product(weights, repeat=size)))).sum(axis=1)
    at = log_density_at(model, vectors.mean(axis=0) + grid @ factor.T)
    # The rule integrates against exp(-x^2 / 2); the density is divided by that.
    terms = at + 0.5 * np.square(grid).sum(axis=1) + log_weights
    return float(logsumexp(terms) + np.linalg.slogdet(factor)[1])


@pytest.mark.parametrize("name", SMALL)
def test_bridges_agree_with_quadrature(name: str) -> None:
    model = posteriors.load(name)
    drawn = as_reference(posteriors.reference_draws(name), model)
    vectors = points(model, latents(drawn)).vectors
    nodes = 24 if vectors.shape[1] < 4 else 16
    exact, coarse = (quadrature(model, vectors, count) for count in (nodes, nodes - 5))
    assert abs(exact - coarse) < 0.005, "the rule itself has not settled"
    found = log_evidence(model, drawn, key=jax.random.PRNGKey(0))
    assert found.estimate is not None, found.problem
    assert abs(found.estimate.value - exact) < min(3 * found.estimate.se + 0.005, 0.05)
