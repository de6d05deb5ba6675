"""`longspan distill`: a small classifier that learns to answer as a large one does."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from longspan.cli.quiet import quiet_transformers


class Distance(str, Enum):
    """Between hidden states."""

    mse = "mse"
    cosine = "cosine"


def distill(
    teacher: Annotated[
        str, typer.Argument(metavar="TEACHER", help="Directory or hub name of a fine-tuned classifier.")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Directory for checkpoints and the model; a run found there goes on.")
    ],
    student: Annotated[
        str | None, typer.Option(help="Directory or hub name of the checkpoint that the student begins as.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="Or: how many of TEACHER's layers, at even distances, it begins as.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--task", help="A task of SuperGLUE (boolq, cb, copa, ...), imdb or 20newsgroups.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with SuperGLUE's folders, for its tasks.")] = None,
    train: Annotated[Path | None, typer.Option(help="Or a file with labeled rows: .csv, .tsv, .tab or .jsonl.")] = None,
    dev: Annotated[Path | None, typer.Option(help="Rows to judge by. Default: a tenth of --train.")] = None,
    text_column: Annotated[str, typer.Option(help="Name of the column, or its number from 0.")] = "text",
    label_column: Annotated[str, typer.Option(help="Column of the labels.")] = "label",
    text_pair_column: Annotated[str | None, typer.Option(help="Column of a second text, for pairs.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest row. Default: what both models read.")] = None,
    fastformers: Annotated[
        bool, typer.Option(help="FastFormers' loss, in place of the weights and the temperature below.")
    ] = False,
    logits: Annotated[float, typer.Option(help="Weight of the teacher's logits.")] = 1.0,
    temperature: Annotated[float, typer.Option(help="Of the logits' distributions.")] = 2.0,
    hard_labels: Annotated[float, typer.Option(help="Weight of the rows' own labels.")] = 0.0,
    hidden_states: Annotated[float, typer.Option(help="Weight of the hidden states.")] = 0.0,
    hidden_distance: Annotated[Distance, typer.Option(help="How hidden states are compared.")] = Distance.mse,
    embeddings: Annotated[float, typer.Option(help="Weight of the embeddings' output.")] = 0.0,
    relations: Annotated[float, typer.Option(help="Weight of query, key and value relations.")] = 0.0,
    relation_heads: Annotated[int, typer.Option(min=1, help="Parts that relations are compared in.")] = 12,
    layer_map: Annotated[
        str, typer.Option(help="uniform, last, or pairs of student:teacher layers from 1, such as 1:4,2:8,3:12.")
    ] = "uniform",
    keep_states: Annotated[
        bool, typer.Option(help="Keep the teacher's hidden states on disk, too, in place of asking it every time.")
    ] = False,
    cache: Annotated[Path | None, typer.Option(help="Folder of teacher outputs, to share between runs.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the training rows.")] = 3.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps, in place of --epochs.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows that a process computes at a time.")] = 32,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches a step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="The highest; it rises first and falls then.")] = 5e-5,
    evaluate_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps between readings of dev. Default: once a pass.")
    ] = None,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 200,
    bf16: Annotated[
        bool | None, typer.Option(help="Compute in bfloat16. Default: where the processor has instructions for it.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: PyTorch's choice.")] = None,
    seed: Annotated[int, typer.Option(help="Decides splits, order and every random choice.")] = 0,
) -> None:
    """Train a small classifier to answer as TEACHER does, and keep the weights that are best on the dev split."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    from longspan.compression.distill import Distillation
    from longspan.compression.distillation_loss import DistillationLoss
    from longspan.tasks.compress import distill_on_task
    from longspan.tasks.fine_tune import chosen_task
    from longspan.tasks.text_files import Columns

    loss = DistillationLoss.fastformers(hidden_distance=hidden_distance.value)
    if not fastformers:
        loss = DistillationLoss(
            logits=logits,
            temperature=temperature,
            hard_labels=hard_labels,
            hidden_states=hidden_states,
            hidden_distance=hidden_distance.value,
            embeddings=embeddings,
            relations=relations,
            relation_heads=relation_heads,
            layer_map=_layer_map(layer_map),
        )
    settings = Distillation(
        loss=loss,
        epochs=epochs,
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        learning_rate=learning_rate,
        evaluate_steps=evaluate_steps,
        save_steps=save_steps,
        keep="all" if keep_states else "logits",
        bf16=bf16,
        seed=seed,
    )
    quiet_transformers()
    columns = Columns(text=text_column, label=label_column, text_pair=text_pair_column)
    chosen = chosen_task(name, data=data, train=train, dev=dev, columns=columns, seed=seed)
    done = distill_on_task(
        teacher, chosen, out, settings, student=student, layers=layers, max_tokens=max_tokens, cache=cache
    )
    if os.environ.get("RANK", "0") != "0":  # under torchrun the first process speaks for all
        return
    typer.echo(f"{done.out}: {done.parameters_after:,} parameters; the teacher has {done.parameters_before:,}")
    for who, figures in (("teacher", done.before), ("student", done.after)):
        typer.echo(f"dev, {who}: " + ", ".join(f"{figure} {value:.4f}" for figure, value in figures.items()))


def _layer_map(text: str) -> Any:
    if ":" not in text:
        return text
    try:
        return tuple((int(low), int(high)) for low, _, high in (pair.partition(":") for pair in text.split(",")))
    except ValueError as error:
        raise ValueError(
            f"--layer-map pairs a student layer with a teacher layer, 1:4,2:8,3:12; got {text!r}"
        ) from error
