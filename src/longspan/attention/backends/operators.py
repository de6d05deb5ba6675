"""What the torch operators of this folder share: how they are registered, and how their rows lie in memory.

Shapes: B batch, H heads, N tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def define(name: str, kernel: Callable, fake: Callable) -> None:
    """Register an operator for all devices. `fake` gives the shapes of what `kernel` gives.

    Not torch.library.custom_op: its first call loads torch's compiler, which takes as long as loading torch.
    """
    torch.library.define(name, torch.library.infer_schema(kernel, mutates_args=()))
    torch.library.impl(name, "default", kernel)
    torch.library.register_fake(name, fake)


def with_unit_stride(rows: Tensor) -> Tensor:
    """The same rows with adjacent numbers in each."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def empty_rows(like: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, H, N, D] laid out as [B, N, H, D], so that joining the heads afterwards copies nothing."""
    batch, heads, tokens, width = like.shape
    return like.new_empty(batch, tokens, heads, width, dtype=dtype).transpose(1, 2)


def narrow(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows in that dtype, laid out as `empty_rows` does."""
    return rows if rows.dtype == dtype else empty_rows(rows, dtype).copy_(rows)
