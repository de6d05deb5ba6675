"""One classifier on different engines behind one call: Hugging Face, longspan and ONNX Runtime, once or several times.

Shapes: B batch, N tokens, S spans, L labels.
"""

from __future__ import annotations

import queue
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from longspan.inference.cores import allowed_cores
from longspan.inference.onnx_model import OnnxModel
from longspan.inference.workers import WorkerPool
from longspan.models.config import LongspanConfig
from longspan.models.heads import LongspanForSequenceClassification, LongspanForSpanClassification
from longspan.models.plug_in import accelerate

Batch = Mapping[str, NDArray[np.int64]]  # input_ids, attention_mask, ... [B, N]; span_ranges [B, S, 2]
# The precisions of each engine; the first is what it takes where none is named.
ENGINES = {"huggingface": ("fp32",), "longspan": ("fp32", "bf16", "int8"), "onnx": ("fp32", "int8")}


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A classifier ready to run. `logits` takes a batch to [B, L]; as many threads may call it at a time as there are
    instances."""

    name: str
    precision: str
    instances: int
    threads_per_instance: int
    logits: Callable[[Batch], NDArray[np.float32]]


def parse_engine(text: str) -> tuple[str, str | None]:
    """(engine, precision or None) of "longspan:int8" or "onnx". ValueError for one that does not exist."""
    name, _, precision = text.partition(":")
    if name not in ENGINES:
        raise ValueError(f"there is no engine {name!r}; there are {', '.join(ENGINES)}")
    if precision and precision not in ENGINES[name]:
        raise ValueError(f"engine {name} computes in {', '.join(ENGINES[name])}; got {precision!r}")
    return name, precision or None


@contextmanager
def open_engine(
    source: str | Path,
    name: str = "longspan",
    *,
    precision: str | None = None,
    instances: int = 1,
    threads_per_instance: int = 1,
    onnx_file: str | Path | None = None,
) -> Iterator[Engine]:
    """The classifier in a directory or on the hub, on an engine, until the `with` statement ends.

    name: "huggingface", transformers' own class as it loads, in fp32; "longspan", the packed encoder, also in the place
    of a Hugging Face model's own; "onnx", ONNX Runtime. precision: one of ENGINES[name]; None takes that of a packed
    checkpoint or file, or fp32. onnx_file: what `export` made of the model; None exports it to a temporary file.
    instances: of the model, with `threads_per_instance` threads each: worker processes of a `WorkerPool`, or sessions
    of ONNX Runtime in this process. One instance runs in this process.
    Raises ValueError for other names, precisions and more threads than cores, NotImplementedError for a family that the
    engine lacks, and what loading and `export` raise.
    """
    parse_engine(f"{name}:{precision or ''}")
    _check_cores(instances, threads_per_instance)
    config = AutoConfig.from_pretrained(source)
    packed = getattr(config, "precision", None)
    if packed is not None and (name != "longspan" or precision not in (None, packed)):
        raise ValueError(
            f"{source} is packed in {packed} for longspan's engine, which alone can run it: name the checkpoint that "
            f"it was made of"
        )
    if name == "huggingface" and isinstance(config, LongspanConfig):
        raise NotImplementedError(
            f"{source} is a longspan model, which transformers' classes cannot load: compare with the Hugging Face "
            f"checkpoint that it was made of"
        )
    described: Any = {"name": name, "instances": instances, "threads_per_instance": threads_per_instance}
    if name == "onnx":
        with tempfile.TemporaryDirectory(prefix="longspan-") as folder:
            file = _exported(source, Path(folder), precision) if onnx_file is None else Path(onnx_file)
            sessions: queue.SimpleQueue[OnnxModel] = queue.SimpleQueue()
            for _ in range(instances):
                sessions.put(OnnxModel(file, threads=threads_per_instance))
            session = sessions.get()
            sessions.put(session)
            if precision not in (None, session.precision):
                raise ValueError(f"{file} is in {session.precision}, and {precision} was asked for")
            yield Engine(**described, precision=session.precision, logits=_on_sessions(sessions))
        return
    precision = str(precision or packed or ENGINES[name][0])
    load = partial(_Classifier, source, name, precision)
    if instances > 1:
        with WorkerPool(load, instances=instances, threads_per_instance=threads_per_instance) as pool:

            def in_worker(batch: Batch) -> NDArray[np.float32]:
                return next(pool.map([dict(batch)], method="logits"))

            yield Engine(**described, precision=precision, logits=in_worker)
        return
    classifier = load()

    def here(batch: Batch) -> NDArray[np.float32]:
        return classifier.logits(**{key: torch.from_numpy(value) for key, value in batch.items()})

    before = torch.get_num_threads()
    torch.set_num_threads(threads_per_instance)
    try:
        yield Engine(**described, precision=precision, logits=here)
    finally:
        torch.set_num_threads(before)


def _check_cores(instances: int, threads: int) -> None:
    cores = len(allowed_cores())
    if min(instances, threads) < 1 or instances * threads > cores:
        raise ValueError(
            f"instances and threads_per_instance must be at least 1, and their product at most the {cores} cores that "
            f"this process may use; got {instances} and {threads}"
        )


class _Classifier:
    """The model of an engine, in this process or a worker's."""

    def __init__(self, source: str | Path, name: str, precision: Any):
        kind: Any = AutoModelForSequenceClassification
        if name == "longspan":
            architectures = AutoConfig.from_pretrained(source).architectures or ()
            spans = LongspanForSpanClassification.__name__ in architectures
            kind = LongspanForSpanClassification if spans else LongspanForSequenceClassification
        self.model = kind.from_pretrained(source, dtype=torch.float32).eval()
        if name == "longspan":
            accelerate(self.model, precision)

    @torch.inference_mode()
    def logits(self, **batch: Tensor) -> NDArray[np.float32]:
        """[B, L], as an array: to unpack a model's whole output takes who waits for a worker six times as long."""
        return self.model(**batch).logits.float().numpy()


def _exported(source: str | Path, folder: Path, precision: str | None) -> Path:
    from longspan.inference.export_onnx import export  # not before the extra is needed

    wanted: Any = precision or ENGINES["onnx"][0]
    return export(source, folder / "model.onnx", precision=wanted).out


def _on_sessions(sessions: queue.SimpleQueue[OnnxModel]) -> Callable[[Batch], NDArray[np.float32]]:
    def logits(batch: Batch) -> NDArray[np.float32]:
        session = sessions.get()
        try:
            return session(**batch)["logits"]
        finally:
            sessions.put(session)

    return logits
