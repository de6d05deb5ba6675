"""Any pattern as text or as a picture: a row for each query, a column for each key."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longspan.attention.patterns import Pattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_TEXT_TOKENS = 200  # wider than any terminal


def draw(pattern: Pattern, tokens: int, *, batch: int = 0, head: int = 0, ascii_only: bool = False) -> str:
    """The pattern as text: a square where a query sees a key, a dot where not, a digit for a key that counts more.

    tokens: N, at most 200. batch, head: which batch row and head to draw, where the pattern differs between them.
    Raises ValueError for other numbers of tokens than the pattern was made for.
    """
    if not 1 <= tokens <= MAX_TEXT_TOKENS:
        raise ValueError(f"draw needs 1 to {MAX_TEXT_TOKENS} tokens to fit the screen; got {tokens}; try draw_picture")
    hidden, seen, many = ".#+" if ascii_only else "·■+"
    symbols = [hidden, seen, *"23456789"]
    rows = _counts(pattern, tokens, batch, head).tolist()
    return "\n".join(" ".join(symbols[count] if count < 10 else many for count in row) for row in rows)


def draw_picture(pattern: Pattern, tokens: int, *, batch: int = 0, head: int = 0, axes: Axes | None = None) -> Axes:
    """The pattern as a matplotlib image, on `axes` or new ones; `axes.figure.savefig(path)` writes it.

    Raises ImportError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("draw_picture needs matplotlib: pip install longspan[plot]") from None
    counts = _counts(pattern, tokens, batch, head)
    if axes is None:
        axes = Figure(figsize=(5, 5), layout="constrained").subplots()
    axes.imshow(counts.numpy(), cmap="Blues", vmin=0, vmax=max(1, int(counts.max())), interpolation="nearest")
    axes.set(xlabel="key", ylabel="query", title=repr(pattern))
    return axes


def _counts(pattern: Pattern, tokens: int, batch: int, head: int) -> Tensor:
    """Long[N, N]."""
    extra = pattern.extra_keys()
    if extra is not None and extra.shape[1] != tokens:
        raise ValueError(f"{pattern!r} was made for {extra.shape[1]} tokens; got {tokens}; draw it with its own number")
    position = torch.arange(tokens, device=None if extra is None else extra.device)
    count = pattern.count(
        torch.full_like(position[:1], batch), torch.full_like(position[:1], head), position[:, None], position
    )
    return count.expand(tokens, tokens).long().cpu()
