"""The process that renders templates of strangers. It runs as a script, never as a module.

quantkit/io/templates.py starts it, sends requests and stops it. The sandbox of jinja2 keeps a
template from Python's objects, but bounds neither time nor memory: `'a' * 10**9`, `10**10**8`,
nested loops and a regular expression that backtracks all end here, by a limit of the kernel. The
process can open no file and no socket: its limit of descriptors equals those that it has, and a
filter refuses all system calls but a few (template_filter.py).

The first message says why there is no filter, and is empty if there is one. Requests and responses
are JSON with the number of bytes in front (8 bytes, big-endian).
"""

from __future__ import annotations

import ast
import ctypes
import json
import os
import re
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

_PACKAGES, _MEMORY_BYTES, _FILTER = sys.argv[1:-2], sys.argv[-2], bytes.fromhex(sys.argv[-1])
sys.path.extend(_PACKAGES)  # started without site-packages

from jinja2 import StrictUndefined, TemplateError, nodes  # noqa: E402
from jinja2.exceptions import SecurityError  # noqa: E402
from jinja2.ext import Extension  # noqa: E402
from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: E402
from jinja2.utils import Namespace  # noqa: E402

_HEADER = struct.Struct(">Q")
_MAX_TEMPLATES = 64  # compiled templates that are kept; a task has about five
_PAGE_BYTES = resource.getpagesize()

# Modules that jinja2 and the standard library import on first use; later no file can be opened.
_EARLY_IMPORTS = (
    "jinja2.constants", "jinja2.debug", "jinja2.filters", "jinja2.tests", "encodings.ascii",
    "encodings.idna", "encodings.latin_1", "encodings.unicode_escape", "encodings.utf_8", "html",
    "pprint", "random", "stringprep", "textwrap", "traceback", "unicodedata", "urllib.parse",
)  # fmt: skip


class OutputTooLong(Exception):
    """A template wrote more characters than allowed."""


# ------------------------------------------------------------------------------------ environments


def replace_pattern(string: str, pattern: str, repl: str, count: int = 0) -> str:
    """Return `string` with matches replaced: lm-eval's filter regex_replace."""
    return re.sub(pattern, repl, string, count=count)


def make_task_environment() -> ImmutableSandboxedEnvironment:
    """Make the environment of task files: lm-eval's settings and filter, sandboxed."""
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["regex_replace"] = replace_pattern
    return environment


class GenerationBlock(Extension):
    """`{% generation %}`, which marks the assistant's text for training; rendered as its body."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's interface

    def parse(self, parser: Any) -> nodes.Node:
        """Return a scope with the body of the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class PublicNamespace(Namespace):
    """jinja2's namespace without names that start with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        check_public_name(name)
        super().__setitem__(name, value)


class NamespaceFunction:
    """The function `namespace` of chat templates."""

    def __call__(self, *pairs: Any, **values: Any) -> PublicNamespace:
        named = dict(*pairs, **values)
        for name in named:
            check_public_name(name)
        return PublicNamespace(named)


def check_public_name(name: object) -> None:
    """Raise SecurityError for a name that starts with an underscore."""
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


def raise_exception(message: object) -> None:
    """Stop rendering: how a chat template refuses a conversation."""
    raise TemplateError(str(message))


def format_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return a value as JSON without HTML escapes: the filter tojson of chat templates."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def format_now(pattern: str) -> str:
    """Return the local time: the function strftime_now of chat templates."""
    return datetime.now().strftime(pattern)  # noqa: DTZ005  # as transformers does


def make_chat_environment() -> ImmutableSandboxedEnvironment:
    """Make the environment of chat templates: transformers' settings, filters and functions."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationBlock, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = format_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": format_now,
        "namespace": NamespaceFunction(),
    }
    return environment


# ---------------------------------------------------------------------------------------- requests


class Renderer:
    """Compiled templates of both environments. Mutable: it keeps the templates it has compiled."""

    def __init__(self) -> None:
        self._environments = {"task": make_task_environment(), "chat": make_chat_environment()}
        self._compiled: dict[tuple[str, str], Any] = {}

    def render(self, request: Mapping[str, Any]) -> object:
        """Return the text of a template; a list if `is_literal` and the text is one."""
        key = (request["kind"], request["template"])
        template = self._compiled.get(key)
        if template is None:
            template = self._environments[key[0]].from_string(key[1])
            if len(self._compiled) >= _MAX_TEMPLATES:
                self._compiled.clear()
            self._compiled[key] = template
        pieces, n_characters = [], 0
        for piece in template.generate(request["values"]):
            n_characters += len(piece)
            if n_characters > request["max_characters"]:
                raise OutputTooLong
            pieces.append(piece)
        text = "".join(pieces)
        return parse_list(text) if request.get("is_literal") else text


def parse_list(text: str) -> object:
    """Return the list that a text writes in Python, as lm-eval reads targets; else the text."""
    if not (len(text) >= 2 and text[0] == "[" and text[-1] == "]"):
        return text
    try:
        value = ast.literal_eval(text)
        json.dumps(value)
    except (SyntaxError, TypeError, ValueError):
        return text
    return value


def find_matches(request: Mapping[str, Any]) -> list[str]:
    """Return one match of a pattern per text: lm-eval's filter regex."""
    pattern, group, fallback = request["pattern"], request["group"], request["fallback"]
    return [select_match(re.findall(pattern, text), group, fallback) for text in request["texts"]]


def select_match(matches: list[Any], group: int, fallback: str) -> str:
    """Return match number `group`, of several groups the first that is not empty."""
    if not matches:
        return fallback
    match = matches[group]
    if isinstance(match, tuple):
        match = next(filter(None, match), fallback)
    return str(match).strip()


def remove_matches(request: Mapping[str, Any]) -> list[str]:
    """Return the texts without the matches of the patterns: regexes_to_ignore of exact_match."""
    texts = request["texts"]
    for pattern in request["patterns"]:
        texts = [re.sub(pattern, "", text) for text in texts]
    return list(texts)


def answer_request(handlers: Mapping[str, Callable[[Any], object]], data: bytes) -> bytes:
    """Answer one request: its value, or a fault with a sentence."""
    try:
        request = json.loads(data)
        limit_processor_time(request["seconds"])
        response = {"value": handlers[request["action"]](request)}
        return json.dumps(response | {"cpu": time.process_time()}).encode()
    except OutputTooLong:
        fault = ("limit", "output")
    except MemoryError:
        fault = ("limit", "memory")
    except RecursionError:
        fault = ("limit", "depth")
    except TemplateError as error:
        fault = ("raised", str(error))
    # a template can raise any error of the functions that it calls
    except Exception as error:  # noqa: BLE001
        fault = ("raised", f"{type(error).__name__}: {error}")
    kind, text = fault
    return json.dumps({"fault": kind, "text": text[:1000], "cpu": time.process_time()}).encode()


# ------------------------------------------------------------------------------------------ limits


def limit_processor_time(seconds: int) -> None:
    """Let the kernel end this process after `seconds` more seconds of processor time; 0: never."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


class FilterProgram(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("rules", ctypes.c_char_p))


def install_filter(rules: bytes) -> str:
    """Forbid all system calls but those of the filter; return why that is not possible, or ""."""
    if not rules:
        return f"no list of system calls for {os.uname().machine}"
    program = FilterProgram(len(rules) // 8, rules)
    libc = ctypes.CDLL(None, use_errno=True)
    # PR_SET_NO_NEW_PRIVS, then PR_SET_SECCOMP with SECCOMP_MODE_FILTER
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(program), 0, 0):
        return f"the kernel refuses the filter: {os.strerror(ctypes.get_errno())}"
    return ""


def limit_process(memory_bytes: int) -> None:
    """Limit memory; forbid new descriptors, written files, child processes and core dumps."""
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * _PAGE_BYTES
    time.tzset()  # reads the time zone
    for limit, value in (
        (resource.RLIMIT_AS, used + memory_bytes),
        (resource.RLIMIT_NOFILE, 3),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(limit)
        lowest = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (lowest, lowest))


def read_exactly(n_bytes: int) -> bytes:
    """Return `n_bytes` from standard input; fewer only at its end."""
    pieces, missing = [], n_bytes
    while missing:
        piece = os.read(0, min(missing, 1 << 20))
        if not piece:
            break
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)


def write_response(data: bytes) -> None:
    """Write a response to standard output."""
    view = memoryview(_HEADER.pack(len(data)) + data)
    while view:
        view = view[os.write(1, view) :]


def main() -> None:
    """Answer requests until standard input ends."""
    for name in _EARLY_IMPORTS:
        __import__(name)
    handlers: dict[str, Callable[[Any], object]] = {
        "render": Renderer().render,
        "find": find_matches,
        "remove": remove_matches,
    }
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    limit_process(int(_MEMORY_BYTES))
    fault = install_filter(_FILTER).encode()
    write_response(fault)
    while len(header := read_exactly(_HEADER.size)) == _HEADER.size:
        (n_bytes,) = _HEADER.unpack(header)
        response = answer_request(handlers, read_exactly(n_bytes))
        limit_processor_time(0)
        write_response(response)


if __name__ == "__main__":
    main()
