"""What this machine has: memory that may still be used, memory that is used. Linux; read from /proc and the cgroup."""

from __future__ import annotations

import ctypes
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
HEAP_BYTES = 256 << 20
"""Room in a budget that a heap which keeps freed blocks should have: 110 MB were used with SmolLM2-135M."""
_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


def return_freed_memory() -> bool:
    """Make the C library give every freed block of 1 MiB or more back at once; False where it has no such switch.

    By default glibc raises its threshold to the largest block freed so far (up to 32 MiB) and serves tensors of that
    size, an expert's weights for one, from a heap that fragments: 200 MB read in tensors of 20 MB then cost 120 MB of
    resident memory instead of 20. A build with a memory budget calls this first.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20))
    except (AttributeError, OSError):
        return False


def keep_freed_memory() -> bool:
    """Make the C library keep freed blocks of up to 16 MiB for the next ones; False where it cannot.

    The opposite of `return_freed_memory`, for a build whose memory is far from its budget: fresh pages are cleared by
    the kernel, which took 17 to 21 % of the CPU time of a model with small layers. What is free at the heap's end goes
    back from 64 MiB on.
    """
    try:
        libc = ctypes.CDLL(None)
        return bool(libc.mallopt(_M_MMAP_THRESHOLD, 16 << 20)) and bool(
            libc.mallopt(_M_TRIM_THRESHOLD, 64 << 20)
        )
    except (AttributeError, OSError):
        return False


def get_available_memory() -> int:
    """Bytes of memory that can be used without swapping: the smaller of the machine's and the container's."""
    machine = _available_of_machine()
    container = [
        left for paths in _LIMITS if (left := _left_in_container(*map(Path, paths))) is not None
    ]
    return min([machine, *container])


def has_bfloat16_instructions() -> bool:
    """Whether this CPU has instructions for products of bfloat16 (AVX512-BF16 or AMX)."""
    try:
        return not {"avx512_bf16", "amx_bf16"}.isdisjoint(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False


def get_peak_memory() -> int:
    """The most resident memory this process ever had, in bytes (getrusage would count its parent's before exec)."""
    return _kilobytes(Path("/proc/self/status"), "VmHWM:")


def _available_of_machine() -> int:
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable:")


def _kilobytes(file: Path, key: str) -> int:
    """The figure "key: n kB" of a file under /proc, in bytes."""
    line = next(line for line in file.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


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
