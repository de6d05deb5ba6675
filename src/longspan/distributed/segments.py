"""LongNet's dilated segments (arXiv 2307.02486, section 3) where some of them lie on several ranks.

Shapes: B batch, H heads, n tokens of this rank, J tokens that a head keeps, D head width.

Segments within a rank cost nothing. Of one that lies on several, they exchange what its branch keeps, so that bytes do
not grow with its length where length / stride does not. A head's kept tokens are then a short sequence of their own
with full attention, and the branches are added up by their softmax sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longspan.attention import DilatedSegments, Full
from longspan.distributed.shards import Exchange, SequenceShards
from longspan.distributed.windows import Compute


def attend_segments(
    compute: Compute,
    shards: SequenceShards,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilatedSegments,
    token_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of this rank's rows; compute: `longspan.attend` with what is the same for all parts.

    Each branch by itself where its segments lie on several ranks; all others in one call.
    """
    pieces = _shared_pieces(shards, pattern)
    exchange, masks = _send_kept(shards, k, v, pieces, token_mask, pattern.causal)
    within, total = [], None
    for number, branch in enumerate(pattern.branches):
        cut = [piece for piece in pieces if piece.branch == number and piece.touches(shards.rank)]
        first = max((piece.end for piece in cut if piece.first <= shards.start), default=shards.start)
        end = min((piece.first for piece in cut if piece.end >= shards.end), default=shards.end)
        if not cut:
            within.append(branch)
        elif first < end:
            rows = slice(first - shards.start, end - shards.start)
            mask = None if token_mask is None else token_mask[:, rows]
            own = _branches(pattern, (branch,))
            found = compute(q[:, :, rows], k[:, :, rows], v[:, :, rows], own, token_mask=mask)
            total = _merge(total, _spread(found, torch.arange(q.shape[2], device=q.device)[rows], q))
    if within:
        total = _merge(total, compute(q, k, v, _branches(pattern, tuple(within)), token_mask=token_mask))
    received = exchange.wait()
    shown = None if masks is None else masks.wait()
    for place, piece in enumerate(piece for piece in pieces if piece.touches(shards.rank)):
        own_index, own_valid = (part.to(q.device) for part in piece.kept(shards.rank))
        if not own_index.numel():
            continue  # nobody here asks
        keys, values, kept, own_first = [], [], [], 0
        for rank in piece.ranks:
            if pattern.causal and rank > shards.rank:
                continue
            index, valid = (part.to(q.device) for part in piece.kept(rank))
            if rank == shards.rank:
                own_first = sum(part.shape[2] for part in keys)
                keys.append(_take(k, index))
                values.append(_take(v, index))
                known = None if token_mask is None else token_mask[:, index]
            else:
                keys.append(received[rank][2 * place])
                values.append(received[rank][2 * place + 1])
                known = None if shown is None else shown[rank][place] > 0
            kept.append(valid.expand(q.shape[0], -1, -1) if known is None else valid & known)
        # A head of a row becomes a row of its own, with a mask of its own.
        rows, own_keys, own_values = (
            part.flatten(0, 1)[:, None] for part in (_take(q, own_index), torch.cat(keys, 2), torch.cat(values, 2))
        )
        at = own_first + torch.arange(own_index.shape[1], device=q.device)
        mask = torch.cat(kept, 2).flatten(0, 1)
        found = compute(rows, own_keys, own_values, Full(pattern.causal), token_mask=mask, query_positions=at)
        out, lse = (part.squeeze(1).unflatten(0, q.shape[:2]) for part in found)
        total = _merge(total, _spread((out, lse), torch.where(own_valid, own_index, q.shape[2]), q))
    if total is None:  # no branch keeps a token of this rank
        wide = torch.promote_types(q.dtype, torch.float32)
        total = _merge(None, (torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=wide)))
    return exchange.tie(total[0].to(q.dtype), total[1])


class _Piece(NamedTuple):
    """A segment of a branch that lies on several ranks: the tokens from `first` to before `end`."""

    branch: int
    stride: int
    first: int
    end: int
    ranks: tuple[int, ...]
    offsets: tuple[int, ...]  # the first token that each head keeps, from `first` on
    shards: SequenceShards

    def touches(self, rank: int) -> bool:
        return rank in self.ranks

    def kept(self, rank: int) -> tuple[Tensor, Tensor]:
        """Which of a rank's tokens each head keeps, Long[H, J], and which of these are real, Bool[H, J]."""
        start = self.shards.starts[rank]
        low, high = max(start, self.first), min(self.shards.ends[rank], self.end)
        offsets = torch.tensor(self.offsets)
        skipped = (low - self.first - offsets).clamp(min=0) + self.stride - 1
        firsts = self.first + offsets + skipped // self.stride * self.stride
        count = int(((high - firsts + self.stride - 1) // self.stride).clamp(min=0).max())
        positions = firsts[:, None] + self.stride * torch.arange(count)
        valid = positions < high
        return positions.clamp(max=high - 1) - start, valid


def _shared_pieces(shards: SequenceShards, pattern: DilatedSegments) -> list[_Piece]:
    """The same on all ranks, in the same order."""
    pieces = []
    for number, (length, stride) in enumerate(pattern.branches):
        heads = range(*(pattern.part or (0, pattern.heads)))
        offsets = tuple(pattern.offset(head - heads.start, stride) for head in heads)
        firsts = {start // length * length for start in shards.starts[1:] if start % length}
        for first in sorted(firsts):
            end = min(first + length, shards.total)
            ranks = tuple(
                rank for rank in range(shards.size) if shards.starts[rank] < end and shards.ends[rank] > first
            )
            pieces.append(_Piece(number, stride, first, end, ranks, offsets, shards))
    return pieces


def _send_kept(
    shards: SequenceShards, k: Tensor, v: Tensor, pieces: list[_Piece], token_mask: Tensor | None, causal: bool
) -> tuple[Exchange, Exchange | None]:
    """What the branches keep of the pieces that this rank shares with others; causal: to later ranks only."""
    batch, heads, _, width = k.shape
    rank, nothing = shards.rank, k[:, :, :0]
    own = [piece for piece in pieces if piece.touches(rank)]
    indices = [piece.kept(rank)[0].to(k.device) for piece in own]

    def passes(piece: _Piece, source: int, to: int) -> bool:
        return source != to and piece.touches(source) and piece.touches(to) and not (causal and to < source)

    goes = [[n for n, piece in enumerate(own) if passes(piece, rank, other)] for other in range(shards.size)]
    comes = [
        [piece.kept(other)[0].shape[1] if passes(piece, other, rank) else 0 for piece in own]
        for other in range(shards.size)
    ]
    both = [[_take(k, index), _take(v, index)] for index in indices]
    exchange = shards.exchange(
        [[nothing, *(part for n in numbers for part in both[n])] for numbers in goes],
        [[(batch, heads, count, width) for count in counts for _ in range(2)] for counts in comes],
    )
    if token_mask is None:
        return exchange, None
    bits = [token_mask[:, index].to(torch.uint8) for index in indices]
    none = token_mask[:, :0].to(torch.uint8)
    masks = shards.exchange(
        [[none, *(bits[n] for n in numbers)] for numbers in goes],
        [[(batch, heads, count) for count in counts] for counts in comes],
    )
    return exchange, masks


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """[B, H, J, D] of rows [B, H, n, D] for an index Long[H, J]."""
    batch, heads, _, width = rows.shape
    return rows.gather(2, index[None, :, :, None].expand(batch, heads, -1, width))


def _spread(found: tuple[Tensor, Tensor], index: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of some rows as those of all n, where the others see nothing.

    index: Long[J] or Long[H, J]; n for rows that are left out.
    """
    out, lse = found
    batch, heads, tokens, width = q.shape
    index = index.expand(batch, heads, -1)
    rows = out.new_zeros(batch, heads, tokens + 1, width).scatter(2, index[..., None].expand(*index.shape, width), out)
    sums = lse.new_full((batch, heads, tokens + 1), -torch.inf).scatter(2, index, lse)
    return rows[:, :, :tokens], sums[:, :, :tokens]


def _merge(total: tuple[Tensor, Tensor] | None, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(out, lse) over the keys of both: each by its share of the softmax sum."""
    wide = found[0].to(torch.promote_types(found[0].dtype, torch.float32)), found[1]
    if total is None:
        return wide
    top = torch.maximum(total[1], found[1]).detach()
    top = torch.where(top == -torch.inf, 0.0, top)
    shares = [torch.exp(lse - top) for lse in (total[1], found[1])]
    whole = shares[0] + shares[1]
    sees_none = whole == 0
    whole = whole.masked_fill(sees_none, 1)
    out = (shares[0] / whole)[..., None] * total[0] + (shares[1] / whole)[..., None] * wide[0]
    return out, (whole.log() + top).masked_fill(sees_none, -torch.inf)


def _branches(pattern: DilatedSegments, branches: tuple[tuple[int, int], ...]) -> DilatedSegments:
    return DilatedSegments(branches, pattern.heads, pattern.causal, pattern.offsets, pattern.part)
