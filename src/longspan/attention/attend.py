"""The one entry to attention: check the inputs, take the first backend without objection, run it.

Shapes: B batch, H heads, M queries, N keys, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from longspan.attention.backends import BACKENDS, Backend, Request
from longspan.attention.patterns import Pattern
from longspan.attention.request import DistanceBias


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    token_mask: Tensor | None = ...,
    query_positions: Tensor | None = ...,
    scale: float | None = ...,
    dropout: float = ...,
    bias: DistanceBias | None = ...,
    backend: str = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    token_mask: Tensor | None = ...,
    query_positions: Tensor | None = ...,
    scale: float | None = ...,
    dropout: float = ...,
    bias: DistanceBias | None = ...,
    backend: str = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    token_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    bias: DistanceBias | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each query over the keys that `pattern` lets it see.

    q: [B, H, M, D]. k, v: [B, H, N, D]. token_mask: Bool[B, N], True for tokens, False for padding; None: all tokens.
    query_positions: Long[M] or Long[B, M], where the rows of q stand among the N tokens; None: q has all N rows.
    scale: factor on q @ k, D ** -0.5 by default. dropout: fraction of the probabilities dropped, whoever calls.
    bias: what is added to the scaled scores by head and distance; its values may ask for gradients.
    backend: "auto" or a name out of BACKENDS; one that is asked for by name never falls back to another.

    Returns out [B, H, M, D]; with return_lse also the log of each row's softmax sum, [B, H, M] in float32 or wider.
    Padded rows, and rows that see nothing, give exactly 0 (lse -inf) and finite gradients; what padded rows of q, k
    and v hold, NaN included, reaches neither outputs nor gradients of tokens.
    Raises ValueError for inputs that do not fit together, NotImplementedError where no backend can run them.
    """
    request = make_request(q, k, v, pattern, token_mask, query_positions, scale, dropout, return_lse, bias)
    out, lse = choose_backend(request, backend).run(request)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


@dataclass(frozen=True)
class Explanation:
    """Who computes a call of `attend`, and why the others do not. Print it.

    backend: the one that "auto" takes; None where no backend can run the call.
    reasons: for each other backend, in the order in which they are asked, why it does not run.
    """

    call: str
    backend: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        width = max(len(candidate.name) for candidate in BACKENDS)
        lines = [f"attend({self.call})"]
        for candidate in BACKENDS:
            verdict = "runs it" if candidate.name == self.backend else self.reasons[candidate.name]
            mark = ">" if candidate.name == self.backend else " "
            lines.append(f"{mark} {candidate.name:{width}}  {verdict}")
        return "\n".join(lines)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    token_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    bias: DistanceBias | None = None,
    return_lse: bool = False,
) -> Explanation:
    """Which backend `attend` would take for these arguments, and why not the others. Computes no attention."""
    request = make_request(q, k, v, pattern, token_mask, query_positions, scale, dropout, return_lse, bias)
    able = [candidate for candidate in BACKENDS if candidate.unsupported(request) is None]
    chosen = _choose(request, able).name if able else None
    reasons = {}
    for candidate in BACKENDS:
        refusal, objection = candidate.unsupported(request), candidate.slower(request)
        if candidate.name == chosen:
            continue
        if refusal is not None:
            reasons[candidate.name] = f"cannot: {refusal}"
        elif objection is not None:
            reasons[candidate.name] = f"could, but {objection}"
        else:
            reasons[candidate.name] = f"could, but {chosen} is asked before it"
    grad = ", with gradients" if request.needs_grad else ""
    call = (
        f"q {list(q.shape)}, k {list(k.shape)}, {str(q.dtype).removeprefix('torch.')} on {q.device}{grad}: {pattern!r}"
    )
    return Explanation(call, chosen, reasons)


def choose_backend(request: Request, backend: str) -> Backend:
    """The named backend, or for "auto" the first that neither refuses nor expects to be slower than another."""
    if backend == "auto":
        able = [candidate for candidate in BACKENDS if candidate.unsupported(request) is None]
        if able:
            return _choose(request, able)
        reasons = "\n".join(f"  {candidate.name}: {candidate.unsupported(request)}" for candidate in BACKENDS)
        raise NotImplementedError(f"no backend can run {request.pattern!r} on these inputs:\n{reasons}")
    for candidate in BACKENDS:
        if candidate.name == backend:
            reason = candidate.unsupported(request)
            if reason is None:
                return candidate
            raise NotImplementedError(
                f"backend {backend!r} cannot run {request.pattern!r}: {reason}. "
                f"A backend that is asked for by name never falls back; backend='auto' takes one that can, if any"
            )
    names = ", ".join(repr(candidate.name) for candidate in BACKENDS)
    raise ValueError(f"unknown backend {backend!r}; give 'auto' or one of {names}")


def _choose(request: Request, able: list[Backend]) -> Backend:
    return next((candidate for candidate in able if candidate.slower(request) is None), able[0])


def make_request(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    token_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
    bias: DistanceBias | None = None,
) -> Request:
    """The inputs of `attend`, checked. Raises ValueError."""
    _check_tensors(q, k, v)
    batch, heads, queries, width = q.shape
    tokens = k.shape[2]
    if not isinstance(pattern, Pattern):
        raise ValueError(
            f"pattern must be a longspan.attention Pattern, such as SlidingWindow(64, 64); got {pattern!r}"
        )
    pattern.check_fits(batch, heads, tokens, q.device)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is the fraction of probabilities to drop, 0 <= dropout < 1; got {dropout}")
    if token_mask is not None:
        _check_index("token_mask", token_mask, torch.bool, [(batch, tokens)], q.device)
    if query_positions is not None:
        _check_index("query_positions", query_positions, torch.long, [(queries,), (batch, queries)], q.device)
    elif queries != tokens:
        raise ValueError(
            f"q has {queries} rows but k has {tokens}; give query_positions, Long[{queries}] or "
            f"Long[{batch}, {queries}], to say where the rows of q stand"
        )
    return Request(
        q=q,
        k=k,
        v=v,
        pattern=pattern,
        token_mask=token_mask,
        query_positions=query_positions,
        scale=width**-0.5 if scale is None else scale,
        dropout=dropout,
        return_lse=return_lse,
        bias=None if bias is None else _check_bias(bias, q),
    )


def _check_bias(bias: DistanceBias, q: Tensor) -> DistanceBias:
    """The bias in the dtype of scores."""
    if not isinstance(bias, DistanceBias):
        raise ValueError(f"bias must be a DistanceBias(values, ahead), a table by head and distance; got {type(bias)}")
    values, heads = bias.values, q.shape[1]
    if values.ndim != 2 or values.shape[0] != heads or not values.shape[1] or not values.is_floating_point():
        raise ValueError(
            f"bias.values must be floating-point [H={heads}, R], a row for each head and a column for each distance; "
            f"got {values.dtype} {list(values.shape)}"
        )
    if values.device != q.device:
        raise ValueError(f"bias.values is on {values.device} but q is on {q.device}; move it there")
    if not 0 <= bias.ahead < values.shape[1]:
        raise ValueError(
            f"bias.ahead is the column of the query itself, 0 <= ahead < {values.shape[1]} columns; got {bias.ahead}"
        )
    return DistanceBias(values.to(torch.promote_types(q.dtype, torch.float32)), bias.ahead)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"q must be [B, H, M, D] and k, v [B, H, N, D]; got {shapes}")
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k and v must share B, H and D, and k and v also N; got {shapes}")
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"q, k and v must not be empty; got {shapes}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must share one floating-point dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device; got {q.device}, {k.device}, {v.device}")


def _check_index(
    name: str, index: Tensor, dtype: torch.dtype, shapes: list[tuple[int, ...]], device: torch.device
) -> None:
    if index.dtype != dtype or tuple(index.shape) not in shapes or index.device != device:
        allowed = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(
            f"{name} must be {dtype} {allowed} on {device}; got {index.dtype} {list(index.shape)} on {index.device}"
        )
