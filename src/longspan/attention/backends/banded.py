"""Attention within a band: a block of queries meets only the keys within reach, and the extra keys.

Cost and memory grow with N * reach. Between forward and backward only q, k, v, out and the log of each row's softmax
sum are kept; the backward pass computes the probabilities again, block by block, as FlashAttention does
(arXiv 2205.14135, algorithm 4). All of it is one torch operator: torch.compile sees a single node.

Shapes: B batch, H heads, N tokens, D head width, T tiles of one step, S query rows and K keys of a tile.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longspan.attention.backends.band_steps import plan_steps
from longspan.attention.patterns import pattern_from_parts, pattern_to_parts
from longspan.attention.request import Request

SCORES_IN_CACHE = 2**20  # float32 scores of one step: 4 MiB
SCORES_NOT_STORED = 2**24  # the fused kernel stores only the bias, which all heads share


def unsupported(request: Request) -> str | None:
    if request.pattern.reach() is None:
        return f"{request.pattern.name} sees keys at any distance, so there is no band"
    if request.query_positions is not None:
        return "query_positions may put rows anywhere, so there is no band"
    return None


def run(request: Request) -> tuple[Tensor, Tensor]:
    text, tensors = pattern_to_parts(request.pattern)
    seed = torch.randint(2**62, ()) if request.dropout else None
    q, k, v = request.q, request.k, request.v
    return attend_banded(q, k, v, text, tensors, request.token_mask, seed, request.scale, request.dropout)


@torch.library.custom_op("longspan::banded", mutates_args=())
def attend_banded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: str,
    tensors: list[Tensor],
    token_mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """out [B, H, N, D] and lse [B, H, N] for q, k, v [B, H, N, D] and a pattern in parts."""
    q, k, v = (_rows(tensor) for tensor in (q, k, v))
    out, lse = _empty_like_rows(q), _empty_lse(q)
    fused = q.device.type == "cpu" and not dropout
    drop = _Dropout(dropout, seed, q.device)
    max_scores = SCORES_NOT_STORED if fused else SCORES_IN_CACHE
    for step in plan_steps(pattern_from_parts(pattern, tensors), q, token_mask, max_scores):
        tiles = step.query_view(q), step.key_view(k), step.key_view(v), step.bias
        part, part_lse = _attend_fused(*tiles, scale) if fused else _attend_plain(*tiles, scale, drop)
        out_view, lse_view = step.query_view(out), step.query_view(lse)
        if step.columns is not None:  # the band of these rows is in place already
            part, part_lse = _merge(out_view, lse_view, part, part_lse)
        out_view.copy_(part)
        lse_view.copy_(part_lse)
    return out, lse.squeeze(-1)


@attend_banded.register_fake
def _(q, k, v, pattern, tensors, token_mask, seed, scale, dropout):
    return _empty_like_rows(q), _empty_lse(q).squeeze(-1)


@torch.library.custom_op("longspan::banded_backward", mutates_args=())
def attend_banded_backward(
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
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    q, k, v, grad_out = (_rows(tensor) for tensor in (q, k, v, grad_out))
    wide = lse.dtype
    delta = (grad_out.to(wide) * out).sum(-1, keepdim=True)  # [B, H, N, 1]
    if grad_lse is not None:
        delta -= grad_lse[..., None]
    lse = lse[..., None].masked_fill(lse[..., None] == -math.inf, math.inf)  # exp(score - inf) = 0 in blind rows
    grad_q, grad_k, grad_v = (torch.zeros(q.shape, dtype=wide, device=q.device) for _ in range(3))
    drop = _Dropout(dropout, seed, q.device)
    for step in plan_steps(pattern_from_parts(pattern, tensors), q, token_mask, SCORES_IN_CACHE):
        queries, keys, values = step.query_view(q), step.key_view(k), step.key_view(v)
        grad = step.query_view(grad_out)
        probabilities = _scores(queries, keys, step.bias, scale).sub_(step.query_view(lse)).exp_()  # [T, H, S, K]
        grad_probabilities = grad.to(wide) @ values.to(wide).mT
        dropped = probabilities
        if dropout:
            keep = drop.draw(probabilities)
            dropped, grad_probabilities = probabilities * keep, grad_probabilities.mul_(keep)
        grad_scores = grad_probabilities.sub_(step.query_view(delta)).mul_(probabilities).to(q.dtype)
        step.add_to_keys(grad_v, dropped.to(q.dtype).mT @ grad)
        step.add_to_keys(grad_k, (grad_scores.mT @ queries).mul_(scale))
        step.query_view(grad_q).add_(grad_scores @ keys, alpha=scale)
    results = []
    for total in (grad_q, grad_k, grad_v):
        results.append(_empty_like_rows(q).copy_(total))
    return results[0], results[1], results[2]


@attend_banded_backward.register_fake
def _(grad_out, grad_lse, q, k, v, out, lse, pattern, tensors, token_mask, seed, scale, dropout):
    return _empty_like_rows(q), _empty_like_rows(q), _empty_like_rows(q)


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.pattern, tensors, token_mask, seed, ctx.scale, ctx.dropout = inputs
    ctx.save_for_backward(q, k, v, *output, token_mask, seed, *tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    q, k, v, out, lse, token_mask, seed, *tensors = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = attend_banded_backward(
        grad_out, grad_lse, q, k, v, out, lse, ctx.pattern, tensors, token_mask, seed, ctx.scale, ctx.dropout
    )
    return *grads, None, [None] * len(tensors), None, None, None, None


attend_banded.register_autograd(_backward, setup_context=_setup_context)


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out [T, H, S, D] and lse [T, H, S, 1] by torch's flash kernel for CPU, which stores no scores."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(q, k, v, attn_mask=bias, scale=scale)
    blind = bias.amax(-1) == -math.inf  # there the kernel gives out 0, but lse 0 too
    return out, lse.masked_fill(blind, -math.inf)[..., None]


def _attend_plain(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, drop: _Dropout
) -> tuple[Tensor, Tensor]:
    """The same with dropout, and on any device."""
    scores = _scores(q, k, bias, scale)
    lse = scores.logsumexp(-1, keepdim=True)
    probabilities = scores.sub_(lse.masked_fill(lse == -math.inf, math.inf)).exp_()
    if drop.fraction:
        probabilities *= drop.draw(probabilities)
    return probabilities.to(v.dtype) @ v, lse


def _scores(q: Tensor, k: Tensor, bias: Tensor, scale: float) -> Tensor:
    """[T, H, S, K], in float32 or wider: rounding scores to bfloat16 would cost two digits of every probability."""
    return (q.to(bias.dtype) * scale @ k.to(bias.dtype).mT).add_(bias)


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax over the keys of two."""
    share = torch.sigmoid(other_lse - lse).nan_to_num(0)  # NaN: -inf - -inf, neither sees a key
    return torch.lerp(out.to(lse.dtype), other.to(lse.dtype), share), torch.logaddexp(lse, other_lse)


class _Dropout:
    """Factors for probabilities; the same seed draws the same factors in the same order again."""

    def __init__(self, fraction: float, seed: Tensor | None, device: torch.device):
        self.fraction = fraction
        self.generator = None if seed is None else torch.Generator(device).manual_seed(int(seed))

    def draw(self, like: Tensor) -> Tensor:
        kept = 1 - self.fraction
        return torch.empty_like(like).bernoulli_(kept, generator=self.generator).div_(kept)


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _empty_like_rows(q: Tensor) -> Tensor:
    """[B, H, N, D] laid out as [B, N, H, D], so that joining the heads afterwards copies nothing."""
    batch, heads, tokens, width = q.shape
    return q.new_empty(batch, tokens, heads, width).transpose(1, 2)


def _empty_lse(q: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:3], 1, dtype=torch.promote_types(q.dtype, torch.float32))
