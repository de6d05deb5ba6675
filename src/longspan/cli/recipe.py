"""`longspan recipe`: published results, made again from beginning to end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from longspan.cli.quiet import quiet_transformers

app = typer.Typer(help="Repeat a published result from beginning to end.", no_args_is_help=True)


@app.callback()
def _options() -> None: ...


@app.command()
def reviews(
    output: Annotated[Path, typer.Argument(help="Folder of all steps; one that was cut short goes on.")],
    teacher: Annotated[
        str, typer.Option(help="Directory or hub name of the encoder that the teacher begins as.")
    ] = "sentence-transformers/all-mpnet-base-v2",
    student: Annotated[
        str, typer.Option(help="Directory or hub name of the encoder that the students begin as.")
    ] = "sentence-transformers/all-MiniLM-L6-v2",
    teacher_rows: Annotated[int | None, typer.Option(min=1, help="Reviews that the teacher learns from.")] = None,
    train_rows: Annotated[int | None, typer.Option(min=1, help="Reviews that the students learn from.")] = None,
    test_rows: Annotated[int | None, typer.Option(min=1, help="Reviews of the test split.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=3, help="How much of a review is read.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few hundred reviews: a test of every step.")] = False,
) -> None:
    """FastFormers' table on film reviews: a classifier made small and fast, row by row."""
    from rich.console import Console
    from rich.table import Table

    from longspan.recipes.reviews import Reviews
    from longspan.recipes.reviews import reviews as run

    quiet_transformers()
    given = {"teacher_rows": teacher_rows, "train_rows": train_rows, "test_rows": test_rows, "max_tokens": max_tokens}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if max_tokens is not None:
        changes["teacher_tokens"] = max_tokens
    make = Reviews.quick if quick else Reviews
    config = make(output=str(output), teacher=teacher, student=student, **changes)
    rows = run(config, tell=lambda line: typer.echo(line, err=True))
    table = Table(title=f"{config.test_rows} film reviews, one at a time")
    for name in ("", "engine", "ms a review", "faster", "accuracy", "of the teacher's"):
        table.add_column(name, justify="left" if name in ("", "engine") else "right")
    for row in rows:
        faster, share = f"{row.speedup:.1f}x", f"{row.of_teacher:.1%}"
        table.add_row(row.name, row.engine, f"{row.ms_per_review:.2f}", faster, f"{row.accuracy:.4f}", share)
    Console().print(table)
