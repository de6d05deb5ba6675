"""`attend` for a sequence that lies on several ranks, each with the queries, keys and values of its own tokens."""

from __future__ import annotations

from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor

from longspan.attention import DilatedSegments, GlobalKeys, Pattern
from longspan.attention import attend as attend_here
from longspan.attention.patterns import parts_of
from longspan.attention.request import DistanceBias
from longspan.distributed.segments import attend_segments
from longspan.distributed.shards import SequenceShards
from longspan.distributed.windows import attend_windows


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    shards: SequenceShards,
    *,
    token_mask: Tensor | None = ...,
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
    shards: SequenceShards,
    *,
    token_mask: Tensor | None = ...,
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
    shards: SequenceShards,
    *,
    token_mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    bias: DistanceBias | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """This rank's rows of what `longspan.attend` gives for the whole sequence; all ranks call it together.

    q, k, v: [B, H, n, D], of this rank's tokens. token_mask: Bool[B, n], on every rank or on none. pattern: of the
    whole sequence, but for `GlobalKeys.marked`, which is Bool[B, n]. dropout: drawn by each rank's own generator, so
    seed the ranks differently. The rest is as in `longspan.attend`.
    Outputs and gradients are those of one process; that of `bias.values` is this rank's share, to be added up as
    those of other weights are. Raises ValueError on all ranks where their arguments differ, and
    NotImplementedError for dilated segments united with others, several `GlobalKeys`, and either of them with a bias.
    """
    if not q.shape == k.shape == v.shape or q.ndim != 4 or q.shape[2] != shards.end - shards.start:
        raise ValueError(
            f"q, k and v must be [B, H, n, D] with the {shards.end - shards.start} tokens of this rank; got "
            f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    marks = [part.marked for part in parts_of(pattern) if isinstance(part, GlobalKeys)]
    for name, given in (("token_mask", token_mask), *(("GlobalKeys.marked", mark) for mark in marks)):
        if given is not None and (given.dtype != torch.bool or given.shape != (q.shape[0], q.shape[2])):
            raise ValueError(
                f"{name} must be Bool{[q.shape[0], q.shape[2]]}, of this rank's tokens; got {given.dtype} "
                f"{list(given.shape)}"
            )
    if shards.size > 1:
        learns = any(part.requires_grad for part in (q, k, v)) and torch.is_grad_enabled()
        asked = f"{_described(pattern)} on {q.shape[0]} rows of {q.shape[1]} x {q.shape[3]} {q.dtype}"
        given = f"scale {scale}, dropout {dropout}, mask {token_mask is not None}, bias {bias is not None}"
        shards.agree(f"{asked}, {given}, gradients {learns}")
        _check_parts(pattern, bias)
        if learns:  # whose exchanges then have a way back on every rank
            k, v = (part if part.requires_grad else part.detach().requires_grad_() for part in (k, v))
    compute = partial(attend_here, scale=scale, dropout=dropout, bias=bias, backend=backend, return_lse=True)
    if shards.size == 1:
        out, lse = compute(q, k, v, pattern, token_mask=token_mask)
    elif isinstance(pattern, DilatedSegments):
        out, lse = attend_segments(compute, shards, q, k, v, pattern, token_mask)
    else:
        out, lse = attend_windows(compute, shards, q, k, v, pattern, token_mask)
    return (out, lse) if return_lse else out


def _check_parts(pattern: Pattern, bias: DistanceBias | None) -> None:
    """NotImplementedError: see `attend`."""
    parts = parts_of(pattern)
    segments = any(isinstance(part, DilatedSegments) for part in parts)
    if segments and len(parts) > 1:
        raise NotImplementedError(f"dilated segments can be sharded alone, not united with others; got {pattern!r}")
    marked = sum(isinstance(part, GlobalKeys) for part in parts)
    if marked > 1:
        raise NotImplementedError(f"only one GlobalKeys of a union can be sharded; got {pattern!r}")
    if bias is not None and (marked or segments):
        raise NotImplementedError("a bias by distance cannot be sharded with GlobalKeys or dilated segments")


def _described(pattern: Pattern) -> str:
    """The same on all ranks for the same pattern, whatever each of them has marked."""
    return repr([part.causal if isinstance(part, GlobalKeys) else part for part in parts_of(pattern)])
