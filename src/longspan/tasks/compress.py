"""Checkpoints of classifiers made small on a task: pruned on its training split, or distilled into a student; and
helped by n-grams."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorWithPadding

from longspan.compression.distill import Distillation, Rows, distill
from longspan.compression.ngrams import BUCKETS, fit_ngrams, ngram_logits, targets_of, weight_beside, with_ngrams
from longspan.compression.prune import Pruning, prune
from longspan.compression.students import student_of
from longspan.compression.teacher_outputs import compute_teacher_outputs
from longspan.inference.evidence import uses_bf16
from longspan.models.classifiers import load_classifier
from longspan.models.convert import as_ours, refuse_existing, whole_or_absent
from longspan.models.packed import Precision
from longspan.tasks.task import Task, split_off, tokenize
from longspan.training.classification import predict_logits


@dataclass(frozen=True, kw_only=True)
class Smaller:
    """What was written: parameters of the model before (of the teacher) and after, and its figures on dev."""

    out: Path
    shape: tuple[tuple[int, int], ...]
    parameters_before: int
    parameters_after: int
    before: dict[str, float]
    after: dict[str, float]


def prune_on_task(
    source: str | Path,
    task: Task,
    out: str | Path,
    pruning: Pruning,
    *,
    rows: int = 512,
    batch: int = 8,
    max_tokens: int | None = None,
    precision: Precision | None = None,
    seed: int = 0,
) -> Smaller:
    """Writes the pruned copy of a classifier and its tokenizer to the directory `out`, whole or not at all.

    Importance is measured on `rows` examples drawn from the training split, never on dev, which only tells how good the
    model is before and after. precision: what a speedup is measured in.
    Raises FileExistsError when `out` holds something, and what `load_classifier` and `prune` raise.
    """
    out = Path(out)
    refuse_existing(out)
    examples = task.examples("train")
    if rows < 1:
        raise ValueError(f"importance is measured on at least one row; got {rows}")
    if rows < len(examples):
        _, examples = split_off(examples, rows, seed)
    loaded = load_classifier(source, task.labels, max_tokens=max_tokens, spans=bool(examples[0].spans))
    model = as_ours(loaded.model)
    features = sorted(
        tokenize(examples, loaded.tokenizer, loaded.max_tokens), key=lambda row: len(row["input_ids"])
    )  # rows of like length together
    collate = DataCollatorWithPadding(loaded.tokenizer)
    batches = (dict(collate(features[first : first + batch])) for first in range(0, len(features), batch))
    small = prune(model, batches, pruning, precision=precision)
    dev = tokenize(task.examples("dev"), loaded.tokenizer, loaded.max_tokens)
    before, after = (task.metrics("dev", predict_logits(one, dev, loaded.tokenizer)) for one in (model, small))
    return _write(out, loaded.tokenizer, model, small, before, after)


def distill_on_task(
    teacher: str | Path,
    task: Task,
    output: str | Path,
    settings: Distillation,
    *,
    student: str | Path | None = None,
    layers: int | None = None,
    max_tokens: int | None = None,
    cache: str | Path | None = None,
) -> Smaller:
    """Trains a student on the task's training split, keeps the weights that are best on dev; in output/model.

    student: directory or hub name of what it begins as; or layers, that many of the teacher's. Where the two
    tokenizers differ, only logits can be compared. max_tokens: of both; None: what the student reads.
    Repeat a killed call to go on. Raises ValueError for both or neither of student and layers, and what
    `load_classifier` and `distill` raise.
    """
    if (student is None) == (layers is None):
        raise ValueError("give either a student to begin with, or the number of the teacher's layers that it gets")
    examples = [*task.examples("train"), *task.examples("dev")]
    load = partial(load_classifier, labels=task.labels, spans=any(example.spans for example in examples))
    loaded = load(teacher, max_tokens=max_tokens)
    pupil: Any = loaded
    if student is not None:
        pupil = load(student, max_tokens=max_tokens, seed=settings.seed)
    tokens = min((limit for limit in (loaded.max_tokens, pupil.max_tokens) if limit is not None), default=None)
    small = pupil.model if layers is None else student_of(loaded.model, layers)
    train = task.examples("train")
    features = tokenize(train, pupil.tokenizer, tokens)
    collate = DataCollatorWithPadding(pupil.tokenizer)
    theirs, their_collate = features, collate
    if student is not None:
        theirs, their_collate = tokenize(train, loaded.tokenizer, tokens), DataCollatorWithPadding(loaded.tokenizer)
        if all(one["input_ids"] == other["input_ids"] for one, other in zip(features, theirs, strict=True)):
            theirs = features
    dev = tokenize(task.examples("dev"), pupil.tokenizer, tokens)

    def judge(model: Any) -> dict[str, float]:
        return task.metrics("dev", predict_logits(model, dev, pupil.tokenizer))

    their_dev = dev if theirs is features else tokenize(task.examples("dev"), loaded.tokenizer, tokens)
    settings = replace(settings, metric=settings.metric or task.metric)
    rows = Rows(features, collate, theirs, their_collate)
    trained = distill(loaded.model, small, rows, output, settings, evaluate=judge, cache=cache)
    pupil.tokenizer.save_pretrained(Path(output) / "model")
    encoder = getattr(trained.config, "encoder_config", None)
    return Smaller(
        out=Path(output) / "model",
        shape=() if encoder is None else tuple((block.heads, block.ffn_width) for block in encoder.blocks),
        parameters_before=loaded.model.num_parameters(),
        parameters_after=trained.num_parameters(),
        before=task.metrics("dev", predict_logits(loaded.model, their_dev, loaded.tokenizer)),
        after=judge(trained),
    )


def add_ngrams_on_task(
    source: str | Path,
    task: Task,
    out: str | Path,
    *,
    teacher: str | Path | None = None,
    cache: str | Path | None = None,
    buckets: int = BUCKETS,
    max_tokens: int | None = None,
) -> Smaller:
    """Writes a copy of a classifier that also hears n-grams, and its tokenizer, to `out`, whole or not at all.

    The n-grams learn from the training split's labels and from what a teacher, a directory or hub name, says of it; how
    loud they are, from dev. cache: folder of teacher outputs, of a killed call or of `distill_on_task`; None: beside
    `out`, named after it.
    Raises FileExistsError when `out` holds something, ValueError for a task that is not one label for each row, and
    what `load_classifier`, `compute_teacher_outputs` and `fit_ngrams` raise.
    """
    out = Path(out)
    refuse_existing(out)
    if buckets < 1:
        raise ValueError(f"buckets must be at least 1; got {buckets}")
    train, dev = task.examples("train"), task.examples("dev")
    loaded = load_classifier(source, task.labels, max_tokens=max_tokens, spans=bool(train[0].spans))
    model = with_ngrams(loaded.model, torch.zeros(1, len(task.labels)))  # refuses what cannot hear them
    taught = None
    if teacher is not None:
        theirs = load_classifier(teacher, task.labels, max_tokens=max_tokens)
        taught = (
            compute_teacher_outputs(
                theirs.model,
                tokenize(train, theirs.tokenizer, theirs.max_tokens),
                out.with_name(f"{out.name}-teacher") if cache is None else cache,
                collate=DataCollatorWithPadding(theirs.tokenizer),
                bf16=uses_bf16(None, theirs.model.device),
            )
            .logits()
            .numpy()
        )
    features, judged = (tokenize(part, loaded.tokenizer, loaded.max_tokens) for part in (train, dev))
    table = fit_ngrams(
        features, targets_of([row["labels"] for row in features], len(task.labels), taught), buckets=buckets
    )
    before = predict_logits(model, judged, loaded.tokenizer)
    said = ngram_logits(table, judged)
    table = table * weight_beside(before, said, [row["labels"] for row in judged])
    helped = with_ngrams(loaded.model, table)
    after = predict_logits(helped, judged, loaded.tokenizer)
    return _write(out, loaded.tokenizer, loaded.model, helped, task.metrics("dev", before), task.metrics("dev", after))


def _write(
    out: Path, tokenizer: Any, model: Any, changed: Any, before: dict[str, float], after: dict[str, float]
) -> Smaller:
    with whole_or_absent(out) as folder:
        changed.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return Smaller(
        out=out,
        shape=tuple((block.heads, block.ffn_width) for block in changed.config.encoder_config.blocks),
        parameters_before=model.num_parameters(),
        parameters_after=changed.num_parameters(),
        before=before,
        after=after,
    )
