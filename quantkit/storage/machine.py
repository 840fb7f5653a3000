"""What this machine has: memory that may still be used, memory that is used. Linux; read from /proc and the cgroup."""

from __future__ import annotations

import os
import resource
from pathlib import Path

_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


def memory_available() -> int:
    """Bytes of memory that can be used without swapping: the smaller of the machine's and the container's."""
    machine = _available_of_machine()
    container = [left for paths in _LIMITS if (left := _left_in_container(*map(Path, paths))) is not None]
    return min([machine, *container])


def resident_bytes() -> int:
    """Resident memory of this process now, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_resident_bytes() -> int:
    """The most resident memory this process ever had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _available_of_machine() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _left_in_container(limit: Path, usage: Path, stat: Path) -> int | None:
    """Bytes left under a cgroup's limit; None without one. Cached file pages count as free: the kernel drops them."""
    try:
        bound = limit.read_text().strip()
        used = int(usage.read_text())
        figures = dict(line.split() for line in stat.read_text().splitlines())
    except (OSError, ValueError):
        return None
    if not bound.isdigit():
        return None
    cached = int(figures.get("inactive_file", 0)) + int(figures.get("active_file", 0))
    return max(0, int(bound) - used + cached)
