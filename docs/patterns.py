"""Draws docs/patterns.png for the README: `python docs/patterns.py`."""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from longspan.attention import DilatedSegments, GlobalKeys, SlidingWindow
from longspan.attention.draw import draw_picture

TOKENS = 48
marked = torch.zeros(1, TOKENS, dtype=torch.bool)
marked[0, [0, 20]] = True
shown = {
    "SlidingWindow(4, 4) | GlobalKeys(...)": SlidingWindow(4, 4) | GlobalKeys(marked),
    "SlidingWindow(6, 0, dilation=2)": SlidingWindow(6, 0, dilation=2),
    "DilatedSegments(((8, 1), (16, 2), (48, 4)))": DilatedSegments(((8, 1), (16, 2), (48, 4)), heads=1, causal=True),
}
figure = Figure(figsize=(12, 4.2), layout="constrained")
for axes, (name, pattern) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
    draw_picture(pattern, TOKENS, axes=axes).set_title(name)
figure.savefig(Path(__file__).parent / "patterns.png", dpi=100)
