"""An attention layer that computes some tokens at a time, so that only its input and its result grow with the tokens.

Queries, keys, values and what attention makes of them exist for one block of tokens at a time, in memory that serves
all blocks, and once more for the gradients, as gradient checkpointing does.

Shapes: B batch, N tokens, C model width, H heads, D head width, n tokens of a block with all that they see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.attention.blocks import Block
from longspan.kernels.memory import empty
from longspan.models.linear import Linear, PlainLinear, Weight, make_linear
from longspan.models.trained_linear import weight_gradient

PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k and v to what their queries see, all [1, H, n, D]


def attend_in_blocks(
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    heads: int,
    blocks: list[Block],
    attend: Attend,
) -> Tensor:
    """[B, N, C] for x [B, N, C], on CPU; can be differentiated once.

    in_weight: [3 * H * D, C], of queries, keys and values, in_bias: [3 * H * D]. out_weight: [C, H * D], out_bias: [C].
    blocks: of longspan.attention.blocks.cut. attend: is given the tokens that a block sees.
    """
    given = x.contiguous(), in_weight, in_bias, out_weight, out_bias, heads, blocks, attend
    return _InBlocks.apply(*given)  # type: ignore[return-value]


class _InBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        in_weight: Tensor,
        in_bias: Tensor | None,
        out_weight: Tensor,
        out_bias: Tensor | None,
        heads: int,
        blocks: list[Block],
        attend: Attend,
    ) -> Tensor:
        ctx.save_for_backward(x, in_weight, in_bias, out_weight, out_bias)
        ctx.heads, ctx.blocks, ctx.attend = heads, blocks, attend
        project_in, project_out = _pack(in_weight, in_bias), _pack(out_weight, out_bias)
        y, qkv = empty(x.shape, x.dtype), empty([_most(blocks), len(in_weight)], x.dtype)
        for x_row, y_row in zip(x, y, strict=True):
            for block in blocks:
                part = _product(project_in, x_row[block.seen], qkv)
                out = attend(*_apart(part, heads))
                _product(project_out, _join(out)[_inside(block)], y_row[block.rows])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, in_weight, in_bias, out_weight, out_bias = ctx.saved_tensors
        project_in = _pack(in_weight, in_bias)
        turn_back_in, turn_back_out = _pack(in_weight.t()), _pack(out_weight.t())
        most, wide = _most(ctx.blocks), torch.promote_types(x.dtype, torch.float32)
        qkv, grad_seen = (empty([most, width], x.dtype) for width in (len(in_weight), out_weight.shape[1]))
        grad_read = empty([most, x.shape[2]], x.dtype)
        grad_x = empty(x.shape, x.dtype).zero_()
        grad_in, grad_out = (torch.zeros(weight.shape, dtype=wide) for weight in (in_weight, out_weight))
        grad_in_bias, grad_out_bias = (torch.zeros(len(weight), dtype=wide) for weight in (in_weight, out_weight))
        for x_row, grad_row, grad_x_row in zip(x, grad.contiguous(), grad_x, strict=True):
            for block in ctx.blocks:
                inside, grad_part = _inside(block), grad_row[block.rows]
                part = _product(project_in, x_row[block.seen], qkv)
                heads = [rows.requires_grad_() for rows in _apart(part, ctx.heads)]
                with torch.enable_grad():
                    out = ctx.attend(*heads)
                grad_out += weight_gradient(grad_part, _join(out.detach())[inside])
                grad_out_bias += grad_part.sum(0)
                grad_seen[: inside.start] = grad_seen[inside.stop : len(part)] = 0  # the other blocks give theirs
                _product(turn_back_out, grad_part, grad_seen[inside])
                gradients = torch.autograd.grad(out, heads, _heads(grad_seen[: len(part)], ctx.heads))
                del heads, out
                for columns, gradient in zip(part.chunk(3, 1), gradients, strict=True):
                    columns.copy_(_join(gradient))
                del gradients
                grad_in += weight_gradient(part, x_row[block.seen])
                grad_in_bias += part.sum(0)
                grad_x_row[block.seen] += _product(turn_back_in, part, grad_read)
        return (
            grad_x,
            grad_in.to(x.dtype),
            None if in_bias is None else grad_in_bias.to(x.dtype),
            grad_out.to(x.dtype),
            None if out_bias is None else grad_out_bias.to(x.dtype),
            *(None, None, None),
        )


def _pack(weight: Tensor, bias: Tensor | None = None) -> Linear:
    if weight.dtype in PRECISIONS:
        return make_linear(Weight(weight.contiguous()), bias, PRECISIONS[weight.dtype])
    return PlainLinear(Weight(weight), bias, weight.dtype)


def _product(layer: Linear, x: Tensor, memory: Tensor) -> Tensor:
    """The layer of rows x, in the first rows of `memory`."""
    out = memory[: len(x)]
    y = layer(x, out).y
    return out if y.data_ptr() == out.data_ptr() else out.copy_(y)


def _apart(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """q, k and v [1, H, n, D] of [n, 3 * H * D]."""
    return tuple(_heads(rows, heads) for rows in qkv.chunk(3, 1))


def _heads(rows: Tensor, heads: int) -> Tensor:
    """[1, H, n, D] of [n, H * D]"""
    return rows.unflatten(1, (heads, -1)).transpose(0, 1)[None]


def _join(heads: Tensor) -> Tensor:
    """[n, H * D] of [1, H, n, D]"""
    return heads[0].transpose(0, 1).flatten(1)


def _most(blocks: list[Block]) -> int:
    return max(block.seen.stop - block.seen.start for block in blocks)


def _inside(block: Block) -> slice:
    """Where its rows are among those that it sees."""
    return slice(block.rows.start - block.seen.start, block.rows.stop - block.seen.start)
