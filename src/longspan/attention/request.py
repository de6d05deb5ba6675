"""One call of `attend`, checked: what every backend is asked, and what a backend is.

Shapes: B batch, H heads, M queries, N keys, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from longspan.attention.patterns import Pattern


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """The inputs of one attention call. Padded rows of q, k and v may hold anything.

    token_mask None: every row is a token. query_positions None: q has the rows 0..N-1.
    """

    q: Tensor  # [B, H, M, D]
    k: Tensor  # [B, H, N, D]
    v: Tensor  # [B, H, N, D]
    pattern: Pattern
    token_mask: Tensor | None  # Bool[B, N]
    query_positions: Tensor | None  # Long[M] or Long[B, M]
    scale: float
    dropout: float
    return_lse: bool

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def dtype(self) -> torch.dtype:
        return self.q.dtype

    @property
    def needs_grad(self) -> bool:
        return torch.is_grad_enabled() and any(t.requires_grad for t in (self.q, self.k, self.v))

    def without_padding(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v with zeros in padded rows: what stands there, NaN included, must not reach any sum."""
        if self.token_mask is None:
            return self.q, self.k, self.v
        is_token = self.token_mask[:, None, :, None]
        q = torch.where(self.query_is_token()[:, None, :, None], self.q, 0.0)
        return q, torch.where(is_token, self.k, 0.0), torch.where(is_token, self.v, 0.0)

    def query_is_token(self) -> Tensor:
        """Bool[B, M]: rows of q that stand on tokens; needs a token_mask."""
        assert self.token_mask is not None
        positions = self.query_positions
        if positions is None:
            return self.token_mask
        return self.token_mask[:, positions] if positions.ndim == 1 else self.token_mask.gather(1, positions)

    def dense_count(self) -> Tensor:
        """How often each key enters the softmax of each query: broadcasts to [B, H, M, N]. Padding counts 0."""
        batch, heads, queries, _ = self.q.shape
        tokens = self.k.shape[2]
        positions = self.query_positions
        if positions is None:
            positions = torch.arange(queries, device=self.device)
        count = self.pattern.count(
            torch.arange(batch, device=self.device).view(-1, 1, 1, 1),
            torch.arange(heads, device=self.device).view(1, -1, 1, 1),
            positions[..., None] if positions.ndim == 1 else positions[:, None, :, None],
            torch.arange(tokens, device=self.device).view(1, 1, 1, -1),
        )
        if self.token_mask is None:
            return count
        return count * self.token_mask[:, None, None, :] * self.query_is_token()[:, None, :, None]


def never(request: Request) -> None:
    """No objection."""


class Backend(NamedTuple):
    """A way to compute attention.

    run: gives out [B, H, M, D] and, where `return_lse` asks for it, lse [B, H, M] in float32 or wider. Padded rows and
    rows that see nothing give 0 and -inf, and finite gradients.
    unsupported: why it cannot run a request, or None.
    slower: why "auto" should leave a request to another backend that can run it, or None.
    """

    name: str
    run: Callable[[Request], tuple[Tensor, Tensor | None]]
    unsupported: Callable[[Request], str | None] = never
    slower: Callable[[Request], str | None] = never
