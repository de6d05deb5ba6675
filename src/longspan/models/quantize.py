"""Packed checkpoints: an encoder's weights as the inference engine takes them, read without ever being widened.

The matrices of the encoder are int8 beside their scales, `<name>.scale`, or bf16 or fp32; all the rest is as it was.
`config.precision` says which. The global projections are bf16 beside int8, for that is what the engine keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.utils import SAFE_WEIGHTS_NAME

from longspan.models.convert import load_as_ours, load_tokenizer, refuse_existing, whole_or_absent
from longspan.models.encoder import Encoder
from longspan.models.evidence import LongspanForEvidence
from longspan.models.linear import Weight
from longspan.models.packed import Precision, check_precision, check_weights


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What `quantize_checkpoint` wrote. Sizes are those of the weights, as they were loaded and as they are written."""

    source: str
    out: Path
    architecture: str
    precision: Precision
    bytes_before: int
    bytes_after: int


def quantize_checkpoint(source: str | Path, out: str | Path, *, precision: Precision = "int8") -> Quantization:
    """Writes a checkpoint that loads as a model whose encoder is packed, and its tokenizer; whole or not at all.

    source: directory or hub name of a checkpoint that longspan reads. `from_pretrained` of the class that the result
    names gives what `accelerate(model, precision)` gives.
    Raises FileExistsError when `out` is a file or a directory that holds something, ValueError for another precision,
    for weights with NaN and for a checkpoint that is packed already, and what `from_pretrained` raises.
    """
    out = Path(out)
    refuse_existing(out)
    check_precision(precision, torch.device("cpu"))
    tokenizer = load_tokenizer(source)
    architectures = AutoConfig.from_pretrained(source).architectures or ()
    is_evidence = LongspanForEvidence.__name__ in architectures
    model: Any = LongspanForEvidence.from_pretrained(source) if is_evidence else load_as_ours(source, tokenizer)
    encoder = model.base_model.encoder
    if not isinstance(encoder, Encoder):
        raise ValueError(f"{source} is packed in {encoder.precision} already: name the checkpoint that it was made of")
    check_weights(encoder.config, encoder.state_dict())
    weights: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        weights |= _narrow(name, weight, precision) if _is_matrix_of_encoder(name, weight) else {name: weight}
    model.config.precision = precision
    with whole_or_absent(out) as folder:
        model.save_pretrained(folder, state_dict=weights, max_shard_size="1TB")  # one file
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        bytes_after = (folder / SAFE_WEIGHTS_NAME).stat().st_size
    return Quantization(
        source=str(source),
        out=out,
        architecture=type(model).__name__,
        precision=precision,
        bytes_before=sum(parameter.nbytes for parameter in model.parameters()),
        bytes_after=bytes_after,
    )


def _is_matrix_of_encoder(name: str, weight: Tensor) -> bool:
    return name.removeprefix("longspan.").startswith("encoder.") and weight.ndim == 2


def _narrow(name: str, weight: Tensor, precision: Precision) -> dict[str, Tensor]:
    if precision == "fp32":
        return {name: weight.float()}
    if precision == "bf16" or ".qkv_global." in name:
        return {name: weight.bfloat16()}
    values, scale = Weight(weight).narrowed()
    assert scale is not None
    return {name: values, f"{name}.scale": scale}
