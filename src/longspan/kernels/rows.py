"""What stands between two matrix products, row by row: bias, rotary positions, activation, norm, rounding to 8 bits.

One pass over memory each, in fp32 whatever the operands' dtype, by the kernels of kernels/longspan_rows.h or, where
there are none, by torch. What is written may lie where what is read lies.

Shapes: T rows, C columns, H heads, D head width.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan import kernels

ZERO_POINT = 128  # oneDNN's 8-bit products take unsigned activations

# What the kernels compute, by the names that checkpoints use; the rest is left to torch.
ACTIVATIONS = {"gelu": 0, "gelu_new": 1, "gelu_pytorch_tanh": 1, "relu": 2, "silu": 3, "swish": 3}


class Bytes(NamedTuple):
    """Rows in 8 bits: (values - 128) * scale[:, None]. values: uint8 [T, C]. scale: float32 [T]."""

    values: Tensor
    scale: Tensor


class Product(NamedTuple):
    """Rows of a linear layer: y * scale[:, None] + bias. y: [T, C], float32 or bfloat16. scale: float32 [T], bias:
    float32 [C]; None: 1 and 0."""

    y: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None

    def finished(self) -> Tensor:
        """float32 [T, C], perhaps y itself."""
        wide = self.y.float() if self.scale is None else self.y * self.scale[:, None]
        return wide if self.bias is None else wide + self.bias


class Turn(NamedTuple):
    """Rotary positions of T rows. cos, sin: float32 [T, D], with equal halves. heads: as many times the first D columns
    are turned."""

    cos: Tensor
    sin: Tensor
    heads: int


class Norm(NamedTuple):
    """A layer norm over columns. weight, bias: float32 [C]."""

    weight: Tensor
    bias: Tensor | None
    eps: float


def quantize(x: Tensor, out: Bytes) -> None:
    """x [T, C] in 8 bits, each row by its largest number. A row that holds NaN or infinity keeps it in its scale."""
    library = _library()
    if library is not None:
        library.longspan_rows_copy(*x.shape, _product(Product(x)), _result(None, out, x.shape))
        return
    wide = x.float()
    torch.div(wide.abs().amax(1), 127, out=out.scale)
    out.values.copy_((wide / out.scale[:, None]).round_().add_(ZERO_POINT).nan_to_num_(ZERO_POINT, ZERO_POINT))


def finish(product: Product, out: Tensor, turn: Turn | None = None) -> None:
    """The rows of a product [T, C], with rotary positions where `turn` says, in out."""
    if product.scale is None and product.bias is None:
        if turn is None:
            if product.y is not out:
                out.copy_(product.y)
            return
        if product.y is out:  # what is not turned is there already
            out = out[:, : turn.heads * turn.cos.shape[1]]
            product = Product(out)
    library = _library()
    if library is not None:
        call, shape = _product(product), product.y.shape
        if turn is None:
            library.longspan_rows_copy(*shape, call, _result(out, None, shape))
        else:
            library.longspan_rows_rotate(*shape, call, rotary_of(turn, shape), _result(out, None, shape))
        return
    wide = product.finished()
    if turn is not None:
        turned = turn.heads * turn.cos.shape[1]
        heads = wide[:, :turned].unflatten(1, (turn.heads, -1))  # [T, heads, D]
        first, second = heads.chunk(2, -1)
        heads = heads * turn.cos[:, None] + torch.cat((-second, first), -1) * turn.sin[:, None]
        wide = torch.cat((heads.flatten(1), wide[:, turned:]), 1)
    out.copy_(wide)


def activate(
    product: Product, name: str, function: Callable[[Tensor], Tensor], out: Tensor | Bytes, *, gated: bool = False
) -> None:
    """The activation of the rows, or that of their first half times their second half, in out.

    name: as checkpoints call the activation. function: computes it where the kernels do not.
    """
    exact, quantized = (None, out) if isinstance(out, Bytes) else (out, None)
    library = _library()
    if library is not None and name in ACTIVATIONS:
        rows, width = product.y.shape
        shape = torch.Size((rows, width // 2 if gated else width))
        result = _result(exact, quantized, shape)
        library.longspan_rows_activate(*shape, _product(product), ACTIVATIONS[name], gated, result)
        return
    wide = product.finished()
    if gated:
        value, gate = wide.chunk(2, -1)
        wide = function(value) * gate
    else:
        wide = function(wide)
    if exact is not None:
        exact.copy_(wide)
    if quantized is not None:
        quantize(wide, quantized)


def add_and_norm(
    product: Product | None,
    residual: Tensor,
    norm: Norm | None,
    *,
    total: Tensor | None = None,
    out: Tensor | None = None,
    quantized: Bytes | None = None,
) -> None:
    """residual + rows of the product in `total`; its norm, or itself where norm is None, in `out` and `quantized`."""
    library = _library()
    if library is not None and norm is not None:
        added = None if product is None else residual
        call, shape = _product(product or Product(residual)), residual.shape
        result = _result(out, quantized, shape)
        library.longspan_rows_normalize(*shape, call, norm_of(norm, added, total, shape), result)
        return
    wide = residual.float() if product is None else product.finished() + residual
    if total is not None:
        total.copy_(wide)
    if norm is not None:
        wide = F.layer_norm(wide, wide.shape[1:], norm.weight, norm.bias, norm.eps)
    if out is not None:
        out.copy_(wide)
    if quantized is not None:
        quantize(wide, quantized)


class Matrix(Structure):
    _fields_ = (("data", c_void_p), ("stride", c_int64), ("dtype", c_int32))


class _Product(Structure):
    _fields_ = (("data", Matrix), ("row_scale", c_void_p), ("bias", c_void_p))


class _Result(Structure):
    _fields_ = (("out", Matrix), ("quantized", c_void_p), ("quantized_stride", c_int64), ("scale", c_void_p))


class NormCall(Structure):
    _fields_ = (
        ("residual", Matrix),
        ("sum", Matrix),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("epsilon", c_float),
    )


class RotaryCall(Structure):
    _fields_ = (
        ("heads", c_int64),
        ("head_width", c_int64),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("table_stride", c_int64),
        ("positions", c_void_p),
    )


@functools.cache
def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    product, result = POINTER(_Product), POINTER(_Result)
    for name, between in {
        "copy": (),
        "activate": (c_int32, c_int32),
        "normalize": (POINTER(NormCall),),
        "rotate": (POINTER(RotaryCall),),
    }.items():
        function = getattr(library, f"longspan_rows_{name}")
        function.argtypes = (c_int64, c_int64, product, *between, result)
        function.restype, function.errcheck = c_int, kernels.check_status
    return library


def _library() -> ctypes.CDLL | None:
    found = kernels.library()
    return None if found is None else _declared(found)


def matrix(x: Tensor | None, shape: torch.Size) -> Matrix:
    """The kernels trust addresses: nothing that does not fit comes through."""
    if x is None:
        return Matrix()
    if x.shape != shape or x.dtype not in kernels.DTYPES or x.stride(1) != 1 or x.device.type != "cpu":
        raise ValueError(
            f"rows must be float32 or bfloat16 {list(shape)} on cpu, with adjacent numbers; {_describe(x)}"
        )
    return Matrix(x.data_ptr(), x.stride(0), kernels.DTYPES[x.dtype])


def _vector(x: Tensor | None, length: int) -> int | None:
    if x is None:
        return None
    if x.shape != (length,) or x.dtype != torch.float32 or x.stride(0) != 1 or x.device.type != "cpu":
        raise ValueError(
            f"a vector beside rows must be float32 [{length}] on cpu with adjacent numbers; {_describe(x)}"
        )
    return x.data_ptr()


def _describe(x: Tensor) -> str:
    return f"got {x.dtype} {list(x.shape)} on {x.device}, strides {x.stride()}"


def _product(product: Product) -> _Product:
    rows, width = product.y.shape
    return _Product(matrix(product.y, product.y.shape), _vector(product.scale, rows), _vector(product.bias, width))


def _result(out: Tensor | None, quantized: Bytes | None, shape: torch.Size) -> _Result:
    if quantized is None:
        return _Result(matrix(out, shape))
    values, scale = quantized
    if values.shape != shape or values.dtype != torch.uint8 or values.stride(1) != 1 or values.device.type != "cpu":
        raise ValueError(f"bytes must be uint8 {list(shape)} on cpu with adjacent numbers; {_describe(values)}")
    return _Result(matrix(out, shape), values.data_ptr(), values.stride(0), _vector(scale, shape[0]))


def norm_of(norm: Norm, residual: Tensor | None, total: Tensor | None, shape: torch.Size) -> NormCall:
    width = shape[1]
    return NormCall(
        matrix(residual, shape),
        matrix(total, shape),
        _vector(norm.weight, width),
        _vector(norm.bias, width),
        norm.eps,
    )


def rotary_of(turn: Turn, shape: torch.Size) -> RotaryCall:
    width = turn.cos.shape[1]
    table = torch.Size((shape[0], width))
    cos, sin = (matrix(part, table) for part in (turn.cos, turn.sin))
    if turn.heads * width > shape[1] or cos.dtype or sin.dtype or cos.stride != sin.stride:
        raise ValueError(
            f"cos and sin must be float32 {list(table)} alike, for {turn.heads} heads within {shape[1]} columns; "
            f"cos: {_describe(turn.cos)}; sin: {_describe(turn.sin)}"
        )
    return RotaryCall(turn.heads, width, cos.data, sin.data, cos.stride, None)
