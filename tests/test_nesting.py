"""Families that contain one another, and what is asked of fits: order, deficits, misuse."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from numpyro.infer.autoguide import AutoMultivariateNormal
from targets import line, pair

from toolkit import Fit, Guide, Status, fit
from toolkit.estimate import Estimate
from toolkit.variational.certificates import Certificate, Scope
from toolkit.variational.guides import GUIDES, block_guide, find_guide
from toolkit.variational.nesting import check_nesting, contains, smallest_first

KEY = jax.random.PRNGKey(0)
MODEL = line()


@pytest.fixture(scope="module")
def fits() -> dict[str, Fit]:
    return {name: fit(MODEL, name, key=KEY, starts=2) for name in ("mean_field", "full_rank")}


def ended(name: str, elbo: float, se: float = 0.01, limit: float | None = None) -> Fit:
    certificate = None if limit is None else Certificate(Estimate(limit / 2, limit / 9), limit, Scope.LOCAL, 128, 4)
    return Fit(GUIDES[name], MODEL, Status.ARRIVED, elbo=Estimate(elbo, se), certificate=certificate)


def test_the_worst_deficit_is_told_with_its_error_and_refutes_the_certificate() -> None:
    full = ended("full_rank", -10.0, se=0.04, limit=0.062)
    *_, marked = check_nesting([ended("mean_field", -9.0), ended("low_rank", -7.0, se=0.03), full])
    assert marked.status is Status.BELOW_SMALLER_FAMILY
    assert marked.message == (
        "3.00 ± 0.05 nats below low_rank, which it contains; its certificate, of at most 0.062 nats, speaks of a lower "
        "optimum"
    )
    assert marked.certificate is None
    assert marked.gap_limit is None
    everywhere = replace(full, certificate=replace(full.certificate, scope=Scope.GLOBAL))
    *_, marked = check_nesting([ended("mean_field", -9.0), everywhere])
    assert marked.message.endswith("its certificate, of at most 0.062 nats, does not hold")


def test_a_fit_that_is_not_below_keeps_its_certificate() -> None:
    full = ended("full_rank", -10.0, limit=0.062)
    assert check_nesting([ended("mean_field", -9.95), full], tolerance=0.1)[1] == full
    (_, marked) = check_nesting([ended("mean_field", -9.95), full], tolerance=0.01)
    assert marked.status is Status.BELOW_SMALLER_FAMILY
    assert marked.message == "0.050 ± 0.014 nats below mean_field, which it contains"
    assert marked.certificate == full.certificate, "which allows for as much"


def test_what_contains_a_large_family_comes_after_it() -> None:
    mine = Guide("mine", lambda fn: AutoMultivariateNormal(fn), contains=("full_rank",))
    full, mean_field, low_rank = (find_guide(name) for name in ("full_rank", "mean_field", "low_rank"))
    assert smallest_first([mine, full, low_rank, mean_field], MODEL) == [mean_field, low_rank, full, mine]


def test_families_that_contain_each_other_are_refused() -> None:
    one, other = (Guide(name, GUIDES["full_rank"].build, contains=(inner,)) for name, inner in (("a", "b"), ("b", "a")))
    with pytest.raises(ValueError, match=r"Expected families of which none contains itself; got a circle: a, b"):
        smallest_first([one, other], MODEL)


def test_full_rank_contains_blocks_by_any_name() -> None:
    mine = block_guide("mine", [("a", "b")])
    assert contains(find_guide("full_rank"), mine, MODEL)
    assert not contains(mine, find_guide("full_rank"), MODEL)
    assert contains(mine, find_guide("mean_field"), MODEL)


def test_smaller_fits_of_another_model_are_refused(fits: dict[str, Fit]) -> None:
    small = fit(pair(0.5), "mean_field", key=KEY, starts=2)
    with pytest.raises(ValueError, match=r"Expected smaller fits of this very model; got 'mean_field' of"):
        fit(MODEL, "full_rank", key=KEY, starts=2, smaller=[small])
    twin = replace(MODEL)
    with pytest.raises(ValueError, match=r"another object of that name: pass those of this one"):
        fit(twin, "full_rank", key=KEY, starts=2, smaller=[fits["mean_field"]])


@pytest.mark.parametrize(
    ("sites", "got"),
    [
        ({}, "none of them"),
        ({"a": (3,)}, "a (3,)"),
        ({"a": (3,), "b": (3, 2)}, "a (3,), b (3, 2)"),
        ({"a": (3,), "b": (4,)}, "a (3,), b (4,)"),
        ({"a": (), "b": ()}, "a (), b ()"),
        ({"a": (), "b": (3,)}, "a (), b (3,)"),
    ],
    ids=["none", "missing", "shape", "draws", "scalars", "a scalar"],
)
@pytest.mark.parametrize("name", ["mean_field", "full_rank"])
def test_the_log_density_of_other_sites_is_refused(
    fits: dict[str, Fit], name: str, sites: dict[str, tuple[int, ...]], got: str
) -> None:
    fitted = fits[name]
    with pytest.raises(ValueError, match=r"Expected the latent sites of chart 'plain', which are") as told:
        fitted.log_density({site: np.zeros(shape) for site, shape in sites.items()})
    assert str(told.value).endswith(f"which are a (draws), b (draws); got {got}.")
