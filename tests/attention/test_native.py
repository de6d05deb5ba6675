"""Attention by the compiled kernels: widths, strides, instruction sets, threads, memory, torch.compile, bad input.

The grid of tests compares every pattern; here are the sizes and layouts that its examples do not have.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.attention.examples import BATCH, HEADS, WIDTH, examples, padding
from tests.attention.test_grid import assert_matches, results
from tests.attention.test_tiled import Attention, layer_inputs
from torch import Tensor

from longspan import kernels
from longspan.attention import DilatedSegments, DistanceBias, Full, GlobalKeys, Pattern, SlidingWindow, attend, explain
from longspan.attention.backends import native
from longspan.attention.backends.packed_sequences import Sequences, packed_attention
from longspan.attention.patterns import pattern_to_parts

library = kernels.library()
pytestmark = pytest.mark.skipif(library is None, reason=str(kernels.problem()))

DTYPES = (torch.float32, torch.bfloat16)
TOKENS = 150
SETS = ("baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")


def rows(
    tokens: int = TOKENS, width: int = WIDTH, heads: int = HEADS, batch: int = BATCH, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """q, k, v and the gradient of out; views of one fused projection."""
    qkv = torch.randn(batch, tokens, 4, heads, width).to(dtype)
    return list(qkv.permute(2, 0, 3, 1, 4).unbind(0))


def assert_native_matches(values: list[Tensor], pattern: Pattern, **options) -> dict[str, Tensor]:
    """out, lse and gradients at most twice as far from float64 as those of the reference in this dtype."""
    actual = results(values, pattern, "native", True, **options)
    truth = results([value.double() for value in values], pattern, "reference", True, **options)
    reference = results(values, pattern, "reference", True, **options)
    assert_matches(actual, truth, reference, values[0].dtype)
    return actual


def marked_keys(tokens: int, *places: tuple[int, int]) -> Tensor:
    marked = torch.zeros(BATCH, tokens, dtype=torch.bool)
    for row, key in places:
        marked[row, key] = True
    return marked


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 8, 20, 64, 80, 128, 130])
def test_any_head_width(width: int, dtype: torch.dtype):
    pattern = SlidingWindow(20, 9) | GlobalKeys(marked_keys(TOKENS, (0, 0), (1, 77), (1, 149)))
    assert_native_matches(rows(width=width, dtype=dtype), pattern, token_mask=padding("ragged", TOKENS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 33, 700])
@pytest.mark.parametrize("name", ["full_causal", "window_wide", "window_global_dilated", "segments_uneven"])
def test_any_number_of_tokens(name: str, tokens: int, dtype: torch.dtype):
    assert_native_matches(rows(tokens, 16, dtype=dtype), examples(tokens)[name])


@pytest.fixture
def instruction_set():
    """Chooses one, and afterwards the one of before again; False where the CPU or the build lacks it."""
    before = library.longspan_instruction_set()
    yield lambda name: library.longspan_use_instruction_set(name.encode()) == 0
    assert library.longspan_use_instruction_set(before) == 0


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"])
def test_every_instruction_set_computes_the_same(name: str, instruction_set):
    if not instruction_set(name):
        pytest.skip(f"this CPU or this build has no {name}")
    assert library.longspan_instruction_set().decode() == name
    for dtype in DTYPES:
        for pattern in (
            Full(),
            SlidingWindow(40, 0, dilation=(1, 2, 3, 7)),
            SlidingWindow(70, 70) | GlobalKeys(marked_keys(TOKENS, (0, 0), (1, 1), (1, 140))),
            DilatedSegments(((32, 1), (128, 3)), heads=HEADS),
        ):
            assert_native_matches(rows(width=40, dtype=dtype), pattern, token_mask=padding("holes", TOKENS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["full", "window_global", "segments"])
def test_garbage_in_padded_rows_reaches_no_token(name: str, dtype: torch.dtype):
    token_mask = padding("holes", TOKENS)
    values = rows(dtype=dtype)
    clean = [value.masked_fill(~token_mask[:, None, :, None], 0).requires_grad_() for value in values[:3]]
    dirty = [value.masked_fill(~token_mask[:, None, :, None], torch.nan).requires_grad_() for value in values[:3]]
    grad_out = values[3].masked_fill(~token_mask[:, None, :, None], torch.nan)
    found = []
    for leaves in (clean, dirty):
        out = attend(*leaves, examples(TOKENS)[name], token_mask=token_mask, backend="native")
        found.append((out, *torch.autograd.grad(out, leaves, grad_out)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
        assert not one.transpose(1, 2)[~token_mask].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["full_causal", "window_causal", "window_global_causal", "segments_causal"])
def test_causal_pattern_never_sees_ahead(name: str, dtype: torch.dtype):
    values = rows(width=32, dtype=dtype)[:3]
    changed = [value.clone() for value in values]
    for value in changed:
        value[:, :, 90:] = torch.randn_like(value[:, :, 90:])
    before, after = (attend(*tensors, examples(TOKENS)[name], backend="native") for tensors in (values, changed))
    assert torch.equal(before[:, :, :90], after[:, :, :90])
    assert not torch.equal(before[:, :, 90:], after[:, :, 90:])


def test_rows_lie_anywhere_as_long_as_their_numbers_are_adjacent():
    """Heads in front, tokens reversed in memory by a step, a batch row that is shown twice, numbers that are apart."""
    pattern = examples(TOKENS)["window_global"]
    plain = [value.contiguous() for value in rows(width=24)[:3]]
    expected = attend(*plain, pattern, backend="native")
    turned = [value.mT.contiguous().mT for value in plain]
    apart = [torch.stack([value, value], 3).flatten(2, 3)[:, :, ::2] for value in plain]
    for others in (turned, apart):
        assert torch.equal(attend(*others, pattern, backend="native"), expected)
    once = [value[:1] for value in plain]
    shown_twice = [value.expand(BATCH, -1, -1, -1) for value in once]
    out = attend(*shown_twice, SlidingWindow(9, 9), backend="native")
    assert torch.equal(out[0], attend(*once, SlidingWindow(9, 9), backend="native")[0]) and torch.equal(*out)


def test_out_is_laid_out_so_that_joining_the_heads_copies_nothing():
    out = attend(*rows()[:3], SlidingWindow(3, 3), backend="native")
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (Full() | GlobalKeys(marked_keys(TOKENS, (0, 0)), causal=True), "a window that does not look ahead"),
        (SlidingWindow(3, 1) | GlobalKeys(marked_keys(TOKENS), causal=True), "a window that does not look ahead"),
        (SlidingWindow(3, 1) | SlidingWindow(1, 3), "one window beside the global keys, not several"),
        (SlidingWindow(3, 1) | DilatedSegments(((8, 1),), heads=HEADS), "dilated_segments alone, not in a union"),
        (
            GlobalKeys(marked_keys(TOKENS)) | GlobalKeys(marked_keys(TOKENS), causal=True),
            "global keys that are all causal or all not",
        ),
    ],
)
def test_patterns_of_another_form_are_refused(pattern: Pattern, reason: str):
    with pytest.raises(NotImplementedError, match=f"backend 'native' cannot run .*{reason}"):
        attend(*rows()[:3], pattern, backend="native")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dropout": 0.1}, "the kernels have no dropout"),
        ({"dtype": torch.float64}, "the kernels compute in float32 and bfloat16, not in float64"),
        ({"device": "meta"}, "the kernels run on cpu, not on meta"),
        ({"query_positions": torch.arange(TOKENS), "dilation": 2}, "only beside a window without dilation"),
    ],
)
def test_explain_says_why_the_kernels_do_not_run(options: dict, reason: str):
    options = dict(options)
    values = [rows()[0].to(options.pop("device", "cpu"), options.pop("dtype", torch.float32))] * 3
    pattern = SlidingWindow(3, 3, dilation=options.pop("dilation", 1))
    assert reason in explain(*values, pattern, **options).reasons["native"]


def test_two_kinds_of_union_that_are_served():
    """Several marks of one causality are one; global keys beside causal windows may lie ahead."""
    marks = GlobalKeys(marked_keys(TOKENS, (0, 3))) | GlobalKeys(marked_keys(TOKENS, (1, 140)))
    for window in (SlidingWindow(12, 0), Full(causal=True)):
        assert_native_matches(rows(), window | marks)


@pytest.mark.parametrize("per_row", [False, True])
def test_gradients_through_query_positions(per_row: bool):
    positions = torch.tensor([149, 0, 7, 7, 64])
    q, k, v, grad_out = rows()
    pattern = SlidingWindow(30, 5) | GlobalKeys(marked_keys(TOKENS, (0, 0), (1, 99)))
    options = {"query_positions": positions.expand(BATCH, -1) if per_row else positions}
    assert_native_matches(
        [q[:, :, :5], k, v, grad_out[:, :, :5]], pattern, **options, token_mask=padding("holes", TOKENS)
    )


@pytest.mark.parametrize("name", ["window_global", "segments"])
def test_gradient_of_lse(name: str):
    leaves = [value.detach().requires_grad_() for value in rows()[:3]]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    found = []
    for tensors, backend in ((leaves, "native"), (wide, "reference")):
        out, lse = attend(*tensors, examples(TOKENS)[name], backend=backend, return_lse=True)
        seen = lse.masked_fill(lse == -torch.inf, 0)
        found.append([*torch.autograd.grad((out.sum() + seen.square().sum()), tensors, retain_graph=True)])
        found[-1] += torch.autograd.grad(seen.sum(), tensors[:2])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["window_global_dilated", "segments_uneven", "full_causal"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_operator_passes_opcheck(name: str, dtype: torch.dtype):
    inputs = [value.detach().requires_grad_() for value in rows(70, dtype=dtype)[:3]]
    text, tensors = pattern_to_parts(examples(70)[name])
    positions = torch.arange(70) if name == "full_causal" else None
    table = torch.randn(HEADS, 9, requires_grad=True)
    for bias in (None, table):
        torch.library.opcheck(
            torch.ops.longspan.native.default, (*inputs, text, tensors, padding("ragged", 70), positions, bias, 2, 0.3)
        )


@pytest.mark.parametrize("backend", ["native", "auto"])
def test_layer_compiles_to_one_graph_for_any_length(backend: str):
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


@pytest.mark.parametrize("name", ["segments_causal", "segments_part", "segments_sparse"])
@pytest.mark.parametrize("biased", [False, True])
def test_sums_of_some_heads_at_a_time_are_those_of_all(name: str, biased: bool, monkeypatch):
    torch.manual_seed(0)
    *leaves, grad = rows(dtype=torch.bfloat16)
    table = torch.randn(HEADS, 30)
    calls = []
    compute = native.compute
    monkeypatch.setattr(
        native, "compute", lambda part, *given: calls.append(part["q"].shape[1]) or compute(part, *given)
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)

    def run() -> list[Tensor]:
        inputs = [leaf.clone().requires_grad_() for leaf in (*leaves, table)]
        bias = DistanceBias(inputs[3], 4) if biased else None
        mask = padding("ragged", TOKENS)
        out, lse = attend(
            *inputs[:3], examples(TOKENS)[name], token_mask=mask, bias=bias, backend="native", return_lse=True
        )
        return [out, lse, *torch.autograd.grad(out, inputs if biased else inputs[:3], grad)]

    whole = run()
    monkeypatch.setattr(native, "CACHED_BYTES", 1)
    some = run()
    assert calls == [HEADS] * 2 + [1] * 2 * HEADS
    assert all(torch.equal(one, other) for one, other in zip(whole, some, strict=True))


def test_calls_from_many_threads_give_what_each_gives_alone():
    patterns = [examples(TOKENS)[name] for name in ("full", "window_global", "segments", "window_dilated_per_head")]
    inputs = [rows(width=32) for _ in patterns]

    def compute(number: int) -> list[Tensor]:
        *leaves, grad_out = inputs[number % len(patterns)]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out = attend(*leaves, patterns[number % len(patterns)], token_mask=padding("ragged", TOKENS), backend="native")
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]

    alone = [compute(number) for number in range(len(patterns))]
    with ThreadPoolExecutor(4) as pool:
        for number, found in enumerate(pool.map(compute, range(40))):
            for expected, actual in zip(alone[number % len(patterns)], found, strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss differs")
def test_memory_grows_with_the_tokens_only():
    """With scores of every window, 2**16 tokens would take 135 MB for one head; the rows take 2 MB each."""
    code = """
import resource, torch
from longspan.attention import SlidingWindow, attend
def peak(tokens):
    q, k, v = (torch.randn(1, 1, tokens, 8, requires_grad=True) for _ in range(3))
    attend(q, k, v, SlidingWindow(256, 256), backend="native").sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(-peak(2**10) + peak(2**16))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert float(done.stdout) < 60, done.stderr


def attend_packed(q, k, v, sequences, pattern=None, *, out=None, **options):
    out = torch.empty(q.shape, dtype=q.dtype) if out is None else out
    packed_attention(q, k, v, sequences, pattern or Full(), out=out, **options)()
    return out


PACKED = {
    "full": Full(),
    "full_causal": Full(causal=True),
    "window": SlidingWindow(9, 4),
    "window_per_head": SlidingWindow(3, 0, dilation=(1, 2, 3, 1)),
    "segments": DilatedSegments(((16, 1), (32, 2), (64, 5)), heads=HEADS),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("globals_", [False, True])
@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences_equal_each_alone(name: str, globals_: bool, dtype: torch.dtype):
    lengths, pattern = (40, 0, 1, 97, 16), PACKED[name]
    offsets = [sum(lengths[:number]) for number in range(len(lengths) + 1)]
    q, k, v = torch.randn(offsets[-1], 3, HEADS, 24).to(dtype).unbind(1)
    marked = torch.zeros(offsets[-1], dtype=torch.bool)
    if globals_:
        if name == "segments":
            with pytest.raises(NotImplementedError, match="dilated_segments alone"):
                attend_packed(q, k, v, Sequences(offsets, ~marked), pattern)
            return
        marked[[0, 39, 41, 45]] = True  # two of the first sequence, one of the fourth at its start, one near it
    space = torch.full((offsets[-1], 2, HEADS, 24), torch.nan, dtype=dtype)
    out = attend_packed(q, k, v, Sequences(offsets, marked), pattern, out=space[:, 1])
    assert out.data_ptr() == space[:, 1].data_ptr() and space[:, 0].isnan().all()
    assert torch.equal(attend_packed(q, k, v, Sequences(offsets, marked), pattern), out)
    for start, stop in pairwise(offsets):
        if stop > start:
            one = [tensor[start:stop].transpose(0, 1)[None] for tensor in (q, k, v)]
            causal = name in ("full_causal", "window_per_head")
            alone = pattern | GlobalKeys(marked[None, start:stop], causal=causal) if globals_ else pattern
            expected = attend(*one, alone, backend="native")
            torch.testing.assert_close(out[start:stop], expected[0].transpose(0, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("queries", [1, 2, 200])
@pytest.mark.parametrize("globals_", [False, True])
@pytest.mark.parametrize("name", PACKED)
def test_of_packed_sequences_some_tokens_may_read_alone(name: str, globals_: bool, queries: int):
    offsets, pattern = (0, 40, 40, 41, 138, 154), PACKED[name]
    q, k, v = torch.randn(offsets[-1], 3, HEADS, 24).unbind(1)
    marked = torch.zeros(offsets[-1], dtype=torch.bool)
    if globals_ and name != "segments":
        marked[[0, 39, 41, 45]] = True
    sequences = Sequences(offsets, marked)
    out = attend_packed(q, k, v, sequences, pattern, out=torch.full(q.shape, 7.0), queries=queries)
    expected = attend_packed(q, k, v, sequences, pattern)
    for start, stop in pairwise(offsets):
        end = min(stop, start + queries)
        torch.testing.assert_close(out[start:end], expected[start:end], rtol=1e-5, atol=1e-6)
        assert name == "segments" or (out[end:stop] == 7).all()  # in segments all read


X = torch.zeros(5, HEADS, 8)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "offsets must begin with 0", lambda: Sequences([1, 5])),
        (ValueError, "offsets must begin with 0", lambda: Sequences([0, 4, 3])),
        (ValueError, "offsets must begin with 0", lambda: Sequences([0])),
        (ValueError, r"marked must be Bool\[5\]", lambda: Sequences([0, 5], torch.zeros(5))),
        (ValueError, r"\[T, H, D\] with T = 4", lambda: attend_packed(X, X, X, Sequences([0, 4]))),
        (ValueError, r"\[T, H, D\] with T = 5", lambda: attend_packed(X, X, X[:, :1], Sequences([0, 5]))),
        (ValueError, "float32 or bfloat16", lambda: attend_packed(X.half(), X.half(), X.half(), Sequences([0, 5]))),
        (ValueError, "on one device", lambda: attend_packed(X.to("meta"), X, X, Sequences([0, 5]))),
        (
            ValueError,
            "2 dilations but q has 4",
            lambda: attend_packed(X, X, X, Sequences([0, 5]), SlidingWindow(1, 1, (1, 2))),
        ),
        (ValueError, "out must be torch.float32", lambda: attend_packed(X, X, X, Sequences([0, 5]), out=X[:4])),
        (ValueError, "must be finite", lambda: attend_packed(X, X, X, Sequences([0, 5]), scale=float("nan"))),
        (ValueError, "must be at least 1; got 0", lambda: attend_packed(X, X, X, Sequences([0, 5]), queries=0)),
        (
            NotImplementedError,
            "packed sequences take",
            lambda: attend_packed(X, X, X, Sequences([0, 5]), GlobalKeys(torch.ones(1, 5, dtype=torch.bool))),
        ),
    ],
)
def test_packed_inputs_that_do_not_fit(error: type[Exception], message: str, call):
    with pytest.raises(error, match=message):
        call()


SHAPES = st.tuples(*(st.sampled_from(sizes) for sizes in ((1, 2), (1, 3, 4), (0, 1, 5, 17), (1, 8, 9))))
PATTERNS = st.sampled_from(
    [
        Full(),
        SlidingWindow(2, 2),
        SlidingWindow(2**70, 2**70, dilation=2**66),
        SlidingWindow(1, 1, dilation=(1, 2, 3)),
        GlobalKeys(torch.ones(2, 5, dtype=torch.bool)),
        SlidingWindow(1, 0) | GlobalKeys(torch.ones(1, 17, dtype=torch.bool), causal=True),
        DilatedSegments(((4, 1), (2**70, 2**68)), heads=4),
        DilatedSegments(((5, 7),), heads=3, causal=True),
    ]
)


@st.composite
def tensors_of_any_kind(draw, shape: tuple[int, ...]) -> Tensor:
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64, torch.int64]))
    kind = draw(st.sampled_from(["plain", "plain", "turned", "shown again", "apart", "meta", "flat"]))
    value = torch.ones(shape, dtype=dtype)
    if kind == "turned":
        return value.mT.contiguous().mT
    if kind == "shown again":
        return value[:1].expand(shape)
    if kind == "apart":
        return torch.ones(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]
    return value.to("meta") if kind == "meta" else value.flatten(0, 1) if kind == "flat" else value


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.data())
def test_whatever_comes_gives_a_result_or_an_error_that_says_why(data: st.DataObject):
    shape = data.draw(SHAPES)
    other = data.draw(SHAPES) if data.draw(st.booleans()) else shape
    values = [data.draw(tensors_of_any_kind(size)) for size in (shape, other, other)]
    pattern = data.draw(PATTERNS)
    token_mask = data.draw(st.sampled_from([None, torch.ones(shape[0], other[2], dtype=torch.bool), torch.ones(3, 3)]))
    positions = st.lists(st.integers(-1, 17), min_size=shape[2], max_size=shape[2]).map(torch.tensor)
    positions = data.draw(st.one_of(st.none(), st.none(), positions))
    text, tensors = pattern_to_parts(pattern)
    calls = [
        lambda: attend(*values, pattern, token_mask=token_mask, query_positions=positions, backend="native"),
        lambda: torch.ops.longspan.native(*values, text, tensors, token_mask, positions, None, 0, 0.5)[0],
        lambda: attend_packed(*(value.flatten(0, 1) for value in values), Sequences([0, shape[1]]), pattern),
    ]
    for call in calls:
        try:
            out = call()
        except (ValueError, NotImplementedError) as error:
            assert len(str(error)) > 20
        else:
            assert out.shape[-1] == shape[3]
            assert out.is_meta or ((out == 0) | (out == 1)).all()
