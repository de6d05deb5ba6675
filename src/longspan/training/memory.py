"""How much memory a training took at most."""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that the process had resident since `forget_peak_memory`, or that it held on its GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux: since the process began
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most / (2**30 if sys.platform == "darwin" else 2**20)
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 2**20


def forget_peak_memory(device: torch.device) -> None:
    """Begins to measure anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
