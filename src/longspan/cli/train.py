"""`longspan train`: the training runs that made what longspan ships."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
