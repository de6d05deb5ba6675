"""The row kernels and torch's operators in their place give the same."""

import pytest
import torch
import torch.nn.functional as F

from longspan import kernels
from longspan.kernels import rows
from longspan.kernels.rows import Bytes, Norm, Product, Turn

T, C = 7, 37


@pytest.fixture(params=["kernels", "torch"])
def _who(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(kernels, "library", lambda: None)
    elif kernels.library() is None:
        pytest.skip(str(kernels.problem()))


pytestmark = pytest.mark.usefixtures("_who")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(width=C, dtype=torch.float32):
    return Product(drawn(T, width).to(dtype), drawn(T, seed=1).abs(), drawn(width, seed=2))


def empty_bytes(width=C):
    return Bytes(torch.empty(T, width, dtype=torch.uint8), torch.empty(T))


def widened(given):
    return (given.values.float() - 128) * given.scale[:, None]


def half_a_step(given):
    return given.scale[:, None] * 0.501


def test_rows_are_quantized_by_their_largest_number():
    x, out = drawn(T, C), empty_bytes()
    x[2] = 0
    rows.quantize(x, out)
    torch.testing.assert_close(out.scale, x.abs().amax(1) / 127)
    known = torch.arange(T) != 2
    assert ((widened(out) - x).abs() <= half_a_step(out))[known].all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_stay_so(bad):
    x, out = drawn(T, C), empty_bytes()
    x[3, 5] = bad
    rows.quantize(x, out)
    assert not out.scale[3].isfinite() and out.scale[[0, 1, 2, 4, 5, 6]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_finished(dtype):
    given, out = product(dtype=dtype), torch.empty(T, 2 * C)[:, :C]
    rows.finish(given, out)
    torch.testing.assert_close(out, given.y.float() * given.scale[:, None] + given.bias)
    rows.finish(Product(given.y), out)
    assert torch.equal(out, given.y.float())


@pytest.mark.parametrize("in_place", [False, True])
def test_the_first_heads_are_turned_by_their_rows_position(in_place):
    y, angles = drawn(T, 3 * 8), drawn(T, 4, seed=3)
    angles = torch.cat((angles, angles), 1)
    out = y.clone() if in_place else torch.empty(T, 24)
    rows.finish(Product(out if in_place else y), out, Turn(angles.cos(), angles.sin(), 2))
    heads = torch.view_as_complex(y[:, :16].view(T, 2, 2, 4).transpose(2, 3).contiguous())
    turned = torch.view_as_real(heads * torch.polar(torch.ones(T, 1, 4), angles[:, None, :4])).transpose(2, 3)
    torch.testing.assert_close(out, torch.cat((turned.flatten(1), y[:, 16:]), 1))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("name", "function"), [("gelu", F.gelu), ("relu", F.relu), ("silu", F.silu), ("tanh", torch.tanh)]
)
def test_activations(name, function, gated):
    given = product(2 * C if gated else C)
    value = given.finished()
    expected = function(value[:, :C]) * value[:, C:] if gated else function(value)
    out, quantized = torch.empty(T, C), empty_bytes()
    rows.activate(given, name, function, out, gated=gated)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    rows.activate(given, name, function, quantized, gated=gated)
    assert ((widened(quantized) - expected).abs() <= half_a_step(quantized) + 1e-6).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("given", [product(), None])
def test_sum_and_norm(given, bias):
    residual, norm = drawn(T, C, seed=4), Norm(drawn(C, seed=5), drawn(C, seed=6) if bias else None, 1e-5)
    added = residual + (0 if given is None else given.finished())
    total, out, quantized = residual.clone(), torch.empty(T, C, dtype=torch.bfloat16), empty_bytes()
    rows.add_and_norm(given, total, norm, total=total, out=out, quantized=quantized)
    expected = F.layer_norm(added, (C,), norm.weight, norm.bias, 1e-5)
    torch.testing.assert_close(total, added)
    torch.testing.assert_close(out, expected.bfloat16(), rtol=1e-2, atol=1e-5)
    assert ((widened(quantized) - expected).abs() <= half_a_step(quantized) + 1e-5).all()


def test_without_a_norm_the_sum_is_the_result():
    given, residual, out, quantized = product(), drawn(T, C, seed=4), torch.empty(T, C), empty_bytes()
    rows.add_and_norm(given, residual, None, out=out, quantized=quantized)
    torch.testing.assert_close(out, given.finished() + residual)
    assert ((widened(quantized) - out).abs() <= half_a_step(quantized)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: rows.finish(product(), torch.empty(T, C + 1)),
            r"rows must be .*\[7, 37\].*got torch.float32 \[7, 38\]",
        ),
        (lambda: rows.finish(product(), torch.empty(C, T).t()), "with adjacent numbers; .*strides"),
        (lambda: rows.finish(product(dtype=torch.float64), torch.empty(T, C)), "float32 or bfloat16"),
        (lambda: rows.finish(product()._replace(bias=torch.ones(C + 1)), torch.empty(T, C)), r"float32 \[37\] on cpu"),
        (lambda: rows.quantize(drawn(T, C), empty_bytes(C + 1)), r"bytes must be uint8 \[7, 37\]"),
        (
            lambda: rows.finish(product(), torch.empty(T, C), Turn(torch.ones(T, 8), torch.ones(T, 8), 5)),
            "for 5 heads within 37 columns",
        ),
    ],
)
def test_what_does_not_fit_never_reaches_the_kernels(call, message):
    if kernels.library() is None:
        pytest.skip("torch checks for itself")
    with pytest.raises(ValueError, match=message):
        call()
