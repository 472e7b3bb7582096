"""The King James Bible as word counts: four kinds of books in few long documents, or every chapter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy import sparse

from toolkit import Dataset

# Books of four kinds, so that four topics have something to tell apart.
SECTIONS = {
    "law": ("Exodus", "Leviticus", "Numbers", "Deuteronomy"),
    "kings": ("1 Samuel", "2 Samuel", "1 Kings", "2 Kings"),
    "poetry": ("Job", "Psalms", "Proverbs"),
    "gospels": ("Matthew", "Mark", "Luke", "John"),
}
LEAST_TOKENS = 500

_FILE = Path(__file__).parent / "data" / "bible.npz"


def study_corpus(*, documents: int = 60, words: int = 200) -> Dataset:
    """The study corpus: books of law, kings, poetry and gospels, cut into documents that NUTS can handle.

    Each of the four sections is cut into nearly equal runs of consecutive chapters, `documents` in all; the
    vocabulary is the sections' `words` most frequent ones, stop words left out.

    Args:
        documents: How many documents; at least 4.
        words: Size of the vocabulary, at most 2,000.

    Raises:
        ValueError: A size is out of range, or a document would have fewer than 500 tokens of the vocabulary.
    """
    chapters, vocabulary, titles = _chapters()
    if documents < len(SECTIONS):
        raise ValueError(f"Expected at least {len(SECTIONS)} documents, one for each section; got {documents}.")
    books = np.array([title.rsplit(" ", 1)[0] for title in titles])
    sections = [np.flatnonzero(np.isin(books, names)) for names in SECTIONS.values()]
    kept = _most_frequent(chapters[np.concatenate(sections)], words)
    sizes = [len(part) for part in np.array_split(np.arange(documents), len(sections))]
    runs = [run for rows, size in zip(sections, sizes, strict=True) for run in _runs(rows, chapters[:, kept], size)]
    counts = np.array([chapters[run][:, kept].sum(axis=0) for run in runs])
    if counts.sum(axis=1).min() < LEAST_TOKENS:
        raise ValueError(
            f"Expected documents of {LEAST_TOKENS} tokens or more; {documents} documents of {words} words "
            f"leave one with {counts.sum(axis=1).min()}: ask for fewer documents or more words."
        )
    return _bible("bible_sections", counts, vocabulary[kept], np.array([_run_title(titles[run]) for run in runs]))


def full_corpus(*, words: int = 2_000) -> Dataset:
    """The whole Bible: each of the 1,189 chapters is a document. For variational fits alone.

    Raises:
        ValueError: `words` is not between 2 and 2,000.
    """
    chapters, vocabulary, titles = _chapters()
    kept = _most_frequent(chapters, words)
    return _bible("bible", chapters[:, kept], vocabulary[kept], titles)


def _chapters() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with np.load(_FILE, allow_pickle=False) as file:
        vocabulary, titles = file["vocabulary"], file["titles"]
        rows = sparse.csr_matrix(
            (file["counts"].astype(np.int64), file["indices"], file["indptr"]), (len(titles), len(vocabulary))
        )
    return rows.toarray(), vocabulary, titles


def _most_frequent(counts: np.ndarray, words: int) -> np.ndarray:
    if not 2 <= words <= counts.shape[1]:
        raise ValueError(f"Expected a vocabulary of 2 to {counts.shape[1]} words; got {words}.")
    return np.sort(np.argsort(-counts.sum(axis=0), kind="stable")[:words])


def _runs(rows: np.ndarray, counts: np.ndarray, size: int) -> list[np.ndarray]:
    """Consecutive chapters in `size` runs of nearly equal length: a chapter goes where its middle falls."""
    tokens = counts[rows].sum(axis=1)
    middle = (np.cumsum(tokens) - tokens / 2) / tokens.sum()
    return [rows[(middle * size).astype(int) == run] for run in range(size)]


def _run_title(titles: np.ndarray) -> str:
    (first, start), (last, end) = (title.rsplit(" ", 1) for title in titles[[0, -1]])
    if first != last:
        return f"{titles[0]} to {titles[-1]}"
    return f"{first} {start}" if start == end else f"{first} {start}-{end}"


def _bible(name: str, counts: np.ndarray, vocabulary: np.ndarray, titles: np.ndarray) -> Dataset:
    return Dataset(
        name,
        {"counts": counts},
        coords={"word": vocabulary, "document": titles},
        source="King James Bible, word counts by chapter, from Debian's bible-kjv-text 4.38",
        licence="public domain (text of 1611; a Crown patent is claimed within the United Kingdom)",
    )
