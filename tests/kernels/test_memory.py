"""Memory that is kept from one tensor to the next."""

import gc
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from longspan.kernels import memory
from longspan.kernels.memory import HUGE_PAGE, empty

SIZE = 3 * HUGE_PAGE  # bytes, of many tensors below


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    gc.collect()
    monkeypatch.setattr(memory, "_free", {})
    monkeypatch.setattr(memory, "_most_kept", memory._most_kept)


def kept() -> int:
    return sum(block.size for block in memory._free.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [[0, 5], [3, 7], [1000, 3000]], ids=str)
def test_it_is_as_torchs_but_aligned(shape, dtype):
    rows = empty(shape, dtype)
    assert (rows.shape, rows.dtype, rows.is_contiguous()) == (torch.Size(shape), dtype, True)
    assert rows.data_ptr() % (HUGE_PAGE if rows.nbytes >= HUGE_PAGE else 64) == 0
    rows.fill_(1)
    assert (rows == 1).all()


def test_what_is_free_is_used_again_for_about_as_much():
    first = empty([SIZE], torch.uint8)
    address = first.data_ptr()
    del first
    assert kept() == SIZE
    much_less = empty([HUGE_PAGE], torch.uint8)
    assert much_less.data_ptr() != address
    less = empty([SIZE - 100], torch.uint8)
    assert less.data_ptr() == address and kept() == 0


def test_a_view_holds_its_memory():
    part = empty([SIZE // 4], torch.float32).view(-1, 2)[5:, 1]
    part.fill_(7)
    assert kept() == 0
    empty([SIZE // 4], torch.float32).fill_(1)
    assert (part == 7).all() and kept() == SIZE
    del part
    assert kept() == 2 * SIZE


def test_tensors_of_inference_mode_leave_memory_for_others():
    with torch.inference_mode():
        address = empty([SIZE // 4], torch.float32).data_ptr()
    rows = empty([SIZE // 4], torch.float32)
    assert rows.data_ptr() == address
    rows.requires_grad_()
    rows.sum().backward()


def test_no_more_is_kept_than_the_limit_and_the_oldest_goes_first():
    memory.keep_up_to(2 * SIZE)
    tensors = [empty([SIZE], torch.uint8) for _ in range(3)]
    addresses = [tensor.data_ptr() for tensor in tensors]
    while tensors:
        tensors.pop(0)
    assert list(memory._free) == addresses[1:]
    empty([3 * SIZE], torch.uint8)
    assert list(memory._free) == addresses[1:]  # what is too large leaves the others alone


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize("keep", [False, True])
def test_a_process_that_trains_keeps_the_memory_of_tensors(keep):
    code = f"""
import torch
from pathlib import Path
from longspan.kernels.memory import keep_freed_memory
if {keep}:
    keep_freed_memory()
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])
before = resident()
tensors = [torch.ones(4 << 20) for _ in range(8)]
most = resident()
del tensors
print((resident() - before) / (most - before))
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert (float(done.stdout) > 0.5) == keep


def test_what_is_free_can_be_given_back():
    used, free = (empty([SIZE], torch.uint8).fill_(number) for number in (1, 2))
    del free
    assert kept() == SIZE
    memory.give_back()
    assert kept() == 0 and (used == 1).all()


def test_threads_never_share_a_tensor():
    def work(number: int) -> bool:
        right = True
        for turn in range(30):
            rows = empty([SIZE // 8], torch.int64).fill_(100 * number + turn)
            right &= bool((rows == 100 * number + turn).all())
        return right

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
