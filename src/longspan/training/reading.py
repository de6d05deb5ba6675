"""Whole documents put to the reader, and the hits it is judged by, in training (held-out questions) as on dev."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from longspan.inference.evidence import uses_bf16
from longspan.inference.windows import candidate_windows
from longspan.training.evidence_rows import Array, Articles, EvidenceRow, interval_iou

BURIED_WORDS = 6000
HIT_IOU = 0.1
LENGTH, STRIDE = 100, 10  # words of a candidate passage, words between two
LONGEST_QUESTION = 48  # tokens
Condition = Literal["as_is", "buried"]


class Document(NamedTuple):
    """What is read for a question.

    pieces: flat word ranges of the collection. token_ids [T]; first_token [W + 1]; evidence [G, 2] in words.
    """

    pieces: list[tuple[int, int]]
    token_ids: Array
    first_token: Array
    evidence: Array

    @property
    def num_words(self) -> int:
        return len(self.first_token) - 1

    def cut(self, max_tokens: int) -> Document:
        """The whole words among the first `max_tokens` tokens; the evidence stays where it is, within reach or not."""
        words = int(np.searchsorted(self.first_token, max_tokens, "right")) - 1
        return self._replace(
            token_ids=self.token_ids[: self.first_token[words]], first_token=self.first_token[: words + 1]
        )


def document_of(
    articles: Articles, row: EvidenceRow, condition: Condition, *, seed: int = 0, fillers: Array | None = None
) -> Document:
    """The article of a question, alone or "buried" behind exactly 6,000 words of others drawn for this question.

    fillers: articles to draw from; all of the boolq_articles when None. The draw depends on seed and the question's
    id only.
    """
    pieces = [articles.bounds(row.article)]
    offset = 0
    if condition == "buried":
        if fillers is None:
            fillers = np.array([i for i, name in enumerate(articles.names) if name.startswith("boolq_articles/")])
        rng = np.random.default_rng((seed, *row.id.encode()))
        before: list[tuple[int, int]] = []
        while offset < BURIED_WORDS:
            article = int(rng.choice(fillers))
            if article == row.article:
                continue
            start, stop = articles.bounds(article)
            before.append((start, min(stop, start + BURIED_WORDS - offset)))
            offset += before[-1][1] - start
        pieces = before + pieces
    lengths = np.concatenate([np.diff(articles.first_token[start : end + 1]) for start, end in pieces])
    return Document(
        pieces=pieces,
        token_ids=np.concatenate([articles.tokens_of(start, end) for start, end in pieces]).astype(np.int64),
        first_token=np.concatenate(([0], np.cumsum(lengths))),
        evidence=row.evidence + offset,
    )


def token_spans(first_token: Array, windows: Array) -> torch.Tensor:
    """Word ranges [M, 2] as ranges of tokens, none of them empty."""
    spans = first_token[windows]
    last = max(1, int(first_token[-1]))
    spans[:, 0] = spans[:, 0].clip(max=last - 1)
    spans[:, 1] = np.maximum(spans[:, 1], spans[:, 0] + 1)
    return torch.from_numpy(spans)


def score_document(model: Any, question_ids: Array, document: Document) -> tuple[Array, Array]:
    """(candidate windows in words [M, 2], the parts of their scores [3, M], see `LongspanForEvidence.score_parts`)."""
    windows = candidate_windows(document.num_words, LENGTH, STRIDE)
    parts = model.score_parts(
        torch.from_numpy(question_ids), torch.from_numpy(document.token_ids), token_spans(document.first_token, windows)
    )
    return windows, parts.numpy()


def hits(passages: Array, evidence: Array) -> tuple[bool, bool]:
    """Does the first, and does any of the first three passages [P, 2] overlap a piece of evidence with IoU >= 0.1?"""
    if not len(passages):
        return False, False
    found = interval_iou(passages, evidence).max(1) >= HIT_IOU
    return bool(found[0]), bool(found[:3].any())


def tokenize_question(tokenizer: Any, question: str) -> Array:
    """Token ids with the special tokens around them, cut to LONGEST_QUESTION. [Q]"""
    return np.array(tokenizer(question, truncation=True, max_length=LONGEST_QUESTION)["input_ids"])


def summarize(found: Sequence[tuple[bool, bool]], late: Sequence[bool]) -> dict[str, float | None]:
    """Means of `hits` over all questions and over the late ones; None where there is no question."""
    values, is_late = np.array(found, float).reshape(-1, 2), np.array(late, bool)
    means = {"": values, "late_": values[is_late]}
    return {
        f"{prefix}top{k}": round(float(part[:, column].mean()), 4) if len(part) else None
        for prefix, part in means.items()
        for column, k in ((0, 1), (1, 3))
    }


def read_held_out(
    model: Any,
    articles: Articles,
    tokenizer: Any,
    rows: Sequence[EvidenceRow],
    *,
    bf16: bool | None = None,
    conditions: Sequence[Condition] = ("as_is",),
    fillers: Array | None = None,
) -> Iterator[tuple[EvidenceRow, Document, Array, Array]]:
    """(row, document, candidate windows [M, 2], parts of their scores [3, M]) of every question and condition.

    bf16: None for where the processor has instructions for it.
    """
    was_training = model.training
    model.eval()
    for row in rows:
        question_ids = tokenize_question(tokenizer, row.question)
        for condition in conditions:
            document = document_of(articles, row, condition, fillers=fillers)
            with torch.autocast("cpu", torch.bfloat16, enabled=uses_bf16(bf16, torch.device("cpu"))):
                windows, parts = score_document(model, question_ids, document)
            yield row, document, windows, parts
    model.train(was_training)


def fit_calibration(features: Array, labels: Array) -> list[float]:
    """Weights [F + 1] of a logistic regression, bias last, by Newton's method. features [n, F], labels Bool[n]."""
    inputs = np.hstack((features, np.ones((len(features), 1))))
    weights = np.zeros(inputs.shape[1])
    for _ in range(50):
        predicted = 1 / (1 + np.exp(-inputs @ weights))
        gradient = inputs.T @ (predicted - labels) + 1e-3 * weights
        curvature = (inputs * (predicted * (1 - predicted))[:, None]).T @ inputs + 1e-3 * np.eye(len(weights))
        weights -= np.linalg.solve(curvature, gradient)
    return [float(weight) for weight in weights]


def predict(weights: Sequence[float], features: Array) -> Array:
    """Probabilities [n] of such a regression."""
    return 1 / (1 + np.exp(-(features @ np.array(weights[:-1]) + weights[-1])))


def calibration_error(probabilities: Array, labels: Array, bins: int = 10) -> float:
    """Expected calibration error (Naeini et al. 2015) over bins of equal counts (Nguyen and O'Connor 2015)."""
    order = np.argsort(probabilities)
    parts = np.array_split(order, bins)
    gaps = [abs(probabilities[part].mean() - labels[part].mean()) * len(part) for part in parts if len(part)]
    return float(sum(gaps) / len(labels))
