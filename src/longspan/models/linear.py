"""Linear layers for inference: a weight laid out once for the processor, in fp32, bf16 or int8.

Who multiplies: our own kernels where the processor has the instructions, else oneDNN, else torch's plain operators.
int8 is symmetric, with one scale for each row of the weight and of the input.

Shapes: T rows, K inputs, N outputs.
"""

from __future__ import annotations

import functools
import platform
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.kernels import linear as kernel
from longspan.kernels.rows import ACTIVATIONS, ZERO_POINT, Bytes, Product

# What oneDNN computes as part of a product of floating-point numbers: our name -> its name and algorithm.
_ONE_DNN_ACTIVATIONS = {
    "gelu": ("gelu", "none"),
    "gelu_new": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
    "swish": ("swish", ""),
    "tanh": ("tanh", ""),
}


class Weight(NamedTuple):
    """A matrix [N, K]: floating-point numbers or, beside a scale, int8 that stands for values * scale[:, None]."""

    values: Tensor
    scale: Tensor | None = None

    def widened(self, dtype: torch.dtype) -> Tensor:
        """[N, K] in a floating-point dtype."""
        if self.scale is None:
            return self.values.to(dtype)
        return (self.values * self.scale[:, None]).to(dtype)

    def narrowed(self) -> Weight:
        """The matrix in int8, each row by its largest number, which becomes 127 or -127."""
        if self.scale is not None:
            return self
        wide = self.widened(torch.float32)
        scale = (wide.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        return Weight((wide / scale[:, None]).round_().to(torch.int8), scale)


def fast_dtype(dtype: torch.dtype) -> torch.dtype:
    """What torch's own products of such floating-point numbers are best computed in on this processor."""
    return dtype if _one_dnn_has(dtype) else torch.float32


class Linear(Protocol):
    """A packed linear layer. It never changes, so that copies of it are itself.

    activates: whether the activation that it was made with is computed too; it is left to the caller where not.
    """

    activates: bool

    def __call__(self, x: Any, out: Tensor | None = None) -> Product:
        """Rows [T, N] of x [T, K], a tensor or `Bytes`. Where `out` is taken, it holds the product's numbers."""
        ...


def make_linear(weight: Weight, bias: Tensor | None, precision: str, activation: str | None = None) -> Linear:
    """The best linear layer that this processor and this build of torch have for a precision."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[precision]
    if kernel.available():
        return KernelLinear(weight, bias, dtype, activation)
    if dtype == torch.int8:
        return Int8Linear(weight, bias)
    return OneDnnLinear(weight, bias, dtype, activation) if _one_dnn_has(dtype) else PlainLinear(weight, bias, dtype)


class KernelLinear:
    """fp32, bf16 or int8 by our own kernels. What it gives is finished.

    Intel's tile unit multiplies bf16: there fp32 numbers are sums of three of those or, where
    torch.set_float32_matmul_precision says "high" or "medium", of two, in half the time with errors near 5e-6.
    """

    def __init__(self, weight: Weight, bias: Tensor | None, dtype: torch.dtype, activation: str | None = None):
        if dtype == torch.int8:
            values, scale = weight.narrowed()
            self.packed = kernel.pack_linear(values, scale=None if scale is None else scale.clone())
        else:
            exact = 3 if torch.get_float32_matmul_precision() == "highest" else 2
            self.packed = kernel.pack_linear(weight.widened(dtype), terms=exact if dtype == torch.float32 else 1)
        self.bias = None if bias is None else bias.to(torch.float32, copy=True)
        self.activates = activation in ACTIVATIONS
        self.activation = activation if self.activates else None

    def __call__(self, x: Tensor | Bytes, out: Tensor | None = None) -> Product:
        if out is None:
            return Product(kernel.linear(x, self.packed, self.bias, activation=self.activation))
        return Product(kernel.linear_unchecked(x, self.packed, self.bias, self.activation, out))

    def __deepcopy__(self, memo: dict[int, Any]) -> KernelLinear:
        return self


class OneDnnLinear:
    """fp32 or bf16 by oneDNN, which chooses where the result lies."""

    def __init__(self, weight: Weight, bias: Tensor | None, dtype: torch.dtype, activation: str | None = None):
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.widened(dtype))
        self.bias = None if bias is None else bias.to(dtype, copy=True)
        self.activates = activation in _ONE_DNN_ACTIVATIONS
        self.activation = activation if self.activates else None

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Product:
        name, algorithm = ("none", "") if self.activation is None else _ONE_DNN_ACTIVATIONS[self.activation]
        return Product(torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, name, [], algorithm))

    def __deepcopy__(self, memo: dict[int, Any]) -> OneDnnLinear:
        return self

    def __reduce__(self):  # what oneDNN laid out cannot be pickled
        dense = self.packed.to_dense()
        return OneDnnLinear, (Weight(dense), self.bias, dense.dtype, self.activation)


class PlainLinear:
    """fp32 or bf16 by torch's own operator, in fp32: bf16 takes it ten times as long where oneDNN has none."""

    activates = False

    def __init__(self, weight: Weight, bias: Tensor | None, dtype: torch.dtype):
        self.weight = weight.widened(dtype).clone()
        self.bias = None if bias is None else bias.to(dtype, copy=True)
        self._dtype = torch.float32 if dtype == torch.bfloat16 else dtype

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Product:
        bias = None if self.bias is None else self.bias.to(self._dtype)
        return Product(F.linear(x.to(self._dtype), self.weight.to(self._dtype), bias).to(self.weight.dtype))

    def __deepcopy__(self, memo: dict[int, Any]) -> PlainLinear:
        return self


class Int8Linear:
    """int8 by oneDNN, else as fp32 numbers: torch's own product of bytes is fifty times slower. What it gives is not
    finished: see `Product`."""

    activates = False

    def __init__(self, weight: Weight, bias: Tensor | None):
        self.bias = None if bias is None else bias.to(torch.float32, copy=True)
        values, scale = weight.narrowed()
        assert scale is not None
        self.scale = scale.clone()
        self.is_one_dnn = _one_dnn_has(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(values, None) if self.is_one_dnn else values.clone()
        self._one, self._zero_point = torch.ones(1), torch.full((1,), ZERO_POINT)
        self._zeros = torch.zeros(len(scale), dtype=torch.long)

    def __call__(self, x: Bytes, out: Tensor | None = None) -> Product:
        if self.is_one_dnn:
            y = torch.ops.onednn.qlinear_pointwise.tensor(
                *(x.values, self._one, self._zero_point, self.packed, self.scale, self._zeros, None),
                *(1.0, 0, torch.bfloat16, "none", [], ""),
            )
        else:
            y = F.linear(x.values.float() - ZERO_POINT, self.packed.float()) * self.scale
        return Product(y, x.scale, self.bias)

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Linear:
        return self

    def __reduce__(self):
        values = self.packed.to_dense().t().contiguous() if self.is_one_dnn else self.packed
        return Int8Linear, (Weight(values, self.scale), self.bias)


@functools.cache
def _one_dnn_has(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies such numbers by instructions made for them: without, it is slower than fp32 by far."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.int8:
        processor = getattr(torch.cpu, "get_capabilities", dict)()
        return _is_x86() and any(processor.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")
