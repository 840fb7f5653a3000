"""Shared by publish and pull: progress, parallel transfers, and the file list of a manifest."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from quantkit.artifact.layout import MANIFEST
from quantkit.errors import TransferError
from quantkit.io.files import shorten_repr
from quantkit.io.path_safety import find_name_faults
from quantkit.io.retry import Cancelled
from quantkit.progress import Progress, ProgressCallback
from quantkit.publish.staging_dir import ExpectedFile

_SECONDS_BETWEEN = 0.1
_LEAVING_SECONDS = 2.0
"""Seconds that a failing transfer waits for its threads, which stop at their next piece."""

Work = TypeVar("Work")


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Files and bytes that a transfer moved, or would move in a dry run, and those already
    present.
    """

    location: str
    status: str
    files: tuple[str, ...]
    n_bytes: int
    n_present: int
    present_bytes: int
    manifest: str  # its sha256
    removed: tuple[str, ...] = ()

    def values(self) -> dict[str, object]:
        """Return the values for `--json`."""
        return {
            "place": self.location,
            "status": self.status,
            "manifest": self.manifest,
            "files": list(self.files),
            "bytes": self.n_bytes,
            "there": self.n_present,
            "there_bytes": self.present_bytes,
            "removed": list(self.removed),
        }


@dataclass
class TransferProgress:
    """Bytes of a transfer, reported from several threads with rate and time left."""

    stage: str
    total: int
    on_progress: ProgressCallback
    stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _done: dict[str, int] = field(default_factory=dict)
    _began: float = field(default_factory=time.monotonic)
    _next: float = 0.0  # time of the next report
    _before: int | None = None  # bytes present at the first report; they do not count for the rate

    def report_bytes(self, name: str, n_bytes: int) -> None:
        """Set the bytes of a file that have arrived; raises Cancelled if the transfer has ended."""
        if self.stop.is_set():
            raise Cancelled
        with self._lock:
            self._done[name] = n_bytes
            done = sum(self._done.values())
            if self._before is None:
                self._before = done
            now = time.monotonic()
            if now < self._next and done < self.total:
                return
            self._next = now + _SECONDS_BETWEEN
            self.on_progress(
                Progress(stage=self.stage, done=done, total=self.total, note=self._note(done))
            )

    def _note(self, done: int) -> str:
        seconds = time.monotonic() - self._began
        text = f"{format_bytes(done)} of {format_bytes(self.total)}"
        new = done - (self._before or 0)
        if seconds < 0.5 or new <= 0 or done >= self.total:
            return text
        left = int((self.total - done) * seconds / new)
        clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        return f"{text}, {format_bytes(int(new / seconds))}/s, {clock} left"


def format_bytes(n_bytes: int) -> str:
    """Format bytes with a unit."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.1f} {unit}"
    return f"{n_bytes} B"


def parse_files(values: Mapping[str, object], where: str) -> dict[str, ExpectedFile]:
    """Return the files of a manifest; raises TransferError for an invalid entry."""
    files = values.get("files")
    expected: dict[str, ExpectedFile] = {}
    for name, entry in files.items() if isinstance(files, Mapping) else ():
        sha256, n_bytes = (
            (entry.get("sha256"), entry.get("bytes"))
            if isinstance(entry, Mapping)
            else (None, None)
        )
        good = (
            isinstance(sha256, str) and len(sha256) == 64 and set(sha256) <= set("0123456789abcdef")
        )
        if not isinstance(sha256, str) or not good or type(n_bytes) is not int or n_bytes < 0:
            raise TransferError(
                f"{where}: {MANIFEST}: files: {shorten_repr(name)}: expected sha256 and bytes, "
                f"found {shorten_repr(entry)}; publish it again"
            )
        expected[name] = ExpectedFile(name=name, n_bytes=n_bytes, sha256=sha256)
    if not expected:
        raise TransferError(
            f"{where}: {MANIFEST}: files: expected the files of an artifact, found none"
        )
    return expected


def parse_unhashed(values: Mapping[str, object]) -> list[str]:
    """Return the files that a manifest names without a hash."""
    names = values.get("unhashed")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def check_file_names(names: Iterable[str], where: str) -> None:
    """Check that all names are valid inside one folder on any system; raises TransferError."""
    faults = list(find_name_faults(names))
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise TransferError(
            f"{where}: expected names that stay in the artifact's folder, found {faults[0]}{more}"
        )


@contextmanager
def note_resume() -> Iterator[None]:
    """Add a note about resuming to a KeyboardInterrupt."""
    try:
        yield
    except KeyboardInterrupt as fault:
        fault.add_note("received data is kept; run the same command to resume")
        raise


def run_in_parallel(
    items: Sequence[Work], work: Callable[[Work], None], jobs: int, stop: threading.Event
) -> None:
    """Run `work` on every item in `jobs` threads; the first failure stops the others and is raised.

    The threads are daemons, so Ctrl-C does not wait for a library in the middle of a large file.
    """
    todo, faults = queue.SimpleQueue[Work](), queue.SimpleQueue[BaseException | None]()
    for item in items:
        todo.put(item)
    threads = [
        threading.Thread(target=run_worker, args=(todo, work, stop, faults), daemon=True)
        for _ in range(min(jobs, len(items)))
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in threads:
            if (fault := faults.get()) is not None:
                raise fault
    except BaseException:
        stop.set()
        deadline = time.monotonic() + _LEAVING_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        raise


def run_worker(
    todo: queue.SimpleQueue[Work], work: Callable[[Work], None], stop: threading.Event,
    faults: queue.SimpleQueue[BaseException | None],
) -> None:  # fmt: skip
    """Process items until the queue is empty; put the exception, or None, into `faults`."""
    fault: BaseException | None = None
    try:
        while not stop.is_set():
            work(todo.get_nowait())
    except queue.Empty:
        pass
    except BaseException as raised:  # noqa: BLE001  # the waiting thread raises it
        fault = raised
    faults.put(fault)
