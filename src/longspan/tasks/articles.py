"""Articles as text8 is written, lower-case letters and spaces, in splits that share no article."""

from __future__ import annotations

import json
import lzma
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from longspan.models.convert import whole_or_absent

DIGITS = "zero one two three four five six seven eight nine".split()  # noqa: SIM905
_SPELLED = {str(number): f" {word} " for number, word in enumerate(DIGITS)}
_COMBINING, _OUTSIDE = re.compile("[\u0300-\u036f]+"), re.compile("[^a-z]+")

LONG_SENTENCE = 40  # characters; shorter ones, headings and the like, stand in articles that share nothing else


def text8_alphabet(text: str) -> str:
    """The text in a to z and single spaces: digits spelled out, accents dropped, everything else a space.

    As Mahoney's script made text8 of Wikipedia, but for letters with accents, which that script makes spaces.
    """
    text = _COMBINING.sub("", unicodedata.normalize("NFKD", text)).lower()
    return _OUTSIDE.sub(" ", text.translate(str.maketrans(_SPELLED))).strip()


def read_articles(path: str | Path) -> Iterator[str]:
    """The texts of a file of {"id", "text"} lines, .jsonl or .jsonl.xz; a sentence a line.

    FileNotFoundError says what is wanted, ValueError which line is not such a record.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}: give the articles to learn from, one JSON record with an id and a text a line, "
            f"as .jsonl or .jsonl.xz (such as docs.jsonl of ERASER's BoolQ, which holds whole Wikipedia articles)"
        )
    opened = lzma.open if path.suffix == ".xz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"line {number} of {path} is no JSON record with a text: {line[:80]!r}") from error


def write_splits(
    articles: str | Path,
    folder: str | Path,
    *,
    share: float = 0.025,
    megabytes: float | None = None,
    seed: int = 0,
    tell: Callable[[str], None] = lambda line: None,
) -> Path:
    """train.txt, dev.txt and test.txt in `folder`, in text8's alphabet, made once.

    Articles are drawn by `seed`: dev and test get `share` of the characters each. An article that has a tenth of its
    long sentences in one of theirs, or that has its title, is left out of training, and of dev where it repeats test.
    megabytes: characters of training text at most; None for all.
    """
    folder = Path(folder)
    if folder.is_dir():
        return folder
    texts = list(read_articles(articles))
    if len(texts) < 3:
        raise ValueError(
            f"{articles} holds {len(texts)} articles; three splits need 3 at least, and many more to mean much"
        )
    order = np.random.default_rng(seed).permutation(len(texts))
    whole = sum(map(len, texts))
    taken: list[str] = []
    titles: set[str] = set()
    sentences: set[int] = set()
    made: dict[str, list[str]] = {"test": [], "dev": [], "train": []}
    left_out, place = 0, 0
    for split in made:
        size, most = 0, share * whole if split != "train" else (np.inf if megabytes is None else megabytes * 1e6)
        mine: list[tuple[str, list[int]]] = []
        last = len(order) - {"test": 2, "dev": 1, "train": 0}[split]  # at least one article for each split
        while place < last and (size < most or not mine):
            text = texts[order[place]]
            place += 1
            title, _, body = text.partition("\n")
            long = [_hash_of(line) for line in body.split("\n") if len(line) >= LONG_SENTENCE]
            known = sum(sentence in sentences for sentence in long)
            if title in titles or known > 0.1 * len(long):
                left_out += 1
                continue
            made[split].append(text8_alphabet(text))
            size += len(made[split][-1]) + 1
            mine.append((title, long))
        if not mine:
            raise ValueError(f"no article is left for {split}: they repeat each other, or there are too few")
        titles.update(title for title, _ in mine)
        sentences.update(sentence for _, long in mine for sentence in long)
        taken.append(f"{split} {len(mine):,} articles, {size / 1e6:,.2f} M characters")
    tell(f"text: {'; '.join(reversed(taken))}; {left_out:,} articles that repeat one of dev or test left out")
    with whole_or_absent(folder) as writing:
        for split, parts in made.items():
            text = " ".join(parts)
            if megabytes is not None and split == "train":
                text = text[: int(megabytes * 1e6)]
            (writing / f"{split}.txt").write_text(text, encoding="ascii")
    return folder


def _hash_of(sentence: str) -> int:
    """Of a sentence without its spaces and case, so that copies with other tokens are found."""
    return hash("".join(sentence.lower().split()))
