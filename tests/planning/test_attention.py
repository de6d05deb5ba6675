"""Loads of ranks against what patterns count and what ranks send and keep."""

import pytest
import torch

from longspan.attention import DilatedSegments, Full, GlobalKeys, Pattern, SlidingWindow
from longspan.planning.attention import Heads, Ranks, load_of

H, D = 4, 16
# name: (pattern, global tokens)
PATTERNS = {
    "full": (Full(), 0),
    "full, causal": (Full(causal=True), 0),
    "window": (SlidingWindow(7, 3), 0),
    "causal window": (SlidingWindow(9, 0), 0),
    "window beyond neighbours": (SlidingWindow(70, 90), 0),
    "dilated heads": (SlidingWindow(5, 2, (1, 1, 2, 3)), 0),
    "nothing but itself": (SlidingWindow(0, 0), 0),
    "window and globals": (SlidingWindow(6, 6), 5),
    "dilated window and many globals": (SlidingWindow(4, 3, 3), 40),
    "segments": (DilatedSegments(((8, 1), (24, 3), (200, 5)), H), 0),
    "segments, causal": (DilatedSegments(((8, 1), (40, 2), (64, 4)), H, causal=True), 0),
    "segments, interleaved": (DilatedSegments(((16, 3), (48, 7)), H, True, "interleaved"), 0),
    "no segment is cut": (DilatedSegments(((4, 1), (12, 2)), H, causal=True), 0),
}


def counted(pattern: Pattern, tokens: int, global_tokens: int) -> torch.Tensor:
    """Pairs of each query, over all heads."""
    if global_tokens:
        marked = torch.zeros(1, tokens, dtype=torch.bool)
        marked[:, :global_tokens] = True
        pattern = pattern | GlobalKeys(marked)
    head, query, key = torch.arange(H)[:, None, None], torch.arange(tokens)[:, None], torch.arange(tokens)
    count = pattern.count(torch.zeros((), dtype=torch.long), head, query, key)
    return count.expand(H, tokens, tokens).long().sum((0, 2))


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(("tokens", "count"), [(96, 1), (96, 4), (101, 3), (101, 7), (13, 13)])
def test_pairs_are_those_that_the_pattern_counts(name, tokens, count):
    pattern, global_tokens = PATTERNS[name]
    global_tokens = min(global_tokens, tokens)
    ranks, pairs = Ranks(tokens, count), counted(pattern, tokens, global_tokens)
    for rank in range(count):
        own = slice(ranks.start(rank), ranks.start(rank + 1))
        rows = H * global_tokens * (own.stop - own.start)  # what global tokens read of this rank's keys
        found = load_of(pattern, ranks, rank, Heads(H, D, 4), global_tokens)
        assert found.pairs == int(pairs[own].sum()) + rows, rank


def test_holders_are_those_whose_shards_hold_the_token():
    ranks = Ranks(101, 7)
    for rank in range(7):
        assert {ranks.holder(token) for token in range(ranks.start(rank), ranks.start(rank + 1))} == {rank}


def test_received_bytes_are_those_that_others_send():
    ranks = Ranks(1000, 7)
    for pattern, global_tokens in PATTERNS.values():
        loads = [load_of(pattern, ranks, rank, Heads(H, D, 2), global_tokens) for rank in range(7)]
        assert sum(load.sent for load in loads) == sum(load.received for load in loads), pattern


def test_a_billion_tokens_take_no_longer_than_a_thousand():
    pattern = DilatedSegments(((2048, 1), (2**24, 2**13), (2**30, 2**19)), 12, causal=True)
    load = load_of(pattern, Ranks(2**30, 64), 63, Heads(12, 64, 2))
    assert load.sent == 0 and load.received == 63 * 32 * 2 * 12 * 64 * 2


def test_patterns_without_a_closed_form_are_refused_by_name():
    for pattern, global_tokens in [(SlidingWindow(1, 1) | SlidingWindow(4, 0), 0), (SlidingWindow(4, 0), 2)]:
        with pytest.raises(NotImplementedError, match="there is no plan for SlidingWindow"):
            load_of(pattern, Ranks(64, 2), 0, Heads(H, D, 4), global_tokens)
