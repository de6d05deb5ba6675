"""`longspan train`: fine-tuning on a task, and the training run that made the reader that longspan ships."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from longspan.cli.quiet import quiet_transformers

app = typer.Typer(help="Train a model.", no_args_is_help=True)


@app.callback()
def _options() -> None: ...


@app.command()
def reader(
    base: Annotated[str, typer.Option(help="Directory or hub name of a BERT-like sentence encoder to start from.")],
    data: Annotated[Path, typer.Option(help="Folder with boolq_articles, fever, multirc and xquad.")],
    output: Annotated[Path, typer.Option(help="Directory for checkpoints and the model; a run found there goes on.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 1500,
    batch: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Of the encoder; the scorers learn faster.")] = 1e-4,
    bf16: Annotated[bool, typer.Option(help="Compute in bfloat16.")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: PyTorch's choice.")] = None,
    seed: Annotated[int, typer.Option(help="Decides the data order and every random choice.")] = 0,
) -> None:
    """Train the evidence reader of `longspan answer`."""
    from longspan.training.reader import ReaderTraining, train_reader

    config = ReaderTraining(
        base=base,
        data=str(data),
        output=str(output),
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        bf16=bf16,
        threads=threads,
        seed=seed,
    )
    typer.echo(f"wrote {train_reader(config)}")


@app.command()
def task(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory or hub name of a checkpoint to start from.")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Directory for checkpoints and the model; a run found there goes on.")
    ],
    name: Annotated[
        str | None,
        typer.Option("--task", help="A task of SuperGLUE (boolq, cb, copa, ...), imdb or 20newsgroups."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with SuperGLUE's folders, for its tasks.")] = None,
    train: Annotated[
        Path | None, typer.Option(help="Or a file with rows to train on: .csv, .tsv, .tab or .jsonl.")
    ] = None,
    dev: Annotated[
        Path | None, typer.Option(help="Rows that choose the best checkpoint. Default: a tenth of --train.")
    ] = None,
    test: Annotated[Path | None, typer.Option(help="Rows that are read at the end.")] = None,
    text_column: Annotated[
        str, typer.Option(help="Name of the column, or its number from 0 in a file whose first row names none.")
    ] = "text",
    label_column: Annotated[str, typer.Option(help="Column of the labels.")] = "label",
    text_pair_column: Annotated[str | None, typer.Option(help="Column of a second text, for pairs.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Longest row; the rest is cut. More than MODEL reads makes it long. Default: what it reads."),
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens that a token of a model made long sees, both sides.")] = 512,
    epochs: Annotated[float, typer.Option(help="Passes over the training rows.")] = 3.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps, in place of --epochs.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows that a process computes at a time.")] = 16,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches a step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="The highest; it rises first and falls then.")] = 3e-5,
    evaluate_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps between readings of dev. Default: once a pass.")
    ] = None,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 200,
    bf16: Annotated[
        bool | None, typer.Option(help="Compute in bfloat16. Default: where the processor has instructions for it.")
    ] = None,
    new_head: Annotated[
        bool, typer.Option(help="Draw the classifier anew where MODEL has one for other labels.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: PyTorch's choice.")] = None,
    seed: Annotated[int, typer.Option(help="Decides splits, order and every random choice.")] = 0,
) -> None:
    """Fine-tune a model on a task, and keep the weights that are best on its dev split."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    from longspan.tasks.fine_tune import chosen_task, fine_tune
    from longspan.tasks.text_files import Columns

    quiet_transformers()
    columns = Columns(text=text_column, label=label_column, text_pair=text_pair_column)
    chosen = chosen_task(name, data=data, train=train, dev=dev, test=test, columns=columns, seed=seed)
    done = fine_tune(
        model,
        chosen,
        output=out,
        max_tokens=max_tokens,
        window=window,
        new_head=new_head,
        epochs=epochs,
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        learning_rate=learning_rate,
        evaluate_steps=evaluate_steps,
        save_steps=save_steps,
        bf16=bf16,
        seed=seed,
    )
    if os.environ.get("RANK", "0") != "0":  # under torchrun the first process speaks for all
        return
    typer.echo(f"wrote {done.model}, the best of {done.steps} steps (step {done.best_step})")
    for split, figures in (("dev", done.dev), ("test", done.test)):
        if figures is not None:
            typer.echo(f"{split}: " + ", ".join(f"{figure} {value:.4f}" for figure, value in figures.items()))
    if done.predictions is not None:
        typer.echo(f"wrote {done.predictions}")
