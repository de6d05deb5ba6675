"""Rows of global tokens, which see their whole sequence through projections of their own (Longformer).

The keys and values of all tokens need not be projected for few rows: a score is (Wk^T q) . x, what the key's bias adds
to all scores of a query leaves its softmax, and the mean of Wv x + b is Wv (mean of x) + b.

Shapes: n rows of one sequence, g of them global, C model width, H heads, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.attention import Full, attend
from longspan.models.encoder import BlockConfig, Rotary
from longspan.models.linear import Weight

ROWS_AT_ONCE = 8192  # scores of so many keys are held at a time


class GlobalProjections:
    """weight: [3*H*D, C] for q, k and v, kept in `dtype`. bias: [3*H*D] or None."""

    def __init__(self, block: BlockConfig, weight: Weight, bias: Tensor | None, dtype: torch.dtype):
        self.heads, self.width = block.heads, block.head_width
        self.weight = weight.widened(dtype).clone()
        self.bias = None if bias is None else bias.to(dtype, copy=True)

    def read(self, x: Tensor, rows: Tensor, seen: Tensor | None, rotary: Rotary | None) -> Tensor:
        """What the global rows Long[g] of a sequence x [n, C] read from all of it: [g, H*D].

        seen: Bool[1, n], None: all. rotary: of the sequence's positions, [1, 1, n, D].
        """
        q = self._project(x[rows], 0)  # [H, g, D]
        # The number of multiplications decides: g * H folded queries or H * D keys and values against each x.
        if rotary is None and len(rows) < self.width:
            read = self._read_folded(x, q, seen)
        else:
            k, v = self._project(x, 1)[None], self._project(x, 2)[None]
            q = q[None]
            if rotary is not None:
                q, k = rotary.take(rows[None]).turn(q), rotary.turn(k)
            read = attend(q, k, v, Full(), token_mask=seen, query_positions=rows)[0]
        return read.transpose(0, 1).flatten(1)

    def _part(self, number: int) -> tuple[Tensor, Tensor | None]:
        inner = self.heads * self.width
        part = slice(number * inner, (number + 1) * inner)
        return self.weight[part], None if self.bias is None else self.bias[part]

    def _project(self, x: Tensor, number: int) -> Tensor:
        return F.linear(x, *self._part(number)).view(len(x), self.heads, self.width).transpose(0, 1)

    def _read_folded(self, x: Tensor, q: Tensor, seen: Tensor | None) -> Tensor:
        """[H, g, D], by a softmax that goes over the keys once and keeps a running maximum."""
        heads, queries, width = q.shape
        key, (value, bias) = self._part(1)[0], self._part(2)
        folded = torch.bmm(q, key.view(heads, width, -1)).flatten(0, 1)  # [H*g, C]
        top = torch.full((len(folded), 1), -torch.inf)
        total, mixed = torch.zeros_like(top), torch.zeros(folded.shape)
        for start in range(0, len(x), ROWS_AT_ONCE):
            part = x[start : start + ROWS_AT_ONCE]
            scores = (folded @ part.t()).float().mul_(width**-0.5)
            if seen is not None:
                scores.masked_fill_(~seen[:, start : start + ROWS_AT_ONCE], -torch.inf)
            highest = torch.maximum(top, scores.amax(1, keepdim=True)).clamp(min=torch.finfo(torch.float32).min)
            scores.sub_(highest).exp_()
            kept = (top - highest).exp_()
            total.mul_(kept).add_(scores.sum(1, keepdim=True))
            mixed.mul_(kept).add_(scores.to(x.dtype) @ part)
            top = highest
        mixed = mixed.div_(total).to(x.dtype).view(heads, queries, -1)
        read = torch.bmm(mixed, value.view(heads, width, -1).transpose(1, 2))
        return read if bias is None else read + bias.view(heads, 1, width)
