"""Limits over a whole jail that the kernel keeps only with privileges: all its memory, and the files in its /tmp.

Limits of a process (setrlimit) are multiplied by the number of processes, and a tmpfs made without privileges takes
as many empty files as there is memory. So the host looks at the jail from outside, twenty times a second.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

POLL_SECONDS = 0.05

_PAGE = os.sysconf("SC_PAGE_SIZE")


def find_missing_support() -> str:
    """What this kernel lacks for a jail to be watched; empty for nothing."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return "this kernel has no pidfd_open"
    named = Path(f"/proc/self/task/{os.getpid()}/children").exists()
    return "" if named else "this kernel does not name a process's children (CONFIG_PROC_CHILDREN)"


def list_process_tree(pid: int) -> list[int]:
    """A process and all that came from it; what is orphaned stays below the jail's own first process."""
    found = [pid]
    for parent in found:  # grows on the way
        with suppress(OSError):
            for task in os.listdir(f"/proc/{parent}/task"):
                found += map(int, Path(f"/proc/{parent}/task/{task}/children").read_text().split())
    return found


def measure_memory(pids: list[int]) -> int:
    """Bytes of memory that these processes hold; pages that several of them share count for each."""
    pages = 0
    for pid in pids:
        with suppress(OSError):
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * _PAGE


def count_scratch_files(pids: list[int], scratch_bytes: int) -> int:
    """Files in the jail's /tmp, which is known by its size: while a jail is made, /tmp is still the host's."""
    for pid in pids:
        with suppress(OSError):
            found = os.statvfs(Path("/proc", str(pid), "root", "tmp"))
            if found.f_blocks * found.f_frsize == scratch_bytes:
                return found.f_files - found.f_ffree
    return 0


def find_exceeded_limit(pid: int, memory_bytes: int, scratch_bytes: int, most_files: int) -> str:
    """Which limit the jail that `pid` started has passed, in words; empty for none."""
    pids = list_process_tree(pid)
    if measure_memory(pids) > memory_bytes:
        return f"used more than {memory_bytes >> 20} MiB of memory"
    if count_scratch_files(pids, scratch_bytes) > most_files:
        return f"made more than {most_files} files"
    return ""
