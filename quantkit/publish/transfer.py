"""What publishing and pulling share: progress, patience, several files at once, and what a manifest says of files."""

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
"""How long a transfer that ends waits for its threads, which notice at their next piece."""

Work = TypeVar("Work")


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What was done, or with a dry run would be done: files and bytes that move, and those that are there already."""

    place: str
    status: str
    files: tuple[str, ...]
    n_bytes: int
    there: int
    there_bytes: int
    manifest: str  # its sha256
    removed: tuple[str, ...] = ()

    def values(self) -> dict[str, object]:
        """For machines."""
        return {
            "place": self.place, "status": self.status, "manifest": self.manifest, "files": list(self.files),
            "bytes": self.n_bytes, "there": self.there, "there_bytes": self.there_bytes, "removed": list(self.removed),
        }  # fmt: skip


@dataclass
class TransferProgress:
    """Bytes of a transfer as they arrive, from several threads; told with rate and time left."""

    stage: str
    total: int
    tell: ProgressCallback
    stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _done: dict[str, int] = field(default_factory=dict)
    _began: float = field(default_factory=time.monotonic)
    _next: float = 0.0  # when it is told again
    _before: int | None = (
        None  # what was there when the first byte arrived: it came at no rate of this run
    )

    def report_bytes(self, name: str, n_bytes: int) -> None:
        """So much of a file is there; raises to end the thread when the transfer is over."""
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
            self.tell(
                Progress(stage=self.stage, done=done, total=self.total, note=self._note(done))
            )

    def _note(self, done: int) -> str:
        seconds = time.monotonic() - self._began
        text = f"{format_bytes(done)} of {format_bytes(self.total)}"
        new = done - (self._before or 0)
        if seconds < 0.5 or new <= 0 or done >= self.total:
            return text
        left = int((self.total - done) * seconds / new)
        return f"{text}, {format_bytes(int(new / seconds))}/s, {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"


def format_bytes(n_bytes: int) -> str:
    """Bytes for people."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.1f} {unit}"
    return f"{n_bytes} B"


def parse_files(values: Mapping[str, object], where: str) -> dict[str, ExpectedFile]:
    """The files of a manifest; TransferError for an entry that is none."""
    files = values.get("files")
    found: dict[str, ExpectedFile] = {}
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
                f"{where}: {MANIFEST}: files: {shorten_repr(name)}: expected sha256 and bytes, found {shorten_repr(entry)}; publish "
                "it again"
            )
        found[name] = ExpectedFile(name=name, n_bytes=n_bytes, sha256=sha256)
    if not found:
        raise TransferError(
            f"{where}: {MANIFEST}: files: expected the files of an artifact, found none"
        )
    return found


def parse_unhashed(values: Mapping[str, object]) -> list[str]:
    """Files that a manifest names without a hash."""
    names = values.get("unhashed")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def check_file_names(names: Iterable[str], where: str) -> None:
    """TransferError unless all names can be files of one folder, anywhere."""
    faults = list(find_name_faults(names))
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise TransferError(
            f"{where}: expected names that stay in the artifact's folder, found {faults[0]}{more}"
        )


@contextmanager
def note_resume() -> Iterator[None]:
    """Around a transfer: whoever interrupts it is told how it goes on."""
    try:
        yield
    except KeyboardInterrupt as fault:
        fault.add_note("what arrived is kept; the same command goes on")
        raise


def run_in_parallel(
    items: Sequence[Work], work: Callable[[Work], None], jobs: int, stop: threading.Event
) -> None:
    """Do something with every item, some at once; the first failure ends the others and is raised.

    The threads are daemons: Ctrl-C need not wait for a library that is in the middle of a large file.
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
    """A thread's part: item after item until none is left; tells how it ended."""
    fault: BaseException | None = None
    try:
        while not stop.is_set():
            work(todo.get_nowait())
    except queue.Empty:
        pass
    except BaseException as found:  # noqa: BLE001  # raised by whoever waits
        fault = found
    faults.put(fault)
