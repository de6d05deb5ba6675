"""The folder of a run that can be repeated to go on: what decides the run, and files that are whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def remember(
    output: Path, arguments: dict[str, Any], name: str = "run.json", *, may_differ: Sequence[str] = ()
) -> None:
    """Writes what decides a run to the file `name` in `output`, or compares with what stands there.

    may_differ: names of arguments that are written and not compared.
    ValueError names the arguments that differ; FileExistsError for a folder that holds something else.
    """
    file = output / name
    arguments = json.loads(json.dumps(arguments))
    if file.is_file():
        before = json.loads(file.read_text())
        changed = [
            f"{name} was {before.get(name)!r} and is {arguments.get(name)!r}"
            for name in sorted({*before, *arguments} - {*may_differ})
            if before.get(name) != arguments.get(name)
        ]
        if changed:
            raise ValueError(
                f"{output} holds a run with other arguments: {'; '.join(changed)}. Repeat it with its own, or name "
                f"another directory"
            )
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and holds no run to go on with: name another, or remove it first")
    output.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(arguments, indent=2) + "\n")


@contextmanager
def alone_in(output: Path, name: str = "run.json") -> Iterator[None]:
    """Keeps other runs of this machine out of a folder that `remember` knows until the statement ends, however it does.

    BlockingIOError where another run is in it. Systems without file locks (Windows) let both in.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(output / name) as remembered:
        try:
            fcntl.flock(remembered, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"another run is writing to {output}: wait until it has ended, or name another folder"
            ) from None
        yield


def write_whole(file: Path, text: str) -> None:
    """Writes a file under another name first, so that it is there whole or as it was."""
    written = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        written.write_text(text, encoding="utf-8")
        written.replace(file)
    finally:
        written.unlink(missing_ok=True)
