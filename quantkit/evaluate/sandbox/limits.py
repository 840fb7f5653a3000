"""Limits of a jail, and the two that the host enforces from outside: total memory, files in /tmp.

Limits of a process (setrlimit) are multiplied by the number of processes, and a tmpfs made without
privileges takes as many empty files as there is memory. The kernel limits the memory of a whole
jail only where a memory group can be made (cgroup.py); elsewhere the host polls the jail twenty
times a second.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

MEMORY_BYTES = 1 << 30  # of a process's address space, and of all memory of a jail
PROCESSES = 16
DESCRIPTORS = 64
FILE_BYTES = 1 << 20
SCRATCH_BYTES = 16 << 20
SCRATCH_FILES = 4096
POLL_SECONDS = 0.05

# page tables: a page mapped alone in its 2 MiB takes another page of them
_MEMORY_LINES = re.compile(r"^Vm(?:RSS|Swap|PTE):\s+\d+ kB$", re.MULTILINE)


def find_missing_support() -> str:
    """Return what this kernel lacks for a jail to be watched; empty if nothing is missing."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return "this kernel has no pidfd_open"
    has_children = Path(f"/proc/self/task/{os.getpid()}/children").exists()
    if not has_children:
        return "this kernel does not name a process's children (CONFIG_PROC_CHILDREN)"
    return ""


def list_process_tree(pid: int) -> list[int]:
    """Return a process and its descendants; orphans stay below the jail's own first process."""
    pids = [pid]
    for parent in pids:  # grows during the loop
        with suppress(OSError):
            for task in os.listdir(f"/proc/{parent}/task"):
                pids += map(int, Path(f"/proc/{parent}/task/{task}/children").read_text().split())
    return pids


def measure_memory(pids: list[int]) -> int:
    """Return the bytes of these processes: resident, swapped out, and their page tables.

    A page that several of them share counts for each. Memory that no process maps is not here: the
    system-call filter refuses what could make it.
    """
    kibibytes = 0
    for pid in pids:
        with suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            kibibytes += sum(int(line.split()[1]) for line in _MEMORY_LINES.findall(status))
    return kibibytes << 10


def count_scratch_files(pids: list[int], scratch_bytes: int) -> int:
    """Return the number of files in the jail's /tmp, recognized by its size.

    While a jail is being made, /tmp is still the host's.
    """
    for pid in pids:
        with suppress(OSError):
            status = os.statvfs(Path("/proc", str(pid), "root", "tmp"))
            if status.f_blocks * status.f_frsize == scratch_bytes:
                return status.f_files - status.f_ffree
    return 0


def describe_exceeded_memory() -> str:
    """Return the verdict of a jail that exceeded its memory."""
    return f"used more than {MEMORY_BYTES >> 20} MiB of memory"


def find_exceeded_limit(pid: int, is_memory_polled: bool) -> str:
    """Return the limit that the jail started by `pid` exceeds, in words; empty if there is none."""
    pids = list_process_tree(pid)
    if is_memory_polled and measure_memory(pids) > MEMORY_BYTES:
        return describe_exceeded_memory()
    if count_scratch_files(pids, SCRATCH_BYTES) > SCRATCH_FILES:
        return f"made more than {SCRATCH_FILES} files"
    return ""
