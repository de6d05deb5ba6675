"""How a case is measured: all its systems in one process, in turns, on the same inputs; output first, then time.

A system whose output misses its tolerance gets no time. Resident memory is measured in a fresh process of its own.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

BURST_SECONDS = 0.05  # a quicker call is made again and again for this long, so that a turn starts with warm caches
SETTLE_SECONDS = 0.005  # between two systems: threads that wait for more work by spinning get time to fall asleep
MOST_CALLS = 200
CLEAR_REFS = Path("/proc/self/clear_refs")
PATIENCE_SECONDS = 60  # after which two rounds have to do

Status = Literal["ok", "failed tolerance", "missing", "cannot run", "left out"]


class Prepared(NamedTuple):
    """A system ready to be timed. run: what is timed. read: turns its result into tensors to compare, not timed."""

    run: Callable[[], Any]
    read: Callable[[Any], tuple[Tensor, ...]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class System:
    """One way to compute a case.

    prepare: packs weights, exports, compiles; not timed. ours: it gets speed-ups over all systems that are not.
    tolerance: the largest relative error against the case's expected output, None for the system that gives it.
    last_rows: how many rows at the end are compared, None for all. flops: useful operations of a call, for its rate.
    yardstick: its rate is what the others' are a share of; it takes no part in speed-ups and brings its own `expected`.
    left_out, missing: why it does not run here, or the pip line of what it needs.
    """

    name: str
    precision: str
    prepare: Callable[[], Prepared]
    tolerance: float | None
    ours: bool = False
    last_rows: int | None = None
    flops: float | None = None
    yardstick: bool = False
    expected: Callable[[], tuple[Tensor, ...]] | None = None
    left_out: str | None = None
    missing: str | None = None

    @property
    def label(self) -> str:
        return f"{self.name} {self.precision}"


class Case(Protocol):
    """What is computed: a name, its sizes, the systems that compute it, and what they should give.

    Instances are pickled for the process that measures memory. `expected` is None where a system without tolerance
    gives it; `reference` says in words what the errors are against.
    """

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> dict[str, Any]: ...
    @property
    def reference(self) -> str: ...
    def systems(self) -> list[System]: ...
    def expected(self) -> tuple[Tensor, ...] | None: ...


@dataclass(kw_only=True)
class Row:
    """One system on one case, as result files keep it. Times are None unless the status is "ok".

    token_over_short: of a long row of tokens, the time a token takes over what it takes in a short row, in turns.
    """

    case: str
    shape: dict[str, Any]
    system: str
    precision: str
    threads: int
    ours: bool
    status: Status = "ok"
    note: str = ""
    prepare_s: float | None = None
    calls: int = 0
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    speedup: dict[str, float] = field(default_factory=dict)
    max_error: float | None = None
    relative_error: float | None = None
    tolerance: float | None = None
    reference: str = ""
    gflops: float | None = None
    share_of_gemm: float | None = None
    peak_mib: float | None = None
    token_over_short: float | None = None

    to_dict = asdict


def measure(
    case: Case, *, seconds: float, rounds: int, memory: bool = False, tell: Callable[[str], None] = lambda step: None
) -> list[Row]:
    """The rows of a case, one for each system. seconds: how long the rounds go on, once `rounds` of them are done.

    memory: also measure every system's resident growth, each in its own process.
    """
    rows: list[Row] = []
    ready: dict[int, tuple[System, Prepared]] = {}
    tell(f"{case.name}: expected output")
    expected = case.expected()
    for system in case.systems():
        tell(f"{case.name}: {system.label}")
        row = Row(
            case=case.name,
            shape=case.shape,
            system=system.name,
            precision=system.precision,
            threads=torch.get_num_threads(),
            ours=system.ours,
            tolerance=system.tolerance,
            reference=case.reference,
        )
        rows.append(row)
        prepared, outputs = _prepare(system, row)
        if prepared is None or outputs is None:
            continue
        if system.tolerance is None:
            expected = outputs
        wanted = expected if system.expected is None else system.expected()
        assert wanted is not None, f"{case.name}: nothing to compare {system.label} with"
        if system.last_rows is not None:
            outputs, wanted = ([part[-system.last_rows :] for part in parts] for parts in (outputs, wanted))
        row.max_error, row.relative_error = _errors(outputs, wanted)
        if system.tolerance is not None and not row.relative_error <= system.tolerance:  # NaN fails too
            row.status, row.note = "failed tolerance", f"relative error {row.relative_error:.1e}"
            continue
        ready[len(rows) - 1] = system, prepared
    del expected
    tell(f"{case.name}: {len(ready)} systems in turns")
    times = time_in_turns([prepared.run for _, prepared in ready.values()], seconds=seconds, rounds=rounds)
    for (index, (system, _)), taken in zip(ready.items(), times, strict=True):
        fill_times(rows[index], system.flops, taken)
    compare(rows, [system for system, _ in ready.values() if system.yardstick])
    if memory:
        for index in ready:
            tell(f"{case.name}: memory of {rows[index].system} {rows[index].precision}")
            rows[index].peak_mib = peak_mib(case, rows[index].system, rows[index].precision)
    return rows


def _prepare(system: System, row: Row) -> tuple[Prepared | None, tuple[Tensor, ...] | None]:
    """The system ready to run and what it gave when first called; None, the reason in the row, where it cannot."""
    absent = _why_absent(system)
    if absent is not None:
        row.status, row.note = absent
        return None, None
    start = time.perf_counter()
    try:
        prepared = system.prepare()
        row.prepare_s, row.note = round(time.perf_counter() - start, 2), prepared.note
        return prepared, prepared.read(prepared.run())
    except Exception as error:
        if system.ours and not isinstance(error, NotImplementedError | ImportError):
            raise  # others may fail in any way they like, which is worth a row; ours may only decline
        row.status, row.note = "cannot run", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return None, None


def _why_absent(system: System) -> tuple[Status, str] | None:
    if system.missing is not None:
        return "missing", system.missing
    return None if system.left_out is None else ("left out", system.left_out)


def _errors(outputs: Iterable[Tensor], wanted: Iterable[Tensor]) -> tuple[float, float]:
    """The largest difference, and the largest of the tensors' relative errors: |out - wanted| / |wanted|, Euclidean."""
    largest, relative = 0.0, 0.0
    for output, right in zip(outputs, wanted, strict=True):
        if output.shape != right.shape:
            raise ValueError(f"an output is {list(output.shape)}, expected {list(right.shape)}")
        difference = output.double() - right.double()
        norm = float(difference.norm() / right.double().norm().clamp_min(1e-300))
        largest = max(largest, float(difference.abs().max()))
        relative = norm if not norm <= relative else relative  # keeps a NaN
    return largest, relative


def time_in_turns(runs: Sequence[Callable[[], Any]], *, seconds: float, rounds: int) -> list[list[float]]:
    """Seconds of every call: in each round all take their turn, in alternating order. They ran once before.

    At least `rounds` rounds (two, once PATIENCE_SECONDS are over), then as many as begin within `seconds`.
    """
    times: list[list[float]] = [[] for _ in runs]
    order = list(range(len(runs)))
    gc.collect()
    gc.disable()
    try:
        start, elapsed, done = time.perf_counter(), 0.0, 0
        while runs and (elapsed < seconds or done < (rounds if elapsed < PATIENCE_SECONDS else min(rounds, 2))):
            for index in order:
                time.sleep(SETTLE_SECONDS)
                times[index] += _burst(runs[index])
            order.reverse()
            done, elapsed = done + 1, time.perf_counter() - start
            if all(len(taken) >= MOST_CALLS for taken in times):
                break
    finally:
        gc.enable()
    return times


def _burst(run: Callable[[], Any]) -> list[float]:
    """A turn: one slow call, or quick ones until BURST_SECONDS are over, of which the first is not counted."""
    taken: list[float] = []
    begin = time.perf_counter()
    while not taken or (taken[0] < BURST_SECONDS and time.perf_counter() - begin < BURST_SECONDS):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return taken[1:] or taken


def fill_times(row: Row, flops: float | None, taken: list[float]) -> None:
    """The median and its spread of seconds that calls took, and their rate."""
    low, middle, high = torch.tensor(taken, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    row.calls = len(taken)
    row.p20_ms, row.median_ms, row.p80_ms = (float(f"{1e3 * float(value):.4g}") for value in (low, middle, high))
    if flops is not None:
        row.gflops = float(f"{flops / float(middle) / 1e9:.4g}")


def compare(rows: list[Row], yardsticks: list[System]) -> None:
    """Speed-ups of our rows over all others by their medians, and shares of the yardstick's rate."""
    labels = {system.label for system in yardsticks}
    measured = [row for row in rows if row.median_ms is not None]
    ruler = next((row.gflops for row in measured if f"{row.system} {row.precision}" in labels), None)
    others = [row for row in measured if not row.ours and f"{row.system} {row.precision}" not in labels]
    for row in measured:
        if row.ours:
            row.speedup = {
                f"{other.system} {other.precision}": float(f"{(other.median_ms or math.nan) / row.median_ms:.4g}")
                for other in others
                if row.median_ms
            }
        if ruler is not None and row.gflops is not None:
            row.share_of_gemm = round(row.gflops / ruler, 4)


def measure_memory(case: Case, *, tell: Callable[[str], None] = lambda step: None) -> list[Row]:
    """The rows of a case of which only the memory is measured; nothing is computed in this process."""
    rows = []
    for system in case.systems():
        tell(f"{case.name}: {system.label}")
        row = Row(
            case=case.name,
            shape=case.shape,
            system=system.name,
            precision=system.precision,
            threads=torch.get_num_threads(),
            ours=system.ours,
        )
        rows.append(row)
        absent = _why_absent(system)
        if absent is not None:
            row.status, row.note = absent
            continue
        try:
            row.peak_mib = peak_mib(case, system.name, system.precision)
        except (NotImplementedError, ImportError, MemoryError, BrokenProcessPool) as error:
            row.status, row.note = "cannot run", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return rows


def peak_mib(case: Case, name: str, precision: str) -> float | None:
    """By how many MiB the resident memory of a fresh process grows at most during one call; None where /proc is not."""
    if not CLEAR_REFS.exists():
        return None
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_mib, case, name, precision, torch.get_num_threads()).result()


def _peak_mib(case: Case, name: str, precision: str, threads: int) -> float:
    torch.set_num_threads(threads)
    system = next(system for system in case.systems() if (system.name, system.precision) == (name, precision))
    prepared = system.prepare()
    gc.collect()
    reset_peak()
    before = status_mib("VmRSS")
    result = prepared.run()
    peak = status_mib("VmHWM")
    del result
    return round(peak - before, 1)


def reset_peak() -> bool:
    """Let the peak of this process's resident memory start anew; False where the system cannot."""
    if CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5")  # proc(5)
    return CLEAR_REFS.exists()


def status_mib(name: str) -> float:
    """A figure of this process's memory: VmRSS now, VmHWM at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024
