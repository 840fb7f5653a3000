"""The program that runs one generated program inside the jail; its text is handed to the jail's own Python.

Standard library only, Python 3.8 or later. It reads two length-prefixed JSON frames from standard input: the program
with its limits, then the tests with a random sentinel. The second frame is read only after the program's top level
has run, from a private descriptor: a program that exits early, prints a guess or reads its standard input never had
the sentinel. This is protection against accidents and short cuts; what an adversary could reach is kept harmless by
the jail, not by this file.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import types

PREFIX_BYTES = 10


def read_frame(pipe: int) -> dict:  # type: ignore[type-arg]  # dict[...] needs Python 3.9
    """One JSON object from a pipe: ten decimal digits of length, then that many bytes."""
    size = int(read_exactly(pipe, PREFIX_BYTES))
    frame = json.loads(read_exactly(pipe, size))
    assert isinstance(frame, dict)
    return frame


def read_exactly(pipe: int, size: int) -> bytes:
    """Exactly `size` bytes; fewer mean that the other side has gone."""
    parts = []
    while size:
        part = os.read(pipe, size)
        if not part:
            raise EOFError("the host closed the pipe")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def limit(cpu_seconds: int, memory_bytes: int, processes: int, file_bytes: int) -> None:
    """Bound what this process and its children may use; the hard limits cannot be raised again."""
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def run(pipe: int, report: int) -> None:
    """Run the program, then its tests, in one module; report the sentinel, or what went wrong."""
    try:
        job = read_frame(pipe)
        limit(job["cpu_seconds"], job["memory_bytes"], job["processes"], job["file_bytes"])
        module = types.ModuleType("program")
        sys.modules["program"] = module  # dataclasses and pickle look their module up by name
        exec(compile(job["source"], "program.py", "exec"), module.__dict__)
        judge = read_frame(pipe)
        exec(compile(judge["tests"], "tests.py", "exec"), module.__dict__)
        message = {"sentinel": judge["sentinel"], "python": sys.version.split()[0]}
    except BaseException as error:  # noqa: BLE001  # SystemExit and MemoryError are verdicts here, not faults
        message = {"error": ("%s: %s" % (type(error).__name__, error))[:200]}  # noqa: UP031  # error may format badly
    os.write(report, json.dumps(message).encode())


def main() -> None:
    """Fork the program into a process of its own, so that the first process of the jail outlives every limit."""
    pipe, report = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    child = os.fork()
    if child == 0:
        run(pipe, report)
        os._exit(0)
    os.close(pipe)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        os.write(report, json.dumps({"error": "killed by " + name}).encode())


if __name__ == "__main__":
    main()
