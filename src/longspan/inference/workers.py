"""Worker processes: one model several times, each on cores of its own, for throughput.

Requests wait in one queue. Each worker process has a thread in the parent that hands it one request at a time, waits
for the reply and, where the process dies, starts another.

Shapes: B rows of a batch, N tokens.
"""

from __future__ import annotations

import multiprocessing
import queue
import shutil
import signal
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import transformers
from transformers import AutoConfig, PreTrainedModel

import longspan
from longspan.errors import CheckpointError
from longspan.inference.batching import group_by_length
from longspan.inference.cores import allowed_cores
from longspan.inference.reader import Precision, Reader, check_directory
from longspan.inference.worker_process import call, call_rows, load_model, pack, unpack, work
from longspan.models.encoder import Encoder

AHEAD = 4  # requests for each worker that are taken before the caller has taken their results
ATTEMPTS = 2
CLOSED = "this WorkerPool is closed; make another"

Call = tuple[int, Callable[[Any, Any], Any], Any]  # the request's index, function(model, request), the request


class WorkerCrashed(RuntimeError):
    """A worker process ended in the middle of its work. index: of the request in its call, None while starting."""

    def __init__(self, index: int | None, exit_code: int | None):
        self.index, self.exit_code = index, exit_code
        if index is None:
            what = "a worker process ended while it loaded the model"
            advice = (
                'a script must make its WorkerPool under `if __name__ == "__main__":`, as workers import the script'
            )
        else:
            what = f"request {index} ended its worker process {ATTEMPTS} times"
            advice = "other requests are not affected; perhaps it needs more memory than there is"
        super().__init__(f"{what} (exit code {exit_code}); {advice}")


class WorkerPool:
    """Worker processes that hold the same model, each pinned to its own cores, and compute with it on the CPU.

    model: a transformers or longspan model with any head, the directory or hub name of one, a `longspan.Reader`, or a
    `functools.partial` that makes any object when a worker calls it.
    instances: worker processes; None fills the cores that this process may use (its affinity and its control group's
    quota). threads_per_instance: cores of each. precision: as `longspan.accelerate` takes it; None computes with the
    model as it is, or with the reader's precision.

    A model object is saved once to a temporary directory. Each worker maps the file into its memory, so that the
    weights lie there once for all; what a precision packs is each worker's own copy.
    Leaving its `with` statement ends the workers and drops what they have not done; they also end with their parent,
    however that ends. Any thread may send requests.
    Raises ValueError for more threads than cores, what loading the model raises, and WorkerCrashed.
    """

    def __init__(
        self,
        model: PreTrainedModel | Reader | partial[Any] | str | Path,
        *,
        instances: int | None = None,
        threads_per_instance: int = 1,
        precision: Precision | None = None,
    ):
        shares = _shares(instances, threads_per_instance)
        self.instances, self.threads_per_instance = len(shares), threads_per_instance
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        folder = Path(tempfile.mkdtemp(prefix="longspan-"))
        workers: list[_Worker] = []
        threads: list[threading.Thread] = []
        self._end = weakref.finalize(self, _end, self._jobs, workers, threads, folder)
        try:
            load = _loader(model, precision, folder)
            workers += [_Worker(load, cores, folder) for cores in shares]
            for worker in workers:  # first start all, then wait for all
                worker.start()
            for worker in workers:
                worker.wait_until_ready()
        except BaseException:
            self._end()
            raise
        threads += [threading.Thread(target=worker.serve, args=(self._jobs,), daemon=True) for worker in workers]
        for thread in threads:
            thread.start()

    def map(self, requests: Iterable[dict[str, Any]], *, method: str | None = None) -> Results:
        """What the model returns for each request, in the order of the requests.

        requests: keyword arguments, tensors and arrays among them; any iterable, read a little ahead of the results.
        method: the method that takes them, such as "answer" of a reader; None calls the model.
        What a request raises in its worker is raised in place of its result, and `WorkerCrashed` in place of the result
        of a request that ended two processes; `next` then goes on with the following one.
        """
        return self._results((index, partial(call, method), request) for index, request in enumerate(requests))

    def map_rows(
        self, rows: Iterable[Any], *, max_tokens: int = 8192, max_padding: float = 0.25, ahead: int = 256
    ) -> Iterator[Any]:
        """The model's output for each row, in the order of the rows, without padding and without a batch dimension.

        rows: token ids [N], or a dict of arrays [N] with "input_ids" among them; any iterable. `ahead` rows at a time
        are batched by length, as `group_by_length` does. An error ends the iterator; the index of WorkerCrashed is that
        of the longest row of a batch.
        """
        batches: deque[list[int]] = deque()  # row numbers of the batches under way

        def calls() -> Iterator[Call]:
            numbered = enumerate(rows)
            while chunk := [(number, _checked(number, row)) for number, row in islice(numbered, ahead)]:
                lengths = [len(row["input_ids"]) for _, row in chunk]
                for batch in group_by_length(lengths, max_tokens=max_tokens, max_padding=max_padding):
                    batches.append([chunk[place][0] for place in batch])
                    yield batches[-1][0], call_rows, [chunk[place][1] for place in batch]

        done: dict[int, Any] = {}
        wanted = 0
        for outputs in self._results(calls()):
            done.update(zip(batches.popleft(), outputs, strict=True))
            while wanted in done:
                yield done.pop(wanted)
                wanted += 1

    def close(self) -> None:
        """Ends the workers at once and drops what they have not done."""
        self._end()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _results(self, calls: Iterator[Call]) -> Results:
        return Results(self._submit, calls, AHEAD * self.instances)

    def _submit(self, index: int, function: Callable[[Any, Any], Any], request: Any) -> Future:
        if not self._end.alive:
            raise RuntimeError(CLOSED)
        job = _Job(index, pack((function, request)), Future())
        self._jobs.put(job)
        return job.future


class Results(Iterator[Any]):
    """Results in order; at most `ahead` of them are computed before they are asked for."""

    def __init__(self, submit: Callable[..., Future], calls: Iterator[Call], ahead: int):
        self._submit, self._calls, self._ahead = submit, calls, ahead
        self._futures: deque[Future] = deque()

    def __next__(self) -> Any:
        for each in islice(self._calls, self._ahead - len(self._futures)):
            self._futures.append(self._submit(*each))
        if not self._futures:
            raise StopIteration
        return self._futures.popleft().result()

    def __del__(self):
        for future in self._futures:
            future.cancel()


class _Job(NamedTuple):
    index: int
    payload: bytes
    future: Future


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self, load: Callable[[], Any], cores: Sequence[int], folder: Path):
        self.arguments = load, cores, folder
        self.process: Any = None
        self.ended = False
        self.lock = threading.Lock()  # no process may start behind the back of `end`

    def start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        with self.lock:
            if self.ended:
                raise RuntimeError(CLOSED)
            self.connection, theirs = spawn.Pipe()
            process = spawn.Process(target=work, args=(theirs, *self.arguments), daemon=True)
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited, until it ignores Ctrl-C
            try:
                process.start()
                self.process = process
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                theirs.close()

    def wait_until_ready(self) -> None:
        try:
            outcome = self.connection.recv_bytes()
        except (EOFError, ConnectionError):
            raise WorkerCrashed(None, self.bury()) from None
        try:
            unpack(outcome)
        except BaseException:
            self.bury()
            raise

    def serve(self, jobs: queue.SimpleQueue[_Job | None]) -> None:
        """Does jobs until the queue gives None."""
        while (job := jobs.get()) is not None:
            if job.future.set_running_or_notify_cancel():
                try:
                    job.future.set_result(self.ask(job))
                except BaseException as error:
                    job.future.set_exception(error)
            del job  # a result that its reader has dropped would live until the next job
        self.bury()

    def ask(self, job: _Job) -> Any:
        exit_code = None
        for _ in range(ATTEMPTS):
            if self.process is None:
                self.start()
                self.wait_until_ready()
            try:
                self.connection.send_bytes(job.payload)
                reply = self.connection.recv_bytes()
            except (EOFError, OSError):  # the process is gone
                exit_code = self.bury()
            else:
                return unpack(reply)
        raise RuntimeError(CLOSED) if self.ended else WorkerCrashed(job.index, exit_code)

    def end(self) -> None:
        with self.lock:
            self.ended = True
            if self.process is not None:
                self.process.kill()  # it holds nothing worth a farewell

    def bury(self) -> int | None:
        """Ends the process, if there is one, and gives its exit code."""
        with self.lock:
            process, self.process = self.process, None
        if process is None:
            return None
        self.connection.close()
        process.join(1)  # without its pipe it ends by itself
        process.kill()
        process.join()
        return process.exitcode


def _end(jobs: queue.SimpleQueue[_Job | None], workers: list[_Worker], threads: list[threading.Thread], folder: Path):
    for worker in workers:
        worker.end()
    for _ in threads:
        jobs.put(None)
    for thread in threads:
        if thread is not threading.current_thread():  # the garbage collector may run in any
            thread.join()
    for worker in workers:
        worker.bury()
    shutil.rmtree(folder, ignore_errors=True)


def _shares(instances: int | None, threads: int) -> list[list[int]]:
    """The cores of each instance."""
    cores = allowed_cores()
    if threads < 1 or (instances is not None and instances < 1):
        raise ValueError(
            f"instances and threads_per_instance must be at least 1; got instances={instances}, "
            f"threads_per_instance={threads}"
        )
    instances = instances or max(1, len(cores) // threads)
    if instances * threads > len(cores):
        raise ValueError(
            f"instances={instances} of threads_per_instance={threads} need {instances * threads} cores, and this "
            f"process may use {len(cores)} (its affinity and its control group's quota); lower one of the two"
        )
    return [cores[start : start + threads] for start in range(0, instances * threads, threads)]


def _loader(model: Any, precision: Precision | None, folder: Path) -> Callable[[], Any]:
    """What a worker calls to get the model. A model object is saved to `folder`."""
    if isinstance(model, partial):
        return model
    if isinstance(model, Reader):
        return partial(Reader, model.source, precision=precision or model.precision)
    if isinstance(model, str | Path):
        check_directory(str(model))
        name = (AutoConfig.from_pretrained(model).architectures or ["AutoModel"])[0]
        kind = getattr(longspan if name.startswith("Longspan") else transformers, name, None)
        if kind is None:
            raise CheckpointError(
                f"model {model} is a {name}, which transformers lacks; give WorkerPool the model itself."
            )
        return partial(load_model, kind, str(model), precision, False)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"WorkerPool takes a transformers or longspan model, the directory or hub name of one, or a Reader; "
            f"got {type(model).__name__}"
        )
    is_ours = any(isinstance(part, Encoder) for part in model.modules())
    model.save_pretrained(folder)
    return partial(load_model, type(model), str(folder), precision, is_ours)


def _checked(number: int, row: Any) -> dict[str, np.ndarray]:
    row = {name: np.asarray(value) for name, value in (row if isinstance(row, dict) else {"input_ids": row}).items()}
    shapes = {value.shape for value in row.values()}
    if "input_ids" not in row or len(shapes) > 1 or row["input_ids"].ndim != 1 or not row["input_ids"].size:
        raise ValueError(
            f"a row is token ids [N], or a dict of arrays [N] with input_ids among them, and N at least 1; "
            f"row {number} is { {name: list(value.shape) for name, value in row.items()} }"
        )
    return row
