"""A task done on a corpus by the processes of a `WorkerPool`; `corpus_ray.py` is its counterpart for Ray.

Both take chunks of documents and give their tables in order, so that a chunk's rows are the same on either.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from functools import partial
from typing import Any

from longspan.inference.corpus import Chunk, CorpusDocument
from longspan.inference.corpus_worker import Task, TaskWorker, one_by_one
from longspan.inference.workers import WorkerCrashed, WorkerPool


def on_pool(
    task: Task, chunks: Iterator[Chunk], *, instances: int | None, threads_per_instance: int
) -> Generator[Any, None, None]:
    """The table of each chunk, from worker processes on this machine.

    A document that ends two processes gets a row with an error. Raises what loading the model raises, and ValueError
    for more threads than cores.
    """
    waiting: deque[Chunk] = deque()

    def requests() -> Iterator[dict[str, Any]]:
        for chunk in chunks:
            waiting.append(chunk)
            yield {"documents": chunk}

    worker: Any = partial(TaskWorker, task)
    with WorkerPool(worker, instances=instances, threads_per_instance=threads_per_instance) as pool:
        tables = pool.map(requests(), method="table")

        def alone(_: int, document: CorpusDocument) -> Any:
            try:
                return next(pool.map([{"documents": [document]}], method="table"))
            except WorkerCrashed as error:
                if error.index is None:
                    raise
                return None

        while True:
            try:
                table = next(tables)
            except StopIteration:
                return
            except WorkerCrashed as error:
                if error.index is None:  # the model no longer loads
                    raise
                table = one_by_one(task, waiting[0], alone)
            waiting.popleft()
            yield table
