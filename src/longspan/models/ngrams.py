"""Tokens and pairs of neighbors that speak for a label by themselves, beside what an encoder reads.

The wide part of a wide and deep classifier (arXiv 1606.07792): a linear model of n-grams knows phrases that a small
encoder has no room for, and costs the reading of a table. `longspan.compression.ngrams` fits it.

Shapes: B batch, N tokens, L labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PRIME = 2**31 - 1


class NgramLogits(nn.Module):
    """The sum over a row's tokens and pairs of neighbors of what a table says of each. Zeros until it is fitted.

    buckets: rows of the table; a hash gives n-grams theirs, and some share one.
    """

    def __init__(self, buckets: int, labels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(buckets, labels))

    def forward(self, input_ids: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """[B, L], fp32 or wider. token_mask: Bool[B, N], True = token."""
        buckets, there = ngram_buckets(input_ids, token_mask, self.weight.shape[0])
        said = F.embedding(buckets, self.weight)
        said = said.to(torch.promote_types(said.dtype, torch.float32))  # for the sum
        return torch.where(there[..., None], said, 0).sum(1)


def ngram_buckets(input_ids: Tensor, token_mask: Tensor | None, buckets: int) -> tuple[Tensor, Tensor]:
    """(the bucket of each token and of each pair of neighbors, which of them are there), [B, 2 N - 1] both.

    A pair is there if both of its tokens are, side by side.
    """
    if token_mask is None:
        token_mask = torch.ones_like(input_ids, dtype=torch.bool)
    # Numbers of pairs begin beyond those of tokens.
    grams = torch.cat((input_ids, (input_ids[:, :-1] + 1) * (2**20 + 7) + input_ids[:, 1:]), 1)
    there = torch.cat((token_mask, token_mask[:, :-1] & token_mask[:, 1:]), 1)
    return grams % _PRIME * 48271 % _PRIME % buckets, there
