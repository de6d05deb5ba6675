"""What the kernels are told: a table with a lane for each sequence of each head.

Where the lanes lie depends on shapes and pattern only and is kept from call to call; the addresses come at the end.

Shapes: B batch, H heads, N tokens, S sequences, L lanes. Sequences are the rows of a batch or, packed, stand one after
the other in the single row of a batch; then `offsets` says where each begins and, last, where all end.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longspan.attention.patterns import DilatedSegments, Full, GlobalKeys, Pattern, SlidingWindow, Union
from longspan.kernels import BIAS_MARGIN, DTYPES, LANE_FIELDS, AttentionCall

Offsets = tuple[int, ...] | None

FIELD = {name: number for number, name in enumerate(LANE_FIELDS)}


class Split(NamedTuple):
    """A pattern as the kernels see it.

    near: Full, SlidingWindow or DilatedSegments; None: nothing. marked: Bool[B, N], keys seen from any distance.
    """

    near: Pattern | None
    marked: Tensor | None
    causal_marked: bool

    @property
    def looks_back_only(self) -> bool:
        return self.near is None or not self.near.looks_ahead()


def split(pattern: Pattern) -> Split | str:
    """The two halves of a pattern, or why it has not this form."""
    parts = _flatten(pattern)
    near = [part for part in parts if not isinstance(part, GlobalKeys)]
    marks = [part for part in parts if isinstance(part, GlobalKeys)]
    for part in near:
        if not isinstance(part, (Full, SlidingWindow, DilatedSegments)):
            return f"the kernels do not know {part.name}"
        if len(parts) > 1 and isinstance(part, DilatedSegments):
            return "the kernels compute dilated_segments alone, not in a union"
    if len(near) > 1:
        return "the kernels compute one window beside the global keys, not several"
    causal = any(part.causal for part in marks)
    if causal and not all(part.causal for part in marks):
        return "the kernels compute global keys that are all causal or all not"
    marked = None
    for part in marks:
        marked = part.marked if marked is None else marked | part.marked
    halves = Split(near[0] if near else None, marked, causal)
    if causal and not halves.looks_back_only:
        return "the kernels compute causal global keys only beside a window that does not look ahead"
    return halves


def _flatten(pattern: Pattern) -> list[Pattern]:
    return [one for part in pattern.parts for one in _flatten(part)] if isinstance(pattern, Union) else [pattern]


class ExtraKeys(NamedTuple):
    """The marked keys of each sequence, counted from its start, ascending. Sequences follow one another."""

    positions: np.ndarray  # Int[all]
    starts: np.ndarray  # Int[S]: the first of each sequence among `positions`
    counts: np.ndarray  # Int[S]


def find_extra_keys(marked: Tensor, offsets: Offsets) -> ExtraKeys:
    """marked: Bool[B, N]."""
    batch, tokens = marked.shape
    bounds = np.arange(batch + 1) * tokens if offsets is None else np.array(offsets)
    places = np.flatnonzero(marked.numpy())
    edges = np.searchsorted(places, bounds)
    counts = np.diff(edges)
    return ExtraKeys(places - np.repeat(bounds[:-1], counts), edges[:-1], counts)


class Place(NamedTuple):
    """How a tensor lies in memory: its strides, in elements, and the field of a lane that holds its addresses."""

    field: str
    dtype: torch.dtype
    batch: int
    head: int
    row: int


class Call(NamedTuple):
    """One call of the kernels, without addresses."""

    settings: AttentionCall
    lanes: np.ndarray  # Int[L, fields]: longspan_lane; instead of an address, its distance from where the tensor begins
    sequences: np.ndarray  # Int[L]
    heads: np.ndarray  # Int[L]

    def table(
        self, addresses: np.ndarray, extra: ExtraKeys | None, biases: Sequence[tuple[str, BiasTable]] = ()
    ) -> np.ndarray:
        """The lanes as the kernels take them. addresses: Int[fields], where the tensors begin.

        biases: by field, tables that serve some of the lanes; later ones take precedence.
        """
        table = self.lanes + addresses
        for field, bias in biases:
            bias.enter(table, field, self.heads)
        if extra is not None:
            table[:, FIELD["extra"]] = extra.starts[self.sequences] * 8 + extra.positions.ctypes.data
            table[:, FIELD["extras"]] = extra.counts[self.sequences]
        return table


class BiasTable:
    """A DistanceBias as the kernels read it: in steps of so many tokens from query to key, with margins at both ends.

    steps: Int[H], tokens of one step for each head. values: Float32[H, R].
    """

    def __init__(self, values: Tensor, ahead: int, steps: np.ndarray, gradient: bool):
        columns = values.shape[1]
        smallest = int(steps.min())
        self.first = -((columns - 1 - ahead) // smallest + 1 + BIAS_MARGIN)
        last = ahead // smallest + 1 + BIAS_MARGIN
        places = torch.arange(self.first, last + 1)
        by_head = ahead - places * torch.from_numpy(steps)[:, None]
        self.columns = by_head.clamp_(0, columns - 1)  # Long[H, entries]
        self.values = values.gather(1, self.columns)
        self.gradient = torch.zeros_like(self.values) if gradient else None

    def enter(self, table: np.ndarray, field: str, heads: np.ndarray) -> None:
        """Write the addresses of each lane's head into the table of lanes."""
        row = self.values.stride(0) * self.values.element_size()
        table[:, FIELD[field]] = self.values.data_ptr() + heads * row
        if self.gradient is not None:
            table[:, FIELD[f"{field}_gradient"]] = self.gradient.data_ptr() + heads * row
        table[:, FIELD[f"{field}_first"]], table[:, FIELD[f"{field}_count"]] = self.first, self.values.shape[1]

    def add_to(self, gradient: Tensor) -> None:
        """Add the gradient of the entries to that of the values, Float32[H, R]."""
        assert self.gradient is not None
        gradient.scatter_add_(1, self.columns, self.gradient)


class _Lanes(NamedTuple):
    first: np.ndarray  # Int[L, 3]: where each begins: batch row, head, token
    sequences: np.ndarray  # Int[L]
    numbers: dict[str, int | np.ndarray]  # Int[L] or alike for all, by field
    step: int = 1  # tokens from one row of a lane to the next


def bias_steps(near: Pattern | None, call: int, heads: int) -> np.ndarray:
    """Int[H]: tokens from one key to the next that the kernels count as one step, in the `call`-th of `plan_calls`."""
    if isinstance(near, DilatedSegments):
        return np.full(heads, near.branches[call][1])
    dilation = near.dilation if isinstance(near, SlidingWindow) else 1
    return np.broadcast_to(np.array(dilation, np.int64), heads).copy()


def merges(near: Pattern | None) -> bool:
    """Whether several calls add to a row, or none writes it."""
    return isinstance(near, DilatedSegments) and (
        len(near.branches) > 1 or any(stride > 1 for _, stride in near.branches)
    )


def first_call_writes_all(near: Pattern | None) -> bool:
    """Whether the calls after the first add to rows that it has written, so that nothing need stand in them before."""
    return not isinstance(near, DilatedSegments) or near.branches[0][1] == 1


@functools.lru_cache(maxsize=128)
def plan_calls(
    near: Pattern | None,
    causal_extra: bool,
    shape: tuple[int, int, int, int],
    offsets: Offsets,
    layout: tuple[Place, ...],
    width: int,
    scale: float,
) -> tuple[Call, ...]:
    """The calls that compute a pattern.

    shape: B, H, rows of q (N unless only some are given, or only so many of each packed sequence read), N. layout: of
    the tensors of a forward or a backward pass.
    """
    batch, heads, queries, keys = shape
    if offsets is None:
        rows, starts, lengths = np.arange(batch), np.zeros(batch, np.int64), np.full(batch, keys)
    else:
        starts, lengths = np.array(offsets[:-1], np.int64), np.diff(offsets)
        rows = np.zeros(len(starts), np.int64)
    if isinstance(near, DilatedSegments):
        parts = [_segment_lanes(near, heads, rows, starts, lengths, *branch) for branch in near.branches]
    else:
        counts = lengths
        if queries != keys:
            counts = np.full(batch, queries) if offsets is None else np.minimum(lengths, queries)
        parts = [_window_lanes(near, heads, rows, starts, lengths, counts)]
    calls = []
    for number, part in enumerate(parts):
        table = np.zeros((len(part.first), len(LANE_FIELDS)), np.int64)
        fields, steps = _address_steps(layout)
        table[:, fields] = part.first @ steps
        for name, values in part.numbers.items():
            table[:, FIELD[name]] = values
        table[:, FIELD["extra_causal"]] = causal_extra
        some = table[:, FIELD["queries"]] > 0
        accumulate = number > 0 or not first_call_writes_all(near)
        settings = _settings(layout, width, scale, part.step, accumulate)
        calls.append(Call(settings, table[some], part.sequences[some], part.first[some, 1]))
    return tuple(calls)


@functools.lru_cache(maxsize=32)
def _address_steps(layout: tuple[Place, ...]) -> tuple[list[int], np.ndarray]:
    """The fields of the places, and Int[3, places]: bytes from one batch row, head and token to the next."""
    steps = [[place.batch, place.head, place.row] for place in layout]
    sizes = [[place.dtype.itemsize] for place in layout]
    return [FIELD[place.field] for place in layout], (np.array(steps) * np.array(sizes)).T


@functools.lru_cache(maxsize=32)
def _settings(layout: tuple[Place, ...], width: int, scale: float, step: int, accumulate: bool) -> AttentionCall:
    dtypes = {place.field: DTYPES.get(place.dtype, 0) for place in layout}
    strides = {f"{place.field}_stride": place.row * step for place in layout}
    return AttentionCall(
        dtype=dtypes["q"],
        out_dtype=dtypes.get("out", 0),
        grad_dtype=dtypes.get("grad_q", 0),
        accumulate=accumulate,
        width=width,
        scale=scale,
        **{name: stride for name, stride in strides.items() if hasattr(AttentionCall, name)},
    )


def _window_lanes(
    near: Pattern | None, heads: int, rows: np.ndarray, starts: np.ndarray, lengths: np.ndarray, queries: np.ndarray
) -> _Lanes:
    """A lane for each sequence and head. `near` None sees no key: the key mask must hide them all."""
    sequences, head = np.repeat(np.arange(len(rows)), heads), np.tile(np.arange(heads), len(rows))
    lengths = lengths[sequences]
    limit = int(lengths.max(initial=1))  # what reaches further changes nothing, and numbers of 64 bits must hold it
    before = after = limit
    dilations: int | tuple[int, ...] = 1
    if isinstance(near, SlidingWindow):
        before, after, dilations = min(near.before, limit), min(near.after, limit), near.dilation
    elif _is_causal(near):
        after = 0
    dilations = (dilations,) * heads if isinstance(dilations, int) else dilations
    return _Lanes(
        np.array([rows[sequences], head, starts[sequences]]).T,
        sequences,
        {
            "queries": queries[sequences],
            "keys": lengths,
            "before": before,
            "after": after,
            "dilation": np.array([min(dilation, limit) for dilation in dilations])[head],
        },
    )


def _segment_lanes(
    near: DilatedSegments,
    heads: int,
    rows: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    segment_length: int,
    stride: int,
) -> _Lanes:
    """A lane for each segment of each sequence and head: the tokens that the head keeps of the segment."""
    segment_length = min(segment_length, int(lengths.max(initial=1)))
    offsets = np.array([min(near.offset(head, stride), segment_length) for head in range(heads)])
    stride = min(stride, segment_length)
    numbers = -(-lengths // segment_length)
    sequence = np.repeat(np.arange(len(rows)), numbers)
    begin = (np.arange(len(sequence)) - np.repeat(np.cumsum(numbers) - numbers, numbers)) * segment_length
    length = np.minimum(segment_length, lengths[sequence] - begin)
    segment, head = (index.ravel() for index in np.mgrid[: len(sequence), :heads])
    kept = np.maximum(0, -(-(length[segment] - offsets[head]) // stride))
    sequences = sequence[segment]
    return _Lanes(
        np.stack([rows[sequences], head, starts[sequences] + begin[segment] + offsets[head]], 1),
        sequences,
        {"queries": kept, "keys": kept, "before": kept, "after": 0 if near.causal else kept, "dilation": 1},
        step=stride,
    )


def _is_causal(near: Pattern | None) -> bool:
    return isinstance(near, (Full, DilatedSegments)) and near.causal
