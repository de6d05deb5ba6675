"""Words, tokens and candidate passages of a document, as arrays. W words, T tokens, M windows.

A word is a run of characters between whitespace, as in `str.split()`. All is numpy, and linear in the text's length.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

IntArray = NDArray[np.int64]

_WORD = re.compile(r"\S+")


class Candidates(NamedTuple):
    """Passages of several documents as a model has judged them. M passages.

    document: [M], which document. words: [M, 2], word range; the words of all documents are numbered through.
    chars: [M, 2], character range in the document. probability: [M]. answer: the text of the best answer, if the model
    gives any. tokens: how many tokens of the documents were read.
    """

    document: IntArray
    words: IntArray
    chars: IntArray
    probability: NDArray[np.float64]
    answer: str | None
    tokens: int


def word_spans(text: str) -> IntArray:
    """Character range (start, end exclusive) of every whitespace word. [W, 2]"""
    return np.array([match.span() for match in _WORD.finditer(text)], dtype=np.int64).reshape(-1, 2)


def tokenize_words(tokenizer: Any, text: str) -> tuple[IntArray, IntArray, IntArray]:
    """Token ids of `text`, word by word: (token_ids [T], first_token_of_word [W + 1], word_char_spans [W, 2]).

    Word w owns tokens `first_token_of_word[w]` up to `first_token_of_word[w + 1]`: none where the tokenizer drops all
    of its characters. Each distinct word is tokenized once, with a space before it as inside running text. No special
    tokens are added, and text that spells one, such as "[SEP]", is read as plain text.
    """
    spans = word_spans(text)
    number: dict[str, int] = {}
    which = np.array([number.setdefault(word, len(number)) for word in text.split()], dtype=np.int64)
    if not number:
        return np.empty(0, np.int64), np.zeros(1, np.int64), spans
    pieces = tokenizer(
        [f" {word}" for word in number],
        add_special_tokens=False,
        split_special_tokens=True,
        truncation=False,
        padding=False,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]
    piece_lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
    piece_starts = np.cumsum(piece_lengths) - piece_lengths
    vocabulary = np.array([token for piece in pieces for token in piece], dtype=np.int64)

    lengths = piece_lengths[which]
    first_token_of_word = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    within_word = np.arange(first_token_of_word[-1]) - np.repeat(first_token_of_word[:-1], lengths)
    return vocabulary[np.repeat(piece_starts[which], lengths) + within_word], first_token_of_word, spans


def candidate_windows(num_words: int, length: int = 100, stride: int = 10) -> IntArray:
    """Word ranges (start, end exclusive) of the passages to score: `length` words every `stride`. [M, 2]

    The last one ends with the document; a document shorter than `length` is one window, an empty one has none.
    """
    if length < 1 or stride < 1:
        raise ValueError(f"length and stride are numbers of words, at least 1; got length={length}, stride={stride}.")
    if num_words < 1:
        return np.empty((0, 2), np.int64)
    last = max(0, num_words - length)
    starts = np.append(np.arange(0, last, stride, dtype=np.int64), last)
    return np.stack([starts, np.minimum(starts + length, num_words)], axis=1)


def words_around(words: IntArray, chars: IntArray, length: int = 100) -> IntArray:
    """Word ranges of `length` words around the character ranges `chars` [M, 2]. [M, 2]

    words: the document's `word_spans`. The range stands in the middle, or nearer to an end where the text ends; of one
    longer than `length` the first words are kept.
    """
    first = np.searchsorted(words[:, 0], chars[:, 0], side="right") - 1
    last = np.searchsorted(words[:, 0], chars[:, 1], side="left") - 1
    start = first - np.maximum(0, length - (last - first + 1)) // 2
    start = np.clip(start, 0, max(0, len(words) - length))
    return np.stack([start, np.minimum(start + length, len(words))], axis=1)


def select_disjoint(windows: ArrayLike, scores: ArrayLike, top: int) -> list[int]:
    """Indices of the `top` best windows of which no two overlap, best first; fewer where no more fit.

    Greedy: the best score, then the best of those that do not overlap it, and so on; the earlier window wins a tie. A
    score of -inf is never chosen.
    """
    windows = np.asarray(windows)
    left = np.array(scores, dtype=np.float64)
    chosen: list[int] = []
    while len(chosen) < top and left.size:
        best = int(left.argmax())
        if left[best] == -np.inf:
            break
        chosen.append(best)
        start, end = windows[best]
        left[(windows[:, 0] < end) & (windows[:, 1] > start)] = -np.inf
    return chosen
