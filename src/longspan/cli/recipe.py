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
    teacher_tokens: Annotated[
        int | None, typer.Option(min=3, help="How much of a review it reads while it learns.")
    ] = None,
    train_rows: Annotated[int | None, typer.Option(min=1, help="Reviews whose labels the students learn from.")] = None,
    taught_rows: Annotated[int | None, typer.Option(min=1, help="Those of them that the teacher explains.")] = None,
    label_epochs: Annotated[float | None, typer.Option(help="Passes of a student over the labels.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over what the teacher explains, each time.")] = None,
    cut_epochs: Annotated[float | None, typer.Option(help="The same for students that were cut.")] = None,
    dev_rows: Annotated[int | None, typer.Option(min=1, help="Reviews that choose the best checkpoints.")] = None,
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
    given = {
        "teacher_rows": teacher_rows,
        "teacher_tokens": teacher_tokens,
        "train_rows": train_rows,
        "taught_rows": taught_rows,
        "label_epochs": label_epochs,
        "epochs": epochs,
        "cut_epochs": cut_epochs,
        "dev_rows": dev_rows,
        "test_rows": test_rows,
        "max_tokens": max_tokens,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
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


@app.command()
def characters(
    output: Annotated[Path, typer.Argument(help="Folder of all steps; one that was cut short goes on.")],
    articles: Annotated[
        Path,
        typer.Option(help="Articles to learn from: .jsonl or .jsonl.xz of records with a text, a sentence a line."),
    ],
    minutes: Annotated[
        float,
        typer.Option(help="For the slowest of the four trainings, by a measurement; it decides the tokens of all."),
    ] = 50.0,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens that each training reads, instead.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The highest of the schedule.")] = None,
    stretches: Annotated[int | None, typer.Option(min=1, help="Stretches of the test text that are evaluated.")] = None,
    ablation_share: Annotated[
        float | None, typer.Option(help="Of the tokens, for each ablation; 0 leaves them out.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A minute or two: a test of every step.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: PyTorch's choice.")] = None,
    seed: Annotated[int, typer.Option(help="Decides the splits, the order and the weights to begin with.")] = 0,
) -> None:
    """Long against short context: character models trained at equal compute on Wikipedia articles."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    from rich.console import Console
    from rich.table import Table

    from longspan.recipes.characters import Characters
    from longspan.recipes.characters import characters as run

    quiet_transformers()
    given = {
        "tokens": tokens,
        "learning_rate": learning_rate,
        "stretches": stretches,
        "ablation_share": ablation_share,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    make = Characters.quick if quick else Characters
    config = make(output=str(output), articles=str(articles), minutes=minutes, seed=seed, **changes)
    report = run(config, tell=lambda line: typer.echo(line, err=True))
    console = Console()
    if not console.is_terminal:
        console.width = 140  # nobody's window sets a limit
    for ablation, title in ((False, "bits per character at equal compute"), (True, "ablations: bits per character")):
        rows = [row for row in report["rows"] if row["ablation"] == ablation]
        if not rows:
            continue
        table = Table(title=title)
        lengths = [length for length in rows[0]["bits"] if any(row["bits"][length] is not None for row in rows)]
        gain = () if ablation else ("gain of the longest",)
        columns = ("", "row", *(f"{length:,}" for length in lengths), *gain, "M tokens", "tokens/s", "minutes", "GiB")
        for column in columns:
            table.add_column(column, justify="right" if column else "left")
        for row in rows:
            values = (row["bits"][length] for length in lengths)
            bits = ("-" if value is None else f"{value:.4f}" for value in values)
            table.add_row(
                row["name"],
                f"{row['length']:,}",
                *bits,
                *(f"{row['gain']:.4f} ± {row['gain_error']:.4f}" for _ in gain),
                f"{row['tokens'] / 1e6:.1f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['minutes']:.1f}",
                f"{row['peak_memory_gib']:.2f}",
            )
        console.print(table)
    for reference in report["references"]:
        bits = reference["note"] if reference["bits"] is None else f"{reference['bits']:.4f}"
        typer.echo(f"{reference['name']}: {bits}")
    typer.echo(f"wrote {output / 'report.json'} and {output / 'curves.png'}")


@app.command()
def reader(
    output: Annotated[Path, typer.Argument(help="Folder of all steps; one that was cut short goes on.")],
    data: Annotated[Path, typer.Option(help="Folder with boolq_articles, fever, multirc and xquad.")],
    model: Annotated[str | None, typer.Option(help="Directory of an evidence reader. Default: longspan's own.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps of each small reader.")] = None,
    questions: Annotated[int | None, typer.Option(min=1, help="Questions in a seeded sample. Default: all.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few rows: a test of every step.")] = False,
) -> None:
    """The evidence reader pruned, taught again and quantized: hits and speed, row by row."""
    from rich.console import Console
    from rich.table import Table

    from longspan.recipes.reader import Readers, readers

    quiet_transformers()
    given = {"model": model, "steps": steps, "questions": questions}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    make = Readers.quick if quick else Readers
    config = make(output=str(output), data=str(data), **changes)
    rows = readers(config, tell=lambda line: typer.echo(line, err=True))
    table = Table(title=f"{config.questions or 'all'} questions, {config.condition}")
    for name in ("", "precision", "top-1", "top-3", "of the first", "tokens/s", "faster"):
        table.add_column(name, justify="left" if name in ("", "precision") else "right")
    for row in rows:
        share, faster = f"{row.of_first:.1%}", f"{row.faster:.2f}x"
        speed = f"{row.tokens_per_second:,.0f}"
        table.add_row(row.name, row.precision, f"{row.top1:.3f}", f"{row.top3:.3f}", share, speed, faster)
    Console().print(table)
