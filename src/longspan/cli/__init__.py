"""The `longspan` command: parse, call, print. Commands import what they need when they run, so that --help is quick."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from longspan import __version__
from longspan.cli import (
    add_ngrams,
    answer,
    bench,
    classify,
    convert,
    distill,
    embed,
    evaluate,
    export,
    generate,
    plan,
    prune,
    quantize,
    recipe,
    train,
)


class _Commands(TyperGroup):
    """Turns a caller's mistake into a line on stderr and exit code 2. Other errors are bugs and show a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, NotImplementedError, ImportError) as error:
            if isinstance(error, BrokenPipeError) or getattr(
                error, "name", None
            ):  # `longspan ... | head`; a broken import
                raise
            typer.echo(f"longspan: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    name="longspan",
    cls=_Commands,
    help="Transformers that read long documents.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None: ...


app.command("add-ngrams")(add_ngrams.add_ngrams)
app.command("answer")(answer.answer)
app.command("classify")(classify.classify)
app.command("convert")(convert.convert)
app.command("distill")(distill.distill)
app.command("embed")(embed.embed)
app.command("generate")(generate.generate)
app.command("plan")(plan.plan)
app.command("prune")(prune.prune)
app.command("quantize")(quantize.quantize)
app.command("export")(export.export)
app.add_typer(bench.app, name="bench")
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(recipe.app, name="recipe")
app.add_typer(train.app, name="train")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv` (None: the process's own) and exits: 0, 2 after an error, 130 after Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a document may hold characters that the terminal's encoding lacks
    app(args=argv, prog_name="longspan")
