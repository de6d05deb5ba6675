"""`longspan convert`: a checkpoint of 512 tokens made long."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from longspan.cli.quiet import quiet_transformers


class Format(str, Enum):
    """Whose classes load the result."""

    longspan = "longspan"
    huggingface = "huggingface"


def convert(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Directory or hub name of a BERT, RoBERTa or DistilBERT checkpoint."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write; it must not exist yet, or be empty.")],
    max_tokens: Annotated[
        str, typer.Option(metavar="INTEGER|none", help="Longest input; none: positions repeat, no limit.")
    ] = "4096",
    window: Annotated[int, typer.Option(help="Tokens that a token sees around itself, both sides together.")] = 512,
    format: Annotated[
        Format, typer.Option(help="longspan, or huggingface for transformers' own Longformer.")
    ] = Format.longspan,
) -> None:
    """Give a checkpoint sliding window attention and positions for long inputs."""
    max_tokens = max_tokens.lower()
    if max_tokens != "none" and not max_tokens.isdecimal():
        raise ValueError(f"--max-tokens is a number of tokens or none; got {max_tokens!r}.")
    from longspan.models.convert import convert_checkpoint

    quiet_transformers()
    limit = None if max_tokens == "none" else int(max_tokens)
    done = convert_checkpoint(model, out, max_tokens=limit, window=window, format=format.value)
    typer.echo(
        f"{done.out}: {done.architecture} with {done.parameters:,} parameters, reads "
        f"{'any number of' if done.max_tokens is None else f'{done.max_tokens:,}'} tokens through windows of "
        f"{', '.join(map(str, sorted(set(done.windows))))}{'' if done.has_tokenizer else '; it has no tokenizer'}"
    )
