"""Output and errors that all commands share: data on stdout, progress on stderr, one message per
error.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NoReturn, ParamSpec, TypeVar

import click

from quantkit.errors import QuantkitError
from quantkit.io.files import describe_os_error

MAX_LINE_CHARACTERS = 1500
"""Longest line of an error message."""
MAX_LINES = 40
"""Most lines of an error message; a recipe has one line per fault."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Terminated(KeyboardInterrupt):
    """SIGTERM was received; handled as Ctrl-C is, with an exit code of its own."""


def handle_errors(command: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Turn quantkit's errors into one message and their exit code, Ctrl-C into 130, SIGTERM into
    143.
    """

    @wraps(command)
    def run(
        *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:  # a decorator passes on what its command takes, typed by ParamSpec
        try:
            with raise_on_sigterm():
                return command(*args, **kwargs)
        except QuantkitError as error:
            exit_with_error(f"error: {error}", error, error.exit_code)
        except BrokenPipeError:
            raise  # click exits quietly when the reader has closed the pipe
        except OSError as error:  # of a file whose failure no code below expected
            exit_with_error(f"error: {format_os_error(error)}", error, 1)
        except MemoryError as error:
            exit_with_error(
                "error: expected enough memory, found none left; lower `memory` or free some",
                error,
                1,
            )
        except Terminated as error:
            exit_with_error("terminated", error, 128 + signal.SIGTERM)
        except KeyboardInterrupt as error:
            exit_with_error("interrupted", error, 128 + signal.SIGINT)

    return run


@contextmanager
def raise_on_sigterm() -> Iterator[None]:
    """Raise Terminated on SIGTERM; only the main thread can set a signal handler."""

    def terminate(_number: int, _frame: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def exit_with_error(message: str, error: BaseException, code: int) -> NoReturn:
    """Print the message and the notes of the exception to stderr, then exit with `code`.

    On a terminal lines are wrapped between words and the first word is red; elsewhere a message
    keeps its lines, so that programs can search them.
    """
    is_terminal = sys.stderr.isatty()
    for line in (message, *getattr(error, "__notes__", ())):
        text = format_message(line)
        if is_terminal:
            text = color_label(wrap_lines(text, shutil.get_terminal_size().columns))
        click.echo(text, err=True)
    sys.exit(code)


def echo(text: str) -> None:
    """Print text to stdout, with control characters escaped and wrapped between words on a
    terminal.
    """
    escaped = escape_controls(text)
    if sys.stdout.isatty():
        escaped = wrap_lines(escaped, shutil.get_terminal_size().columns)
    click.echo(escaped)


def wrap_lines(text: str, width: int) -> str:
    """Return text in lines of `width` characters, broken between words only: a path stays whole.

    Lines that follow from one are indented by two more than it.
    """
    wrapped = []
    for line in text.split("\n"):
        indent = " " * (len(line) - len(line.lstrip()))
        parts = textwrap.wrap(
            line,
            max(20, width),
            subsequent_indent=f"{indent}  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        wrapped.append("\n".join(parts))
    return "\n".join(wrapped)


def color_label(text: str) -> str:
    """Return an error message with "error:" in red and bold, unless NO_COLOR is set."""
    label = "error:"
    if not text.startswith(label) or os.environ.get("NO_COLOR"):
        return text
    return click.style(label, fg="red", bold=True) + text.removeprefix(label)


def format_os_error(error: OSError) -> str:
    """Return the message for an error of the operating system, with the file if there is one."""
    where = f"{error.filename}: " if error.filename else ""
    return (
        f"{where}the operating system refused: {describe_os_error(error)}; check the path, its "
        "permissions and the free space"
    )


def format_message(message: str) -> str:
    """Return a message without control characters and cut to MAX_LINES lines of
    MAX_LINE_CHARACTERS.
    """
    lines = escape_controls(message).split("\n")
    cut = [
        line if len(line) <= MAX_LINE_CHARACTERS else f"{line[: MAX_LINE_CHARACTERS - 1]}…"
        for line in lines[:MAX_LINES]
    ]
    more = [f"and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
    return "\n".join([*cut, *more])


def escape_controls(text: str) -> str:
    """Return untrusted text with Python escapes for all that a terminal could interpret, except
    line ends.
    """
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def print_json_list(values: list[Any]) -> None:
    """Print one object, or a list if a recipe names several formats."""
    print_json(values[0] if len(values) == 1 else values)


def print_json(values: Any) -> None:
    """Print JSON to stdout, with escapes for control characters inside its texts."""
    text = json.dumps(values, indent=1, ensure_ascii=False)
    click.echo("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))
