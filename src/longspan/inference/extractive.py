"""Answers as spans: any extractive question-answering model, over overlapping windows of documents of any length.

Shapes: B windows in a batch, N tokens of a window, M candidate spans.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.errors import DocumentError, NotFiniteError, QuestionError
from longspan.inference.batching import group_by_length
from longspan.inference.evidence import NO_TEXT
from longspan.inference.windows import Candidates, word_spans, words_around

ANSWER_TOKENS = 30  # the longest answer, as in SQuAD's own evaluation
SPANS_PER_WINDOW = 20
OVERLAP_TOKENS = 128  # between neighboring windows
LONGEST_WINDOW = 8192  # tokens; for models without a position limit, so that one window fits in memory
TOKENS_PER_BATCH = 8192


Span = tuple[int, int, int]  # document, start and end in characters


class Window(NamedTuple):
    """A stretch of a document behind the question, as the model reads it."""

    document: int
    inputs: dict[str, list[int]]
    is_context: list[bool]  # of every token: the document's, not the question's
    offsets: list[tuple[int, int]]  # of every token, in characters of the document


class SpanFinder:
    """The spans that answer a question, each with the passage around it.

    model: a transformers question-answering model, ids -> start_logits and end_logits [B, N]. tokenizer: a fast one.
    """

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        self.window_tokens = _window_tokens(model.config, tokenizer)
        # A checkpoint can hold a tokenizer that makes more than its model reads: DistilBERT's often gives token types.
        taken = inspect.signature(model.forward).parameters
        self.input_names = [name for name in tokenizer.model_input_names if name in taken]

    def candidates(
        self, question: str, texts: list[str], *, passage_words: int, progress: Callable[[int, int], None] | None = None
    ) -> Candidates:
        """Probabilities are the softmax of start + end logits over the best spans of all windows of all documents."""
        windows, tokens = self.windows(question, texts)
        logits = self.span_logits(windows, progress)
        spans = np.array(list(logits), dtype=np.int64)  # [M, 3]
        probability = torch.tensor(list(logits.values()), dtype=torch.float64).softmax(0).numpy()
        words, chars, words_before = np.empty((len(spans), 2), np.int64), np.empty((len(spans), 2), np.int64), 0
        for document, text in enumerate(texts):
            of_document = spans[:, 0] == document
            text_words = word_spans(text)
            around = words_around(text_words, spans[of_document, 1:], passage_words)
            words[of_document] = around + words_before
            chars[of_document, 0], chars[of_document, 1] = text_words[around[:, 0], 0], text_words[around[:, 1] - 1, 1]
            words_before += len(text_words)
        document, start, end = spans[probability.argmax()]
        return Candidates(spans[:, 0], words, chars, probability, texts[document][start:end], tokens)

    def span_logits(
        self, windows: list[Window], progress: Callable[[int, int], None] | None = None
    ) -> dict[Span, float]:
        """The best spans of all windows, with the larger start + end logit where two windows hold a span."""
        lengths = [len(window.offsets) for window in windows]
        done, logits = 0, {}
        for batch in group_by_length(lengths, max_tokens=TOKENS_PER_BATCH):
            for number, spans in zip(batch, self._best_spans([windows[number] for number in batch]), strict=True):
                window = windows[number]
                for first, last, logit in spans:
                    span = (window.document, window.offsets[first][0], window.offsets[last][1])
                    logits[span] = max(logit, logits.get(span, logit))
                done += lengths[number]
            if progress is not None:
                progress(done, sum(lengths))
        return logits

    def windows(self, question: str, texts: Sequence[str]) -> tuple[list[Window], int]:
        """Every window of every document, and the number of document tokens, overlaps counted once."""
        asked = len(self.tokenizer(question, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        if asked > self.window_tokens // 2:
            raise QuestionError(
                f"the question is {asked} tokens long, more than half of the {self.window_tokens} tokens that this "
                "model reads at once; ask a shorter question."
            )
        special = self.tokenizer.num_special_tokens_to_add(pair=True)
        room = self.window_tokens - asked - special
        overlap = min(OVERLAP_TOKENS, room // 2)
        windows, tokens = [], 0
        for document, text in enumerate(texts):
            encoded = self.tokenizer(
                question,
                text,
                truncation="only_second",
                max_length=self.window_tokens,
                stride=overlap,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
                split_special_tokens=True,
            )
            rows = len(encoded["input_ids"])
            for row in range(rows):
                offsets = encoded["offset_mapping"][row]
                of_document = encoded.sequence_ids(row)
                is_context = [of == 1 and end > start for of, (start, end) in zip(of_document, offsets, strict=True)]
                inputs = {name: encoded[name][row] for name in self.input_names}
                windows.append(Window(document, inputs, is_context, offsets))
                tokens += sum(is_context)
            tokens -= overlap * (rows - 1)
        if not any(any(window.is_context) for window in windows):
            raise DocumentError(NO_TEXT)
        return windows, tokens

    def _best_spans(self, batch: list[Window]) -> list[list[tuple[int, int, float]]]:
        """For each window its best (first token, last token, start + end logit)."""
        inputs = self.tokenizer.pad({name: [window.inputs[name] for window in batch] for name in batch[0].inputs})
        inputs = {name: torch.tensor(rows, device=self.model.device) for name, rows in inputs.items()}
        num_tokens = inputs["input_ids"].shape[1]
        output = self.model(**inputs)
        is_context = torch.zeros(len(batch), num_tokens, dtype=torch.bool)
        for row, window in enumerate(batch):
            is_context[row, : len(window.is_context)] = torch.tensor(window.is_context)
        start, end = (logits.float().cpu() for logits in (output.start_logits, output.end_logits))  # [B, N]
        if not (start[is_context].isfinite().all() and end[is_context].isfinite().all()):
            raise NotFiniteError("logits")
        return [_top_spans(*row) for row in zip(start, end, is_context, strict=True)]


def _top_spans(start: Tensor, end: Tensor, is_context: Tensor) -> list[tuple[int, int, float]]:
    """The best (first, last, start + end logit) with both ends in the document, `ANSWER_TOKENS` tokens at most."""
    hidden = ~is_context
    start, end = start.masked_fill(hidden, -torch.inf), end.masked_fill(hidden, -torch.inf)
    ends = F.pad(end, (0, ANSWER_TOKENS - 1), value=-torch.inf).unfold(0, ANSWER_TOKENS, 1)  # [N, ANSWER_TOKENS]
    logits, order = (start[:, None] + ends).flatten().topk(min(SPANS_PER_WINDOW, ends.numel()))
    first = order // ANSWER_TOKENS
    last = first + order % ANSWER_TOKENS
    spans = zip(first.tolist(), last.tolist(), logits.tolist(), strict=True)
    return [span for span in spans if span[2] != -torch.inf]


def _window_tokens(config: Any, tokenizer: Any) -> int:
    """How many tokens the model reads at once."""
    limits = [LONGEST_WINDOW, tokenizer.model_max_length]
    if config.model_type == "longspan":
        limits.append(config.embeddings_config.max_tokens)
    else:
        # RoBERTa's relatives keep 2 more rows than they read tokens: 514, 4098. The lengths are multiples of 8.
        positions = getattr(config, "max_position_embeddings", None)
        limits.append(positions and positions - positions % 8)
    return min(limit for limit in limits if limit)
