"""The definition of attention: N x N, in float32 or wider. Slow and readable; every other backend must match it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longspan.attention.request import Request


def run(request: Request) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(request.dtype, torch.float32)
    q, k, v = (tensor.to(wide) for tensor in request.without_padding())
    scores = q @ k.mT * request.scale + request.dense_count().to(wide).log()  # [B, H, M, N]
    bias = request.dense_bias()
    if bias is not None:
        scores = scores + bias
    blind = (scores == -math.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(blind, 0)  # a softmax over nothing would make NaN gradients
    probabilities = torch.dropout(scores.softmax(-1), request.dropout, train=True)
    out = (probabilities @ v).masked_fill(blind, 0)
    lse = scores.logsumexp(-1, keepdim=True).masked_fill(blind, -math.inf)
    return out.to(request.dtype), lse.squeeze(-1)
