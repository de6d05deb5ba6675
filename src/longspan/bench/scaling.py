"""How attention layers grow with length: time and memory of a LongNet and a Longformer layer, beside dense SDPA.

A layer is its projections, its attention and its output projection, over one row of tokens. Dense SDPA gets the same
layer. Every length is measured alone in a process that nothing else shares.

Shapes: H heads, N tokens, D head width, C = H * D model width.
"""

from __future__ import annotations

import ctypes
import gc
import math
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.attention import DilatedSegments, Full, Pattern, SlidingWindow, attend
from longspan.attention.blocks import cut
from longspan.bench.attention import DTYPES, TOLERANCE, available_mib
from longspan.bench.measure import MOST_CALLS, Row, compare, fill_times, reset_peak, status_mib
from longspan.inference.worker_process import end_with_parent
from longspan.kernels.memory import give_back, keep_up_to
from longspan.models.blockwise import attend_in_blocks

FIRST_TOKENS, MOST_TOKENS = 256, 2**26
DENSE_SECONDS = 60.0  # dense attention is left out at lengths that would take it longer
CHECKED_ROWS = 16
LEAST_CALLS, ENOUGH_SECONDS = 3, 60.0  # that many calls of a length count, fewer where they take longer
SHORT_TOKENS = 32_768  # what a longer row is compared with,
SHORT_TURNS = 1 / 8  # in turns that take this share of its time
OURS, DENSE = "longspan", "dense SDPA"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """branches: of a causal LongNet layer; none: a Longformer layer that sees `window` tokens on each side."""

    name: str
    branches: tuple[tuple[int, int], ...] = ()
    window: int = 256
    heads: int = 12
    head_width: int = 64

    @property
    def width(self) -> int:
        return self.heads * self.head_width

    def pattern(self, first: int, end: int) -> Pattern:
        """Of the heads from `first` to before `end`."""
        if self.branches:
            return DilatedSegments(self.branches, heads=self.heads, causal=True, part=(first, end))
        return SlidingWindow(self.window, self.window)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, dense: bool) -> Tensor:
        """[1, H, N, D]"""
        if dense:
            return F.scaled_dot_product_attention(q, k, v, is_causal=bool(self.branches))
        return attend(q, k, v, self.pattern(0, self.heads))

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Of the three projections [3 * C, C] and the output projection [C, C]."""
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(4, self.width, self.width, generator=generator) * self.width**-0.5
        return drawn[:3].flatten(0, 1).to(dtype), drawn[3].to(dtype)


LAYERS = (
    Layer(name="LongNet", branches=((2048, 1), (4096, 2), (8192, 4), (16384, 6), (32768, 12))),
    Layer(name="Longformer"),
)
TINY_LAYERS = (
    Layer(name="LongNet", branches=((64, 1), (128, 2)), heads=4, head_width=16),
    Layer(name="Longformer", window=16, heads=4, head_width=16),
)


def run_layer(layer: Layer, x: Tensor, w_in: Tensor, w_out: Tensor, *, dense: bool = False) -> Tensor:
    """[N, C] for x [N, C]. Dense attention is computed for all tokens at once, in the same memory."""
    blocks = cut(Full() if dense else layer.pattern(0, layer.heads), len(x))
    compute = partial(layer.attend, dense=dense)
    return attend_in_blocks(x[None], w_in, None, w_out, None, layer.heads, blocks, compute)[0]


class Point(NamedTuple):
    """What one length gave.

    relative_error: of some of the output's rows against float64, None where nobody looked. short_seconds: of calls in
    turns with these, over the first SHORT_TOKENS tokens; none where the row is no longer.
    """

    seconds: list[float]
    peak_mib: float | None
    relative_error: float | None
    short_seconds: Sequence[float] = ()


def measure_point(
    layer: Layer, dense: bool, precision: str, backward: bool, tokens: int, seconds: float, threads: int
) -> Point:
    """One length, in a process of its own. The memory is all that grows, the input and its gradient included."""
    torch.set_num_threads(threads)
    keep_up_to(sys.maxsize)  # a length's calls use the same memory, however long it is
    dtype = DTYPES[precision]
    w_in, w_out = (weight.requires_grad_(backward) for weight in layer.weights(dtype))
    call = partial(_call, layer, w_in=w_in, w_out=w_out, dense=dense)
    call(_input(FIRST_TOKENS, layer, dtype, backward))  # loads libraries and starts threads
    _give_back_memory()
    counted = reset_peak()
    before = status_mib("VmRSS") if counted else 0.0
    x = _input(tokens, layer, dtype, backward)
    taken: list[float] = []
    short_taken: list[float] = []
    peak, last = None, x[:0]
    while _more_calls(taken, seconds):
        last = _timed(call, x, taken)
        if counted and peak is None:
            peak = round(status_mib("VmHWM") - before, 1)
        if tokens > SHORT_TOKENS and not dense:
            short = x.detach()[:SHORT_TOKENS].requires_grad_(backward)
            for _ in range(max(1, int(SHORT_TURNS * tokens / SHORT_TOKENS))):
                _timed(call, short, short_taken)
    _give_back_memory()  # the other process may need it
    error = None if dense or backward else _error(layer, x, w_in, w_out, last)
    return Point(taken[1:], peak, error, short_taken[1:])  # the operating system gave the first calls their memory


def _timed(call: Callable[[Tensor], Tensor], x: Tensor, taken: list[float]) -> Tensor:
    """What the call gives; `taken` gets its seconds."""
    start = time.perf_counter()
    last = call(x)
    taken.append(time.perf_counter() - start)
    return last


def _more_calls(taken: list[float], seconds: float) -> bool:
    """After those that were taken, the first of which does not count."""
    if len(taken) < 2:
        return True
    enough = ENOUGH_SECONDS if len(taken) <= LEAST_CALLS else seconds
    return sum(taken) < enough and len(taken) < MOST_CALLS


def _give_back_memory() -> None:
    """Free memory that is held for later would hide what the next length takes."""
    gc.collect()
    give_back()
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _input(tokens: int, layer: Layer, dtype: torch.dtype, backward: bool) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.empty(tokens, layer.width, dtype=dtype).normal_(generator=generator).requires_grad_(backward)


def _call(layer: Layer, x: Tensor, *, w_in: Tensor, w_out: Tensor, dense: bool) -> Tensor:
    """The last rows of the output, whose history is the longest."""
    with torch.set_grad_enabled(x.requires_grad):
        y = run_layer(layer, x, w_in, w_out, dense=dense)
        if x.requires_grad:
            torch.autograd.grad(y, (x, w_in, w_out), y.detach())  # a gradient that takes no memory of its own
        return y[-CHECKED_ROWS:].detach().clone()


def _error(layer: Layer, x: Tensor, w_in: Tensor, w_out: Tensor, last: Tensor) -> float:
    """Of the last rows, against all tokens in float64."""
    rows = torch.arange(len(x) - len(last), len(x))
    exact = torch.zeros(last.shape, dtype=torch.float64)
    for head in range(layer.heads):
        columns = slice(head * layer.head_width, (head + 1) * layer.head_width)
        q, k, v = (F.linear(x, part[columns])[None, None].double() for part in w_in.chunk(3))
        pattern = layer.pattern(head, head + 1)
        seen = attend(q[:, :, rows], k, v, pattern, query_positions=rows, backend="reference")
        exact += seen[0, 0] @ w_out[:, columns].t().double()
    return float((last.double() - exact).norm() / exact.norm())


def measure_layers(
    layers: Sequence[Layer],
    *,
    precisions: Sequence[str],
    seconds: float,
    max_tokens: int,
    memory_gib: float,
    done: Sequence[Row] = (),
    first_tokens: int = FIRST_TOKENS,
    tell: Callable[[str], None] = lambda step: None,
    save: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Rows of growing length for every layer, direction and precision, until a length would not fit.

    seconds: how long a length is measured again and again. done: rows of an earlier run, which are not measured again.
    save: is given all rows so far after each new one.
    """
    rows: list[Row] = []
    known = {(row.case, row.system, row.precision): row for row in done}
    lengths = [first_tokens * 2**power for power in range(64) if first_tokens * 2**power <= max_tokens]
    with _Worker() as ours, _Worker() as dense_ones:
        for layer in layers:
            for backward in (False, True):
                for precision in precisions:
                    some = [
                        _Series(layer, dense, precision, backward, seconds, memory_gib, worker)
                        for dense, worker in ((False, ours), (True, dense_ones))
                    ]
                    for tokens in lengths:
                        found = []
                        for series in some:
                            if series.ended:
                                continue
                            row = series.row(tokens)
                            tell(f"{row.case}, {row.system} {precision}")
                            found.append(series.take(known.get((row.case, row.system, precision)) or row, tokens))
                        compare(found, [])
                        rows += found
                        save(rows)
                        if some[0].ended:
                            break
    return rows


def case_name(layer: str, backward: bool, tokens: int) -> str:
    return f"{layer} layer, forward{' and backward' if backward else ''}, {tokens:,} tokens"


class _Worker:
    """A process that measures one length after the other; a new one where that has died."""

    def __init__(self) -> None:
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            self.pool.shutdown()
            self.pool = None

    def measure(self, *asked: Any) -> Point:
        if self.pool is None:
            self.pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=end_with_parent)
        try:
            return self.pool.submit(measure_point, *asked).result()
        except BrokenProcessPool:
            self.__exit__()
            raise


class _Series:
    """Growing lengths of one system."""

    def __init__(
        self,
        layer: Layer,
        dense: bool,
        precision: str,
        backward: bool,
        seconds: float,
        memory_gib: float,
        worker: _Worker,
    ) -> None:
        self.layer, self.dense, self.precision, self.backward = layer, dense, precision, backward
        self.seconds, self.memory_gib, self.worker = seconds, memory_gib, worker
        self.ended = False
        self.mib_per_token = 0.0

    def row(self, tokens: int) -> Row:
        return Row(
            case=case_name(self.layer.name, self.backward, tokens),
            shape={"tokens": tokens, "backward": self.backward, "layer": self.layer.name, **_sizes(self.layer)},
            system=DENSE if self.dense else OURS,
            precision=self.precision,
            threads=torch.get_num_threads(),
            ours=not self.dense,
            tolerance=None if self.dense or self.backward else TOLERANCE[self.precision, False],
            reference="" if self.dense or self.backward else f"float64, the last {CHECKED_ROWS} rows",
        )

    def take(self, row: Row, tokens: int) -> Row:
        """The row with what was measured, unless it was there before; notes whether longer ones are worth trying."""
        if row.status == "ok" and row.median_ms is None:
            self._measure(row, tokens)
        if row.peak_mib is not None and tokens >= 4096:  # below, what libraries need hides what tokens need
            self.mib_per_token = row.peak_mib / tokens
        too_slow = self.dense and row.median_ms is not None and 4 * row.median_ms > 1e3 * DENSE_SECONDS
        self.ended = row.status != "ok" or too_slow
        return row

    def _measure(self, row: Row, tokens: int) -> None:
        needed, free = self.mib_per_token * tokens, available_mib()
        if needed > self.memory_gib * 1024:
            row.status, row.note = "left out", f"would need about {needed / 1024:.1f} GiB"
            return
        if free is not None and needed > free:
            row.status = "left out"
            row.note = f"would need about {needed / 1024:.1f} GiB; {free / 1024:.1f} GiB are free"
            return
        asked = self.layer, self.dense, self.precision, self.backward, tokens, self.seconds, row.threads
        try:
            point = self.worker.measure(*asked)
        except (BrokenProcessPool, MemoryError, RuntimeError) as error:  # torch says RuntimeError where memory ends
            row.status, row.note = "cannot run", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return
        row.peak_mib, row.relative_error = point.peak_mib, point.relative_error
        if row.tolerance is not None and not (point.relative_error or 0) <= row.tolerance:  # NaN fails too
            row.status, row.note = "failed tolerance", f"relative error {point.relative_error:.1e}"
            return
        fill_times(row, None, point.seconds)
        if point.short_seconds:
            each, short_each = median(point.seconds) / tokens, median(point.short_seconds) / SHORT_TOKENS
            row.token_over_short = float(f"{each / short_each:.4g}")


def _sizes(layer: Layer) -> dict[str, Any]:
    sizes = asdict(layer)
    del sizes["name"], sizes["window" if layer.branches else "branches"]
    return sizes


def per_token(row: Row | dict[str, Any]) -> tuple[float, float]:
    """Microseconds and KiB per token of a row; NaN for what was not measured."""
    fields = row if isinstance(row, dict) else row.to_dict()
    tokens = fields["shape"]["tokens"]
    time_ms, peak = (math.nan if fields[name] is None else fields[name] for name in ("median_ms", "peak_mib"))
    return 1e3 * time_ms / tokens, 1024 * peak / tokens


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The picture of LongNet's figure 5 and Longformer's figure 1: time and memory against length, on log scales.

    Raises ImportError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("the plot needs matplotlib: pip install longspan[plot]") from None
    series: dict[tuple[str, bool, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if "layer" in row["shape"] and row["median_ms"] is not None:
            shape = row["shape"]
            series.setdefault((shape["layer"], shape["backward"], row["system"], row["precision"]), []).append(row)
    layers = list(dict.fromkeys(layer for layer, *_ in series))
    if not layers:
        return
    figure = Figure(figsize=(15, 4.4 * len(layers)), layout="constrained")
    panels = figure.subplots(len(layers), 3, squeeze=False)
    headings = ("seconds per call", "microseconds per token", "KiB per token, at most")
    for (layer, backward, system, precision), points in series.items():
        tokens = [point["shape"]["tokens"] for point in points]
        values = [[point["median_ms"] / 1e3 for point in points], *zip(*map(per_token, points), strict=True)]
        color = {"fp32": "tab:blue", "bf16": "tab:green"}[precision] if system == OURS else "tab:red"
        style = {"color": color, "linestyle": "--" if backward else "-", "marker": "." if precision == "fp32" else "x"}
        label = f"{system} {precision}, forward{' and backward' if backward else ''}"
        for axes, heading, heights in zip(panels[layers.index(layer)], headings, values, strict=True):
            axes.loglog(tokens, heights, base=2, label=label, **style)
            axes.set(xlabel="tokens", ylabel=heading, title=f"{layer} layer")
    for axes in panels.flat:
        axes.set_xticks(ticks := _ticks(axes.get_xlim()), [_length(tick) for tick in ticks])
        axes.set_yscale("log", base=10)
        axes.grid(alpha=0.3)
    shown = {label: line for axes in panels.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)


def _ticks(limits: tuple[float, float]) -> list[int]:
    return [2**power for power in range(8, 30, 2) if limits[0] <= 2**power <= limits[1]]


def _length(tokens: int) -> str:
    for size, name in ((2**20, "M"), (1024, "K")):
        if tokens >= size:
            return f"{tokens // size}{name}"
    return str(tokens)
