"""Whole encoders as cases: long texts beside Hugging Face's own, short texts beside engines made for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

from longspan.bench import peers
from longspan.bench.measure import Prepared, System

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PRECISIONS = ("fp32", "bf16", "int8")
# Relative errors over a whole output. fp32 leaves room for another order of sums only.
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "int8": 2e-2}
STOCK = "Hugging Face"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Hugging Face encoder with random weights of standard deviation 0.02. window: both sides together."""

    family: Literal["longformer", "modernbert", "bert"]
    layers: int
    heads: int
    head_width: int
    ffn_width: int
    window: int = 512
    max_tokens: int = 4096
    global_tokens: int = 0
    vocabulary: int = 30522

    @property
    def width(self) -> int:
        return self.heads * self.head_width


# FasterTransformer's Longformer table (docs/longformer_guide.md): 16 heads x 64, feed-forward 4096, window 512.
SHAPES = {
    "large": Shape(family="longformer", layers=4, heads=16, head_width=64, ffn_width=4096, global_tokens=16),
    "base": Shape(family="longformer", layers=4, heads=12, head_width=64, ffn_width=3072, global_tokens=16),
    "modernbert": Shape(
        family="modernbert", layers=22, heads=12, head_width=64, ffn_width=1152, window=128, max_tokens=8192
    ),
}
DENSE = Shape(family="bert", layers=6, heads=12, head_width=32, ffn_width=1536, max_tokens=512)

TINY = {
    "large": Shape(
        family="longformer", layers=2, heads=2, head_width=16, ffn_width=64, window=16, global_tokens=2, vocabulary=100
    ),
    "modernbert": Shape(family="modernbert", layers=4, heads=2, head_width=16, ffn_width=48, window=16, vocabulary=100),
}
TINY["base"] = TINY["large"]
TINY_DENSE = Shape(family="bert", layers=2, heads=2, head_width=16, ffn_width=64, max_tokens=64, vocabulary=100)


@lru_cache(maxsize=2)
def stock_model(shape: Shape, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' own model, seeded: the same weights in every dtype."""
    if dtype != torch.float32:
        return deepcopy(stock_model(shape)).to(dtype)
    from transformers import AutoModel, BertConfig, LongformerConfig, ModernBertConfig

    sizes: dict[str, Any] = {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.ffn_width,
        "vocab_size": shape.vocabulary,
    }
    if shape.family == "longformer":
        sizes["attention_window"] = [shape.window] * shape.layers
        config = LongformerConfig(**sizes, max_position_embeddings=shape.max_tokens + 2)
    elif shape.family == "modernbert":
        sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
        config = ModernBertConfig(**sizes, max_position_embeddings=shape.max_tokens, local_attention=shape.window)
    else:
        config = BertConfig(**sizes, max_position_embeddings=shape.max_tokens)
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "attn_implementation": "eager" if shape.family == "longformer" else "sdpa"
    }  # the fastest it has
    if shape.family != "modernbert":
        options["add_pooling_layer"] = False
    return AutoModel.from_config(config, **options).eval()


@dataclass(frozen=True, kw_only=True)
class EncoderCase:
    """An encoder on rows of one length: Hugging Face's own in fp32 and bf16, ours in three precisions."""

    shape_name: str
    model: Shape
    batch: int
    tokens: int

    @property
    def name(self) -> str:
        return f"batch {self.batch}, {self.tokens:,} tokens"

    @property
    def shape(self) -> dict[str, Any]:
        return _sizes(self.shape_name, self.model, self._lengths)

    @property
    def reference(self) -> str:
        return f"{STOCK} fp32"

    @property
    def _lengths(self) -> tuple[int, ...]:
        return (self.tokens,) * self.batch

    def expected(self) -> None:
        return None

    def systems(self) -> list[System]:
        feed = partial(_feed, self.model, self._lengths)
        stock = [
            System(
                name=STOCK,
                precision=precision,
                prepare=partial(_prepare_stock, self.model, dtype, feed),
                tolerance=None if precision == "fp32" else TOLERANCE[precision],
            )
            for precision, dtype in DTYPES.items()
        ]
        return stock + [_ours(self.model, precision, feed) for precision in PRECISIONS]


@dataclass(frozen=True, kw_only=True)
class RaggedCase:
    """Rows of many lengths in one precision: our engine, which leaves padding out, beside itself computing all of it.

    lengths: ascending, for the longest row is the same with and without padding and shows that both are right.
    """

    shape_name: str
    model: Shape
    precision: str
    lengths: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{len(self.lengths)} rows of {self.lengths[0]:,} to {self.lengths[-1]:,} tokens, {self.precision}"

    @property
    def shape(self) -> dict[str, Any]:
        return _sizes(self.shape_name, self.model, self.lengths)

    @property
    def reference(self) -> str:
        return f"{STOCK} fp32, row by row"

    def expected(self) -> tuple[Tensor, ...]:
        return (_row_by_row(self.model, self.lengths),)

    def systems(self) -> list[System]:
        ragged = _ours(self.model, self.precision, partial(_feed, self.model, self.lengths))
        tokens = self.lengths[-1]
        full = _ours(self.model, self.precision, partial(_feed, self.model, (tokens,) * len(self.lengths)))
        return [ragged, replace(full, name=f"{full.name}, padding computed", ours=False, last_rows=tokens)]


@dataclass(frozen=True, kw_only=True)
class DenseCase:
    """A small BERT on short texts, against engines made for that. Several rows have a quarter to all of `tokens`."""

    model: Shape
    batch: int
    tokens: int

    @property
    def name(self) -> str:
        return f"batch {self.batch}{' ragged' if self.batch > 1 else ''}, {self.tokens} tokens"

    @property
    def shape(self) -> dict[str, Any]:
        return _sizes("dense", self.model, self.lengths)

    @property
    def lengths(self) -> list[int]:
        generator = torch.Generator().manual_seed(2)
        shorter = torch.randint(self.tokens // 4, self.tokens + 1, (self.batch - 1,), generator=generator)
        return [*shorter.tolist(), self.tokens]

    @property
    def reference(self) -> str:
        return f"{STOCK} fp32"

    def expected(self) -> None:
        return None

    def systems(self) -> list[System]:
        onnx = peers.missing("onnxruntime", "onnx", pip="onnxruntime onnx")
        openvino = peers.missing("openvino", pip="openvino")
        nncf = peers.missing("openvino", "nncf", pip="openvino nncf")
        rows: list[tuple[str, str, Callable[..., Prepared], str | None]] = [
            (STOCK, "fp32", peers.hugging_face, None),
            (STOCK, "bf16", partial(peers.hugging_face, dtype=torch.bfloat16), None),
            ("ONNX Runtime", "fp32", partial(peers.onnx_runtime, int8=False), onnx),
            ("ONNX Runtime", "int8", partial(peers.onnx_runtime, int8=True), onnx),
            ("OpenVINO", "fp32", partial(peers.openvino, precision="f32"), openvino),
            ("OpenVINO", "bf16", partial(peers.openvino, precision="bf16"), openvino),
            ("OpenVINO", "int8", partial(peers.openvino, precision="bf16", int8=True), nncf),
        ]
        systems = [
            System(
                name=name,
                precision=precision,
                prepare=partial(self._prepare_peer, prepare),
                tolerance=None if (name, precision) == (STOCK, "fp32") else TOLERANCE[precision],
                missing=missing,
            )
            for name, precision, prepare, missing in rows
        ]
        feed = partial(_feed, self.model, tuple(self.lengths))
        return systems + [_ours(self.model, precision, feed) for precision in PRECISIONS]

    def _prepare_peer(self, prepare: Callable[..., Prepared]) -> Prepared:
        ids = _feed(self.model, tuple(self.lengths))["input_ids"]
        return prepare(stock_model(self.model), self.lengths, ids)


def accelerated(model: Any, precision: Any) -> Any:
    """A copy of the model, so that both compute with the same weights."""
    import longspan

    return longspan.accelerate(deepcopy(model), precision=precision)


def _ours(model: Shape, precision: str, feed: Callable[[], dict[str, Tensor]]) -> System:
    return System(
        name="longspan",
        precision=precision,
        prepare=partial(_prepare_ours, model, precision, feed),
        tolerance=TOLERANCE[precision],
        ours=True,
    )


def _prepare_ours(model: Shape, precision: str, feed: Callable[[], dict[str, Tensor]]) -> Prepared:
    inputs = feed()
    mask = inputs["attention_mask"].bool()
    return Prepared(
        partial(_last_hidden_state, accelerated(stock_model(model), precision), inputs), lambda out: (out[mask],)
    )


def _prepare_stock(model: Shape, dtype: torch.dtype, feed: Callable[[], dict[str, Tensor]]) -> Prepared:
    return Prepared(partial(_last_hidden_state, stock_model(model, dtype), feed()), lambda out: (out.flatten(0, 1),))


def _feed(model: Shape, lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """Random tokens, the same for the same rows and longest length, with a mask and the first tokens global."""
    generator = torch.Generator().manual_seed(1)
    tokens = max(lengths)
    mask = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    feed = {
        "input_ids": torch.randint(5, model.vocabulary, mask.shape, generator=generator),
        "attention_mask": mask.long(),
    }
    if model.global_tokens:
        first = torch.arange(tokens) < model.global_tokens
        feed["global_attention_mask"] = first.long().expand(len(lengths), -1).contiguous()
    return feed


def _sizes(name: str, model: Shape, lengths: Sequence[int]) -> dict[str, Any]:
    tokens = {"batch": len(lengths), "tokens": max(lengths), "real_tokens": sum(lengths)}
    return {"encoder": name, **asdict(model), **tokens}


@lru_cache(maxsize=1)
def _row_by_row(model: Shape, lengths: tuple[int, ...]) -> Tensor:
    """Hugging Face's states of all tokens, each row computed alone: [tokens in all, C]."""
    stock, feed = stock_model(model), _feed(model, lengths)
    rows = []
    for row, length in enumerate(lengths):
        alone = {name: part[row : row + 1, :length] for name, part in feed.items()}
        rows.append(_last_hidden_state(stock, alone)[0])
    return torch.cat(rows)


def _last_hidden_state(model: Any, feed: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        return model(**feed).last_hidden_state
