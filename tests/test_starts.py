"""Starts of densities without an upper bound: found past what draws every search away, at a bounded price."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from toolkit import Dataset, Model, fit
from toolkit.variational.starts import find_starts

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


def test_an_escape_that_runs_off_itself_is_given_up() -> None:
    """A latent that nothing holds: the mean field of an escape widens without end, which is told and not crashed on."""

    def unheld(y):
        a = numpyro.sample("a", dist.ImproperUniform(dist.constraints.real, (), ()))
        b = numpyro.sample("b", dist.ImproperUniform(dist.constraints.real, (), ()))
        numpyro.factor("funnel", -0.5 * (y - b) ** 2 * jnp.exp(-2 * a) - a)

    starts = find_starts(Model(unheld, Dataset("unheld", {"y": np.array(0.3)})), key=jax.random.PRNGKey(0))
    assert all(np.isfinite(start.loc).all() for start in starts.points)
    assert all(start.precision is None or (np.diag(start.precision) > 0).all() for start in starts.points)
