"""The operator behind banded and segments: its walk, its memory, its gradients, torch.compile."""

from __future__ import annotations

import shutil

import pytest
import torch
from tests.attention.examples import BATCH, HEADS, WIDTH, examples, padding
from torch import Tensor

from longspan.attention import DilatedSegments, GlobalKeys, SlidingWindow, attend
from longspan.attention.backends import banded, segments, tiled
from longspan.attention.patterns import pattern_to_parts

BANDED = [name for name in examples(8) if name.startswith(("window", "global"))]
SEGMENTS = ["segments", "segments_causal", "segments_uneven", "segments_sparse"]
TOKENS = 270  # several blocks in the middle of the band, and a last one that is not full


def rows(tokens: int, dtype: torch.dtype = torch.float64, heads: int = HEADS) -> list[Tensor]:
    return [torch.randn(BATCH, heads, tokens, WIDTH, dtype=dtype, requires_grad=True) for _ in range(3)]


def backend_of(name: str) -> str:
    return "banded" if name in BANDED else "segments"


@pytest.mark.parametrize(
    ("max_scores", "pad"), [(None, "none"), (None, "ragged"), (None, "holes"), (4096, "empty_row")]
)
@pytest.mark.parametrize("name", BANDED + SEGMENTS)
def test_many_blocks_match_the_definition(name: str, pad: str, max_scores: int | None, monkeypatch: pytest.MonkeyPatch):
    if max_scores is not None:  # steps so small that they hold part of the heads
        monkeypatch.setattr(tiled, "SCORES_IN_CACHE", max_scores)
        monkeypatch.setattr(tiled, "SCORES_NOT_STORED", max_scores)
    pattern, token_mask, inputs = examples(TOKENS)[name], padding(pad, TOKENS), rows(TOKENS)
    grad_out, grad_lse = torch.randn(BATCH, HEADS, TOKENS, WIDTH).double(), torch.randn(BATCH, HEADS, TOKENS).double()
    found = []
    for backend in ("reference", backend_of(name)):
        out, lse = attend(*inputs, pattern, token_mask=token_mask, backend=backend, return_lse=True)
        loss = (out * grad_out).sum() + (lse.masked_fill(lse == -torch.inf, 0) * grad_lse).sum()
        found.append((out, lse, *torch.autograd.grad(loss, inputs)))
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["window_global", "segments_causal"])
def test_dropout_path_without_dropping_matches_the_definition(name: str, monkeypatch: pytest.MonkeyPatch):
    """It is the path of every other device than cpu."""
    monkeypatch.setattr(tiled, "_attend_fused", lambda *tile: tiled._attend_plain(*tile, tiled._Dropout(0, None, None)))
    token_mask, inputs = padding("empty_row", TOKENS), rows(TOKENS)
    found = [
        attend(*inputs, examples(TOKENS)[name], token_mask=token_mask, backend=backend, return_lse=True)
        for backend in ("reference", backend_of(name))
    ]
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["window_global", "segments"])
def test_dropout_has_the_gradient_of_what_it_computed(name: str):
    tokens = 70  # two blocks
    pattern, inputs = examples(tokens)[name], [tensor[:1, :, :, :2].detach() for tensor in rows(tokens)]
    if pattern.extra_keys() is not None:
        pattern = SlidingWindow(4, 4) | GlobalKeys(pattern.extra_keys()[:1])

    def dropped(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        return attend(*tensors, pattern, dropout=0.4, backend=backend_of(name))

    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    grad_out = torch.randn(1, HEADS, tokens, 2, dtype=torch.float64)
    gradients = torch.autograd.grad((dropped(*leaves) * grad_out).sum(), leaves)
    for number, gradient in enumerate(gradients):
        direction = torch.randn_like(gradient)
        moved = []
        for sign in (1, -1):
            shifted = list(inputs)
            shifted[number] = shifted[number] + sign * 1e-5 * direction
            moved.append((dropped(*shifted) * grad_out).sum())
        torch.testing.assert_close((gradient * direction).sum(), (moved[0] - moved[1]) / 2e-5, rtol=1e-6, atol=1e-7)


def test_dropout_keeps_the_mean_and_differs_from_call_to_call():
    inputs = [tensor.detach() for tensor in rows(80, torch.float32)]
    plain, lse = attend(*inputs, SlidingWindow(5, 5), backend="banded", return_lse=True)
    calls = [attend(*inputs, SlidingWindow(5, 5), dropout=0.25, backend="banded", return_lse=True) for _ in range(400)]
    assert not torch.equal(calls[0][0], calls[1][0])
    torch.testing.assert_close(calls[0][1], lse)
    mean = torch.stack([out for out, _ in calls]).mean(0)
    assert (mean - plain).abs().mean() < 0.03
    ones = torch.ones_like(inputs[2])
    kept = attend(*inputs[:2], ones, SlidingWindow(5, 5), dropout=0.25, backend="banded")
    assert abs(kept.mean() - 1) < 0.02


@pytest.mark.parametrize(
    ("pattern", "plan"),
    [
        (SlidingWindow(16, 16), banded.plan_band),
        (SlidingWindow(16, 16, dilation=4), banded.plan_band),
        (SlidingWindow(100, 0), banded.plan_band),
        (DilatedSegments(((64, 1), (256, 4), (1024, 16)), heads=HEADS), segments.plan_segments),
    ],
)
def test_work_grows_linearly_and_steps_stay_small(pattern, plan):
    limit = 2**16

    def scores(tokens: int) -> int:
        total = 0
        for step in plan(pattern, torch.zeros(BATCH, HEADS, tokens, 1), None, limit):
            batch, heads = (len(range(size)[part]) for size, part in ((BATCH, step.batch), (HEADS, step.heads)))
            number = batch * heads * step.tiles * step.queries * step.keys
            assert number <= limit
            total += number
        return total

    short, long = scores(2048), scores(8192)
    assert long <= 4.4 * short
    assert long < BATCH * HEADS * 8192 * 1000  # dense: 8192 keys a row


@pytest.mark.parametrize("name", ["window_global", "segments"])
def test_between_forward_and_backward_nothing_grows_with_the_window(name: str):
    tokens, saved = 1024, []
    inputs = rows(tokens, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        out = attend(*inputs, examples(tokens)[name], token_mask=padding("ragged", tokens), backend=backend_of(name))
    assert max(tensor.numel() for tensor in saved) == out.numel()
    assert len([tensor for tensor in saved if tensor.numel() == out.numel()]) == 4  # q, k, v, out


@pytest.mark.parametrize("name", ["window_global_dilated", "segments_uneven"])
def test_operator_passes_opcheck(name: str):
    inputs, token_mask = rows(70), padding("ragged", 70)
    text, tensors = pattern_to_parts(examples(70)[name])
    table = torch.randn(HEADS, 9, dtype=torch.float64, requires_grad=True)
    for seed, bias, dropout in ((None, None, 0.0), (torch.tensor(5), None, 0.2), (None, table, 0.0)):
        torch.library.opcheck(
            torch.ops.longspan.tiled.default, (*inputs, text, tensors, token_mask, seed, bias, 2, 0.3, dropout)
        )


class Attention(torch.nn.Module):
    """A layer as models write it: the pattern is built in `forward`, from a mask that is an input."""

    def __init__(self, backend: str):
        super().__init__()
        self.backend = backend
        self.qkv = torch.nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)

    def forward(self, x: Tensor, token_mask: Tensor, marked: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4).unbind(0)
        pattern = SlidingWindow(8, 8, dilation=(1, 2, 1, 2)) | GlobalKeys(marked)
        if self.backend == "segments":
            pattern = DilatedSegments(((8, 1), (24, 3)), heads=HEADS)
        return attend(q, k, v, pattern, token_mask=token_mask, backend=self.backend).transpose(1, 2).flatten(2)


def layer_inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    token_mask = padding("ragged", tokens)
    assert token_mask is not None
    marked = torch.zeros(BATCH, tokens, dtype=torch.bool)
    marked[:, 2] = True
    return torch.randn(BATCH, tokens, HEADS * WIDTH), token_mask, marked


@pytest.mark.parametrize("backend", ["banded", "segments", "sdpa", "reference"])
def test_backend_compiles_to_one_graph_for_any_length(backend: str):
    torch.compiler.reset()
    layer = Attention(backend)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (70, 97):
        inputs = layer_inputs(tokens)
        gradients = []
        for module in (layer, compiled):
            out = module(*inputs)
            gradients.append((out, *torch.autograd.grad(out.square().sum(), layer.parameters())))
        for expected, actual in zip(*gradients, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_flex_compiles_to_one_graph():
    torch.compiler.reset()
    layer, inputs = Attention("flex").requires_grad_(False), layer_inputs(70)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), layer(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inside torch's compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's default compiler needs a C++ compiler")
def test_default_compiler_runs_banded():
    torch.compiler.reset()
    layer, inputs = Attention("banded").requires_grad_(False), layer_inputs(200)
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), layer(*inputs), rtol=1e-5, atol=1e-5)
