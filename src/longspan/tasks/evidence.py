"""Evaluation of the evidence reader: does a passage of its hold the evidence, and how do simpler systems fare?"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from transformers import AutoTokenizer

from longspan.inference.evidence import native_precision
from longspan.inference.reader import BUILT_IN
from longspan.models.evidence import LongspanForEvidence
from longspan.models.packed import Precision
from longspan.models.plug_in import accelerate
from longspan.tasks.evidence_systems import (
    BM25Chunks,
    CosineChunks,
    EvidenceReader,
    System,
    best_fixed_windows,
    first_hundreds,
)
from longspan.training.evidence_rows import Array, EvidenceRow, load_articles, load_rows
from longspan.training.reading import Condition, document_of, hits, summarize

SYSTEMS = ("reader", "reader_512", "cosine", "bm25", "first", "fixed")
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def evaluate_reader(
    data: str | Path,
    *,
    split: str = "dev",
    condition: Condition = "buried",
    model: str | Path | None = None,
    precision: Precision | None = None,
    limit: int | None = None,
    systems: Sequence[str] = SYSTEMS,
    minilm: str | Path = MINILM,
    cache: str | Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """{condition, questions, rows: [{system, top1, top3, late_top1, late_top3, token_f1, tokens_per_second}]}.

    A hit is a passage of at most 100 words that overlaps gold evidence with IoU >= 0.1; top3 passages do not overlap.
    late_*: only questions whose evidence begins past word 380 of the article. token_f1: ERASER's (DeYoung et al.
    2020, section 4), the F1 between the words of the first passage and those of all gold evidence, averaged over
    questions.
    data: folder with boolq_articles and the sources beside it. condition "buried" puts 6,000 words of other articles,
    drawn per question from `seed`, before the article. model: directory of a reader, None for longspan's own.
    precision: what its encoder computes in, None for bf16 where the CPU has instructions for it, else fp32. limit: a
    sample drawn from `seed`.
    minilm: directory or hub name of all-MiniLM-L6-v2. Where it, or bm25s, can't be had, the row holds no figures and
    says so.
    cache: where the tokenized articles are kept, by default under ~/.cache/longspan. Raises ValueError for an unknown
    condition or system.
    """
    if condition not in ("as_is", "buried"):
        raise ValueError(f"condition must be 'as_is' or 'buried'; got {condition!r}")
    if unknown := set(systems) - set(SYSTEMS):
        raise ValueError(f"unknown systems {sorted(unknown)}; expected some of {', '.join(SYSTEMS)}")
    source = str(BUILT_IN if model is None else model)
    tokenizer = AutoTokenizer.from_pretrained(source)
    articles = load_articles(data, cache or cache_for(data), tokenizer)
    rows = load_rows(data, articles, "boolq_articles", split)
    if limit is not None and limit < len(rows):
        rows = [rows[number] for number in sorted(np.random.default_rng(seed).permutation(len(rows))[:limit])]

    reader = LongspanForEvidence.from_pretrained(source)
    accelerate(reader, precision or reader.config.precision or native_precision(reader.device))

    def build(name: str) -> System:
        if name == "reader":
            return EvidenceReader(reader, tokenizer)
        if name == "reader_512":
            return EvidenceReader(reader, tokenizer, max_tokens=512)
        if name == "cosine":
            return CosineChunks(tokenizer, str(minilm))
        if name == "bm25":
            return BM25Chunks(articles)
        if name == "first":
            return first_hundreds()
        train = load_rows(data, articles, "boolq_articles", "train")
        return best_fixed_windows([row for row in train if not articles.repeats_dev[row.article]])

    results = []
    for name in sorted(systems, key=SYSTEMS.index):
        try:
            system = build(name)
        except (ImportError, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            results.append(_row(f"{name} (left out: {reason})", [], [], [], None))
            continue
        results.append(_measure(system, rows, lambda row: document_of(articles, row, condition, seed=seed)))
    return {"condition": condition, "questions": len(rows), "rows": results}


def token_f1(passage: Array, evidence: Array) -> float:
    """F1 between the words of a passage [2] and those of all evidence spans [G, 2]."""
    gold = {word for start, end in evidence for word in range(start, end)}
    shared = len(gold & set(range(*passage)))
    return 2 * shared / (len(gold) + int(passage[1] - passage[0])) if shared else 0.0


def _measure(system: System, rows: Sequence[EvidenceRow], document_for: Any) -> dict[str, Any]:
    found, overlaps, tokens, seconds = [], [], 0, 0.0
    console = Console(stderr=True)
    for row in track(rows, description=system.name, console=console, disable=not console.is_terminal):
        document = document_for(row)
        start = time.perf_counter()
        passages = system.passages(row, document)
        seconds += time.perf_counter() - start
        tokens += min(len(document.token_ids), getattr(system, "max_tokens", None) or len(document.token_ids))
        found.append(hits(passages, document.evidence))
        overlaps.append(token_f1(passages[0], document.evidence) if len(passages) else 0.0)
    speed = tokens / seconds if system.reads and seconds else None
    return _row(system.name, found, [row.starts_late for row in rows], overlaps, speed)


def _row(name: str, found: Any, late: Any, overlaps: Sequence[float], speed: float | None) -> dict[str, Any]:
    return {
        "system": name,
        **summarize(found, late),
        "token_f1": round(float(np.mean(overlaps)), 4) if overlaps else None,
        "tokens_per_second": None if speed is None else round(speed),
    }


def cache_for(data: str | Path) -> Path:
    """A folder of the user's own for one data folder: what is in `data` may not be ours to write to."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "longspan" / hashlib.sha256(str(Path(data).resolve()).encode()).hexdigest()[:16]
