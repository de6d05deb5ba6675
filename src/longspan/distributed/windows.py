"""Attention to keys near by and to marked keys, where some of them lie on other ranks.

Shapes: B batch, H heads, n tokens of this rank, G marked tokens of a rank, D head width.

A rank receives the keys that its queries reach beyond its own, and the marked keys of all others; what it holds then
is a stretch of the sequence, with far marked keys before and behind it, and `attend` sees no difference. Queries that
reach no other rank's near keys are computed while those are on their way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from longspan.attention import GlobalKeys, Pattern, SlidingWindow, Union
from longspan.attention.patterns import parts_of
from longspan.distributed.shards import Exchange, SequenceShards

NOWHERE = -1  # the position of a row that only fills a gap
Compute = Callable[..., tuple[Tensor, Tensor]]  # longspan.attend, with lse


class _Keys(NamedTuple):
    """Keys in the order of the sequence, with their masks. at: the place of this rank's first token among them."""

    k: Tensor
    v: Tensor
    at: int
    mask: Tensor | None
    marked: Tensor | None


def attend_windows(
    compute: Compute,
    shards: SequenceShards,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    token_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of this rank's rows; compute: `longspan.attend` with what is the same for all parts."""
    tokens, marked = q.shape[2], _marked(pattern)
    before, after = _reach(pattern, shards.total)
    needed = [
        (max(0, start - before), min(shards.total, end + after))
        for start, end in zip(shards.starts, shards.ends, strict=True)
    ]
    far = None if marked is None else _send_marked(shards, k, v, marked, token_mask, pattern.looks_ahead())
    near = _send_ranges(shards, k, v, token_mask, marked, needed)
    own = here = _Keys(k, v, 0, token_mask, marked)
    if far is not None:
        here = far.around(own, (shards.start, shards.end))
    waits = _ranges_received(shards, needed)
    first = min(tokens, before) if any(low < high for low, high in waits[: shards.rank]) else 0
    last = max(first, tokens - (after if any(low < high for low, high in waits[shards.rank + 1 :]) else 0))
    if _is_dilated(pattern):
        first = last = 0  # all rows in one call, which takes one for every key
    inner = _attend_rows(compute, q, here, pattern, range(first, last))  # while the keys of others are on their way
    whole = near.around(own)
    if far is not None:
        whole = far.around(whole, needed[shards.rank])
    outer = _attend_rows(compute, q, whole, pattern, [*range(first), *range(last, tokens)])
    out, lse = (
        torch.cat([edge[:, :, :first], middle, edge[:, :, first:]], 2)
        for middle, edge in zip(inner, outer, strict=True)
    )
    out, lse = near.exchange.tie(out, lse)
    return (out, lse) if far is None else far.exchange.tie(out, lse)


def _attend_rows(
    compute: Compute, q: Tensor, keys: _Keys, pattern: Pattern, rows: range | list[int]
) -> tuple[Tensor, Tensor]:
    if not len(rows):
        empty = q[:, :, :0]
        return empty, empty[..., 0].to(torch.promote_types(q.dtype, torch.float32))
    index = torch.tensor(rows, device=q.device)
    if keys.marked is not None:
        pattern = _with_marks(pattern, keys.marked)
    at = index + keys.at
    if not _is_dilated(pattern):
        return compute(q[:, :, index], keys.k, keys.v, pattern, token_mask=keys.mask, query_positions=at)
    # Kernels count the steps of a dilation from the first row, and refuse rows that stand anywhere.
    every = q.new_zeros(*q.shape[:2], keys.k.shape[2], q.shape[3]).index_copy(2, at, q[:, :, index])
    out, lse = compute(every, keys.k, keys.v, pattern, token_mask=keys.mask)
    return out[:, :, at], lse[:, :, at]


class _Near(NamedTuple):
    """The keys that other ranks hold and this one's queries reach, on their way."""

    shards: SequenceShards
    exchange: Exchange
    flags: Exchange | None

    def around(self, own: _Keys) -> _Keys:
        """This rank's own keys between those that have come."""
        rank = self.shards.rank
        received = self.exchange.wait()
        received[rank] = [own.k, own.v]
        k, v = (torch.cat([parts[number] for parts in received], 2) for number in range(2))
        at = sum(parts[0].shape[2] for parts in received[:rank])
        mask, marked = own.mask, own.marked
        if self.flags is not None:
            bits = self.flags.wait()
            bits[rank] = [_bits(own.mask, own.marked)]
            flags = torch.cat([parts[0] for parts in bits], 1)
            mask = None if own.mask is None else (flags & 1) > 0
            marked = None if own.marked is None else (flags & 2) > 0
        return _Keys(k, v, at, mask, marked)


def _ranges_received(shards: SequenceShards, needed: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(first, end) of the tokens that come from each rank; not rising where there are none."""
    low, high = needed[shards.rank]
    return [
        (0, 0) if rank == shards.rank else (max(low, shards.starts[rank]), min(high, shards.ends[rank]))
        for rank in range(shards.size)
    ]


def _send_ranges(
    shards: SequenceShards,
    k: Tensor,
    v: Tensor,
    token_mask: Tensor | None,
    marked: Tensor | None,
    needed: list[tuple[int, int]],
) -> _Near:
    batch, heads, tokens, width = k.shape
    slices = []
    for rank, (low, high) in enumerate(needed):
        first, end = max(0, low - shards.start), min(tokens, high - shards.start)
        slices.append(slice(0, 0) if rank == shards.rank or end <= first else slice(first, end))
    comes = [max(0, high - low) for low, high in _ranges_received(shards, needed)]
    exchange = shards.exchange(
        [[k[:, :, part], v[:, :, part]] for part in slices], [2 * [(batch, heads, count, width)] for count in comes]
    )
    flags = None
    if token_mask is not None or marked is not None:
        bits = _bits(token_mask, marked)
        flags = shards.exchange([[bits[:, part]] for part in slices], [[(batch, count)] for count in comes])
    return _Near(shards, exchange, flags)


def _bits(token_mask: Tensor | None, marked: Tensor | None) -> Tensor:
    """Both masks [B, n] in one of bytes."""
    flags = [mask.to(torch.uint8) << bit for bit, mask in enumerate((token_mask, marked)) if mask is not None]
    return sum(flags[1:], flags[0])


class _Far(NamedTuple):
    """The marked keys of all other ranks, which are few. positions: Long[B, G] in the sequence, or NOWHERE."""

    shards: SequenceShards
    exchange: Exchange
    k: list[Tensor]
    v: list[Tensor]
    positions: list[Tensor]

    def around(self, keys: _Keys, near: tuple[int, int]) -> _Keys:
        """The keys with those around them that are not already there, in `near`, the range that this rank receives.
        They stand farther from every query than a window reaches."""
        rank = self.shards.rank
        sides = (slice(None, rank), slice(rank + 1, None))
        kept = [(position != NOWHERE) & ((position < near[0]) | (position >= near[1])) for position in self.positions]
        before, behind = (torch.cat(kept[side], 1) if kept[side] else None for side in sides)
        mask = torch.ones_like(keys.marked) if keys.mask is None else keys.mask  # type: ignore[arg-type]

        def join(parts: list[Tensor], own: Tensor) -> Tensor:
            return torch.cat([*parts[sides[0]], own, *parts[sides[1]]], 2)

        def join_masks(own: Tensor | None) -> Tensor:
            return torch.cat([part for part in (before, own, behind) if part is not None], 1)

        at = keys.at + (0 if before is None else before.shape[1])
        return _Keys(join(self.k, keys.k), join(self.v, keys.v), at, join_masks(mask), join_masks(keys.marked))


def _send_marked(
    shards: SequenceShards, k: Tensor, v: Tensor, marked: Tensor, token_mask: Tensor | None, ahead: bool
) -> _Far:
    """ahead: whether queries see marked keys that follow them; else they go to later ranks only."""
    batch, heads, _, width = k.shape
    shown = marked if token_mask is None else marked & token_mask
    counts = shards.gather(int(shown.sum(1).max()))
    index = torch.argsort(~shown, dim=1, stable=True)[:, : counts[shards.rank]]
    positions = torch.where(shown.gather(1, index), index + shards.start, NOWHERE)
    rows = index[:, None, :, None].expand(batch, heads, -1, width)
    both = [k.gather(2, rows), v.gather(2, rows)]
    goes = [rank > shards.rank or (ahead and rank < shards.rank) for rank in range(shards.size)]
    comes = [count if rank < shards.rank or (ahead and rank > shards.rank) else 0 for rank, count in enumerate(counts)]
    exchange = shards.exchange(
        [both if goes[rank] else [part[:, :, :0] for part in both] for rank in range(shards.size)],
        [2 * [(batch, heads, count, width)] for count in comes],
    )
    told = shards.exchange(
        [[positions if goes[rank] else positions[:, :0]] for rank in range(shards.size)],
        [[(batch, count)] for count in comes],
    )
    found = exchange.wait()
    positions = [parts[0] for parts in told.wait()]
    return _Far(shards, exchange, [parts[0] for parts in found], [parts[1] for parts in found], positions)


def _marked(pattern: Pattern) -> Tensor | None:
    """Bool[B, n] of the pattern's GlobalKeys, of which there is one at most."""
    return next((part.marked for part in parts_of(pattern) if isinstance(part, GlobalKeys)), None)


def _with_marks(pattern: Pattern, marked: Tensor) -> Pattern:
    parts = [GlobalKeys(marked, part.causal) if isinstance(part, GlobalKeys) else part for part in parts_of(pattern)]
    return Union(tuple(parts)) if len(parts) > 1 else parts[0]


def _is_dilated(pattern: Pattern) -> bool:
    return any(isinstance(part, SlidingWindow) and part.dilation != 1 for part in parts_of(pattern))


def _reach(pattern: Pattern, total: int) -> tuple[int, int]:
    """How many tokens a query looks back and ahead, marked keys apart."""
    reach = pattern.reach()
    if reach is not None:
        return min(reach.before, total), min(reach.after, total)
    return total, total if pattern.looks_ahead() else 0
