"""Few rows that see their whole sequence: global tokens, through projections of their own (Longformer), and the first
tokens of the last layer, where a classifier asks for no others.

The keys and values of all tokens need not be projected for few rows: a score is (Wk^T q) . x, what the key's bias adds
to all scores of a query leaves its softmax, and the mean of Wv x + b is Wv (mean of x) + b.

Shapes: n rows of one sequence, g of them global, C model width, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.attention import Full, attend
from longspan.models.encoder import BlockConfig, Rotary
from longspan.models.linear import Weight, fast_dtype

ROWS_AT_ONCE = 8192  # scores of so many keys are held at a time


class GlobalProjections:
    """weight: [3*H*D, C] for q, k and v. bias: [3*H*D] or None. dtype: of the rows x that are read, in which it also
    computes where the processor can."""

    def __init__(self, block: BlockConfig, weight: Weight, bias: Tensor | None, dtype: torch.dtype):
        self.heads, self.width = block.heads, block.head_width
        fast = fast_dtype(dtype)
        self.weight = weight.widened(dtype).to(fast, copy=True)
        self.bias = None if bias is None else bias.to(dtype).to(fast, copy=True)

    def read(self, x: Tensor, rows: Tensor, seen: Tensor | None, rotary: Rotary | None) -> Tensor:
        """What the global rows Long[g] of a sequence x [n, C] read from all of it: [g, H*D].

        seen: Bool[1, n], None: all. rotary: of the sequence's positions, [1, 1, n, D].
        """
        dtype, x = x.dtype, x.to(self.weight.dtype)
        q = self._project(x[rows], 0)  # [H, g, D]
        # The number of multiplications decides: g * H folded queries or H * D keys and values against each x.
        if rotary is None and len(rows) < self.width:
            folded = self._fold(q)
            read = self._unfold(self._mix(x, folded.flatten(0, 1), seen).view_as(folded))
        else:
            k, v = self._project(x, 1)[None], self._project(x, 2)[None]
            q = q[None]
            if rotary is not None:
                q, k = rotary.take(rows[None]).turn(q), rotary.turn(k)
            read = attend(q, k, v, Full(), token_mask=seen, query_positions=rows)[0]
        return read.transpose(0, 1).flatten(1).to(dtype)

    def read_first(self, x: Tensor, rows: list[int], sequences: Iterable[tuple[int, int, Tensor | None]]) -> Tensor:
        """What one row of each sequence reads from all of it: [S, H*D].

        x: [T, C], the sequences one after the other. rows: the S rows. sequences: (first row, end, seen) of each.
        """
        dtype = self.weight.dtype
        folded = self._fold(self._project(x[rows].to(dtype), 0)).transpose(0, 1)  # [S, H, C]
        mixed = torch.empty_like(folded)
        for number, (start, end, seen) in enumerate(sequences):
            mixed[number] = self._mix(x[start:end].to(dtype), folded[number], seen)
        return self._unfold(mixed.transpose(0, 1)).transpose(0, 1).flatten(1).to(x.dtype)

    def _part(self, number: int) -> tuple[Tensor, Tensor | None]:
        inner = self.heads * self.width
        part = slice(number * inner, (number + 1) * inner)
        return self.weight[part], None if self.bias is None else self.bias[part]

    def _project(self, x: Tensor, number: int) -> Tensor:
        return F.linear(x, *self._part(number)).view(len(x), self.heads, self.width).transpose(0, 1)

    def _fold(self, q: Tensor) -> Tensor:
        """Queries [H, g, D] -> [H, g, C], against which x itself stands for the keys."""
        return torch.bmm(q, self._part(1)[0].view(self.heads, self.width, -1)).mul_(self.width**-0.5)

    def _unfold(self, mixed: Tensor) -> Tensor:
        """Means of x, [H, g, C] -> [H, g, D], the same means of the values."""
        value, bias = self._part(2)
        read = torch.bmm(mixed, value.view(self.heads, self.width, -1).transpose(1, 2))
        return read if bias is None else read + bias.view(self.heads, 1, self.width)

    def _mix(self, x: Tensor, folded: Tensor, seen: Tensor | None) -> Tensor:
        """Means of x [n, C] by the softmax of its products with `folded`, both [m, C]; it goes over x once."""
        top = torch.full((len(folded), 1), -torch.inf)
        total, mixed = torch.zeros_like(top), torch.zeros(folded.shape)
        for start in range(0, len(x), ROWS_AT_ONCE):
            part = x[start : start + ROWS_AT_ONCE]
            scores = (folded @ part.t()).float()
            if seen is not None:
                scores.masked_fill_(~seen[:, start : start + ROWS_AT_ONCE], -torch.inf)
            highest = torch.maximum(top, scores.amax(1, keepdim=True)).clamp(min=torch.finfo(torch.float32).min)
            scores.sub_(highest).exp_()
            kept = (top - highest).exp_()
            total.mul_(kept).add_(scores.sum(1, keepdim=True))
            mixed.mul_(kept).add_(scores.to(x.dtype) @ part)
            top = highest
        return mixed.div_(total).to(x.dtype)
