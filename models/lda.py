r"""Latent Dirichlet allocation: which topics run through a collection of texts, and how surely are they known?

**Question.** What do the books of the King James Bible speak of, and how much of each? Topics are word
distributions, documents are mixtures of topics; the assignment of each word to a topic is summed out.

**Model**, for topics k, documents d and words w of a vocabulary:

    topics[k] ~ Dirichlet(eta, ..., eta)                        which words topic k uses
    theta[d]  ~ Dirichlet(alpha, ..., alpha)                    shares of the topics in document d
    counts[d] ~ Multinomial(tokens[d], sum_k theta[d, k] topics[k])   (as the density of the tokens in their order)
    share[k]   = sum_d tokens[d] theta[d, k] / sum_d tokens[d]  share of topic k in the whole corpus

**Why these priors.** Both parameters are 1 by default: any mixture and any word distribution is as likely as any
other, and a document or topic that leaves something out is not an impossible corner. Values well below 1, usual
where only a point estimate is wanted, put spikes into the corners of every simplex; NUTS and Gaussian guides both
fail there.

**Labels.** The density is the same for every order of the topics. Draws are brought to one order by matching topics
before anything is summarised; a posterior has 4! = 24 equal copies with 4 topics.

**When it can be done.** Texts must be long enough to pin their topics. With 60 documents of some 67 tokens NUTS
finds no common answer from different starts; the default corpus has 60 documents of 700 to 1,600 tokens, from books
of four kinds, and 4 topics: all of 20 random starts of an EM algorithm end in the same mode (up to order), and so
do NUTS's chains.

**Charts.** One posterior behind both. `plain` is NumPyro's stick-breaking transform, in which a share or a word's
probability near 0 has an exponential tail. `normal`, the default for NUTS and guides, breaks the same stick through
the normal distribution function: a flat Dirichlet is then exactly standard normal, a posterior close to it nearly so,
and NUTS needs 15 leapfrog steps a draw where it needs 31 in `plain` (acceptance 0.8). The slowest quantity is
`share`: an effective 900 to 1,400 of 4,000 draws, which lifted R-hat to 1.012 in one of 12 runs; at acceptance 0.9 it
has 2,000 or more for 1.4 times the gradients, and eight of eight runs passed every check.

References:
    Blei, Ng & Jordan (2003), Latent Dirichlet allocation, Journal of Machine Learning Research 3, sections 3 and 5.
    Hoffman, Blei & Bach (2010), Online learning for latent Dirichlet allocation, NeurIPS 23.
    Taddy (2012), On estimation and selection for topic models, AISTATS 15 (the assignments summed out).
    Stephens (2000), Dealing with label switching in mixture models, Journal of the Royal Statistical Society B 62.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
from jax.scipy.special import xlogy
from numpyro.distributions import constraints

from models._bible import full_corpus, study_corpus
from models._simplex import NormalSimplexReparam
from toolkit import Dataset, Labels, Model, Quantity


class TokenCounts(dist.Distribution):
    """Multinomial word counts, with the density of the tokens in their order.

    NumPyro's Multinomial adds the coefficient that counts the orders. It depends on no parameter, yet would be
    a quarter of the cost of each gradient; and its draws need memory for every token of every word.

    Attributes:
        tokens: Tokens in each document, `(document,)`.
        probs: Probabilities of the words, `(document, word)`.
    """

    arg_constraints = {"tokens": constraints.nonnegative_integer, "probs": constraints.simplex}
    pytree_data_fields = ("tokens", "probs")

    def __init__(self, tokens: Any, probs: Any, *, validate_args: bool | None = None) -> None:
        self.tokens, self.probs = tokens, probs
        super().__init__(jnp.shape(probs)[:-1], jnp.shape(probs)[-1:], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> Any:
        """Whole numbers that add up to the tokens."""
        return constraints.multinomial(self.tokens)

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> Any:
        """Counts `(*sample_shape, document, word)`."""
        shape = sample_shape + jnp.shape(self.probs)
        tokens = jnp.broadcast_to(self.tokens, shape[:-1]).astype(self.probs.dtype)
        return jax.random.multinomial(key, tokens, jnp.broadcast_to(self.probs, shape)).astype(int)

    def log_prob(self, value: Any) -> Any:
        """Log probability of the tokens in their order, in nats, `(document,)`."""
        return xlogy(jnp.asarray(value, self.probs.dtype), self.probs).sum(-1)


def lda(tokens: Any, counts: Any = None, *, words: int, topics: int = 4, alpha: float = 1.0, eta: float = 1.0) -> None:
    """The NumPyro callable.

    Args:
        tokens: Tokens in each document, `(document,)`.
        counts: How often each document uses each word, `(document, word)`; drawn if not given.
        words: Size of the vocabulary.
        topics: How many topics.
        alpha: Dirichlet parameter of the topic shares of a document; above 1 pulls them together.
        eta: Dirichlet parameter of the word probabilities of a topic.
    """
    word_prior = dist.Dirichlet(jnp.full((topics, words), eta))
    topic_prior = dist.Dirichlet(jnp.full((tokens.shape[0], topics), alpha))
    with numpyro.plate("topic", topics):
        word_shares = numpyro.sample("topics", word_prior, infer={"event_dims": ["word"]})
    with numpyro.plate("document", tokens.shape[0]):
        theta = numpyro.sample("theta", topic_prior, infer={"event_dims": ["topic"]})
        occurring = TokenCounts(tokens, theta @ word_shares)
        numpyro.sample("counts", occurring, obs=counts, infer={"event_dims": ["word"]})
    numpyro.deterministic("share", tokens @ theta / tokens.sum())


CORPORA = {"study": study_corpus, "full": full_corpus}
MOST_SCALARS = 2_000


def dataset(*, documents: int = 60, words: int = 200) -> Dataset:
    """The study corpus: books of law, kings, poetry and gospels, cut into documents that NUTS can handle.

    Each of the four sections is cut into nearly equal runs of consecutive chapters, `documents` in all; the
    vocabulary is the sections' `words` most frequent ones, stop words left out. The whole Bible, for variational
    fits alone, is `model(corpus="full")`.

    Args:
        documents: How many documents; at least 4.
        words: Size of the vocabulary, at most 2,000.

    Raises:
        ValueError: A size is out of range, or a document would have fewer than 500 tokens of the vocabulary.
    """
    return study_corpus(documents=documents, words=words)


def simulate(key: jax.Array, *, documents: int = 60, words: int = 200, topics: int = 4, tokens: int = 500) -> Dataset:
    """A corpus drawn from the model with priors of 1, with the truth that made it.

    Args:
        key: Fixes truth and counts.
        documents: How many documents.
        words: Size of the vocabulary.
        topics: How many topics.
        tokens: Length of every document.

    Raises:
        ValueError: There are fewer than 2 words or topics, or no documents or tokens.
    """
    if min(words, topics) < 2 or min(documents, tokens) < 1:
        raise ValueError(
            "Expected at least 2 words and topics, 1 document and token; "
            f"got {words} words, {topics} topics, {documents} documents, {tokens} tokens."
        )
    seeded = numpyro.handlers.seed(lda, key)
    lengths = jnp.full(documents, tokens)
    drawn = numpyro.handlers.trace(seeded).get_trace(lengths, words=words, topics=topics)
    return Dataset(
        f"simulated_{topics}_topics",
        {"counts": np.asarray(drawn["counts"]["value"]).astype(np.int64)},
        coords={
            "word": np.array([f"word {w + 1}" for w in range(words)]),
            "document": np.array([f"document {d + 1}" for d in range(documents)]),
        },
        truth={name: np.asarray(drawn[name]["value"]) for name in ("topics", "theta", "share")},
        source=f"simulated: {documents} documents of {tokens} tokens, {words} words, {topics} topics",
        licence="none needed",
    )


def model(
    dataset: Dataset | None = None,
    *,
    topics: int = 4,
    alpha: float = 1.0,
    eta: float = 1.0,
    corpus: str = "study",
) -> Model:
    """The model on a corpus.

    Quantities are the topics' shares of the corpus, and, while there are no more than 2,000 numbers, each document's
    shares and each topic's word probabilities; beyond that ask for some by `focus`, or use `top_words`.

    Args:
        dataset: Array `counts` `(document, word)`; coords `document` and `word` if there are any.
        topics: How many topics.
        alpha: Dirichlet parameter of a document's shares.
        eta: Dirichlet parameter of a topic's word probabilities.
        corpus: Which part of the Bible if no dataset is given: `"study"` (as `dataset()`) or `"full"` (all chapters).

    Raises:
        ValueError: An option is out of range, or the counts are none.
    """
    if corpus not in CORPORA:
        raise ValueError(f"Expected corpus to be one of {', '.join(CORPORA)}; got '{corpus}'.")
    if topics < 2:
        raise ValueError(f"Expected at least 2 topics; got {topics}.")
    if not (alpha > 0 and eta > 0):
        raise ValueError(f"Expected positive Dirichlet parameters; got alpha {alpha} and eta {eta}.")
    if dataset is None:
        dataset = CORPORA[corpus]()
    counts = _checked(dataset)
    tokens = counts.sum(axis=1)
    static = {"words": counts.shape[1], "topics": topics, "alpha": alpha, "eta": eta}
    names = np.array([f"topic {k + 1}" for k in range(topics)])
    return Model(
        lda,
        replace(
            dataset,
            arrays={"tokens": tokens, "counts": counts},
            static=static,
            coords={**dataset.coords, "topic": names},
        ),
        quantities=_quantities(topics * (1 + sum(counts.shape))),
        labels=Labels(axes={"topics": -2, "theta": -1, "share": -1}, by="topics", count=topics),
        charts={"normal": {"theta": NormalSimplexReparam(), "topics": NormalSimplexReparam()}},
        chart="normal",
        title="Latent Dirichlet allocation",
        question="Which topics run through the texts, and how much of each is in which document?",
    )


def _quantities(scalars: int) -> tuple[Quantity, ...]:
    share = Quantity("share", "share of the corpus", "share of tokens", dims=("topic",))
    if scalars > MOST_SCALARS:
        return (share,)
    return (
        share,
        Quantity("theta", "share of the document", "share of tokens"),
        Quantity("topics", "probability of the word", "probability"),
    )


def _checked(data: Dataset) -> np.ndarray:
    if "counts" not in data.arrays:
        raise ValueError(
            f"Expected an array 'counts' in dataset '{data.name}'; it has {', '.join(data.arrays) or 'none'}."
        )
    counts = data.arrays["counts"]
    if counts.ndim != 2 or min(counts.shape) < 1:
        raise ValueError(f"Expected counts as (document, word); got shape {counts.shape}.")
    if (counts < 0).any() or (counts != np.round(counts)).any():
        raise ValueError("Expected counts that are whole numbers of 0 or more; got others among them.")
    empty = np.flatnonzero(counts.sum(axis=1) == 0)
    if len(empty):
        raise ValueError(
            f"Expected at least one token in every document; {len(empty)} have none, the first at row {empty[0]}: "
            "leave them out."
        )
    return counts.astype(np.int64)


def top_words(draws: np.ndarray, vocabulary: np.ndarray, count: int = 10) -> pd.DataFrame:
    """The most probable words of each topic, with the posterior's uncertainty; one row for each topic and rank.

    Columns: `topic` and `rank` (from 1, by posterior mean), `word`, `probability` (posterior mean) and `probability_se`
    (its Monte Carlo error), `low` and `high` (90 % interval), `in_top` (posterior probability that the word is among
    the topic's `count` most probable ones) and `in_top_se`. Where `in_top` is far from 1 the list's end is arbitrary.

    Args:
        draws: Relabelled draws of site `topics`, `(chain, draw, topic, word)`, or `(draw, topic, word)` if independent.
        vocabulary: The words, `(word,)`.
        count: How many words for each topic.

    Raises:
        ValueError: Shapes do not fit, or `count` is not between 1 and the size of the vocabulary.
    """
    draws = np.asarray(draws)
    if draws.ndim == 3:
        draws = draws[None]
    if draws.ndim != 4 or draws.shape[-1] != len(vocabulary):
        raise ValueError(
            f"Expected draws as (chain, draw, topic, word) with {len(vocabulary)} words; got shape {draws.shape}."
        )
    if not 1 <= count <= len(vocabulary):
        raise ValueError(f"Expected a count of 1 to {len(vocabulary)} words; got {count}.")
    return pd.concat([_topic_table(draws[:, :, k], np.asarray(vocabulary), k, count) for k in range(draws.shape[2])])


def _topic_table(draws: np.ndarray, vocabulary: np.ndarray, topic: int, count: int) -> pd.DataFrame:
    best = np.argsort(-draws.mean(axis=(0, 1)), kind="stable")[:count]
    chosen = draws[..., best]
    in_top = chosen >= np.partition(draws, -count, axis=-1)[..., [-count]]
    low, high = np.quantile(chosen, [0.05, 0.95], axis=(0, 1))
    return pd.DataFrame(
        {
            "topic": f"topic {topic + 1}",
            "rank": np.arange(1, count + 1),
            "word": vocabulary[best],
            "probability": chosen.mean(axis=(0, 1)),
            "probability_se": _mean_se(chosen),
            "low": low,
            "high": high,
            "in_top": in_top.mean(axis=(0, 1)),
            "in_top_se": _mean_se(in_top.astype(float)),
        }
    )


def _mean_se(draws: np.ndarray) -> np.ndarray:
    """Monte Carlo errors of the means of `(chain, draw, scalar)`; 0 for a scalar that never changes."""
    from arviz_stats.base import array_stats

    constant = np.ptp(draws, axis=(0, 1)) == 0
    noisy = array_stats.mcse(np.moveaxis(draws[..., ~constant], -1, 0), chain_axis=1, draw_axis=2, method="mean")
    se = np.zeros(draws.shape[-1])
    se[~constant] = noisy
    return se
