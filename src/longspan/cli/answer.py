"""`longspan answer`: the passages of documents that answer a question, printed, or for each document of a corpus."""

from __future__ import annotations

import gc
import json
import re
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.corpus import (
    Address,
    Engine,
    EngineOption,
    IdColumn,
    Instances,
    TextColumn,
    ThreadsPerInstance,
    read_corpus,
)
from longspan.cli.quiet import quiet_transformers

if TYPE_CHECKING:
    from rich.text import Text

    from longspan.inference.compare import Comparison
    from longspan.inference.documents import Document
    from longspan.inference.reader import Answer, Passage

CONTEXT_CHARS = 200  # shown on either side of a passage
LONGEST_SHOWN = 4000  # characters of a passage; words of a file without spaces have no bound


class Precision(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"


def answer(
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What you want to know.")],
    documents: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DOCUMENT",
            help="Text, Markdown or HTML files, or - for standard input. Without any: Python's language reference. "
            "With --out: one folder of documents, or a .parquet or .jsonl file with a row a document.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Directory or hub name of a question-answering checkpoint. Default: longspan's own reader."),
    ] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(help="What the encoder computes in. Default: fp32; longspan's reader bf16 where the CPU has it."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also run Hugging Face's own encoder, and print both times first.")
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="How many passages to print.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
    encoding: Annotated[
        str | None, typer.Option(help="Text encoding of the documents. Default: UTF-8, or what an HTML page declares.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: PyTorch's choice.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Answer from each document by itself, and write a row of each to Parquet in this folder. A run there "
            "goes on. The options below are for this."
        ),
    ] = None,
    text_column: TextColumn = "text",
    id_column: IdColumn = None,
    engine: EngineOption = Engine.local,
    instances: Instances = None,
    threads_per_instance: ThreadsPerInstance = 1,
    address: Address = None,
) -> None:
    """Print the passages of the documents that answer the question, best first."""
    if out is not None:
        if documents is None or len(documents) != 1 or compare or as_json or threads is not None:
            raise ValueError(
                "--out takes one corpus, a folder or a .parquet or .jsonl file, and --threads-per-instance instead of "
                "--threads; --compare and --json print, and it writes"
            )
        from longspan.inference.corpus import Corpus
        from longspan.inference.corpus_tasks import AnswerEach

        read_corpus(
            AnswerEach(
                question=question, model=model, precision=None if precision is None else precision.value, top=top
            ),
            Corpus(path=Path(documents[0]), text_column=text_column, id_column=id_column, encoding=encoding),
            out,
            engine=engine,
            instances=instances,
            threads_per_instance=threads_per_instance,
            address=address,
        )
        return
    if (text_column, id_column, engine, instances, threads_per_instance, address) != (
        "text",
        None,
        "local",
        None,
        1,
        None,
    ):
        raise ValueError(
            "columns, engine, instances and address are for a corpus: name a folder for its rows with --out"
        )
    from longspan.inference.documents import default_document, read_document

    texts = [read_document(path, encoding=encoding) for path in documents or ()] or [default_document()]
    found, comparison = _read(
        question,
        texts,
        model=model,
        precision=None if precision is None else precision.value,
        top=top,
        threads=threads,
        compare=compare,
    )
    if as_json:
        compared = {} if comparison is None else {"compare": comparison.to_dict()}
        typer.echo(json.dumps(found.to_dict() | compared, ensure_ascii=False, indent=2))
    else:
        if comparison is not None:
            typer.echo(_describe(comparison, found.tokens))
        _print_answer(found, texts)


def _read(
    question: str,
    documents: list[Document],
    *,
    model: str | None,
    precision: Any,
    top: int,
    threads: int | None,
    compare: bool,
) -> tuple[Answer, Comparison | None]:
    """Loads the reader and reads, with a progress bar on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    stderr = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,
    ) as bar:
        task = bar.add_task("Loading", total=None)
        import torch

        from longspan.inference.reader import Reader

        quiet_transformers()
        if threads is not None:
            torch.set_num_threads(threads)
        reader = Reader(model, precision=precision)
        gc.freeze()  # what is loaded stays: the many small objects of a long text need not be held against it
        bar.update(task, description="Reading")
        found = reader.answer(
            question, documents, top=top, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
        if not compare:
            return found, None
        bar.update(task, description="Reading with Hugging Face", total=None)
        return found, reader.compare(question, documents)


def _describe(comparison: Comparison, tokens: int) -> str:
    """The line that --compare prints."""
    where = "" if comparison.tokens == tokens else f"first {comparison.tokens:,} of {tokens:,} tokens: "
    return (
        f"{where}longspan {comparison.longspan_seconds:.3g} s, Hugging Face {comparison.hugging_face_seconds:.3g} s "
        f"({comparison.speedup:.1f}x), largest difference {comparison.output_difference:.1g} in {comparison.output} / "
        f"{comparison.score_difference:.1g} in scores\n"
    )


def _print_answer(found: Answer, documents: list[Document]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    if found.answer is not None:
        console.print(
            Text(f"{_printable(' '.join(found.answer.split()))}  ({found.answer_probability:.1%})\n", style="bold")
        )
    texts = {document.name: document.text for document in documents}
    for rank, passage in enumerate(found.passages, start=1):
        console.print(
            Text.assemble(
                f"{rank}. ", (_printable(passage.document), "bold"), f", line {passage.line:,}  ({passage.score:.1%})"
            )
        )
        in_context = _in_context(texts[passage.document], passage, found.answer, marks=not console.color_system)
        for line in in_context.wrap(console, console.width - 3):
            line.rstrip()
            console.print("  ", line)
        console.print()
    speed = found.tokens / found.seconds
    console.print(
        f"{found.tokens:,} tokens in {found.seconds:.1f} s ({speed:,.0f} tokens/s), {found.model}", style="dim"
    )


def _in_context(text: str, passage: Passage, answer: str | None, *, marks: bool) -> Text:
    """The passage highlighted between what stands before and after it. marks: by [[ and ]], for want of colors."""
    from rich.text import Text

    before = text[max(0, passage.start_char - CONTEXT_CHARS) : passage.start_char]
    after = text[passage.end_char : passage.end_char + CONTEXT_CHARS]
    if len(before) == CONTEXT_CHARS:  # begin and end with a whole word
        before = "..." + re.sub(r"^\S*", "", before)
    if len(after) == CONTEXT_CHARS:
        after = re.sub(r"\S*$", "", after) + "..."
    shown = Text(_printable(passage.text[:LONGEST_SHOWN]), style="bold")
    if answer is not None:
        shown.highlight_words([_printable(answer)], style="reverse")
    opening, closing = ("[[", "]]") if marks else ("", "")
    return Text.assemble(
        (_printable(before).lstrip("\n"), "dim"), opening, shown, closing, (_printable(after).rstrip(), "dim")
    )


def _printable(text: str) -> str:
    """The text without control characters, which a document could use to command the terminal; as long as before."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", " ", text)
