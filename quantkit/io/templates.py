"""Templates and patterns of strangers, rendered in a process with limits.

A task file and a model's chat template are code. They render in jinja2's immutable sandbox, in a
process of their own (template_process.py), with limits of processor time, memory and output. A
regular expression of a task file is applied there as well: it can backtrack for years.
"""

from __future__ import annotations

import json
import math
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from quantkit.io.template_filter import build_template_filter
from quantkit.io.yaml_document import printable

TemplateKind = Literal["task", "chat"]
"""task: lm-eval's settings, undefined names are errors; chat: transformers' settings."""

RENDER_SECONDS = 3
"""Processor time of one request; templates of real tasks and models need milliseconds."""
MEMORY_BYTES = 512 << 20
"""Memory of the process: room for the longest output, its JSON and a document of that size."""
MAX_CHARACTERS = 16 << 20
"""Longest text of one template: four times the context of a model that reads a million tokens."""
MAX_REQUEST_BYTES = 64 << 20
"""Longest request: a document of MAX_CHARACTERS in JSON."""
MAX_TOTAL_CHARACTERS = 1 << 30
"""Text of all requests of one worker: prompts of 1,000 items with a million characters each."""
TOTAL_SECONDS = 600
"""Processor time of all requests of one worker: 10,000 items at 60 ms."""

FULL_ISOLATION = "limits, system-call filter"
"""describe_isolation's answer where nothing is missing."""
_WALL_SECONDS = 300  # a machine can be busy; only processor time decides otherwise
_END_SECONDS = 1  # of a process without input
_HEADER = struct.Struct(">Q")
_SCRIPT = Path(__file__).with_name("template_process.py")
_LIMITS = {
    "output": f"a text of at most {MAX_CHARACTERS:,} characters",
    "memory": f"at most {MEMORY_BYTES >> 20} MiB of memory",
    "depth": "expressions and loops of less depth",
}


class TemplateFault(Exception):
    """One sentence that says why a template gave no text, without the place, which callers add.

    is_limit: a limit ended it; otherwise the template itself raised an error.
    """

    def __init__(self, sentence: str, *, is_limit: bool) -> None:
        self.is_limit = is_limit
        super().__init__(sentence)


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerLimits:
    """Limits over all requests of a worker. None: no limit, for a server that runs for months."""

    total_seconds: float | None = TOTAL_SECONDS
    total_characters: int | None = MAX_TOTAL_CHARACTERS


def describe_isolation() -> str:
    """Return what bounds a process that renders templates on this machine."""
    with TemplateWorker() as worker:
        return worker.describe_isolation()


class TemplateWorker:
    """A process that renders templates. Starts on first use, again after a limit ended it.

    Mutable; its methods may be called from several threads, which take turns. Use as a context
    manager, or call `close`; the process also ends with this object.
    """

    def __init__(self, limits: WorkerLimits | None = None) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._limits = limits or WorkerLimits()
        self._lock = threading.Lock()
        self._seconds, self._process_seconds, self._characters = 0.0, 0.0, 0
        self._missing_filter = ""

    def __enter__(self) -> TemplateWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._stop()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._stop()

    def describe_isolation(self) -> str:
        """Return what bounds the process, with the reason if there is no system-call filter."""
        self.render("", {})
        missing = printable(self._missing_filter)
        return f"limits, no system-call filter: {missing}" if missing else FULL_ISOLATION

    def render(
        self, template: str, values: Mapping[str, object], kind: TemplateKind = "task"
    ) -> str:
        """Return the text of a template. `values` that JSON cannot hold are passed as text.

        Raises TemplateFault.
        """
        request = {"action": "render", "kind": kind, "template": template, "values": values}
        return str(self._send(request))

    def render_target(self, template: str, values: Mapping[str, object]) -> object:
        """Return the text of a template, or the list that the text writes, as lm-eval does.

        Raises TemplateFault.
        """
        request = {"action": "render", "kind": "task", "template": template, "values": values}
        return self._send(request | {"is_literal": True})

    def find_matches(
        self, pattern: str, texts: Sequence[str], *, group: int, fallback: str
    ) -> list[str]:
        """Return match number `group` of a pattern in each text. Raises TemplateFault."""
        request = {"action": "find", "pattern": pattern, "texts": [*texts]}
        return self._send_for_texts(request | {"group": group, "fallback": fallback})

    def remove_matches(self, patterns: Sequence[str], texts: Sequence[str]) -> list[str]:
        """Return the texts without the matches of the patterns. Raises TemplateFault."""
        request = {"action": "remove", "patterns": [*patterns], "texts": [*texts]}
        return self._send_for_texts(request)

    def _send_for_texts(self, request: Mapping[str, object]) -> list[str]:
        values = self._send(request)
        assert isinstance(values, list)
        return [str(value) for value in values]

    def _send(self, request: Mapping[str, object]) -> object:
        """Send a request and return the value of its response."""
        with self._lock:
            seconds = self._get_seconds()
            limits = {"seconds": seconds, "max_characters": MAX_CHARACTERS}
            data = json.dumps({**request, **limits}, default=str).encode()
            if len(data) > MAX_REQUEST_BYTES:
                raise TemplateFault(
                    f"expected a document of at most {MAX_REQUEST_BYTES >> 20} MiB, found "
                    f"{len(data) >> 20} MiB",
                    is_limit=True,
                )
            answer = self._exchange(data, seconds)
        return self._read_answer(answer)

    def _get_seconds(self) -> int:
        """Return the processor time that the next request may use."""
        total = self._limits.total_seconds
        if total is None:
            return RENDER_SECONDS
        if self._seconds >= total:
            raise TemplateFault(
                f"expected at most {total:.0f} s of processor time for all documents, found more",
                is_limit=True,
            )
        return min(RENDER_SECONDS, math.ceil(total - self._seconds))

    def _exchange(self, data: bytes, seconds: int) -> bytes:
        """Send bytes to the process, started if need be, and return its answer."""
        is_new, process = self._process is None, self._process or self._start()
        assert process.stdin is not None
        deadline = time.monotonic() + _WALL_SECONDS
        try:
            if is_new:
                self._missing_filter = self._read_message(process, deadline).decode()
            process.stdin.write(_HEADER.pack(len(data)) + data)
            process.stdin.flush()
            return self._read_message(process, deadline)
        except (EOFError, OSError):
            code = self._stop()
            self._seconds += seconds
            if code == -signal.SIGPROF:
                sentence = f"expected at most {seconds} s of processor time, found more"
            elif code is None:
                sentence = f"expected an answer within {_WALL_SECONDS} s, found none"
            else:
                sentence = f"the process that renders it ended (exit code {code})"
            raise TemplateFault(sentence, is_limit=True) from None
        except BaseException:  # an interrupt: the next answer would belong to this request
            self._stop()
            raise

    def _read_message(self, process: subprocess.Popen[bytes], deadline: float) -> bytes:
        """Read the number of bytes and the bytes."""
        (n_bytes,) = _HEADER.unpack(self._read(process, _HEADER.size, deadline))
        return self._read(process, n_bytes, deadline)

    def _read(self, process: subprocess.Popen[bytes], n_bytes: int, deadline: float) -> bytes:
        """Read exactly `n_bytes`. Raises EOFError if the process ends, or at the deadline."""
        assert process.stdout is not None
        pieces, missing = list[bytes](), n_bytes
        output, poll = process.stdout.fileno(), select.poll()
        poll.register(output, select.POLLIN)
        while missing:
            is_ready = poll.poll(1000 * max(0.0, deadline - time.monotonic()))
            piece = os.read(output, min(missing, 1 << 20)) if is_ready else b""
            if not piece:
                raise EOFError
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)

    def _read_answer(self, data: bytes) -> object:
        """Return the value of an answer. Raises TemplateFault for a fault, or over the limits."""
        answer = json.loads(data)
        self._seconds += answer["cpu"] - self._process_seconds
        self._process_seconds = answer["cpu"]
        self._characters += len(data)
        limit = self._limits.total_characters
        if limit is not None and self._characters > limit:
            raise TemplateFault(
                f"expected at most {limit:,} characters of all documents, found more",
                is_limit=True,
            )
        if answer.get("fault") == "limit":
            raise TemplateFault(f"expected {_LIMITS[answer['text']]}, found more", is_limit=True)
        if "fault" in answer:
            text = " ".join(answer["text"].split())
            raise TemplateFault(printable(text, 300), is_limit=False)
        return answer["value"]

    def _start(self) -> subprocess.Popen[bytes]:
        """Start the process: no site-packages, an empty environment, no terminal's signals."""
        specs = (find_spec("jinja2"), find_spec("markupsafe"))
        limits = (str(MEMORY_BYTES), build_template_filter().hex())
        folders = {str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_SCRIPT), *sorted(folders), *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            start_new_session=True,
        )
        self._process_seconds = 0.0
        return self._process

    def _stop(self) -> int | None:
        """End the process. Return its exit code if it had ended by itself."""
        process, self._process = self._process, None
        if process is None:
            return None
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(OSError):  # of bytes that were not sent yet
            process.stdin.close()
        code: int | None = None
        with suppress(subprocess.TimeoutExpired):  # an idle process ends with its input
            code = process.wait(timeout=_END_SECONDS)
        process.kill()
        process.stdout.close()
        process.wait()
        return code
