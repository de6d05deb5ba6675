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
        _print_table(table | {"title": f"{table['questions']} questions, {table['condition']}"})


@app.command()
def task(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory or hub name of a classifier.")],
    name: Annotated[
        str | None, typer.Option("--task", help="A task of SuperGLUE (boolq, cb, copa, ...), imdb or 20newsgroups.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with SuperGLUE's folders, for its tasks.")] = None,
    file: Annotated[Path | None, typer.Option(help="Or a file with labelled rows: .csv, .tsv, .tab or .jsonl.")] = None,
    text_column: Annotated[str, typer.Option(help="Column of the text in --file.")] = "text",
    label_column: Annotated[str, typer.Option(help="Column of the labels.")] = "label",
    text_pair_column: Annotated[str | None, typer.Option(help="Column of a second text, for pairs.")] = None,
    split: Annotated[str, typer.Option(help="Part of the task: train, dev or test.")] = "dev",
    engine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:PRECISION]",
            help="huggingface, longspan[:fp32|bf16|int8] or onnx[:fp32|int8]; repeat it to compare. Default: longspan.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Documents that are computed at a time.")] = 1,
    max_tokens: Annotated[
        int | None, typer.Option(min=3, help="Longer rows are cut. Default: what the model reads.")
    ] = None,
    fixed_length: Annotated[
        int | None, typer.Option(min=3, help="Pad every row to so many tokens. Default: to its batch's longest.")
    ] = None,
    instances: Annotated[int, typer.Option(min=1, help="Copies of the model that work at the same time.")] = 1,
    threads_per_instance: Annotated[int, typer.Option(min=1, help="Threads of each.")] = 1,
    price_per_hour: Annotated[
        float | None, typer.Option(help="Of the machine, for the cost of a million documents.")
    ] = None,
    onnx: Annotated[
        Path | None, typer.Option(help="What `longspan export` wrote of MODEL. Default: exported for the occasion.")
    ] = None,
    seed: Annotated[int, typer.Option(help="That of the training run, where it drew the task's splits.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples in a seeded sample. Default: all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Measure a classifier on a task: its metrics, latency, throughput and cost, on one engine or several."""
    if (name is None) == (file is None):
        raise ValueError("name either a --task or a --file of labelled rows.")
    from longspan.tasks.fine_tune import named_task
    from longspan.tasks.measure import evaluate_task, task_of_file
    from longspan.tasks.text_files import Columns

    quiet_transformers()
    if name is not None:
        chosen = named_task(name, data=data, seed=seed)
    else:
        assert file is not None
        chosen = task_of_file(file, model, Columns(text=text_column, label=label_column, text_pair=text_pair_column))
    found = evaluate_task(
        model,
        chosen,
        split,
        engines=engine or ["longspan"],
        batch=batch,
        max_tokens=max_tokens,
        fixed_length=fixed_length,
        instances=instances,
        threads_per_instance=threads_per_instance,
        price_per_hour=price_per_hour,
        onnx_file=onnx,
        limit=limit,
    )
    if as_json:
        rows = [measured.to_dict() for measured in found]
        typer.echo(json.dumps({"model": model, "task": chosen.name, "split": split, "rows": rows}, indent=2))
        return
    first = found[0]
    title = (
        f"{chosen.name} {split}: {first.documents:,} documents, {first.tokens:,} tokens; batch {batch}, "
        f"{'dynamic length' if fixed_length is None else f'length {fixed_length}'}, "
        f"{instances} x {threads_per_instance} threads"
    )
    _print_table({"title": title, "rows": [_shown(row, first) for row in found]})


@app.command()
def lm(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory or hub name of a language model.")],
    data: Annotated[Path, typer.Option(help="Text file or folder, split as `longspan train lm` splits it.")],
    split: Annotated[str, typer.Option(help="Part of the text: test, dev, train or all.")] = "test",
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 32_256,
    stride: Annotated[int, typer.Option(min=1, help="Tokens from window to window, and scored in each.")] = 512,
    limit: Annotated[int | None, typer.Option(min=1, help="Windows in a seeded sample. Default: all.")] = None,
    references: Annotated[
        bool, typer.Option("--references", help="What gzip, xz and PPMd make of the same text, beside it.")
    ] = False,
    bf16: Annotated[
        bool | None, typer.Option(help="Compute in bfloat16. Default: where the processor has instructions for it.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: PyTorch's choice.")] = None,
    seed: Annotated[int, typer.Option(help="Draws the sample of --limit.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure the bits per character of a language model, over windows that overlap."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    from dataclasses import asdict

    from longspan.tasks.language import bits_per_character, compressors, load_language_model
    from longspan.training.texts import find_texts
    from longspan.training.token_files import encode_texts

    quiet_transformers()
    texts = find_texts(data)
    loaded, tokenizer = load_language_model(model)
    tokens, units = encode_texts(texts, split, tokenizer)
    if not as_json:
        typer.echo(f"{split} of {texts.name} ({texts.about}): {len(tokens):,} tokens", err=True)
    score = bits_per_character(
        loaded, tokenizer, tokens, length=length, stride=stride, limit=limit, bf16=bf16, seed=seed
    )
    others = compressors(texts.read(split), units=units) if references else []
    if as_json:
        rows = [asdict(other) for other in others]
        typer.echo(json.dumps({"model": model, "split": split, **asdict(score), "references": rows}, indent=2))
        return
    typer.echo(
        f"{score.bits:.4f} bits per {score.unit}: {score.windows:,} of {score.all_windows:,} windows of {length:,} "
        f"tokens, stride {stride:,}, {score.tokens:,} tokens scored; {score.first_window}; "
        f"{score.tokens_per_second:,.0f} tokens read a second"
    )
    for other in others:
        typer.echo(f"{other.name}: {other.note if other.bits is None else f'{other.bits:.4f}'}")


def _shown(row: Any, first: Any) -> dict[str, Any]:
    """A measurement's columns; the speed-up is over the first engine's."""
    cost = {} if row.cost_per_million is None else {"cost_per_million": row.cost_per_million}
    return {
        "engine": f"{row.engine} {row.precision}",
        **row.metrics,
        "p50_ms": row.latency_ms_p50,
        "p95_ms": row.latency_ms_p95,
        "docs/s": row.documents_per_second,
        "tokens/s": round(row.tokens_per_second),
        **cost,
        "speed-up": row.documents_per_second / first.documents_per_second,
    }


def _print_table(table: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=table["title"])
    names = list(table["rows"][0])
    for name in names:
        shown.add_column(name.replace("_", " "), justify="left" if name in ("system", "engine") else "right")
    for row in table["rows"]:
        shown.add_row(*(_cell(row[name]) for name in names))
    console = Console(markup=False)  # a name or a note may hold brackets
    if not console.is_terminal:
        console.width = 120  # nobody's window sets a limit
    console.print(shown)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
