"""What each token may see. A pattern is a description: it knows no backend and computes no attention.

Shapes: B batch, H heads, N tokens. Distances are in tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

Index = TypeVar("Index", int, Tensor)


class Reach(NamedTuple):
    """Furthest that a query looks: `before` towards the start, `after` towards the end.

    step: every visible key within reach stands a multiple of `step` away (0: only the query itself).
    """

    before: int
    after: int
    step: int = 1


class Pattern:
    """Which keys each query may see, and how often each of them enters its softmax.

    `count` is the truth. The rest are hints that let a backend skip work; a hint may be loose, never wrong.
    A new pattern is a frozen dataclass with a `name` and a `count`, and an entry in `PATTERNS`.
    """

    name: ClassVar[str]
    repeats: ClassVar[bool] = False  # hint: counts may exceed 1

    def count(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """How many times `key` enters the softmax of `query`; 0 or False hides it. The indices broadcast."""
        raise NotImplementedError

    def reach(self) -> Reach | None:
        """Bound on the distance of visible keys outside `extra_keys`; None means unbounded."""
        return None

    def extra_keys(self) -> Tensor | None:
        """Bool[B, N]: keys that may be seen from beyond `reach`."""
        return None

    def shift_invariant(self) -> bool:
        """Whether, away from `extra_keys`, the count depends on key - query and head only."""
        return False

    def looks_ahead(self) -> bool:
        """Whether a query may see keys that follow it."""
        reach = self.reach()
        return reach is None or reach.after > 0 or self.extra_keys() is not None

    def check_fits(self, batch: int, heads: int, tokens: int, device: torch.device) -> None:
        """Raise ValueError when the pattern was made for other shapes or another device."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able description; `pattern_from_dict` reads it back."""
        return _encode(self, None)

    def __or__(self, other: Pattern) -> Union:
        if not isinstance(other, Pattern):
            return NotImplemented
        return Union((*parts_of(self), *parts_of(other)))


@dataclass(frozen=True)
class Full(Pattern):
    """Every token sees every token; with `causal`, those up to itself."""

    causal: bool = False
    name: ClassVar[str] = "full"

    def count(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query if self.causal else (key >= 0) & (query >= 0)

    def shift_invariant(self) -> bool:
        return True

    def looks_ahead(self) -> bool:
        return not self.causal


@dataclass(frozen=True)
class SlidingWindow(Pattern):
    """A token sees `before` keys to its left, itself, and `after` keys to its right.

    dilation: distance between neighbouring keys, so the window spans `before * dilation` tokens to the left;
    one number, or one per head. `after=0` makes it causal.
    Source: Longformer, arXiv 2004.05150, section 3.1 (its w is `before + after`).
    """

    before: int
    after: int
    dilation: int | tuple[int, ...] = 1
    name: ClassVar[str] = "sliding_window"

    def __post_init__(self) -> None:
        if not isinstance(self.dilation, int):
            object.__setattr__(self, "dilation", tuple(self.dilation))
        if not all(isinstance(side, int) and side >= 0 for side in (self.before, self.after)):
            raise ValueError(
                f"SlidingWindow needs whole before >= 0 and after >= 0, in tokens per side; "
                f"got before={self.before}, after={self.after}"
            )
        if not self._dilations or min(self._dilations) < 1:
            raise ValueError(
                f"SlidingWindow needs dilation >= 1 (1 leaves no gaps), as one number or a tuple with one per head; "
                f"got {self.dilation!r}"
            )

    @property
    def _dilations(self) -> tuple[int, ...]:
        return (self.dilation,) if isinstance(self.dilation, int) else self.dilation

    def count(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        offset = key - query
        if self.dilation == 1:
            return (offset >= -self.before) & (offset <= self.after)
        dilation = self.dilation
        if not isinstance(dilation, int):
            dilation = torch.tensor(dilation, device=head.device)[head]
        inside = (offset >= -self.before * dilation) & (offset <= self.after * dilation)
        return inside & (offset % dilation == 0)

    def reach(self) -> Reach:
        longest = max(self._dilations)
        return Reach(self.before * longest, self.after * longest, math.gcd(*self._dilations))

    def shift_invariant(self) -> bool:
        return True

    def check_fits(self, batch: int, heads: int, tokens: int, device: torch.device) -> None:
        if not isinstance(self.dilation, int) and len(self.dilation) != heads:
            raise ValueError(
                f"SlidingWindow has {len(self.dilation)} dilations but q has {heads} heads; "
                f"give one number for all heads or a tuple of {heads}"
            )


@dataclass(frozen=True, eq=False, repr=False)
class GlobalKeys(Pattern):
    """Every token sees the marked keys; with `causal`, those up to itself.

    marked: Bool[B, N]. A causal language model needs `causal=True`, or it sees global tokens of its future.
    """

    marked: Tensor
    causal: bool = False
    name: ClassVar[str] = "global_keys"

    def __post_init__(self) -> None:
        if not isinstance(self.marked, Tensor):
            object.__setattr__(self, "marked", torch.tensor(self.marked))
        if self.marked.dtype != torch.bool or self.marked.ndim != 2:
            raise ValueError(
                f"GlobalKeys needs marked as Bool[B, N], True where every token may look; "
                f"got {self.marked.dtype} {list(self.marked.shape)}"
            )

    def count(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return self.marked[batch, key] & (key <= query if self.causal else query >= 0)

    def reach(self) -> Reach:
        return Reach(0, 0, 0)

    def extra_keys(self) -> Tensor:
        return self.marked

    def shift_invariant(self) -> bool:
        return True

    def looks_ahead(self) -> bool:
        return not self.causal

    def check_fits(self, batch: int, heads: int, tokens: int, device: torch.device) -> None:
        if self.marked.shape != (batch, tokens):
            raise ValueError(
                f"GlobalKeys.marked has shape {list(self.marked.shape)} but k has B={batch}, N={tokens}; "
                f"it must be Bool[{batch}, {tokens}]"
            )
        if self.marked.device != device:
            raise ValueError(f"GlobalKeys.marked is on {self.marked.device} but q is on {device}; move it there")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GlobalKeys):
            return NotImplemented
        return self.causal == other.causal and torch.equal(self.marked, other.marked)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        causal = ", causal=True" if self.causal else ""
        return f"GlobalKeys(marked=Bool{list(self.marked.shape)}{causal})"


@dataclass(frozen=True)
class DilatedSegments(Pattern):
    """LongNet attention: split the tokens in segments, keep every `stride`-th token of each.

    branches: (segment length, stride) pairs, both in tokens. A key kept by two branches counts twice; this equals
    mixing the branches by their softmax denominators. A token that no branch keeps sees nothing.
    offsets: which tokens head h keeps: those at h * stride // heads ("grouped", the released code, neighbouring heads
    alike) or h % stride ("interleaved", the paper), counted from the start of the segment.
    part: (first, end) where q, k and v hold only the heads from `first` to before `end`, as when a layer is computed
    some heads at a time.
    Source: LongNet, arXiv 2307.02486, section 2.
    """

    branches: tuple[tuple[int, int], ...]
    heads: int
    causal: bool = False
    offsets: Literal["grouped", "interleaved"] = "grouped"
    part: tuple[int, int] | None = None
    name: ClassVar[str] = "dilated_segments"
    repeats: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "branches", tuple(tuple(branch) for branch in self.branches))
        if not self.branches or any(len(branch) != 2 or min(branch) < 1 for branch in self.branches):
            raise ValueError(
                f"DilatedSegments needs at least one (segment length, stride) pair of numbers >= 1; "
                f"got branches={self.branches!r}"
            )
        if self.heads < 1:
            raise ValueError(f"DilatedSegments needs heads >= 1, the number of heads of q; got {self.heads}")
        if self.part is not None:
            object.__setattr__(self, "part", tuple(self.part))
            if len(self.part) != 2 or not 0 <= self.part[0] < self.part[1] <= self.heads:
                raise ValueError(
                    f"DilatedSegments.part is (first, end) with 0 <= first < end <= {self.heads}, the heads; "
                    f"got {self.part}"
                )
        if self.offsets not in ("grouped", "interleaved"):
            raise ValueError(
                f"DilatedSegments.offsets must be 'grouped' (released code) or 'interleaved' (paper); "
                f"got {self.offsets!r}"
            )

    @classmethod
    def mixture(
        cls,
        segment_lengths: int | Sequence[int],
        dilations: int | Sequence[int],
        heads: int,
        causal: bool = False,
        offsets: Literal["grouped", "interleaved"] = "grouped",
    ) -> DilatedSegments:
        """LongNet's mixture from its two lists; one number in place of a list goes with all numbers of the other."""
        given = f"got segment lengths {segment_lengths} and dilations {dilations}"
        lengths, rates = ([one] if isinstance(one, int) else list(one) for one in (segment_lengths, dilations))
        if isinstance(segment_lengths, int):
            lengths *= len(rates)
        if isinstance(dilations, int):
            rates *= len(lengths)
        if len(lengths) != len(rates) or not lengths:
            raise ValueError(f"there must be as many dilations as segment lengths, and at least one; {given}")
        if not all(isinstance(number, int) and number >= 1 for number in (*lengths, *rates)):
            raise ValueError(f"segment lengths and dilations are whole numbers of tokens, at least 1; {given}")
        if any(rate > length for length, rate in zip(lengths, rates, strict=True)):
            raise ValueError(f"a dilation must not exceed its segment length, or heads would keep no token; {given}")
        return cls(tuple(zip(lengths, rates, strict=True)), heads, causal, offsets)

    def of_heads(self, first: int, end: int) -> DilatedSegments:
        """Of the heads of q from `first` to before `end` alone."""
        before = 0 if self.part is None else self.part[0]
        return replace(self, part=(before + first, before + end))

    def offset(self, head: Index, stride: int) -> Index:
        """First position that `head`, counted among those of q, keeps in every segment of a branch."""
        head = head + (0 if self.part is None else self.part[0])
        return head * stride // self.heads if self.offsets == "grouped" else head % stride

    def count(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        total = 0
        for length, stride in self.branches:
            start = self.offset(head, stride)
            same = query // length == key // length
            kept = (query % length % stride == start) & (key % length % stride == start)
            total = total + (same & kept).long()
        assert isinstance(total, Tensor)  # there is at least one branch
        return total * (key <= query) if self.causal else total

    def looks_ahead(self) -> bool:
        return not self.causal

    def check_fits(self, batch: int, heads: int, tokens: int, device: torch.device) -> None:
        own = self.heads if self.part is None else self.part[1] - self.part[0]
        if own != heads:
            raise ValueError(f"DilatedSegments was made for {own} heads but q has {heads}; they must be equal")


@dataclass(frozen=True)
class Union(Pattern):
    """A key is seen when any part sees it. It counts as often as in the part where it counts most, so once for
    booleans. Write it `a | b`."""

    parts: tuple[Pattern, ...]
    name: ClassVar[str] = "union"

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        if not self.parts or not all(isinstance(part, Pattern) for part in self.parts):
            raise ValueError(f"Union needs at least one pattern and nothing else; got {self.parts!r}")

    @property
    def repeats(self) -> bool:  # type: ignore[override]
        return any(part.repeats for part in self.parts)

    def count(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        counts = [part.count(batch, head, query, key) for part in self.parts]
        total = counts[0]
        for count in counts[1:]:
            both_bool = total.dtype == count.dtype == torch.bool
            total = total | count if both_bool else torch.maximum(total.long(), count.long())
        return total

    def reach(self) -> Reach | None:
        reaches = [part.reach() for part in self.parts]
        bounded = [reach for reach in reaches if reach is not None]
        if len(bounded) < len(reaches):
            return None
        return Reach(
            max(reach.before for reach in bounded),
            max(reach.after for reach in bounded),
            math.gcd(*(reach.step for reach in bounded)),
        )

    def extra_keys(self) -> Tensor | None:
        marked = None
        for part in self.parts:
            extra = part.extra_keys()
            if extra is not None:
                marked = extra if marked is None else marked | extra
        return marked

    def shift_invariant(self) -> bool:
        return all(part.shift_invariant() for part in self.parts)

    def looks_ahead(self) -> bool:
        return any(part.looks_ahead() for part in self.parts)

    def check_fits(self, batch: int, heads: int, tokens: int, device: torch.device) -> None:
        for part in self.parts:
            part.check_fits(batch, heads, tokens, device)

    def __repr__(self) -> str:
        return " | ".join(repr(part) for part in self.parts)


PATTERNS: dict[str, type[Pattern]] = {
    pattern.name: pattern for pattern in (Full, SlidingWindow, GlobalKeys, DilatedSegments, Union)
}


def pattern_from_dict(description: dict[str, Any]) -> Pattern:
    """The pattern that `Pattern.to_dict` described. Raises ValueError for an unknown type or field."""
    pattern = _decode(description, ())
    if not isinstance(pattern, Pattern):
        raise ValueError(f"a pattern is a dict with a 'type'; got {description!r}")
    return pattern


def pattern_to_parts(pattern: Pattern) -> tuple[str, list[Tensor]]:
    """A pattern as JSON text and tensors: the form in which it passes through a torch operator."""
    tensors: list[Tensor] = []
    return _to_json(_encode(pattern, tensors)), tensors


def pattern_from_parts(text: str, tensors: list[Tensor]) -> Pattern:
    """The pattern that `pattern_to_parts` took apart."""
    return _decode(json.loads(text), tensors)


def _to_json(value: Any) -> str:
    """`json.dumps` of what `_encode` gives, in code that torch.compile can trace."""
    if isinstance(value, dict):
        return "{" + ", ".join([f'"{name}": {_to_json(item)}' for name, item in value.items()]) + "}"
    if isinstance(value, list):
        return "[" + ", ".join([_to_json(item) for item in value]) + "]"
    if isinstance(value, str):
        return f'"{value}"'
    return "null" if value is None else str(value).lower()  # true, false and numbers


def parts_of(pattern: Pattern) -> tuple[Pattern, ...]:
    """Of a union; of any other pattern, itself."""
    return pattern.parts if isinstance(pattern, Union) else (pattern,)


def _encode(value: Any, tensors: list[Tensor] | None) -> Any:
    """JSON-able form. Tensors become nested lists or, where a list is given, move there and leave their index."""
    if isinstance(value, Pattern):
        if PATTERNS.get(value.name) is not type(value):
            kind = type(value).__name__
            raise ValueError(f"pattern {kind} is not in PATTERNS; add it there: PATTERNS[{value.name!r}] = {kind}")
        described = {field.name: _encode(getattr(value, field.name), tensors) for field in fields(value)}  # type: ignore[arg-type]
        return {"type": value.name, **described}
    if isinstance(value, Tensor):
        if tensors is None:
            return value.tolist()
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, (tuple, list)):
        return [_encode(item, tensors) for item in value]
    return value


def _decode(value: Any, tensors: tuple[Tensor, ...] | list[Tensor]) -> Any:
    if isinstance(value, dict) and "tensor" in value:
        return tensors[value["tensor"]]
    if isinstance(value, dict):
        kind = PATTERNS.get(value.get("type", ""))
        if kind is None:
            raise ValueError(f"a pattern needs a 'type' out of {', '.join(PATTERNS)}; got {value!r}")
        given = {name: _decode(item, tensors) for name, item in value.items() if name != "type"}
        try:
            return kind(**given)
        except TypeError:
            names = ", ".join(field.name for field in fields(kind))  # type: ignore[arg-type]
            raise ValueError(f"pattern type {kind.name!r} has the fields {names}; got {', '.join(given)}") from None
    if isinstance(value, list):
        return tuple(_decode(item, tensors) for item in value)
    return value
