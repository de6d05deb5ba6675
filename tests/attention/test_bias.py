"""A bias by head and distance: every pattern on every backend, its gradient, its ends, and what it stands for."""

from __future__ import annotations

import pytest
import torch
from tests.attention.examples import BATCH, EXAMPLE_NAMES, HEADS, WIDTH, examples, padding
from tests.attention.test_grid import FLOOR
from torch import Tensor

from longspan.attention import DilatedSegments, DistanceBias, Full, GlobalKeys, SlidingWindow, attend, explain
from longspan.attention.attend import make_request
from longspan.attention.backends import BACKENDS, Request

TOKENS = 150
TABLES = {"both directions": (17, 5), "causal": (9, 0), "one": (1, 0), "longer than the row": (400, 170)}
Named = dict[str, Tensor]


def inputs(dtype: torch.dtype, columns: int, tokens: int = TOKENS) -> list[Tensor]:
    """q, k, v, the gradient of out and the bias, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(columns)
    rows = [torch.randn(BATCH, HEADS, tokens, WIDTH, generator=generator) for _ in range(4)]
    return [part.to(dtype) for part in (*rows, 2 * torch.randn(HEADS, columns, generator=generator))]


def results(values: list[Tensor], pattern, backend: str, ahead: int, *, gradients: bool = True, **options) -> Named:
    q, k, v, grad, table = values
    leaves = [part.clone().requires_grad_(gradients) for part in (q, k, v, table)]
    out = attend(*leaves[:3], pattern, bias=DistanceBias(leaves[3], ahead), backend=backend, **options)
    named = {"out": out}
    if gradients:
        found = torch.autograd.grad((out * grad).sum(), leaves)
        named |= zip(("grad_q", "grad_k", "grad_v", "grad_bias"), found, strict=True)
    return {name: value.detach().double() for name, value in named.items()}


def assert_right(values: list[Tensor], pattern, backend: str, ahead: int, **options) -> None:
    """At most twice as far from float64 as the reference in this dtype."""
    dtype = values[0].dtype
    actual = results(values, pattern, backend, ahead, **options)
    truth = results([value.double() for value in values], pattern, "reference", ahead, **options)
    reference = results(values, pattern, "reference", ahead, **options)
    for name, value in actual.items():
        scale = truth[name].abs().max().clamp(min=1).item()
        if name == "grad_bias":  # the errors of all rows add up in it
            scale *= TOKENS**0.5
        limit = 2 * (reference[name] - truth[name]).abs().max().item() + FLOOR[dtype] * scale
        error = (value - truth[name]).abs().max().item()
        assert error <= limit, f"{name}: error {error:.2e} is above {limit:.2e}"


def skip_unless_able(backend: str, request: Request) -> None:
    reason = next(candidate for candidate in BACKENDS if candidate.name == backend).unsupported(request)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("name", EXAMPLE_NAMES)
@pytest.mark.parametrize("backend", ["native", "segments", "banded", "sdpa"])
def test_every_pattern_on_every_backend(backend: str, name: str):
    pattern = examples(TOKENS)[name]
    candidate = next(candidate for candidate in BACKENDS if candidate.name == backend)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for number, (columns, ahead) in enumerate(TABLES.values()):
            token_mask = padding(("holes", "none", "empty_row", "ragged")[number], TOKENS)
            if dtype != torch.float32 and number > 0:
                continue
            values = inputs(dtype, columns)
            request = make_request(*values[:3], pattern, token_mask, bias=DistanceBias(values[4], ahead))
            if candidate.unsupported(request) is None:
                assert_right(values, pattern, backend, ahead, token_mask=token_mask)


@pytest.mark.parametrize("name", ["window_global", "segments", "full_causal"])
def test_flex_adds_it_too(name: str):
    values = inputs(torch.float32, 17)
    options = {"gradients": False, "token_mask": padding("empty_row", TOKENS)}
    assert_right(values, examples(TOKENS)[name], "flex", 5, **options)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "flex", "native"])
def test_distances_go_by_query_positions(backend: str):
    pattern = SlidingWindow(20, 9) | GlobalKeys(torch.arange(TOKENS).expand(BATCH, -1) == 3)
    q, k, v, _, table = inputs(torch.float32, 17)
    bias, positions = DistanceBias(table, 5), torch.tensor([149, 0, 7, 80])
    request = make_request(q[:, :, positions], k, v, pattern, query_positions=positions, bias=bias)
    skip_unless_able(backend, request)
    every = attend(q, k, v, pattern, bias=bias, backend="reference")
    some = attend(q[:, :, positions], k, v, pattern, bias=bias, query_positions=positions, backend=backend)
    torch.testing.assert_close(some, every[:, :, positions], rtol=0, atol=2e-6)


def test_alibi_is_a_table_of_distances():
    """As its paper writes it, arXiv 2108.12409: scores of head h plus -slope_h * distance."""
    q, k, v, *_ = inputs(torch.float64, 1)
    slopes, index = torch.tensor([0.5, 0.25, 0.125, 0.0625]).double(), torch.arange(TOKENS)
    scores = q @ k.mT * WIDTH**-0.5 - slopes[:, None, None] * (index[:, None] - index)
    expected = scores.masked_fill(index > index[:, None], -torch.inf).softmax(-1) @ v
    bias = DistanceBias(-slopes[:, None] * index)
    torch.testing.assert_close(attend(q, k, v, Full(causal=True), bias=bias), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["banded", "sdpa", "native"])
def test_what_is_added_to_all_scores_changes_nothing(backend: str):
    q, k, v, *_ = inputs(torch.float32, 1)
    pattern, bias = SlidingWindow(30, 30), DistanceBias(torch.full((HEADS, 1), 7.0))
    skip_unless_able(backend, make_request(q, k, v, pattern, bias=bias))
    without = attend(q, k, v, pattern, backend=backend)
    torch.testing.assert_close(attend(q, k, v, pattern, bias=bias, backend=backend), without, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.zeros(HEADS, 5), "must be a DistanceBias"),
        (DistanceBias(torch.zeros(5)), r"must be floating-point \[H=4, R\]"),
        (DistanceBias(torch.zeros(HEADS + 1, 5)), r"got torch.float32 \[5, 5\]"),
        (DistanceBias(torch.zeros(HEADS, 5).long()), "floating-point"),
        (DistanceBias(torch.zeros(HEADS, 0)), "a column for each distance"),
        (DistanceBias(torch.zeros(HEADS, 5), 5), "0 <= ahead < 5 columns; got 5"),
        (DistanceBias(torch.zeros(HEADS, 5), -1), "got -1"),
        (DistanceBias(torch.zeros(HEADS, 5, device="meta")), "is on meta but q is on cpu"),
    ],
)
def test_a_bias_that_does_not_fit_is_refused(bias, message: str):
    q, k, v, *_ = inputs(torch.float32, 1)
    with pytest.raises(ValueError, match=message):
        attend(q, k, v, Full(), bias=bias)


def test_explain_takes_it():
    q, k, v, _, table = inputs(torch.float64, 3)
    assert explain(q, k, v, DilatedSegments(((8, 1),), heads=HEADS), bias=DistanceBias(table)).backend is not None
