import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from longspan.kernels import linear as kernel
from longspan.kernels import rows
from longspan.kernels.rows import Bytes
from longspan.models import linear
from longspan.models.linear import Int8Linear, KernelLinear, OneDnnLinear, PlainLinear, Weight, make_linear

needs_kernel = pytest.mark.skipif(not kernel.available(), reason="this CPU or its library has no linear layers")
needs_one_dnn = pytest.mark.skipif(not linear._one_dnn_has(torch.int8), reason="torch has no oneDNN for this CPU")
FLOATS = [
    pytest.param(KernelLinear, marks=needs_kernel),
    pytest.param(OneDnnLinear, marks=needs_one_dnn),
    PlainLinear,
]


def drawn(outputs=72, inputs=26):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator)


def in_8_bits(x):
    out = Bytes(torch.empty(x.shape, dtype=torch.uint8), torch.empty(len(x)))
    rows.quantize(x, out)
    return out


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("number", [1, 16, 37])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("kind", FLOATS)
def test_floating_point_layers_equal_float64(kind, dtype, tolerance, number):
    weight, bias = drawn()
    x = torch.randn(number, 26, generator=torch.Generator().manual_seed(1))
    expected = F.linear(x.double(), weight.double(), bias.double())
    assert relative_error(kind(Weight(weight), bias, dtype)(x.to(dtype)).finished(), expected) < tolerance
    expected = F.linear(x.double(), weight.double())
    assert relative_error(kind(Weight(weight), None, dtype)(x.to(dtype)).finished(), expected) < tolerance


@needs_kernel
def test_torchs_high_matmul_precision_takes_two_bf16_numbers_for_a_float32():
    weight, bias = drawn()
    x = torch.randn(64, 26, generator=torch.Generator().manual_seed(1))
    expected = F.linear(x.double(), weight.double(), bias.double())
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        high = make_linear(Weight(weight), bias, "fp32")
    finally:
        torch.set_float32_matmul_precision(before)
    assert relative_error(high(x).finished(), expected) < 1e-5


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "relu", "silu", "tanh", None])
@pytest.mark.parametrize("kind", FLOATS[:2])
def test_an_activation_is_in_the_product_or_left_to_the_caller(kind, name):
    weight, bias = drawn()
    x = torch.randn(9, 26, generator=torch.Generator().manual_seed(1))
    layer = kind(Weight(weight), bias, torch.float32, name)
    functions = {"gelu": F.gelu, "gelu_new": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu, "silu": F.silu}
    function = (functions | {"tanh": torch.tanh}).get(name) if layer.activates else None
    expected = F.linear(x, weight, bias)
    assert torch.allclose(layer(x).finished(), function(expected) if function else expected, atol=1e-5)


@pytest.mark.parametrize("one_dnn", [pytest.param(True, marks=needs_one_dnn), False])
def test_int8_errs_by_its_roundings_only(one_dnn, monkeypatch):
    monkeypatch.setattr(linear, "_one_dnn_has", lambda dtype: one_dnn)
    weight, bias = drawn(64, 384)
    x = torch.randn(37, 384, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 37)[:, None]
    found = Int8Linear(Weight(weight), bias)(in_8_bits(x)).finished()
    expected = F.linear(x.double(), weight.double(), bias.double())
    by_row = (found.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert by_row.max() < 2e-2  # rows a million times larger than others lose nothing to them


@needs_one_dnn
def test_both_ways_of_int8_give_the_same(monkeypatch):
    weight, bias = drawn()
    x = in_8_bits(torch.randn(37, 26, generator=torch.Generator().manual_seed(1)))
    one_dnn = Int8Linear(Weight(weight), bias)(x).finished()
    monkeypatch.setattr(linear, "_one_dnn_has", lambda dtype: False)
    assert (
        relative_error(Int8Linear(Weight(weight), bias)(x).finished(), one_dnn.double()) < 4e-3
    )  # y is rounded to bf16


def test_narrowed_rows_use_the_whole_range_and_widen_to_within_half_a_step():
    weight, _ = drawn()
    weight[3] = 0
    values, scale = Weight(weight).narrowed()
    assert values.dtype == torch.int8
    assert (values.abs().amax(1)[scale > 1e-30] == 127).all()
    assert ((values * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()
    again = Weight(values, scale).narrowed()
    assert again.values is values and again.scale is scale


@pytest.mark.parametrize("kind", [*FLOATS, Int8Linear])
def test_layers_are_pickled_and_their_copies_are_themselves(kind):
    weight, bias = drawn()
    x = torch.randn(9, 26, generator=torch.Generator().manual_seed(1))
    layer = kind(Weight(weight), bias) if kind is Int8Linear else kind(Weight(weight), bias, torch.bfloat16)
    x = in_8_bits(x) if kind is Int8Linear else x.bfloat16()
    assert copy.deepcopy(layer) is layer
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x).finished(), layer(x).finished())


def test_the_best_layer_there_is_is_made(monkeypatch):
    weight, bias = drawn()
    monkeypatch.setattr(kernel, "available", lambda: False)
    assert isinstance(make_linear(Weight(weight), bias, "int8"), Int8Linear)
    monkeypatch.setattr(linear, "_one_dnn_has", lambda dtype: True)
    assert isinstance(make_linear(Weight(weight), bias, "fp32"), OneDnnLinear)
    monkeypatch.setattr(linear, "_one_dnn_has", lambda dtype: False)
    assert isinstance(make_linear(Weight(weight), bias, "bf16"), PlainLinear)


@needs_kernel
def test_our_kernels_take_all_precisions_and_writes_where_the_caller_says():
    weight, bias = drawn()
    x = torch.randn(9, 26, generator=torch.Generator().manual_seed(1))
    expected = F.linear(x.double(), weight.double(), bias.double())
    for precision, given, tolerance in (("fp32", x, 1e-6), ("bf16", x.bfloat16(), 5e-3), ("int8", in_8_bits(x), 2e-2)):
        layer = make_linear(Weight(weight), bias, precision)
        assert isinstance(layer, KernelLinear)
        out = torch.empty(9, 72, dtype=torch.bfloat16 if precision == "int8" else given.dtype)
        assert layer(given, out).y is out
        assert relative_error(out, expected) < tolerance
