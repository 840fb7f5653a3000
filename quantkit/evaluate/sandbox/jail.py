"""Start the two jails of one program, watch them, and read their reports."""

from __future__ import annotations

import inspect
import json
import os
import platform
import secrets
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO

from quantkit.evaluate.sandbox import cgroup, limits, runner, seccomp, syscalls
from quantkit.evaluate.sandbox.commands import SYSTEM_PATH
from quantkit.io.seccomp import FIRST_YOUNG_NUMBER, SECCOMP_CALL


def run_in_jails(
    command: Sequence[str], source: str, tests: str, seconds: int, group_parent: Path | None = None
) -> tuple[dict[str, str], str]:
    """Run a program and its tests; return the report of the tests' jail, and a complaint.

    group_parent: where each jail gets a memory group (cgroup.py); without one its memory is polled.

    The complaint says why a jail was stopped, or what either jail wrote to standard error. A report
    that claims a pass without this run's sentinel is returned empty. Reports go to files, not to
    pipes: the file size limit then bounds the bytes on the host.
    """
    sentinel = secrets.token_hex(16)
    jail_limits = describe_limits(seconds)
    jobs = {
        "program": jail_limits,
        "tests": {**jail_limits, "source": source, "tests": tests, "sentinel": sentinel},
    }
    with ExitStack() as stack:
        ends = dict(zip(jobs, socket.socketpair(), strict=True))
        jails = {}
        for role, job in jobs.items():
            group = None
            if group_parent is not None:
                group = stack.enter_context(cgroup.make_group(group_parent))
            jails[role] = stack.enter_context(Jail(command, role, job, ends[role], group))
            ends[role].close()
        complaint = _wait_for_tests(jails["tests"], jails["program"], 3 * seconds + 5)
        report = _read_report(jails["tests"].output)
        if "gone" in report and not complaint:  # the program's own jail knows why
            jails["program"].wait_briefly()
        program_report = _read_report(jails["program"].output)
        if "gone" in report and not complaint:
            report = {"error": program_report.get("error", report["gone"])}
        errors = (
            _read_text(jails[role].errors).strip().replace("\n", "; ")[-300:] for role in jobs
        )
        complaint = complaint or next(filter(None, errors), "")
    if "sentinel" in report and report["sentinel"] != sentinel:
        return {}, complaint
    if "refused" in program_report and "python" not in report:
        report["refused"] = program_report["refused"]
    return report, complaint


class Jail:
    """One running jail: started on construction; everything in it is killed on exit."""

    def __init__(
        self,
        command: Sequence[str],
        role: str,
        job: dict[str, object],
        channel: socket.socket,
        group: Path | None,
    ) -> None:
        self._group = group
        if group is not None:
            command = cgroup.enter_group(group, command)
        # see __exit__
        self.output, self.errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        with tempfile.TemporaryFile() as job_file:
            job_file.write(json.dumps(job).encode())
            job_file.seek(0)
            self._process = subprocess.Popen(
                (*command, inspect.getsource(runner), role, str(channel.fileno())),
                stdin=job_file,
                stdout=self.output,
                stderr=self.errors,
                env={"PATH": SYSTEM_PATH},
                cwd="/",
                start_new_session=True,
                pass_fds=(channel.fileno(),),
            )

    def __enter__(self) -> Jail:
        return self

    def __exit__(self, *exception: object) -> None:
        """Kill the jail: its first process dies with its parent, all others with the first."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.output.close()
        self.errors.close()

    @property
    def pid(self) -> int:
        """Process id of the process that started the jail."""
        return self._process.pid

    def find_exceeded_limit(self) -> str:
        """Return the limit that the jail exceeds, in words; empty if there is none."""
        return limits.find_exceeded_limit(self.pid, is_memory_polled=self._group is None)

    def has_exceeded_memory(self) -> bool:
        """Return whether the kernel killed the jail for the memory of its group."""
        return self._group is not None and cgroup.was_exceeded(self._group)

    def wait_briefly(self) -> None:
        """Wait up to a second, for a jail whose program is gone to report why."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)


def _wait_for_tests(tests: Jail, program: Jail, seconds: float) -> str:
    """Wait until the tests end; return why the wait was given up, or an empty text."""
    deadline = time.monotonic() + seconds
    end_fd, poll = os.pidfd_open(tests.pid), select.poll()
    poll.register(end_fd, select.POLLIN)
    try:
        while not poll.poll(1000 * limits.POLL_SECONDS):
            if time.monotonic() > deadline:
                return f"ran longer than {seconds:.0f} s"
            for jail in (program, tests):
                if exceeded := jail.find_exceeded_limit():
                    return exceeded
        is_exceeded = program.has_exceeded_memory() or tests.has_exceeded_memory()
        return limits.describe_exceeded_memory() if is_exceeded else ""
    finally:
        os.close(end_fd)


def describe_limits(seconds: int) -> dict[str, object]:
    """Return the limits and the filters that runner.set_limits and install_* apply."""
    machine = platform.machine()
    return {
        "cpu_seconds": seconds,
        "AS": limits.MEMORY_BYTES,
        "NPROC": limits.PROCESSES,
        "FSIZE": limits.FILE_BYTES,
        "NOFILE": limits.DESCRIPTORS,
        "CORE": 0,
        "MSGQUEUE": 0,
        "MEMLOCK": 0,
        "SIGPENDING": 128,
        "filter": seccomp.build_filter(machine).hex(),
        "reporting_filter": seccomp.build_filter(machine, report=True).hex(),
        "seccomp_call": SECCOMP_CALL[machine],
        "first_young": FIRST_YOUNG_NUMBER,
        "names": syscalls.name_refused_calls(machine),
    }


def _read_text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(limits.FILE_BYTES).decode("utf-8", "replace")


def _read_report(output: IO[bytes]) -> dict[str, str]:
    """Return the lines of a report as one; none if one of them is not of a report."""
    report: dict[str, str] = {}
    for line in _read_text(output).splitlines():
        try:
            values = json.loads(line)
        except ValueError:  # half a line, or any bytes of a program
            return {}
        if not isinstance(values, dict):
            return {}
        report |= {str(key): str(value) for key, value in values.items()}
    return report
