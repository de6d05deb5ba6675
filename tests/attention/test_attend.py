from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch

from longspan import kernels
from longspan.attention import DilatedSegments, Full, GlobalKeys, SlidingWindow, attend, explain
from longspan.attention.attend import make_request
from longspan.attention.backends import BACKENDS

Q = torch.zeros(2, 4, 6, 8)
LONG = torch.zeros(1, 2, 1024, 8)
WIDE_Q, WIDE_LONG = Q.double(), LONG.double()  # the kernels do not take float64, so these go to the others


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": Q[0]}, r"q must be \[B, H, M, D\] .* got q \[4, 6, 8\], k \[2, 4, 6, 8\]"),
        ({"v": Q[:, :, :5]}, "k and v also N"),
        ({"q": Q[:, :2]}, "must share B, H and D"),
        ({"q": Q[:, :, :0], "k": Q[:, :, :0], "v": Q[:, :, :0]}, "must not be empty"),
        ({"k": Q.double()}, "one floating-point dtype; got torch.float32, torch.float64"),
        ({"q": Q.long(), "k": Q.long(), "v": Q.long()}, "one floating-point dtype; got torch.int64"),
        ({"v": Q.to("meta")}, "one device; got cpu, cpu, meta"),
        ({"q": Q[:, :, :2]}, r"q has 2 rows but k has 6; give query_positions, Long\[2\] or Long\[2, 2\]"),
        ({"token_mask": torch.ones(2, 6)}, r"token_mask must be torch.bool \[2, 6\] on cpu; got torch.float32"),
        ({"token_mask": torch.ones(6, dtype=torch.bool)}, r"token_mask must be .* got torch.bool \[6\]"),
        ({"query_positions": torch.arange(5)}, r"query_positions must be torch.int64 \[6\] or \[2, 6\]"),
        ({"dropout": 1.0}, "0 <= dropout < 1; got 1.0"),
        ({"backend": "triton"}, "unknown backend 'triton'; give 'auto' or one of 'native', 'segments'"),
        ({"pattern": "full"}, "pattern must be a longspan.attention Pattern"),
        ({"pattern": SlidingWindow(1, 1, dilation=(1, 2))}, "has 2 dilations but q has 4 heads"),
        ({"pattern": DilatedSegments(((4, 1),), heads=3)}, "made for 3 heads but q has 4"),
        (
            {"pattern": Full() | GlobalKeys(torch.ones(2, 5, dtype=torch.bool))},
            r"marked has shape \[2, 5\] but k has B=2, N=6; it must be Bool\[2, 6\]",
        ),
        ({"pattern": GlobalKeys(torch.ones(2, 6, dtype=torch.bool, device="meta"))}, "is on meta but q is on cpu"),
    ],
)
def test_inputs_that_do_not_fit(change: dict, message: str):
    arguments = {"q": Q, "k": Q, "v": Q, "pattern": Full()} | change
    with pytest.raises(ValueError, match=message):
        attend(**arguments)


@pytest.mark.parametrize(
    ("pattern", "options", "backend", "message"),
    [
        (Full(), {}, "banded", "full sees keys at any distance"),
        (SlidingWindow(1, 1), {"query_positions": torch.arange(6)}, "banded", "no band"),
        (SlidingWindow(1, 1), {}, "segments", "dilated_segments only, not sliding_window"),
        (SlidingWindow(1, 1), {"return_lse": True}, "sdpa", "does not return the log-sum-exp"),
        (SlidingWindow(1, 1), {"dropout": 0.1}, "flex", "has no dropout"),
    ],
)
def test_backend_asked_for_by_name_never_falls_back(pattern, options: dict, backend: str, message: str):
    with pytest.raises(NotImplementedError, match=f"backend '{backend}' cannot run .*{message}.*never falls back"):
        attend(Q, Q, Q, pattern, backend=backend, **options)


def test_flex_refuses_gradients_on_cpu():
    q = Q.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="no backward pass on cpu"):
        attend(q, Q, Q, SlidingWindow(1, 1), backend="flex")


def test_when_nothing_fits_every_backend_says_why(monkeypatch: pytest.MonkeyPatch):
    refusing = tuple(backend._replace(unsupported=lambda request: "not today") for backend in BACKENDS)
    monkeypatch.setattr(importlib.import_module("longspan.attention.attend"), "BACKENDS", refusing)
    with pytest.raises(NotImplementedError, match="no backend can run Full") as error:
        attend(Q, Q, Q, Full())
    assert all(f"  {backend.name}: not today" in str(error.value) for backend in BACKENDS)
    assert explain(Q, Q, Q, Full()).backend is None


@pytest.mark.parametrize(
    ("rows", "pattern", "options", "backend"),
    [
        (WIDE_Q, Full(), {}, "sdpa"),
        (WIDE_LONG, Full(), {}, "sdpa"),
        (WIDE_Q, SlidingWindow(1, 1), {}, "sdpa"),
        (WIDE_LONG, SlidingWindow(16, 16), {}, "banded"),
        (WIDE_LONG, SlidingWindow(1024, 1024), {}, "sdpa"),
        (WIDE_LONG, SlidingWindow(16, 16), {"query_positions": torch.arange(1024)}, "sdpa"),
        (WIDE_Q, SlidingWindow(1, 1), {"return_lse": True}, "banded"),
        (WIDE_Q, Full(), {"return_lse": True}, "reference"),
        (WIDE_LONG, DilatedSegments(((64, 1), (256, 4)), heads=2), {}, "segments"),
        (WIDE_Q, DilatedSegments(((64, 1), (256, 4)), heads=4), {}, "sdpa"),
        (WIDE_LONG, DilatedSegments(((64, 1),), heads=2) | SlidingWindow(1, 1), {}, "sdpa"),
    ],
)
def test_auto_takes_the_first_that_can_and_is_not_slower(rows, pattern, options: dict, backend: str):
    assert explain(rows, rows, rows, pattern, **options).backend == backend


@pytest.mark.skipif(kernels.library() is None, reason=str(kernels.problem()))
@pytest.mark.parametrize("rows", [LONG, LONG.bfloat16(), LONG[:, :, :5].clone().requires_grad_()])
@pytest.mark.parametrize("pattern", [Full(causal=True), SlidingWindow(1, 1), DilatedSegments(((64, 1),), heads=2)])
def test_auto_takes_the_kernels_where_they_can(rows, pattern):
    assert explain(rows, rows, rows, pattern).backend == "native"
    assert explain(rows, rows, rows, pattern, dropout=0.1).backend != "native"


@pytest.mark.skipif(kernels.library() is None, reason=str(kernels.problem()))
def test_auto_leaves_few_tokens_that_see_all_to_torch():
    assert explain(Q, Q, Q, Full()).backend == "sdpa"
    assert "up to 128 tokens torch's dense attention starts faster" in explain(Q, Q, Q, Full()).reasons["native"]
    assert explain(Q, Q, Q, Full(), return_lse=True).backend == "native"
    assert explain(Q, Q, Q, Full(), token_mask=torch.ones(2, 6, dtype=torch.bool)).backend == "native"
    assert explain(LONG, LONG, LONG, Full()).backend == "native"


def test_explanation_names_every_backend_with_its_reason():
    text = str(explain(LONG, LONG, LONG, SlidingWindow(16, 16), dropout=0.1))
    assert text.splitlines() == [
        "attend(q [1, 2, 1024, 8], k [1, 2, 1024, 8], float32 on cpu: SlidingWindow(before=16, after=16, dilation=1))",
        "  native     cannot: the kernels have no dropout",
        "  segments   cannot: it computes dilated_segments only, not sliding_window",
        "> banded     runs it",
        "  sdpa       could, but banded is asked before it",
        "  flex       cannot: FlexAttention has no dropout",
        "  reference  could, but banded is asked before it",
    ]
    assert "up to 272 tokens dense attention is faster" in str(explain(WIDE_Q, WIDE_Q, WIDE_Q, SlidingWindow(16, 16)))


def test_needs_grad_follows_the_grad_mode():
    q = Q.clone().requires_grad_()
    assert make_request(q, Q, Q, Full()).needs_grad
    with torch.no_grad():
        assert not make_request(q, Q, Q, Full()).needs_grad


@pytest.mark.parametrize("backend", [backend.name for backend in BACKENDS if backend.name not in ("flex", "segments")])
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_garbage_in_padded_rows_reaches_no_token(backend: str, garbage: float):
    if backend == "native" and kernels.library() is None:
        pytest.skip(str(kernels.problem()))
    q, k, v = torch.randn(3, 2, 4, 150, 8)
    token_mask = torch.ones(2, 150, dtype=torch.bool)
    token_mask[0, 100:] = token_mask[1, :7] = token_mask[1, 64:70] = False
    marked = torch.zeros(2, 150, dtype=torch.bool)
    marked[:, 120] = marked[1, 3] = True  # global in the first row only by mistake: it is padding
    pattern = SlidingWindow(6, 6) | GlobalKeys(marked)
    clean = [tensor.masked_fill(~token_mask[:, None, :, None], 0).requires_grad_() for tensor in (q, k, v)]
    dirty = [tensor.masked_fill(~token_mask[:, None, :, None], garbage).requires_grad_() for tensor in (q, k, v)]
    outs = [attend(*tensors, pattern, token_mask=token_mask, backend=backend) for tensors in (clean, dirty)]
    assert torch.equal(*outs)
    gradients = [torch.autograd.grad(out.square().sum(), x) for out, x in zip(outs, (clean, dirty), strict=True)]
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_attention_does_not_load_the_compiler_of_torch():
    """Loading it takes as long as loading torch, and `longspan answer` never compiles."""
    code = (
        "import sys, torch; from longspan.attention import *; q = torch.zeros(1, 1, 600, 4, requires_grad=True); "
        "attend(q, q, q, SlidingWindow(2, 2), backend='banded').sum().backward(); print('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
