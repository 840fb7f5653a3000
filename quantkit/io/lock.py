"""Exclusive locks between processes: `filelock.FileLock`, with the holder named in the lock file.

filelock opens the file (no links followed), locks it with flock(2), which the kernel drops when the
holder ends, and retries when the holder removed the file meanwhile. Three things are missing there
and stay here: the holder's host, pid and start time for the error message; refusing a file that no
holder wrote, instead of locking it; and shared file systems without flock (ENOLCK, EOPNOTSUPP). On
those, the holder named in the file counts as alive unless it ran on this machine and is gone;
filelock has a fallback for ENOSYS only.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from quantkit.errors import UsageError
from quantkit.io.files import make_write_error

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_HOLDER_BYTES = 4096
_RETRY_SECONDS = 0.1  # a holder that is just ending removes the file between our open and our flock


@contextmanager
def hold_lock(
    path: Path,
    what: str = "build",
    instead: str = "another output.path",
    seconds: float = _RETRY_SECONDS,
) -> Iterator[None]:
    """Hold the lock file `path`, then remove it; a file that a killed process left is taken over.

    what, instead: the job under the lock and its alternative, for the message. seconds: time to
    wait for another holder. Raises UsageError that names the holder if another process holds the
    lock, QuantkitError if the file cannot be written.
    """
    try:
        lock = _acquire(path, what, instead, seconds)
    except OSError as fault:
        raise make_write_error(path.with_suffix(""), fault) from fault
    try:
        yield
    finally:
        with suppress(OSError):  # a file that stays is harmless: the next holder takes it over
            path.unlink()  # before the release: a process that has opened the file then retries
        lock.release()


def _acquire(path: Path, what: str, instead: str, seconds: float) -> FileLock:
    if path.parent.exists() and not path.parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    lock = FileLock(
        path,
        timeout=seconds,
        thread_local=False,
        fallback_to_soft=False,
        on_acquired=partial(_write_holder, path),
    )
    try:
        lock.acquire()
    except Timeout:
        with _open(path) as descriptor:
            raise _make_busy_error(path, what, instead, _read_holder(descriptor)) from None
    except OSError as fault:
        if fault.errno not in _NO_LOCKS:
            raise
        with _open(path) as descriptor:
            if _is_running(holder := _read_holder(descriptor)):
                raise _make_busy_error(path, what, instead, holder) from None
            _write_holder(path, descriptor)
    return lock


@contextmanager
def _open(path: Path) -> Iterator[int]:
    """Open a lock file as filelock does: no link is followed, a pipe does not block."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _make_busy_error(path: Path, what: str, instead: str, holder: dict[str, object]) -> UsageError:
    process = "a process"
    if holder:
        process = (
            f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
        )
    return UsageError(
        f"{path.with_suffix('')}: expected to be the only {what} here, found another at work "
        f"({process}); wait for it, stop it, or choose {instead}"
    )


def _write_holder(path: Path, descriptor: int) -> None:
    """Record this process in its lock file; raises UsageError if the content is not a holder's."""
    content = os.pread(descriptor, _HOLDER_BYTES, 0).strip(b"\0")
    if content and "pid" not in _read_holder(descriptor):
        raise UsageError(
            f"{path}: expected a lock file that names its holder, found another file; move it away"
        )
    holder = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "ticks": _read_start_ticks(os.getpid()),  # distinguishes a later process with this pid
        "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _read_holder(descriptor: int) -> dict[str, object]:
    """Return the process that wrote the file; an empty dict for an empty, torn or foreign file."""
    try:
        holder = json.loads(os.pread(descriptor, _HOLDER_BYTES, 0))
    except (ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_running(holder: dict[str, object]) -> bool:
    """Return whether the process that wrote a lock file may still run."""
    if holder.get("host") != socket.gethostname():
        return bool(holder)
    pid = holder.get("pid")
    ticks = _read_start_ticks(pid) if isinstance(pid, int) else None
    return ticks is not None and ticks == holder.get("ticks")


def _read_start_ticks(pid: int) -> int | None:
    """Return the start of a local process in clock ticks since boot; None if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])
