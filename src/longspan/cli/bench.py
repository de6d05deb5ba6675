"""`longspan bench`: how fast longspan is here, beside what people would use instead, each at its best."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.quiet import quiet_transformers

if TYPE_CHECKING:
    from longspan.bench.measure import Case

app = typer.Typer(help="Measure speed and memory, beside others, on this machine.", no_args_is_help=True)

Quick = Annotated[bool, typer.Option("--quick", help="Tiny sizes, one round: shows that everything runs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a table.")]
Out = Annotated[
    Path | None,
    typer.Option(help="Result file. Default: results/<date>_<cpu>_<benchmark>.json; with --json: none."),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of every system. Default: PyTorch's choice.")]
Seconds = Annotated[
    float, typer.Option(min=0, help="How long the systems of one case take turns, three rounds or more.")
]
Memory = Annotated[bool, typer.Option("--memory", help="Also measure each system's memory, in processes of their own.")]
Batches = Annotated[list[int] | None, typer.Option("--batch", min=1, help="Rows in a batch; may be repeated.")]
Tokens = Annotated[list[int] | None, typer.Option(min=1, help="Tokens in a row; may be repeated.")]


class Shape(str, Enum):
    """Which encoder: Longformer-large's or -base's layers, or all of ModernBERT-base."""

    large = "large"
    base = "base"
    modernbert = "modernbert"


class Precision(str, Enum):
    """Of inputs, weights and outputs."""

    fp32 = "fp32"
    bf16 = "bf16"


@app.callback()
def _options() -> None: ...


@app.command()
def encoder(
    context: typer.Context,
    shape: Annotated[Shape, typer.Option(help="The encoder: large and base are Longformer's.")] = Shape.large,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers. Default: 4, modernbert 22.")] = None,
    batch: Batches = None,
    tokens: Tokens = None,
    threads: Threads = None,
    seconds: Seconds = 15,
    memory: Memory = False,
    quick: Quick = False,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Whole encoders on long texts, against Hugging Face's own in fp32 and bf16."""
    from longspan.bench.cases import encoder_cases

    cases = encoder_cases(shape.value, layers=layers, batches=batch or (), tokens=tokens or (), quick=quick)
    _run(context, f"encoder-{shape.value}", cases, memory=memory)


@app.command()
def attention(
    context: typer.Context,
    threads: Threads = None,
    seconds: Seconds = 10,
    memory: Memory = False,
    quick: Quick = False,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Sliding window attention alone, against all ways to compute it in PyTorch; --memory: up to 262,144 tokens."""
    from longspan.bench.cases import attention_cases, memory_cases

    cases = memory_cases(quick=quick) if memory else ()
    _run(context, "attention", attention_cases(quick=quick), memory_cases=cases)


@app.command()
def dense(
    context: typer.Context,
    batch: Batches = None,
    tokens: Tokens = None,
    threads: Threads = None,
    seconds: Seconds = 10,
    memory: Memory = False,
    quick: Quick = False,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """A small BERT on short texts, against Hugging Face, ONNX Runtime and OpenVINO."""
    from longspan.bench.cases import dense_cases

    cases = dense_cases(batches=batch or (), tokens=tokens or (), quick=quick)
    _run(context, "dense", cases, memory=memory)


@app.command()
def scaling(
    context: typer.Context,
    max_tokens: Annotated[int, typer.Option(min=256, help="Longest row of tokens that is tried.")] = 2**26,
    memory_gib: Annotated[float, typer.Option(min=0, help="Rows that would need more memory are left out.")] = 20,
    precision: Annotated[list[Precision] | None, typer.Option(help="fp32 or bf16; may be repeated.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with today's result file, or the one of --out.")
    ] = False,
    threads: Threads = None,
    seconds: Annotated[float, typer.Option(min=0, help="How long a length is measured again and again.")] = 2,
    quick: Quick = False,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """LongNet and Longformer layers from 256 tokens to as many as fit in memory, against dense SDPA.

    Also LongNet's attention beside the machine's matrix products, and training steps of the character model. Writes the
    result after each length, and a plot beside it.
    """
    from longspan.bench import results
    from longspan.bench.cases import character_cases, dilated_cases
    from longspan.bench.run import run_scaling
    from longspan.bench.scaling import LAYERS, TINY_LAYERS, draw

    _prepare(context)
    precisions = [one.value for one in precision or Precision]
    topic = "bench-scaling-quick" if quick else "bench-scaling"
    path = out or (None if as_json and not resume else results.default_path(results.document(topic, "", [], [])))
    earlier = None
    if resume and path is not None and path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
    result = _with_progress(
        lambda tell: run_scaling(
            _typed(context),
            layers=TINY_LAYERS if quick else LAYERS,
            cases=[
                *dilated_cases(precisions=precisions, quick=quick),
                *character_cases(precisions=precisions, quick=quick),
            ],
            precisions=precisions,
            seconds=0 if quick else seconds,
            quick=quick,
            max_tokens=min(max_tokens, 1024) if quick else max_tokens,
            memory_gib=memory_gib,
            earlier=earlier,
            tell=tell,
            save=lambda part: None if path is None else results.write(part, path),
        )
    )
    _show(result, path, as_json=as_json)
    if path is not None:
        picture = path.with_suffix(".png")
        draw(result["rows"], picture)
        typer.echo(f"wrote {picture}", err=True)


@app.command()
def corpus(
    context: typer.Context,
    rounds: Annotated[int, typer.Option(min=1, help="How often each engine takes its turn.")] = 3,
    quick: Quick = False,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Documents read by one worker and by two, on the worker pool and on Ray, against plain processes."""
    from longspan.bench.corpora import CorpusCase
    from longspan.bench.run import run_corpora

    quiet_transformers()
    case = CorpusCase(chunks=4, chars=200) if quick else CorpusCase()
    result = _with_progress(
        lambda tell: run_corpora(_typed(context), case, rounds=1 if quick else rounds, quick=quick, tell=tell)
    )
    _finish(context, result)


def _run(context: typer.Context, name: str, cases: Sequence[Case], **options: Any) -> None:
    """What the benchmarks of cases have in common; the options that they share are read from the context."""
    from longspan.bench.run import run

    _prepare(context)
    asked = context.params
    options |= {"quick": asked["quick"], "seconds": 0 if asked["quick"] else asked["seconds"]}
    result = _with_progress(lambda tell: run(f"bench-{name}", _typed(context), cases, tell=tell, **options))
    _finish(context, result)


def _finish(context: typer.Context, result: dict[str, Any]) -> None:
    from longspan.bench import results

    asked = context.params
    path = asked["out"] or (None if asked["as_json"] else results.default_path(result))
    _show(result, path, as_json=asked["as_json"])


def _prepare(context: typer.Context) -> None:
    import torch

    quiet_transformers()
    if context.params["threads"] is not None:
        torch.set_num_threads(context.params["threads"])


def _show(result: dict[str, Any], path: Path | None, *, as_json: bool) -> None:
    from longspan.bench import results

    if as_json:
        typer.echo(results.to_json(result), nl=False)
    else:
        _print_table(result)
    if path is not None:
        results.write(result, path)
        typer.echo(f"wrote {path}", err=True)


def _with_progress(work: Callable[[Callable[[int, int, str], None]], Any]) -> Any:
    """What `work` gives; it tells how far it is on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    stderr = Console(stderr=True)
    with Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,
        redirect_stdout=False,
    ) as bar:
        task = bar.add_task("", total=None)
        return work(lambda done, total, step: bar.update(task, completed=done, total=total, description=step))


def _typed(context: typer.Context) -> str:
    """The command as it was typed, but for where its result goes."""
    words = ["longspan", "bench", context.info_name or ""]
    for option in context.command.params:
        name = option.name or ""
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE" or name in ("out", "as_json", "resume"):
            continue
        given = context.params[name]
        for part in given if isinstance(given, list) else [given]:
            value = getattr(part, "value", part)
            words += (
                [option.opts[0]]
                if part is True
                else [option.opts[0], f"{value:g}" if isinstance(value, float) else str(value)]
            )
    return shlex.join(words)


def _print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)  # a note may hold brackets
    if not console.is_terminal:
        console.width = 160
    machine = result["machine"]
    kernels = machine["instruction_set"] or "none"
    table = Table(title=f"{result['command']}: {machine['cpu']}, {machine['threads']} threads, kernels: {kernels}")
    table.add_column("system")
    for heading in (
        "precision",
        "median ms",
        "p20 .. p80",
        "speed-up over (the best of) others",
        "relative error",
        "tolerance",
        "peak MiB",
    ):
        table.add_column(heading, justify="right")
    case = None
    for row in result["rows"]:
        if row["case"] != case:
            case = row["case"]
            table.add_section()
            table.add_row(case, style="bold")
        table.add_row(*_cells(row))
    console.print(table)
    for goal in result["goals"]:
        bound = "at most" if goal["at_most"] else "at least"
        mark = "reached" if goal["met"] else "not reached"
        console.print(
            f"{goal['what']}: {goal['measured']}{goal['unit']} ({bound} {goal['reach']}{goal['unit']}: {mark})"
        )


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [f"  {row['system']}", row["precision"]]
    if row["median_ms"] is None and row["status"] != "ok":
        return [*cells, row["status"], "", row["note"]]
    spread = "" if row["median_ms"] is None else f"{_ms(row['p20_ms'])} .. {_ms(row['p80_ms'])}"
    share = "" if row["share_of_gemm"] is None else f"{row['gflops']:,.0f} GF/s, {row['share_of_gemm']:.0%} of GEMM"
    best = min(row["speedup"], key=row["speedup"].get, default="")
    shown = {other: ratio for other, ratio in row["speedup"].items() if other == best or len(row["speedup"]) <= 2}
    speedups = [f"{ratio:.2f}x {other}" for other, ratio in shown.items()]
    return [
        *cells,
        _ms(row["median_ms"]),
        spread,
        "\n".join(part for part in (*speedups, share, row["note"]) if part),
        _number(row["relative_error"], ".1e"),
        _number(row["tolerance"], ".0e"),
        _number(row["peak_mib"], ",.0f"),
    ]


def _ms(value: float | None) -> str:
    return "" if value is None else format(value, ",.0f" if value >= 1000 else ".4g")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
