"""Attention by longspan's own kernels for CPU: any window, global keys and LongNet segments, forward and backward.

Nothing is gathered, padded or repeated: the kernels read q, k and v where they lie, a lane for each sequence of each
head (lanes.py). Memory grows with N only; the backward pass computes the probabilities again from the log of each
row's softmax sum.

Shapes: B batch, H heads, M queries, N keys, D head width, T tokens of all packed sequences (packed_sequences.py).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longspan import kernels
from longspan.attention.backends import sdpa
from longspan.attention.backends.lanes import (
    FIELD,
    BiasTable,
    Call,
    ExtraKeys,
    Offsets,
    Place,
    bias_steps,
    find_extra_keys,
    first_call_writes_all,
    merges,
    plan_calls,
    split,
)
from longspan.attention.backends.operators import define, empty_rows, with_unit_stride
from longspan.attention.patterns import (
    DilatedSegments,
    Full,
    Pattern,
    SlidingWindow,
    pattern_from_parts,
    pattern_to_parts,
)
from longspan.attention.request import DistanceBias, Request
from longspan.kernels.memory import empty

# Where nothing is hidden torch's is faster for 16 to 128 tokens, and the two meet near 256: 12 heads of width 64,
# float32 and bfloat16, 1 thread of a busy machine. With a window they are about equal at 16 to 32 tokens, and the
# kernels are faster above.
DENSE_TOKENS = 128
# Of results in float32 that several calls add to before they become narrower: of so many heads at a time.
CACHED_BYTES = 1 << 24


def unsupported(request: Request) -> str | None:
    if request.device.type != "cpu":
        return f"the kernels run on cpu, not on {request.device.type}"
    if request.dtype not in kernels.DTYPES:
        return f"the kernels compute in float32 and bfloat16, not in {str(request.dtype).removeprefix('torch.')}"
    if request.dropout:
        return "the kernels have no dropout"
    halves = split(request.pattern)
    if isinstance(halves, str):
        return halves
    if request.query_positions is not None:
        if isinstance(halves.near, DilatedSegments):
            return "query_positions may put rows anywhere, so there are no segments"
        if isinstance(halves.near, SlidingWindow) and halves.near.dilation != 1:
            return "the kernels take query_positions only beside a window without dilation"
    return kernels.problem()


def slower(request: Request) -> str | None:
    plain = request.pattern == Full() and request.token_mask is None and request.query_positions is None
    if plain and request.k.shape[2] <= DENSE_TOKENS and sdpa.unsupported(request) is None:
        return f"up to {DENSE_TOKENS} tokens torch's dense attention starts faster where nothing is hidden"
    return None


def run(request: Request) -> tuple[Tensor, Tensor]:
    text, tensors = pattern_to_parts(request.pattern)
    q, k, v, token_mask, positions = request.q, request.k, request.v, request.token_mask, request.query_positions
    values, ahead = (None, 0) if request.bias is None else request.bias
    return torch.ops.longspan.native(q, k, v, text, tensors, token_mask, positions, values, ahead, request.scale)


def attend_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: str,
    tensors: list[Tensor],
    token_mask: Tensor | None,
    query_positions: Tensor | None,
    bias: Tensor | None,
    ahead: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out [B, H, M, D] and lse [B, H, M] for q [B, H, M, D], k, v [B, H, N, D] and a pattern in parts.

    bias, ahead: DistanceBias.
    """
    _check_rows(q, k, v)
    q, k, v = (with_unit_stride(tensor) for tensor in (q, k, v))
    seen = _look(pattern, tensors, q, k, token_mask, query_positions)
    rows = {"q": q, "k": k, "v": v, "out": _empty_rows(q, q.dtype), "lse": _empty_lse(q)}
    _compute_results(rows, ("out",), seen, scale, _check_bias(bias, ahead, q))
    return rows["out"], rows["lse"]


def _empty_rows(like: Tensor, dtype: torch.dtype) -> Tensor:
    """As `empty_rows`, in memory that is kept from call to call."""
    batch, heads, tokens, width = like.shape
    return empty([batch, tokens, heads, width], dtype).transpose(1, 2)


def _fake_attend(q, k, v, pattern, tensors, token_mask, query_positions, bias, ahead, scale):
    _check_devices(q, k, v)
    return empty_rows(q, q.dtype), _empty_lse(q)


def attend_native_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pattern: str,
    tensors: list[Tensor],
    token_mask: Tensor | None,
    query_positions: Tensor | None,
    bias: Tensor | None,
    ahead: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the bias, the last one empty where there is none."""
    _check_rows(q, k, v)
    if not grad_out.shape == out.shape == q.shape or not grad_out.dtype == out.dtype == q.dtype:
        raise ValueError(
            f"out and its gradient must be {q.dtype} {list(q.shape)} like q; "
            f"got {out.dtype} {list(out.shape)} and {grad_out.dtype} {list(grad_out.shape)}"
        )
    q, k, v, out, grad_out = (with_unit_stride(tensor) for tensor in (q, k, v, out, grad_out))
    lse = lse.contiguous()
    seen = _look(pattern, tensors, q, k, token_mask, query_positions)
    rows = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "delta": torch.zeros_like(lse), "grad_out": grad_out}
    if grad_lse is not None:
        rows["grad_lse"] = grad_lse.to(lse.dtype).contiguous()
    gradients = ("grad_q", "grad_k", "grad_v")
    rows |= {name: _empty_rows(given, q.dtype) for name, given in zip(gradients, (q, k, v), strict=True)}
    grad_bias = _compute_results(rows, gradients, seen, scale, _check_bias(bias, ahead, q))
    return rows["grad_q"], rows["grad_k"], rows["grad_v"], grad_bias


def _fake_backward(
    grad_out, grad_lse, q, k, v, out, lse, pattern, tensors, token_mask, query_positions, bias, ahead, scale
):
    grad_bias = q.new_empty(0) if bias is None else torch.empty_like(bias)
    return empty_rows(q, q.dtype), empty_rows(k, q.dtype), empty_rows(v, q.dtype), grad_bias


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.pattern, tensors, token_mask, query_positions, bias, ctx.ahead, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, token_mask, query_positions, bias, *tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    q, k, v, out, lse, token_mask, query_positions, bias, *tensors = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    *grads, grad_bias = torch.ops.longspan.native_backward(
        *(grad_out, grad_lse, q, k, v, out, lse, ctx.pattern, tensors, token_mask, query_positions),
        *(bias, ctx.ahead, ctx.scale),
    )
    return *grads, None, [None] * len(tensors), None, None, None if bias is None else grad_bias, None, None


define("longspan::native", attend_native, _fake_attend)
define("longspan::native_backward", attend_native_backward, _fake_backward)
torch.library.register_autograd("longspan::native", _backward, setup_context=_setup_context)


class Seen(NamedTuple):
    """What the rows see: the pattern, with its masks."""

    near: Pattern | None
    extra: ExtraKeys | None
    causal_extra: bool
    masks: dict[
        str, Tensor
    ]  # by field: query_mask Bool[B, M], key_mask Bool[B, N], positions Long[B, M]; packed Bool[T]
    offsets: Offsets = None
    queries: int | None = None  # how many of each packed sequence's first tokens need to read; None: all


def _look(
    text: str, tensors: list[Tensor], q: Tensor, k: Tensor, token_mask: Tensor | None, query_positions: Tensor | None
) -> Seen:
    pattern = pattern_from_parts(text, tensors)
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    pattern.check_fits(batch, heads, keys, q.device)
    halves = split(pattern)
    if isinstance(halves, str):
        raise NotImplementedError(halves)
    key_mask = query_mask = token_mask
    if token_mask is not None and (token_mask.dtype != torch.bool or token_mask.shape != (batch, keys)):
        raise ValueError(f"token_mask must be Bool[{batch}, {keys}]; got {token_mask.dtype} {list(token_mask.shape)}")
    positions = query_positions
    if positions is not None:
        positions = _check_positions(positions, batch, queries, keys)
        query_mask = None if token_mask is None else token_mask.gather(1, positions)
    elif queries != keys:
        raise ValueError(f"q has {queries} rows but k has {keys}; query_positions must say where the rows of q stand")
    extra = None
    if halves.marked is not None:
        marked = halves.marked if token_mask is None else halves.marked & token_mask
        extra = find_extra_keys(marked, None)
        key_mask = ~marked if token_mask is None else token_mask & ~marked
        if halves.near is None:
            key_mask = torch.zeros(1, 1, dtype=torch.bool).expand(batch, keys)
    masks = {"query_mask": query_mask, "key_mask": key_mask, "positions": positions}
    given = {field: mask for field, mask in masks.items() if mask is not None}
    return Seen(halves.near, extra, halves.causal_marked, given)


def _check_positions(positions: Tensor, batch: int, queries: int, keys: int) -> Tensor:
    """Long[B, M] with adjacent numbers."""
    if positions.dtype != torch.long or positions.shape not in ((queries,), (batch, queries)):
        raise ValueError(
            f"query_positions must be Long[{queries}] or Long[{batch}, {queries}]; "
            f"got {positions.dtype} {list(positions.shape)}"
        )
    first, last = positions.aminmax()
    if first < 0 or last >= keys:
        raise ValueError(f"query_positions must lie in 0..{keys - 1}, among the keys; got {int(first)} to {int(last)}")
    return positions.contiguous().expand(batch, queries)


def _check_rows(q: Tensor, k: Tensor, v: Tensor) -> None:
    """The kernels trust their addresses, so nothing that does not fit comes through, whoever calls."""
    if (
        not q.ndim == k.ndim == v.ndim == 4
        or k.shape != v.shape
        or q.shape[:2] != k.shape[:2]
        or q.shape[3] != k.shape[3]
    ):
        shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        raise ValueError(f"q, k and v must share B, H and D, and k and v also N; got {shapes}")
    check_kernels(q, k, v)


def check_kernels(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.dtype == k.dtype == v.dtype or q.dtype not in kernels.DTYPES:
        raise ValueError(f"the kernels take q, k and v in float32 or bfloat16; got {q.dtype}, {k.dtype}, {v.dtype}")
    _check_devices(q, k, v)
    if not q.is_cpu:
        raise ValueError(f"the kernels take q, k and v on cpu; got {q.device}")
    if kernels.library() is None:
        raise NotImplementedError(kernels.problem())


def _check_devices(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device; got {q.device}, {k.device}, {v.device}")


def _empty_lse(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.float32)


def _check_bias(bias: Tensor | None, ahead: int, q: Tensor) -> DistanceBias | None:
    if bias is None:
        return None
    if bias.dtype != torch.float32 or bias.ndim != 2 or len(bias) != q.shape[1] or not 0 <= ahead < bias.shape[1]:
        raise ValueError(
            f"the kernels take a bias in float32 [{q.shape[1]}, R], with the query itself at one of its columns; "
            f"got {bias.dtype} {list(bias.shape)}, column {ahead}"
        )
    return DistanceBias(bias, ahead)


def _compute_results(
    rows: dict[str, Tensor], results: tuple[str, ...], seen: Seen, scale: float, bias: DistanceBias | None
) -> Tensor:
    """As `compute`, and results that several calls add to are float32 until they are whole.

    results: the fields that hold them.
    """
    if not merges(seen.near):
        return compute(rows, seen, scale, bias)
    assert isinstance(seen.near, DilatedSegments)
    dtype, heads = rows["q"].dtype, rows["q"].shape[1]
    at_once = heads
    if dtype != torch.float32:
        of_a_head = sum(4 * rows[field][:, :1].numel() for field in results)
        at_once = max(torch.get_num_threads(), CACHED_BYTES // max(1, of_a_head))
    grad_bias = []
    for first in range(0, heads, at_once):
        some = slice(first, min(first + at_once, heads))
        part = {field: tensor[:, some] for field, tensor in rows.items()}
        if dtype != torch.float32:
            part |= {field: _empty_rows(part[field], torch.float32) for field in results}
        if not first_call_writes_all(seen.near):
            for field in results:
                part[field].zero_()
            if "grad_q" not in rows:
                part["lse"].fill_(-math.inf)
        near = seen.near.of_heads(some.start, some.stop)
        own_bias = None if bias is None else bias._replace(values=bias.values[some])
        grad_bias.append(compute(part, seen._replace(near=near), scale, own_bias))
        if dtype != torch.float32:
            for field in results:
                rows[field][:, some] = part[field]
    return torch.cat(grad_bias)


def compute(rows: dict[str, Tensor], seen: Seen, scale: float, bias: DistanceBias | None = None) -> Tensor:
    """Run the forward kernel, or the backward one where gradients are among the rows. Gives the gradient of the bias.

    rows: by field of longspan_lane, [B, H, N, D] with adjacent numbers or [B, H, N]; packed [T, H, D] or [T, H].
    """
    calls, addresses = plan(rows, seen, scale)
    library = kernels.library()
    assert library is not None
    backward = "grad_q" in rows
    run = library.longspan_attention_backward if backward else library.longspan_attention_forward
    grad_bias = torch.zeros_like(bias.values) if backward and bias is not None else rows["q"].new_empty(0)
    for number, call in enumerate(calls):
        biases = [] if bias is None else _bias_tables(bias, seen, number, rows["q"].shape[1], backward)
        table = call.table(addresses, seen.extra, biases)
        run(call.settings, table.ctypes.data, len(table))
        for _, one in biases if backward else ():
            one.add_to(grad_bias)
    return grad_bias


def plan(rows: dict[str, Tensor], seen: Seen, scale: float) -> tuple[tuple[Call, ...], np.ndarray]:
    """(the calls of the kernels, Int[fields]: where the tensors begin), for rows as `compute` takes them."""
    if not math.isfinite(scale):
        raise ValueError(f"scale, the factor on q @ k, must be finite; got {scale}")
    q, k = rows["q"], rows["k"]
    if seen.offsets is None:
        (batch, heads, queries, width), keys = q.shape, k.shape[2]
    else:
        (queries, heads, width), keys, batch = q.shape, k.shape[0], 1
        queries = queries if seen.queries is None else seen.queries
    places, addresses = [], np.zeros(len(FIELD), np.int64)
    for field, tensor in (rows | seen.masks).items():
        places.append(Place(field, tensor.dtype, *_strides(tensor, seen.offsets)))
        addresses[FIELD[field]] = tensor.data_ptr()
    shape = batch, heads, queries, keys
    return plan_calls(seen.near, seen.causal_extra, shape, seen.offsets, tuple(places), width, scale), addresses


def _bias_tables(
    bias: DistanceBias, seen: Seen, number: int, heads: int, gradient: bool
) -> list[tuple[str, BiasTable]]:
    """Of the band and, where there are any, the extra keys."""
    values, ahead = bias
    tables = [("bias", BiasTable(values, ahead, bias_steps(seen.near, number, heads), gradient))]
    if seen.extra is not None:
        tables.append(("extra_bias", BiasTable(values, ahead, np.ones(heads, np.int64), gradient)))
    return tables


def _strides(tensor: Tensor, offsets: Offsets) -> tuple[int, int, int]:
    """From one batch row, head and row to the next."""
    strides = list(tensor.stride())
    if offsets is not None:
        return 0, strides[1] if len(strides) > 1 else 0, strides[0]
    return (strides[0], strides[1], strides[2]) if len(strides) > 2 else (strides[0], 0, strides[1])
