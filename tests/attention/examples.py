"""One example or more of every pattern, for the grid of tests, the drawings and the benchmark."""

from __future__ import annotations

import torch

from longspan.attention import DilatedSegments, Full, GlobalKeys, Pattern, SlidingWindow

BATCH, HEADS, WIDTH = 2, 4, 8


def examples(tokens: int, batch: int = BATCH, heads: int = HEADS) -> dict[str, Pattern]:
    marked = torch.zeros(batch, tokens, dtype=torch.bool)
    marked[:, 0] = True
    marked[-1, tokens // 2] = True
    marked[-1, tokens - 3 :] = True
    branches = ((8, 1), (16, 2), (32, 4))
    return {
        "full": Full(),
        "full_causal": Full(causal=True),
        "window": SlidingWindow(5, 5),
        "window_causal": SlidingWindow(6, 0),
        "window_self": SlidingWindow(0, 0),
        "window_wide": SlidingWindow(70, 30),
        "window_dilated": SlidingWindow(3, 2, dilation=2),
        "window_dilated_per_head": SlidingWindow(3, 3, dilation=(1, 2, 3, 1)),
        "global": GlobalKeys(marked),
        "window_global": SlidingWindow(4, 4) | GlobalKeys(marked),
        "window_global_causal": SlidingWindow(4, 0) | GlobalKeys(marked, causal=True),
        "window_global_dilated": SlidingWindow(2, 1, dilation=3) | GlobalKeys(marked),
        "segments": DilatedSegments(branches, heads=heads),
        "segments_causal": DilatedSegments(branches, heads=heads, causal=True, offsets="interleaved"),
        "segments_uneven": DilatedSegments(((8, 3), (24, 5)), heads=heads),
        "segments_part": DilatedSegments(((8, 1), (24, 3)), heads=3 * heads, part=(heads + 1, 2 * heads + 1)),
        "segments_sparse": DilatedSegments(((16, 4),), heads=heads, offsets="interleaved"),
        "segments_window": DilatedSegments(((16, 1), (16, 2)), heads=heads) | SlidingWindow(2, 2),
    }


EXAMPLE_NAMES = tuple(examples(8))


def padding(kind: str, tokens: int, batch: int = BATCH) -> torch.Tensor | None:
    """Bool[B, N] masks: none, ragged ends, one row of nothing but padding, holes in the middle."""
    if kind == "none":
        return None
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    if kind == "holes":
        mask[0, 1::3] = False
        return mask
    mask[0, max(1, tokens * 3 // 4) :] = False
    if kind == "empty_row":
        mask[-1] = False
    return mask
