"""How many columns a low-rank guide has: NumPyro's default, the user's number, or as many as gain something."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from toolkit import Dataset, Model, Status, fit
from toolkit.storage import Storage
from toolkit.variational.fitting import _gain_in_words
from toolkit.variational.gaussians import Frame, LowRank, Quadratic, RankGain, rank_by_gain
from toolkit.variational.guides import GUIDES, Guide, find_guide
from toolkit.variational.keeping import fit_key, keep_fit, kept_fit
from toolkit.variational.nesting import contains, smallest_first

KEY = jax.random.key(0)
SIZE, COLUMNS = 12, 3


def covariance(seed: int = 0) -> np.ndarray:
    """A diagonal and three strong columns."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.standard_normal(SIZE))
    columns = 3 * rng.standard_normal((SIZE, COLUMNS))
    return (np.eye(SIZE) + columns @ columns.T) * np.outer(scale, scale)


@pytest.fixture(scope="module")
def model() -> Model:
    factor = np.linalg.cholesky(covariance())

    def gaussian(factor):
        z = numpyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (SIZE,)))
        numpyro.factor("normal", dist.MultivariateNormal(jnp.zeros(SIZE), scale_tril=factor).log_prob(z))

    return Model(gaussian, Dataset("three_columns", {"factor": factor}))


def best_elbo(precision: np.ndarray, rank: int) -> float:
    """The largest ELBO of so many columns, by a climb on closed forms that shares nothing with the alternation."""
    from scipy.optimize import minimize

    target = Quadratic(np.zeros(SIZE), np.zeros(SIZE), precision)
    family = LowRank(Frame.of(np.zeros(SIZE), precision), rank)

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = family.exact(x, family.member(x), target)
        return -value, -gradient

    rng = np.random.default_rng(rank)
    starts = [np.zeros(family.parameters), *0.3 * rng.standard_normal((3, family.parameters))]
    return max(-minimize(loss, x, jac=True, method="L-BFGS-B", options={"maxiter": 5_000}).fun for x in starts)


def test_the_rank_by_gain_is_that_of_the_covariance() -> None:
    found = rank_by_gain(np.linalg.inv(covariance()), 0.1)
    assert found.rank == COLUMNS
    assert found.gain == pytest.approx(0, abs=0.01)
    assert not found.limit


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_gains_of_columns_are_those_of_the_best_gaussians(seed: int) -> None:
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((SIZE, 2 * SIZE))
    precision = root @ root.T / SIZE
    found = rank_by_gain(precision, 0.15)
    elbos = {rank: best_elbo(precision, rank) for rank in (found.rank - 1, found.rank, found.rank + 1) if rank > 0}
    assert found.gain == pytest.approx(elbos[found.rank + 1] - elbos[found.rank], abs=0.03)
    assert found.gain < 0.15 or found.limit
    if found.rank > 1:
        assert elbos[found.rank] - elbos[found.rank - 1] > 0.12


def test_no_more_columns_than_a_full_covariance_has_numbers() -> None:
    rng = np.random.default_rng(0)
    root = rng.standard_normal((SIZE, SIZE))
    found = rank_by_gain(root @ root.T / SIZE, 1e-9)
    assert found.rank == (SIZE - 1) // 2
    assert found.limit
    assert found.gain > 1e-9


def test_a_fit_by_gain_says_its_rank_and_reaches_the_evidence(model: Model) -> None:
    fitted = fit(model, "low_rank_auto", key=KEY)
    assert fitted.guide.rank == COLUMNS
    assert fitted.guide.title == "low_rank_auto (AutoLowRankMultivariateNormal, rank 3)"
    assert "; with 3 columns: one more would gain about " in fitted.why
    assert fitted.status is Status.ARRIVED
    assert fitted.elbo.value == pytest.approx(0, abs=0.02)  # the target is normalised
    assert np.shape(fitted.params["auto_cov_factor"]) == (SIZE, COLUMNS)


@pytest.mark.parametrize(
    ("chosen", "text"),
    [
        (RankGain(3, 0.04, False), "one more would gain about 0.04 nats"),
        (RankGain(3, -1e-9, False), "one more would gain about 0 nats"),
        (RankGain(3, -18.2, False), "what one more would gain could not be reckoned, because the density hardly bends"),
        (
            RankGain(5, 0.7, True),
            "one more would gain about 0.7 nats, but then it would have as many numbers as a full covariance: take "
            "full_rank",
        ),
    ],
)
def test_a_gain_is_told_for_what_it_is(chosen: RankGain, text: str) -> None:
    said = _gain_in_words(chosen, 0.1)
    assert said.startswith(text)
    assert "-" not in said


def test_low_rank_says_how_many_columns_it_has(model: Model) -> None:
    for name, words in {"low_rank": "3 columns, NumPyro's default", "low_rank_1": "1 column"}.items():
        assert fit(model, name, key=KEY, max_gradients=20_000).why.endswith(f"; with {words}")


def test_the_user_chooses_the_rank(model: Model) -> None:
    elbos = {rank: fit(model, f"low_rank_{rank}", key=KEY) for rank in (1, 2)}
    precision = np.linalg.inv(covariance())
    normaliser = 0.5 * np.linalg.slogdet(precision / (2 * np.pi))[1]
    for rank, fitted in elbos.items():
        assert np.shape(fitted.params["auto_cov_factor"]) == (SIZE, rank)
        assert fitted.elbo.value == pytest.approx(best_elbo(precision, rank) + normaliser, abs=0.1)


def test_names_with_a_rank() -> None:
    guide = find_guide("low_rank_8@centred")
    assert (guide.name, guide.family, guide.rank, guide.chart) == ("low_rank_8@centred", "low_rank", 8, "centred")
    assert find_guide("low_rank_8").is_named
    assert GUIDES["low_rank_auto"].of_rank(4).is_named
    assert not Guide("low_rank_8", GUIDES["low_rank"].build).is_named
    assert not Guide("mean_field", GUIDES["low_rank"].build).is_named
    for wrong in ("low_rank_0", "low_rank_-1", "low_rank_x", "full_rank_3"):
        with pytest.raises(ValueError, match=r"low_rank_<columns>; got"):
            find_guide(wrong)


def test_more_columns_contain_fewer(model: Model) -> None:
    two, four, default, full = (find_guide(f"{name}") for name in ("low_rank_2", "low_rank_4", "low_rank", "full_rank"))
    mean_field, by_gain = find_guide("mean_field"), find_guide("low_rank_auto")
    assert contains(four, default, model)  # the default has three in twelve dimensions
    assert contains(default, two, model)
    assert not contains(two, default, model)
    assert not contains(four, four, model)
    for guide in (two, four, default, by_gain):
        assert contains(full, guide, model)
        assert contains(guide, mean_field, model)
    ordered = smallest_first([full, by_gain, four, default, two, mean_field], model)
    assert ordered == [mean_field, two, default, four, by_gain, full]


def test_a_kept_fit_knows_its_rank(model: Model, tmp_path: Path) -> None:
    storage, guide = Storage(tmp_path), find_guide("low_rank_auto")
    fitted = fit(model, guide, key=KEY)
    name = fit_key("fingerprint", guide, KEY, {})
    assert name is not None
    assert name != fit_key("fingerprint", find_guide("low_rank_3"), KEY, {})
    keep_fit(storage, name, fitted)
    again = kept_fit(storage, name, model, guide)
    assert again is not None
    assert again.guide == fitted.guide
    assert again.autoguide.rank == COLUMNS
    one, other = (which.draw(KEY, 4)["z"] for which in (fitted, again))
    np.testing.assert_array_equal(one, other)


def test_more_columns_than_dimensions_are_refused(model: Model) -> None:
    with pytest.raises(ValueError, match=r"Expected at most 12 columns for 'low_rank_20' in 12 dimensions; got 20"):
        fit(model, "low_rank_20", key=KEY)


def test_one_dimension_has_one_column() -> None:
    found = rank_by_gain(np.array([[2.0]]), 0.1)
    assert (found.rank, found.gain) == (1, 0.0)


def test_a_guide_of_another_rank_is_kept_under_another_name() -> None:
    by_gain = GUIDES["low_rank_auto"]
    assert fit_key("fingerprint", by_gain, KEY, {}) != fit_key("fingerprint", by_gain.of_rank(5), KEY, {})
