"""Every pattern on every backend: values and gradients against the definition in float64."""

from __future__ import annotations

import functools

import pytest
import torch
from tests.attention.examples import BATCH, EXAMPLE_NAMES, HEADS, WIDTH, examples, padding
from torch import Tensor

from longspan import kernels
from longspan.attention import PATTERNS, Pattern, attend
from longspan.attention.attend import make_request
from longspan.attention.backends import BACKENDS

LENGTHS = (1, 53, 64, 100)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
# Beside twice the error of the reference, a result may be off by this much of the largest value: one rounding in
# bfloat16, where the reference rounds once at its end and others also before their matrix products.
FLOOR = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 2**-7}


def inputs(tokens: int, dtype: torch.dtype, queries: int | None = None) -> list[Tensor]:
    """q, k, v, and the gradient of out; rounded to `dtype`, so that the float64 truth sees the same numbers."""
    generator = torch.Generator().manual_seed(tokens)
    rows = (queries or tokens, tokens, tokens, queries or tokens)
    shapes = [(BATCH, HEADS, number, WIDTH) for number in rows]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def results(values: list[Tensor], pattern: Pattern, backend: str, gradients: bool, **options) -> dict[str, Tensor]:
    """out, lse where the backend can give it, and the gradients of q, k and v."""
    leaves = [value.clone().requires_grad_(gradients) for value in values[:3]]
    candidate = next(candidate for candidate in BACKENDS if candidate.name == backend)
    gives_lse = candidate.unsupported(make_request(*leaves, pattern, return_lse=True, **options)) is None
    named: dict[str, Tensor] = {}
    if gives_lse:
        named["out"], named["lse"] = attend(*leaves, pattern, backend=backend, return_lse=True, **options)
        assert named["lse"].dtype == torch.promote_types(values[0].dtype, torch.float32)
    else:
        named["out"] = attend(*leaves, pattern, backend=backend, **options)
    assert named["out"].dtype == values[0].dtype
    if gradients:
        gradient = torch.autograd.grad((named["out"] * values[3]).sum(), leaves)
        named |= zip(("grad_q", "grad_k", "grad_v"), gradient, strict=True)
    return {name: value.detach().double() for name, value in named.items()}


@functools.cache
def expected(name: str, tokens: int, pad: str, dtype: torch.dtype, truth: bool) -> dict[str, Tensor]:
    """The reference on inputs rounded to `dtype`, computed in float64 (the truth) or in `dtype`."""
    values = [value.to(torch.float64 if truth else dtype) for value in inputs(tokens, dtype)]
    return results(values, examples(tokens)[name], "reference", True, token_mask=padding(pad, tokens))


def assert_matches(actual: dict[str, Tensor], truth: dict[str, Tensor], reference: dict[str, Tensor], dtype) -> None:
    for name, value in actual.items():
        finite = truth[name].isfinite()
        assert torch.equal(value.isfinite(), finite), f"{name}: not finite in the same places"
        if not finite.any():
            continue
        scale = truth[name][finite].abs().max().clamp(min=1).item()
        limit = 2 * (reference[name] - truth[name])[finite].abs().max().item() + FLOOR[dtype] * scale
        error = (value - truth[name])[finite].abs().max().item()
        assert error <= limit, f"{name}: error {error:.2e} is above {limit:.2e}"


def test_every_pattern_has_an_example():
    described = {part["type"] for pattern in examples(8).values() for part in _types(pattern.to_dict())}
    assert described == set(PATTERNS)


def _types(description: dict) -> list[dict]:
    return [description, *(part for inner in description.get("parts", ()) for part in _types(inner))]


@pytest.mark.parametrize("pad", ["none", "ragged", "empty_row"])
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("name", EXAMPLE_NAMES)
@pytest.mark.parametrize("backend", [candidate.name for candidate in BACKENDS if candidate.name != "flex"])
def test_backend_matches_the_definition(backend: str, name: str, tokens: int, pad: str):
    for dtype in DTYPES:
        values = inputs(tokens, dtype)
        pattern, token_mask = examples(tokens)[name], padding(pad, tokens)
        candidate = next(candidate for candidate in BACKENDS if candidate.name == backend)
        request = make_request(*values[:3], pattern, token_mask)
        if candidate.unsupported(request) is not None:
            with pytest.raises(NotImplementedError, match="never falls back"):
                attend(*values[:3], pattern, token_mask=token_mask, backend=backend)
            continue
        actual = results(values, pattern, backend, True, token_mask=token_mask)
        truth, reference = (expected(name, tokens, pad, dtype, wide) for wide in (True, False))
        assert_matches(actual, truth, reference, dtype)
        if token_mask is not None:
            assert not actual["out"].transpose(1, 2)[~token_mask].any(), "padded rows must be exactly 0"


@pytest.mark.parametrize("name", EXAMPLE_NAMES)
def test_flex_matches_the_definition(name: str):
    """Without gradients, which torch cannot give on cpu, and for few shapes: each call is traced anew."""
    tokens, pad, dtype = 53, "empty_row", torch.float32
    actual = results(inputs(tokens, dtype), examples(tokens)[name], "flex", False, token_mask=padding(pad, tokens))
    truth, reference = (expected(name, tokens, pad, dtype, wide) for wide in (True, False))
    assert_matches(actual, truth, reference, dtype)


SOME_ROWS = [
    (backend, name)
    for backend in ("reference", "sdpa", "flex")
    for name in ("full_causal", "window_global", "segments")
]
SOME_ROWS += [("native", name) for name in ("full_causal", "window", "window_global", "window_global_causal", "global")]


@pytest.mark.parametrize(("backend", "name"), SOME_ROWS)
@pytest.mark.parametrize("per_row", [False, True])
def test_some_query_rows_equal_the_same_rows_of_all(backend: str, name: str, per_row: bool):
    if backend == "native" and kernels.library() is None:
        pytest.skip(str(kernels.problem()))
    tokens, dtype = 53, torch.float32 if backend == "native" else torch.float64
    token_mask, pattern = padding("ragged", tokens), examples(tokens)[name]
    positions = torch.tensor([[52, 0, 7, 8, 30], [1, 2, 40, 51, 52]]) if per_row else torch.tensor([52, 0, 7, 8, 30])
    q, k, v, *_ = inputs(tokens, dtype)
    rows = positions if per_row else positions.expand(BATCH, -1)
    some = q.gather(2, rows[:, None, :, None].expand(-1, HEADS, -1, WIDTH))
    out = attend(some, k, v, pattern, token_mask=token_mask, query_positions=positions, backend=backend)
    every = attend(q, k, v, pattern, token_mask=token_mask, backend="reference")
    atol = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(out, every.gather(2, rows[:, None, :, None].expand_as(out)), rtol=0, atol=atol)


@pytest.mark.parametrize("name", [name for name in EXAMPLE_NAMES if not name.startswith("full")])
def test_nothing_is_seen_beyond_reach_except_extra_keys(name: str):
    tokens = 53
    pattern = examples(tokens)[name]
    reach, extra = pattern.reach(), pattern.extra_keys()
    if reach is None:
        return
    q, k, v, *_ = inputs(tokens, torch.float32)
    seen = (make_request(q, k, v, pattern).dense_count() > 0).expand(BATCH, HEADS, tokens, tokens)
    distance = torch.arange(tokens) - torch.arange(tokens)[:, None]
    near = (distance >= -reach.before) & (distance <= reach.after) & (distance % max(reach.step, 1) == 0)
    allowed = near.expand_as(seen) if extra is None else near | extra[:, None, None, :]
    assert not (seen & ~allowed).any()


@pytest.mark.parametrize("name", EXAMPLE_NAMES)
def test_shift_invariant_patterns_count_by_distance_away_from_extra_keys(name: str):
    tokens = 53
    pattern = examples(tokens)[name]
    if not pattern.shift_invariant():
        return
    q, k, v, *_ = inputs(tokens, torch.float32)
    count = make_request(q, k, v, pattern).dense_count().long().expand(BATCH, HEADS, tokens, tokens)
    extra = pattern.extra_keys()
    ordinary = torch.ones(BATCH, tokens, dtype=torch.bool) if extra is None else ~extra
    for distance in range(-tokens + 1, tokens):
        line = count.diagonal(distance, dim1=2, dim2=3)  # [B, H, positions]
        keys = ordinary[:, max(0, distance) : max(0, distance) + line.shape[2]]
        for head in range(HEADS):
            assert line[:, head][keys].unique().numel() <= 1


@pytest.mark.parametrize("name", EXAMPLE_NAMES)
def test_patterns_know_whether_they_look_ahead(name: str):
    pattern, tokens = examples(53)[name], 53
    count = make_request(*inputs(tokens, torch.float32)[:3], pattern).dense_count()
    ahead = torch.arange(tokens) > torch.arange(tokens)[:, None]
    assert pattern.looks_ahead() == bool((count * ahead).any())
