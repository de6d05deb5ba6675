"""A padded batch as rows without padding: sequence after sequence, T rows in all.

Shapes: B batch, N tokens, C model width, H heads, D head width, T rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from longspan import kernels
from longspan.attention import Full, GlobalKeys, Pattern, SlidingWindow, attend
from longspan.attention.backends.packed_sequences import Sequences, packed_attention


class Ragged:
    """Where the tokens of a padded batch stand among the rows.

    Each sequence reaches from its first token to its last, or from place 0 where a pattern asks where a token stands
    and not only how far from another. What padding there is in between keeps its row, and `seen` is False there.

    offsets: where each sequence begins, and T. seen, marked: Bool[T], tokens and global tokens; None: all, none.
    """

    def __init__(
        self, x: Tensor, token_mask: Tensor | None, global_mask: Tensor | None, *, from_place_zero: bool = False
    ):
        batch, tokens = x.shape[:2]
        self.shape, self.seen = x.shape, None
        self.index: Tensor | None = None  # Long[T] among the B*N places; None: all of them
        self.offsets = list(range(0, batch * tokens + 1, tokens)) if tokens else [0] * (batch + 1)
        if token_mask is not None and not bool(token_mask.all()):
            place = torch.arange(tokens)
            first = place.new_zeros(batch) if from_place_zero else token_mask.int().argmax(1)
            end = torch.where(token_mask, place + 1, 0).amax(1)
            kept = (place >= first[:, None]) & (place < end[:, None])
            self.index = kept.flatten().nonzero()[:, 0]
            self.offsets = [0, *kept.sum(1).cumsum(0).tolist()]
            seen = token_mask.flatten()[self.index]
            self.seen = None if bool(seen.all()) else seen
        self.marked = None
        if global_mask is not None:
            marked = global_mask if token_mask is None else global_mask & token_mask
            marked = self._rows_of(marked[..., None])[:, 0]
            self.marked = marked.contiguous() if bool(marked.any()) else None
        self._sequences: dict[bool, Sequences] = {}

    @property
    def tokens(self) -> int:
        return self.offsets[-1]

    def first_tokens(self) -> tuple[list[int], list[int]]:
        """(which sequences have a token, the row of the first one of each)."""
        found = [(number, start) for number, (start, end) in enumerate(pairwise(self.offsets)) if start < end]
        if self.seen is not None:
            found = [(number, start + int(self.seen[start:].int().argmax())) for number, start in found]
        return [number for number, _ in found], [row for _, row in found]

    def _rows_of(self, x: Tensor) -> Tensor:
        """x [B or 1, N, C] -> its rows [T, C]."""
        x = x.expand(self.shape[0], -1, -1)
        return x.flatten(0, 1) if self.index is None else x.flatten(0, 1)[self.index]

    def take(self, x: Tensor, out: Tensor) -> None:
        """The rows of x [B, N, C] in out [T, C]; padding that keeps its row is 0, whatever stands there."""
        out.copy_(self._rows_of(x))
        if self.seen is not None:
            out.masked_fill_(~self.seen[:, None], 0)

    def put(self, rows: Tensor, out: Tensor) -> None:
        """The inverse of `take`: out [B, N, C] must hold zeros."""
        if self.seen is not None:
            rows = rows.masked_fill(~self.seen[:, None], 0)
        if self.index is None:
            out.copy_(rows.view(self.shape))
        else:
            out.view(-1, out.shape[2])[self.index] = rows.to(out.dtype)

    def positions(self, position_ids: Tensor | None) -> Tensor:
        """Long[T]: position_ids [B or 1, N], or the places that the rows had in the batch."""
        if position_ids is None:
            position_ids = torch.arange(self.shape[1])[None]
        return self._rows_of(position_ids[..., None])[:, 0]

    def sequences(self) -> Iterator[tuple[int, int, Tensor | None, Tensor | None]]:
        """(first row, end, seen Bool[1, n] or None, marked Long[g] or None) of each sequence that is not empty."""
        for start, end in pairwise(self.offsets):
            if start < end:
                seen = None if self.seen is None else self.seen[None, start:end]
                marked = None if self.marked is None else self.marked[start:end].nonzero()[:, 0]
                yield start, end, seen, marked if marked is not None and len(marked) else None

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, backend: str, out: Tensor, *, first_only: bool
    ) -> Callable[[], None]:
        """Attention within each sequence, global tokens seen by all of it: from q, k and v to out, [T, H, D] each, at
        every call. first_only: no more is asked for than what each sequence's first token reads."""
        has_globals = self.marked is not None and pattern != Full()
        if backend == "auto" and self.seen is None and kernels.library() is not None:
            if has_globals not in self._sequences:
                self._sequences[has_globals] = Sequences(self.offsets, self.marked if has_globals else None)
            try:
                queries = 1 if first_only else None
                return packed_attention(q, k, v, self._sequences[has_globals], pattern, out=out, queries=queries)
            except NotImplementedError:  # a pattern that the kernels do not know
                pass

        def one_by_one() -> None:
            for start, end, seen, marked in self.sequences():
                seeing = pattern
                if has_globals and marked is not None:
                    assert self.marked is not None
                    seeing = pattern | GlobalKeys(self.marked[None, start:end])
                one_q, one_k, one_v = (rows[start:end].transpose(0, 1)[None] for rows in (q, k, v))  # [1, H, n, D]
                read = attend(one_q, one_k, one_v, seeing, token_mask=seen, backend=backend)
                out[start:end] = read[0].transpose(0, 1)

        return one_by_one


def depends_on_distance_only(pattern: Pattern) -> bool:
    """Whether it is all the same to a pattern where a sequence begins."""
    return isinstance(pattern, (Full, SlidingWindow))
