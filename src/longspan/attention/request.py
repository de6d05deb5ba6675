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


class DistanceBias(NamedTuple):
    """What is added to each score, by head and by the distance between query and key.

    values: [H, R], of a key that stands r - `ahead` tokens before its query: column `ahead` is the query itself, those
    to its left are keys that follow the query. A key further away takes the value at that end.
    Buckets as T5's are a table with one column per distance up to the largest bucket; ALiBi is `-slope * distance`.
    """

    values: Tensor
    ahead: int = 0

    def at(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """The bias of a score. The indices broadcast."""
        return self.values[head, (query - key + self.ahead).clamp(0, self.values.shape[1] - 1)]


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
    bias: DistanceBias | None = None  # in float32 or wider

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def dtype(self) -> torch.dtype:
        return self.q.dtype

    @property
    def needs_grad(self) -> bool:
        inputs = (self.q, self.k, self.v) if self.bias is None else (self.q, self.k, self.v, self.bias.values)
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)

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
        count = self.pattern.count(*self._indices())
        if self.token_mask is None:
            return count
        return count * self.token_mask[:, None, None, :] * self.query_is_token()[:, None, :, None]

    def dense_bias(self) -> Tensor | None:
        """What `bias` adds to each score: broadcasts to [B, H, M, N]."""
        return None if self.bias is None else self.bias.at(*self._indices()[1:])

    def _indices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Batch row, head, query and key of each score; they broadcast to [B, H, M, N]."""
        batch, heads, queries, _ = self.q.shape
        positions = self.query_positions
        if positions is None:
            positions = torch.arange(queries, device=self.device)
        return (
            torch.arange(batch, device=self.device).view(-1, 1, 1, 1),
            torch.arange(heads, device=self.device).view(1, -1, 1, 1),
            positions[..., None] if positions.ndim == 1 else positions[:, None, :, None],
            torch.arange(self.k.shape[2], device=self.device).view(1, 1, 1, -1),
        )


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
