"""Memory groups (cgroup v2): the kernel's own limit on all memory of a jail.

A group also counts kernel memory (socket buffers, mappings, names of files), and leaves no time
between two measurements. Making one needs a group above this process that gives its children a
memory controller, and the right to move processes into them: root has it, as has a process that a
user's systemd started (`systemd-run --user --scope`). Without it, the limits of processes and the
host's measurements of the jail remain, and `Sandbox.memory` says so.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from quantkit.evaluate.sandbox.limits import MEMORY_BYTES, PROCESSES

MOUNT = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")
PREFIX = "quantkit-"
# tasks of a jail that are no program's: setpriv, bubblewrap or unshare, sh, the first process
STARTERS = 8
REMOVE_SECONDS = 2.0

_ENTER = 'echo 0 >"$0/cgroup.procs" && exec "$@"'


def find_parent(mount: Path = MOUNT, own_group: Path = OWN_GROUP) -> Path | str:
    """Return the nearest group above this process in which a jail's group can be made.

    If there is none, return the reason.
    """
    if not (mount / "cgroup.controllers").is_file():
        return "cgroup v2 is not mounted"
    lines = own_group.read_text().splitlines()
    (own,) = [line[3:] for line in lines if line.startswith("0::")] or ["/"]
    group = mount / own.lstrip("/")
    for parent in (group, *group.parents):
        if not parent.is_relative_to(mount) or not parent.is_dir():
            break
        if "memory" not in _read(parent / "cgroup.subtree_control").split():
            continue
        _remove_stale_groups(parent)
        with suppress(OSError), make_group(parent) as trial:
            if (
                subprocess.run(enter_group(trial, ("true",)), stderr=subprocess.DEVNULL).returncode
                == 0
            ):
                return parent
    return "no group above this process gives a memory controller to groups made in it"


def enter_group(group: Path, command: Sequence[str]) -> tuple[str, ...]:
    """Return a command that enters the group and becomes `command`."""
    return ("/bin/sh", "-c", _ENTER, str(group), *command)


@contextmanager
def make_group(parent: Path) -> Iterator[Path]:
    """Make a group with the limits of a jail; on exit, kill its processes and remove it.

    Raises OSError if the group cannot be made.
    """
    group = parent / f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    group.mkdir()
    try:
        (group / "memory.max").write_text(str(MEMORY_BYTES))
        for name, value in {
            "memory.swap.max": 0,  # not there without swap accounting
            "memory.oom.group": 1,  # kill a jail as a whole
            "pids.max": PROCESSES + STARTERS,  # not there without the pids controller
        }.items():
            with suppress(OSError):
                (group / name).write_text(str(value))
        yield group
    finally:
        _remove_group(group)


def was_exceeded(group: Path) -> bool:
    """Return whether the kernel killed the jail for its memory."""
    events = dict(line.split() for line in _read(group / "memory.events").splitlines())
    return events.get("oom_kill", "0") != "0"


def _remove_group(group: Path) -> None:
    """Remove a group once its processes, killed here, are gone; give up if they stay."""
    with suppress(OSError):  # cgroup.kill: Linux 5.14
        (group / "cgroup.kill").write_text("1")
    until = time.monotonic() + REMOVE_SECONDS
    while True:
        try:
            group.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > until:
                return
            time.sleep(0.005)
        else:
            return


def _remove_stale_groups(parent: Path) -> None:
    """Remove empty groups of processes that ended before they could."""
    for group in parent.glob(f"{PREFIX}*-*"):
        pid = group.name.removeprefix(PREFIX).split("-")[0]
        if not Path("/proc", pid).exists():
            with suppress(OSError):
                group.rmdir()


def _read(path: Path) -> str:
    """Return a file's text, empty if it cannot be read."""
    with suppress(OSError):
        return path.read_text()
    return ""
