"""What a rank's rows of sharded attention read, send and keep, in closed form: it takes no longer for more tokens.

The exchanges are those of `longspan.distributed`: windows.py, segments.py and global_rows.py. All tokens are tokens, so
no masks are sent but those beside global keys; these stand at the beginning of the sequence.

Shapes: H heads, n tokens of a rank, R ranks, D head width, G global tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from longspan.attention import DilatedSegments, Full, Pattern, SlidingWindow


@dataclass(frozen=True)
class Ranks:
    """`tokens` in contiguous shards on `count` ranks, which differ by one token at most."""

    tokens: int
    count: int

    def start(self, rank: int) -> int:
        return rank * self.tokens // self.count

    def holder(self, token: int) -> int:
        """The rank that holds a token."""
        return ((token + 1) * self.count - 1) // self.tokens


class Load(NamedTuple):
    """One rank's part of one attention layer.

    pairs: of a query and a key that it reads, added up over heads. A key that two branches keep is read twice.
    sent, received: bytes of the forward pass. returned: bytes that this rank sends in the backward pass.
    rows: for the backward pass, rows of one head's numbers in the dtype of q: copies beside q, k and v themselves.
    wide_rows: the same in float32. other: further bytes for it.
    held: which of q, k and v the backward pass needs themselves: all 3, 2 where q was copied in parts, or 0.
    """

    pairs: int
    sent: int = 0
    received: int = 0
    returned: int = 0
    rows: int = 0
    wide_rows: int = 0
    other: int = 0
    held: int = 3


class Heads(NamedTuple):
    """Of q, k and v: how many heads, numbers of each, and bytes of a number."""

    count: int
    width: int
    size: int


def load_of(pattern: Pattern, ranks: Ranks, rank: int, heads: Heads, global_tokens: int = 0) -> Load:
    """What the rank does for a layer of this pattern. NotImplementedError for patterns without a closed form here."""
    if isinstance(pattern, DilatedSegments) and not global_tokens:
        return _segments(pattern, ranks, rank, heads)
    if isinstance(pattern, SlidingWindow | Full) and (pattern.looks_ahead() or not global_tokens):
        return _window(pattern, ranks, rank, heads, global_tokens)
    beside = f" beside {global_tokens} global tokens" if global_tokens else ""
    raise NotImplementedError(
        f"there is no plan for {pattern!r}{beside}; there is one for full, sliding_window (with global tokens where it "
        "looks ahead) and dilated_segments (without)"
    )


def describe(pattern: Pattern) -> str:
    """In few words."""
    causal = "" if pattern.looks_ahead() else ", causal"
    if isinstance(pattern, DilatedSegments):
        return "segments " + " ".join(f"{length}/{stride}" for length, stride in pattern.branches) + causal
    if isinstance(pattern, SlidingWindow):
        dilations = sorted({pattern.dilation} if isinstance(pattern.dilation, int) else set(pattern.dilation))
        dilated = f", dilation {' and '.join(map(str, dilations))}" if dilations != [1] else ""
        return f"window {pattern.before} + {pattern.after}{dilated}"
    return f"all{causal}" if isinstance(pattern, Full) else repr(pattern)


def _window(pattern: SlidingWindow | Full, ranks: Ranks, rank: int, heads: Heads, global_tokens: int) -> Load:
    start, end = ranks.start(rank), ranks.start(rank + 1)
    total = ranks.tokens
    reach = pattern.reach()
    before = total if reach is None else min(reach.before, total)
    after = (total if pattern.looks_ahead() else 0) if reach is None else min(reach.after, total)
    global_tokens = 0 if isinstance(pattern, Full) else min(global_tokens, total)
    pairs = sum(
        number * _window_pairs(back, ahead, dilation, total, start, end, global_tokens)
        for (back, ahead, dilation), number in _sides(pattern, total, heads.count).items()
    )
    if ranks.count == 1:
        return Load(pairs + global_tokens * heads.count * total)  # whose rows see everything besides
    near = start - max(0, start - before) + min(total, end + after) - end
    far = max(0, min(global_tokens, end) - start)  # marked tokens of this rank
    others = global_tokens - far
    goes = _reached(ranks, rank, before) + _reached_behind(ranks, rank, after)
    key = 2 * heads.count * heads.width * heads.size  # and its value
    answer = heads.count * (heads.width + 1) * 4
    elsewhere = ranks.count - 1
    sent, received = goes * key, near * key
    if global_tokens:
        sent += goes + far * elsewhere * (key + 8 + key // 2) + others * answer
        received += near + others * (key + 8 + key // 2) + far * elsewhere * answer
        pairs += global_tokens * heads.count * (end - start)
    tokens = end - start
    early = before if start else 0  # rows that wait for keys of other ranks
    late = after if end < total else 0
    inner = max(0, tokens - early - late)
    rows = 2 * tokens + (2 * (tokens + near + others) if near else 0)  # copies of q, of out, and of all keys
    if global_tokens and inner:
        rows += 2 * (tokens + others)
    returned = near * key + (others * (key + key // 2) + far * elsewhere * answer)
    return Load(pairs, sent, received, returned, rows * heads.count, 0, 16 * tokens, 2 if inner or global_tokens else 0)


def _sides(pattern: SlidingWindow | Full, total: int, heads: int) -> Counter[tuple[int, int, int]]:
    """(before, after, dilation) with the number of heads that see so."""
    if isinstance(pattern, Full):
        return Counter({(total, 0 if pattern.causal else total, 1): heads})
    dilations = pattern.dilation if isinstance(pattern.dilation, tuple) else (pattern.dilation,) * heads
    return Counter((pattern.before, pattern.after, dilation) for dilation in dilations)


def _window_pairs(before: int, after: int, dilation: int, total: int, start: int, end: int, global_tokens: int) -> int:
    """Of one head. Global tokens beyond the window count too."""
    back = _steps(before, dilation, end) - _steps(before, dilation, start)
    ahead = _steps(after, dilation, total - start) - _steps(after, dilation, total - end)
    pairs = back + ahead + end - start
    if global_tokens:
        inside = sum(_window_pairs_with(before, after, dilation, token, start, end) for token in range(global_tokens))
        pairs += global_tokens * (end - start) - inside
    return pairs


def _window_pairs_with(before: int, after: int, dilation: int, key: int, start: int, end: int) -> int:
    """How many of the queries from start to before end see the key."""
    last = min(end - 1, key + before * dilation)
    first = max(start, key - after * dilation)
    behind = (last - key) // dilation - max(0, -(-(max(start, key) - key) // dilation)) + 1 if last >= key else 0
    ahead = (key - first) // dilation - max(0, -(-(key - min(end - 1, key)) // dilation)) + 1 if first <= key else 0
    both = start <= key < end
    return max(0, behind) + max(0, ahead) - both


def _steps(limit: int, dilation: int, tokens: int) -> int:
    """The sum of min(limit, i // dilation) for i below tokens."""
    rising = min(tokens, limit * dilation)
    whole, rest = divmod(rising, dilation)
    return dilation * whole * (whole - 1) // 2 + whole * rest + limit * (tokens - rising)


def _reached(ranks: Ranks, rank: int, before: int) -> int:
    """Keys that this rank sends to later ones, whose queries look back so far; one that goes to two counts twice."""
    start, end = ranks.start(rank), ranks.start(rank + 1)
    whole = max(rank, min(ranks.count - 1, ranks.holder(min(ranks.tokens - 1, start + before))))
    sent = (whole - rank) * (end - start)
    for other in range(whole + 1, ranks.count):
        part = end - max(start, ranks.start(other) - before)
        if part <= 0:
            break
        sent += part
    return sent


def _reached_behind(ranks: Ranks, rank: int, after: int) -> int:
    """The same of earlier ranks, whose queries look ahead."""
    start, end = ranks.start(rank), ranks.start(rank + 1)
    whole = rank
    if end > after:
        first = ranks.holder(end - after - 1)
        whole = min(rank, first + (ranks.start(first + 1) < end - after))
    else:
        whole = 0
    sent = (rank - whole) * (end - start)
    for other in range(whole - 1, -1, -1):
        part = min(end, ranks.start(other + 1) + after) - start
        if part <= 0:
            break
        sent += part
    return sent


def _segments(pattern: DilatedSegments, ranks: Ranks, rank: int, heads: Heads) -> Load:
    start, end = ranks.start(rank), ranks.start(rank + 1)
    tokens, number = end - start, heads.count
    pairs = sum(
        many * _segment_pairs(length, stride, offset, pattern.causal, ranks.tokens, start, end)
        for length, stride in pattern.branches
        for offset, many in _offsets(pattern, stride).items()
    )
    sent = received = calls = rows = other = 0
    within = False
    for length, stride in pattern.branches:
        pieces = list(_pieces(length, ranks, rank))
        if not pieces:
            within = True
            continue
        first = max((stop for begin, stop in pieces if begin <= start), default=start)
        last = min((begin for begin, stop in pieces if stop >= end), default=end)
        calls += first < last
        rows += max(0, last - first)
        for begin, stop in pieces:
            kept, earlier, all_kept, later_ranks, other_ranks = _kept(pattern, length, stride, begin, stop, ranks, rank)
            sent += kept * (later_ranks if pattern.causal else other_ranks)
            received += earlier if pattern.causal else all_kept - kept
            if not kept:
                continue
            calls += 1
            read = kept + (earlier if pattern.causal else all_kept - kept)
            rows += 2 * kept + 2 * read  # q and out, keys and values
            other += number * (4 * 8 * kept + 4 * kept + read) + 29 * number * tokens  # indices, sums, masks
    key = 2 * number * heads.width * heads.size
    calls += within
    wide = 0
    if calls > 1 or (calls == 1 and not within):
        rows = number * (rows + within * tokens)
        # What each call gives, spread over all rows, and what was added up before it; one is the output itself.
        spread = calls - (within and heads.size == 4)
        wide = number * tokens * (spread + max(0, calls - 2))
    else:
        rows = number * tokens * (heads.size != 4 and ranks.count > 1)  # the output goes through float32
    return Load(pairs, sent * key, received * key, received * key, rows, wide, other)


def _offsets(pattern: DilatedSegments, stride: int) -> Counter[int]:
    """The first token that heads keep, with the number of heads that begin there."""
    first, end = pattern.part or (0, pattern.heads)
    return Counter(pattern.offset(head, stride) for head in range(end - first))


def _segment_pairs(length: int, stride: int, offset: int, causal: bool, total: int, start: int, end: int) -> int:
    """Of one head and one branch."""

    def kept(tokens: int) -> int:  # of the first so many tokens of a segment
        return max(0, -(-(tokens - offset) // stride))

    def read(begin: int, low: int, high: int) -> int:  # by the queries from low to before high of a segment
        first, last = kept(low - begin), kept(high - begin)
        if causal:
            return (last * (last + 1) - first * (first + 1)) // 2
        return (last - first) * kept(min(total, begin + length) - begin)

    begin = start // length * length
    if end <= begin + length:
        return read(begin, start, end)
    whole = end // length - (begin // length + 1)  # segments that lie on this rank from end to end
    pairs = read(begin, start, begin + length) + whole * read(0, 0, min(length, total))
    tail = end // length * length
    return pairs + (read(tail, tail, end) if tail < end else 0)


def _pieces(length: int, ranks: Ranks, rank: int) -> Iterator[tuple[int, int]]:
    """(first, end) of the segments that this rank shares with others: those that its edges cut."""
    firsts = []
    for edge in (ranks.start(rank), ranks.start(rank + 1)):
        if 0 < edge < ranks.tokens and edge % length:
            firsts.append(edge // length * length)
    for first in dict.fromkeys(firsts):
        yield first, min(first + length, ranks.tokens)


def _kept(
    pattern: DilatedSegments, length: int, stride: int, begin: int, stop: int, ranks: Ranks, rank: int
) -> tuple[int, int, int, int, int]:
    """Tokens kept of this rank's part of a segment, of the earlier ranks' and of all; how many ranks come later, and
    how many others there are. A rank keeps as many for all heads as for the one that keeps most."""
    offsets = tuple(sorted(_offsets(pattern, stride)))
    low, high = ranks.holder(begin), ranks.holder(stop - 1)
    sums = _kept_sums(offsets, stride, begin, stop, low, high, ranks)
    place = rank - low
    kept = int(sums[place + 1] - sums[place])
    return kept, int(sums[place]), int(sums[-1]), high - rank, high - low


@lru_cache(maxsize=64)
def _kept_sums(
    offsets: tuple[int, ...], stride: int, begin: int, stop: int, low: int, high: int, ranks: Ranks
) -> np.ndarray:
    """How many tokens the ranks from `low` to before each one keep of a segment."""
    edges = np.arange(low, high + 2, dtype=np.int64) * ranks.tokens // ranks.count
    edges = edges.clip(begin, stop) - begin
    most = np.zeros(len(edges) - 1, dtype=np.int64)
    for offset in offsets:
        upto = -(-(edges - offset).clip(min=0) // stride)
        most = np.maximum(most, np.diff(upto))
    return np.concatenate([[0], most.cumsum()])
