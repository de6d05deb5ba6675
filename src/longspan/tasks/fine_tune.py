"""A checkpoint fine-tuned on a task: load, tokenize, train, and read the test split."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from longspan.models.classifiers import load_classifier
from longspan.tasks.packaged import PACKAGED
from longspan.tasks.superglue import FORMATS, superglue_task, write_predictions
from longspan.tasks.task import Task, tokenize
from longspan.tasks.text_files import Columns, text_task
from longspan.training.classification import (
    ClassifierTraining,
    predict_logits,
    train_classifier,
)


@dataclass(frozen=True, kw_only=True)
class FineTuned:
    """model: directory. dev, test: figures; test None where there is no such split or its labels are secret.

    predictions: file for SuperGLUE's server, of a test split of its. max_tokens: the longest row (None: any length);
    lengthened_from: what the checkpoint read before it was made long.
    """

    model: Path
    dev: dict[str, float]
    best_step: int
    steps: int
    test: dict[str, float] | None = None
    predictions: Path | None = None
    max_tokens: int | None = None
    lengthened_from: int | None = None


def named_task(name: str, *, data: str | Path | None = None, seed: int = 0) -> Task:
    """A task by its name: one of SuperGLUE's, in the folder `data`, or one whose texts lie in a package."""
    name = name.lower()
    if name in PACKAGED:
        if data is not None:
            raise ValueError(f"the texts of {name} lie in a package; leave out the folder {data}")
        return PACKAGED[name](seed=seed)
    if name not in FORMATS:
        raise ValueError(f"there is no task {name!r}; there are {', '.join([*FORMATS, *PACKAGED])}")
    if data is None:
        raise ValueError(f"{name} needs the folder where SuperGLUE was unpacked")
    return superglue_task(name, data)


def chosen_task(
    name: str | None,
    *,
    data: str | Path | None = None,
    train: Path | None = None,
    dev: Path | None = None,
    test: Path | None = None,
    columns: Columns | None = None,
    seed: int = 0,
) -> Task:
    """The task of a name (`named_task`) or of files (`text_task`).

    Raises ValueError for both or neither, and for files beside a name.
    """
    if (name is None) == (train is None):
        raise ValueError("name either a --task or a file with labeled rows, --train.")
    if train is not None:
        return text_task(train, dev=dev, test=test, columns=columns, seed=seed)
    if dev or test:
        raise ValueError("--dev and --test go with --train; a --task brings its own.")
    assert name is not None
    return named_task(name, data=data, seed=seed)


def fine_tune(
    source: str | Path,
    task: Task,
    *,
    output: str | Path,
    max_tokens: int | None = None,
    window: int = 512,
    new_head: bool = False,
    **settings,
) -> FineTuned:
    """Fine-tunes the checkpoint `source` on train, keeps the weights that are best on dev, and reads test with them.

    max_tokens, window, new_head: as `load_classifier` takes them. settings: fields of `ClassifierTraining`; batch,
    epochs, learning_rate, seed, ... Repeat a killed call to go on.
    Raises what those two and `train_classifier` raise, and ValueError for a task without examples in train or dev.
    """
    config = ClassifierTraining(output=str(output), metric=task.metric, **settings)
    examples = [*task.examples("train"), *task.examples("dev")]  # asked for before anything is loaded
    loaded = load_classifier(
        source,
        task.labels,
        max_tokens=max_tokens,
        window=window,
        spans=any(example.spans for example in examples),
        new_head=new_head,
        seed=config.seed,
    )
    rows = {split: tokenize(task.examples(split), loaded.tokenizer, loaded.max_tokens) for split in ("train", "dev")}
    done = train_classifier(
        loaded.model, loaded.tokenizer, rows["train"], rows["dev"], partial(task.metrics, "dev"), config
    )
    figures, file = None, None
    is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    if task.splits.get("test") and is_first:
        test = tokenize(task.examples("test"), loaded.tokenizer, loaded.max_tokens)
        bf16 = config.computes_in_bf16(loaded.model)
        logits = predict_logits(loaded.model, test, loaded.tokenizer, batch=2 * config.batch, bf16=bf16)
        if all(example.label is not None for example in task.examples("test")):
            figures = task.metrics("test", logits)
        if task.name in FORMATS:
            file = write_predictions(task, "test", logits, Path(output) / "predictions")
    return FineTuned(
        model=done.model,
        dev=done.metrics,
        best_step=done.best_step,
        steps=done.steps,
        test=figures,
        predictions=file,
        max_tokens=loaded.max_tokens,
        lengthened_from=loaded.lengthened_from,
    )
