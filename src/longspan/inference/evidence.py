"""Answers as passages: the evidence reader scores windows of words over whole documents.

Shapes: T tokens of a document, M windows of words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from longspan.errors import DocumentError, NotFiniteError, QuestionError
from longspan.inference.windows import Candidates, candidate_windows, tokenize_words

STRIDE_WORDS = 10  # between the starts of neighboring windows


class EvidenceFinder:
    """The windows of words that hold the evidence for an answer.

    model: a `LongspanForEvidence`. tokenizer: the one it was trained with. dtype: what the encoder computes in; None is
    bfloat16, as in training, where the processor has instructions for it (twice as fast), else float32.
    """

    def __init__(self, model: Any, tokenizer: Any, dtype: torch.dtype | None = None):
        self.model, self.tokenizer = model, tokenizer
        self.dtype = dtype or _fast_dtype(model.device)
        embeddings = model.config.embeddings_config
        self.window_tokens = embeddings.position_period or embeddings.max_tokens

    def candidates(
        self, question: str, texts: list[str], *, passage_words: int, progress: Callable[[int, int], None] | None = None
    ) -> Candidates:
        """Reads each document in one pass, however long. Probabilities are the model's own, calibrated ones."""
        asked = self.tokenizer(question, split_special_tokens=True, truncation=False, verbose=False)["input_ids"]
        if len(asked) > self.window_tokens // 2:
            raise QuestionError(
                f"the question is {len(asked)} tokens long, more than half of the {self.window_tokens} tokens of this "
                "model's window; ask a shorter question."
            )
        question_ids = torch.tensor(asked, device=self.model.device)
        read = [tokenize_words(self.tokenizer, text) for text in texts]
        total = sum(len(token_ids) for token_ids, _, _ in read)

        documents, words, chars, scores = [], [], [], []
        done, words_before = 0, 0
        for document, (token_ids, first_token_of_word, text_words) in enumerate(read):
            windows = candidate_windows(len(text_words), passage_words, STRIDE_WORDS)
            spans = first_token_of_word[windows]  # [M, 2]
            windows, spans = (ranges[spans[:, 0] < spans[:, 1]] for ranges in (windows, spans))
            if not len(windows):
                continue
            report = progress and (lambda read, of, done=done: progress(done + read, total))
            with torch.autocast(self.model.device.type, self.dtype, enabled=self.dtype != torch.float32):
                ids, ranges = (torch.from_numpy(array).to(self.model.device) for array in (token_ids, spans))
                scores.append(self.model.score_windows(question_ids, ids, ranges, progress=report))
            documents.append(np.full(len(windows), document))
            words.append(windows + words_before)
            chars.append(np.stack([text_words[windows[:, 0], 0], text_words[windows[:, 1] - 1, 1]], axis=1))
            done, words_before = done + len(token_ids), words_before + len(text_words)
        if not scores:
            raise DocumentError("the documents hold no text that this model's tokenizer knows.")
        logits = torch.cat(scores)  # [M]
        if not logits.isfinite().all():
            raise NotFiniteError("scores")
        probability = self.model.passage_probability(logits).double().cpu().numpy()
        return Candidates(
            np.concatenate(documents), np.concatenate(words), np.concatenate(chars), probability, None, total
        )


def _fast_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        processor = getattr(torch.cpu, "get_capabilities", dict)()
        native = device.type == "cpu" and any(processor.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32
