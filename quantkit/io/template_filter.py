"""System calls of the process that renders templates.

Python that escaped from jinja2's sandbox could still use the kernel. The process needs memory, its
two pipes, clocks and its own timer, and nothing else: no files, sockets, programs, processes,
signals to others, limits or executable pages. Other calls fail with EPERM or ENOSYS.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping

from quantkit.io.seccomp import AUDIT_ARCHES, ArgumentRule, Numbers, build_filter

ALLOWED_CALLS: Mapping[str, Numbers] = {
    "read": (0, 63), "write": (1, 64), "brk": (12, 214), "munmap": (11, 215), "mremap": (25, 216),
    "madvise": (28, 233), "futex": (202, 98), "sched_yield": (24, 124), "getpid": (39, 172),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132), "restart_syscall": (219, 128), "getrandom": (318, 278),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "gettimeofday": (96, 169),
    "time": (201, None), "times": (100, 153), "getrusage": (98, 165), "getcpu": (309, 168),
    "exit": (60, 93), "exit_group": (231, 94),
    # strftime looks whether /etc/localtime has changed, and uses UTC if it cannot: names of files
    # can be tried, not read
    "stat": (4, None), "newfstatat": (262, 79),
}  # fmt: skip

_PROT_EXEC = 4
_ITIMER_PROF = 2

ARGUMENT_RULES = (
    ArgumentRule(
        name="mmap", numbers=(9, 222), argument=2, reason="executable", refused_bits=_PROT_EXEC
    ),
    ArgumentRule(
        name="mprotect", numbers=(10, 226), argument=2, reason="executable", refused_bits=_PROT_EXEC
    ),
    ArgumentRule(
        name="setitimer",
        numbers=(38, 103),
        argument=0,
        reason="timers other than that of processor time",
        values=(_ITIMER_PROF,),
    ),
)


def build_template_filter() -> bytes:
    """Build the filter for this machine; empty where its calls have no list."""
    machine = platform.machine()
    if machine not in AUDIT_ARCHES:
        return b""
    return build_filter(machine, ALLOWED_CALLS.values(), ARGUMENT_RULES)
