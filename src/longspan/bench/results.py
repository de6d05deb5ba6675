"""What a benchmark leaves behind: one JSON file that says on which machine, with which versions, what was measured."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import torch

from longspan import __version__

PEERS = ("onnxruntime", "openvino", "nncf", "local-attention")
# What Linux calls the instructions that decide the speed of matrix products, weakest first.
INSTRUCTION_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def document(topic: str, command: str, rows: list[dict[str, Any]], goals: list[dict[str, Any]]) -> dict[str, Any]:
    """A result file as a dictionary. NaN and infinity, which JSON lacks, become None."""
    return _finite(
        {
            "topic": topic,
            "command": command,
            "commit": commit(),
            "date": date.today().isoformat(),
            "machine": machine(),
            "versions": versions(),
            "goals": goals,
            "rows": rows,
        }
    )


def machine() -> dict[str, Any]:
    """The CPU by its own name, the cores this process may use, the threads it does use, the instructions it has."""
    described = _cpuinfo()
    flags = described.get("flags", "").split()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return {
        "cpu": described.get("model name") or platform.processor() or platform.machine(),
        "cores": len(cores),
        "threads": torch.get_num_threads(),
        "instruction_set": _kernels_instruction_set(),
        "instructions": [flag for flag in INSTRUCTION_FLAGS if flag in flags],
    }


def versions() -> dict[str, str | None]:
    """Of everything that is measured; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "longspan": __version__}
    for name in ("torch", "transformers", *PEERS):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """The checkout's commit, "-dirty" where files differ from it; None for an installed package."""
    answers = []
    for question in (("ls-files", "--error-unmatch", __file__), ("describe", "--always", "--dirty", "--exclude=*")):
        command = ["git", "--no-optional-locks", *question]
        try:
            done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        answers.append(done.stdout.strip())
    return answers[-1]


def write(result: dict[str, Any], path: Path) -> None:
    """The file is there whole or not at all: it is written beside its place and then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(to_json(result), encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def to_json(result: dict[str, Any]) -> str:
    return json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def default_path(result: dict[str, Any]) -> Path:
    """<date>_<cpu>_<topic>.json, in `results/` where the current directory has such a folder."""
    cpu = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|@.*", " ", result["machine"]["cpu"].lower())
    names = [*re.findall(r"[a-z0-9]+", cpu), result["machine"]["instruction_set"] or "no-kernels"]
    folder = Path("results") if Path("results").is_dir() else Path()
    return folder / f"{result['date']}_{'-'.join(names).replace('_', '-')}_{result['topic']}.json"


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    lines = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in lines}


def _kernels_instruction_set() -> str | None:
    from longspan.kernels import library

    kernels = library()
    return None if kernels is None else kernels.longspan_instruction_set().decode()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
