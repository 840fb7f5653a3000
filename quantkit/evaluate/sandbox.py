"""Run generated Python programs where they cannot do harm, or say why they cannot be run.

The ladder is bubblewrap, then a jail of Linux namespaces made with util-linux, then nothing: without a jail no
generated program is run. Each program gets a jail of its own: no network, no file of the host but a read-only /usr,
an empty environment, no capabilities, a private 16 MiB /tmp, and limits on processor time, memory, processes and
file size. Run as root, it first becomes `nobody`, because the kernel does not limit root's processes. The jail has no
/proc: no program of a benchmark needs it, and many containers do not allow a second one.

What it is not: there is no system-call filter, and programs share the host's kernel.
"""

from __future__ import annotations

import inspect
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Literal

from quantkit.errors import EvaluationError
from quantkit.evaluate import jail

Kind = Literal["bubblewrap", "namespaces"]

AT_ONCE = 2  # jails in flight
MEMORY_BYTES = 1 << 30
PROCESSES = 16
FILE_BYTES = 1 << 20
SCRATCH_BYTES = 16 << 20
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
"""
_PROBE_TESTS = """
assert refused(lambda: open("/usr/quantkit-probe", "w")), "/usr is writable"
assert refused(lambda: socket.create_connection(("192.0.2.1", 9), timeout=0.2)), "the network is reachable"
assert set(os.environ) <= {"PATH", "HOME", "LANG", "LC_CTYPE", "PWD"}, "the environment leaks in"
assert not os.path.exists("/home") and not os.path.exists("/root"), "the host's files are visible"
"""

_JAIL_SCRIPT = """set -eu
mount -t tmpfs -o size={scratch},mode=755,nosuid,nodev tmpfs /tmp
cd /tmp
mkdir dev tmp
chmod 1777 tmp
{binds}
for device in null zero urandom; do : >dev/$device; mount --bind /dev/$device dev/$device; done
exec chroot . {setpriv} --no-new-privs --inh-caps=-all --bounding-set=-all \
 /usr/bin/env -i PATH=/usr/bin:/bin HOME=/tmp LANG=C.UTF-8 {python} -I -S -c "$1"
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """One generated program and the tests that decide on it, which run in the program's own module."""

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


def probe(search: str | None = None, kinds: Sequence[Kind] = ("bubblewrap", "namespaces")) -> Sandbox:
    """The best sandbox that really works here, found by running a program that tries to get out.

    `search` is the PATH on which the tools are looked for (default: the process's own, then the system's folders);
    `kinds` are tried in their order.
    """
    path = search if search is not None else os.environ.get("PATH", "") + ":" + SYSTEM_PATH
    reasons = []
    for kind in kinds:
        for python in _interpreters():
            command = _bubblewrap(path, python) if kind == "bubblewrap" else _namespaces(path, python)
            if isinstance(command, str):
                reasons.append(f"{kind}: {command}")
                break
            sandbox = Sandbox(kind=kind, command=command)
            report, complaint = _start(sandbox, Program(source=_PROBE, tests=_PROBE_TESTS), 2)
            version = report.get("python")
            if isinstance(version, str):
                return replace(sandbox, python=version)
            reasons.append(f"{kind} with {python}: {report.get('error') or complaint}")
    return Sandbox(kind="none", reason="; ".join(reasons) or "no Python interpreter that a jail could hold")


def run_programs(programs: Sequence[Program], sandbox: Sandbox, seconds: int = 10) -> list[Outcome]:
    """Run each program in a jail of its own, two at a time, and judge it by its tests.

    `seconds` bounds the processor time of one program; wall time is bounded by three times that and 5 s, so that a
    busy machine does not change a score. EvaluationError when the sandbox is "none".
    """
    if sandbox.kind == "none":
        raise EvaluationError(f"sandbox: generated programs cannot be run safely on this machine ({sandbox.reason})")
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
    """What the jail reported, and what was written to its standard error or why it was stopped.

    A report that claims a pass without this run's sentinel comes back empty. Output goes to files and not to pipes:
    the file size limit then bounds what a program can make the host keep.
    """
    sentinel = secrets.token_hex(16)
    frames = _frames(program, sentinel, seconds)
    command = (*sandbox.command, inspect.getsource(jail))
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        started = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=errors, env={"PATH": SYSTEM_PATH}, cwd="/",
            start_new_session=True,
        )  # fmt: skip
        complaint = ""
        try:
            started.communicate(frames, timeout=3 * seconds + 5)
        except subprocess.TimeoutExpired:
            complaint = f"ran longer than {3 * seconds + 5} s"
        finally:
            _kill(started)
        report = _report(output)
        complaint = complaint or _text(errors).strip().replace("\n", "; ")[-300:]
    if "sentinel" in report and report["sentinel"] != sentinel:
        return {}, complaint
    return report, complaint


def _frames(program: Program, sentinel: str, seconds: int) -> bytes:
    job = {
        "source": program.source, "cpu_seconds": seconds, "memory_bytes": MEMORY_BYTES, "processes": PROCESSES,
        "file_bytes": FILE_BYTES,
    }  # fmt: skip
    texts = [json.dumps(frame).encode() for frame in (job, {"tests": program.tests, "sentinel": sentinel})]
    return b"".join(f"{len(text):0{jail.PREFIX_BYTES}d}".encode() + text for text in texts)


def _kill(started: subprocess.Popen[bytes]) -> None:
    """End the jail and whatever is left of it: its first process dies with the one that started it."""
    with suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGKILL)
    started.wait()


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(FILE_BYTES).decode("utf-8", "replace")


def _report(output: IO[bytes]) -> dict[str, str]:
    try:
        report = json.loads(_text(output))
    except ValueError:  # nothing, half a line, or whatever a program wrote
        return {}
    return {str(key): str(value) for key, value in report.items()} if isinstance(report, dict) else {}


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
    for device in ("/dev/null", "/dev/zero", "/dev/urandom"):  # --dev would bring a /dev/shm without a size limit
        binds += ["--dev-bind", device, device]
    return (
        *prefix, program, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv",
        "--setenv", "PATH", "/usr/bin:/bin", "--setenv", "HOME", "/tmp", "--setenv", "LANG", "C.UTF-8", *binds,
        "--size", str(SCRATCH_BYTES), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp",
        python, "-I", "-S", "-c",
    )  # fmt: skip


def _namespaces(path: str, python: str) -> tuple[str, ...] | str:
    """The command that starts a jail of namespaces, or why there is none."""
    tools = {name: shutil.which(name, path=path) for name in ("unshare", "mount", "chroot", "setpriv", "sh")}
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
        binds.append(link if target else f"mkdir .{name}; mount --rbind -o ro,nosuid,nodev {name} .{name}")
    script = _JAIL_SCRIPT.format(scratch=SCRATCH_BYTES, binds="\n".join(binds), setpriv=tools["setpriv"], python=python)
    return (
        *prefix, str(tools["unshare"]), "--user", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--ipc",
        "--uts", "--kill-child", "--", str(tools["sh"]), "-c", script, "jail",
    )  # fmt: skip
