"""LongNet attention: each branch is dense attention within the kept tokens of a segment, read through strided views.

A row is in one step (or, where its segment is long, a part of one) for every branch that keeps it; merging those by
their softmax sums counts a key once per branch, as the pattern says. Cost grows with N * sum of length / stride ** 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longspan.attention.backends.steps import Step, slices, slower_than_dense
from longspan.attention.patterns import DilatedSegments, Pattern
from longspan.attention.request import Request

MIN_ROWS = 64  # query rows of a tile, where a segment is too long to be one tile


def unsupported(request: Request) -> str | None:
    if not isinstance(request.pattern, DilatedSegments):
        return f"it computes dilated_segments only, not {request.pattern.name}"
    if request.query_positions is not None:
        return "query_positions may put rows anywhere, so there are no segments"
    return None


def slower(request: Request) -> str | None:
    branches = request.pattern.branches if isinstance(request.pattern, DilatedSegments) else ()
    return slower_than_dense(request, sum(length // stride**2 for length, stride in branches))


def plan_segments(pattern: Pattern, q: Tensor, token_mask: Tensor | None, max_scores: int) -> Iterator[Step]:
    """The steps for q, k, v of one shape [B, H, N, D]. The same inputs give the same steps in the same order.

    max_scores: bound on T * H * S * K, except that a step holds at least one tile of one head and 64 rows.
    """
    assert isinstance(pattern, DilatedSegments)
    tokens = q.shape[2]
    for number, (length, stride) in enumerate(pattern.branches):
        length = min(length, tokens)
        for offset, heads in _heads_by_offset(pattern, q.shape[1], stride):
            group = _Group(q, token_mask, max_scores, heads, pattern.causal, merges=number > 0)
            segments = tokens // length
            if length % stride or segments == 1:
                segments = 0  # no common grid of kept tokens: one segment at a time
            else:
                lane = slice(offset, segments * length, stride)
                yield from group.steps(lane, length // stride, segments)
            for start in range(segments * length, tokens, length):
                lane = slice(start + offset, min(tokens, start + length), stride)
                yield from group.steps(lane, len(range(tokens)[lane]))


def _heads_by_offset(pattern: DilatedSegments, heads: int, stride: int) -> Iterator[tuple[int, range]]:
    """The heads that keep the same tokens; they are evenly spaced."""
    groups: dict[int, list[int]] = {}
    for head in range(heads):
        groups.setdefault(pattern.offset(head, stride), []).append(head)
    for offset, alike in groups.items():
        yield offset, range(alike[0], alike[-1] + 1, alike[1] - alike[0] if len(alike) > 1 else 1)


@dataclass(frozen=True)
class _Group:
    """Heads that keep the same tokens of a branch."""

    q: Tensor
    token_mask: Tensor | None
    max_scores: int
    heads: range
    causal: bool
    merges: bool

    def steps(self, lane: slice, kept: int, segments: int = 1) -> Iterator[Step]:
        """Dense attention within each of the segments, which hold `kept` tokens of the lane each."""
        for part in slices(kept, max(MIN_ROWS, self.max_scores // max(1, kept))):
            keys = part.stop if self.causal else kept
            scores = keys * (part.stop - part.start)
            for some in slices(len(self.heads), self.max_scores // scores):
                heads = self.heads[some]
                step = Step(
                    slice(0, self.q.shape[0]),
                    slice(heads.start, heads.stop, heads.step),
                    lane,
                    part.start,
                    part.stop - part.start,
                    0,
                    keys,
                    apart=kept,
                    merges=self.merges,
                )
                limit = self.max_scores // (scores * len(heads))
                if segments == 1:
                    for batch in slices(self.q.shape[0], limit):
                        yield from self._finish(replace(step, batch=batch))
                    continue
                for row in range(self.q.shape[0]):
                    for run in slices(segments, limit):
                        start = run.start * kept
                        yield from self._finish(
                            replace(
                                step,
                                batch=slice(row, row + 1),
                                first_query=part.start + start,
                                first_key=start,
                                tiles=run.stop - run.start,
                            )
                        )

    def _finish(self, step: Step) -> Iterator[Step]:
        if self.token_mask is None and not self.causal:
            yield step
            return
        indices = step.indices(self.q)
        _, _, queries, keys = indices
        count = keys <= queries if self.causal else torch.ones((), dtype=torch.bool, device=self.q.device)
        yield from step.with_counts(count, indices, self.token_mask)
