"""The keys and values of earlier tokens that later ones can still see, for decoding step by step.

A layer keeps each head's own tokens, with their positions, and asks the pattern which of them are of use. What is
kept too long costs memory and changes nothing: the pattern's count hides it.

Shapes: B batch, H heads, M new tokens, K kept and new ones, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from longspan.attention import DilatedSegments, DistanceBias, Pattern, attend
from longspan.attention.positions import Rotary

_MAX_SCORES = 1 << 24  # of one call of `attend_cached`'s, which forms them


@dataclass(frozen=True, eq=False)
class Remembered(Pattern):
    """A pattern over keys that stand elsewhere than their row numbers say.

    positions: Long[B, H or 1, K] where the keys stand, -1 for nowhere. bias: by distance, enters as a factor of the
    count, which is what a number that is added to a score is.
    """

    seen: Pattern
    positions: Tensor
    bias: DistanceBias | None = None
    name: ClassVar[str] = "remembered"

    def count(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        table = head if self.positions.shape[1] > 1 else torch.zeros_like(head)
        query, key = self.positions[batch, table, query], self.positions[batch, table, key]
        count = self.seen.count(batch, head, query, key) * (key >= 0) * (query >= 0)
        return count if self.bias is None else count * self.bias.at(head, query, key).exp()

    @property
    def repeats(self) -> bool:  # type: ignore[override]
        return self.seen.repeats or self.bias is not None


def attend_cached(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    pattern: Pattern,
    *,
    scale: float,
    dropout: float = 0.0,
    bias: DistanceBias | None = None,
) -> Tensor:
    """What the last M of K tokens read, [B, H, M, D]. q: [B, H, M, D]; the rest is what `CacheLayer.update` gives."""
    batch, heads, queries, _ = q.shape
    kept = keys.shape[2]
    remembered = Remembered(pattern, positions, bias)
    rows = torch.arange(kept - queries, kept, device=q.device)
    step = max(1, _MAX_SCORES // (batch * heads * kept))
    parts = [
        attend(some, keys, values, remembered, query_positions=where, scale=scale, dropout=dropout)
        for some, where in zip(q.split(step, 2), rows.split(step), strict=True)
    ]
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


def still_seen(pattern: Pattern, batch: Tensor, head: Tensor, key: Tensor, end: Tensor) -> Tensor:
    """Whether a query at `end` or after it may see the key that stands before. The indices broadcast."""
    if isinstance(pattern, DilatedSegments):
        seen = torch.zeros((), dtype=torch.bool, device=key.device)
        for length, stride in pattern.branches:
            kept = replace(pattern, branches=((length, stride),)).count(batch, head, key, key)
            same_segment = replace(pattern, branches=((length, 1),)).count(batch, head, end, key)
            seen = seen | (kept.bool() & same_segment.bool())
        return seen
    reach = pattern.reach()
    return (key >= 0) & (end >= 0) if reach is None else key >= end - reach.before


class CacheLayer(CacheLayerMixin):
    """Keys and values [B, H, capacity, D] of one layer. The first `filled` of them are in use."""

    is_croppable = False

    def __init__(self, pattern: Pattern):
        super().__init__()
        self.pattern = pattern
        self.reset()

    def reset(self) -> None:
        self.keys = self.values = self.positions = None
        self.is_initialized, self.filled = False, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (rows[:, :, :0].detach() for rows in (key_states, value_states))
        slots = key_states.shape[1] if isinstance(self.pattern, DilatedSegments) else 1  # heads that keep alike
        self.positions = torch.empty(len(key_states), slots, 0, dtype=torch.long, device=key_states.device)
        self.is_initialized = True

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, positions: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [B, H, K, D] with their positions [B, H or 1, K]; those of the M new tokens come last.

        positions: Long[B, M], -1 at padding. Gradients reach the new tokens only.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None and self.positions is not None
        new = key_states.shape[2]
        stop = self.filled + new
        wants_grad = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        held = (self.keys, self.values, self.positions)
        added = (key_states, value_states, positions[:, None].expand(-1, self.positions.shape[1], -1))
        if stop <= self.keys.shape[2] and not wants_grad:
            for rows, some in zip(held, added, strict=True):
                rows[:, :, self.filled : stop] = some
            self.filled = stop
            return self.keys[:, :, :stop], self.values[:, :, :stop], self.positions[:, :, :stop]
        keys, values, where = (
            some if not self.filled else torch.cat((rows[:, :, : self.filled], some), 2)
            for rows, some in zip(held, added, strict=True)
        )
        self._keep(keys.detach(), values.detach(), where)
        return keys, values, where

    def _keep(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Of these, what later tokens may see, and room for a quarter as many new ones."""
        batch, slots, _ = positions.shape
        device = positions.device
        useful = positions >= 0
        useful &= still_seen(
            self.pattern,
            torch.arange(batch, device=device).view(-1, 1, 1),
            torch.arange(slots, device=device).view(1, -1, 1),
            positions,
            positions.amax((1, 2), keepdim=True) + 1,
        )
        self.filled = int(useful.sum(-1).max())
        order = useful.logical_not().sort(dim=-1, stable=True).indices[..., : self.filled]
        capacity = self.filled + max(64, self.filled // 4)
        self.positions = torch.full((batch, slots, capacity), -1, device=device)
        self.positions[:, :, : self.filled] = positions.where(useful, -1).gather(2, order)
        self.keys, self.values = (_gathered(rows, order, capacity) for rows in (keys, values))

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the batch rows of all that is kept."""
        if self.is_initialized:
            assert self.keys is not None and self.values is not None and self.positions is not None
            self.keys, self.values, self.positions = (change(rows) for rows in (self.keys, self.values, self.positions))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.filled + query_length, 0

    def get_seq_length(self) -> int:
        return self.filled

    def get_max_length(self) -> int:
        return -1


class DecoderCache(Cache):
    """What a `Decoder` remembers of the tokens so far: per layer and head, those that later ones can still see.

    patterns: the layers', from bottom to top. The size is bounded where the patterns' reach is. It cannot go back to
    an earlier state, because what it forgot is gone; and what it holds carries no gradients.
    """

    def __init__(self, patterns: Sequence[Pattern]):
        super().__init__(layers=[CacheLayer(pattern) for pattern in patterns])
        self.patterns = tuple(patterns)
        self.reset()

    def reset(self) -> None:
        super().reset()
        self.tokens = 0  # columns so far, padding included
        self.origin = 0  # of the positions' decay
        self.rows: Tensor | None = None  # Long[B]: tokens so far

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns so far, padding included; more than are kept."""
        return self.tokens

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, positions: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `CacheLayer.update` of a layer gives."""
        layer = self.layers[layer_idx]
        assert isinstance(layer, CacheLayer)
        return layer.update(key_states, value_states, positions)

    def positions_of(self, batch: int, tokens: int, token_mask: Tensor | None, device: torch.device) -> Tensor:
        """Long[B, M]: where the next tokens stand, -1 at padding. token_mask: Bool[B, M]."""
        if self.rows is None:
            self.rows = torch.zeros(batch, dtype=torch.long, device=device)
        if len(self.rows) != batch:
            raise ValueError(f"past_key_values holds {len(self.rows)} rows of a batch, but {batch} came; give as many")
        if token_mask is None:
            positions = self.rows[:, None] + torch.arange(tokens, device=device)
            self.rows = self.rows + tokens
            return positions
        counted = self.rows[:, None] + token_mask.cumsum(1)
        self.rows = counted[:, -1]
        return (counted - 1).where(token_mask, -1)

    def place_origin(self, tokens: int, rotary: Rotary) -> int:
        """The position whose decay is 1 for these next tokens. Kept keys follow it when it moves."""
        middle = rotary.middle(tokens)
        if not self.tokens:
            self.origin = middle
        elif self.tokens + tokens - self.origin > max(rotary.span / 2, tokens):
            origin = self.tokens + middle
            for layer in self.layers:
                assert isinstance(layer, CacheLayer) and layer.keys is not None
                layer.keys *= rotary.moved(origin - self.origin, layer.keys.device).to(layer.keys.dtype)
            self.origin = origin
        return self.origin

    def crop(self, tokens_to_remove: int) -> None:
        """Raises NotImplementedError unless there is nothing to remove."""
        if tokens_to_remove:
            raise NotImplementedError(
                "a bounded cache has forgotten what it would need to go back; generate without an assistant model or "
                "prompt lookup"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The rows of the batch in another order, for beam search."""
        self._each(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda rows: rows.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda rows: rows[indices])

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.rows = None if self.rows is None else change(self.rows)
        for layer in self.layers:
            assert isinstance(layer, CacheLayer)
            layer.each(change)


def _gathered(rows: Tensor, order: Tensor, capacity: int) -> Tensor:
    """rows [B, H, K, D] at order [B, H or 1, kept], with zeros after them up to `capacity`."""
    batch, heads, _, width = rows.shape
    kept = order.shape[2]
    result = rows.new_zeros(batch, heads, capacity, width)
    result[:, :, :kept] = rows.gather(2, order[..., None].expand(-1, heads, -1, width))
    return result
