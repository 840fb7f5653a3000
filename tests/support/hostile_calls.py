"""Attacks on the sandbox that consist of one or a few system calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_CALL = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
x86 = os.uname().machine == "x86_64"
def is_refused(number, *arguments):
    ctypes.set_errno(0)
    failed = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments)) == -1
    return failed and ctypes.get_errno() in (errno.EPERM, errno.ENOSYS)
def is_error(action, *arguments):
    try:
        action(*arguments)
    except (PermissionError, OSError) as error:
        return error.errno in (errno.EPERM, errno.ENOSYS)
    return False
"""


def probe_calls(numbers: Mapping[str, int]) -> str:
    """Return a program that makes each call with arguments of 0; `made` are those that work."""
    return f"""{_CALL}
tried = {dict(numbers)!r}
made = [name for name, number in tried.items() if not is_refused(number, 0, 0, 0, 0, 0, 0)]
"""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A program that reports which of its attacks were refused, or fails for `reason`."""

    name: str
    source: str
    tests: str = "assert refused, refused"
    reason: str = ""


def make_refusal(name: str, source: str, tests: str = "assert refused, refused") -> Refusal:
    """Return a program whose variable `refused` is true if its attack is."""
    return Refusal(name=name, source=_CALL + source, tests=tests)


REFUSALS = (
    make_refusal("shared anonymous memory", """
import mmap
refused = is_error(mmap.mmap, -1, 400 << 20)
failed = ctypes.c_void_p(-1).value
for flags in (0x21, 0x23, 0x21 | 0x8000, 0x21 | 0x4000):
    refused &= libc.mmap(None, 1 << 20, 3, flags, -1, 0) == failed
private = libc.mmap(None, 1 << 20, 3, 0x22, -1, 0) != failed
""", "assert refused and private"),
    make_refusal("shared anonymous memory that is no longer mapped", """
import mmap
def hold():
    held = []
    for _ in range(8):  # each is written, then dropped from the page table: 3.2 GB in all
        part = mmap.mmap(-1, 400 << 20)
        for at in range(0, len(part), 4096): part[at] = 1
        part.madvise(mmap.MADV_DONTNEED)
        held.append(part)
refused = is_error(hold)"""),
    make_refusal("a shared mapping of a device", """
import mmap
refused = True
for name in os.listdir("/dev"):
    fd = os.open("/dev/" + name, os.O_RDWR)
    try:
        mmap.mmap(fd, 1 << 20)
        refused = False
    except OSError: pass
listed = sorted(os.listdir("/dev"))""", "assert refused and listed == ['null', 'urandom'], listed"),
    make_refusal("huge pages of the host", """
failed = ctypes.c_void_p(-1).value
refused = libc.mmap(None, 2 << 20, 3, 0x22 | 0x40000, -1, 0) == failed"""),
    make_refusal("memory pushed to swap", """
part = libc.mmap(None, 1 << 20, 3, 0x22, -1, 0)
madvise = 28 if x86 else 233
advice = {"mergeable": 12, "cold": 20, "pageout": 21, "hwpoison": 100}
refused = all(is_refused(madvise, part, 1 << 20, value) for value in advice.values())
kept = not is_refused(madvise, part, 1 << 20, 4)""", "assert refused and kept"),
    make_refusal("memory files", """
refused = is_refused(319 if x86 else 279, 0, 0)
if hasattr(os, "memfd_create"): refused &= is_error(os.memfd_create, "x")"""),
    make_refusal("POSIX shared memory", """
def share():
    from multiprocessing.shared_memory import SharedMemory
    SharedMemory(create=True, size=1 << 20)
try:
    share()
    refused = False
except OSError: refused = True
refused &= not os.path.exists("/dev/shm")"""),
    make_refusal("every AIO context of the host", """
context = ctypes.c_ulong(0)
number = 206 if x86 else 0
refused = all(
    is_refused(number, 65536, ctypes.addressof(context)) for _ in range(64)
)"""),
    make_refusal("locks on the host's binaries", """
import fcntl, struct
with open(os.path.realpath("/usr/bin/env"), "rb") as binary:
    refused = is_error(fcntl.flock, binary, fcntl.LOCK_SH)
    refused &= is_error(fcntl.flock, binary, fcntl.LOCK_EX | fcntl.LOCK_NB)
    refused &= is_error(fcntl.lockf, binary, fcntl.LOCK_SH)
    refused &= is_error(fcntl.fcntl, binary, 37, struct.pack("hhqqi", 0, 0, 0, 0, 0))
    refused &= is_error(fcntl.fcntl, binary, fcntl.F_SETLEASE, fcntl.F_RDLCK)
folder = os.open("/usr", os.O_RDONLY)
refused &= is_error(fcntl.fcntl, folder, fcntl.F_NOTIFY, 2)"""),
    make_refusal("larger pipes", """
import fcntl
read, write = os.pipe()
refused = is_error(fcntl.fcntl, write, 1031, 1 << 20)"""),
    make_refusal("typing into a terminal", """
import fcntl
fd = os.open("/dev/null", os.O_RDWR)
requests = (0x5412, 0x541C, 0x40049409, 0x40086602, 0xC0045878)
refused = all(is_error(fcntl.ioctl, fd, request, b"x" * 8) for request in requests)"""),
    make_refusal("options of a process", """
prctl = 157 if x86 else 167
options = (2, 4, 8, 22, 24, 28, 31, 35, 36, 38, 47, 54, 62, 0x59616D61)
refused = all(is_refused(prctl, option, 0, 0, 0, 0) for option in options)"""),
    make_refusal("limits of another process", """
import resource
old = resource.getrlimit(resource.RLIMIT_CPU)
refused = is_error(resource.prlimit, os.getppid(), resource.RLIMIT_CPU, (1, 1))
own = resource.prlimit(0, resource.RLIMIT_CPU) == old""", "assert refused and own"),
    make_refusal("raised limits", """
import resource
def exceed(kind): resource.setrlimit(getattr(resource, "RLIMIT_" + kind), (1 << 40, 1 << 40))
raised = []
for kind in ("AS", "NPROC", "FSIZE", "NOFILE", "CPU", "MEMLOCK", "MSGQUEUE"):
    try:
        exceed(kind)
        raised.append(kind)
    except (OSError, ValueError): pass
refused = not raised"""),
    make_refusal("priorities and affinity", """
refused = is_error(os.nice, 1) and is_error(os.sched_setaffinity, 0, {0})
refused &= is_error(os.sched_setscheduler, 0, os.SCHED_BATCH, os.sched_param(0))
refused &= is_error(os.setpriority, os.PRIO_PROCESS, 0, 5)"""),
    make_refusal("namespaces by clone", """
clone = 56 if x86 else 220
flags = (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000, 0x80)
refused = all(is_refused(clone, flag | 17, 0, 0, 0, 0) for flag in flags)"""),
    make_refusal("numbers of the x32 ABI", """
numbers = [0x40000000 | number for number in (0, 9, 39, 57, 512)]
refused = all(is_refused(number, 0, 0, 0, 0, 0, 0) for number in numbers)"""),
    make_refusal("datagrams to an address", """
import socket
left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
refused = is_error(left.sendto, b"x", "/tmp/somewhere")
left.send(b"x")
works = right.recv(9) == b"x"
refused &= is_error(socket.socketpair, socket.AF_INET)""", "assert refused and works"),
    make_refusal("descriptors in flight", """
import array, socket
left, right = socket.socketpair()
parts = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))]
refused = is_error(left.sendmsg, [b"x"], parts)
refused &= is_error(left.setsockopt, socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 30)"""),
    make_refusal("space that no limit counts", """
fd = os.open("/tmp/sparse", os.O_CREAT | os.O_RDWR)
refused = is_error(os.posix_fallocate, fd, 0, 1 << 19)
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for act in (lambda: os.ftruncate(fd, 1 << 40), lambda: os.truncate("/tmp/sparse", 1 << 30),
            lambda: os.pwrite(fd, b"x", 1 << 30)):
    try:
        act()
        refused = False
    except OSError as error: refused &= error.errno == errno.EFBIG"""),
    make_refusal("processes outside the jail", """
import signal
def reaches(pid):
    try: os.kill(pid, 0)
    except ProcessLookupError: return False
    return True
own = {os.getpid(), os.getppid(), os.getpgrp(), 1}
others = [pid for pid in range(1, 40000) if pid not in own and reaches(pid)]
refused = len(others) <= 1"""),
    Refusal(name="calls of 32-bit programs", reason="killed by SIG", source=_CALL + """
if not x86: os.kill(os.getpid(), 31)
code = bytes([0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3])  # mov eax, 20 (getpid); int 0x80; ret
page = libc.mmap(None, 4096, 7, 0x22, -1, 0)
ctypes.memmove(page, code, len(code))
ctypes.CFUNCTYPE(ctypes.c_int)(page)()"""),
    Refusal(name="memory in page tables", reason="used more than 1024 MiB of memory",
            source=_CALL + """
import time
fixed = 0x10 | 0x22
for _ in range(4):
    if os.fork() == 0:  # one page in each GiB: two pages of tables for each
        for at in range(60000):
            libc.mmap((1 << 44) + (at << 30), 4096, 1, fixed, -1, 0)
            try: ctypes.string_at((1 << 44) + (at << 30), 1)
            except Exception: pass
        time.sleep(99)
time.sleep(99)"""),
)  # fmt: skip
"""Programs whose `refused` must be true, and programs that must be stopped."""
