"""Attention over long inputs: patterns say what may be seen, `attend` computes it."""

from longspan.attention.attend import Explanation, attend, explain
from longspan.attention.draw import draw, draw_picture
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
from longspan.attention.request import DistanceBias

__all__ = [
    "PATTERNS",
    "DilatedSegments",
    "DistanceBias",
    "Explanation",
    "Full",
    "GlobalKeys",
    "Pattern",
    "Reach",
    "SlidingWindow",
    "Union",
    "attend",
    "draw",
    "draw_picture",
    "explain",
    "pattern_from_dict",
]
