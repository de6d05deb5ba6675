"""What the commands over a corpus share: their options, and a run with its progress and its last line."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longspan.cli.quiet import quiet_transformers

if TYPE_CHECKING:
    from longspan.inference.corpus import Corpus
    from longspan.inference.corpus_worker import Task


class Engine(str, Enum):
    local = "local"
    ray = "ray"


CORPUS_HELP = (
    "Folder of text, Markdown and HTML files; or a .parquet or .jsonl file with a row a document, or a folder of such."
)
CorpusPath = Annotated[Path, typer.Argument(metavar="CORPUS", help=CORPUS_HELP)]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the rows, in Parquet. A run there goes on.")]
MaxTokens = Annotated[
    int | None, typer.Option(min=3, help="Cut longer documents to so many tokens. Default: read all, in windows.")
]
TextColumn = Annotated[str, typer.Option(help="Column of the texts in Parquet and JSON Lines.")]
IdColumn = Annotated[str | None, typer.Option(help="Column of their ids. Default: id, or else the row's number.")]
Encoding = Annotated[
    str | None, typer.Option(help="Text encoding of the files. Default: UTF-8, or what an HTML page declares.")
]
EngineOption = Annotated[Engine, typer.Option(help="What runs the workers: this machine, or Ray Data.")]
Instances = Annotated[
    int | None, typer.Option(min=1, help="Copies of the model that work at the same time. Default: fill the cores.")
]
ThreadsPerInstance = Annotated[int, typer.Option(min=1, help="Threads of each.")]
Address = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Ray cluster to join. Default: Ray starts on this machine.")
]


def read_corpus(
    task: Task,
    corpus: Corpus,
    out: Path,
    *,
    engine: Engine,
    instances: int | None,
    threads_per_instance: int,
    address: str | None,
) -> None:
    """Runs the task with a count on stderr where that is a terminal, and prints what it did. Exit code 1 where every
    document failed."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from longspan.inference.corpus_run import run_corpus

    quiet_transformers()
    stderr = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        shown = bar.add_task("Loading")

        def progress(documents: int, errors: int) -> None:
            speed = documents / max(bar.tasks[0].elapsed or 0, 1e-3)
            bar.update(shown, description=f"{documents:,} documents, {speed:.3g} a second, {errors:,} errors")

        done = run_corpus(
            task,
            corpus,
            out,
            engine=engine.value,
            instances=instances,
            threads_per_instance=threads_per_instance,
            address=address,
            progress=progress,
        )
    before = f", {done.skipped:,} had theirs before" if done.skipped else ""
    typer.echo(f"{out}: {done.documents:,} rows in {done.seconds:.1f} s, {done.errors:,} with an error{before}")
    if done.first_error is not None:
        typer.echo(f"first error: {done.first_error}", err=True)
    if done.errors and done.errors == done.documents:
        raise typer.Exit(1)
