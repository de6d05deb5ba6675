"""Processes that begin, agree and end together."""

from __future__ import annotations

import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from tests.distributed.ranks import on_ranks

from longspan.distributed import SequenceShards
from longspan.distributed.processes import (
    check_same_everywhere,
    first_process_first,
    join_processes,
    lost_processes_told,
)


def in_turn(rank: int, file: Path) -> bool:
    with first_process_first():
        time.sleep(0 if rank else 0.2)
        was_there = file.exists()
        file.touch()
    return was_there


def test_the_first_process_is_done_before_the_others_begin(tmp_path):
    assert on_ranks(3, tmp_path, in_turn, tmp_path / "file") == [False, True, True]
    assert not in_turn(0, tmp_path / "alone")  # where there is no other


def compared(rank: int) -> str:
    check_same_everywhere({"seed": 1, "steps": (1, 2)})
    with pytest.raises(ValueError, match="same arguments") as error:
        check_same_everywhere({"seed": 1, "steps": (1, 2 + rank), "text": f"text {rank}"})
    return str(error.value)


def test_processes_with_other_settings_are_named(tmp_path):
    first, second = on_ranks(2, tmp_path, compared)
    assert first.endswith("rank 0 has steps (1, 2), text 'text 0', and others have not")
    assert second.endswith("rank 1 has steps (1, 3), text 'text 1', and others have not")
    check_same_everywhere({"seed": 1})  # of one process


def waited_for(rank: int) -> str:
    group, _ = dist.new_subgroups(2, timeout=timedelta(seconds=1))
    if rank:
        time.sleep(3)
        return ""
    began = time.monotonic()
    with pytest.raises(ConnectionError) as error, lost_processes_told(1):
        SequenceShards(4, group)
    assert time.monotonic() - began < 3
    return str(error.value)


def test_a_process_that_does_not_answer_is_not_waited_for_forever(tmp_path):
    said, _ = on_ranks(2, tmp_path, waited_for)
    assert said.startswith("another process of this run has ended, or did not answer for 1 seconds")


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="out of memory"), lost_processes_told(1):
        raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("in_use", "restarts", "advice"),
    [(True, "0", "a port may be in use"), (False, "1", "TORCH_DISABLE_SHARE_RDZV_TCP")],
)
def test_processes_that_do_not_meet_say_where(in_use, restarts, advice, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        if not in_use:
            taken.close()
        places = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        for name, value in (places | {"TORCHELASTIC_RESTART_COUNT": restarts}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(
            ConnectionError, match=f"the 2 processes .* each other at localhost:{port} in 1 s.*{advice}"
        ):
            join_processes(1)


def test_one_process_joins_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    join_processes()
    assert not dist.is_initialized()
