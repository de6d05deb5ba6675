"""A corpus read by one worker and by two, on the worker pool and on Ray, and what the cores allow.

Two processes share memory, caches and the clock of the cores, so two workers cannot always do twice the work of one.
What they can do is measured: by plain processes with the same reader, which get their documents for nothing.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from longspan.bench import peers
from longspan.bench.measure import Row, compare, fill_times
from longspan.inference.cores import allowed_cores, pin
from longspan.inference.corpus import CHUNK_DOCUMENTS, Corpus, CorpusDocument
from longspan.inference.corpus_run import run_corpus
from longspan.inference.corpus_tasks import AnswerEach
from longspan.inference.corpus_worker import TaskWorker
from longspan.inference.documents import default_document

TASK = AnswerEach(question="Does the order of the items in a dictionary stay as it is?", precision="bf16")
WORKERS = (1, 2)
PLAIN, POOL, RAY = "plain processes", "worker pool", "Ray"
PATIENCE_SECONDS = 600  # until all processes are ready

_ready: Barrier  # in a plain process, which has one


@dataclass(frozen=True, kw_only=True)
class CorpusCase:
    """`longspan answer QUESTION CORPUS` with the embedded reader, on one thread a worker.

    chunks: what a worker takes at a time, CHUNK_DOCUMENTS documents. chars: of each document.
    """

    chunks: int = 40
    chars: int = 2000

    @property
    def name(self) -> str:
        return f"{self.chunks * CHUNK_DOCUMENTS:,} documents of {self.chars:,} characters"

    def texts(self) -> list[str]:
        """Pieces of the default document, again and again."""
        whole = default_document().text
        pieces = [whole[start : start + self.chars] for start in range(0, len(whole) - self.chars, self.chars)]
        return [pieces[number % len(pieces)] for number in range(self.chunks * CHUNK_DOCUMENTS)]


def measure_corpus(
    case: CorpusCase, *, rounds: int, tell: Callable[[int, int, str], None] = lambda done, total, step: None
) -> list[Row]:
    """Milliseconds a document, by each engine with one worker and with two, in turns. Starting up and each worker's
    first chunk are not counted."""
    engines: dict[str, Callable[[CorpusCase, Path, int], float]] = {
        PLAIN: _plain_processes,
        POOL: partial(_corpus_run, "local"),
        RAY: partial(_corpus_run, "ray"),
    }
    turns = [(engine, workers) for workers in WORKERS for engine in engines]
    rows = [_row(case, engine, workers) for engine, workers in turns]
    seconds: list[list[float]] = [[] for _ in rows]
    with tempfile.TemporaryDirectory(prefix="longspan-") as folder:
        corpus = Path(folder) / "corpus.jsonl"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in case.texts()), encoding="utf-8")
        for number in range(rounds):
            for place, (engine, workers) in enumerate(turns):
                if rows[place].status == "ok":
                    tell(number * len(turns) + place, rounds * len(turns), rows[place].system)
                    seconds[place].append(engines[engine](case, corpus, workers))
    for row, taken in zip(rows, seconds, strict=True):
        if taken:
            fill_times(row, None, taken)
    compare(rows, [])
    return rows


def system_name(engine: str, workers: int) -> str:
    return f"{engine}, {workers} worker{'s' * (workers > 1)}"


def share_of_cores(rows: list[Row], engine: str) -> float | None:
    """How much faster two workers are than one, over how much faster two plain processes are."""
    times = {row.system: row.median_ms for row in rows}

    def gain(name: str) -> float | None:
        one, two = (times.get(system_name(name, workers)) for workers in WORKERS)
        return one / two if one and two else None

    gained, allowed = gain(engine), gain(PLAIN)
    return gained / allowed if gained and allowed else None


def _row(case: CorpusCase, engine: str, workers: int) -> Row:
    row = Row(
        case=case.name,
        shape={**asdict(case), "workers": workers},
        system=system_name(engine, workers),
        precision="bf16",
        threads=1,
        ours=engine != PLAIN,
    )
    missing = peers.missing("ray", pip="'longspan[ray]'") if engine == RAY else None
    if missing is not None:
        row.status, row.note = "missing", missing
    elif workers > len(allowed_cores()):
        row.status, row.note = "left out", f"needs {workers} cores"
    return row


def _corpus_run(engine: str, case: CorpusCase, corpus: Path, workers: int) -> float:
    """Seconds a document, from the moment when every worker has given its first chunk."""
    ends: list[float] = []  # of chunks

    def progress(documents: int, errors: int) -> None:
        assert errors == 0
        ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory(prefix="longspan-") as out:
        run_corpus(TASK, Corpus(path=corpus), Path(out) / "rows", engine=engine, instances=workers, progress=progress)
    counted = case.chunks - workers
    return (ends[-1] - ends[workers - 1]) / (counted * CHUNK_DOCUMENTS)


def _plain_processes(case: CorpusCase, corpus: Path, workers: int) -> float:
    """The same by processes that share out the documents beforehand."""
    documents = [CorpusDocument(str(number), text, None) for number, text in enumerate(case.texts())]
    chunks = [documents[first : first + CHUNK_DOCUMENTS] for first in range(0, len(documents), CHUNK_DOCUMENTS)]
    context = get_context("spawn")
    ready = context.Barrier(workers, timeout=PATIENCE_SECONDS)
    with ProcessPoolExecutor(workers, context, _set_ready, (ready,)) as pool:
        shares = [
            (chunks[worker::workers], core) for worker, core in zip(range(workers), allowed_cores(), strict=False)
        ]
        spans = list(pool.map(_read, *zip(*shares, strict=True)))
    seconds = max(end for _, end in spans) - min(start for start, _ in spans)
    return seconds / ((case.chunks - workers) * CHUNK_DOCUMENTS)


def _set_ready(ready: Barrier) -> None:
    global _ready
    _ready = ready


def _read(chunks: list[list[CorpusDocument]], core: int) -> tuple[float, float]:
    """When the second chunk was begun, in all processes at once, and when the last one ended."""
    disable_progress_bar()
    torch.set_num_threads(1)
    pin([core])
    worker = TaskWorker(TASK)
    worker.table(chunks[0])
    _ready.wait()
    start = time.monotonic()  # which all processes of a machine share
    for chunk in chunks[1:]:
        worker.table(chunk)
    return start, time.monotonic()
