"""A task done on a corpus by actors of Ray Data, on this machine or on a cluster; `corpus_pool.py` is its counterpart.

A chunk of documents travels as one row, and so does its table: whatever blocks Ray makes, a chunk is computed and
written as a whole.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from longspan.inference.cores import allowed_cores
from longspan.inference.corpus import Chunk, import_pyarrow
from longspan.inference.corpus_worker import ATTEMPTS, Task, TaskWorker, one_by_one
from longspan.inference.worker_process import outcome, pack, unpack

CONNECT_SECONDS = 10  # for a cluster to answer
_HTTP2_SETTINGS = b"\x04"  # the type of the first frame that either side sends (RFC 9113, section 3.4)
_HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00" + _HTTP2_SETTINGS + bytes(5)
# Its own Ray on this machine: it reports nothing to anyone, its workers rank with other processes, and it does not warn
# of what Ray Data itself does.
_LOCAL = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}


def on_ray(
    task: Task,
    chunks: Callable[[], Iterator[Chunk]],
    *,
    instances: int | None,
    threads_per_instance: int,
    address: str | None,
) -> Generator[Any, None, None]:
    """The table of each chunk, from actors of Ray Data.

    chunks: called in a process on this machine, which reads the corpus while the actors compute. instances: actors;
    None fills the cluster's cores. address: of a cluster to join, as `ray start --head` prints it; None starts Ray on
    this machine and ends it afterwards, or takes what this process has started.
    Ray starts an actor that has ended anew and repeats what it was at. A document that ends two gets a row with an
    error. Raises ImportError without Ray, ConnectionError where no cluster answers, ValueError for more threads than
    cores, and what loading the model raises.
    """
    with _connected(address) as ray:
        cores = int(ray.cluster_resources().get("CPU", 0))
        instances = instances or max(1, cores // threads_per_instance)
        if instances * threads_per_instance > cores:
            raise ValueError(
                f"instances={instances} of threads_per_instance={threads_per_instance} need "
                f"{instances * threads_per_instance} cores, and Ray has {cores}; lower one of the two"
            )
        dataset = _planned(ray, task, chunks, instances, threads_per_instance)
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            for packed in batch["table"]:
                yield unpack(packed.as_py())


def _planned(ray: Any, task: Task, chunks: Callable[[], Iterator[Chunk]], instances: int, threads: int) -> Any:
    """The Ray dataset that reads and computes when it is iterated, in the order of the chunks."""
    from ray.data import ActorPoolStrategy

    @ray.remote(num_cpus=0)
    class Attempts:
        """How often each piece of work was begun and not ended: an actor that dies in the middle cannot tell."""

        def __init__(self):
            self.counts: Counter[Any] = Counter()

        def begin(self, work: Any) -> int:
            self.counts[work] += 1
            return self.counts[work]

        def end(self, work: Any) -> None:
            del self.counts[work]

    dataset = ray.data.from_items([{"start": True}])
    dataset.context.enable_progress_bars = False
    dataset.context.execution_options.preserve_order = True
    dataset.context.target_max_block_size = 1  # a row is a block, which one actor takes at a time
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    attempts: Any = Attempts.remote()
    return dataset.map_batches(
        lambda _: _rows("chunk", _packed(chunks)), batch_size=None, num_cpus=0, label_selector=here
    ).map_batches(
        _Actor,
        fn_constructor_args=(task, threads, attempts),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=threads,
        compute=ActorPoolStrategy(size=instances),
    )


def _packed(chunks: Callable[[], Iterator[Chunk]]) -> Iterator[bytes]:
    """Every chunk with its number, for `unpack`; what reading raises travels in place of the next one."""
    try:
        for numbered in enumerate(chunks()):
            yield pack((numbered, None))
    except Exception as error:
        yield outcome(partial(_raise, error))


def _rows(column: str, packed: Iterator[bytes]) -> Iterator[Any]:
    pyarrow = import_pyarrow()
    for each in packed:
        yield pyarrow.table({column: pyarrow.array([each], pyarrow.large_binary())})


def _raise(error: Exception) -> None:
    raise error


class _Actor:
    """A `TaskWorker` in Ray Data's hands. What it raises travels as `outcome` packs it: Ray would try again."""

    def __init__(self, task: Task, threads: int, attempts: Any):
        torch.set_num_threads(threads)
        self.task, self.attempts = task, attempts
        self.loaded = outcome(self._load)

    def _load(self) -> None:
        self.worker = TaskWorker(self.task)

    def __call__(self, batch: Any) -> Any:
        (chunk,) = batch["chunk"]
        return next(_rows("table", iter([outcome(partial(self._table, chunk.as_py()))])))

    def _table(self, packed: bytes) -> Any:
        unpack(self.loaded)
        number, chunk = unpack(packed)
        table = self._attempted(number, chunk)
        if table is None:
            table = one_by_one(self.task, chunk, lambda place, each: self._attempted((number, place), [each]))
        return table

    def _attempted(self, work: Any, documents: Chunk) -> Any:
        """The documents' table; None where they have ended as many actors as they may."""
        import ray

        begun: Any = ray.get(self.attempts.begin.remote(work))
        if begun > ATTEMPTS:
            return None
        table = self.worker.table(documents)
        self.attempts.end.remote(work)
        return table


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """Ray, connected; started and ended here where it is this machine's own."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("the engine ray needs Ray Data: pip install 'longspan[ray]'") from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # Ray takes what reads the corpus for one input, however many chunks come of it.
    warnings.filterwarnings("ignore", "The minimum number of concurrent actors", UserWarning)
    if address is not None:
        _check_answers(address)
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        for name, value in _LOCAL.items():
            os.environ.setdefault(name, value)
        ray.init("local", num_cpus=len(allowed_cores()), include_dashboard=False, **options)
    else:
        try:
            ray.init(address, **options)
        except (RuntimeError, OSError) as error:  # other versions of Ray or Python there, another token
            raise ConnectionError(f"cannot join the Ray cluster at {address}: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """ConnectionError where no gRPC server answers, which is what Ray would wait for without an end."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"a Ray address is HOST:PORT, as `ray start --head` prints it; got {address!r}")
    try:
        with socket.create_connection((host, int(port)), CONNECT_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return
            connection.sendall(_HTTP2_GREETING)
            answer = connection.recv(9)  # the head of a frame
            if answer[3:4] != _HTTP2_SETTINGS:
                raise ConnectionError("what listens there is something else")
    except OSError as error:
        raise ConnectionError(
            f"no Ray cluster answers at {address} ({error}); start one with `ray start --head`, or name no address to "
            f"compute on this machine"
        ) from error
