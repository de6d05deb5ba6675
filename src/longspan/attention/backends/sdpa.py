"""Dense attention by torch's scaled_dot_product_attention: N x N scores, the fastest choice for short inputs."""

from __future__ import annotations

import functools

import torch.nn.functional as F
from torch import Tensor

from longspan.attention.patterns import Full
from longspan.attention.request import Request


def unsupported(request: Request) -> str | None:
    if request.return_lse:
        return "torch's scaled_dot_product_attention does not return the log-sum-exp"
    return None


def run(request: Request) -> tuple[Tensor, None]:
    q, k, v = request.without_padding()
    pattern = request.pattern
    sdpa = functools.partial(F.scaled_dot_product_attention, q, k, v, dropout_p=request.dropout, scale=request.scale)
    if isinstance(pattern, Full) and request.token_mask is None and request.bias is None:
        if not pattern.causal:
            return sdpa(), None
        if request.query_positions is None:
            return sdpa(is_causal=True), None
    count = request.dense_count()
    blind = (count == 0).all(-1, keepdim=True)
    mask = (count > 0) | blind  # a softmax over nothing would make NaN gradients
    if pattern.repeats or request.bias is not None:
        mask = count.to(q.dtype).log().masked_fill(blind, 0)
    bias = request.dense_bias()
    if bias is not None:
        mask = mask + bias.to(q.dtype)
    return sdpa(attn_mask=mask).masked_fill(blind, 0), None
