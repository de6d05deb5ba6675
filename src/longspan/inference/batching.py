"""Sequences of many lengths as batches of similar lengths."""

from __future__ import annotations

from collections.abc import Sequence


def group_by_length(lengths: Sequence[int], *, max_tokens: int, max_padding: float = 0.25) -> list[list[int]]:
    """Indices of the sequences of each batch, the longest first; equal lengths stay in order.

    max_tokens: of a batch as a rectangle, its rows times its longest sequence; a longer sequence is a batch by itself.
    max_padding: the largest share of that rectangle that may be padding. Where padding is not computed, 1 makes the
    fewest batches.
    """
    if max_tokens < 1 or not 0 <= max_padding <= 1:
        raise ValueError(
            f"max_tokens must be at least 1 and max_padding lie between 0 and 1; got {max_tokens} and {max_padding}"
        )
    if any(length < 1 for length in lengths):
        raise ValueError(f"a sequence has at least 1 token; sequence {[n < 1 for n in lengths].index(True)} has none")
    batches: list[list[int]] = []
    longest = tokens = 0  # of the batch that is being filled
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        rectangle = (len(batches[-1]) + 1) * longest if batches else 0
        tokens += lengths[index]
        if not batches or rectangle > max_tokens or rectangle - tokens > max_padding * rectangle:
            batches.append([])
            longest = tokens = lengths[index]
        batches[-1].append(index)
    return batches
