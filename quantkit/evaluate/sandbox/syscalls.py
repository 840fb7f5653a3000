"""System calls that a jailed program may make.

Everything else is refused: calls older than Linux 5.1 with EPERM, younger ones with ENOSYS, which
the C library and CPython take for an older kernel and work around.

`tests/tools/syscalls` records what programs call. The reference solutions of HumanEval, MBPP and
tiny-v3-code make 16 calls; the rest are calls of the standard library for files in /tmp, threads,
subprocesses, asyncio and timers, on CPython 3.8 to 3.14 with glibc 2.31 to 2.42 or musl. Not on the
list although honest programs may use them: sockets other than a connected pair, file locks (they
would lock the host's files, which are mounted read-only), POSIX and System V shared memory and
queues, memory files, eventfd, timerfd and pidfd, named pipes, priorities and CPU affinity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantkit.io.seccomp import AUDIT_ARCHES, ArgumentRule, Numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class SyscallGroup:
    """Calls that are allowed for one reason, whatever their arguments."""

    name: str
    reason: str
    numbers: Mapping[str, Numbers]


ALLOWED_GROUPS = (
    SyscallGroup(
        name="memory",
        reason="The allocator and the dynamic loader; mmap and madvise have rules of their own.",
        numbers={
            "brk": (12, 214),
            "munmap": (11, 215),
            "mremap": (25, 216),
            "mprotect": (10, 226),
            "msync": (26, 227),
        },
    ),
    SyscallGroup(
        name="descriptors",
        reason="Files, pipes, the channel to the tests. RLIMIT_FSIZE and the tmpfs limit sizes.",
        numbers={
            "read": (0, 63),
            "write": (1, 64),
            "readv": (19, 65),
            "writev": (20, 66),
            "pread64": (17, 67),
            "pwrite64": (18, 68),
            "preadv": (295, 69),
            "pwritev": (296, 70),
            "lseek": (8, 62),
            "sendfile": (40, 71),
            "copy_file_range": (326, 285),
            "close": (3, 57),
            "close_range": (436, 436),
            "open": (2, None),
            "openat": (257, 56),
            "creat": (85, None),
            "dup": (32, 23),
            "dup2": (33, None),
            "dup3": (292, 24),
            "pipe": (22, None),
            "pipe2": (293, 59),
            "fsync": (74, 82),
            "fdatasync": (75, 83),
            "ftruncate": (77, 46),
            "truncate": (76, 45),
        },
    ),
    SyscallGroup(
        name="paths",
        reason="Changes succeed in /tmp only. shutil.copy2 lists extended attributes.",
        numbers={
            "stat": (4, None),
            "lstat": (6, None),
            "fstat": (5, 80),
            "newfstatat": (262, 79),
            "statx": (332, 291),
            "access": (21, None),
            "faccessat": (269, 48),
            "faccessat2": (439, 439),
            "readlink": (89, None),
            "readlinkat": (267, 78),
            "getcwd": (79, 17),
            "chdir": (80, 49),
            "fchdir": (81, 50),
            "getdents": (78, None),
            "getdents64": (217, 61),
            "statfs": (137, 43),
            "fstatfs": (138, 44),
            "mkdir": (83, None),
            "mkdirat": (258, 34),
            "rmdir": (84, None),
            "unlink": (87, None),
            "unlinkat": (263, 35),
            "rename": (82, None),
            "renameat": (264, 38),
            "renameat2": (316, 276),
            "link": (86, None),
            "linkat": (265, 37),
            "symlink": (88, None),
            "symlinkat": (266, 36),
            "chmod": (90, None),
            "fchmod": (91, 52),
            "fchmodat": (268, 53),
            "umask": (95, 166),
            "utimensat": (280, 88),
            "getxattr": (191, 8),
            "lgetxattr": (192, 9),
            "fgetxattr": (193, 10),
            "listxattr": (194, 11),
            "llistxattr": (195, 12),
            "flistxattr": (196, 13),
        },
    ),
    SyscallGroup(
        name="waiting",
        reason="time.sleep, selectors and asyncio.",
        numbers={
            "poll": (7, None),
            "ppoll": (271, 73),
            "select": (23, None),
            "pselect6": (270, 72),
            "epoll_create1": (291, 20),
            "epoll_ctl": (233, 21),
            "epoll_wait": (232, None),
            "epoll_pwait": (281, 22),
            "nanosleep": (35, 101),
            "clock_nanosleep": (230, 115),
            "pause": (34, None),
        },
    ),
    SyscallGroup(
        name="time",
        reason="Clocks (for kernels whose vDSO lacks them), and the timers of the signal module.",
        numbers={
            "clock_gettime": (228, 113),
            "clock_getres": (229, 114),
            "gettimeofday": (96, 169),
            "time": (201, None),
            "times": (100, 153),
            "getrusage": (98, 165),
            "alarm": (37, None),
            "setitimer": (38, 103),
            "getitimer": (36, 102),
        },
    ),
    SyscallGroup(
        name="signals",
        reason="The signal module. Only the jail's own processes are in its PID namespace.",
        numbers={
            "rt_sigaction": (13, 134),
            "rt_sigprocmask": (14, 135),
            "rt_sigreturn": (15, 139),
            "rt_sigpending": (127, 136),
            "rt_sigsuspend": (130, 133),
            "rt_sigtimedwait": (128, 137),
            "sigaltstack": (131, 132),
            "restart_syscall": (219, 128),
            "kill": (62, 129),
            "tkill": (200, 130),
            "tgkill": (234, 131),
        },
    ),
    SyscallGroup(
        name="threads",
        reason="threading; the C library registers each thread. Affinity can be read, not set.",
        numbers={
            "futex": (202, 98),
            "set_robust_list": (273, 99),
            "get_robust_list": (274, 100),
            "set_tid_address": (218, 96),
            "rseq": (334, 293),
            "sched_yield": (24, 124),
            "sched_getaffinity": (204, 123),
            "getcpu": (309, 168),
        },
    ),
    SyscallGroup(
        name="processes",
        reason="os.fork and subprocess, within RLIMIT_NPROC; clone has a rule of its own.",
        numbers={
            "fork": (57, None),
            "vfork": (58, None),
            "execve": (59, 221),
            "wait4": (61, 260),
            "waitid": (247, 95),
            "exit": (60, 93),
            "exit_group": (231, 94),
            "setsid": (112, 157),
            "setpgid": (109, 154),
        },
    ),
    SyscallGroup(
        name="identity",
        reason="Ids, limits and times of the process, and the name of the machine.",
        numbers={
            "getpid": (39, 172),
            "getppid": (110, 173),
            "gettid": (186, 178),
            "getuid": (102, 174),
            "geteuid": (107, 175),
            "getgid": (104, 176),
            "getegid": (108, 177),
            "getgroups": (115, 158),
            "getresuid": (118, 148),
            "getresgid": (120, 150),
            "getpgrp": (111, None),
            "getpgid": (121, 155),
            "getsid": (124, 156),
            "getpriority": (140, 141),
            "uname": (63, 160),
            "sysinfo": (99, 179),
            "getrlimit": (97, 163),
            "getrandom": (318, 278),
        },
    ),
    SyscallGroup(
        name="socket pairs",
        reason="asyncio wakes its loop through a pair; socketpair and sendto have own rules.",
        numbers={
            "shutdown": (48, 210),
            "recvfrom": (45, 207),
            "getsockname": (51, 204),
            "getpeername": (52, 205),
            "getsockopt": (55, 209),
        },
    ),
)

ARGUMENT_RULES = (
    ArgumentRule(
        name="mmap",
        numbers=(9, 222),
        argument=3,
        # no limit of a process counts shared memory that it does not touch, nor huge pages
        reason="MAP_HUGETLB, and MAP_SHARED together with MAP_ANONYMOUS",
        refused_bits=0x40000,
        refused_together=0x21,
    ),
    ArgumentRule(
        name="madvise",
        numbers=(28, 233),
        argument=2,
        # not MERGEABLE (pages of other processes), nor COLD and PAGEOUT (swap, page cache)
        reason="advice other than to keep, free, fork, dump or guard pages, or on huge pages",
        values=(0, 1, 2, 3, 4, 8, 10, 11, 14, 15, 16, 17, 18, 19, 102, 103),
    ),
    ArgumentRule(
        name="fcntl",
        numbers=(72, 25),
        argument=1,
        # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_GETPIPE_SZ
        reason="locks, leases, owners, notifications, seals and larger pipes",
        values=(0, 1, 2, 3, 4, 1030, 1032),
    ),
    ArgumentRule(
        name="ioctl",
        numbers=(16, 29),
        argument=1,
        # TCGETS, TCGETS2, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
        reason="requests other than isatty, terminal size, bytes to read, blocking, close-on-exec",
        values=(0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451),
    ),
    ArgumentRule(
        name="prctl",
        numbers=(157, 167),
        argument=0,
        # PR_SET_PDEATHSIG, PR_GET_DUMPABLE, PR_SET_NAME, PR_GET_NAME
        reason="options other than names and the signal on a parent's end",
        values=(1, 3, 15, 16),
    ),
    ArgumentRule(
        name="arch_prctl",
        numbers=(158, None),
        argument=0,
        # ARCH_SET_FS, ARCH_GET_FS, ARCH_CET_STATUS
        reason="options other than those of the dynamic loader",
        values=(0x1002, 0x1003, 0x3001),
    ),
    ArgumentRule(
        name="clone",
        numbers=(56, 220),
        argument=0,
        # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, NEWTIME; CLONE_PTRACE
        reason="new namespaces",
        refused_bits=0x7E022080,
    ),
    ArgumentRule(
        name="socketpair",
        numbers=(53, 199),
        argument=0,
        reason="families other than AF_UNIX",
        values=(1,),
    ),
    ArgumentRule(
        name="sendto",
        numbers=(44, 206),
        argument=5,
        reason="an address: only the other end of a pair can be reached",
        values=(0,),
    ),
    ArgumentRule(
        name="prlimit64",
        numbers=(302, 261),
        argument=0,
        reason="limits of another process",
        values=(0,),
    ),
)
"""`reason` names the refused uses."""

REFUSED_NAMES: Mapping[str, Numbers] = {
    # memory that no limit of a process counts
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "shmat": (30, 196), "remap_file_pages": (216, 234), "mlock": (149, 228),
    "mlockall": (151, 230), "userfaultfd": (323, 282), "process_madvise": (440, 440),
    # kernel objects of which the whole host has a fixed number
    "io_setup": (206, 0), "io_submit": (209, 2), "inotify_init1": (294, 26),
    "inotify_init": (253, None), "fanotify_init": (300, 262), "semget": (64, 190),
    "msgget": (68, 186), "mq_open": (240, 180), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "timer_create": (222, 107), "timerfd_create": (283, 85),
    "eventfd2": (290, 19), "signalfd4": (289, 74), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "seccomp": (317, 277),
    "landlock_create_ruleset": (444, 444), "bpf": (321, 280), "perf_event_open": (298, 241),
    # pages and files of the host
    "flock": (73, 32), "vmsplice": (278, 75), "splice": (275, 76), "tee": (276, 77),
    "fallocate": (285, 47), "fadvise64": (221, 223), "readahead": (187, 213), "sync": (162, 81),
    "syncfs": (306, 267), "setxattr": (188, 5), "mknodat": (259, 33), "fchownat": (260, 54),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "mincore": (27, 232),
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424), "rt_sigqueueinfo": (129, 138), "setpriority": (141, 140),
    "ioprio_set": (251, 30), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274), "migrate_pages": (256, 238), "move_pages": (279, 239),
    "mbind": (237, 235), "set_mempolicy": (238, 237),
    # namespaces, mounts, identity, machine
    "clone3": (435, 435), "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40),
    "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "mount_setattr": (442, 442),
    "setuid": (105, 146), "setgroups": (116, 159), "capset": (126, 91), "personality": (135, 92),
    "modify_ldt": (154, None), "iopl": (172, None), "ioperm": (173, None), "uselib": (134, None),
    "syslog": (103, 116), "acct": (163, 89), "sethostname": (170, 161), "swapon": (167, 224),
    "quotactl": (179, 60), "pkey_alloc": (330, 289), "membarrier": (324, 283),
    # sockets other than a pair
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "accept4": (288, 242), "sendmsg": (46, 211), "recvmsg": (47, 212), "setsockopt": (54, 208),
}  # fmt: skip
"""Calls that are refused, so that a verdict can name them. Others are refused by their number."""


def name_refused_calls(machine: str) -> dict[str, str]:
    """Return the names of calls that are refused, or refused for an argument, by number."""
    column = list(AUDIT_ARCHES).index(machine)
    names = {rule.name: rule.numbers for rule in ARGUMENT_RULES} | dict(REFUSED_NAMES)
    return {
        str(number): name
        for name, numbers in names.items()
        if (number := numbers[column]) is not None
    }
