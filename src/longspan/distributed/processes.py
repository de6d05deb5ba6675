"""The processes of a run that torchrun or `accelerate launch` started: they begin, agree and end together."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from longspan.distributed.shards import SequenceShards

GLOO_SAYS = ("/gloo/transport/", "caused pair closure")  # in its errors, which have no type of their own


def join_processes(timeout_seconds: float = 60.0) -> None:
    """Starts torch.distributed where a launcher started several processes, or torchrun one; once.

    A process that waits for others longer than the timeout raises an error. ConnectionError where they do not come.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 or dist.is_torchelastic_launched()
    if not launched or dist.is_initialized():
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout_seconds))
    except RuntimeError as error:
        address = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        advice = "a port may be in use, which `torchrun --standalone` looks for itself, or one of them has ended"
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            advice = "processes are started again with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before `torchrun`"
        raise ConnectionError(
            f"the {os.environ['WORLD_SIZE']} processes of this run did not find each other at {address} in "
            f"{timeout_seconds:g} seconds: {advice} ({_first_line(error)})"
        ) from error


@contextmanager
def first_process_first() -> Iterator[None]:
    """The first process does what is inside before all others do it, who wait for a day at most."""
    if not _several():
        yield
        return
    waiting: Any = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    if dist.get_rank():
        dist.barrier(waiting)
    yield
    if not dist.get_rank():
        dist.barrier(waiting)


def check_same_everywhere(settings: dict[str, Any]) -> None:
    """ValueError on all processes, with the names of those settings that differ between them."""
    if not _several():
        return
    digests = [hashlib.sha256(repr(value).encode()).digest()[:7] for value in settings.values()]
    own = torch.tensor([int.from_bytes(digest, "big") for digest in digests])
    every = torch.stack(SequenceShards(1).gather_rows(own))
    different = (every != every[0]).any(0).tolist()
    if any(different):
        named = {name: value for (name, value), found in zip(settings.items(), different, strict=True) if found}
        raise ValueError(
            f"the processes of a run must be started with the same arguments; rank {dist.get_rank()} has "
            f"{', '.join(f'{name} {value!r}' for name, value in named.items())}, and others have not"
        )


@contextmanager
def lost_processes_told(timeout_seconds: float) -> Iterator[None]:
    """ConnectionError in plain words where torch.distributed says that another process is gone, or does not answer."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(text in str(error) for text in GLOO_SAYS):
            raise
        raise ConnectionError(
            f"another process of this run has ended, or did not answer for {timeout_seconds:g} seconds, so this one "
            f"ends too; started again with the same command, the run goes on from its last checkpoint "
            f"({_first_line(error)})"
        ) from error


def _first_line(error: RuntimeError) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
