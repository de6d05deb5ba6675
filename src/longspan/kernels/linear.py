"""Linear layers in float32, bfloat16 and int8, with all that follows: on AVX-512 with products of bytes (VNNI) and on
the tile unit (AMX) of Intel's server CPUs.

The unit multiplies bf16 numbers and adds up in float32, so there float32 numbers are taken apart into bf16 terms that
add up to them, and the products of all terms that matter are summed (Henry, Tang, Heinecke 2019, arXiv 1904.06376).
Inference only.

Shapes: T rows, K numbers in each, N numbers in each row of the result.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, Structure, c_int, c_int32, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from longspan import kernels
from longspan.kernels.memory import empty
from longspan.kernels.rows import ACTIVATIONS, Bytes

BYTES = 0  # in place of terms
INT8 = 2  # beside kernels.DTYPES: int8 in weights, uint8 in rows
ALIGNMENT = 64


class PackedWeight(NamedTuple):
    """A weight [N, K] as the kernels read it. data: uint8, begins at a multiple of 64 bytes. terms: bf16 numbers for
    each number; 0 where it is int8 and counts scale[:, None], float32 [N]."""

    data: Tensor
    in_features: int
    out_features: int
    terms: int
    scale: Tensor | None = None


def available() -> bool:
    """Whether this CPU, its kernel and the installed library have what `pack_linear` and `linear` need."""
    library = _library()
    return library is not None and bool(library.longspan_linear_is_available())


def pack_linear(weight: Tensor, *, terms: int = 3, scale: Tensor | None = None) -> PackedWeight:
    """The weight [N, K] of a linear layer, float32, bfloat16 or int8, as `linear` reads it.

    terms: 3 gives float32 results, with an error below torch's own (3e-7 of the result's norm); 2 is nearly twice as
    fast, with an error of 5e-6; 1 computes in bfloat16. Each takes 2 bytes a number. scale: float32 [N], given with an
    int8 weight, which stands for weight * scale[:, None] and takes rows in bytes. Raises ValueError for another weight,
    NotImplementedError where `available()` is false.
    """
    library = _available_library()
    if terms not in (1, 2, 3):
        raise ValueError(f"terms is {terms!r}; allowed are 1 (bfloat16), 2 and 3 (float32)")
    if (weight.dtype == torch.int8) != (scale is not None):
        raise ValueError(
            f"weight is {weight.dtype}, scale is {scale if scale is None else list(scale.shape)}; an int8 weight, "
            "and no other, needs the scale of each of its rows"
        )
    _check_rows("weight", weight, dtypes=(*kernels.DTYPES, torch.int8))
    out_features, in_features = weight.shape
    if scale is not None:
        terms, dtype = BYTES, INT8
        _check_vector("scale", scale, out_features)
    else:
        weight = weight if terms == 1 else weight.float()
        dtype = kernels.DTYPES[weight.dtype]
    size = library.longspan_linear_packed_bytes(in_features, out_features, terms)
    if size < 0:
        raise ValueError(f"weight is {list(weight.shape)}; a linear layer has one row and one number in it, or more")
    data = empty([size], torch.uint8)
    library.longspan_linear_pack(
        dtype, weight.data_ptr(), _stride(weight), in_features, out_features, terms, data.data_ptr()
    )
    return PackedWeight(data, in_features, out_features, terms, scale)


def linear(
    x: Tensor | Bytes,
    packed: PackedWeight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """activation(x @ weight.T + bias) + residual: [T, N].

    x: [T, K], float32; bfloat16 where the weight has one term; `Bytes` where it is int8. bias: float32 [N]. activation:
    a name of `longspan.kernels.rows.ACTIVATIONS`. residual: [T, N] in the result's dtype. out: where the result goes,
    float32 or bfloat16 [T, N]; may be the residual, must not be x. dtype: of a new result; x's (float32 for bytes)
    unless given. Rows may lie any distance apart, numbers in a row are adjacent. Infinity may come out as NaN. Raises
    ValueError for operands that do not fit, NotImplementedError where `available()` is false.
    """
    library = _available_library()
    values, row_scale = _checked_rows_of(x, packed)
    _check_packed(packed, library)
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; allowed are {', '.join(ACTIVATIONS)} and None")
    shape = (len(values), packed.out_features)
    if out is None:
        out = torch.empty(shape, dtype=dtype or (torch.float32 if row_scale is not None else values.dtype))
    _check_rows("out", out, shape)
    if len(out) > 1 and out.stride(0) < out.shape[1]:
        raise ValueError(f"rows of out overlap: their stride is {out.stride(0)}, their width {out.shape[1]}")
    if residual is not None:
        _check_rows("residual", residual, shape)
        if residual.dtype != out.dtype:
            raise ValueError(f"residual is {residual.dtype}, but the result is {out.dtype}; give both the same dtype")
    if bias is not None:
        _check_vector("bias", bias, packed.out_features)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (values, bias, residual, out)):
        raise ValueError("linear gives no gradients; call it under torch.inference_mode() or torch.no_grad()")
    return linear_unchecked(x, packed, bias, activation, out, residual)


def linear_unchecked(
    x: Tensor | Bytes,
    packed: PackedWeight,
    bias: Tensor | None,
    activation: str | None,
    out: Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    """`linear` for a caller whose operands fit by construction: the checks take as long as a few rows."""
    library = _library()
    assert library is not None
    values, row_scale = (x.values, x.scale) if isinstance(x, Bytes) else (x, None)
    call = describe_weights(packed, bias, activation)
    if row_scale is None:
        call.dtype = kernels.DTYPES[values.dtype]
    call.out_dtype = kernels.DTYPES[out.dtype]
    call.rows, call.in_stride, call.out_stride = len(values), _stride(values), _stride(out)
    call.input, call.row_scale, call.out = values.data_ptr(), _address(row_scale), out.data_ptr()
    if residual is not None:
        call.residual, call.residual_stride = residual.data_ptr(), _stride(residual)
    library.longspan_linear_forward(call)
    return out


class Call(Structure):
    """longspan_linear. Strides count numbers."""

    _fields_ = (
        *((name, c_int32) for name in ("dtype", "out_dtype", "terms", "activation")),
        *((name, c_int64) for name in ("rows", "in_features", "out_features")),
        *((name, c_int64) for name in ("in_stride", "residual_stride", "out_stride")),
        *((name, c_void_p) for name in ("input", "packed", "row_scale", "weight_scale", "bias", "residual", "out")),
    )


def describe_weights(packed: PackedWeight, bias: Tensor | None, activation: str | None) -> Call:
    """A call without rows, for rows and results in the dtype that such weights are made for."""
    dtype = {BYTES: INT8, 1: kernels.DTYPES[torch.bfloat16]}.get(packed.terms, kernels.DTYPES[torch.float32])
    return Call(
        dtype=dtype,
        out_dtype=kernels.DTYPES[torch.float32 if packed.terms > 1 else torch.bfloat16],
        terms=packed.terms,
        activation=-1 if activation is None else ACTIVATIONS[activation],
        in_features=packed.in_features,
        out_features=packed.out_features,
        packed=packed.data.data_ptr(),
        weight_scale=_address(packed.scale),
        bias=_address(bias),
    )


@functools.cache
def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    library.longspan_linear_is_available.restype = c_int
    library.longspan_linear_packed_bytes.argtypes = (c_int64, c_int64, c_int32)
    library.longspan_linear_packed_bytes.restype = c_int64
    library.longspan_linear_pack.argtypes = (c_int32, c_void_p, c_int64, c_int64, c_int64, c_int32, c_void_p)
    library.longspan_linear_forward.argtypes = (POINTER(Call),)
    for function in (library.longspan_linear_pack, library.longspan_linear_forward):
        function.restype, function.errcheck = c_int, kernels.check_status  # type: ignore[assignment]
    return library


def _library() -> ctypes.CDLL | None:
    found = kernels.library()
    return None if found is None else _declared(found)


def _available_library() -> ctypes.CDLL:
    library = _library()
    if library is None:
        raise NotImplementedError(f"linear layers need the compiled kernels, but {kernels.problem()}")
    if not library.longspan_linear_is_available():
        have = library.longspan_instruction_set().decode()
        raise NotImplementedError(
            f"linear layers need the instruction set avx2 or better, but the kernels use {have}; "
            "ask longspan.kernels.linear.available() first, and use torch.nn.functional.linear otherwise"
        )
    return library


def _stride(x: Tensor) -> int:
    """From one row to the next; torch may say anything where there is but one."""
    return x.stride(0) if len(x) > 1 else x.shape[1]


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _checked_rows_of(x: Tensor | Bytes, packed: PackedWeight) -> tuple[Tensor, Tensor | None]:
    """The numbers of x, and the scale of its rows where they are bytes."""
    if isinstance(x, Bytes) != (packed.terms == BYTES):
        came = "bytes" if isinstance(x, Bytes) else str(x.dtype)
        raise ValueError(f"x is {came}; a weight takes rows in bytes if, and only if, it was packed from int8")
    values, scale = (x.values, x.scale) if isinstance(x, Bytes) else (x, None)
    _check_rows("x", values, dtypes=tuple(kernels.DTYPES) if scale is None else (torch.uint8,))
    if values.shape[1] != packed.in_features:
        raise ValueError(
            f"x has {values.shape[1]} numbers in a row, but the weight was packed for {packed.in_features}"
        )
    if scale is not None:
        _check_vector("the scale of x", scale, len(values))
    if values.dtype == torch.bfloat16 and packed.terms != 1:
        raise ValueError(
            f"x is bfloat16, but the weight was packed in {packed.terms} terms; pack it with terms=1, or give x.float()"
        )
    return values, scale


def _check_rows(
    name: str,
    x: Tensor,
    shape: tuple[int, int] | None = None,
    dtypes: tuple[torch.dtype, ...] = tuple(kernels.DTYPES),
) -> None:
    is_rows = x.dim() == 2 and x.dtype in dtypes and x.device.type == "cpu" and x.layout == torch.strided
    if not is_rows or (x.shape[1] > 1 and x.stride(1) != 1) or (shape is not None and tuple(x.shape) != shape):
        wanted = "[rows, numbers]" if shape is None else list(shape)
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        strides = f", strides {x.stride()}" if x.layout == torch.strided else f", {x.layout}"
        raise ValueError(
            f"{name} must be {allowed} {wanted} on cpu with adjacent numbers in each row; "
            f"got {x.dtype} {list(x.shape)} on {x.device}{strides}"
        )


def _check_vector(name: str, x: Tensor, length: int) -> None:
    if x.shape != (length,) or x.dtype != torch.float32 or x.device.type != "cpu" or not x.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous float32 [{length}] on cpu; got {x.dtype} {list(x.shape)} on {x.device}"
        )


def _check_packed(packed: PackedWeight, library: ctypes.CDLL) -> None:
    data, in_features, out_features, terms, scale = packed
    size = library.longspan_linear_packed_bytes(in_features, out_features, terms)
    is_bytes = data.dtype == torch.uint8 and data.device.type == "cpu" and data.is_contiguous()
    if not is_bytes or data.numel() != size or data.data_ptr() % ALIGNMENT or (scale is None) == (terms == BYTES):
        raise ValueError(
            f"a weight [{out_features}, {in_features}] packed in {terms} terms is contiguous uint8 [{size}] on cpu at "
            f"a multiple of {ALIGNMENT} bytes, with a scale if it is int8; got {data.dtype} {list(data.shape)} on "
            f"{data.device} at {data.data_ptr()}; take what pack_linear gives"
        )
    if scale is not None:
        _check_vector("the scale of a weight", scale, out_features)
