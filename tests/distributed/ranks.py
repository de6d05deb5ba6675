"""Runs a function on several gloo processes of this machine."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 60.0
DRAWING = ("matplotlib.pyplot", "torch.utils.tensorboard")  # which the runs of training import, too


def on_ranks(world: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What work(rank, *arguments) returns on each rank of a group. AssertionError has the tracebacks of all."""
    context = get_context("forkserver")  # one process imports what all others then have
    context.set_forkserver_preload([__name__, "longspan.training.language", *DRAWING])
    answers = context.SimpleQueue()
    processes = [
        context.Process(target=_run, args=(rank, world, str(folder / "store"), answers, work, arguments), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    found = dict(answers.get() for _ in processes)
    for process in processes:
        process.join(TIMEOUT)
    failures = [f"rank {rank}:\n{answer[1]}" for rank, answer in sorted(found.items()) if answer[1]]
    assert not failures, "\n".join(failures)
    return [found[rank][0] for rank in range(world)]


def _run(rank: int, world: int, store: str, answers: Any, work: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    result, failure = None, ""
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT)
        )
        result = work(rank, *arguments)
        dist.barrier()
    except BaseException:
        failure = traceback.format_exc()
    answers.put((rank, (result, failure)))
    if dist.is_initialized():
        dist.destroy_process_group()
