"""What a classifier is worth on a task: its figures, how long a document takes, and what a million of them cost.

Shapes: n documents, L labels, N tokens, S spans.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from transformers import AutoConfig, AutoTokenizer

from longspan.inference.engines import Batch, Engine, open_engine, parse_engine
from longspan.models.checkpoints import translate_config
from longspan.models.classifiers import BEYOND
from longspan.models.config import LongspanConfig
from longspan.tasks.task import Task, label_columns, split_off, tokenize
from longspan.tasks.text_files import Columns, text_task

WARM_UP = 3  # batches of each instance before the clock starts
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "span_ranges")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One engine on the rows of one split.

    batch: documents a call. fixed_length: tokens that every row was padded to; None: those of its batch's longest.
    tokens: of the documents, padding aside. seconds: from the first call to the last result. latency_ms_p50, _p95: of
    one call, which holds `batch` documents. cost_per_million: of documents, in the currency of the price that was
    given. metrics: the task's. Reading and tokenizing the texts is not in the times.
    """

    engine: str
    precision: str
    instances: int
    threads_per_instance: int
    batch: int
    fixed_length: int | None
    documents: int
    tokens: int
    seconds: float
    latency_ms_p50: float
    latency_ms_p95: float
    documents_per_second: float
    tokens_per_second: float
    cost_per_million: float | None
    metrics: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    engine: Engine,
    features: Sequence[Mapping[str, Any]],
    *,
    batch: int = 1,
    fixed_length: int | None = None,
    pad_token_id: int = 0,
    price_per_hour: float | None = None,
) -> tuple[NDArray[np.float32], Measurement]:
    """(logits [n, L] in the order of the rows, the times; its `metrics` are empty).

    features: rows of token ids as `tokenize` gives them, not padded. Batches of more than one row hold rows of similar
    length. price_per_hour: of the machine, or of its share that the instances use.
    Raises ValueError for no rows, for a row longer than fixed_length, and for numbers below 1.
    """
    batches, places = make_batches(features, batch=batch, fixed_length=fixed_length, pad_token_id=pad_token_id)
    if price_per_hour is not None and not price_per_hour > 0:
        raise ValueError(f"price_per_hour must be above 0; got {price_per_hour}")

    def timed(rows: Batch) -> tuple[NDArray[np.float32], float]:
        start = time.perf_counter()
        logits = engine.logits(rows)
        return logits, time.perf_counter() - start

    console = Console(stderr=True)
    label = f"{engine.name} {engine.precision}"
    with ThreadPoolExecutor(engine.instances) as clients:
        # One instance computes here: threads of another thread would share the cores with those of this one.
        ask = map if engine.instances == 1 else clients.map
        list(ask(engine.logits, batches[:WARM_UP] * engine.instances))
        start = time.perf_counter()
        running = track(
            ask(timed, batches),
            total=len(batches),
            description=label,
            console=console,
            disable=not console.is_terminal,
        )
        done = list(running)
        seconds = time.perf_counter() - start
    logits = np.concatenate([part for part, _ in done])
    ordered = np.empty_like(logits)
    ordered[np.concatenate(places)] = logits
    p50, p95 = np.percentile([taken for _, taken in done], (50, 95)) * 1e3
    tokens = sum(len(row["input_ids"]) for row in features)
    per_second = len(features) / seconds
    return ordered, Measurement(
        engine=engine.name,
        precision=engine.precision,
        instances=engine.instances,
        threads_per_instance=engine.threads_per_instance,
        batch=batch,
        fixed_length=fixed_length,
        documents=len(features),
        tokens=tokens,
        seconds=seconds,
        latency_ms_p50=float(p50),
        latency_ms_p95=float(p95),
        documents_per_second=per_second,
        tokens_per_second=tokens / seconds,
        cost_per_million=None if price_per_hour is None else price_per_hour / 3600 * 1e6 / per_second,
        metrics={},
    )


def make_batches(
    features: Sequence[Mapping[str, Any]], *, batch: int, fixed_length: int | None, pad_token_id: int
) -> tuple[list[Batch], list[NDArray[np.int64]]]:
    """(arrays [B, N] of each batch, the places of its rows in `features`); the longest rows first where B > 1."""
    if not features:
        raise ValueError("there are no rows to measure with")
    if batch < 1 or (fixed_length is not None and fixed_length < 1):
        raise ValueError(f"batch and fixed_length must be at least 1; got {batch} and {fixed_length}")
    lengths = np.array([len(row["input_ids"]) for row in features])
    if fixed_length is not None and lengths.max() > fixed_length:
        raise ValueError(
            f"row {lengths.argmax()} has {lengths.max()} tokens, more than the fixed length of {fixed_length}: "
            f"tokenize with max_tokens={fixed_length}"
        )
    order = np.argsort(-lengths, kind="stable") if batch > 1 else np.arange(len(lengths))
    places = [order[first : first + batch] for first in range(0, len(order), batch)]
    made: list[Batch] = []
    for rows in places:
        tokens = fixed_length or int(lengths[rows].max())
        arrays: dict[str, NDArray[np.int64]] = {}
        for name in INPUTS:
            if name not in features[rows[0]]:
                continue
            values = [features[row][name] for row in rows]
            if name == "span_ranges":
                arrays[name] = np.array(values, dtype=np.int64)
                continue
            arrays[name] = np.full((len(rows), tokens), pad_token_id if name == "input_ids" else 0, dtype=np.int64)
            for row, value in enumerate(values):
                arrays[name][row, : len(value)] = value
        made.append(arrays)
    return made, places


def evaluate_task(
    source: str | Path,
    task: Task,
    split: str = "dev",
    *,
    engines: Sequence[str] = ("longspan",),
    batch: int = 1,
    max_tokens: int | None = None,
    fixed_length: int | None = None,
    instances: int = 1,
    threads_per_instance: int = 1,
    price_per_hour: float | None = None,
    onnx_file: str | Path | None = None,
    limit: int | None = None,
) -> list[Measurement]:
    """A classifier's figures on a split of a task and its speed, on each engine in turn.

    source: directory or hub name. engines: "huggingface", "longspan", "onnx", with ":int8" or the like behind for
    another precision than fp32. max_tokens: longer rows are cut; None takes fixed_length, or what the model reads.
    limit: a seeded sample of so many examples; groups stay whole.
    The rest as `measure` and `open_engine` take them.
    Raises ValueError for labels of the task that the model lacks, and what those two raise.
    """
    asked = [parse_engine(engine) for engine in engines]
    config, tokenizer = AutoConfig.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    columns = label_columns(task.labels, _labels(config))
    if limit is not None and limit < len(task.examples(split)):
        task = replace(task, splits={split: split_off(task.examples(split), limit)[1]})
    features = tokenize(task.examples(split), tokenizer, max_tokens or fixed_length or reads(config, tokenizer))
    found = []
    for name, precision in asked:
        with open_engine(
            source,
            name,
            precision=precision,
            instances=instances,
            threads_per_instance=threads_per_instance,
            onnx_file=onnx_file if name == "onnx" else None,
        ) as engine:
            logits, measured = measure(
                engine,
                features,
                batch=batch,
                fixed_length=fixed_length,
                pad_token_id=tokenizer.pad_token_id or 0,
                price_per_hour=price_per_hour,
            )
        found.append(replace(measured, metrics=task.metrics(split, logits[:, columns])))
    return found


def task_of_file(file: str | Path, source: str | Path, columns: Columns | None = None) -> Task:
    """All rows of a file with text and label columns as the "dev" split of a task with the labels of a model."""
    rows = text_task(file, dev=file, columns=columns)
    id2label = _labels(AutoConfig.from_pretrained(source))
    places = label_columns(rows.labels, id2label)
    examples = tuple(
        replace(example, label=None if example.label is None else places[example.label])
        for example in rows.examples("dev")
    )
    return Task(name=rows.name, labels=tuple(id2label.values()), splits={"dev": examples})


def _labels(config: Any) -> dict[int, str]:
    """The names of a model's labels in the order of its logits."""
    return {column: str(name) for column, name in sorted(config.id2label.items())}


def reads(config: Any, tokenizer: Any) -> int | None:
    """The longest row that a checkpoint reads or was trained on; None where it does not say."""
    try:
        described = config if isinstance(config, LongspanConfig) else translate_config(config)
    except NotImplementedError:  # a family that longspan does not have
        limits = (getattr(config, "max_position_embeddings", None), tokenizer.model_max_length)
        return min((limit for limit in limits if limit and limit < BEYOND), default=None)
    return described.embeddings_config.max_tokens or described.trained_tokens
