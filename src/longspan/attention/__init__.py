"""Attention over long inputs: patterns say what may be seen, `attend` computes it."""

from longspan.attention.attend import attend
from longspan.attention.patterns import (
    PATTERNS,
    DilatedSegments,
    Full,
    GlobalKeys,
    Pattern,
    Reach,
    SlidingWindow,
    Union,
    pattern_from_dict,
)

__all__ = [
    "PATTERNS",
    "DilatedSegments",
    "Full",
    "GlobalKeys",
    "Pattern",
    "Reach",
    "SlidingWindow",
    "Union",
    "attend",
    "pattern_from_dict",
]
