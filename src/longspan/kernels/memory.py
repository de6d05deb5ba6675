"""Memory for what the kernels write: in huge pages, and kept for whoever needs as much next.

The operating system hands memory out as pages of zeros, at a cost near that of computing on it, and the C library gives
large blocks back to it as soon as they are free.
"""

from __future__ import annotations

import ctypes
import functools
import math
import weakref
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch

from longspan.kernels import library

HUGE_PAGE = 1 << 21  # bytes
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h

_free: dict[int, np.ndarray] = {}  # UInt8 blocks by their address, the longest unused first
_most_kept = 1 << 28  # bytes, in blocks that nobody uses


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """As torch.empty on CPU, at a multiple of 64 bytes, and in huge pages of memory where it fills one.

    Rows that lie far apart in small pages make the processor look up where each page lies.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE_PAGE:
        wide = torch.empty(size + 64, dtype=torch.uint8)
        start = -wide.data_ptr() % 64
        return wide[start : start + size].view(dtype).view(*shape)
    block = _take(size)
    if block is None:
        block = _new(-(-size // HUGE_PAGE) * HUGE_PAGE)
    lent = block[:size]
    weakref.finalize(lent, _keep, block).atexit = False  # the tensor's memory holds `lent`, and that the block
    return torch.from_numpy(lent).view(dtype).view(*shape)


def _new(size: int) -> np.ndarray:
    wide = np.empty(size + HUGE_PAGE, np.uint8)
    start = -wide.ctypes.data % HUGE_PAGE
    block, found = wide[start : start + size], library()
    if found is not None:
        found.longspan_prefer_huge_pages(block.ctypes.data, size)
    return block


def _take(size: int) -> np.ndarray | None:
    """The smallest free block that wastes little. Threads may take and keep at any time: each step stands alone."""
    fitting = [(block.size, address) for address, block in list(_free.items()) if size <= block.size <= size * 5 // 4]
    return _free.pop(min(fitting)[1], None) if fitting else None


def _keep(block: np.ndarray) -> None:
    if block.size > _most_kept:
        return
    _free[block.ctypes.data] = block
    blocks = list(_free.items())
    kept = sum(block.size for _, block in blocks)
    for address, block in blocks:
        if kept <= _most_kept:
            break
        kept -= block.size
        _free.pop(address, None)


def keep_up_to(size: int) -> None:
    """From now on this process keeps at most `size` bytes in blocks that nobody uses, not 256 MiB."""
    global _most_kept
    _most_kept = size


def give_back() -> None:
    """Blocks that nobody uses go back to the system."""
    _free.clear()


@functools.cache
def keep_freed_memory() -> None:
    """From now on this process keeps what its tensors leave, up to 1 GiB of tensors up to 32 MiB, for the next ones.

    For processes that train: each step needs the same memory again.
    """
    with suppress(OSError, AttributeError):  # not glibc
        c_library = ctypes.CDLL(None)
        c_library.mallopt(M_MMAP_THRESHOLD, 1 << 25)  # the most that it takes
        c_library.mallopt(M_TRIM_THRESHOLD, 1 << 30)
