"""The benchmarks: which cases, and which of the project's goals they decide."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from longspan.bench.attention import AttentionCase, DilatedCase, MemoryCase
from longspan.bench.character import BANDED, LOCAL, CharacterCase
from longspan.bench.corpora import POOL, RAY, share_of_cores
from longspan.bench.encoders import (
    DENSE,
    PRECISIONS,
    SHAPES,
    STOCK,
    TINY,
    TINY_DENSE,
    DenseCase,
    EncoderCase,
    RaggedCase,
)
from longspan.bench.measure import Row
from longspan.bench.scaling import DENSE as DENSE_SDPA
from longspan.bench.scaling import OURS, SHORT_TOKENS, case_name, per_token

# Lengths of documents in one batch: from a page to the longest that Longformer reads, evenly spread.
RAGGED = (200, 757, 1313, 1870, 2427, 2983, 3540, 4096)


def encoder_cases(
    shape: str, *, layers: int | None, batches: Sequence[int], tokens: Sequence[int], quick: bool
) -> list[EncoderCase | RaggedCase]:
    """Every batch at every length; and, where neither is asked for, one batch of rows of many lengths."""
    model = (TINY if quick else SHAPES)[shape]
    if layers is not None:
        model = replace(model, layers=layers)
    lengths = RAGGED if not quick else (10, 40, 64)
    ragged = [
        RaggedCase(shape_name=shape, model=model, precision=precision, lengths=lengths)
        for precision in PRECISIONS
        if shape != "modernbert" and not batches and not tokens
    ]
    if quick:
        batches, tokens = batches or (2,), tokens or (64,)
    elif shape == "modernbert":
        batches, tokens = batches or (1,), tokens or (1024, 2048, 4096, 8192)
    else:
        batches, tokens = batches or (1, 8), tokens or (1024, 2048, 4096)
    longest = max(tokens)
    if longest > model.max_tokens:
        raise ValueError(f"the {shape} encoder reads at most {model.max_tokens:,} tokens; got --tokens {longest}")
    even = [
        EncoderCase(shape_name=shape, model=model, batch=batch, tokens=length) for batch in batches for length in tokens
    ]
    return [*even, *ragged]


def attention_cases(*, quick: bool) -> list[AttentionCase]:
    small: dict[str, Any] = {
        "tokens": 128,
        "heads": 2,
        "width": 16,
        "window": 16,
        "compiled": False,
        "gemm": (64, 64, 64),
    }
    return [
        AttentionCase(precision=precision, backward=backward, **(small if quick else {}))
        for backward in (False, True)
        for precision in ("fp32", "bf16")
    ]


def memory_cases(*, quick: bool) -> list[MemoryCase]:
    if quick:
        return [MemoryCase(tokens=1024, heads=2, width=16, window=16, beside_others=False)]
    return [MemoryCase(tokens=tokens) for tokens in (4096, 16384, 65536, 262144)]


def dense_cases(*, batches: Sequence[int], tokens: Sequence[int], quick: bool) -> list[DenseCase]:
    model = TINY_DENSE if quick else DENSE
    batches, tokens = (
        (batches or (1, 2), tokens or (32,)) if quick else (batches or (1, 32), tokens or (64, 128, 256, 512))
    )
    if max(tokens) > model.max_tokens:
        raise ValueError(f"this encoder reads at most {model.max_tokens} tokens; got --tokens {max(tokens)}")
    return [DenseCase(model=model, batch=batch, tokens=length) for batch in batches for length in tokens]


def dilated_cases(*, precisions: Sequence[str], quick: bool) -> list[DilatedCase]:
    small: dict[str, Any] = {
        "tokens": 256,
        "heads": 2,
        "width": 16,
        "branches": ((64, 1), (128, 2)),
        "gemm": (64, 64, 64),
    }
    return [DilatedCase(precision=precision, **(small if quick else {})) for precision in precisions]


def character_cases(*, precisions: Sequence[str], quick: bool) -> list[CharacterCase]:
    small: dict[str, Any] = {"batch": 1, "tokens": 64, "tiny": True} if quick else {}
    return [CharacterCase(precision=precision, **small) for precision in precisions]


class Goal(NamedTuple):
    """What the project wants to reach. find: the figure among a benchmark's rows, None where it was not measured.

    at_most: the figure should stay below `reach`, not above it. unit: what follows the figure.
    """

    what: str
    reach: float
    find: Callable[[list[Row]], float | None]
    unit: str = "x"
    at_most: bool = False


def reached(topic: str, rows: list[Row]) -> list[dict[str, Any]]:
    """The goals of a topic with what was measured; only those that these rows decide."""
    found = []
    for goal in GOALS.get(topic, ()):
        value = goal.find(rows)
        if value is not None:
            met = value <= goal.reach if goal.at_most else value >= goal.reach
            found.append(
                {
                    "what": goal.what,
                    "reach": goal.reach,
                    "at_most": goal.at_most,
                    "measured": value if value == int(value) else float(f"{value:.4g}"),
                    "unit": goal.unit,
                    "met": met,
                }
            )
    return found


def _row(rows: Iterable[Row], case: str, system: str, precision: str) -> Row | None:
    wanted = (case, system, precision)
    return next((row for row in rows if (row.case, row.system, row.precision) == wanted), None)


def _speedup(case: str, precision: str, over: str) -> Callable[[list[Row]], float | None]:
    def find(rows: list[Row]) -> float | None:
        row = _row(rows, case, "longspan", precision)
        return None if row is None else row.speedup.get(over)

    return find


def _field(name: str, case: str, system: str, precision: str) -> Callable[[list[Row]], float | None]:
    def find(rows: list[Row]) -> float | None:
        row = _row(rows, case, system, precision)
        return None if row is None or row.status != "ok" else getattr(row, name)

    return find


def _over_best_peer(case: str) -> Callable[[list[Row]], float | None]:
    """Our best precision against the best of all others."""

    def find(rows: list[Row]) -> float | None:
        measured = [row for row in rows if row.case == case and row.median_ms is not None]
        ours, others = ([row.median_ms or 0 for row in measured if row.ours is side] for side in (True, False))
        return min(others) / min(ours) if ours and others else None

    return find


def _time_per_token(precision: str) -> Callable[[list[Row]], float | None]:
    """Time without padding over time with it, divided by the share of real tokens: 1 is proportional."""

    padded = f"longspan, padding computed {precision}"

    def find(rows: list[Row]) -> float | None:
        row = next((row for row in rows if padded in row.speedup), None)
        if row is None:
            return None
        return row.shape["batch"] * row.shape["tokens"] / row.shape["real_tokens"] / row.speedup[padded]

    return find


def _growth(rows: list[Row]) -> float | None:
    """How much more memory four times the tokens take."""
    small, large = (_field("peak_mib", f"memory, {n:,} tokens", *NATIVE_FP32)(rows) for n in (65536, 262144))
    return large / small if small and large else None


def _over_scores(rows: list[Row]) -> float | None:
    """The memory of attention over that of one buffer of N x window scores."""
    row = _row(rows, "memory, 262,144 tokens", *NATIVE_FP32)
    return None if row is None or row.peak_mib is None else row.peak_mib / row.shape["fp32_scores_mib"]


def _scaling_goals(layer: str, backward: bool, precision: str) -> Iterator[Goal]:
    """What a layer should reach: as cheap per token at a million as at 32 thousand, and soon cheaper than dense."""
    name = f"{layer} layer, forward{' and backward' if backward else ''}, {precision}"

    def at(rows: list[Row], tokens: int, system: str = OURS) -> Row | None:
        row = _row(rows, case_name(layer, backward, tokens), system, precision)
        return None if row is None or row.median_ms is None else row

    def time_growth(rows: list[Row]) -> float | None:
        long = at(rows, 2**20)
        return None if long is None else long.token_over_short

    def memory_growth(rows: list[Row]) -> float | None:
        short, long = at(rows, SHORT_TOKENS), at(rows, 2**20)
        return None if short is None or long is None else per_token(long)[1] / per_token(short)[1]

    def lengths(rows: list[Row]) -> list[int]:
        return [2**power for power in range(30) if at(rows, 2**power)]

    def faster_from(rows: list[Row]) -> float | None:
        found = None
        for tokens in reversed(lengths(rows)):
            ours, dense = at(rows, tokens), at(rows, tokens, DENSE_SDPA)
            if ours is None or dense is None:
                continue
            if (ours.median_ms or 0) >= (dense.median_ms or 0):
                break
            found = tokens
        return found

    yield Goal(f"{name}: longest", 2**20, lambda rows: max(lengths(rows), default=None), " tokens")
    yield Goal(f"{name}: time per token at 1,048,576 over 32,768", 1.1, time_growth, at_most=True)
    yield Goal(f"{name}: memory per token at 1,048,576 over 32,768", 1.1, memory_growth, at_most=True)
    yield Goal(f"{name}: faster than dense SDPA from", 2048, faster_from, " tokens", at_most=True)


NATIVE_FP32 = ("longspan native", "fp32")
LARGE = "batch 1, 4,096 tokens"
GOALS: dict[str, tuple[Goal, ...]] = {
    "bench-encoder-large": (
        Goal("fp32 over Hugging Face fp32", 3.7, _speedup(LARGE, "fp32", f"{STOCK} fp32")),
        Goal("bf16 over Hugging Face fp32", 7.5, _speedup(LARGE, "bf16", f"{STOCK} fp32")),
        Goal("bf16 over Hugging Face bf16", 3.1, _speedup(LARGE, "bf16", f"{STOCK} bf16")),
        Goal("int8 over Hugging Face fp32", 11, _speedup(LARGE, "int8", f"{STOCK} fp32")),
        Goal("int8 over Hugging Face bf16", 4.8, _speedup(LARGE, "int8", f"{STOCK} bf16")),
        Goal("int8, relative error", 2e-2, _field("relative_error", LARGE, "longspan", "int8"), "", at_most=True),
        Goal("rows of many lengths, fp32: time over share of tokens", 1.1, _time_per_token("fp32"), at_most=True),
        Goal("rows of many lengths, bf16: time over share of tokens", 1.1, _time_per_token("bf16"), at_most=True),
        Goal("rows of many lengths, int8: time over share of tokens", 1.1, _time_per_token("int8"), at_most=True),
    ),
    "bench-encoder-modernbert": (
        Goal(
            "8,192 tokens, bf16 over Hugging Face bf16", 8, _speedup("batch 1, 8,192 tokens", "bf16", f"{STOCK} bf16")
        ),
        Goal(
            "8,192 tokens, bf16 over Hugging Face fp32", 9, _speedup("batch 1, 8,192 tokens", "bf16", f"{STOCK} fp32")
        ),
    ),
    "bench-attention": (
        Goal(
            "forward fp32, share of oneDNN's rate",
            0.75,
            _field("share_of_gemm", "forward, fp32", "longspan native", "fp32"),
            "",
        ),
        Goal(
            "forward bf16, share of oneDNN's rate",
            0.75,
            _field("share_of_gemm", "forward, bf16", "longspan native", "bf16"),
            "",
        ),
        Goal("forward and backward fp32 over the best PyTorch path", 3, _over_best_peer("forward and backward, fp32")),
        Goal("forward and backward bf16 over the best PyTorch path", 5, _over_best_peer("forward and backward, bf16")),
        Goal("memory at 262,144 tokens over that at 65,536", 4.4, _growth, at_most=True),
        Goal("memory at 262,144 tokens over one N x window buffer", 0.25, _over_scores, "", at_most=True),
    ),
    "bench-scaling": (
        *(
            goal
            for layer in ("LongNet", "Longformer")
            for backward in (False, True)
            for precision in ("fp32", "bf16")
            for goal in _scaling_goals(layer, backward, precision)
        ),
        *(
            Goal(
                f"LongNet attention, 16,384 tokens, {precision}: share of oneDNN's rate",
                0.7,
                _field("share_of_gemm", f"LongNet attention, 16,384 tokens, {precision}", "longspan native", precision),
                "",
            )
            for precision in ("fp32", "bf16")
        ),
        *(
            Goal(
                f"training the character model, {precision}: over {other}",
                2,
                _speedup(CharacterCase(precision=precision).name, precision, f"{other} {precision}"),
            )
            for precision in ("fp32", "bf16")
            for other in (LOCAL, BANDED)
        ),
    ),
    "bench-corpus": tuple(
        Goal(
            f"{engine}: gain by a second worker, share of what the cores allow",
            0.9,
            partial(share_of_cores, engine=engine),
            "",
        )
        for engine in (POOL, RAY)
    ),
    "bench-dense": (
        Goal("512 tokens, our best over the best peer", 2, _over_best_peer("batch 1, 512 tokens")),
        Goal("64 tokens, our best over the best peer", 1.3, _over_best_peer("batch 1, 64 tokens")),
    ),
}
