"""A linear layer that learns: torch's own, but for float32 on processors where torch's matrix products are slow.

torch hands float32 products to MKL, which on another maker's AVX-512 processor computes with vectors of half the width.
oneDNN, which torch has as well, computes with whole ones.

Shapes: T rows, K inputs, N outputs.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LEAST_WORK = 1 << 22  # T * K * N: below it, oneDNN's preparation takes longer than the product (measured on Zen 5)
ROWS_AT_ONCE = 256  # of the sum over rows that a weight's gradient is: longer ones are less exact, and no faster


class TrainedLinear(nn.Linear):
    """nn.Linear, with its weights and their names. By oneDNN it can be differentiated once, not twice."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K], weight [N, K], bias [N] -> [..., N]: as torch.nn.functional.linear."""
    if (
        x.dtype == weight.dtype == torch.float32
        and x.is_cpu
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and x.numel() * len(weight) >= LEAST_WORK
        and one_dnn_is_faster()
    ):
        return _OneDnnLinear.apply(x, weight, bias)  # type: ignore[return-value]
    return nn.functional.linear(x, weight, bias)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """[N, K]: of a weight, from the gradient [T, N] of what it made of x [T, K]. For who differentiates by hand."""
    if x.dtype == torch.float32 and x.is_cpu and grad.shape[1] * x.numel() >= LEAST_WORK and one_dnn_is_faster():
        return _sum_over_rows(grad, x)
    return grad.t() @ x


@functools.cache
def one_dnn_is_faster() -> bool:
    """Whether torch computes with MKL, on an AVX-512 processor of another maker than Intel, and has oneDNN as well."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        described = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and "GenuineIntel" not in described


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows, grad_rows = x.flatten(0, -2), grad.flatten(0, -2)  # [T, K], [T, N]
        return (
            _product(grad, weight.t()) if for_x else None,
            _sum_over_rows(grad_rows, rows) if for_weight else None,
            grad_rows.sum(0) if for_bias else None,
        )


def _sum_over_rows(grad: Tensor, x: Tensor) -> Tensor:
    """[N, K] for [T, N] and [T, K]"""
    parts = zip(grad.split(ROWS_AT_ONCE), x.split(ROWS_AT_ONCE), strict=True)
    products = (_product(part.t(), x_part.t()) for part, x_part in parts)
    total = next(products)
    for product in products:
        total.add_(product)
    return total


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
