"""Linear layers against float64, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan import kernels
from longspan.kernels.linear import PackedWeight, available, linear, pack_linear
from longspan.kernels.rows import ACTIVATIONS, ZERO_POINT, Bytes

needs_linear = pytest.mark.skipif(not available(), reason="this CPU or its library has no linear layers")
FUNCTIONS = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}


@pytest.fixture(autouse=True)
def _inference():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def error(result: Tensor, exact: Tensor) -> float:
    """Of the whole, relative."""
    return float((result.double() - exact).norm() / exact.norm())


def layer(rows: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.randn(out_features, in_features) * 0.02
    return torch.randn(rows, in_features), weight, torch.randn(out_features)


@needs_linear
@pytest.mark.parametrize(
    ("rows", "in_features", "out_features"), [(1, 1, 1), (5, 33, 70), (64, 384, 96), (9, 2100, 40)]
)
def test_three_terms_are_at_least_as_exact_as_torch(rows: int, in_features: int, out_features: int):
    x, weight, bias = layer(rows, in_features, out_features)
    exact = F.linear(x.double(), weight.double(), bias.double())
    own = error(linear(x, pack_linear(weight), bias), exact)
    assert own <= 1.5 * error(F.linear(x, weight, bias), exact) + 1e-7


@needs_linear
@pytest.mark.parametrize(("terms", "most"), [(1, 4e-3), (2, 7e-6), (3, 4e-7)])
def test_each_term_adds_eight_bits_or_more(terms: int, most: float):
    x, weight, _ = layer(50, 384, 70)
    own = error(linear(x, pack_linear(weight, terms=terms)), F.linear(x.double(), weight.double()))
    assert own < most
    library = kernels.library()
    assert library is not None
    # Where fp32 numbers are multiplied as they are two are as good as three, and one, too, without products of bf16.
    if terms == 3 or (terms == 1 and library.longspan_instruction_set() in (b"avx512_bf16", b"amx")):
        assert own > most / 10


@needs_linear
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_comes_before_the_residual(name: str):
    x, weight, bias = layer(20, 64, 45)
    residual = torch.randn(20, 45)
    result = linear(x, pack_linear(weight * 10), bias, activation=name, residual=residual)
    exact = FUNCTIONS[name](F.linear(x.double(), weight.double() * 10, bias.double())) + residual
    assert error(result, exact) < 4e-7


@needs_linear
def test_bfloat16_layers_round_once():
    x, weight, bias = layer(40, 200, 50)
    x, weight = x.bfloat16(), weight.bfloat16()
    exact = F.linear(x.double(), weight.double(), bias.double())
    packed = pack_linear(weight, terms=1)
    assert error(linear(x, packed, bias), exact) < 3e-3
    assert error(linear(x, packed, bias, dtype=torch.float32), exact) < 4e-7


@needs_linear
@pytest.mark.parametrize("in_features", [1, 100, 2200])
def test_int8_layers_are_exact_but_for_the_last_sum(in_features: int):
    values = torch.randint(0, 256, (37, in_features), dtype=torch.uint8)
    weight = torch.randint(-128, 128, (45, in_features), dtype=torch.int8)
    x, scale, bias = Bytes(values, torch.rand(37) + 0.5), torch.rand(45) / in_features, torch.randn(45)
    result = linear(x, pack_linear(weight, scale=scale), bias, activation="relu")
    wide = (values.double() - ZERO_POINT) * x.scale[:, None]
    assert error(result, F.relu(F.linear(wide, weight * scale.double()[:, None], bias.double()))) < 2e-7


@needs_linear
def test_rows_may_lie_apart_and_the_result_where_the_residual_is():
    x, weight, _ = layer(30, 64, 48)
    wide = torch.full((30, 100), torch.nan)
    wide[:, 20:84] = x
    out = torch.full((30, 60), torch.nan)
    out[:, 5:53] = residual = torch.randn(30, 48)
    place = out[:, 5:53]
    assert linear(wide[:, 20:84], pack_linear(weight), residual=place, out=place) is place
    torch.testing.assert_close(place, F.linear(x, weight) + residual)
    assert out[:, :5].isnan().all()
    assert out[:, 53:].isnan().all()


@needs_linear
@pytest.mark.parametrize("shape", [(0, 8, 4), (1, 8, 4), (3, 1, 1)])
def test_smallest_shapes(shape: tuple[int, int, int]):
    x, weight, bias = layer(*shape)
    torch.testing.assert_close(linear(x, pack_linear(weight), bias), F.linear(x, weight, bias))


@needs_linear
def test_results_do_not_depend_on_threads():
    x, weight, bias = layer(200, 100, 600)
    packed, threads = pack_linear(weight), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = linear(x, packed, bias)
        torch.set_num_threads(3)
        assert torch.equal(linear(x, packed, bias), alone)
    finally:
        torch.set_num_threads(threads)


X, WEIGHT = torch.ones(3, 8), torch.ones(4, 8)
X_BYTES = Bytes(torch.ones(3, 8, dtype=torch.uint8), torch.ones(3))
BAD_OPERANDS = {
    "x must be float32 or bfloat16": {"x": X.double()},
    r"got torch.float32 \[3, 1, 8\]": {"x": X[:, None]},
    "on meta": {"x": X.to("meta")},
    r"strides \(1, 3\)": {"x": torch.ones(8, 3).T},
    "sparse": {"x": X.to_sparse()},
    "x has 7 numbers in a row, but the weight was packed for 8": {"x": X[:, :7]},
    "packed in 3 terms; pack it with terms=1": {"x": X.bfloat16()},
    r"bias must be contiguous float32 \[4\]": {"bias": torch.ones(4).double()},
    "bias must be": {"bias": torch.ones(8)[::2]},
    "activation is 'mish'; allowed are gelu,": {"activation": "mish"},
    r"residual must be float32 or bfloat16 \[3, 4\]": {"residual": torch.ones(3, 5)},
    "residual is torch.bfloat16, but the result is torch.float32": {"residual": torch.ones(3, 4).bfloat16()},
    "out must be float32 or bfloat16": {"out": torch.ones(4, 4)},
    "out must be": {"dtype": torch.float16},
    "x is bytes; a weight takes rows in bytes if, and only if": {"x": X_BYTES},
    "rows of out overlap": {"out": torch.ones(4).expand(3, 4)},
}


@needs_linear
@pytest.mark.parametrize("message", BAD_OPERANDS)
def test_operands_that_do_not_fit_are_refused(message: str):
    operands = {"x": X, "packed": pack_linear(WEIGHT), **BAD_OPERANDS[message]}
    with pytest.raises(ValueError, match=message):
        linear(**operands)


@needs_linear
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X, "x is torch.float32; a weight takes rows in bytes"),
        (Bytes(X, X_BYTES.scale), r"x must be uint8 \[rows, numbers\]"),
        (Bytes(X_BYTES.values, torch.ones(4)), r"the scale of x must be contiguous float32 \[3\]"),
    ],
)
def test_rows_that_do_not_fit_int8_weights_are_refused(x: Tensor | Bytes, message: str):
    packed = pack_linear(WEIGHT.to(torch.int8), scale=torch.ones(4))
    with pytest.raises(ValueError, match=message):
        linear(x, packed)


@needs_linear
def test_what_asks_for_gradients_is_refused():
    with torch.inference_mode(False), torch.enable_grad(), pytest.raises(ValueError, match="gives no gradients"):
        linear(torch.ones(3, 8, requires_grad=True), pack_linear(torch.ones(4, 8)))


@needs_linear
@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (WEIGHT.half(), {}, "weight must be float32 or bfloat16 or int8"),
        (WEIGHT[0], {}, "weight must be"),
        (WEIGHT, {"terms": 4}, "terms is 4; allowed are 1"),
        (WEIGHT[:0], {}, r"weight is \[0, 8\]"),
        (WEIGHT, {"scale": torch.ones(4)}, "an int8 weight, and no other, needs the scale"),
        (WEIGHT.to(torch.int8), {}, "weight is torch.int8, scale is None"),
        (WEIGHT.to(torch.int8), {"scale": torch.ones(8)}, r"scale must be contiguous float32 \[4\]"),
    ],
)
def test_weights_that_no_layer_has_are_refused(weight: Tensor, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        pack_linear(weight, **options)


@needs_linear
@pytest.mark.parametrize("change", [{"out_features": 40}, {"terms": 9}, {"data": X}, {"scale": X}])
def test_packed_weights_that_are_not_are_refused(change: dict[str, Any]):
    packed: PackedWeight = pack_linear(WEIGHT)._replace(**change)
    with pytest.raises(ValueError, match="take what pack_linear gives"):
        linear(X, packed)


@pytest.mark.skipif(kernels.library() is None, reason=str(kernels.problem()))
def test_other_instruction_sets_say_what_to_do():
    library = kernels.library()
    assert library is not None
    best = library.longspan_instruction_set()
    assert library.longspan_use_instruction_set(b"baseline") == 0
    try:
        assert not available()
        for call in (lambda: pack_linear(WEIGHT), lambda: linear(X, PackedWeight(X, 8, 4, 3))):
            with pytest.raises(
                NotImplementedError,
                match="need the instruction set avx2 or better, but the kernels use baseline",
            ):
                call()
    finally:
        library.longspan_use_instruction_set(best)


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "library", lambda: None)
    monkeypatch.setattr(kernels, "problem", lambda: "the compiled kernels are not installed")
    assert not available()
    with pytest.raises(NotImplementedError, match="the compiled kernels are not installed"):
        pack_linear(WEIGHT)
