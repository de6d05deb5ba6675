"""A task over a whole corpus: rows in Parquet, a run that can stop anywhere and go on.

The folder of a run holds part-00000.parquet and so on, and _run.json, which says what decides the rows: what reads a
folder of Parquet files passes over names that begin so.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from longspan.inference.corpus import Corpus, import_pyarrow, in_chunks
from longspan.inference.corpus_pool import on_pool
from longspan.inference.corpus_ray import on_ray
from longspan.inference.corpus_worker import Task
from longspan.inference.run_folder import alone_in, remember

ENGINES = ("local", "ray")
PART_DOCUMENTS, PART_SECONDS = 1000, 60  # what a run that is killed loses


@dataclass(frozen=True, kw_only=True)
class CorpusRun:
    """What a run has done. documents: rows it wrote; errors: those with an error, the first of them in words; skipped:
    documents that had their rows before."""

    documents: int
    errors: int
    skipped: int
    first_error: str | None
    seconds: float


def run_corpus(
    task: Task,
    corpus: Corpus,
    out: str | Path,
    *,
    engine: str = "local",
    instances: int | None = None,
    threads_per_instance: int = 1,
    address: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CorpusRun:
    """Writes a row for every document of the corpus to Parquet files in the folder `out`.

    Columns: id, error (null where there is none), tokens, and those of the task. Rows come in the order of the
    documents, and are the same on every engine and for any number of instances. Few documents are in memory at a time.
    A folder that holds rows of the same task and corpus already gets the rows that it lacks: documents are known by
    their ids, also those whose row has an error.
    engine: "local", a `WorkerPool`, or "ray". instances: of the model; None fills the cores. address: of a Ray cluster.
    progress: called with the number of rows and of errors so far.
    Raises ValueError for options that do not fit and for a folder of another run, FileExistsError for a folder of
    something else, BlockingIOError for one that another run is writing to, OSError where the rows cannot be written,
    and what reading the corpus, loading the model and the engine raise.
    """
    out, start = Path(out), time.perf_counter()
    if engine not in ENGINES:
        raise ValueError(f"there is no engine {engine!r}; there are {' and '.join(ENGINES)}")
    if address is not None and engine != "ray":
        raise ValueError("an address is that of a Ray cluster: choose the engine ray, or leave it out")
    if corpus.path.is_dir() and out.resolve().is_relative_to(corpus.path.resolve()):
        raise ValueError(
            f"{out} lies in the corpus {corpus.path}, which would read what it writes: name another folder"
        )
    task.check()
    decides = {"task": task.name, **asdict(task), **asdict(corpus), "path": str(corpus.path.resolve())}
    remember(out, decides, "_run.json")
    with alone_in(out, "_run.json"):
        parts = Parts(out)
        finished = parts.finished()
        chunks = partial(in_chunks, corpus, finished)
        documents = errors = 0
        first_error = None
        if next(chunks(), None) is not None:  # else there is nothing to start workers for
            shared: dict[str, Any] = {"instances": instances, "threads_per_instance": threads_per_instance}
            tables = on_pool(task, chunks(), **shared)
            if engine == "ray":
                tables = on_ray(task, chunks, **shared, address=address)
            with closing(tables), parts:
                for table in tables:
                    parts.add(table)
                    failed = table.filter(table["error"].is_valid())
                    if failed.num_rows and first_error is None:
                        first_error = failed["error"][0].as_py()
                    documents, errors = documents + table.num_rows, errors + failed.num_rows
                    if progress is not None:
                        progress(documents, errors)
        return CorpusRun(
            documents=documents,
            errors=errors,
            skipped=finished.total(),
            first_error=first_error,
            seconds=time.perf_counter() - start,
        )


class Parts:
    """The Parquet files of a run. Leaving its `with` statement writes what is left, also after an error elsewhere."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.waiting: list[Any] = []
        self.since = 0.0  # when the first of them came
        for torso in folder.glob(".part-*.partial"):  # of a run that was killed
            torso.unlink()

    def finished(self) -> Counter[str]:
        """The ids in the files, and how often each occurs."""
        import_pyarrow()
        from pyarrow import parquet

        return Counter(
            id for file in self._files() for id in parquet.read_table(file, columns=["id"])["id"].to_pylist()
        )

    def add(self, table: Any) -> None:
        self.since = self.since if self.waiting else time.monotonic()
        self.waiting.append(table)
        is_due = time.monotonic() - self.since > PART_SECONDS
        if is_due or sum(table.num_rows for table in self.waiting) >= PART_DOCUMENTS:
            self.write()

    def write(self) -> None:
        """Writes what waits as the next file, whole or not at all. OSError where that fails."""
        waiting, self.waiting = self.waiting, []
        if not waiting:
            return
        pyarrow = import_pyarrow()
        from pyarrow import parquet

        number = max((int(file.stem.split("-")[1]) for file in self._files()), default=-1) + 1
        file = self.folder / f"part-{number:05}.parquet"
        written = self.folder / f".{file.name}.{os.getpid()}.partial"
        try:
            parquet.write_table(pyarrow.concat_tables(waiting), written)
            written.replace(file)
        except OSError as error:
            raise OSError(
                f"cannot write {file}: {error}. The files before it are whole: make room and repeat the command to go "
                f"on"
            ) from error
        finally:
            written.unlink(missing_ok=True)

    def _files(self) -> Iterable[Path]:
        return sorted(self.folder.glob("part-*.parquet"))

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *_: object) -> None:
        self.write()
