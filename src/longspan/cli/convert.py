"""`longspan convert`: a checkpoint of 512 tokens made long."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Directory or hub name of a BERT, RoBERTa or DistilBERT checkpoint.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write; it must not exist yet, or be empty.")],
    max_tokens: Annotated[
        str, typer.Option(metavar="INTEGER|none", help="Longest input; none: positions repeat, no limit.")
    ] = "4096",
    window: Annotated[
        int, typer.Option(min=2, help="Tokens that a token sees around itself, both sides together.")
    ] = 512,
) -> None:
    """Give a checkpoint sliding window attention and positions for long inputs."""
    if max_tokens != "none" and not max_tokens.isdecimal():
        raise ValueError(f"--max-tokens is a number of tokens or none; got {max_tokens!r}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists already; name a new directory.")
    from longspan.models.convert import convert_checkpoint

    convert_checkpoint(model, out, max_tokens=None if max_tokens == "none" else int(max_tokens), window=window)
    typer.echo(f"wrote {out}")
