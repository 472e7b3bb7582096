"""Write bible.npz from the King James Bible: `python models/data/make_bible.py kjv.txt`.

The text is printed by the reader of Debian's packages bible-kjv and bible-kjv-text (release 4.38), one verse a line:

    apt-get install bible-kjv
    bible -f gen1:1-rev22:21 > kjv.txt

No system-wide installation is needed: unpack both packages with `dpkg -x` and run the reader in the folder that
holds bible.data. A document is a chapter. Words are runs of letters in lower case without a genitive's 's; those in
stop_words.txt are left out, and the `WORDS` most frequent ones of the rest are kept, ties in alphabetical order.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np

TARGET = Path(__file__).with_name("bible.npz")
WORDS = 2_000
CHAPTERS = 1_189
VERSE = re.compile(r"(?P<book>\d?[A-Za-z]+?)(?P<chapter>\d+):\d+ (?P<text>.*)")

# Pronouns, articles, prepositions, conjunctions, auxiliary verbs and a few adverbs, in the Bible's own spelling.
STOP_WORDS = frozenset(Path(__file__).with_name("stop_words.txt").read_text(encoding="ascii").split())

BOOKS = (
    "Genesis Exodus Leviticus Numbers Deuteronomy Joshua Judges Ruth 1_Samuel 2_Samuel 1_Kings 2_Kings 1_Chronicles "
    "2_Chronicles Ezra Nehemiah Esther Job Psalms Proverbs Ecclesiastes Song_of_Solomon Isaiah Jeremiah Lamentations "
    "Ezekiel Daniel Hosea Joel Amos Obadiah Jonah Micah Nahum Habakkuk Zephaniah Haggai Zechariah Malachi Matthew Mark "
    "Luke John Acts Romans 1_Corinthians 2_Corinthians Galatians Ephesians Philippians Colossians 1_Thessalonians "
    "2_Thessalonians 1_Timothy 2_Timothy Titus Philemon Hebrews James 1_Peter 2_Peter 1_John 2_John 3_John Jude "
    "Revelation"
)


def chapters(text: str) -> dict[str, list[str]]:
    """The words of each chapter in the order of the text; keys such as `"Genesis 1"`.

    Raises:
        ValueError: A line is not a verse, or the text is not the whole Bible.
    """
    names = [name.replace("_", " ") for name in BOOKS.split()]
    books: dict[str, str] = {}
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        verse = VERSE.fullmatch(line)
        if verse is None:
            raise ValueError(
                f"Expected lines such as 'Ge1:1 In the beginning'; got {line[:60]!r}: print with 'bible -f'."
            )
        # The reader abbreviates: its books come in the usual order, so that the n-th new one has the n-th full name.
        book = books.setdefault(verse["book"], names[min(len(books), len(names) - 1)])
        found.setdefault(f"{book} {verse['chapter']}", []).extend(
            re.findall("[a-z]+", verse["text"].lower().replace("'s", ""))
        )
    if len(found) != CHAPTERS or len(books) != len(names):
        raise ValueError(
            f"Expected {CHAPTERS} chapters of {len(names)} books; got {len(found)} of {len(books)}: "
            "print them with 'bible -f gen1:1-rev22:21'."
        )
    return found


def main(path: str) -> None:
    """Write the file beside this script: counts as sparse rows, vocabulary and titles."""
    words = chapters(Path(path).read_text(encoding="ascii"))
    totals = Counter(word for tokens in words.values() for word in tokens if word not in STOP_WORDS)
    vocabulary = [word for word, _ in sorted(totals.items(), key=lambda item: (-item[1], item[0]))[:WORDS]]
    index = {word: i for i, word in enumerate(vocabulary)}
    indptr, indices, counts = [0], [], []
    for tokens in words.values():
        row = sorted(Counter(index[word] for word in tokens if word in index).items())
        indices += [i for i, _ in row]
        counts += [count for _, count in row]
        indptr.append(len(indices))
    np.savez_compressed(
        TARGET,
        indptr=np.array(indptr, np.int32),
        indices=np.array(indices, np.int16),
        counts=np.array(counts, np.int16),
        vocabulary=np.array(vocabulary),
        titles=np.array(list(words)),
    )


if __name__ == "__main__":
    main(sys.argv[1])
