"""The ladder for a user's own model stops at the first broken rung and says what to do."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from models import lda
from toolkit import Dataset, Labels, Model
from toolkit.modelling import check as rungs
from toolkit.modelling.check import check

DATA = Dataset("d", {"y": np.arange(3.0)}, coords={"g": np.array(["u", "v"])})
NAMES = (
    "runs on the data",
    "has no discrete latent left over",
    "observes something",
    "has something to infer",
    "has coords that fit its plates",
    "looks up only entries that are there",
    "has a finite density",
    "has a finite gradient",
    "can be drawn from",
)


def good(y: np.ndarray | None = None) -> None:
    with numpyro.plate("g", 2):
        a = numpyro.sample("a", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(a[0], 1), obs=y)


def stops(y: np.ndarray | None = None) -> None:
    a = numpyro.sample("a", dist.Normal(jnp.zeros(4), 1))
    numpyro.sample("y", dist.Normal(a + y, 1), obs=y)


def counts(y: np.ndarray | None = None) -> None:
    z = numpyro.sample("z", dist.Poisson(3.0))
    numpyro.sample("y", dist.Normal(z, 1), obs=y)


def blind(y: np.ndarray | None = None) -> None:
    numpyro.sample("a", dist.Normal(0, 1))


def known(y: np.ndarray | None = None) -> None:
    numpyro.sample("y", dist.Normal(0, 1), obs=y)


def ill_labelled(y: np.ndarray | None = None) -> None:
    with numpyro.plate("g", 3):
        a = numpyro.sample("a", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(a[0], 1), obs=y)


def impossible(y: np.ndarray | None = None) -> None:
    a = numpyro.sample("a", dist.Normal(0, 1))
    numpyro.sample("y", dist.Uniform(10 + 0 * a, 11), obs=y)


def out_of_range(y: np.ndarray | None = None) -> None:
    with numpyro.plate("unit", 2):
        a = numpyro.sample("a", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(a[jnp.array([0, 1, 2])], 1), obs=y)


def kinked(y: np.ndarray | None = None) -> None:
    a = numpyro.sample("a", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(jnp.sqrt(0 * a), 1), obs=y)


_BROKEN = {
    "runs on the data": (stops, "Expected model 'stops' to run on dataset 'd'; it stops with "),
    "has no discrete latent left over": (counts, "Expected discrete latent sites with finitely many values; 'z' "),
    "observes something": (blind, "Expected model 'blind' to observe something; it has only a: give the data as obs="),
    "has something to infer": (known, "Expected model 'known' to have a latent site; "),
    "has coords that fit its plates": (ill_labelled, "Expected 3 coords for dimension 'g' of site 'a'; dataset 'd' ha"),
    "looks up only entries that are there": (
        out_of_range,
        "Expected every index to lie within its array; got out-of-bounds indexing for array of shape (2,): index 2 is "
        "out of bounds for axis 0 with size 2: JAX would take the last entry instead and not say so.",
    ),
    "has a finite density": (
        impossible,
        "Expected a finite log density somewhere; it is finite at 0 of 10 prior draws and at 0 of 10 dispersed starts. "
        "At the last of them: site 'y' has a log density of -inf.",
    ),
    "has a finite gradient": (kinked, "Expected a finite gradient of the log density somewhere; it is NaN or infinite"),
}


@pytest.mark.parametrize("name", _BROKEN)
def test_the_first_broken_rung_ends_the_ladder(name: str) -> None:
    fn, expected = _BROKEN[name]
    climbed = check(fn, DATA)
    assert tuple(rung.name for rung in climbed) == NAMES[: NAMES.index(name) + 1]
    assert [rung.passed for rung in climbed] == [True] * (len(climbed) - 1) + [False]
    assert climbed[-1].message.startswith(expected)
    assert "\n" not in climbed[-1].message


def test_a_gradient_names_its_site() -> None:
    assert "by site 'a'" in check(kinked, DATA)[-1].message


@pytest.mark.parametrize(
    "make", [lambda: check(good, DATA), lambda: check(Model(good, DATA))], ids=["callable", "model"]
)
def test_a_good_model_climbs_to_the_top(make: Callable[[], tuple[rungs.Rung, ...]]) -> None:
    climbed = make()
    assert tuple(rung.name for rung in climbed) == NAMES
    assert all(rung.passed and rung.message for rung in climbed)
    assert climbed[3].message == "a (2 scalars)"
    assert climbed[6].message == "at 10 of 10 prior draws and at 10 of 10 dispersed starts"
    assert climbed[-1].message == "prior and predictive draws"


def flat(y: np.ndarray) -> None:
    b = numpyro.sample("b", dist.ImproperUniform(dist.constraints.real, (), ()))
    numpyro.sample("y", dist.Normal(b, 1), obs=y)


def by_factor(y: np.ndarray) -> None:
    b = numpyro.sample("b", dist.Normal(0, 1))
    numpyro.factor("likelihood", dist.Normal(b, 1.0).log_prob(y).sum())


def renamed(y: np.ndarray) -> None:
    b = numpyro.sample("b", dist.Normal(0, 1))
    numpyro.sample("response", dist.Normal(b, 1), obs=y)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (flat, "not from its prior, which is flat for b: prior draws are left out"),
        (by_factor, "prior draws only; its likelihood is a factor: predictive draws are left out"),
        (renamed, "prior draws only; no argument of the site's name with default None for response: predictive draws "),
    ],
)
def test_what_cannot_be_drawn_is_legitimate_and_said(fn: Callable[..., None], message: str) -> None:
    climbed = check(fn, Dataset("d", {"y": np.arange(3.0)}))
    assert len(climbed) == len(NAMES)
    assert climbed[-1].passed
    assert climbed[-1].message.startswith(message)


def mixture(y: np.ndarray, apart: float = 0.0) -> None:
    with numpyro.plate("component", 3):
        centre = numpyro.sample("centre", dist.Normal(apart * jnp.arange(3), 1))
    weight = numpyro.sample("weight", dist.Dirichlet(jnp.ones(3)))
    numpyro.deterministic("mean", weight * centre)
    parts = jnp.log(weight)[None] + dist.Normal(centre[None], 1).log_prob(y[:, None])
    numpyro.factor("likelihood", jax.nn.logsumexp(parts, axis=1).sum())


def mixed(axes: dict[str, int], apart: float = 0.0, by: str = "centre", count: int = 3) -> Model:
    data = Dataset("d", {"y": np.arange(3.0)}, static={"apart": apart})
    return Model(mixture, data, labels=Labels(axes, by=by, count=count))


LABELS = "has labels that may switch"
BOTH = {"centre": -1, "weight": -1}


@pytest.mark.slow
def test_labels_that_may_switch_are_found_to() -> None:
    small = lda.simulate(jax.random.key(0), documents=4, words=9, topics=3, tokens=20)
    for model in (mixed(BOTH), lda.model(small, topics=3)):
        climbed = {rung.name: rung for rung in check(model)}
        assert climbed[LABELS].passed
        assert climbed[LABELS].message.startswith("the density is the same in other orders of ")
        assert climbed["can be drawn from"].passed


@pytest.mark.parametrize(
    ("options", "text"),
    [
        pytest.param(
            {"axes": BOTH, "apart": 1e-3},
            "Expected the same density in every order of the 3 labels of centre, weight; another order changes it by ",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"axes": {"centre": -1}},
            "declare every latent that carries the label with its right axis",
            marks=pytest.mark.slow,
        ),
        ({"axes": BOTH, "count": 2}, "Expected 2 labels on axis -1 of site 'centre'; got shape (3,)."),
        ({"axes": {**BOTH, "center": -1}}, "Expected labels on sites of the model; it has no site center."),
    ],
    ids=["priors differ", "one forgotten", "count", "name"],
)
def test_a_false_declaration_of_labels_is_told(options: dict[str, Any], text: str) -> None:
    last = check(mixed(**options))[-1]
    assert (last.name, last.passed) == (LABELS, False)
    assert text in last.message


def test_labels_on_derived_sites_alone_are_not_checked() -> None:
    climbed = {rung.name: rung for rung in check(mixed({"mean": -1}, by="mean"))}
    assert climbed[LABELS].passed
    assert climbed[LABELS].message == "not checked: no latent is among the sites with labels"


def heavy(y: np.ndarray | None = None) -> None:
    precision = numpyro.sample("precision", dist.Gamma(1e-3, 1e-3))
    numpyro.sample("y", dist.Normal(0, 1 / jnp.sqrt(precision)), obs=y)


def test_a_prior_whose_draws_underflow_passes_by_its_starts() -> None:
    climbed = check(heavy, DATA)
    assert len(climbed) == len(NAMES)
    assert climbed[6].message.endswith("and at 10 of 10 dispersed starts")
    assert not climbed[6].message.startswith("at 10 of 10 prior draws")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((good,), "Expected a Model alone, or a NumPyro callable with the Dataset .*; got a callable alone"),
        ((Model(good, DATA), DATA), "Expected a Model alone, .*; got both a Model and a Dataset"),
    ],
)
def test_misuse_is_refused(arguments: tuple, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        check(*arguments)
