"""Documents and questions with known evidence, as arrays: what the evidence reader learns and is judged on.

The data folder holds `boolq_articles`, `fever` and `multirc` in ERASER's format (DeYoung et al. 2020) and `xquad` in
SQuAD's. A word is what `str.split()` gives; evidence is a range of words. W words, T tokens, A articles, S sentences.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longspan.inference.windows import word_spans

Array = NDArray[Any]

SOURCES = ("boolq_articles", "fever", "multirc", "xquad")
# FEVER and MultiRC keep the treebank's spelling of brackets and quotes; people's documents do not.
TREEBANK = {"-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "-COLON-": ":", "``": '"', "''": '"'}
SHINGLE = 8  # words
ANSWER_CONTEXT = 12  # words kept on each side of an xquad answer


@dataclass(frozen=True, kw_only=True)
class Articles:
    """Every document of a data folder as words and tokens, in flat arrays (memory maps when read from a cache).

    names: "source/id" per article. first_word [A + 1], first_token [W + 1], first_sentence [S + 1] (indices of words).
    words [W] are rows of `vocabulary`. tokens [T] are word pieces. idf [V]: inverse document frequency per word piece.
    repeats_dev [A]: shares at least a tenth of its 8-word sequences with the evaluation articles, or is one.
    """

    names: list[str]
    vocabulary: list[str]
    first_word: Array
    words: Array
    first_token: Array
    tokens: Array
    sentences: Array
    idf: Array
    repeats_dev: Array

    @property
    def index(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def bounds(self, article: int) -> tuple[int, int]:
        """First word and the word after the last, in the flat array."""
        return int(self.first_word[article]), int(self.first_word[article + 1])

    def tokens_of(self, start: int, end: int) -> Array:
        """Word pieces of words start..end (flat indices). [n]"""
        return self.tokens[self.first_token[start] : self.first_token[end]]

    def texts_of(self, start: int, end: int) -> list[str]:
        return [self.vocabulary[word] for word in self.words[start:end]]

    def sentence_starts(self, start: int, end: int) -> Array:
        """Words of start..end (flat indices) that open a sentence; `start` always does."""
        first, last = np.searchsorted(self.sentences, (start + 1, end))
        return np.concatenate(([start], self.sentences[first:last]))


@dataclass(frozen=True, kw_only=True)
class EvidenceRow:
    """A question about an article. evidence [G, 2]: word ranges within the article, end exclusive."""

    id: str
    source: str
    question: str
    article: int
    evidence: Array

    @property
    def starts_late(self) -> bool:
        """No evidence begins in the first 380 words."""
        return int(self.evidence[:, 0].min()) > 380


def load_articles(data: str | Path, cache: str | Path, tokenizer: Any) -> Articles:
    """All articles under `data`, tokenized once and kept under `cache`.

    Raises FileNotFoundError naming what is missing.
    """
    cache = Path(cache)
    if not (cache / "names.json").exists():
        _build(Path(data), cache, tokenizer)
    arrays = ("first_word", "words", "first_token", "tokens", "sentences", "idf", "repeats_dev")
    return Articles(
        names=json.loads((cache / "names.json").read_text()),
        vocabulary=json.loads((cache / "vocabulary.json").read_text()),
        **{name: np.load(cache / f"{name}.npy", mmap_mode="r") for name in arrays},
    )


def load_rows(data: str | Path, articles: Articles, source: str, split: str) -> list[EvidenceRow]:
    """Rows of one split with evidence in a known article; repeated questions on the same evidence are kept once."""
    path = _existing(Path(data) / source / f"{split}.jsonl", Path(data) / source / f"{split}.jsonl.xz")
    index, rows = articles.index, {}
    for record in _records(path):
        article = index.get(f"{source}/{record['docids'][0]}") if record["docids"] else None
        if article is None:
            continue
        start, end = articles.bounds(article)
        spans = sorted((s["start_token"], s["end_token"]) for group in record["evidences"] for s in group)
        spans = _merged([(first, min(last, end - start)) for first, last in spans if first < min(last, end - start)])
        question = record["query"].split("||")[0].strip()
        if source == "fever":
            question = " ".join(plain_words(question.rstrip(" .")))
        if spans:
            key = (question, article, tuple(spans)) if source == "multirc" else record["id"]
            rows.setdefault(
                key,
                EvidenceRow(
                    id=record["id"], source=source, question=question, article=article, evidence=np.array(spans)
                ),
            )
    return list(rows.values())


def load_xquad_rows(data: str | Path, articles: Articles) -> list[EvidenceRow]:
    """SQuAD-style questions; the evidence is the answer and the dozen words on either side of it."""
    index, rows = articles.index, []
    for document in _xquad(Path(data)):
        article, offset = index[f"xquad/{document['title']}"], 0
        for paragraph in document["paragraphs"]:
            spans = word_spans(paragraph["context"])
            for question in paragraph["qas"]:
                answer = question["answers"][0]
                first = int(np.searchsorted(spans[:, 1], answer["answer_start"], "right"))
                last = int(np.searchsorted(spans[:, 0], answer["answer_start"] + len(answer["text"])))
                evidence = (max(0, first - ANSWER_CONTEXT), min(len(spans), last + ANSWER_CONTEXT))
                rows.append(
                    EvidenceRow(
                        id=question["id"],
                        source="xquad",
                        question=question["question"],
                        article=article,
                        evidence=np.array([evidence]) + offset,
                    )
                )
            offset += len(spans)
    return rows


def plain_words(text: str) -> list[str]:
    """The words of a text, with brackets and quotes for the treebank's names of them."""
    return [str(TREEBANK.get(word, word)) for word in text.split()]


def title_of(articles: Articles, article: int) -> list[str]:
    """The words of an article's title: boolq_articles print it in capitals before the text."""
    start, end = articles.bounds(article)
    words = articles.texts_of(start, min(end, start + 12))
    length = next((i for i, word in enumerate(words) if word.upper() != word), len(words))
    return words[:length]


def interval_iou(windows: Array, evidence: Array) -> Array:
    """Intersection over union of every window [M, 2] with every evidence span [G, 2] -> [M, G]."""
    windows, evidence = np.asarray(windows), np.asarray(evidence)
    shared = np.minimum(windows[:, None, 1], evidence[None, :, 1]) - np.maximum(
        windows[:, None, 0], evidence[None, :, 0]
    )
    shared = shared.clip(min=0)
    lengths = (windows[:, 1] - windows[:, 0])[:, None] + (evidence[:, 1] - evidence[:, 0])[None]
    return shared / np.maximum(lengths - shared, 1)


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted spans with those that touch made one: neighboring evidence sentences are one passage."""
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _existing(*paths: Path) -> Path:
    for path in paths:
        if path.exists():
            return path
    raise FileNotFoundError(f"no {paths[0].name} in {paths[0].parent}: give a data folder that holds {paths[0]}")


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _xquad(data: Path) -> list[dict[str, Any]]:
    return json.loads(_existing(data / "xquad" / "xquad.en.json").read_text(encoding="utf-8"))["data"]


def _documents(data: Path) -> Iterator[tuple[str, list[list[str]]]]:
    """("source/id", sentences as lists of words) of every article."""
    for source in SOURCES[:-1]:
        for record in _records(_existing(data / source / "docs.jsonl", data / source / "docs.jsonl.xz")):
            lines = map(plain_words, record["text"].split("\n"))
            yield f"{source}/{record['id']}", [line for line in lines if line]
    for document in _xquad(data):
        yield f"xquad/{document['title']}", [paragraph["context"].split() for paragraph in document["paragraphs"]]


def _build(data: Path, cache: Path, tokenizer: Any) -> None:
    names: list[str] = []
    first_word, parts, sentences = [0], [], []
    number: dict[str, int] = {}
    for name, lines in _documents(data):
        names.append(name)
        lengths = [len(line) for line in lines]
        sentences.append(first_word[-1] + np.cumsum([0, *lengths[:-1]]))
        parts.append(np.array([number.setdefault(word, len(number)) for line in lines for word in line], np.int32))
        first_word.append(first_word[-1] + sum(lengths))
    words, vocabulary = np.concatenate(parts), list(number)

    pieces: list[list[int]] = []
    for start in range(0, len(vocabulary), 50_000):
        pieces += tokenizer(vocabulary[start : start + 50_000], add_special_tokens=False, verbose=False)["input_ids"]
    lengths = np.array([len(piece) for piece in pieces])
    flat = np.array([token for piece in pieces for token in piece], np.uint16)
    first_token = np.concatenate(([0], np.cumsum(lengths[words])))
    piece_starts = np.cumsum(lengths) - lengths
    within = np.arange(first_token[-1]) - np.repeat(first_token[:-1], lengths[words])
    tokens = flat[np.repeat(piece_starts[words], lengths[words]) + within]

    bounds = np.array(first_word)
    frequency = np.zeros(len(tokenizer))
    for start, end in pairwise(bounds):
        frequency[np.unique(tokens[first_token[start] : first_token[end]])] += 1
    arrays = {
        "first_word": bounds,
        "words": words,
        "first_token": first_token,
        "tokens": tokens,
        "sentences": np.concatenate(sentences),
        "idf": np.log(1 + (len(names) - frequency + 0.5) / (frequency + 0.5)),  # Robertson and Zaragoza 2009, eq. 3.3
        "repeats_dev": _repeats(data, names, bounds, words),
    }
    cache.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(cache / f"{name}.npy", array)
    (cache / "vocabulary.json").write_text(json.dumps(vocabulary))
    (cache / "names.json").write_text(json.dumps(names))  # last: its presence says that the cache is complete


def _repeats(data: Path, names: list[str], bounds: Array, words: Array) -> Array:
    """Which articles are evaluation articles or repeat one: by id, or by a tenth of their 8-word sequences."""
    dev = {f"boolq_articles/{record['docids'][0]}" for record in _records(_existing(data / "boolq_articles/dev.jsonl"))}
    held = np.array([name in dev for name in names])
    hashes = np.zeros(max(0, len(words) - SHINGLE + 1), np.uint64)
    for offset in range(SHINGLE):
        hashes = hashes * np.uint64(6364136223846793005) + words[offset : offset + len(hashes)].astype(np.uint64)
    article = np.repeat(np.arange(len(names)), np.diff(bounds))[: len(hashes)]
    known = np.unique(hashes[held[article]])
    place = np.searchsorted(known, hashes).clip(max=max(0, len(known) - 1))
    seen = known[place] == hashes if len(known) else np.zeros(len(hashes), bool)
    share = np.bincount(article, seen, len(names)) / np.maximum(1, np.bincount(article, minlength=len(names)))
    return held | (share >= 0.1)
