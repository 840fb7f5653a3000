"""One process at a time: a lock that the kernel drops with its holder, and a file that says who holds it.

Some shared file systems know no locks; there the holder named in the file counts as alive unless it ran on this
machine and is gone.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from quantkit.errors import UsageError
from quantkit.io.files import make_write_error

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_OWNER_BYTES = 4096


@contextmanager
def hold_lock(
    path: Path, what: str = "build", instead: str = "another output.path"
) -> Iterator[None]:
    """Hold the lock file `path`, which is removed afterwards; UsageError naming the holder when somebody else does.

    `what` is at work under the lock, and `instead` may be chosen. A file that a killed process left behind is taken
    over. Raises QuantkitError when it cannot be written.
    """
    descriptor = _taken(path, what, instead)
    try:
        yield
    finally:
        with suppress(
            OSError
        ):  # one that stays says nothing: it is taken over, and what was done under it is done
            path.unlink()  # before the lock goes: whoever opened this file finds that it has no name
        os.close(descriptor)


def _taken(path: Path, what: str, instead: str) -> int:
    while True:
        try:
            with suppress(
                FileExistsError
            ):  # a file where the folder should be is told by the next line
                path.parent.mkdir(parents=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as fault:
            raise make_write_error(path.with_suffix(""), fault) from fault
        try:
            _take(path, descriptor, what, instead)
            _check_ours(path, descriptor)
            if _names(path, descriptor):
                text = json.dumps(_me()).encode()
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, text, 0)
                return descriptor
        except OSError as fault:
            os.close(descriptor)
            raise make_write_error(path.with_suffix(""), fault) from fault
        except UsageError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it meanwhile


def _take(path: Path, descriptor: int, what: str, instead: str) -> None:
    """Lock the file or raise UsageError."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    except BlockingIOError:
        pass
    except OSError as fault:
        if fault.errno not in _NO_LOCKS:
            raise
        if not _alive(_owner(descriptor)):
            return
    owner = _owner(descriptor)
    who = (
        f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}"
        if owner
        else "a process"
    )
    raise UsageError(
        f"{path.with_suffix('')}: expected to be the only {what} here, found another at work ({who}); wait for it, "
        f"stop it, or choose {instead}"
    )


def _check_ours(path: Path, descriptor: int) -> None:
    """UsageError for a file with something in it that no holder wrote."""
    if os.pread(descriptor, _OWNER_BYTES, 0).strip(b"\0") and "pid" not in _owner(descriptor):
        raise UsageError(
            f"{path}: expected a file that says who is at work, found another; move it away"
        )


def _names(path: Path, descriptor: int) -> bool:
    """Whether the open file still has its name."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(descriptor)
    return (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino)


def _me() -> dict[str, object]:
    """Host, process and when it started; the kernel's own count of that tells a process from a later one."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "ticks": _ticks(os.getpid()),
        "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    }


def _owner(descriptor: int) -> dict[str, object]:
    """Who wrote the file; nothing for a file that is empty, torn or another."""
    try:
        found = json.loads(os.pread(descriptor, _OWNER_BYTES, 0))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _alive(owner: dict[str, object]) -> bool:
    """Whether the process that wrote a lock file may still run."""
    if owner.get("host") != socket.gethostname():
        return bool(owner)
    pid = owner.get("pid")
    return isinstance(pid, int) and _ticks(pid) is not None and _ticks(pid) == owner.get("ticks")


def _ticks(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since boot; None for one that does not run."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])
