"""Blocks of tokens that attention may be computed for one after the other, because none sees far beyond its own."""

from __future__ import annotations

import math
from typing import NamedTuple

from longspan.attention.patterns import DilatedSegments, Pattern

TOKENS_AT_ONCE = 32_768


class Block(NamedTuple):
    """rows: the tokens whose results it gives. seen: those and all that they see."""

    rows: slice
    seen: slice


def cut(pattern: Pattern, tokens: int, at_once: int = TOKENS_AT_ONCE) -> list[Block]:
    """Blocks of about `at_once` tokens; one of all tokens where a pattern sees too far, or depends on where a token is.

    LongNet's segments end where blocks end. A window looks into the blocks beside its own.
    """
    before = after = 0
    reach = pattern.reach()
    if isinstance(pattern, DilatedSegments):
        period = math.lcm(*(length for length, _ in pattern.branches))
        at_once = period * max(1, at_once // period)
    elif reach is not None and pattern.extra_keys() is None and pattern.shift_invariant():
        before, after = reach.before, reach.after
        at_once = max(at_once, before + after)
    else:
        at_once = tokens
    ends = range(at_once, tokens, at_once) if at_once else ()
    return [
        Block(slice(start, end), slice(max(0, start - before), min(tokens, end + after)))
        for start, end in zip([0, *ends], [*ends, tokens], strict=True)
    ]
