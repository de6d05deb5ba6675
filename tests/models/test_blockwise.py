"""Attention layers in blocks of tokens: what a block sees, and the layer that computes all tokens at once."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from longspan.attention import DilatedSegments, Full, GlobalKeys, SlidingWindow, attend
from longspan.attention.blocks import TOKENS_AT_ONCE, cut
from longspan.models.blockwise import attend_in_blocks

HEADS, WIDTH = 4, 32
CUT = {
    "window": SlidingWindow(5, 3),
    "window_causal": SlidingWindow(6, 0),
    "window_dilated_per_head": SlidingWindow(3, 2, dilation=(1, 2, 3, 1)),
    "segments": DilatedSegments(((4, 1), (8, 2)), heads=HEADS),
    "segments_that_do_not_divide": DilatedSegments(((4, 1), (6, 3)), heads=HEADS, causal=True, offsets="interleaved"),
}
WHOLE = {
    "full": Full(),
    "global": SlidingWindow(2, 2) | GlobalKeys(torch.tensor([[True] + 52 * [False]])),
    "segments_and_window": DilatedSegments(((4, 1),), heads=HEADS) | SlidingWindow(2, 2),
    "long_segments": DilatedSegments(((64, 2),), heads=HEADS),
}


@pytest.mark.parametrize("pattern", CUT.values(), ids=CUT)
@pytest.mark.parametrize("tokens", [1, 12, 53])
def test_blocks_hold_every_token_once_and_all_that_it_sees(pattern, tokens):
    blocks = cut(pattern, tokens, at_once=13)
    assert [row for block in blocks for row in range(tokens)[block.rows]] == list(range(tokens))
    assert len(blocks) > (tokens == 53)
    zero, head = torch.zeros(1, dtype=torch.long), torch.arange(HEADS)[:, None, None]
    counts = pattern.count(zero, head, torch.arange(tokens)[:, None], torch.arange(tokens))
    seen = counts.expand(HEADS, tokens, tokens) > 0
    for block in blocks:
        hidden = seen[:, block.rows].clone()
        hidden[:, :, block.seen] = False
        assert not hidden.any()


@pytest.mark.parametrize("pattern", WHOLE.values(), ids=WHOLE)
def test_what_cannot_be_cut_is_one_block(pattern):
    assert [(block.rows, block.seen) for block in cut(pattern, 53, at_once=13)] == [(slice(0, 53), slice(0, 53))]


def layer(x, weights, compute):
    """All at once."""
    q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in F.linear(x, *weights[:2]).chunk(3, 2))
    return F.linear(compute(q, k, v).transpose(1, 2).flatten(2), *weights[2:])


def make(dtype, has_bias, tokens=53):
    torch.manual_seed(0)
    inner = HEADS * 16  # heads need not share the model width
    shapes = [(3 * inner, WIDTH), (3 * inner,), (WIDTH, inner), (WIDTH,)]
    weights = [torch.randn(shape).mul(0.2).to(dtype).requires_grad_() for shape in shapes]
    x = torch.randn(2, tokens, WIDTH).to(dtype).requires_grad_()
    return x, weights if has_bias else [weights[0], None, weights[2], None]


@pytest.mark.parametrize("pattern", CUT.values(), ids=CUT)
@pytest.mark.parametrize("has_bias", [True, False])
def test_blocks_give_what_the_layer_gives_at_once(pattern, has_bias):
    x, weights = make(torch.float64, has_bias)
    inputs = [given for given in (x, *weights) if given is not None]
    compute = partial(attend, pattern=pattern)
    expected = layer(x, weights, compute)
    actual = attend_in_blocks(x, *weights, HEADS, cut(pattern, 53, at_once=13), compute)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    grad = torch.randn_like(expected)
    for one, other in zip(*(torch.autograd.grad(y, inputs, grad) for y in (actual, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", [CUT["window"], CUT["segments"]], ids=["window", "segments"])
def test_blocks_are_as_exact_as_the_layer_at_once(pattern, dtype):
    x, weights = make(dtype, True, tokens=600)
    inputs = [x, *weights]
    exact = [given.detach().double().requires_grad_() for given in inputs]
    grad = torch.randn(2, WIDTH, 600).to(dtype).transpose(1, 2)  # rows are not adjacent
    compute = partial(attend, pattern=pattern)
    right = layer(exact[0], exact[1:], partial(attend, pattern=pattern, backend="reference"))
    rights = [right.detach(), *torch.autograd.grad(right, exact, grad.double())]
    errors = []
    for y in (attend_in_blocks(x, *weights, HEADS, cut(pattern, 600, at_once=64), compute), layer(x, weights, compute)):
        found = [y, *torch.autograd.grad(y, inputs, grad)]
        errors.append([float((one.detach() - two).norm() / two.norm()) for one, two in zip(found, rights, strict=True)])
    for ours, allowed in zip(*errors, strict=True):
        assert ours <= 2 * allowed


def test_an_input_of_any_layout_is_read():
    x, weights = make(torch.float32, True)
    x = x.detach()
    strange = x.mT.contiguous().mT
    compute, blocks = partial(attend, pattern=CUT["window"]), cut(CUT["window"], 53, at_once=13)
    with torch.no_grad():
        given, other = (attend_in_blocks(rows, *weights, HEADS, blocks, compute) for rows in (strange, x))
    assert torch.equal(given, other)


def test_blocks_work_without_our_kernels(monkeypatch):
    monkeypatch.setattr("longspan.models.linear.kernel.available", lambda: False)
    x, weights = make(torch.float32, True)
    compute, blocks = partial(attend, pattern=CUT["window"], backend="banded"), cut(CUT["window"], 53, at_once=13)
    actual, expected = attend_in_blocks(x, *weights, HEADS, blocks, compute), layer(x, weights, compute)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    one, other = (torch.autograd.grad(y.square().sum(), x)[0] for y in (actual, expected))
    assert (one - other).norm() < 1e-6 * other.norm()


def test_blocks_of_a_million_tokens_are_as_many_as_it_takes():
    longnet = DilatedSegments(((2048, 1), (32768, 12)), heads=12, causal=True)
    assert len(cut(longnet, 2**20)) == 2**20 // TOKENS_AT_ONCE
    assert {block.seen.stop - block.seen.start for block in cut(SlidingWindow(256, 256), 2**20)} == {
        TOKENS_AT_ONCE + 256,
        TOKENS_AT_ONCE + 512,
    }
