"""Run generated Python programs where they cannot do harm, or say why they cannot be run.

The ladder is bubblewrap, then a jail of Linux namespaces made with util-linux, then nothing: without a jail no
generated program is run. Each program gets a jail of its own: no network, no file of the host but a read-only /usr,
an empty environment, no capabilities, a private 16 MiB /tmp, a system-call filter (syscalls.py), limits on processor
time, memory, processes, descriptors and file size, and limits over the whole jail (watch.py). Run as root, it first
becomes `nobody`, because the kernel does not limit root's processes. The jail has no /proc: no program of a benchmark
needs it, and many containers do not allow a second one.

Its tests run in a second jail, and only that one is given the sentinel that makes a pass (jail.py). Arguments and
results are copied between the two as plain data: changes that a program makes to its arguments are not seen by its
tests, and an object of a class of its own equals nothing but itself.

What it is not: programs share the host's kernel, and without privileges memory and files of a whole jail are looked
at every 50 ms, so that they may pass their limits for as long.
"""

from __future__ import annotations

import inspect
import json
import os
import platform
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Literal

from quantkit.errors import EvaluationError
from quantkit.evaluate.sandbox import limits as watch
from quantkit.evaluate.sandbox import runner, seccomp

Kind = Literal["bubblewrap", "namespaces"]

AT_ONCE = 2  # programs in flight
MEMORY_BYTES = 1 << 30  # of a process's address space, and of all memory of a jail
PROCESSES = 16
DESCRIPTORS = 64
FILE_BYTES = 1 << 20
SCRATCH_BYTES = 16 << 20
SCRATCH_FILES = 4096
NOBODY = 65534
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_PROBE = """
import os, socket
def refused(action):
    try:
        action()
    except OSError:
        return True
    return False
usr = refused(lambda: open("/usr/quantkit-probe", "w"))
network = refused(lambda: socket.create_connection(("192.0.2.1", 9), timeout=0.2))
environment = set(os.environ) <= {"PATH", "HOME", "LANG", "LC_CTYPE", "PWD"}
hidden = not os.path.exists("/home") and not os.path.exists("/root")
"""
_PROBE_TESTS = """
assert usr, "/usr is writable"
assert network, "the network is reachable"
assert environment, "the environment leaks in"
assert hidden, "the host's files are visible"
"""

_JAIL_SCRIPT = """set -eu
mount -t tmpfs -o size={scratch},nr_inodes={files},mode=755,nosuid,nodev tmpfs /tmp
cd /tmp
mkdir dev tmp
chmod 1777 tmp
{binds}
for device in null zero urandom; do : >dev/$device; mount --bind /dev/$device dev/$device; done
exec chroot . {setpriv} --no-new-privs --inh-caps=-all --bounding-set=-all \
 /usr/bin/env -i PATH=/usr/bin:/bin HOME=/tmp LANG=C.UTF-8 {python} -I -S -c "$@"
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """One generated program and the tests that decide on it, which find the program's names as if in its module."""

    source: str
    tests: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Whether all tests passed; `reason` is "passed" or one phrase why not."""

    passed: bool
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Sandbox:
    """How programs are confined: `command` starts a jail, to which the text of jail.py is appended.

    kind "none" means that no jail works here, and `reason` says why; `python` is the version of the interpreter
    inside the jail, which is the host's and not necessarily the one that runs quantkit.
    """

    kind: Kind | Literal["none"]
    python: str = ""
    reason: str = ""
    command: tuple[str, ...] = ()


def probe(
    search: str | None = None, kinds: Sequence[Kind] = ("bubblewrap", "namespaces")
) -> Sandbox:
    """The best sandbox that really works here, found by running a program that tries to get out.

    `search` is the PATH on which the tools are looked for (default: the process's own, then the system's folders);
    `kinds` are tried in their order.
    """
    if platform.machine() not in seccomp.AUDIT_ARCHES:
        return Sandbox(kind="none", reason=f"no system-call filter for {platform.machine()}")
    if lack := watch.find_missing_support():
        return Sandbox(kind="none", reason=lack)
    path = search if search is not None else os.environ.get("PATH", "") + ":" + SYSTEM_PATH
    reasons = []
    for kind in kinds:
        for python in _interpreters():
            command = (
                _bubblewrap(path, python) if kind == "bubblewrap" else _namespaces(path, python)
            )
            if isinstance(command, str):
                reasons.append(f"{kind}: {command}")
                break
            sandbox = Sandbox(kind=kind, command=command)
            report, complaint = _start(sandbox, Program(source=_PROBE, tests=_PROBE_TESTS), 2)
            version = report.get("python")
            if isinstance(version, str):
                return replace(sandbox, python=version)
            reasons.append(f"{kind} with {python}: {report.get('error') or complaint}")
    return Sandbox(
        kind="none", reason="; ".join(reasons) or "no Python interpreter that a jail could hold"
    )


def run_programs(programs: Sequence[Program], sandbox: Sandbox, seconds: int = 10) -> list[Outcome]:
    """Run each program in a jail of its own, two at a time, and judge it by its tests.

    `seconds` bounds the processor time of one program; wall time is bounded by three times that and 5 s, so that a
    busy machine does not change a score. EvaluationError when the sandbox is "none".
    """
    if sandbox.kind == "none":
        raise EvaluationError(
            f"sandbox: generated programs cannot be run safely on this machine ({sandbox.reason})"
        )
    with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        return list(pool.map(lambda program: _judge(program, sandbox, seconds), programs))


def _judge(program: Program, sandbox: Sandbox, seconds: int) -> Outcome:
    """An exit code proves nothing (sys.exit(0) has a good one): only a report with the sentinel is a pass."""
    report, complaint = _start(sandbox, program, seconds)
    if "python" in report:
        return Outcome(passed=True, reason="passed")
    error = report.get("error", "") or complaint
    if error == "killed by SIGXCPU":
        error = f"used more than {seconds} s of processor time"
    return Outcome(passed=False, reason=error or "ended before its tests finished")


def _start(sandbox: Sandbox, program: Program, seconds: int) -> tuple[dict[str, str], str]:
    """What the tests' jail reported, and why the program's was stopped or what either wrote to its standard error.

    A report that claims a pass without this run's sentinel comes back empty. Reports go to files and not to pipes:
    the file size limit then bounds what the host keeps.
    """
    sentinel = secrets.token_hex(16)
    limits = _limits(seconds)
    jobs = {
        "program": limits,
        "tests": {**limits, "source": program.source, "tests": program.tests, "sentinel": sentinel},
    }
    with ExitStack() as stack:
        ends = dict(zip(jobs, socket.socketpair(), strict=True))
        running = {}
        for role, job in jobs.items():
            running[role] = stack.enter_context(_Jail(sandbox, role, job, ends[role]))
            ends[role].close()
        complaint = _wait(running["tests"], running["program"], 3 * seconds + 5)
        report = _report(running["tests"].output)
        if "gone" in report and not complaint:  # the program's own jail knows why
            running["program"].settle()
            report = {"error": _report(running["program"].output).get("error", report["gone"])}
        errors = (_text(running[role].errors).strip().replace("\n", "; ")[-300:] for role in jobs)
        complaint = complaint or next(filter(None, errors), "")
    if "sentinel" in report and report["sentinel"] != sentinel:
        return {}, complaint
    return report, complaint


class _Jail:
    """One jail at work: started on entry, with everything in it ended on exit."""

    def __init__(
        self, sandbox: Sandbox, role: str, job: dict[str, str | int], channel: socket.socket
    ) -> None:
        self.output, self.errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  # see __exit__
        with tempfile.TemporaryFile() as given:
            given.write(json.dumps(job).encode())
            given.seek(0)
            self._started = subprocess.Popen(
                (*sandbox.command, inspect.getsource(runner), role, str(channel.fileno())), stdin=given,
                stdout=self.output, stderr=self.errors, env={"PATH": SYSTEM_PATH}, cwd="/", start_new_session=True,
                pass_fds=(channel.fileno(),),
            )  # fmt: skip

    def __enter__(self) -> _Jail:
        return self

    def __exit__(self, *raised: object) -> None:
        """Its first process dies with the one that started it, and all others with its first."""
        with suppress(ProcessLookupError):
            os.killpg(self._started.pid, signal.SIGKILL)
        self._started.wait()
        self.output.close()
        self.errors.close()

    @property
    def pid(self) -> int:
        """Of the process that started the jail."""
        return self._started.pid

    def settle(self) -> None:
        """Give a jail whose program has gone a moment to report why."""
        with suppress(subprocess.TimeoutExpired):
            self._started.wait(timeout=1)


def _wait(tests: _Jail, program: _Jail, seconds: float) -> str:
    """Until the tests have ended; why they were not waited for, or an empty text."""
    until = time.monotonic() + seconds
    ended, waiting = os.pidfd_open(tests.pid), select.poll()
    waiting.register(ended, select.POLLIN)
    try:
        while not waiting.poll(1000 * watch.POLL_SECONDS):
            if time.monotonic() > until:
                return f"ran longer than {seconds:.0f} s"
            for watched in (program, tests):
                fault = watch.find_exceeded_limit(
                    watched.pid, MEMORY_BYTES, SCRATCH_BYTES, SCRATCH_FILES
                )
                if fault:
                    return fault
        return ""
    finally:
        os.close(ended)


def _limits(seconds: int) -> dict[str, str | int]:
    """What jail.limit and jail.refuse set."""
    return {
        "cpu_seconds": seconds, "AS": MEMORY_BYTES, "NPROC": PROCESSES, "FSIZE": FILE_BYTES, "NOFILE": DESCRIPTORS,
        "CORE": 0, "MSGQUEUE": 0, "MEMLOCK": 0, "SIGPENDING": 128, "filter": seccomp.build_filter(platform.machine()).hex(),
    }  # fmt: skip


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(FILE_BYTES).decode("utf-8", "replace")


def _report(output: IO[bytes]) -> dict[str, str]:
    try:
        report = json.loads(_text(output))
    except ValueError:  # nothing, half a line, or whatever a program wrote
        return {}
    return (
        {str(key): str(value) for key, value in report.items()} if isinstance(report, dict) else {}
    )


def _interpreters() -> list[str]:
    """Interpreters to try: the system's, which lies under /usr, then the one quantkit's environment is made from."""
    own = str(Path(sys.base_prefix) / "bin" / "python3")
    return [python for python in dict.fromkeys(("/usr/bin/python3", own)) if Path(python).exists()]


def _folders(python: str) -> list[str]:
    """Folders of the host that an interpreter needs, besides the links to them at the root."""
    return ["/usr"] if python.startswith("/usr/") else ["/usr", sys.base_prefix]


def _root_links() -> dict[str, str | None]:
    """/bin, /lib, ... -> the target of the link they are on a merged-/usr system, None for a real folder."""
    paths = [Path(name) for name in ("/bin", "/sbin", "/lib", "/lib64") if Path(name).exists()]
    return {str(path): os.readlink(path) if path.is_symlink() else None for path in paths}


def _unprivileged(path: str) -> list[str] | str:
    """What to put before a jail's command so that it does not run as root, or why that is impossible."""
    if os.geteuid() != 0:
        return []
    setpriv = shutil.which("setpriv", path=path)
    if setpriv is None:
        return "setpriv is missing, and a jail started by root would not limit processes"
    return [setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]


def _bubblewrap(path: str, python: str) -> tuple[str, ...] | str:
    """The command that starts a bubblewrap jail, or why there is none."""
    program, prefix = shutil.which("bwrap", path=path), _unprivileged(path)
    if program is None:
        return "bwrap is not installed"
    if isinstance(prefix, str):
        return prefix
    binds = [part for folder in _folders(python) for part in ("--ro-bind", folder, folder)]
    for name, target in _root_links().items():
        binds += ["--symlink", target, name] if target else ["--ro-bind", name, name]
    for device in (
        "/dev/null",
        "/dev/zero",
        "/dev/urandom",
    ):  # --dev would bring a /dev/shm without a size limit
        binds += ["--dev-bind", device, device]
    return (
        *prefix, program, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv",
        "--setenv", "PATH", "/usr/bin:/bin", "--setenv", "HOME", "/tmp", "--setenv", "LANG", "C.UTF-8", *binds,
        "--size", str(SCRATCH_BYTES), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp",
        python, "-I", "-S", "-c",
    )  # fmt: skip


def _namespaces(path: str, python: str) -> tuple[str, ...] | str:
    """The command that starts a jail of namespaces, or why there is none."""
    tools = {
        name: shutil.which(name, path=path)
        for name in ("unshare", "mount", "chroot", "setpriv", "sh")
    }
    missing = [name for name, found in tools.items() if found is None]
    prefix = _unprivileged(path)
    if missing:
        return f"{', '.join(missing)} not found (util-linux and coreutils have them)"
    if isinstance(prefix, str):
        return prefix
    binds = []
    for folder in _folders(python):
        binds.append(f"mkdir -p .{folder}; mount --rbind -o ro,nosuid,nodev {folder} .{folder}")
    for name, target in _root_links().items():
        link = f"ln -s {target} .{name}"
        binds.append(
            link if target else f"mkdir .{name}; mount --rbind -o ro,nosuid,nodev {name} .{name}"
        )
    script = _JAIL_SCRIPT.format(
        scratch=SCRATCH_BYTES,
        files=SCRATCH_FILES,
        binds="\n".join(binds),
        setpriv=tools["setpriv"],
        python=python,
    )
    return (
        *prefix, str(tools["unshare"]), "--user", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--ipc",
        "--uts", "--kill-child", "--", str(tools["sh"]), "-c", script, "jail",
    )  # fmt: skip
