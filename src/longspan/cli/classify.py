"""`longspan classify`: the label of each document of a corpus."""

from __future__ import annotations

from typing import Annotated

import typer

from longspan.cli.answer import Precision
from longspan.cli.corpus import (
    Address,
    CorpusPath,
    Encoding,
    Engine,
    EngineOption,
    IdColumn,
    Instances,
    MaxTokens,
    Out,
    TextColumn,
    ThreadsPerInstance,
    read_corpus,
)


def classify(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Directory or hub name of any classifier of sequences.")
    ],
    corpus: CorpusPath,
    out: Out,
    precision: Annotated[
        Precision | None,
        typer.Option(help="What the encoder computes in. Default: fp32, or that of a packed checkpoint."),
    ] = None,
    max_tokens: MaxTokens = None,
    text_column: TextColumn = "text",
    id_column: IdColumn = None,
    encoding: Encoding = None,
    engine: EngineOption = Engine.local,
    instances: Instances = None,
    threads_per_instance: ThreadsPerInstance = 1,
    address: Address = None,
) -> None:
    """Write the label of each document and the score of every label; a long one gets the mean over its windows."""
    from longspan.inference.corpus import Corpus
    from longspan.inference.corpus_tasks import Classify

    read_corpus(
        Classify(model=model, precision=None if precision is None else precision.value, max_tokens=max_tokens),
        Corpus(path=corpus, text_column=text_column, id_column=id_column, encoding=encoding),
        out,
        engine=engine,
        instances=instances,
        threads_per_instance=threads_per_instance,
        address=address,
    )
