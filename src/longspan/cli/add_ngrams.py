"""`longspan add-ngrams`: a classifier that also hears what tokens and pairs of them say by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longspan.cli.quiet import quiet_transformers


def add_ngrams(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory or hub name of a classifier.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write; it must not exist yet, or be empty.")],
    teacher: Annotated[
        str | None, typer.Option(help="A larger classifier whose opinion the n-grams learn beside the labels.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of teacher outputs, such as distill's. Default: OUT-teacher.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--task", help="A task of SuperGLUE (boolq, cb, multirc, ...), imdb or 20newsgroups.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with SuperGLUE's folders, for its tasks.")] = None,
    train: Annotated[Path | None, typer.Option(help="Or a file with labeled rows: .csv, .tsv, .tab or .jsonl.")] = None,
    dev: Annotated[
        Path | None, typer.Option(help="Rows that decide how loud they are. Default: a tenth of --train.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="Name of the column, or its number from 0.")] = "text",
    label_column: Annotated[str, typer.Option(help="Column of the labels.")] = "label",
    text_pair_column: Annotated[str | None, typer.Option(help="Column of a second text, for pairs.")] = None,
    buckets: Annotated[
        int, typer.Option(min=1, help="Rows of the table; n-grams that share one are mixed up.")
    ] = 1_048_576,
    max_tokens: Annotated[int | None, typer.Option(help="Longest row. Default: what MODEL reads.")] = None,
    seed: Annotated[int, typer.Option(help="Decides the split.")] = 0,
) -> None:
    """Put a linear model of n-grams beside a small classifier: it costs next to nothing and knows many phrases."""
    from longspan.tasks.compress import add_ngrams_on_task
    from longspan.tasks.fine_tune import chosen_task
    from longspan.tasks.text_files import Columns

    quiet_transformers()
    columns = Columns(text=text_column, label=label_column, text_pair=text_pair_column)
    chosen = chosen_task(name, data=data, train=train, dev=dev, columns=columns, seed=seed)
    done = add_ngrams_on_task(model, chosen, out, teacher=teacher, cache=cache, buckets=buckets, max_tokens=max_tokens)
    typer.echo(f"{done.out}: {done.parameters_after:,} parameters, {done.parameters_before:,} without n-grams")
    for when, figures in (("before", done.before), ("after", done.after)):
        typer.echo(f"dev {when}: " + ", ".join(f"{figure} {value:.4f}" for figure, value in figures.items()))
