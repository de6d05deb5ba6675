"""`longspan prune`: a classifier without the heads and feed-forward units that matter least."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from longspan.cli.quantize import PrecisionName
from longspan.cli.quiet import quiet_transformers


class Layers(str, Enum):
    """Who competes."""

    uniform = "uniform"
    across = "global"


def prune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory or hub name of a classifier.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write; it must not exist yet, or be empty.")],
    heads: Annotated[int | None, typer.Option(help="Attention heads to keep a layer. Default: all.")] = None,
    ffn: Annotated[int | None, typer.Option(help="Feed-forward units to keep a layer. Default: all.")] = None,
    layers: Annotated[
        Layers, typer.Option(help="uniform: as many in every layer; global: the best of all, --heads on average.")
    ] = Layers.uniform,
    keep_last: Annotated[
        bool, typer.Option("--keep-last", help="Leave the last layer whole: longspan's engine needs little of it.")
    ] = False,
    speedup: Annotated[
        float | None, typer.Option(help="In place of --heads and --ffn: how many times as fast, by measured cost.")
    ] = None,
    precision: Annotated[
        PrecisionName | None, typer.Option(help="What --speedup is measured in. Default: PyTorch's own fp32.")
    ] = None,
    activation: Annotated[str | None, typer.Option(help="Another activation, such as relu; distill it then.")] = None,
    normalize: Annotated[bool, typer.Option(help="Compare importance across layers by its share of a layer.")] = False,
    name: Annotated[
        str | None, typer.Option("--task", help="A task of SuperGLUE (boolq, cb, copa, ...), imdb or 20newsgroups.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with SuperGLUE's folders, for its tasks.")] = None,
    train: Annotated[Path | None, typer.Option(help="Or a file with labeled rows: .csv, .tsv, .tab or .jsonl.")] = None,
    dev: Annotated[Path | None, typer.Option(help="Rows to judge by. Default: a tenth of --train.")] = None,
    text_column: Annotated[str, typer.Option(help="Name of the column, or its number from 0.")] = "text",
    label_column: Annotated[str, typer.Option(help="Column of the labels.")] = "label",
    text_pair_column: Annotated[str | None, typer.Option(help="Column of a second text, for pairs.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Training rows that importance is measured on.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Rows a batch. Fewer tell more, and take longer.")] = 8,
    max_tokens: Annotated[int | None, typer.Option(help="Longest row. Default: what MODEL reads.")] = None,
    seed: Annotated[int, typer.Option(help="Decides which rows.")] = 0,
) -> None:
    """Cut attention heads and feed-forward units out of a classifier."""
    from longspan.compression.prune import Pruning
    from longspan.tasks.compress import prune_on_task
    from longspan.tasks.fine_tune import chosen_task
    from longspan.tasks.text_files import Columns

    pruning = Pruning(
        heads=heads,
        ffn=ffn,
        layers=layers.value,
        keep_last=keep_last,
        speedup=speedup,
        normalize=normalize,
        activation=activation,
    )
    quiet_transformers()
    columns = Columns(text=text_column, label=label_column, text_pair=text_pair_column)
    chosen = chosen_task(name, data=data, train=train, dev=dev, columns=columns, seed=seed)
    done = prune_on_task(
        model,
        chosen,
        out,
        pruning,
        rows=rows,
        batch=batch,
        max_tokens=max_tokens,
        precision=None if precision is None else precision.value,
        seed=seed,
    )
    typer.echo(f"{done.out}: {done.parameters_after:,} parameters instead of {done.parameters_before:,}")
    typer.echo("heads x units a layer: " + ", ".join(f"{heads} x {units}" for heads, units in done.shape))
    for when, figures in (("before", done.before), ("after", done.after)):
        typer.echo(f"dev {when}: " + ", ".join(f"{figure} {value:.4f}" for figure, value in figures.items()))
