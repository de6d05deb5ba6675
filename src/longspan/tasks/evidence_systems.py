"""What finds evidence in a document: the reader, and what one would use in its place. P passages of W words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from longspan.inference.windows import select_disjoint
from longspan.training.evidence_rows import Array, Articles, EvidenceRow, interval_iou
from longspan.training.reading import HIT_IOU, LENGTH, Document, score_document, tokenize_question

TOP = 3


class System(Protocol):
    """reads: whether it looks at the words, so that a speed makes sense."""

    name: str
    reads: bool

    def passages(self, row: EvidenceRow, document: Document) -> Array:
        """The best passages of at most 100 words, best first: word ranges of the document [P, 2], P <= 3."""
        ...


class EvidenceReader:
    """Every window of 100 words, ten words apart, of the whole document or of its first `max_tokens` tokens."""

    reads = True

    def __init__(self, model: Any, tokenizer: Any, *, max_tokens: int | None = None):
        self.model, self.tokenizer, self.max_tokens = model.eval(), tokenizer, max_tokens
        self.name = "longspan reader" if max_tokens is None else f"longspan reader, first {max_tokens} tokens"

    def passages(self, row: EvidenceRow, document: Document) -> Array:
        question_ids = tokenize_question(self.tokenizer, row.question)
        if self.max_tokens is not None:
            document = document.cut(self.max_tokens - len(question_ids))
        windows, parts = score_document(self.model, question_ids, document)
        return windows[select_disjoint(windows, self.model.weigh(parts), TOP)]


class CosineChunks:
    """Chunks of 100 words ranked by the cosine of a sentence encoder's mean vectors, as sentence-transformers does.

    tokenizer: the one of the collection's tokens. They serve this encoder too, so that no system's time includes
    tokenization; ValueError where the encoder has other tokens.
    """

    reads = True

    def __init__(self, tokenizer: Any, checkpoint: str, *, batch: int = 32):
        from transformers import AutoModel, AutoTokenizer

        self.batch = batch
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        if self.tokenizer.get_vocab() != tokenizer.get_vocab():
            raise ValueError(f"{checkpoint} has other tokens than the reader")
        self.model = AutoModel.from_pretrained(checkpoint, attn_implementation="sdpa").eval()
        self.name = "all-MiniLM-L6-v2 cosine, 100-word chunks"

    def passages(self, row: EvidenceRow, document: Document) -> Array:
        chunks = hundreds(document.num_words)
        first, last = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        ids = [tokenize_question(self.tokenizer, row.question)]
        for start, end in document.first_token[chunks]:
            ids.append(np.array([first, *document.token_ids[start:end][:510], last]))
        vectors = self.embed(ids)
        return chunks[np.argsort(-(vectors[1:] @ vectors[0]), kind="stable")[:TOP]]

    @torch.inference_mode()
    def embed(self, ids: Sequence[Array]) -> Array:
        """Normalized mean vectors [len(ids), C]; batches of similar lengths, so that little is padding."""
        order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
        vectors = np.empty((len(ids), self.model.config.hidden_size), np.float32)
        for start in range(0, len(order), self.batch):
            part = order[start : start + self.batch]
            inputs = self.tokenizer.pad({"input_ids": [ids[number] for number in part]}, return_tensors="pt")
            with torch.autocast("cpu", torch.bfloat16):
                hidden = self.model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"][..., None]
            means = (hidden * mask).sum(1) / mask.sum(1)
            vectors[part] = torch.nn.functional.normalize(means, dim=-1).numpy()
        return vectors


class BM25Chunks:
    """The same chunks ranked by BM25: bm25s with its defaults (Lucene's variant, k1 1.5, b 0.75), no stop words."""

    reads = True
    name = "BM25, 100-word chunks"

    def __init__(self, articles: Articles):
        try:
            import bm25s
        except ImportError as error:
            raise ImportError("the BM25 baseline needs bm25s: pip install longspan[evaluate]") from error
        self.bm25s, self.articles = bm25s, articles

    def passages(self, row: EvidenceRow, document: Document) -> Array:
        chunks = hundreds(document.num_words)
        texts = [" ".join(words) for words in chunk_texts(self.articles, document, chunks)]
        index = self.bm25s.BM25()
        index.index(self.bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
        (query,) = self.bm25s.tokenize(row.question, stopwords="en", show_progress=False, return_ids=False)
        known = [word for word in query if word in index.vocab_dict]
        scores = index.get_scores(known) if known else np.zeros(len(chunks))
        return chunks[np.argsort(-scores, kind="stable")[:TOP]]


class FixedWindows:
    """The same words of every document, whatever the question."""

    reads = False

    def __init__(self, name: str, windows: Array):
        self.name, self.windows = name, windows

    def passages(self, row: EvidenceRow, document: Document) -> Array:
        ends = np.minimum(self.windows, document.num_words)
        return ends[ends[:, 0] < ends[:, 1]]


def first_hundreds() -> FixedWindows:
    return FixedWindows("first 100 words", hundreds(TOP * LENGTH))


def best_fixed_windows(rows: Sequence[EvidenceRow]) -> FixedWindows:
    """The three disjoint windows that hit most of `rows` (training, articles as they are), chosen one by one."""
    starts = np.arange(0, 1000, 5)
    windows = np.stack((starts, starts + LENGTH), 1)
    found = np.stack([(interval_iou(windows, row.evidence) >= HIT_IOU).any(1) for row in rows])  # [rows, windows]
    missed, chosen = np.ones(len(rows), bool), []
    free = np.ones(len(windows), bool)
    for _ in range(TOP):
        best = int(np.where(free, found[missed].sum(0), -1).argmax())
        chosen.append(best)
        missed &= ~found[:, best]
        free &= (windows[:, 0] >= windows[best, 1]) | (windows[:, 1] <= windows[best, 0])
    start = windows[chosen[0], 0]
    return FixedWindows(f"best fixed window, words {start} to {start + LENGTH}", windows[chosen])


def hundreds(num_words: int) -> Array:
    """Consecutive chunks of 100 words; the last may be shorter. [P, 2]"""
    starts = np.arange(0, num_words, LENGTH)
    return np.stack((starts, np.minimum(starts + LENGTH, num_words)), 1)


def chunk_texts(articles: Articles, document: Document, chunks: Array) -> list[list[str]]:
    words = [word for start, end in document.pieces for word in articles.texts_of(start, end)]
    return [words[start:end] for start, end in chunks]
