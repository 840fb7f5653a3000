"""Run generated Python programs confined, or report why they cannot be run.

The kinds of sandbox, in order of preference: bubblewrap, then a jail of Linux namespaces made with
util-linux, then none: without a jail no generated program is run. Run as root, a jail first becomes
`nobody`, because the kernel does not limit root's processes. README.md lists the promises.

The tests run in a second jail, and only that one gets the sentinel that makes a pass (runner.py).
Arguments and results are copied between the two as plain data: the tests do not see changes that a
program makes to its arguments, and an object of a class of the program equals only itself.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quantkit.errors import EvaluationError
from quantkit.evaluate.sandbox import cgroup, commands, limits
from quantkit.evaluate.sandbox.jail import run_in_jails
from quantkit.io.seccomp import AUDIT_ARCHES

SandboxKind = Literal["bubblewrap", "namespaces"]

CONCURRENT_PROGRAMS = 2
PROBE_SECONDS = 10  # an emulated machine needs several

_PROBE = """
import os, socket
def is_refused(action):
    try:
        action()
    except OSError:
        return True
    return False
usr = is_refused(lambda: open("/usr/quantkit-probe", "w"))
network = is_refused(lambda: socket.create_connection(("192.0.2.1", 9), timeout=0.2))
environment = set(os.environ) <= {"PATH", "HOME", "LANG", "LC_CTYPE", "PWD"}
hidden = not os.path.exists("/home") and not os.path.exists("/root")
"""
_PROBE_TESTS = """
assert usr, "/usr is writable"
assert network, "the network is reachable"
assert environment, "the environment leaks in"
assert hidden, "the host's files are visible"
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A generated program and its tests, which use the program's names as if in its module."""

    source: str
    tests: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgramResult:
    """Whether all tests passed; `reason` is "passed" or one phrase that says why not."""

    passed: bool
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Sandbox:
    """How programs are confined. `command` starts a jail; the text of runner.py is appended to it.

    kind "none" means that no jail works on this machine, for the `reason`. `python` is the version
    of the interpreter inside the jail, which is the host's and not necessarily the one of quantkit.
    `memory` says what limits the memory of a whole jail: "cgroup v2", a group below `group_parent`,
    or "polled", with the reason.
    """

    kind: SandboxKind | Literal["none"]
    python: str = ""
    reason: str = ""
    command: tuple[str, ...] = ()
    memory: str = ""
    group_parent: Path | None = None

    def describe(self) -> dict[str, str]:
        """Return the part of a result that describes its sandbox."""
        return {
            "kind": self.kind,
            "python": self.python,
            "memory": self.memory,
            "reason": self.reason,
        }

    def summarize(self) -> str:
        """Return the parts that can change a verdict, in one line."""
        if self.kind == "none":
            return f"none: {self.reason}" if self.reason else "none"
        return f"{self.kind}, Python {self.python}, memory {self.memory}"


def probe_sandbox(
    search: str | None = None, kinds: Sequence[SandboxKind] = ("bubblewrap", "namespaces")
) -> Sandbox:
    """Return the best sandbox that works, verified by running a program that tries to get out.

    search: the PATH on which the tools are searched (default: the process's own, then the system's
    folders); kinds: tried in this order.
    """
    if platform.machine() not in AUDIT_ARCHES:
        return Sandbox(kind="none", reason=f"no system-call filter for {platform.machine()}")
    if missing := limits.find_missing_support():
        return Sandbox(kind="none", reason=missing)
    path = search if search is not None else os.environ.get("PATH", "") + ":" + commands.SYSTEM_PATH
    reasons = []
    parent = cgroup.find_parent()
    memory = f"polled: {parent}" if isinstance(parent, str) else "cgroup v2"
    group_parent = None if isinstance(parent, str) else parent
    for kind in kinds:
        for python in commands.list_interpreters():
            if kind == "bubblewrap":
                command = commands.build_bubblewrap_command(path, python)
            else:
                command = commands.build_namespaces_command(path, python)
            if isinstance(command, str):
                reasons.append(f"{kind}: {command}")
                break
            report, complaint = run_in_jails(
                command, _PROBE, _PROBE_TESTS, PROBE_SECONDS, group_parent
            )
            version = report.get("python")
            if isinstance(version, str):
                return Sandbox(
                    kind=kind,
                    command=command,
                    python=version,
                    memory=memory,
                    group_parent=group_parent,
                )
            reasons.append(f"{kind} with {python}: {report.get('error') or complaint}")
    return Sandbox(
        kind="none", reason="; ".join(reasons) or "no Python interpreter that a jail could hold"
    )


def run_programs(
    programs: Sequence[Program], sandbox: Sandbox, seconds: int = 10
) -> list[ProgramResult]:
    """Run each program in a jail of its own, two at a time, and judge it by its tests.

    `seconds` limits the processor time of one program; wall time is limited to three times that
    plus 5 s, so that a busy machine does not change a score. Raises EvaluationError if the sandbox
    is "none".
    """
    if sandbox.kind == "none":
        raise EvaluationError(
            f"sandbox: generated programs cannot be run safely on this machine ({sandbox.reason})"
        )
    with ThreadPoolExecutor(max_workers=CONCURRENT_PROGRAMS) as pool:
        return list(pool.map(lambda program: _judge_program(program, sandbox, seconds), programs))


def _judge_program(program: Program, sandbox: Sandbox, seconds: int) -> ProgramResult:
    """Judge a program.

    An exit code proves nothing (sys.exit(0)): only a report with the sentinel is a pass.
    """
    report, complaint = run_in_jails(
        sandbox.command, program.source, program.tests, seconds, sandbox.group_parent
    )
    if "python" in report:
        return ProgramResult(passed=True, reason="passed")
    error = report.get("error", "") or complaint
    if error == "killed by SIGXCPU":
        error = f"used more than {seconds} s of processor time"
    error = error or "ended before its tests finished"
    if "refused" in report:
        error += f" (refused by the sandbox: {report['refused']})"
    return ProgramResult(passed=False, reason=error)
