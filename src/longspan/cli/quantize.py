"""`longspan quantize`: a checkpoint made small, which loads straight into the inference engine."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from longspan.cli.quiet import quiet_transformers


class PrecisionName(str, Enum):
    """What the encoder computes in."""

    int8 = "int8"
    bf16 = "bf16"
    fp32 = "fp32"


def quantize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Directory or hub name of a checkpoint that longspan reads.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write; it must not exist yet, or be empty.")],
    precision: Annotated[PrecisionName, typer.Option(help="What the encoder computes in.")] = PrecisionName.int8,
) -> None:
    """Write a checkpoint whose encoder is packed for inference."""
    from longspan.models.quantize import quantize_checkpoint

    quiet_transformers()
    done = quantize_checkpoint(model, out, precision=precision.value)
    before, after = (size / 2**20 for size in (done.bytes_before, done.bytes_after))
    typer.echo(
        f"{done.out}: {done.architecture} in {done.precision}, {after:.1f} MiB of weights instead of {before:.1f}"
    )
