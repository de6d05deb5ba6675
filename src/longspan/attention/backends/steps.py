"""A walk over q, k and v in steps, each some query rows and keys that they may see: the shared part of banded and
segments.

Shapes: B batch, H heads, N tokens, D head width, T tiles of one step, S query rows and K keys of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longspan.attention.backends import sdpa
from longspan.attention.request import Request

# Up to DENSE_TOKENS + half of the keys that a row sees, dense attention is the faster one. Measured with 12 heads of
# width 64, float32 and bfloat16, 2 threads: the two meet between 256 and 512 tokens for 129 keys, 450 and 600 for 513.
DENSE_TOKENS = 256


@dataclass(frozen=True, eq=False)
class Step:
    """T tiles of S query rows and K keys: views into the inputs, and what to add to the scores.

    Either many batch rows with one tile each, or one batch row with many tiles, `apart` rows from one to the next.
    Rows are counted within the lane: all tokens, or every n-th.
    """

    batch: slice
    heads: slice
    lane: slice
    first_query: int
    queries: int
    first_key: int
    keys: int
    tiles: int = 1
    apart: int = 0
    columns: Tensor | None = None  # Long[K]: the keys, instead of a range; after the first `keys` only hidden filling
    merges: bool = False  # these query rows were in earlier steps, with other keys
    bias: Tensor | None = None  # log of the counts, broadcasts to [T, H, S, K]; None: every key counts once
    query_is_token: Tensor | None = None  # Bool[T, 1, S, 1] where there is padding among the query rows
    key_is_token: Tensor | None = None  # Bool[T, 1, K, 1] where there is padding among the keys

    def query_view(self, rows: Tensor) -> Tensor:
        """View [T, H, S, D] of rows [B, H, N, D]."""
        return self._view(rows, self.first_query, self.queries)

    def query_rows(self, rows: Tensor) -> Tensor:
        """The query rows [T, H, S, D] out of rows [B, H, N, D], with 0 for padding."""
        view = self.query_view(rows)
        return view if self.query_is_token is None else torch.where(self.query_is_token, view, 0.0)

    def key_rows(self, rows: Tensor) -> Tensor:
        """The keys [T, H, K, D] out of rows [B, H, N, D], with 0 for padding."""
        if self.columns is not None:
            return rows[self.batch, self.heads].index_select(2, self.columns)
        view = self._view(rows, self.first_key, self.keys)
        return view if self.key_is_token is None else torch.where(self.key_is_token, view, 0.0)

    def add_to_keys(self, total: Tensor, part: Tensor) -> None:
        """Add part [T, H, K, D] to the rows of `total` [B, H, N, D] that `key_rows` takes."""
        rows = total[self.batch, self.heads, self.lane]
        if self.columns is not None:
            rows.index_add_(2, self.columns, part.to(total.dtype))
            return
        for tile in range(self.tiles):  # one by one, because tiles may overlap
            start = self.first_key + tile * self.apart
            rows[:, :, start : start + self.keys] += part if self.tiles == 1 else part[tile]

    def indices(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Batch row, head, query and key of each score, as positions in q [B, H, N, D]; they broadcast to
        [T, H, S, K]."""

        def count(number: int) -> Tensor:
            return torch.arange(number, dtype=torch.int32, device=q.device)

        batch, heads = count(q.shape[0])[self.batch, None, None, None], count(q.shape[1])[self.heads, None, None]
        first, stride = self.lane.start, self.lane.step
        tiles = count(self.tiles)[:, None, None, None] * self.apart
        queries = first + stride * (count(self.queries)[:, None] + self.first_query + tiles)
        if self.columns is not None:
            return batch, heads, queries, self.columns.int()[None, None, None]
        return batch, heads, queries, first + stride * (count(self.keys) + self.first_key + tiles)

    def with_counts(self, count: Tensor, indices: tuple[Tensor, ...], token_mask: Tensor | None) -> Iterator[Step]:
        """The step with its bias and its padding; nothing where all its query rows are padding.

        count: how often each key enters the softmax, padding aside; broadcasts to [T, H, S, K].
        """
        if token_mask is None:
            yield replace(self, bias=_log(count))
            return
        batch, _, queries, keys = indices
        query_is_token, key_is_token = token_mask[batch, queries], token_mask[batch, keys]
        if query_is_token.any():
            yield replace(
                self,
                bias=_log(count * query_is_token * key_is_token),
                query_is_token=None if query_is_token.all() else query_is_token,
                key_is_token=None if key_is_token.all() else key_is_token.mT,
            )

    def _view(self, rows: Tensor, first: int, length: int) -> Tensor:
        rows = rows[self.batch, self.heads, self.lane]
        if self.tiles == 1:
            return rows[:, :, first : first + length]
        stop = first + (self.tiles - 1) * self.apart + length
        return rows[0, :, first:stop].unfold(1, length, self.apart).permute(1, 0, 3, 2)


def slower_than_dense(request: Request, keys_per_row: int) -> str | None:
    """Why a walk should leave a request to dense attention, or None."""
    limit = DENSE_TOKENS + keys_per_row // 2
    if request.k.shape[2] > limit or sdpa.unsupported(request) is not None:
        return None
    return f"up to {limit} tokens dense attention is faster for this pattern"


def slices(total: int, size: int) -> Iterator[slice]:
    """Cut 0..total in slices of `size`, at least 1."""
    size = max(1, size)
    for start in range(0, total, size):
        yield slice(start, min(total, start + size))


def _log(count: Tensor) -> Tensor:
    if count.dtype == torch.bool:
        return torch.where(count, 0.0, -torch.inf)
    return count.double().log()
