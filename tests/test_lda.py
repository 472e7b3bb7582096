"""Latent Dirichlet allocation: its density, its corpora, its labels and its table of words."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from numpyro.infer.util import log_density

from models import _bible, lda
from models._simplex import NormalSimplexReparam, NormalToSimplex
from toolkit import Dataset, Model


@pytest.fixture(scope="module")
def study() -> Model:
    return lda.model()


@pytest.fixture(scope="module")
def small() -> Model:
    data = lda.simulate(jax.random.key(0), documents=6, words=5, topics=3, tokens=40)
    return lda.model(data, topics=3, alpha=1.5, eta=2.0)


def _constrained_log_density(model: Model, theta: Any, topics: Any) -> float:
    """Log p(x, z) without any Jacobian."""
    return float(log_density(model.bound("plain"), (), model.arrays, {"theta": theta, "topics": topics})[0])


def _drawn(model: Model, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    sites = model.constrain(model.start(jax.random.key(seed), model.arrays), model.arrays)
    return np.asarray(sites["theta"]), np.asarray(sites["topics"])


@pytest.mark.slow
def test_the_density_is_the_one_written_down(small: Model) -> None:
    theta, topics = _drawn(small)
    expected = sum(scipy.stats.dirichlet([1.5] * 3).logpdf(row) for row in theta)
    expected += sum(scipy.stats.dirichlet([2.0] * 5).logpdf(row) for row in topics)
    for row, p in zip(small.arrays["counts"], theta @ topics, strict=True):
        expected += sum(np.log(p[word]) for word in np.repeat(np.arange(5), row))
    np.testing.assert_allclose(_constrained_log_density(small, theta, topics), expected, rtol=1e-12)


def test_the_density_does_not_depend_on_the_order_of_topics(small: Model) -> None:
    theta, topics = _drawn(small)
    order = [2, 0, 1]
    switched = _constrained_log_density(small, theta[:, order], topics[order])
    np.testing.assert_allclose(switched, _constrained_log_density(small, theta, topics), rtol=1e-12)


def test_the_chart_s_jacobian_is_that_of_its_map() -> None:
    transform = NormalToSimplex()
    z = jax.random.normal(jax.random.key(0), (3, 5)) * 2
    shares = transform(z)
    assert shares.shape == transform.forward_shape(z.shape) == (3, 6)
    np.testing.assert_allclose(shares.sum(-1), 1, rtol=1e-14)
    jacobian = jax.vmap(jax.jacobian(lambda row: transform(row)[:-1]))(z)
    np.testing.assert_allclose(transform.log_abs_det_jacobian(z, shares), jnp.linalg.slogdet(jacobian)[1], rtol=1e-10)


@pytest.mark.parametrize("size", [0.1, 1.0, 3.0, 6.0])
def test_the_chart_is_inverted(size: float) -> None:
    z = jax.random.normal(jax.random.key(1), (4, 30)) * size
    transform = NormalToSimplex()
    assert transform.inverse_shape((4, 31)) == z.shape
    np.testing.assert_allclose(transform.inv(transform(z)), z, rtol=1e-9)


def test_a_flat_dirichlet_is_standard_normal_in_the_chart() -> None:
    model = lda.model(_counts([[1, 0, 0, 0]]), topics=3)
    arrays = {name: np.zeros_like(value) for name, value in model.arrays.items()}  # no tokens: the prior alone
    arrays["tokens"] = model.arrays["tokens"]
    point = model.start(jax.random.key(0), arrays)
    assert set(point) == {"theta_normal", "topics_normal"}
    expected = sum(float(scipy.stats.norm.logpdf(np.asarray(value)).sum()) for value in point.values())
    np.testing.assert_allclose(model.log_density(point, arrays), expected, rtol=1e-12)


def test_charts_look_at_one_posterior(small: Model) -> None:
    point = small.start(jax.random.key(5), small.arrays)
    values = small.constrain(point, small.arrays)
    plain = _constrained_log_density(small, values["theta"], values["topics"])
    transform = NormalToSimplex()
    volumes = sum(
        float(transform.log_abs_det_jacobian(point[f"{name}_normal"], values[name]).sum())
        for name in ("theta", "topics")
    )
    np.testing.assert_allclose(small.log_density(point, small.arrays), plain + volumes, rtol=1e-12)


def test_shares_of_the_corpus_weigh_documents_by_their_length() -> None:
    counts = np.array([[9, 0], [0, 1]])
    model = lda.model(Dataset("two", {"counts": counts}), topics=2)
    theta = np.array([[0.2, 0.8], [0.6, 0.4]])
    sites = model.values({"theta": theta, "topics": np.full((2, 2), 0.5)}, model.arrays)
    np.testing.assert_allclose(sites["share"], 0.9 * theta[0] + 0.1 * theta[1], rtol=1e-12)


def test_the_study_corpus_is_what_its_docstring_says(study: Model) -> None:
    counts = study.arrays["counts"]
    assert counts.shape == (60, 200)
    np.testing.assert_array_equal(study.arrays["tokens"], counts.sum(1))
    assert counts.sum(1).min() >= _bible.LEAST_TOKENS
    assert not set(study.dataset.coords["word"]) & {"the", "and", "unto", "s"}
    titles = study.dataset.coords["document"]
    assert len(set(titles)) == 60
    assert [titles[0], titles[15], titles[59]] == ["Exodus 1-9", "1 Samuel 1-9", "John 15-21"]
    assert {name: study.dims(name) for name in ("share", "theta", "topics")} == {
        "share": ("topic",),
        "theta": ("document", "topic"),
        "topics": ("topic", "word"),
    }
    assert [study.local(name) for name in ("theta", "topics")] == [True, False]
    assert [quantity.site for quantity in study.quantities] == ["share", "theta", "topics"]


def test_words_are_counted_where_they_belong(study: Model) -> None:
    """Known texts: only the gospels name Jesus; Aaron's priests serve in the law."""
    counts, words = study.arrays["counts"], list(study.dataset.coords["word"])
    by_section = counts.reshape(4, 15, -1).sum(1)
    assert (by_section[:3, words.index("jesus")] == 0).all()
    assert by_section[3, words.index("jesus")] > 500
    assert by_section[0, words.index("offering")] > 0.8 * by_section[:, words.index("offering")].sum()


def test_every_chapter_of_the_whole_bible_is_a_document() -> None:
    model = lda.model(corpus="full", topics=20)
    counts, words = model.arrays["counts"], list(model.dataset.coords["word"])
    assert counts.shape == (1_189, 2_000)
    assert [quantity.site for quantity in model.quantities] == ["share"]
    row = counts[list(model.dataset.coords["document"]).index("Genesis 1")]
    assert (row[words.index("god")], row[words.index("said")], row[words.index("jesus")]) == (32, 10, 0)
    assert (np.diff(counts.sum(0)) <= 0).all()


@pytest.mark.parametrize("size", [(40, 100), (7, 300)])
def test_the_corpus_comes_in_other_sizes(size: tuple[int, int]) -> None:
    data = lda.dataset(documents=size[0], words=size[1])
    assert data.arrays["counts"].shape == size
    assert [len(data.coords[name]) for name in ("document", "word")] == list(size)


def test_no_chapter_is_lost_or_counted_twice() -> None:
    chapters, vocabulary, titles = _bible._chapters()
    books = [title.rsplit(" ", 1)[0] for title in titles]
    wanted = np.isin(books, [book for section in _bible.SECTIONS.values() for book in section])
    data = lda.dataset(documents=28, words=2_000)
    np.testing.assert_array_equal(data.arrays["counts"].sum(0), chapters[wanted].sum(0))
    np.testing.assert_array_equal(data.coords["word"], vocabulary)


@pytest.mark.slow
def test_simulate_gives_counts_with_the_probabilities_of_its_truth() -> None:
    tokens = 3_000
    data = lda.simulate(jax.random.key(2), documents=30, words=8, topics=3, tokens=tokens)
    expected = tokens * data.truth["theta"] @ data.truth["topics"]
    pearson = (np.square(data.arrays["counts"] - expected) / expected).sum()
    assert (data.arrays["counts"].sum(1) == tokens).all()
    assert 1e-6 < scipy.stats.chi2(30 * 7).sf(pearson) < 1 - 1e-6
    np.testing.assert_allclose(data.truth["share"], data.truth["theta"].mean(0), rtol=1e-12)


def test_simulate_s_truth_has_the_shape_of_its_sites_and_is_fixed_by_its_key() -> None:
    first, again, other = (
        lda.simulate(jax.random.key(seed), documents=5, words=6, topics=3, tokens=9) for seed in (0, 0, 1)
    )
    model = lda.model(first, topics=3)
    assert {name: value.shape for name, value in first.truth.items()} == {
        name: model.sites[name].shape for name in ("topics", "theta", "share")
    }
    np.testing.assert_array_equal(first.arrays["counts"], again.arrays["counts"])
    assert not np.array_equal(first.arrays["counts"], other.arrays["counts"])


def test_switched_topics_share_one_labelling_after_relabelling(small: Model) -> None:
    theta, topics = _drawn(small, seed=4)
    sites = {
        name: np.asarray(value)
        for name, value in small.values({"theta": theta, "topics": topics}, small.arrays).items()
    }
    order = [1, 2, 0]
    both = {
        "topics": np.stack([sites["topics"], sites["topics"][order]])[None],
        "theta": np.stack([sites["theta"], sites["theta"][:, order]])[None],
        "share": np.stack([sites["share"], sites["share"][order]])[None],
    }
    assert small.labels is not None
    for values in small.labels.relabel(both).values():
        np.testing.assert_array_equal(values[0, 0], values[0, 1])


def test_top_words_tell_how_sure_they_are() -> None:
    rng = np.random.default_rng(0)
    alphas = np.array([[400.0, 300.0, 100.0, 100.0, 100.0], [1.0, 1.0, 1.0, 1.0, 996.0]])
    draws = np.stack([rng.dirichlet(a, size=(4, 500)) for a in alphas], axis=2)
    table = lda.top_words(draws, np.array(["a", "b", "c", "d", "e"]), count=3)
    first = table[table["topic"] == "topic 1"]
    assert list(first["word"][:2]) == ["a", "b"]
    assert list(first["rank"]) == [1, 2, 3]
    assert list(table.loc[table["topic"] == "topic 2", "word"])[0] == "e"
    # Sure of the first two; three words are equally probable to be the third.
    assert list(first["in_top"][:2]) == [1, 1]
    assert list(first["in_top_se"][:2]) == [0, 0]
    third = first.iloc[2]
    assert abs(third["in_top"] - 1 / 3) < 5 * third["in_top_se"]
    exact = scipy.stats.beta(400, 600)
    row = first.iloc[0]
    assert abs(row["probability"] - 0.4) < 5 * row["probability_se"]
    assert row["probability_se"] == pytest.approx(exact.std() / np.sqrt(2_000), rel=0.5)
    for column, q in (("low", 0.05), ("high", 0.95)):
        # The density at the quantile turns the binomial error of a share of 2,000 draws into one of the quantile.
        se = np.sqrt(q * (1 - q) / 2_000) / exact.pdf(exact.ppf(q))
        assert abs(row[column] - exact.ppf(q)) < 5 * se


def test_top_words_take_independent_draws_too() -> None:
    draws = np.random.default_rng(0).dirichlet(np.ones(4), size=(200, 2))
    words = np.array(list("abcd"))
    np.testing.assert_array_equal(
        lda.top_words(draws, words, count=2)["probability"], lda.top_words(draws[None], words, count=2)["probability"]
    )


def _counts(values: Any) -> Dataset:
    return Dataset("mine", {"counts": np.asarray(values)})


KEY = jax.random.key(0)
ERRORS = {
    "corpus": (lambda: lda.model(corpus="half"), "one of study, full; got 'half'"),
    "topics": (lambda: lda.model(topics=1), "at least 2 topics; got 1"),
    "alpha": (lambda: lda.model(alpha=0.0), "got alpha 0.0 and eta 1.0"),
    "eta": (lambda: lda.model(eta=float("nan")), "got alpha 1.0 and eta nan"),
    "no counts": (lambda: lda.model(Dataset("mine", {"x": np.ones(3)})), "array 'counts' in dataset 'mine'; it has x"),
    "vector": (lambda: lda.model(_counts([1, 2])), "got shape (2,)"),
    "negative": (lambda: lda.model(_counts([[1, -1]])), "whole numbers of 0 or more"),
    "fractions": (lambda: lda.model(_counts([[1, 0.5]])), "whole numbers of 0 or more"),
    "empty document": (lambda: lda.model(_counts([[1, 1], [0, 0]])), "1 have none, the first at row 1"),
    "few documents": (lambda: lda.dataset(documents=3), "at least 4 documents, one for each section; got 3"),
    "many documents": (lambda: lda.dataset(documents=120), "120 documents of 200 words leave one with"),
    "vocabulary": (lambda: lda.dataset(words=2_001), "2 to 2000 words; got 2001"),
    "simulate": (lambda: lda.simulate(KEY, topics=1), "got 200 words, 1 topics"),
    "draws": (lambda: lda.top_words(np.ones((2, 3, 4)), np.array(["a"])), "with 1 words; got shape (1, 2, 3, 4)"),
    "observed": (lambda: NormalSimplexReparam()("y", None, np.ones(2)), "latent site; got 'y', which is observed"),
    "count": (lambda: lda.top_words(np.ones((9, 2, 1)), np.array(["a"]), count=2), "1 to 1 words; got 2"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_misuse_gets_its_sentence(case: str) -> None:
    call: Callable[[], Any] = ERRORS[case][0]
    with pytest.raises(ValueError, match=re.escape(ERRORS[case][1])):
        call()
