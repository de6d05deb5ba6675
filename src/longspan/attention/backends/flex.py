"""Attention by torch's FlexAttention: the pattern's count becomes its mask and, where counts exceed 1, its score.

On CUDA it is compiled to one kernel that skips the blocks where nothing is visible. On CPU torch runs it without
compiling, with all N x N scores, and cannot give gradients: there it is a second opinion, not a fast path.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longspan.attention.request import Request

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def unsupported(request: Request) -> str | None:
    if request.dropout:
        return "FlexAttention has no dropout"
    if request.device.type == "cpu" and request.needs_grad:
        return "FlexAttention has no backward pass on cpu"
    if request.device.type == "cuda" and request.dtype == torch.float64:
        return "FlexAttention has no float64 kernel on cuda"
    return None


def slower(request: Request) -> str | None:
    if request.device.type == "cpu":
        return "on cpu it computes all N x N scores"
    return "nobody has measured it on this kind of device yet"


def run(request: Request) -> tuple[Tensor, Tensor | None]:
    from torch.nn.attention.flex_attention import AuxRequest  # it loads torch's compiler: as long as loading torch

    q, k, v = request.without_padding()
    options = {
        "score_mod": _score_mod(request),
        "block_mask": _block_mask(request),
        "scale": request.scale,
        "return_aux": AuxRequest(lse=True) if request.return_lse else None,
    }
    if request.device.type == "cuda":
        result = _compiled()(q, k, v, **options)
    else:
        if not request.needs_grad:
            q, k, v = q.detach(), k.detach(), v.detach()  # on cpu FlexAttention refuses what could ask for gradients
        result = _uncompiled(q, k, v, options)
    if not request.return_lse:
        return result, None
    out, aux = result
    return out, aux.lse


def _position(request: Request) -> Callable[[Tensor, Tensor], Tensor]:
    """Where a row of q stands."""
    positions = request.query_positions

    def position(batch: Tensor, row: Tensor) -> Tensor:
        if positions is None:
            return row
        return positions[row] if positions.ndim == 1 else positions[batch, row]

    return position


def _count(request: Request) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The pattern's count by row of q instead of position; padding counts 0."""
    pattern, token_mask, position = request.pattern, request.token_mask, _position(request)

    def count(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        query = position(batch, row)
        number = pattern.count(batch, head, query, key)
        if token_mask is not None:
            number = number * (token_mask[batch, key] & token_mask[batch, query])
        return number

    return count


def _score_mod(request: Request) -> Callable[..., Tensor] | None:
    """What changes a score: the log of its count where that may exceed 1, and the bias."""
    bias, repeats = request.bias, request.pattern.repeats
    if bias is None and not repeats:
        return None
    count, position = _count(request), _position(request)

    def change(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        if repeats:
            score = score + count(batch, head, row, key).to(score.dtype).log()
        if bias is not None:
            score = score + bias.at(head, position(batch, row), key).to(score.dtype)
        return score

    return change


def _block_mask(request: Request) -> BlockMask:
    from torch.nn.attention.flex_attention import create_block_mask

    count = _count(request)
    batch, heads, queries, _ = request.q.shape

    def visible(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return count(batch, head, row, key) > 0

    return create_block_mask(visible, batch, heads, queries, request.k.shape[2], device=request.device)


@functools.cache
def _compiled() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _uncompiled(q: Tensor, k: Tensor, v: Tensor, options: dict):
    from torch.nn.attention.flex_attention import flex_attention

    if torch.compiler.is_compiling():
        return flex_attention(q, k, v, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return flex_attention(q, k, v, **options)
