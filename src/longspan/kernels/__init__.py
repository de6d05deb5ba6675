"""The compiled CPU kernels (kernels/*.h in the source tree): found, checked and loaded on first use.

The library is plain C, called by ctypes, which lets go of Python's lock while a kernel runs.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import warnings
from ctypes import c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import NamedTuple

import torch  # first: the kernels then share the threads of its OpenMP runtime, which torch.set_num_threads governs

INTERFACE_VERSION = 5
FILE_NAME = "liblongspan_kernels.so"
BIAS_MARGIN = 16  # LONGSPAN_BIAS_MARGIN

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # longspan_dtype

# longspan_lane: numbers of 64 bits all of them, so that a table of lanes is Int[L, fields]. An address of 0 is null.
LANE_FIELDS = (
    *("q", "k", "v", "out", "lse", "queries", "keys", "before", "after", "dilation", "positions"),
    *("query_mask", "key_mask", "extra", "extras", "extra_causal"),
    *(f"{bias}{field}" for bias in ("bias", "extra_bias") for field in ("", "_gradient", "_first", "_count")),
    *("grad_out", "grad_lse", "delta", "grad_q", "grad_k", "grad_v"),
)


class AttentionCall(ctypes.Structure):
    """longspan_attention: what all lanes of one call share. Strides count elements."""

    _fields_ = (
        *((name, c_int32) for name in ("dtype", "out_dtype", "grad_dtype", "accumulate")),
        ("width", c_int64),
        ("scale", c_float),
        *((f"{name}_stride", c_int64) for name in ("q", "k", "v", "out", "lse", "query_mask", "key_mask")),
        *((f"{name}_stride", c_int64) for name in ("grad_out", "grad_q", "grad_k", "grad_v")),
    )


class _Found(NamedTuple):
    library: ctypes.CDLL | None
    problem: str | None  # why there is none


def library() -> ctypes.CDLL | None:
    """The kernels, with the functions of longspan.h declared; None where there are none, with a warning the first
    time. A call that the library refuses raises RuntimeError."""
    found = _find()
    if found.problem is not None:
        _warn_once(found.problem)
    torch.get_num_threads()  # in a new thread, torch tells OpenMP the number only when somebody asks
    return found.library


def problem() -> str | None:
    """Why `library()` is None, in a sentence; None where the kernels are there."""
    library()
    return _find().problem


problem._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result, without
# loading torch's compiler: what torch.compile traces sees the answer, not the search


@functools.cache
def _find() -> _Found:
    files = [Path(folder) / FILE_NAME for folder in __path__]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        return _Found(None, "the compiled kernels are not installed")
    try:
        _check_whole(file)
        return _Found(_declare(ctypes.CDLL(str(file))), None)
    except (OSError, AttributeError) as error:  # cut short, for another machine, of another version
        return _Found(None, f"the compiled kernels do not load: {error}")


def _check_whole(file: Path) -> None:
    """Loading half a library may end the process. The table that its header names stands at the end of the file."""
    with file.open("rb") as opened:
        header = opened.read(64)
    if len(header) == 64:
        (start,), (size, number) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
        if start + size * number <= file.stat().st_size:
            return
    raise OSError(f"{file} is cut short")


def _declare(cdll: ctypes.CDLL) -> ctypes.CDLL:
    cdll.longspan_interface_version.restype = c_int64
    version = cdll.longspan_interface_version()
    if version != INTERFACE_VERSION:
        raise OSError(f"{FILE_NAME} has interface version {version}, this longspan needs {INTERFACE_VERSION}")
    for function in (cdll.longspan_attention_forward, cdll.longspan_attention_backward):
        function.argtypes = (ctypes.POINTER(AttentionCall), c_void_p, c_int64)
        function.restype, function.errcheck = c_int, check_status  # type: ignore[assignment]
    cdll.longspan_instruction_set.restype = c_char_p
    cdll.longspan_use_instruction_set.argtypes = (c_char_p,)
    cdll.longspan_use_instruction_set.restype = c_int
    cdll.longspan_num_threads.restype = c_int
    cdll.longspan_prefer_huge_pages.argtypes = (c_void_p, c_int64)
    cdll.longspan_prefer_huge_pages.restype = None
    return cdll


def check_status(status: int, function, arguments) -> int:
    """The `errcheck` of kernels that return a longspan_status. Raises MemoryError and RuntimeError."""
    if status == 0:
        return status
    if status == 2:
        raise MemoryError(f"{function.__name__} found no memory for its working space")
    raise RuntimeError(f"{function.__name__} refused its arguments (status {status}); please report this")


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"longspan runs without its compiled kernels: {reason}. Attention falls back to torch, several times slower. "
        f"Install a C++17 compiler with OpenMP (such as g++), then longspan again",
        RuntimeWarning,
        stacklevel=2,
    )
