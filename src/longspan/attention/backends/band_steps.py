"""How banded attention walks over its inputs: in steps, each some query rows and the keys that they may see.

Every query row is in exactly one step of its band and, where there are extra keys, in one further step that holds the
extra keys beyond its band. A key that is both near and extra is therefore met once.
Shapes: B batch, H heads, N tokens, D head width, T tiles of one step, S query rows and K keys of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from longspan.attention.patterns import Pattern

MIN_BLOCK, MAX_BLOCK = 64, 256  # query rows of a tile


@dataclass(frozen=True, eq=False)
class Step:
    """T tiles of S query rows and K keys, as views; `bias` is added to their scores.

    Either many batch rows with one tile each, or one batch row with many tiles, `stride` rows apart.
    """

    batch: slice
    heads: slice
    lane: slice  # every `step`-th token, where the pattern sees only those
    first_query: int
    queries: int
    first_key: int = 0
    keys: int = 0
    tiles: int = 1
    columns: Tensor | None = None  # Long[K]: extra keys, instead of a range
    bias: Tensor | None = None  # broadcasts to [T, H, S, K]; None: every key is seen once

    def query_view(self, rows: Tensor) -> Tensor:
        """View [T, H, S, D] of rows [B, H, N, D]."""
        return self._view(rows, self.first_query, self.queries)

    def key_view(self, rows: Tensor) -> Tensor:
        """The keys [T, H, K, D] out of rows [B, H, N, D]: a view, or a copy of extra keys."""
        if self.columns is None:
            return self._view(rows, self.first_key, self.keys)
        return rows[self.batch, self.heads].index_select(2, self.columns)

    def add_to_keys(self, total: Tensor, part: Tensor) -> None:
        """Add part [T, H, K, D] to the rows of `total` [B, H, N, D] that `key_view` takes."""
        rows = total[self.batch, self.heads, self.lane]
        if self.columns is not None:
            rows.index_add_(2, self.columns, part.to(total.dtype))
        elif self.tiles == 1:
            rows[:, :, self.first_key : self.first_key + self.keys] += part
        else:
            for tile in range(self.tiles):
                start = self.first_key + tile * self.queries
                rows[0, :, start : start + self.keys] += part[tile]

    def _view(self, rows: Tensor, first: int, length: int) -> Tensor:
        rows = rows[self.batch, self.heads, self.lane]
        if self.tiles == 1:
            return rows[:, :, first : first + length]
        stop = first + (self.tiles - 1) * self.queries + length
        return rows[0, :, first:stop].unfold(1, length, self.queries).permute(1, 0, 3, 2)


def plan_steps(pattern: Pattern, q: Tensor, token_mask: Tensor | None, max_scores: int) -> Iterator[Step]:
    """The steps for q, k, v of one shape [B, H, N, D]. The same inputs give the same steps in the same order.

    max_scores: bound on T * H * S * K, except that a step holds at least one tile of one head.
    """
    plan = _Plan(pattern, q, token_mask, max_scores)
    for first in range(plan.step):
        yield from plan.lane(slice(first, None, plan.step))
    yield from plan.extra()


class _Plan:
    def __init__(self, pattern: Pattern, q: Tensor, token_mask: Tensor | None, max_scores: int):
        reach = pattern.reach()
        assert reach is not None
        self.pattern, self.token_mask, self.max_scores = pattern, token_mask, max_scores
        self.batch, self.heads, self.tokens, _ = q.shape
        self.device, self.wide = q.device, torch.promote_types(q.dtype, torch.float32)
        self.before, self.after = min(reach.before, self.tokens), min(reach.after, self.tokens)
        self.step = min(max(reach.step, 1), self.tokens)
        extra = pattern.extra_keys()
        self.extra_keys = extra if extra is None or token_mask is None else extra & token_mask
        self.special = extra if token_mask is None else ~token_mask if extra is None else extra | ~token_mask

    def lane(self, lane: slice) -> Iterator[Step]:
        """The band over every `step`-th token. Lengths and positions in here count tokens of the lane."""
        tokens = len(range(self.tokens)[lane])
        before, after = self.before // self.step, self.after // self.step
        block = min(MAX_BLOCK, max(MIN_BLOCK, 1 << max(before, after, 1).bit_length() - 1))
        inner = range(-(-before // block), (tokens - after) // block)  # blocks with a full band
        for number in range(-(-tokens // block)):
            if number not in inner:
                start, stop = number * block, min(tokens, (number + 1) * block)
                first_key = max(0, start - before)
                yield from self._edge(lane, start, stop - start, first_key, min(tokens, stop + after) - first_key)
        if inner:
            yield from self._inner(lane, inner, block, before, before + block + after)

    def extra(self) -> Iterator[Step]:
        """Every row with the extra keys beyond its band."""
        if self.extra_keys is None:
            return
        every = slice(None)
        for row in range(self.batch):
            columns = self.extra_keys[row].nonzero().squeeze(1)
            if not len(columns):
                continue
            batch = slice(row, row + 1)
            for rows in _slices(self.tokens, self.max_scores // (self.heads * len(columns))):
                step = Step(batch, slice(0, self.heads), every, rows.start, rows.stop - rows.start, columns=columns)
                queries = torch.arange(rows.start, rows.stop, device=self.device)[:, None]
                yield replace(step, bias=self._bias(step, queries, columns[None]))

    def _edge(self, lane: slice, start: int, queries: int, first_key: int, keys: int) -> Iterator[Step]:
        """One block for all batch rows."""
        for heads in _slices(self.heads, self.max_scores // (queries * keys)):
            for batch in _slices(self.batch, self.max_scores // (queries * keys * (heads.stop - heads.start))):
                step = Step(batch, heads, lane, start, queries, first_key, keys)
                yield self._with_bias(step)

    def _inner(self, lane: slice, inner: range, block: int, before: int, width: int) -> Iterator[Step]:
        """Many blocks of one batch row in a step. Where no key of a block is special, all blocks share one bias."""
        first_key = inner.start * block - before
        same = self._blocks_without_special_keys(lane, first_key, len(inner), block, width)
        for heads in _slices(self.heads, self.max_scores // (block * width)):
            shared = None
            tiles_per_step = self.max_scores // (block * width * (heads.stop - heads.start))
            for row in range(self.batch):
                for is_same, run in groupby(range(len(inner)), same[row].__getitem__):
                    run = list(run)
                    for tiles in _slices(len(run), tiles_per_step):
                        skipped = (run[0] + tiles.start) * block
                        step = Step(
                            slice(row, row + 1),
                            heads,
                            lane,
                            inner.start * block + skipped,
                            block,
                            first_key + skipped,
                            width,
                            tiles=tiles.stop - tiles.start,
                        )
                        if not is_same:
                            yield self._with_bias(step)
                            continue
                        if shared is None:
                            shared = self._with_bias(replace(step, tiles=1)).bias
                        yield replace(step, bias=shared)

    def _blocks_without_special_keys(
        self, lane: slice, first_key: int, blocks: int, block: int, width: int
    ) -> list[list[bool]]:
        if not self.pattern.shift_invariant():
            return [[False] * blocks] * self.batch
        if self.special is None:
            return [[True] * blocks] * self.batch
        keys = self.special[:, lane][:, first_key : first_key + (blocks - 1) * block + width]
        return (~keys.unfold(1, width, block).any(-1)).tolist()

    def _with_bias(self, step: Step) -> Step:
        first, stride = step.lane.start, step.lane.step
        shift = torch.arange(step.tiles, device=self.device)[:, None] * step.queries
        queries = torch.arange(step.queries, device=self.device) + step.first_query + shift
        keys = torch.arange(step.keys, device=self.device) + step.first_key + shift
        return replace(step, bias=self._bias(step, (first + stride * queries)[..., None], first + stride * keys))

    def _bias(self, step: Step, queries: Tensor, keys: Tensor) -> Tensor:
        """Log of the counts, [T, H, S, K]. queries: Long[T, S, 1] and keys: Long[T, K], positions among N."""
        batch = torch.arange(self.batch, device=self.device)[step.batch, None, None, None]
        heads = torch.arange(self.heads, device=self.device)[step.heads, None, None]
        queries, keys = queries[..., None, :, :], keys[:, None, None, :]
        count = self.pattern.count(batch, heads, queries, keys)
        if self.token_mask is not None:
            count = count * self.token_mask[batch, keys]
        if self.extra_keys is not None:  # those within reach belong to the band, the others to the extra steps
            offset = keys - queries
            near = (offset >= -self.before) & (offset <= self.after) & (offset % self.step == 0)
            count = count * (near if step.columns is None else ~near)
        if count.dtype != torch.bool:
            return count.to(self.wide).log()
        bias = torch.zeros(count.shape, dtype=self.wide, device=self.device)
        return bias.masked_fill_(~count, -torch.inf)


def _slices(total: int, size: int) -> Iterator[slice]:
    """Cut 0..total in slices of `size`, at least 1."""
    size = max(1, size)
    for start in range(0, total, size):
        yield slice(start, min(total, start + size))
