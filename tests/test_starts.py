"""Starts of densities without an upper bound: found past what draws every search away, at a bounded price."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from toolkit import Dataset, Model, fit
from toolkit.variational.starts import Start, _once_each, find_starts

GROUPS, ROWS = 30, 5


def growth() -> Model:
    """A centred hierarchy of intercepts and slopes in its data's own units: groups at 250 +- 15, slopes of 6 +- 0.5."""
    rng = np.random.default_rng(0)
    day = np.tile(np.array([-14.0, -7.0, 0.0, 7.0, 14.0]), GROUPS)
    group = np.repeat(np.arange(GROUPS), ROWS)
    level, slope = 250 + 15 * rng.standard_normal(GROUPS), 6 + 0.5 * rng.standard_normal(GROUPS)
    weight = level[group] + slope[group] * day + 6 * rng.standard_normal(len(day))

    def program(day, group, weight):
        own = []
        for name in ("level", "slope"):
            mu = numpyro.sample(f"{name}_mean", dist.Normal(0, 1_000))
            tau = numpyro.sample(f"{name}_sd", dist.HalfNormal(100))
            with numpyro.plate("groups", GROUPS):
                own.append(numpyro.sample(name, dist.Normal(mu, tau)))
        sigma = numpyro.sample("sigma", dist.HalfNormal(100))
        with numpyro.plate("rows", len(day)):
            numpyro.sample("weight", dist.Normal(own[0][group] + own[1][group] * day, sigma), obs=weight)

    return Model(program, Dataset("growth", {"day": day, "group": group, "weight": weight}))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_hierarchy_without_a_mode_has_one_start_near_its_optimum(seed: int) -> None:
    model = growth()
    key = jax.random.PRNGKey(seed)
    starts = find_starts(model, key=key)
    (start,) = starts.points
    assert not start.is_mode  # the density has no upper bound, and searches climb on
    # The price is counted, not timed: two escapes agree, where climbs in the beginnings' units took four.
    assert starts.gradient_evaluations < 30_000
    best = fit(model, "full_rank", key=key, starts=starts)
    assert start.elbo > best.elbo.value - 3


def test_starts_at_one_place_and_height_are_one() -> None:
    def start(x: float, elbo: float, precision: np.ndarray | None) -> Start:
        return Start(np.array([x, 0.0]), precision, elbo, 0.0, is_mode=True)

    # Half an sd is 5 in units of ten, and a half where no scale is known.
    for precision, near, apart in ((np.diag([0.01, 1.0]), 4.9, 5.1), (None, 0.49, 0.51)):
        first = start(0.0, 0.0, precision)
        assert _once_each([first, start(near, -2.9, precision)]) == [first]
        assert len(_once_each([first, start(apart, 0.0, precision)])) == 2
        assert len(_once_each([first, start(near, -3.1, precision)])) == 2


@pytest.mark.slow
def test_searches_that_are_slow_still_end_at_modes() -> None:
    """A mixture of ten components: after 125 rounds no search has ended, and the best of them is at a saddle."""
    rng = np.random.default_rng(0)
    y = rng.choice(np.linspace(-20, 20, 10), 500) + rng.standard_normal(500)

    def mixture(y):
        with numpyro.plate("components", 10):
            mu = numpyro.sample("mu", dist.Normal(0, 15))
            sigma = numpyro.sample("sigma", dist.HalfNormal(3))
        weights = numpyro.sample("weights", dist.Dirichlet(jnp.ones(10)))
        with numpyro.plate("rows", len(y)):
            parts = dist.MixtureSameFamily(dist.Categorical(probs=weights[None]), dist.Normal(mu[None], sigma[None]))
            numpyro.sample("y", parts, obs=y)

    starts = find_starts(Model(mixture, Dataset("ten", {"y": y})), key=jax.random.PRNGKey(0))
    assert any(start.is_mode for start in starts.points)
