"""Attention as a walk in small dense steps: the operator behind banded and segments.

Between forward and backward only q, k, v, out and the log of each row's softmax sum are kept; the backward pass
computes the probabilities again, step by step, as FlashAttention does (arXiv 2205.14135, algorithm 4). It is one torch
operator, so torch.compile sees a single node whatever the loops inside.

Shapes: B batch, H heads, N tokens, D head width, T tiles of one step, S query rows and K keys of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from longspan.attention.backends.banded import plan_band
from longspan.attention.backends.operators import define, empty_rows, narrow, with_unit_stride
from longspan.attention.backends.segments import plan_segments
from longspan.attention.backends.steps import Step
from longspan.attention.patterns import DilatedSegments, pattern_from_parts, pattern_to_parts
from longspan.attention.request import Request

LOG2_E = math.log2(math.e)
SCORES_IN_CACHE = 2**20  # float32 scores of one step: 4 MiB. Between 2**18 and 2**21 the time hardly changes
SCORES_NOT_STORED = 2**24  # the fused kernel stores only the bias, which all heads share


def run(request: Request) -> tuple[Tensor, Tensor]:
    text, tensors = pattern_to_parts(request.pattern)
    seed = torch.randint(2**62, ()) if request.dropout else None
    q, k, v, token_mask = request.q, request.k, request.v, request.token_mask
    values, ahead = (None, 0) if request.bias is None else request.bias
    return torch.ops.longspan.tiled(
        q, k, v, text, tensors, token_mask, seed, values, ahead, request.scale, request.dropout
    )


def attend_tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: str,
    tensors: list[Tensor],
    token_mask: Tensor | None,
    seed: Tensor | None,
    bias: Tensor | None,
    ahead: int,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """out [B, H, N, D] and lse [B, H, N] for q, k, v [B, H, N, D] and a pattern in parts. bias, ahead: DistanceBias."""
    q, k, v = (with_unit_stride(tensor) for tensor in (q, k, v))
    lse = _empty_lse(q).fill_(-math.inf)
    out = empty_rows(q, lse.dtype).zero_()  # wide, because several steps may add to one row
    fused = q.device.type == "cpu" and not dropout
    drop = _Dropout(dropout, seed, q.device)
    shared = fused and bias is None  # what is added to scores is the same for all heads
    for step in _plan(pattern, tensors, q, token_mask, SCORES_NOT_STORED if shared else SCORES_IN_CACHE):
        added = _added(step, q, bias, ahead, lse.dtype)
        tile = step.query_rows(q), step.key_rows(k), step.key_rows(v), added, scale
        part, part_lse = _attend_fused(*tile) if fused else _attend_plain(*tile, drop)
        out_view, lse_view = step.query_view(out), step.query_view(lse)
        if step.merges:
            part, part_lse = _merge(out_view, lse_view, part, part_lse)
        out_view.copy_(part)
        lse_view.copy_(part_lse)
    return narrow(out, q.dtype), lse.squeeze(-1)


def _fake_attend(q, k, v, pattern, tensors, token_mask, seed, bias, ahead, scale, dropout):
    return empty_rows(q, q.dtype), _empty_lse(q).squeeze(-1)


def attend_tiled_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pattern: str,
    tensors: list[Tensor],
    token_mask: Tensor | None,
    seed: Tensor | None,
    bias: Tensor | None,
    ahead: int,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the bias, the last one empty where there is none."""
    q, k, v, grad_out = (with_unit_stride(tensor) for tensor in (q, k, v, grad_out))
    wide = lse.dtype
    delta = (grad_out.to(wide) * out).sum(-1, keepdim=True)  # [B, H, N, 1]
    if grad_lse is not None:
        delta -= grad_lse[..., None]
    lse = lse[..., None] * LOG2_E
    lse = lse.masked_fill(lse == -math.inf, math.inf)  # exp2(score - inf) = 0 where a row sees nothing
    grad_q, grad_k, grad_v = (empty_rows(q, wide).zero_() for _ in range(3))
    grad_bias = q.new_empty(0) if bias is None else torch.zeros_like(bias)
    drop = _Dropout(dropout, seed, q.device)
    for step in _plan(pattern, tensors, q, token_mask, SCORES_IN_CACHE):
        queries, keys, values = step.query_rows(q), step.key_rows(k), step.key_rows(v)
        grad = step.query_rows(grad_out)
        added = _added(step, q, bias, ahead, wide)
        probabilities = _scores(queries, keys, added, scale, wide).sub_(step.query_view(lse)).exp2_()  # [T, H, S, K]
        grad_probabilities = grad.to(wide) @ values.to(wide).mT
        dropped = probabilities
        if dropout:
            keep = drop.draw(probabilities)
            dropped, grad_probabilities = probabilities * keep, grad_probabilities.mul_(keep)
        grad_scores = grad_probabilities.sub_(step.query_view(delta)).mul_(probabilities)
        if bias is not None:
            column = _columns(step, q, bias, ahead).flatten().long()
            grad_bias[step.heads].index_add_(1, column, grad_scores.sum(0).flatten(1))
        grad_scores = grad_scores.to(q.dtype)
        step.add_to_keys(grad_v, dropped.to(q.dtype).mT @ grad)
        step.add_to_keys(grad_k, (grad_scores.mT @ queries).mul_(scale))
        step.query_view(grad_q).add_(grad_scores @ keys, alpha=scale)
    return narrow(grad_q, q.dtype), narrow(grad_k, q.dtype), narrow(grad_v, q.dtype), grad_bias


def _fake_backward(
    grad_out, grad_lse, q, k, v, out, lse, pattern, tensors, token_mask, seed, bias, ahead, scale, dropout
):
    grad_bias = q.new_empty(0) if bias is None else torch.empty_like(bias)
    return empty_rows(q, q.dtype), empty_rows(q, q.dtype), empty_rows(q, q.dtype), grad_bias


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.pattern, tensors, token_mask, seed, bias, ctx.ahead, ctx.scale, ctx.dropout = inputs
    ctx.save_for_backward(q, k, v, *output, token_mask, seed, bias, *tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    q, k, v, out, lse, token_mask, seed, bias, *tensors = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    *grads, grad_bias = torch.ops.longspan.tiled_backward(
        *(grad_out, grad_lse, q, k, v, out, lse, ctx.pattern, tensors, token_mask, seed),
        *(bias, ctx.ahead, ctx.scale, ctx.dropout),
    )
    return *grads, None, [None] * len(tensors), None, None, None if bias is None else grad_bias, None, None, None


define("longspan::tiled", attend_tiled, _fake_attend)
define("longspan::tiled_backward", attend_tiled_backward, _fake_backward)
torch.library.register_autograd("longspan::tiled", _backward, setup_context=_setup_context)


def _plan(text: str, tensors: list[Tensor], q: Tensor, token_mask: Tensor | None, max_scores: int) -> Iterator[Step]:
    pattern = pattern_from_parts(text, tensors)
    plan = plan_segments if isinstance(pattern, DilatedSegments) else plan_band
    return plan(pattern, q, token_mask, max_scores)


def _added(step: Step, q: Tensor, bias: Tensor | None, ahead: int, wide: torch.dtype) -> Tensor | None:
    """What is added to the scores of a step: broadcasts to [T, H, S, K]."""
    counts = None if step.bias is None else step.bias.to(wide)
    if bias is None:
        return counts
    own = bias[step.heads][:, _columns(step, q, bias, ahead)][None]  # [1, H, S, K]
    return own if counts is None else own + counts


def _columns(step: Step, q: Tensor, bias: Tensor, ahead: int) -> Tensor:
    """Int[S, K]: the column of the bias for each score; the same for all tiles of a step, heads and batch rows."""
    _, _, queries, keys = replace(step, tiles=1).indices(q)
    return (queries - keys + ahead).clamp(0, bias.shape[1] - 1)[0, 0]


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """out [T, H, S, D] and lse [T, H, S, 1] by torch's flash kernel for CPU, which stores no scores."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(q, k, v, attn_mask=bias, scale=scale)
    if bias is not None:
        lse = lse.masked_fill(bias.amax(-1) == -math.inf, -math.inf)  # the kernel says 0 where a row sees nothing
    return out, lse[..., None]


def _attend_plain(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, drop: _Dropout
) -> tuple[Tensor, Tensor]:
    """The same with dropout, and on any device."""
    scores = _scores(q, k, bias, scale, torch.promote_types(q.dtype, torch.float32))
    top = scores.amax(-1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0)  # rows that see nothing
    weights = scores.sub_(top).exp2_()
    total = weights.sum(-1, keepdim=True)
    lse = (total.log2() + top) / LOG2_E
    if drop.fraction:
        weights *= drop.draw(weights)
    return (weights / total.masked_fill(total == 0, 1)).to(v.dtype) @ v, lse


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float, wide: torch.dtype) -> Tensor:
    """Scores to the base 2 [T, H, S, K], in float32 or wider: bfloat16 would cost two digits of every probability.

    Base 2 because torch's exp takes ten times longer than its exp2 where scores are -inf, as those of hidden keys are.
    """
    scores = (q.to(wide) * (scale * LOG2_E)) @ k.to(wide).mT
    return scores if bias is None else scores.add_(bias * LOG2_E)


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax over the keys of two."""
    share = torch.sigmoid(other_lse - lse).nan_to_num(0)  # NaN is -inf - -inf: neither sees a key
    return torch.lerp(out, other.to(out.dtype), share), torch.logaddexp(lse, other_lse)


class _Dropout:
    """Factors for probabilities; the same seed draws the same factors in the same order again."""

    def __init__(self, fraction: float, seed: Tensor | None, device: torch.device):
        self.fraction = fraction
        self.generator = None if seed is None else torch.Generator(device).manual_seed(int(seed))

    def draw(self, like: Tensor) -> Tensor:
        kept = 1 - self.fraction
        return torch.empty_like(like).bernoulli_(kept, generator=self.generator).div_(kept)


def _empty_lse(q: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:3], 1, dtype=torch.promote_types(q.dtype, torch.float32))
