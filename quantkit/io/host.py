"""Memory and CPU of this machine, read from /proc and the cgroup. Linux."""

from __future__ import annotations

import ctypes
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
HEAP_BYTES = 256 << 20
"""Part of a memory budget for a heap that keeps freed blocks: SmolLM2-135M used 110 MB."""
_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


def return_freed_memory() -> bool:
    """Make the C library return every freed block of 1 MiB or more at once; False if it cannot.

    By default glibc raises its threshold to the largest block freed so far (up to 32 MiB) and
    serves tensors of that size, such as an expert's weights, from a heap that fragments: 200 MB
    read in tensors of 20 MB then cost 120 MB of resident memory instead of 20. A build with a
    memory budget calls this first.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20))
    except (AttributeError, OSError):
        return False


def keep_freed_memory() -> bool:
    """Make the C library keep freed blocks of up to 16 MiB for reuse; False if it cannot.

    The opposite of `return_freed_memory`, for a build whose memory is far from its budget: the
    kernel clears fresh pages, which took 17 to 21 % of the CPU time of a model with small layers.
    Free memory at the heap's end is returned from 64 MiB on.
    """
    try:
        libc = ctypes.CDLL(None)
        return bool(libc.mallopt(_M_MMAP_THRESHOLD, 16 << 20)) and bool(
            libc.mallopt(_M_TRIM_THRESHOLD, 64 << 20)
        )
    except (AttributeError, OSError):
        return False


def get_available_memory() -> int:
    """Return the bytes usable without swapping: the minimum of machine and container."""
    machine = _read_kilobytes(Path("/proc/meminfo"), "MemAvailable:")
    container = [
        left for paths in _LIMITS if (left := _read_cgroup_left(*map(Path, paths))) is not None
    ]
    return min([machine, *container])


def has_bfloat16_instructions() -> bool:
    """Return whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    try:
        return not {"avx512_bf16", "amx_bf16"}.isdisjoint(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False


def get_peak_memory() -> int:
    """Return the peak resident memory of this process in bytes.

    getrusage would include its parent's before exec.
    """
    return _read_kilobytes(Path("/proc/self/status"), "VmHWM:")


def _read_kilobytes(file: Path, key: str) -> int:
    """Return the value of "key: n kB" in a file under /proc, in bytes."""
    line = next(line for line in file.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def _read_cgroup_left(limit: Path, usage: Path, stat: Path) -> int | None:
    """Return the bytes left under a cgroup's limit; None without a limit.

    Cached file pages count as free: the kernel drops them.
    """
    try:
        bound = limit.read_text().strip()
        used = int(usage.read_text())
        counters = dict(line.split() for line in stat.read_text().splitlines())
    except (OSError, ValueError):
        return None
    if not bound.isdigit():
        return None
    cached = int(counters.get("inactive_file", 0)) + int(counters.get("active_file", 0))
    return max(0, int(bound) - used + cached)
