"""What averaged steps leave, against a Gaussian target, for which it is known."""

from __future__ import annotations

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from toolkit.variational.averaging import averaging_costs
from toolkit.variational.gradient_estimators import ESTIMATORS

KEY = jax.random.key(0)
TARGETS = models.load("gaussian_target")


@pytest.mark.parametrize("correlation", [0.0, 0.8])
@pytest.mark.slow
def test_at_a_mean_fields_optimum_it_is_known(correlation: float) -> None:
    """Along the path, locations and scales have tr(H^-1 C) = d each, and half the squared partial correlations."""
    model = TARGETS.model(dimensions=3, correlation=correlation)
    precision = np.linalg.inv(model.arrays["scale_tril"] @ model.arrays["scale_tril"].T)
    own = np.diag(precision)
    at = {"z_auto_loc": model.arrays["loc"], "z_auto_scale": own**-0.5}
    found = averaging_costs(model, "mean_field", key=KEY, at=at, draws=16, repeats=400)
    assert list(found) == list(ESTIMATORS)
    pairs = np.square(precision / np.sqrt(np.outer(own, own))).sum() - 3
    known = {
        "reparameterised": 0.5 * (2 * 3 + pairs / 2),
        "stick_the_landing": 0.5 * (own @ np.diag(np.linalg.inv(precision)) - 3 + pairs / 2),
    }
    for name, value in known.items():
        assert abs(found[name].value - value) < 5 * found[name].se + 1e-9, name
    assert found["score"].value > found["score_baseline"].value


ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "draws": (
        lambda: averaging_costs(TARGETS.model(), "mean_field", key=KEY, at={}, draws=1),
        "Expected at least 2 draws and 80 repeats; got 1 and 400.",
    ),
    "no optimum": (
        lambda: averaging_costs(
            TARGETS.model(target="two_modes", dimensions=1, correlation=0.0, separation=10.0), "mean_field", key=KEY,
            at={"z_auto_loc": jnp.zeros(1), "z_auto_scale": jnp.full(1, 0.1)}, draws=2, repeats=80,
        ),
        "Expected an optimum, where the ELBO bends down in all directions; 'mean_field' is at none.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_misuse_gets_its_sentence(case: str) -> None:
    call, text = ERRORS[case]
    with pytest.raises(ValueError, match=re.escape(text)):
        call()
