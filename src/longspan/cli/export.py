"""`longspan export`: a checkpoint as an ONNX file that takes inputs of any shape."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from longspan.cli.quiet import quiet_transformers


class OnnxPrecisionName(str, Enum):
    """What the encoder's matrices are in the file."""

    fp32 = "fp32"
    int8 = "int8"


def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Directory or hub name of a checkpoint that longspan reads.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="ONNX file to write; it must not exist yet.")],
    precision: Annotated[
        OnnxPrecisionName, typer.Option(help="int8: for ONNX Runtime's dynamic int8, a scale for each channel.")
    ] = OnnxPrecisionName.fp32,
) -> None:
    """Write a model as an ONNX graph for any batch, length and number of global tokens."""
    from longspan.inference.export_onnx import export as export_model

    quiet_transformers()
    done = export_model(model, out, precision=precision.value)
    typer.echo(
        f"{done.out}: {done.architecture} in {done.precision}, {done.size / 2**20:.1f} MiB; "
        f"{', '.join(done.inputs)} -> {', '.join(done.outputs)}; "
        f"differs from the module by at most {done.difference:.1e}"
    )
