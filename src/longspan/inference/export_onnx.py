"""Export to ONNX: a graph for any batch, any length and any number of global tokens.

Shapes: B batch, K choices, N tokens, C model width, L labels, S spans.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import platform
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from longspan.attention import SlidingWindow
from longspan.inference.onnx_attention import OnnxEncoder
from longspan.inference.onnx_model import DEFAULTS, METADATA, OnnxModel, require
from longspan.models.convert import load_as_ours, load_tokenizer, refuse_existing
from longspan.models.encoder import Encoder
from longspan.models.heads import (
    LongspanForMaskedLM,
    LongspanForMultipleChoice,
    LongspanForQuestionAnswering,
    LongspanForSequenceClassification,
    LongspanForSpanClassification,
    LongspanForTokenClassification,
)
from longspan.models.model import LongspanModel, LongspanPreTrainedModel

OnnxPrecision = Literal["fp32", "int8"]
OPSET = 17  # the first with LayerNormalization
TOLERANCE = 1e-4  # of the largest output, or of 1
TRACED_TOKENS = 16
LARGEST_FILE = 2**31 - 1  # bytes of one protobuf message
QUANTIZED = re.compile(r"/blocks\.\d+/(attention/(qkv|out)|ffn_in|ffn_out)/MatMul$")
# The task of each model that has a graph, and its outputs.
KINDS: dict[type[LongspanPreTrainedModel], tuple[str | None, tuple[str, ...]]] = {
    LongspanModel: (None, ("last_hidden_state",)),
    LongspanForMaskedLM: ("masked_lm", ("logits",)),
    LongspanForSequenceClassification: ("sequence_classification", ("logits",)),
    LongspanForTokenClassification: ("token_classification", ("logits",)),
    LongspanForQuestionAnswering: ("question_answering", ("start_logits", "end_logits")),
    LongspanForMultipleChoice: ("multiple_choice", ("logits",)),
    LongspanForSpanClassification: ("span_classification", ("logits",)),
}
PER_ROW = ("sequence_classification", "multiple_choice", "span_classification")  # tasks whose logits are [B, L]


@dataclass(frozen=True, kw_only=True)
class Export:
    """What `export` wrote. inputs, outputs: names in the graph. size: of the file in bytes.

    difference: the largest between the outputs of the graph and of the module, where it was checked.
    """

    out: Path
    architecture: str
    precision: OnnxPrecision
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    size: int
    difference: float


def export(
    model: LongspanPreTrainedModel | str | Path,
    out: str | Path,
    *,
    precision: OnnxPrecision = "fp32",
    reduce_range: bool | None = None,
) -> Export:
    """Writes a model with any of longspan's heads, or none, as one ONNX file that has no shape frozen.

    model: a model of longspan's, or the directory or hub name of a checkpoint that longspan reads.
    precision: "int8" quantizes the encoder's matrices, a scale for each output channel, for ONNX Runtime's dynamic
    int8; embeddings, head, attention and global projections stay fp32.
    reduce_range: int8 weights of 7 bits, which CPUs without VNNI need lest sums overflow; None: as this CPU needs.

    The graph's inputs are int64 [B, N] (multiple choice: [B, K, N]): input_ids; attention_mask, 1 = token;
    token_type_ids, where the model tells two texts apart; global_attention_mask, where global tokens change anything:
    1 = sees and is seen by all, 0 = does not, -1 = as the head chooses by itself, which is what an absent input means;
    and span_ranges [B, S, 2] of a head that reads spans.
    Outputs: logits [B, L] or [B, N, L]; start_logits and end_logits [B, N] of question answering; last_hidden_state
    [B, N, C] and, where there is one, pooler_output [B, C] of a model without a head. At padding they mean nothing.
    The cost of sliding windows grows linearly with N. What a program must know to feed it stands in the file's
    metadata, and `OnnxModel` reads it.

    The graph is checked before it gets its name: it must give what the module gives, within 1e-4 in fp32.
    Raises ImportError without the `onnx` extra, FileExistsError, ValueError for a packed model and what
    `from_pretrained` raises, NotImplementedError for other heads, for patterns without a graph and beyond 2 GiB.
    """
    require("onnx")
    require("onnxruntime")
    out = Path(out)
    refuse_existing(out)
    if precision not in get_args(OnnxPrecision):
        raise ValueError(f"precision must be 'fp32' or 'int8'; got {precision!r}")
    if isinstance(model, str | Path):
        model = load_as_ours(model, load_tokenizer(model))
    _check(model)
    reference = copy.deepcopy(model).float().cpu().eval()
    graph = _Graph(copy.deepcopy(reference))
    with _temporary(out) as (traced, finished):
        _trace(graph, traced)
        _describe(traced, graph, precision)
        if precision == "int8":
            _quantize(traced, finished, _needs_reduced_range() if reduce_range is None else reduce_range)
        else:
            traced.rename(finished)
        difference = _compare(OnnxModel(finished), reference, graph)
        size = finished.stat().st_size
        finished.rename(out)
    return Export(
        out=out,
        architecture=type(model).__name__,
        precision=precision,
        inputs=graph.inputs,
        outputs=graph.outputs,
        size=size,
        difference=difference,
    )


class _Graph(nn.Module):
    """A model as the exporter wants it: tensors in, tensors out, nothing that depends on their values."""

    model: Any
    embeddings: Any
    pooler: Any

    def __init__(self, model: LongspanPreTrainedModel):
        super().__init__()
        self.model, base = model, cast(Any, model.base_model)
        self.task, outputs = next(KINDS[kind] for kind in KINDS if isinstance(model, kind))
        base.encoder = OnnxEncoder(base.encoder)
        self.encoder, self.embeddings, self.pooler = base.encoder, base.embeddings, base.pooler
        optional = {
            "token_type_ids": base.config.embeddings_config.type_vocab_size > 1,
            "global_attention_mask": self.encoder.has_globals,
            "span_ranges": self.task == "span_classification",
        }
        self.inputs = ("input_ids", "attention_mask", *(name for name, has in optional.items() if has))
        self.outputs = (*outputs, *(("pooler_output",) if self.task is None and self.pooler is not None else ()))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.inputs, inputs, strict=True))
        ids, model, spans = given["input_ids"], self.model, given.pop("span_ranges", None)
        given = {name: part.expand_as(ids) for name, part in given.items()}  # a default is a single number
        choices = ids.shape[1]
        if self.task == "multiple_choice":
            given = {name: part.flatten(0, 1) for name, part in given.items()}
            ids = given["input_ids"]
        token_mask, global_mask = given["attention_mask"] > 0, given.get("global_attention_mask")
        if spans is not None:
            place = torch.arange(ids.shape[1], device=ids.device)
            spans = (place >= spans[..., :1]) & (place < spans[..., 1:]) & token_mask[:, None]  # [B, S, N]
        if global_mask is not None:
            global_mask = (global_mask > 0) | ((global_mask < 0) & self.choose(ids, token_mask, spans))
        # The numbers of the positions are given, for to count them the embeddings would compare lengths.
        x = self.embeddings(ids, given.get("token_type_ids"), self.embeddings.number(ids, ids))
        x = self.encoder(x, token_mask, global_mask)  # [B, N, C]
        if self.task is None:
            return (x,) if self.pooler is None else (x, self.pooler(_first(x, token_mask)))
        if spans is not None:
            means = (spans.to(x.dtype) / spans.sum(-1, keepdim=True).clamp(min=1)).matmul(x).flatten(1)  # [B, S*C]
            return (model.classifier(torch.cat((_first(x, token_mask), means), -1)),)
        pooling = model.described.pooling
        if pooling in ("first", "pooler"):
            x = _first(x, token_mask)  # [B, C]
            x = self.pooler(x) if pooling == "pooler" else x
        elif pooling == "mean":
            x = torch.where(token_mask[..., None], x, 0).sum(1) / token_mask.sum(1, keepdim=True).clamp(min=1)
        logits = model.classifier(model.head(x))
        if self.task == "sequence_classification" and model.ngrams is not None:
            logits = logits + model.ngrams(ids, token_mask)
        if self.task == "question_answering":
            return logits[..., 0], logits[..., 1]
        return (logits.view(-1, choices),) if self.task == "multiple_choice" else (logits,)

    def choose(self, ids: Tensor, token_mask: Tensor, spans: Tensor | None) -> Tensor:
        """Bool[B, N], the global tokens that the head chooses where the caller does not."""
        place = torch.arange(ids.shape[1], device=ids.device)
        if spans is not None:
            if any(block.global_projections for block in self.encoder.config.blocks):
                return spans.any(1) | (place == 0)
            return torch.zeros_like(token_mask)
        how = None if self.task is None else self.model.described.global_tokens
        if how is None:
            return torch.zeros_like(token_mask)
        if how == "first":
            return token_mask & (token_mask.long().cumsum(1) == 1)
        is_separator = (ids == self.model.config.sep_token_id).int()
        first = is_separator.argmax(1, keepdim=True)
        if how == "before_separator":
            return place < first
        return (place > first) & ~((place == first + 1) & (is_separator > 0))


def _check(model: Any) -> None:
    if not isinstance(model, LongspanPreTrainedModel):
        raise ValueError(
            f"export takes a model of longspan's, or the directory or hub name of a checkpoint; got "
            f"{type(model).__name__}: load it with from_pretrained of longspan's class for its head"
        )
    if not isinstance(model, tuple(KINDS)):
        known = ", ".join(kind.__name__ for kind in KINDS)
        raise NotImplementedError(f"{type(model).__name__} has no ONNX graph; those that have one are {known}")
    encoder = model.base_model.encoder
    if not isinstance(encoder, Encoder):
        raise ValueError(
            f"the model is packed in {getattr(encoder, 'precision', type(encoder).__name__)} for longspan's own "
            f"engine: export the model that it was made of"
        )
    described = getattr(model, "described", None)
    by_separator = described is not None and described.global_tokens in ("before_separator", "after_separator")
    if by_separator and model.config.sep_token_id is None:
        raise ValueError(
            "the head chooses global tokens by the separator, and config.sep_token_id is None: set it before export"
        )
    size = sum(parameter.numel() for parameter in model.parameters()) * 4
    if size > LARGEST_FILE:
        raise NotImplementedError(
            f"the model has {size / 2**30:.1f} GiB of fp32 weights, and an ONNX file holds at most 2 GiB"
        )


def _trace(graph: _Graph, file: Path) -> None:
    """By the TorchScript exporter: on the same graph the newer one takes 30 times as long, to prove its shapes."""
    rows = ("batch", "choices") if graph.task == "multiple_choice" else ("batch",)
    axes = {name: (*rows, "tokens") for name in (*graph.inputs, *graph.outputs)}
    axes |= {name: rows for name in ("pooler_output", "span_ranges") if name in axes}
    if graph.task in PER_ROW:
        axes["logits"] = rows
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is a newer one, and what this one could not fold
        torch.onnx.export(
            graph,
            tuple(_example(graph, [TRACED_TOKENS, TRACED_TOKENS - 5], global_tokens=2).values()),
            str(file),
            dynamo=False,
            opset_version=OPSET,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_axes={name: dict(enumerate(names)) for name, names in axes.items()},
        )


def _describe(file: Path, graph: _Graph, precision: OnnxPrecision) -> None:
    """Adds what an `OnnxModel` must know, and the default of the global tokens."""
    import onnx

    proto, config = onnx.load(str(file)), graph.model.config
    labels = [str(name) for _, name in sorted(config.id2label.items())]
    for part in proto.graph.input:
        if part.name == "global_attention_mask":
            default = np.full((1,) * len(part.type.tensor_type.shape.dim), DEFAULTS[part.name], dtype=np.int64)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(default, part.name))
            for dimension in part.type.tensor_type.shape.dim:
                dimension.Clear()  # as in the other inputs, or 1
    described = {
        "task": graph.task,
        "precision": precision,
        "max_tokens": config.embeddings_config.max_tokens,
        "pad_token_id": config.pad_token_id or 0,
        "labels": labels if (graph.task or "").endswith("classification") else [],
    }
    onnx.helper.set_model_props(proto, {METADATA: json.dumps(described)})
    onnx.checker.check_model(proto)
    onnx.save(proto, str(file))


def _quantize(file: Path, out: Path, reduce_range: bool) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    proto = onnx.load(str(file))
    nodes = [node.name for node in proto.graph.node if QUANTIZED.search(node.name)]
    assert len(nodes) == 4 * sum(name.endswith("/ffn_out/MatMul") for name in nodes) > 0
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises to optimize first, which changes nothing for these nodes
    try:
        quantize_dynamic(
            proto,
            str(out),
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=nodes,
            per_channel=True,
            reduce_range=reduce_range,
            weight_type=QuantType.QInt8,
        )
    finally:
        root.setLevel(level)


def _needs_reduced_range() -> bool:
    """Whether products of 8 bits overflow their 16-bit sums: on x86 without VNNI."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True  # unknown, and 7 bits are right everywhere
    return "avx512_vnni" not in flags and "avx_vnni" not in flags


@torch.inference_mode()
def _compare(onnx_model: OnnxModel, reference: Any, graph: _Graph) -> float:
    """The largest difference between graph and module, on other shapes than the traced one.

    Raises RuntimeError for one beyond the tolerance, or in int8 for a number that is not finite.
    """
    largest = 0.0
    longest = max(2 * TRACED_TOKENS + 5, *(_blocks_of_two(block.pattern) for block in graph.encoder.config.blocks))
    longest = min(longest, onnx_model.max_tokens or longest)
    short = min(TRACED_TOKENS, longest)
    for lengths, global_tokens in (([longest], None), ([short, 1, short // 2 + 1], 0), ([1], 1), ([short] * 2, 5)):
        inputs = _example(graph, lengths, global_tokens=global_tokens)
        found = onnx_model(**{name: part.numpy() for name, part in inputs.items()})
        if global_tokens is None:
            inputs.pop("global_attention_mask", None)
        expected = reference(**inputs)
        for name, values in found.items():
            wanted = expected[name].numpy()
            is_token = inputs["attention_mask"].numpy().astype(bool)
            if wanted.shape[: is_token.ndim] == is_token.shape:
                values, wanted = values[is_token], wanted[is_token]
            difference, size = float(np.abs(values - wanted).max()), max(1.0, float(np.abs(wanted).max()))
            if not np.isfinite(values).all() or (onnx_model.precision == "fp32" and difference > TOLERANCE * size):
                raise RuntimeError(
                    f"the exported graph is wrong: {name} of {len(lengths)} rows of {max(lengths)} tokens differs by "
                    f"{difference:.2g} from the module's; nothing was written"
                )
            largest = max(largest, difference)
    return largest


def _blocks_of_two(pattern: Any) -> int:
    """A length that reaches beyond a window on both sides."""
    return pattern.before + pattern.after + 5 if isinstance(pattern, SlidingWindow) else 1


def _example(graph: _Graph, lengths: list[int], *, global_tokens: int | None) -> dict[str, Tensor]:
    """The graph's inputs for rows of random tokens; `global_tokens` at the start of each, None: as the head chooses."""
    tokens, config = max(lengths), graph.model.config
    spans = getattr(config, "num_spans", 0)
    generator = torch.Generator().manual_seed(0)
    is_token = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    ids = torch.randint(config.vocab_size, is_token.shape, generator=generator)
    if config.sep_token_id is not None:
        ids[:, 1:3] = config.sep_token_id
    ids = torch.where(is_token, ids, config.pad_token_id or 0)
    chosen = (
        torch.full_like(ids, -1) if global_tokens is None else (torch.arange(tokens) < global_tokens).expand_as(ids)
    )
    inputs = {
        "input_ids": ids,
        "attention_mask": is_token.long(),
        "token_type_ids": (torch.arange(tokens) > tokens // 2).long().expand_as(ids),
        "span_ranges": torch.stack((is_token.sum(1) // 2, is_token.sum(1) // 2 + 1), -1)[:, None].expand(-1, spans, -1),
        "global_attention_mask": chosen.long(),
    }
    if graph.task == "multiple_choice":  # as one question with a choice a row
        inputs = {name: part[None] for name, part in inputs.items()}
    return {name: inputs[name].contiguous() for name in graph.inputs}


@contextmanager
def _temporary(out: Path) -> Iterator[tuple[Path, Path]]:
    """Two names beside `out`, so that renaming copies nothing; what is left under them at the end is removed."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    files = out.with_name(f".{out.name}.{os.getpid()}.traced"), out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        yield files
    finally:
        for file in files:
            file.unlink(missing_ok=True)


def _first(x: Tensor, token_mask: Tensor) -> Tensor:
    """The vector of each row's first token, [B, C]."""
    place = token_mask.int().argmax(1)[:, None, None].expand(-1, -1, x.shape[2])
    return x.gather(1, place)[:, 0]
