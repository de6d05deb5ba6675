"""What attention must do whatever the numbers are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tests.attention.examples import BATCH, HEADS, WIDTH, examples, padding
from torch import Tensor

from longspan.attention import PATTERNS, DilatedSegments, Full, GlobalKeys, Pattern, Reach, SlidingWindow, attend
from longspan.attention.attend import make_request
from longspan.attention.backends import BACKENDS

TOKENS = 150  # long enough for blocks in the middle of a band
CAUSAL = ("full_causal", "window_causal", "window_global_causal", "segments_causal")


def rows(tokens: int = TOKENS, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, BATCH, HEADS, tokens, WIDTH, dtype=dtype)
    return q, k, v


def backends_for(pattern: Pattern, tokens: int = TOKENS) -> list[str]:
    request = make_request(*rows(tokens), pattern)
    able = [candidate.name for candidate in BACKENDS if candidate.unsupported(request) is None]
    return [name for name in able if name != "flex"]  # flex is slow to trace; the grid compares it


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_pattern_never_sees_ahead(name: str):
    pattern, (q, k, v) = examples(TOKENS)[name], rows()
    changed = [tensor.clone() for tensor in (q, k, v)]
    for tensor in changed:
        tensor[:, :, 90:] = torch.randn_like(tensor[:, :, 90:])
    for backend in backends_for(pattern):
        before = attend(q, k, v, pattern, backend=backend)
        after = attend(*changed, pattern, backend=backend)
        assert torch.equal(before[:, :, :90], after[:, :, :90]), backend
        assert not torch.equal(before[:, :, 90:], after[:, :, 90:]), backend


@pytest.mark.parametrize("name", ["full", "window", "window_global", "window_global_dilated", "segments_uneven"])
def test_appended_padding_changes_nothing(name: str):
    short, (q, k, v) = examples(TOKENS)[name], rows()
    longer = [torch.cat([tensor, torch.full_like(tensor[:, :, :70], torch.nan)], 2) for tensor in (q, k, v)]
    token_mask = torch.arange(TOKENS + 70).expand(BATCH, -1) < TOKENS
    pattern = _with_tokens(short, TOKENS + 70)
    for backend in backends_for(short):
        leaves = [tensor.clone().requires_grad_() for tensor in longer]
        out = attend(*leaves, pattern, token_mask=token_mask, backend=backend)
        torch.testing.assert_close(out[:, :, :TOKENS], attend(q, k, v, short, backend=backend), rtol=0, atol=1e-12)
        assert not out[:, :, TOKENS:].any()
        for gradient in torch.autograd.grad(out.square().sum(), leaves):
            assert gradient.isfinite().all(), f"{backend}: NaN in padding reached a gradient"
            assert not gradient[:, :, TOKENS:].any(), f"{backend}: padding has a gradient"


def _with_tokens(pattern: Pattern, tokens: int) -> Pattern:
    """The same pattern where its tensors hold more tokens."""
    if isinstance(pattern, GlobalKeys):
        more = torch.zeros(BATCH, tokens - pattern.marked.shape[1], dtype=torch.bool)
        return GlobalKeys(torch.cat([pattern.marked, more], 1), causal=pattern.causal)
    parts = [_with_tokens(part, tokens) for part in getattr(pattern, "parts", ())]
    return type(pattern)(tuple(parts)) if parts else pattern  # type: ignore[call-arg]


def test_rows_of_a_batch_do_not_touch_each_other():
    pattern, (q, k, v) = examples(TOKENS)["window_global"], rows()
    alone = GlobalKeys(pattern.extra_keys()[1:])
    out = attend(q, k, v, pattern, backend="banded")
    one = attend(q[1:], k[1:], v[1:], SlidingWindow(4, 4) | alone, backend="banded")
    torch.testing.assert_close(out[1:], one, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [TOKENS - 1, TOKENS, 10 * TOKENS])
def test_window_as_long_as_the_input_equals_dense(window: int):
    q, k, v = rows()
    for token_mask in (None, padding("ragged", TOKENS)):
        dense = attend(q, k, v, Full(), token_mask=token_mask, backend="reference")
        for pattern in (SlidingWindow(window, window), DilatedSegments(((window + 1, 1),), heads=HEADS)):
            for backend in backends_for(pattern):
                out = attend(q, k, v, pattern, token_mask=token_mask, backend=backend)
                torch.testing.assert_close(out, dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["window_wide", "window_dilated_per_head", "window_global", "segments_causal"])
def test_gradient_support_equals_the_visible_keys(name: str):
    pattern, (q, k, v) = examples(TOKENS)[name], rows()
    visible = (make_request(q, k, v, pattern).dense_count() > 0).expand(BATCH, HEADS, TOKENS, TOKENS)
    for backend in backends_for(pattern):
        for row in (0, 70, TOKENS - 1):
            leaves = [tensor.clone().requires_grad_() for tensor in (k, v)]
            out = attend(q, *leaves, pattern, backend=backend)
            weights = torch.linspace(1, 2, WIDTH, dtype=q.dtype)
            grad_k, grad_v = torch.autograd.grad((out[:, :, row] * weights).sum(), leaves)
            assert torch.equal(grad_v.ne(0).any(-1), visible[:, :, row]), backend
            assert not grad_k.ne(0).any(-1)[~visible[:, :, row]].any(), backend


def test_keys_that_two_branches_keep_count_twice():
    """Two equal branches change nothing but the softmax sum; a third key set does shift the weights."""
    q, k, v = rows(64)
    once, lse_once = attend(q, k, v, DilatedSegments(((16, 1),), heads=HEADS), return_lse=True, backend="segments")
    two = DilatedSegments(((16, 1), (16, 1)), heads=HEADS)
    twice, lse_twice = attend(q, k, v, two, return_lse=True, backend="segments")
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse_twice - lse_once, torch.full_like(lse_once, 2).log(), rtol=0, atol=1e-12)


def test_longnet_equals_mixing_branch_outputs_by_their_softmax_sums():
    """The released code's formula, where it is defined: the strides divide the segments, the segments the input."""
    branches, (q, k, v) = ((16, 1), (32, 2), (64, 4)), rows(64)
    out = attend(q, k, v, DilatedSegments(branches, heads=HEADS), backend="segments")
    parts = [
        attend(q, k, v, DilatedSegments((branch,), heads=HEADS), backend="reference", return_lse=True)
        for branch in branches
    ]
    weights = torch.stack([lse for _, lse in parts]).softmax(0)
    mixed = sum(weight[..., None] * part for weight, (part, _) in zip(weights, parts, strict=True))
    torch.testing.assert_close(out, mixed, rtol=0, atol=1e-12)


def test_partial_attentions_merge_by_their_lse():
    """What sequence parallel code does: attention over two halves of the keys makes attention over all."""
    q, k, v = rows(64)
    left = GlobalKeys(torch.arange(64).expand(BATCH, -1) < 20)
    right = GlobalKeys(~left.marked)
    parts = [attend(q, k, v, half, backend="banded", return_lse=True) for half in (left, right)]
    weights = torch.stack([lse for _, lse in parts]).softmax(0)
    merged = sum(weight[..., None] * part for weight, (part, _) in zip(weights, parts, strict=True))
    torch.testing.assert_close(merged, attend(q, k, v, Full()), rtol=0, atol=1e-12)


def test_scale_defaults_to_one_over_root_of_head_width():
    q, k, v = rows(20)
    for backend in ("banded", "sdpa", "reference"):
        given = attend(q, k, v, SlidingWindow(3, 3), scale=WIDTH**-0.5, backend=backend)
        assert torch.equal(given, attend(q, k, v, SlidingWindow(3, 3), backend=backend))
        other = attend(q, k, v, SlidingWindow(3, 3), scale=1.0, backend=backend)
        torch.testing.assert_close(other, attend(q * WIDTH**0.5, k, v, SlidingWindow(3, 3), backend="reference"))


def test_strided_inputs_give_the_same_result():
    """q, k and v as a model cuts them from one linear layer, and with a head width that is not contiguous."""
    qkv = torch.randn(BATCH, TOKENS, 3, HEADS, WIDTH, dtype=torch.float64)
    views = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    turned = [view.mT.contiguous().mT for view in views]
    for name in ("window_global", "segments"):
        pattern = examples(TOKENS)[name]
        for backend in backends_for(pattern):
            plain = attend(*(view.contiguous() for view in views), pattern, backend=backend)
            for other in (views, turned):
                torch.testing.assert_close(attend(*other, pattern, backend=backend), plain, rtol=0, atol=1e-12)


@dataclass(frozen=True)
class BlockLocal(Pattern):
    """Tokens see their own block and the one before it."""

    block: int
    name: ClassVar[str] = "block_local"

    def count(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        gap = query // self.block - key // self.block
        return (gap >= 0) & (gap <= 1)

    def reach(self) -> Reach:
        return Reach(2 * self.block - 1, self.block - 1)


@pytest.mark.parametrize("marked", [False, True])
def test_a_pattern_nobody_planned_for_runs_on_every_backend(marked: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(PATTERNS, "block_local", BlockLocal)
    pattern = BlockLocal(16) | examples(TOKENS)["global"] if marked else BlockLocal(16)
    q, k, v = rows()
    token_mask = padding("ragged", TOKENS)
    truth = attend(q, k, v, pattern, token_mask=token_mask, backend="reference")
    assert backends_for(pattern) == ["banded", "sdpa", "reference"]
    for backend in ("banded", "sdpa", "flex"):
        out = attend(q, k, v, pattern, token_mask=token_mask, backend=backend)
        torch.testing.assert_close(out, truth, rtol=0, atol=1e-12)


def test_a_pattern_outside_the_table_says_what_to_do():
    with pytest.raises(ValueError, match=r"BlockLocal is not in PATTERNS; add it there: PATTERNS\['block_local'\]"):
        attend(*rows(), BlockLocal(16), backend="banded")
