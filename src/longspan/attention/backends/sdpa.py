"""Dense attention by torch's scaled_dot_product_attention: N x N scores, the fastest choice for short inputs."""

from __future__ import annotations

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
    options = {"dropout_p": request.dropout, "scale": request.scale}
    if isinstance(pattern, Full) and request.token_mask is None and not (pattern.causal and _rows_moved(request)):
        return F.scaled_dot_product_attention(q, k, v, is_causal=pattern.causal, **options), None
    count = request.dense_count()
    blind = (count == 0).all(-1, keepdim=True)
    visible = (count > 0) | blind  # a softmax over nothing would make NaN gradients
    mask = count.to(q.dtype).log().masked_fill(blind, 0) if pattern.repeats else visible
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options).masked_fill(blind, 0), None


def _rows_moved(request: Request) -> bool:
    return request.query_positions is not None
