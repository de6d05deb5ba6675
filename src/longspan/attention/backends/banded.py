"""Attention within a band: a block of queries meets only the keys within reach, and the extra keys.

Every query row is in exactly one step of the band and, where there are extra keys, in one more that holds the extra
keys beyond its reach: a key that is both near and extra is met once. Any number of tokens, nothing is padded or copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from longspan.attention.backends.steps import Step, slices, slower_than_dense
from longspan.attention.patterns import Pattern
from longspan.attention.request import Request

MIN_BLOCK, MAX_BLOCK = 64, 256  # query rows of a tile: near the reach, so that few of its scores lie outside the band
KEYS_MULTIPLE = 32  # torch's fused kernel for CPU takes up to twice the time for other numbers of keys
EXTRA_ROWS = 512  # query rows that meet the extra keys in one step
_OWN_BIAS, _SHARED_BIAS, _PADDING = 0, 1, 2  # kinds of blocks


def unsupported(request: Request) -> str | None:
    if request.pattern.reach() is None:
        return f"{request.pattern.name} sees keys at any distance, so there is no band"
    if request.query_positions is not None:
        return "query_positions may put rows anywhere, so there is no band"
    return None


def slower(request: Request) -> str | None:
    before, after, step = request.pattern.reach() or (0, 0, 0)
    return slower_than_dense(request, (before + after) // max(step, 1) + 1)


def plan_band(pattern: Pattern, q: Tensor, token_mask: Tensor | None, max_scores: int) -> Iterator[Step]:
    """The steps for q, k, v of one shape [B, H, N, D]. The same inputs give the same steps in the same order.

    max_scores: bound on T * H * S * K, except that a step holds at least one tile of one head.
    """
    plan = _BandPlan(pattern, q, token_mask, max_scores)
    for first in range(plan.stride):
        yield from plan.lane(slice(first, None, plan.stride))
    yield from plan.extra()


class _BandPlan:
    def __init__(self, pattern: Pattern, q: Tensor, token_mask: Tensor | None, max_scores: int):
        reach = pattern.reach()
        assert reach is not None
        self.pattern, self.q, self.token_mask, self.max_scores = pattern, q, token_mask, max_scores
        self.batch, self.heads, self.tokens, _ = q.shape
        self.before, self.after = min(reach.before, self.tokens), min(reach.after, self.tokens)
        self.stride = min(max(reach.step, 1), self.tokens)
        self.extra_keys = pattern.extra_keys()
        if self.extra_keys is not None and token_mask is not None:
            self.extra_keys = self.extra_keys & token_mask

    def lane(self, lane: slice) -> Iterator[Step]:
        """The band over every `stride`-th token. Lengths and positions in here count tokens of the lane."""
        tokens = len(range(self.tokens)[lane])
        before, after = self.before // self.stride, self.after // self.stride
        before += -(before + after) % KEYS_MULTIPLE
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
        """All rows with the extra keys beyond their reach."""
        if self.extra_keys is None:
            return
        heads, lane = slice(0, self.heads), slice(0, None, 1)
        for row in range(self.batch):
            columns = self.extra_keys[row].nonzero().squeeze(1)
            number = len(columns)
            if not number:
                continue
            filled = torch.arange(number + -number % KEYS_MULTIPLE, device=columns.device)
            columns = columns[filled.clamp(max=number - 1)]
            for rows in slices(self.tokens, min(EXTRA_ROWS, self.max_scores // (self.heads * len(columns)))):
                batch, queries = slice(row, row + 1), rows.stop - rows.start
                step = Step(batch, heads, lane, rows.start, queries, 0, number, columns=columns, merges=True)
                yield from self._finish(step)

    def _edge(self, lane: slice, start: int, queries: int, first_key: int, keys: int) -> Iterator[Step]:
        """One block, of all batch rows at once."""
        for heads in slices(self.heads, self.max_scores // (queries * keys)):
            for batch in slices(self.batch, self.max_scores // (queries * keys * (heads.stop - heads.start))):
                yield from self._finish(Step(batch, heads, lane, start, queries, first_key, keys))

    def _inner(self, lane: slice, inner: range, block: int, before: int, width: int) -> Iterator[Step]:
        """Many blocks of one batch row in a step. Blocks that look alike, as most do, share one bias."""
        kinds = self._kinds(lane, inner, block, before, width)
        for heads in slices(self.heads, self.max_scores // (block * width)):
            tiles_per_step = self.max_scores // (block * width * (heads.stop - heads.start))
            shared = None
            for row in range(self.batch):
                for kind, run in groupby(inner, lambda number, row=row: kinds[row][number - inner.start]):
                    numbers = list(run)
                    for part in slices(len(numbers), tiles_per_step) if kind != _PADDING else ():
                        start, tiles = numbers[part.start] * block, part.stop - part.start
                        step = Step(slice(row, row + 1), heads, lane, start, block, start - before, width, tiles, block)
                        if kind == _OWN_BIAS:
                            yield from self._finish(step)
                            continue
                        if shared is None:
                            shared = next(self._finish(replace(step, tiles=1))).bias
                        yield replace(step, bias=shared)

    def _kinds(self, lane: slice, inner: range, block: int, before: int, width: int) -> list[list[int]]:
        """The kind of each inner block, for each batch row."""
        kinds = torch.full((self.batch, len(inner)), _SHARED_BIAS if self.pattern.shift_invariant() else _OWN_BIAS)
        for special in (self.extra_keys, None if self.token_mask is None else ~self.token_mask):
            if special is not None:
                keys = special[:, lane][:, inner.start * block - before : (inner.stop - 1) * block - before + width]
                kinds[keys.unfold(1, width, block).any(-1).cpu()] = _OWN_BIAS
        if self.token_mask is not None:
            queries = self.token_mask[:, lane][:, inner.start * block : inner.stop * block]
            kinds[~queries.unfold(1, block, block).any(-1).cpu()] = _PADDING
        return kinds.tolist()

    def _finish(self, step: Step) -> Iterator[Step]:
        indices = step.indices(self.q)
        count = self.pattern.count(*indices)
        if self.extra_keys is not None:  # those within reach belong to the band, the others to the extra steps
            offset = indices[3] - indices[2]
            near = (offset >= -self.before) & (offset <= self.after)
            if self.stride > 1:
                near = near & (offset % self.stride == 0)
            count = count * (near if step.columns is None else ~near)
        if step.columns is not None:
            count = count * (torch.arange(len(step.columns), device=count.device) < step.keys)
        yield from step.with_counts(count, indices, self.token_mask)
