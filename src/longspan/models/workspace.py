"""One call of the packed encoder: its rows, and the memory that all its layers share.

Memory fresh from the operating system costs as much as computing on it, so each buffer is made once for a call.

Shapes: T rows, C model width, H heads, D head width, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longspan.kernels import rows
from longspan.kernels.layer import Layer, LayerRows
from longspan.kernels.memory import empty
from longspan.kernels.rows import Bytes, Norm, Product, Turn
from longspan.models.encoder import BlockConfig, EncoderConfig, Rotary
from longspan.models.ragged import Ragged

ROW_STEP = 16  # rows are counted in sixteens: oneDNN prepares for every number of rows it meets, at a cost of 1 ms
ROWS_AT_ONCE = 4096


class Attention(NamedTuple):
    """q, k, v: [T, H, D]. compute: reads them, and writes what each row attends to."""

    q: Tensor
    k: Tensor
    v: Tensor
    compute: Callable[[], None]


class Workspace:
    """Rows are T rounded up to ROW_STEP; what the added ones hold is finite, and no other row reads it.

    stream: [T, C], the residual stream. In a post-norm encoder the products read it, so it has their dtype, bf16 for
    int8 too; in a pre-norm encoder, where it is the sum of all layers, it is fp32.
    layer_input: [T, C] in the products' dtype, what queries, keys and values are projections of; None where no
    global token of a pre-norm encoder needs all of it at once.
    """

    def __init__(
        self, config: EncoderConfig, dtype: torch.dtype, in_8_bits: bool, batch: Ragged, position_ids: Tensor | None
    ):
        self.config, self.batch, self.dtype = config, batch, dtype
        self._position_ids = position_ids
        self._rotaries: dict[tuple[int, float], Rotary] = {}
        self._attentions: dict[Any, Attention] = {}
        self._layer_rows: dict[Any, LayerRows] = {}
        self.pre = config.norm == "pre"
        number = -(-batch.tokens // ROW_STEP) * ROW_STEP
        self.chunks = _cut(number, ROWS_AT_ONCE)
        longest = max(chunk.stop - chunk.start for chunk in self.chunks)
        inner = max(block.heads * block.head_width for block in config.blocks)
        ffn = max(block.ffn_width for block in config.blocks)
        self.stream = empty([number, config.width], torch.float32 if self.pre else dtype)
        self.stream[batch.tokens :] = 0
        self._qkv = empty([number * 3 * inner], dtype)
        self._attended = empty([number * inner], dtype)
        self._bytes = self._inner = self._read = None
        self._sum = empty([longest, config.width], dtype)
        self._ffn_product = empty([longest * ffn * (2 if config.gated else 1)], dtype)
        self.layer_input = None if self.pre else self.stream
        if in_8_bits:
            widest = max(config.width, inner, ffn)
            self._bytes = Bytes(empty([longest * widest], torch.uint8), torch.empty(longest))
        else:
            self._inner = empty([longest * ffn], dtype)
            self._read = empty([longest, config.width], dtype) if self.pre else None
        if self.pre and batch.marked is not None and any(block.global_projections for block in config.blocks):
            self.layer_input = empty([number, config.width], dtype)

    def qkv(self, block: BlockConfig) -> Tensor:
        """[T, 3*H*D]"""
        return _matrix(self._qkv, len(self.stream), 3 * block.heads * block.head_width)

    def attended(self, block: BlockConfig) -> Tensor:
        """[T, H*D]"""
        return _matrix(self._attended, len(self.stream), block.heads * block.head_width)

    def attention(self, block: BlockConfig, backend: str, *, first_only: bool) -> Attention:
        """Attention of this block from `qkv` to `attended`. first_only: of each sequence's first token."""
        key = block.heads, block.head_width, block.pattern, first_only
        if key not in self._attentions:
            tokens, shape = self.batch.tokens, (block.heads, block.head_width)
            attended = self.attended(block)
            attended[tokens:] = 0
            q, k, v = self.qkv(block)[:tokens].view(-1, 3, *shape).unbind(1)  # [T, H, D]
            out = attended[:tokens].view(-1, *shape)
            compute = self.batch.attention(q, k, v, block.pattern, backend, out, first_only=first_only)
            self._attentions[key] = Attention(q, k, v, compute)
        return self._attentions[key]

    def keep(self, rows: list[int], block: BlockConfig) -> None:
        """From here on there are these rows alone, behind the attention of `block`."""
        stream, attended = self.stream[rows], self.attended(block)[rows]
        number = -(-len(rows) // ROW_STEP) * ROW_STEP
        self.stream, self.chunks = self.stream[:number], _cut(number, ROWS_AT_ONCE)
        self.stream[: len(rows)], self.attended(block)[: len(rows)] = stream, attended
        self.attended(block)[len(rows) :] = 0
        self.layer_input = None if self.pre else self.stream
        self._attentions, self._layer_rows = {}, {}

    def layer_rows(self, layer: Layer, block: BlockConfig, following: BlockConfig | None) -> LayerRows:
        """What `layer` reads and writes behind the attention of `block`; `following` is the block after it."""
        after = None if following is None else (following.heads, following.head_width, following.rope_theta)
        key = block.heads * block.head_width, after
        if key not in self._layer_rows:
            qkv = turn = None
            if following is not None:
                qkv, rotary = self.qkv(following), self.rotary(following)
                turn = None if rotary is None else Turn(rotary.cos[0, 0], rotary.sin[0, 0], 2 * following.heads)
            normed = self.layer_input if self.pre else None
            self._layer_rows[key] = layer.rows(self.attended(block), self.stream, normed=normed, qkv=qkv, turn=turn)
        return self._layer_rows[key]

    def sum_of(self, chunk: slice) -> Tensor:
        """Where a product that is added to the stream may lie: [chunk, C]."""
        return self._sum[: chunk.stop - chunk.start]

    def ffn_product(self, number: int, width: int) -> Tensor:
        """Where the feed-forward's first product may lie: [number, F], or 2 * F."""
        return _matrix(self._ffn_product, number, width)

    def inner(self, number: int, width: int) -> Any:
        """Where the feed-forward's second product reads: [number, F]."""
        if self._inner is not None:
            return _matrix(self._inner, number, width)
        return self._new_bytes(number, width)

    def rotary(self, block: BlockConfig) -> Rotary | None:
        """Of all rows, [1, 1, T, D]."""
        if block.rope_theta is None:
            return None
        key = block.head_width, block.rope_theta
        if key not in self._rotaries:
            positions = torch.zeros(1, len(self.stream), dtype=torch.long)
            positions[0, : self.batch.tokens] = self.batch.positions(self._position_ids)
            self._rotaries[key] = Rotary.at(positions, *key, torch.float32)
        return self._rotaries[key]

    def readable(self, x: Tensor) -> Any:
        """x as a product reads it."""
        if self._bytes is None:
            return x
        out = self._new_bytes(*x.shape)
        rows.quantize(x, out)
        return out

    def add(
        self, chunk: slice, product: Product | None, norm: Norm | None, *, to_attention: bool, last: bool = False
    ) -> Any:
        """Adds a product, None for nothing, to the stream, and gives what the next product reads: rows or `Bytes`.

        norm: of the sum, after which the stream goes on (post-norm) or which only the next product sees (pre-norm).
        last: there is no next product, and the norm of the sum is what the encoder returns.
        """
        stream = self.stream[chunk]
        if product is None and not self.pre:
            return self.readable(stream)
        quantized = None if self._bytes is None or last else self._new_bytes(*stream.shape)
        goes_on = last or not self.pre
        out = stream if goes_on else self._beside_stream(chunk, to_attention)
        rows.add_and_norm(product, stream, norm, total=None if goes_on else stream, out=out, quantized=quantized)
        return out if quantized is None else quantized

    def _beside_stream(self, chunk: slice, to_attention: bool) -> Tensor | None:
        if to_attention and self.layer_input is not None:
            return self.layer_input[chunk]
        return None if self._read is None else self._read[: chunk.stop - chunk.start]

    def _new_bytes(self, number: int, width: int) -> Bytes:
        """In place of those before it."""
        assert self._bytes is not None
        return Bytes(_matrix(self._bytes.values, number, width), self._bytes.scale[:number])


def _matrix(memory: Tensor, number: int, width: int) -> Tensor:
    return memory[: number * width].view(number, width)


def _cut(number: int, size: int) -> list[slice]:
    """0..number in parts of `size`; the last is half as long to half as long again."""
    ends = range(size, number - size // 2 + 1, size)
    return [slice(start, end) for start, end in zip([0, *ends], [*ends, number], strict=True)]
