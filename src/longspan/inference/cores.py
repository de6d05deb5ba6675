"""Which processor cores this process may use, and keeping a process on some of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path


def allowed_cores() -> list[int]:
    """Numbers of the cores that this process may use: its affinity, and no more than its control group's quota buys."""
    usable = getattr(os, "sched_getaffinity", None)
    cores = sorted(usable(0)) if usable else list(range(os.cpu_count() or 1))
    quota = cpu_quota()
    return cores if quota is None else cores[: max(1, int(quota))]


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """Processors' worth of time that the control groups of this process grant it, 2.5 for example; None = no limit.

    The smallest limit from its own group up to the root counts. Where a container hides the groups above its own, what
    it sees as the root is its own. root, membership: where Linux shows the groups and names this process's.
    """
    if not membership.is_file():
        return None
    limits: list[float] = []
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2, alone or beside version 1
            tops = [root, root / "unified"]
        elif "cpu" in controllers.split(","):
            tops = [root / controllers, root / "cpu"]
        else:
            continue
        for top in tops:
            group = top / path.lstrip("/")
            limits += [
                limit for folder in (group, *group.parents) if folder.is_relative_to(top) for limit in _of(folder)
            ]
    return min(limits, default=None)


def _of(group: Path) -> Iterator[float]:
    """The group's limit in processors, if it has one."""
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    except (OSError, ValueError):
        return
    if quota not in ("max", "-1"):
        yield int(quota) / int(period)


def pin(cores: Iterable[int]) -> None:
    """Keeps every thread of this process, those to come included, on `cores`, where the system can do that."""
    pin_thread = getattr(os, "sched_setaffinity", None)
    if pin_thread is None:
        return
    for thread in os.listdir("/proc/self/task"):
        pin_thread(int(thread), cores)
