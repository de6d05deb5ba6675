"""What runs inside a worker process of `workers.py`, and how requests and results travel.

Shapes: B rows of a batch, N tokens.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import longspan
from longspan.inference.cores import pin

SPANS = ("start_logits", "end_logits")  # [B, N]; other outputs [B, n] have a number for each label


def work(connection: Any, load: Callable[[], Any], cores: Sequence[int], folder: Path) -> None:
    """A worker process: loads the model, then answers requests until its pipe closes."""
    from transformers.utils import logging  # takes longer than all else here, which Ray's actors import, too

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent decides
    watch = end_with_parent(partial(shutil.rmtree, folder, ignore_errors=True))
    pin(cores)
    torch.set_num_threads(len(cores))
    logging.disable_progress_bar()
    models: list[Any] = []
    try:
        connection.send_bytes(outcome(lambda: models.append(load())))
        gc.freeze()  # the collector need not look through the model again and again
        while models:
            payload = connection.recv_bytes()
            connection.send_bytes(outcome(lambda payload=payload: _run(models[0], payload)))
    except (EOFError, ConnectionError):  # the parent is gone: what watches it ends the process, once it has cleaned up
        watch.join()


def end_with_parent(clean: Callable[[], object] = lambda: None) -> threading.Thread:
    """Lets a process of multiprocessing end when its parent does, whatever it computes. clean: called before.

    Returns the thread that waits for this.
    """

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        clean()
        os._exit(1)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@torch.inference_mode()
def _run(model: Any, payload: bytes) -> Any:
    function, request = pickle.loads(payload)
    return function(model, request)


def call(method: str | None, model: Any, request: dict[str, Any]) -> Any:
    arrays = {name: torch.tensor(value) for name, value in request.items() if isinstance(value, np.ndarray)}
    return (model if method is None else getattr(model, method))(**request | arrays)


def load_model(kind: Any, source: str, precision: Any, is_ours: bool) -> Any:
    model = kind.from_pretrained(source).eval()  # maps the file: tensors are its pages until someone writes to them
    return longspan.accelerate(model, precision=precision) if is_ours or precision else model


def call_rows(model: Any, rows: list[dict[str, np.ndarray]]) -> list[Any]:
    """The rows as one batch [B, N], and its output row by row."""
    lengths = [len(row["input_ids"]) for row in rows]
    batch = {}
    for name in rows[0]:
        padding = getattr(model.config, "pad_token_id", None) if name == "input_ids" else None
        parts = [torch.tensor(row[name]) for row in rows]
        batch[name] = pad_sequence(parts, batch_first=True, padding_value=padding or 0)
    if min(lengths) < max(lengths):
        batch["attention_mask"] = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    output = model(**batch)

    def take(name: str, value: Any, row: int) -> Any:
        if isinstance(value, tuple):
            return tuple(take(name, part, row) for part in value)
        return value[row, : lengths[row]] if value.dim() > 2 or name in SPANS else value[row]

    return [
        type(output)(**{name: take(name, value, row) for name, value in output.items()}) for row in range(len(rows))
    ]


class _Pickler(pickle.Pickler):
    """Tensors as the bytes of their elements. torch's own ways send what lies behind a view, or files that vanish with
    the process that made them."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return NotImplemented
        elements = obj.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return _tensor, (elements.numpy(), obj.dtype, tuple(obj.shape))


def _tensor(elements: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(elements).view(dtype).reshape(shape)


def pack(value: Any) -> bytes:
    buffer = BytesIO()
    _Pickler(buffer, protocol=5).dump(value)
    return buffer.getvalue()


def outcome(compute: Callable[[], Any]) -> bytes:
    """What `compute` gives or raises, as `unpack` gives or raises it on the other side."""
    try:
        return pack((compute(), None))
    except Exception as error:
        told = f"in the worker process:\n{''.join(traceback.format_exception(error))}"
        parts = (type(error), error.args, vars(error), told)
        try:
            packed = pack((None, parts))
            if str(_rebuild(*pickle.loads(packed)[1])) == str(error):
                return packed
        except Exception:  # it does not travel; its text does
            pass
        return pack((None, (RuntimeError, (f"{type(error).__name__}: {error}",), {}, told)))


def unpack(payload: bytes) -> Any:
    value, error = pickle.loads(payload)
    if error is not None:
        raise _rebuild(*error)
    return value


def _rebuild(kind: type[Exception], arguments: tuple[Any, ...], attributes: dict[str, Any], told: str) -> Exception:
    """The exception without a call of __init__, which may take other arguments than the text it makes of them."""
    error = kind.__new__(kind, *arguments)
    error.args, error.__cause__ = arguments, RuntimeError(told)
    vars(error).update(attributes)
    return error
