"""Answers as passages: the evidence reader scores windows of words over whole documents.

Shapes: T tokens of a document, M windows of words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longspan.errors import DocumentError, NotFiniteError, QuestionError
from longspan.inference.windows import Candidates, IntArray, candidate_windows, tokenize_words
from longspan.models.packed import PRECISIONS, Precision

STRIDE_WORDS = 10  # between the starts of neighboring windows
NO_TEXT = "the documents hold no text that this model's tokenizer knows."


class Reading(NamedTuple):
    """A document as the model reads it. token_ids [T]. words, chars, spans [M, 2]: the candidate windows, as ranges of
    words, characters and tokens."""

    token_ids: IntArray
    words: IntArray
    chars: IntArray
    spans: IntArray
    num_words: int


class EvidenceFinder:
    """The windows of words that hold the evidence for an answer.

    model: a `LongspanForEvidence`, packed or not. tokenizer: the one it was trained with.
    """

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        embeddings = model.config.embeddings_config
        self.window_tokens = embeddings.position_period or embeddings.max_tokens

    def candidates(
        self, question: str, texts: list[str], *, passage_words: int, progress: Callable[[int, int], None] | None = None
    ) -> Candidates:
        """Reads each document in one pass, however long. Probabilities are the model's own, calibrated ones."""
        question_ids = self.tokenize_question(question)
        readings = [self.prepare(text, passage_words) for text in texts]
        total = sum(len(reading.token_ids) for reading in readings)

        documents, words, chars, scores = [], [], [], []
        done, words_before = 0, 0
        for document, reading in enumerate(readings):
            if len(reading.spans):
                report = progress and (lambda read, of, done=done: progress(done + read, total))
                ids, spans = (
                    torch.from_numpy(part).to(question_ids.device) for part in (reading.token_ids, reading.spans)
                )
                scores.append(self.model.score_windows(question_ids, ids, spans, progress=report))
                documents.append(np.full(len(spans), document))
                words.append(reading.words + words_before)
                chars.append(reading.chars)
            done, words_before = done + len(reading.token_ids), words_before + reading.num_words
        if not scores:
            raise DocumentError(NO_TEXT)
        logits = torch.cat(scores)  # [M]
        if not logits.isfinite().all():
            raise NotFiniteError("scores")
        probability = self.model.passage_probability(logits).double().cpu().numpy()
        return Candidates(
            np.concatenate(documents), np.concatenate(words), np.concatenate(chars), probability, None, total
        )

    def tokenize_question(self, question: str) -> Tensor:
        """Token ids with the special tokens around them, Long[Q]. Raises QuestionError where they are too many."""
        asked = self.tokenizer(question, split_special_tokens=True, truncation=False, verbose=False)["input_ids"]
        if len(asked) > self.window_tokens // 2:
            raise QuestionError(
                f"the question is {len(asked)} tokens long, more than half of the {self.window_tokens} tokens of this "
                "model's window; ask a shorter question."
            )
        return torch.tensor(asked, device=self.model.device)

    def prepare(self, text: str, passage_words: int) -> Reading:
        token_ids, first_token_of_word, text_words = tokenize_words(self.tokenizer, text)
        windows = candidate_windows(len(text_words), passage_words, STRIDE_WORDS)
        spans = first_token_of_word[windows]  # [M, 2]
        windows, spans = (ranges[spans[:, 0] < spans[:, 1]] for ranges in (windows, spans))
        chars = np.stack([text_words[windows[:, 0], 0], text_words[windows[:, 1] - 1, 1]], axis=1)
        return Reading(token_ids, windows, chars, spans, len(text_words))


def native_precision(device: torch.device) -> Precision | None:
    """What an evidence reader computes in where nobody chose: bf16, as in training and twice as fast, where the
    processor has instructions for it, else fp32; None where nothing packs an encoder."""
    if device.type not in PRECISIONS:
        return None
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        processor = getattr(torch.cpu, "get_capabilities", dict)()
        native = any(processor.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bf16" if native else "fp32"


def uses_bf16(chosen: bool | None, device: torch.device) -> bool:
    """What was chosen, or for None whether the device has instructions for it: without, it takes ten times as long."""
    return native_precision(device) == "bf16" if chosen is None else chosen
