"""Sequences without padding, one after the other in one matrix of rows, by the native kernels and without gradients.

Shapes: H heads, D head width, T tokens of all sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longspan import kernels
from longspan.attention.backends.lanes import find_extra_keys, merges, split
from longspan.attention.backends.native import Seen, check_kernels, compute, plan
from longspan.attention.backends.operators import with_unit_stride
from longspan.attention.patterns import Pattern


class Sequences:
    """Sequences of T tokens in all that stand one after the other, so that no row is padding.

    offsets: where each begins, and last T; one more number than sequences. A sequence may be empty.
    marked: Bool[T], the global keys: seen by all tokens of their sequence. Made once for all layers of a model.
    """

    def __init__(self, offsets: Sequence[int], marked: Tensor | None = None):
        self.offsets = tuple(int(offset) for offset in offsets)
        if len(self.offsets) < 2 or self.offsets[0] != 0 or list(self.offsets) != sorted(self.offsets):
            raise ValueError(f"offsets must begin with 0, never fall and end with the number of tokens; got {offsets}")
        if marked is not None and (marked.dtype != torch.bool or marked.shape != (self.tokens,) or not marked.is_cpu):
            raise ValueError(
                f"marked must be Bool[{self.tokens}] on cpu; got {marked.dtype} {list(marked.shape)} on {marked.device}"
            )
        self.extra, self.masks = None, {}
        if marked is not None and marked.any():
            self.extra, self.masks = find_extra_keys(marked[None], self.offsets), {"key_mask": ~marked}

    @property
    def tokens(self) -> int:
        return self.offsets[-1]


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    pattern: Pattern,
    *,
    out: Tensor,
    scale: float | None = None,
    queries: int | None = None,
) -> Callable[[], None]:
    """Attention within each of the packed sequences, without gradients: described once, computed at every call.

    q, k, v: [T, H, D], such as the three parts of a fused projection [T, 3, H, D]. Each call reads what stands in them.
    pattern: Full, SlidingWindow or, where no key is marked, DilatedSegments. Where it only looks back, marked keys too
    are seen only by what follows them.
    out: [T, H, D] of the same dtype, to write to. scale: factor on q @ k, D ** -0.5 by default.
    queries: how many of each sequence's first tokens need to read; None: all. Of the others nothing is said in `out`.

    Raises ValueError for inputs that do not fit together, NotImplementedError where the kernels cannot run them.
    """
    if q.ndim != 3 or not q.shape == k.shape == v.shape or len(q) != sequences.tokens:
        raise ValueError(
            f"q, k and v must be [T, H, D] with T = {sequences.tokens}, where the sequences end; "
            f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    check_kernels(q, k, v)
    _, heads, width = q.shape
    pattern.check_fits(1, heads, sequences.tokens, q.device)
    halves = split(pattern)
    if isinstance(halves, str) or halves.near is None or halves.marked is not None:
        raise NotImplementedError(
            f"packed sequences take Full, SlidingWindow or DilatedSegments, with global keys as Sequences(marked=...); "
            f"got {pattern!r}"
        )
    merged = merges(halves.near)
    if merged and sequences.extra is not None:
        raise NotImplementedError("the kernels compute dilated_segments alone, not beside marked keys")
    if queries is not None and queries < 1:
        raise ValueError(f"queries, the tokens of each sequence that read, must be at least 1; got {queries}")
    if out.shape != q.shape or out.dtype != q.dtype or not out.is_cpu or out.stride(2) != 1:
        raise ValueError(
            f"out must be {q.dtype} {list(q.shape)} on cpu with adjacent numbers in each row; "
            f"got {out.dtype} {list(out.shape)} on {out.device}, strides {list(out.stride())}"
        )
    factor = width**-0.5 if scale is None else scale
    seen = Seen(halves.near, sequences.extra, halves.looks_back_only, sequences.masks, sequences.offsets, queries)
    if not merged and all(tensor.stride(2) == 1 for tensor in (q, k, v)):
        return _Prepared({"q": q, "k": k, "v": v, "out": out}, seen, factor)

    def attend() -> None:
        rows = {name: with_unit_stride(tensor) for name, tensor in zip("qkv", (q, k, v), strict=True)} | {"out": out}
        if merged:  # several calls, or none, write a row
            rows["out"] = torch.zeros(q.shape) if out.dtype != torch.float32 else out.zero_()
            rows["lse"] = torch.full((sequences.tokens, heads), -math.inf)
        compute(rows, seen, factor)
        if rows["out"] is not out:
            out.copy_(rows["out"])

    return attend


class _Prepared:
    """A forward pass without bias, whose tensors keep their places."""

    def __init__(self, rows: dict[str, Tensor], seen: Seen, scale: float):
        self.kept = rows, seen  # the tables hold their addresses
        calls, addresses = plan(rows, seen, scale)
        tables = [(call.settings, call.table(addresses, seen.extra)) for call in calls]
        self.calls = [(settings, table, table.ctypes.data, len(table)) for settings, table in tables]

    def __call__(self) -> None:
        library = kernels.library()
        assert library is not None
        for settings, _, address, number in self.calls:
            library.longspan_attention_forward(settings, address, number)
