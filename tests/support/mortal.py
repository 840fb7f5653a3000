"""Fault injection: builds in processes whose system calls fail, kill them or lose unsynced writes.

A server imports quantkit once and forks for each build, so that a build takes one second instead of
six. It reads one JSON object per line (`Order`) and answers with one (`End`).
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

CALLS = (
    "pwrite",
    "write",
    "fsync",
    "replace",
    "rename",
    "unlink",
    "ftruncate",
    "posix_fallocate",
    "open",
    "mkdir",
)


@dataclass(frozen=True, kw_only=True)
class Order:
    """A command line in a folder, and its fault.

    `seconds`: SIGKILL after that time; `step`: signal `number` is sent when so many steps of a
    build loop are done; `call`: the system call at which `fault` happens: "kill", "power" or the
    name of an error, "ENOSPC"; `wave`: memory holds so many experts, and every wave is saved;
    `file_bytes`: limit of a file's size, as `ulimit -f` sets it.
    """

    place: str
    arguments: Sequence[str]
    seconds: float = 0
    step: int = 0
    number: int = 0
    call: int = 0
    fault: str = ""
    wave: int = 0
    file_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class End:
    """Exit code, or minus the signal; the number of system calls; standard error."""

    code: int
    calls: int
    stderr: str


class Server:
    """A process that forks one process per order."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    def run(self, order: Order) -> End:
        """Run an order; return how it ended."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(asdict(order)) + "\n")
        self._process.stdin.flush()
        return End(**json.loads(self._process.stdout.readline()))


@contextmanager
def server(wrapper: Sequence[str] = ()) -> Iterator[Server]:
    """Start a server, and stop it at the end of the block.

    wrapper: a command such as setpriv that executes the command after it.
    """
    command = [*wrapper, sys.executable, __file__]
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "QUANTKIT_CACHE": cache,
            "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[1:3])),
        }
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        ) as actual:
            try:
                yield Server(actual)
            finally:
                assert actual.stdin
                actual.stdin.close()


# -------------------------------------------------------------------------------- inside the server


@dataclass
class Undo:
    """How to undo a write that a power cut would lose, until `file` is synced."""

    file: tuple[int, int]
    act: Callable[[], None]


class Faults:
    """Counts system calls, and makes one of them fail."""

    def __init__(self, order: Order, counted: Path) -> None:
        self.order, self.counted, self.calls = order, counted, 0
        self.real = {name: getattr(os, name) for name in CALLS}
        self.undo: list[Undo] = []
        self.lock = threading.RLock()

    def install(self) -> None:
        """Replace the functions of `os`."""
        for name in CALLS:
            setattr(os, name, self.watch(name))

    def watch(self, name: str) -> Callable[..., object]:
        """Return a function that counts calls and remembers writes until they are synced."""

        def call(*args: object, **more: object) -> object:
            changing = name != "open" or bool(int(args[1]) & os.O_CREAT)  # type: ignore[call-overload]
            mine = isinstance(args[0], int) or "/dev/" not in os.fspath(args[0])  # type: ignore[call-overload]
            if not (changing and mine) or (isinstance(args[0], int) and args[0] <= 2):
                return self.real[name](*args, **more)
            with self.lock:
                self.calls += 1
                if self.calls == self.order.call:
                    self.strike()
                if self.order.fault == "power" and not more:
                    self.remember(name, args)
                actual = self.real[name](*args, **more)
                if name == "open" and self.order.fault == "power":
                    self.remember_new_file(args[0], actual)
            return actual

        return call

    def strike(self) -> None:
        """Raise the error, or end the process."""
        if self.order.fault in ("kill", "power"):
            for undo in reversed(self.undo):
                undo.act()
            self.note()
            os.kill(os.getpid(), signal.SIGKILL)
        number = getattr(errno, self.order.fault)
        raise OSError(number, os.strerror(number))

    def note(self) -> None:
        """Write the number of calls for the server."""
        self.counted.write_text(str(self.calls))

    def remember(self, name: str, args: tuple[object, ...]) -> None:
        """Remember how to undo a call; an fsync makes earlier calls permanent."""
        if name == "fsync":
            state = os.fstat(args[0])  # type: ignore[arg-type]
            self.undo = [undo for undo in self.undo if undo.file != (state.st_dev, state.st_ino)]
        elif name in ("pwrite", "write", "ftruncate"):
            self.remember_content(args[0], args[2] if name == "pwrite" else None, name)  # type: ignore[arg-type]
        elif name in ("replace", "rename"):
            self.remember_name(Path(str(args[0])), Path(str(args[1])))

    def remember_content(self, descriptor: int, offset: int | None, name: str) -> None:
        """Remember a file's old content, which comes back at a power cut."""
        state, path = os.fstat(descriptor), os.readlink(f"/proc/self/fd/{descriptor}")
        if any(
            undo.file == (state.st_dev, state.st_ino) and undo.act.__name__ == "back"
            for undo in self.undo
        ):
            return  # the oldest content counts
        content = Path(path).read_bytes() if os.path.exists(path) else b""

        def back() -> None:
            if not os.path.exists(path):  # removed later
                return
            again = self.real["open"](path, os.O_RDWR)
            os.truncate(path, len(content))
            self.real["pwrite"](again, content, 0)

        self.undo.append(Undo((state.st_dev, state.st_ino), back))

    def remember_name(self, old: Path, new: Path) -> None:
        """Remember a file's old name, which comes back at a power cut."""
        folder = new.parent.stat()
        kept = new.read_bytes() if new.is_file() else None

        def back_again() -> None:
            if new.exists():
                self.real["rename"](new, old)
            if kept is not None:
                new.write_bytes(kept)

        self.undo.append(Undo((folder.st_dev, folder.st_ino), back_again))

    def remember_new_file(self, path: object, descriptor: object) -> None:
        """Remember a new file, which disappears at a power cut unless its folder is synced."""
        where, state = Path(str(path)), os.fstat(descriptor)  # type: ignore[arg-type]
        folder = where.parent.stat()
        if state.st_size == 0:
            gone = Undo((folder.st_dev, folder.st_ino), lambda: where.unlink(missing_ok=True))
            self.undo.append(gone)


def run_order(order: Order, counted: Path) -> int:
    """Run an order in this process; return its exit code."""
    from quantkit.build.progress_log import BuildProgress
    from quantkit.cli.main import main

    os.chdir(order.place)
    if order.file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order.file_bytes, order.file_bytes))
    faults = Faults(order, counted)
    if order.call:
        faults.install()
    if order.wave:
        limit_waves(order.wave)
    if order.step:
        commit, done = BuildProgress.commit_step, list[int]()

        def dying(self: BuildProgress, *args: object) -> None:
            commit(self, *args)  # type: ignore[arg-type]
            done.append(1)
            if len(done) == order.step:
                os.kill(os.getpid(), order.number)

        BuildProgress.commit_step = dying  # type: ignore[assignment,method-assign]
    try:
        main([*order.arguments])
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        faults.note()
    return 0


def limit_waves(size: int) -> None:
    """Hold so many experts at once, and save every wave."""
    from quantkit.build import progress_log
    from quantkit.plan import plan

    real = plan.plan_memory

    def plan_fewer_experts(*args: object, **kwargs: object) -> object:
        return replace(real(*args, **kwargs), wave_experts=size)  # type: ignore[arg-type]

    plan.plan_memory = plan_fewer_experts  # type: ignore[assignment]
    progress_log.MIN_SECONDS, progress_log.MIN_COST_RATIO = 0.0, 0


def fork(order: Order) -> End:
    """Run an order in a forked process."""
    place = Path(order.place)
    counted, output = place.with_suffix(".calls"), place.with_suffix(".stderr")
    counted.write_text("0")
    pid = os.fork()
    if pid == 0:
        for number, path in ((1, "/dev/null"), (2, output)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
        code = 70
        try:
            code = run_order(order, counted)
        finally:
            if sys.exc_info()[0] is not None:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(code)
    if order.seconds:
        time.sleep(order.seconds)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return End(
        code=os.waitstatus_to_exitcode(status),
        calls=int(counted.read_text() or 0),
        stderr=output.read_text(),
    )


def serve() -> None:
    """Answer orders until standard input ends."""
    from quantkit.library_settings import REPRODUCIBLE

    os.environ.update(REPRODUCIBLE)
    import torch
    from support.quick_builds import shorten_searches

    from quantkit import pipeline
    from quantkit.report import html_page, terminal

    shorten_searches(setattr)
    assert pipeline and terminal  # the imports of a build
    # made by the first build and found by others: each shall make the same calls
    html_page.load_vega_bundle()
    html_page.make_report_environment().get_template("fidelity.html.j2")
    torch.set_num_threads(1)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(asdict(fork(Order(**json.loads(line))))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
