"""Guides that bring their own algorithm: what it finds is a fit like any other."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.autoguide import AutoDiagonalNormal
from numpyro.infer.reparam import LocScaleReparam

from toolkit import Dataset, Guide, Model, Status, fit, study
from toolkit.variational.own_solvers import Problem, Solved

PRIOR_SD, NOISE_SD = 2.0, 0.5
Y = np.array([0.3, 1.1, 0.7, 0.2])
PRECISION = PRIOR_SD**-2 + len(Y) * NOISE_SD**-2
MEAN = Y.sum() * NOISE_SD**-2 / PRECISION


def level(y: object) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, PRIOR_SD))
    numpyro.sample("y", dist.Normal(mu, NOISE_SD).expand(np.shape(y)), obs=y)


def solve(problem: Problem) -> Solved:
    loc, scale = np.array([MEAN]), np.array([PRECISION**-0.5])
    return Solved(
        {"auto_loc": loc, "auto_scale": scale},
        Status.ARRIVED,
        solver="algebra",
        why="in closed form",
        log_evidence=-3.0,
    )


def program(fn: object) -> object:
    """A guide that is no autoguide."""

    def guide(y: object) -> None:
        loc, scale = numpyro.param("loc", jnp.zeros(())), numpyro.param("scale", jnp.ones(()))
        numpyro.sample("mu", dist.Normal(loc, scale))

    return guide


def solve_program(problem: Problem) -> Solved:
    return Solved({"loc": np.array(MEAN), "scale": np.array(PRECISION**-0.5)}, Status.ARRIVED)


CLOSED = Guide("closed", AutoDiagonalNormal, solve=solve)
PROGRAM = Guide("program", program, solve=solve_program)


@pytest.fixture
def model() -> Model:
    return Model(level, Dataset("four", {"y": Y}), guides=(CLOSED, PROGRAM))


@pytest.mark.parametrize("name", ["closed", "program"])
def test_its_elbo_is_the_evidence_where_it_is_exact(model: Model, name: str) -> None:
    fitted = fit(model, name, key=jax.random.key(0))
    covariance = PRIOR_SD**2 + NOISE_SD**2 * np.eye(len(Y))
    evidence = dist.MultivariateNormal(jnp.zeros(len(Y)), covariance).log_prob(Y)
    assert fitted.status is Status.ARRIVED
    assert fitted.elbo is not None
    assert fitted.elbo.value == pytest.approx(float(evidence), abs=1e-5)
    drawn = fitted.draw(jax.random.key(1), 20_000)["mu"]
    assert abs(drawn.mean() - MEAN) < 5 * PRECISION**-0.5 / 20_000**0.5


def test_what_it_says_of_itself_is_kept(model: Model) -> None:
    fitted = fit(model, CLOSED, key=jax.random.key(0))
    assert (fitted.solver, fitted.why, fitted.log_evidence) == ("algebra", "in closed form", -3.0)


def test_no_other_solver_may_be_asked_for(model: Model) -> None:
    with pytest.raises(ValueError, match="'auto' for 'closed', which has an algorithm of its own; got 'svi'"):
        fit(model, "closed", key=jax.random.key(0), solver="svi")


def eight(group: np.ndarray, y: object = None) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    with numpyro.plate("groups", 4):
        effect = numpyro.sample("effect", dist.Normal(mu, 1.0))
    with numpyro.plate("row", len(group)):
        numpyro.sample("y", dist.Normal(effect[group], 1.0), obs=y)


@pytest.mark.parametrize("name", ["mixture", "mixture_3", "chain", "ep", "closed"])
def test_a_chart_with_parameters_of_its_own_is_refused(name: str) -> None:
    """They would stay where they begin, and the family would not contain those that learn them."""
    data = Dataset("eight", {"group": np.repeat(np.arange(4), 2), "y": np.arange(8.0)})
    charts = {"learned": {"effect": LocScaleReparam(None)}}
    learned = Model(eight, data, charts=charts, chart="learned", guides=(CLOSED,))
    sentence = (
        f"Expected a chart without parameters of its own for '{name}', whose algorithm does not learn them; 'learned' "
        "has effect_centered: take another one."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        fit(learned, name, key=jax.random.key(0))


def test_a_model_has_guides_of_its_own_by_name_in_a_study(model: Model) -> None:
    done = study(model, guides=["closed", "program", "mean_field"], chains=2, warmup=300, draws=1_500)
    assert [fitted.status for fitted in done.fits] == [Status.ARRIVED] * 3
    assert set(done.comparison.guides["verdict"]) <= {"right", "cannot tell"}
    assert "'closed'" in done.command
    other = Model(level, Dataset("four", {"y": Y}))
    with pytest.raises(ValueError, match="Expected a guide's name"):
        study(other, guides=["closed"])
