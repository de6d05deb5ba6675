"""The loader: what it does where the library is there, missing, broken or of another version."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from longspan import kernels
from longspan.attention import SlidingWindow, attend, explain

needs_library = pytest.mark.skipif(kernels.library() is None, reason=str(kernels.problem()))
Q = torch.randn(1, 2, 20, 8)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where the loader now looks; what it found before comes back afterwards."""
    monkeypatch.setattr(kernels, "__path__", [str(tmp_path)])
    _forget()
    yield tmp_path
    _forget()


def _forget() -> None:
    kernels._find.cache_clear()
    kernels._warn_once.cache_clear()


def installed() -> Path:
    return next(file for place in kernels.__path__ if (file := Path(place) / kernels.FILE_NAME).exists())


def test_missing_library_warns_once_and_attention_falls_back(folder: Path):
    with pytest.warns(RuntimeWarning, match=r"are not installed.* Install a C\+\+17 compiler .* then longspan again"):
        out = attend(Q, Q, Q, SlidingWindow(3, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(attend(Q, Q, Q, SlidingWindow(3, 3)), out)
    torch.testing.assert_close(out, attend(Q, Q, Q, SlidingWindow(3, 3), backend="reference"))


def test_explain_says_what_is_missing(folder: Path):
    explanation = explain(Q, Q, Q, SlidingWindow(3, 3))
    assert explanation.reasons["native"] == "cannot: the compiled kernels are not installed"
    with pytest.raises(NotImplementedError, match="the compiled kernels are not installed"):
        attend(Q, Q, Q, SlidingWindow(3, 3), backend="native")


@needs_library
@pytest.mark.parametrize("part", [0, 30, 64, 0.5, 0.99])
def test_library_that_is_cut_short_does_not_load(part: float, request):
    whole = installed().read_bytes()
    folder = request.getfixturevalue("folder")
    (folder / kernels.FILE_NAME).write_bytes(whole[: part if isinstance(part, int) else int(part * len(whole))])
    assert kernels.library() is None
    assert "do not load: " in str(kernels.problem()) and "is cut short" in str(kernels.problem())


def test_file_that_is_no_library_does_not_load(folder: Path):
    (folder / kernels.FILE_NAME).write_bytes(bytes(4000))
    assert kernels.library() is None
    assert "do not load: " in str(kernels.problem())


@needs_library
def test_library_for_another_machine_does_not_load(request):
    whole = bytearray(installed().read_bytes())
    folder = request.getfixturevalue("folder")
    whole[18:20] = (0x1234).to_bytes(2, "little")  # the machine, in the header
    (folder / kernels.FILE_NAME).write_bytes(whole)
    assert "do not load: " in str(kernels.problem())


@needs_library
def test_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "INTERFACE_VERSION", 1000)
    _forget()
    try:
        assert "this longspan needs 1000" in str(kernels.problem())
    finally:
        _forget()


@needs_library
def test_threads_of_torch_are_the_threads_of_the_kernels():
    before = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert kernels.library().longspan_num_threads() == number
            with ThreadPoolExecutor(1) as other:  # where torch says the number only when it is asked
                assert other.submit(lambda: kernels.library().longspan_num_threads()).result() == number
    finally:
        torch.set_num_threads(before)


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime_serves_torch_and_the_kernels():
    program = (
        "from longspan import kernels; kernels.library(); "
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line})"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert len(found.stdout.split()) <= 1


@needs_library
def test_unknown_instruction_set_is_refused():
    library = kernels.library()
    before = library.longspan_instruction_set()
    assert library.longspan_use_instruction_set(b"avx9000") == 1
    assert library.longspan_instruction_set() == before


@needs_library
def test_a_refusal_of_the_library_is_an_error():
    with pytest.raises(RuntimeError, match="longspan_attention_forward refused its arguments"):
        kernels.library().longspan_attention_forward(kernels.AttentionCall(dtype=77), None, 1)


def test_threads_that_ask_at_once_get_one_library(folder: Path):
    found = []
    threads = [threading.Thread(target=lambda: found.append(kernels._find())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(one.library) for one in found}) == 1


def test_importing_longspan_neither_loads_nor_warns():
    code = "import sys, longspan; print('longspan.kernels' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
