"""`longspan evaluate`: how good a model is on labelled data, beside what people would use instead."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from longspan.cli.answer import Precision
from longspan.cli.quiet import quiet_transformers

app = typer.Typer(help="Evaluate a model.", no_args_is_help=True)


@app.callback()
def _options() -> None: ...


class Condition(str, Enum):
    """as_is: the article alone. buried: the article after 6,000 words of other articles."""

    as_is = "as_is"
    buried = "buried"


@app.command()
def reader(
    data: Annotated[Path, typer.Option(help="Folder with the questions, articles and their evidence.")],
    split: Annotated[str, typer.Option(help="Part of the data.")] = "dev",
    condition: Annotated[
        Condition, typer.Option(help="Each article as it is, or buried after 6,000 words of others.")
    ] = Condition.buried,
    model: Annotated[str | None, typer.Option(help="Directory of an evidence reader. Default: longspan's own.")] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="What the reader computes in. Default: bf16 where the CPU has it, or fp32.")
    ] = None,
    minilm: Annotated[
        str, typer.Option(help="Directory or hub name of the sentence encoder to compare with.")
    ] = "sentence-transformers/all-MiniLM-L6-v2",
    limit: Annotated[int | None, typer.Option(min=1, help="Questions in a seeded sample. Default: all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Measure how often a passage of at most 100 words holds the evidence, for the reader and for simpler systems."""
    from longspan.tasks.evidence import evaluate_reader

    quiet_transformers()
    table = evaluate_reader(
        data,
        split=split,
        condition=condition.value,
        model=model,
        precision=None if precision is None else precision.value,
        minilm=minilm,
        limit=limit,
    )
    if as_json:
        typer.echo(json.dumps(table, indent=2))
    else:
        _print_table(table)


def _print_table(table: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=f"{table['questions']} questions, {table['condition']}")
    names = list(table["rows"][0])
    for name in names:
        shown.add_column(name.replace("_", " "), justify="left" if name == "system" else "right")
    for row in table["rows"]:
        shown.add_row(*(_cell(row[name]) for name in names))
    Console().print(shown)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
