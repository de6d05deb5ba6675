"""What a model asks about the sequence that its tokens stand in: here these tokens are all of it.

`longspan.distributed.shard` gives a model a sequence whose other tokens are on other ranks.

Shapes: B batch, H heads, N tokens, D head width, G global tokens of a row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.attention import Full, Pattern, attend


class Place:
    """Where the N tokens of a forward pass stand in their sequence: from position `start`, of `total` tokens.

    token_mask: Bool[B, N], True = token; None where all tokens of the sequence are.
    """

    def __init__(self, start: int, total: int, token_mask: Tensor | None):
        self.start, self.total, self.token_mask = start, total, token_mask

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, **options: Any) -> Tensor:
        """What the tokens read, [B, H, N, D]. options: of `longspan.attend`."""
        return attend(q, k, v, pattern, token_mask=self.token_mask, **options)

    def attend_all(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, **options: Any) -> Tensor:
        """What some tokens read from the whole sequence, [B, H, G, D]. q: [B, H, G, D], of the tokens Long[B, G]."""
        return attend(q, k, v, Full(), token_mask=self.token_mask, query_positions=rows, **options)

    def tokens_first(self) -> bool:
        """Whether padding stands only at the end of each row."""
        mask = self.token_mask
        return mask is None or not bool((mask[:, 1:] & ~mask[:, :-1]).any())

    def anywhere(self, found: bool) -> bool:
        """Whether it is found among any tokens of the sequence."""
        return found


class WholeSequence:
    """The tokens of a forward pass are a whole sequence, or the next ones of it beside a cache."""

    can_grow = True

    def place(self, x: Tensor, token_mask: Tensor | None) -> Place:
        """Where the tokens of x [B, N, C] stand. token_mask: Bool[B, N]."""
        return Place(0, x.shape[1], token_mask)

    def span(self, tokens: int) -> tuple[int, int]:
        """(position of the first of so many tokens, tokens of the sequence)."""
        return 0, tokens

    def before(self, counts: Tensor) -> Tensor:
        """What counts of the tokens give for those before them. counts: Long[B]."""
        return torch.zeros_like(counts)

    def most(self, number: int) -> int:
        """The largest number that any tokens of the sequence give."""
        return number

    def following(self, labels: Tensor) -> Tensor:
        """The label of the token after each, Long[B, N]; -100 after the last."""
        return F.pad(labels[:, 1:], (0, 1), value=-100)

    def least(self, numbers: Tensor) -> Tensor:
        """The smallest that any tokens of the sequence give, each for itself. numbers: Long[B]."""
        return numbers

    def total(self, part: Tensor) -> Tensor:
        """The sum over the sequence of what its parts give."""
        return part

    def shared(self, part: Tensor) -> Tensor:
        """`total`, for all to compute with: what they make of it comes back to each part as a gradient."""
        return part

    def once(self, alike: Tensor) -> Tensor:
        """What all have computed of `shared` numbers, so that its gradients count once and not for each of them."""
        return alike

    def whole(self, part: Tensor) -> Tensor:
        """The parts [B, N, ...] of all one after the other; gradients reach one's own."""
        return part

    def first(self, x: Tensor, token_mask: Tensor | None) -> Tensor:
        """The vector of each row's first token, [B, C], also where padding stands before it. x: [B, N, C]."""
        return first_tokens(x, token_mask)

    def mean(self, x: Tensor, token_mask: Tensor | None) -> Tensor:
        """The mean vector of each row's tokens, [B, C]. x: [B, N, C]."""
        if token_mask is None:
            token_mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        tokens = x.masked_fill(~token_mask[..., None], 0)
        return self.shared(tokens.sum(1)) / self.total(token_mask.sum(1, keepdim=True)).clamp(min=1)


def first_tokens(x: Tensor, token_mask: Tensor | None) -> Tensor:
    """The vector of each row's first token, [B, C], also where padding stands before it."""
    if token_mask is None:
        return x[:, 0]
    return x[torch.arange(x.shape[0], device=x.device), token_mask.int().argmax(1)]
