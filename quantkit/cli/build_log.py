"""The log of a build: a file next to the artifact, and stderr with `--verbose`.

The file is opened when the plan is accepted, so a refused recipe leaves none. Each run of the same
build is appended.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TextIO

import click

from quantkit.cli.console import escape_controls
from quantkit.errors import QuantkitError
from quantkit.io.files import create_file, describe_os_error, make_folder, open_plain_file
from quantkit.version import __version__

SUFFIX = ".build.log"
LOG = logging.getLogger("quantkit")
FORMAT = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S")


class BuildLog:
    """Log handlers of one build; the file is added once its place is known."""

    def __init__(self, handlers: ExitStack, verbose: bool) -> None:
        self._handlers, self._verbose = handlers, verbose

    def show_message(self, message: str) -> None:
        """Log a message, and print it to stderr."""
        LOG.info("%s", message)
        if not self._verbose:
            click.echo(message, err=True)

    def open_file(self, artifact: Path) -> None:
        """Append to ARTIFACT.build.log; a message on stderr says why that is not possible."""
        path = artifact.with_name(artifact.name + SUFFIX)
        try:
            make_folder(path.parent)
            stream = os.fdopen(open_to_append(path), "a", encoding="utf-8")
        except OSError as error:
            message = f"no log file: {path}: {describe_os_error(error)}"
            click.echo(escape_controls(message), err=True)
            return
        self._handlers.callback(close_quietly, stream)
        self._handlers.enter_context(attach(make_handler(stream)))
        LOG.info(
            "quantkit %s, Python %s, %s",
            *(__version__, platform.python_version(), platform.platform()),
        )


@contextmanager
def log_build(*, verbose: bool) -> Iterator[BuildLog]:
    """Log at every level while a build runs, and the error of a failed one: with its traceback,
    unless it is one of quantkit's own errors.
    """
    level = LOG.level
    with ExitStack() as handlers:
        handlers.callback(LOG.setLevel, level)
        LOG.setLevel(logging.DEBUG)
        handlers.enter_context(attach(logging.NullHandler()))  # without any, logging prints errors
        if verbose:
            handlers.enter_context(attach(make_handler(sys.stderr)))
        try:
            yield BuildLog(handlers, verbose)
        except QuantkitError as error:
            LOG.error("error: %s", error)
            raise
        except KeyboardInterrupt as error:
            LOG.error("%s", type(error).__name__)
            raise
        except BaseException as error:
            LOG.error("%s", "".join(traceback.format_exception(error)).rstrip())
            raise


def close_quietly(stream: TextIO) -> None:
    """Close a log file; text that a full disk refused is lost, as LogHandler has reported."""
    with suppress(OSError):
        stream.close()


def open_to_append(path: Path) -> int:
    """Return a descriptor of a log file, made if it is absent; raises OSError for a link."""
    try:
        return open_plain_file(path, os.O_WRONLY | os.O_APPEND)
    except FileNotFoundError:
        return create_file(path)


class LogHandler(logging.StreamHandler[TextIO]):
    """Writes to a stream, and reports its first error only: a full disk ends the log and not the
    build.
    """

    has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's name
        """Print why the log ends, instead of logging's traceback."""
        if not self.has_failed:
            self.has_failed = True
            click.echo(escape_controls(f"the log ends: {sys.exc_info()[1]}"), err=True)


def make_handler(stream: TextIO) -> logging.Handler:
    """Return a handler that writes to a stream; names from untrusted files are escaped."""
    handler = LogHandler(stream)
    handler.setFormatter(FORMAT)
    handler.addFilter(escape_record)
    return handler


@contextmanager
def attach(handler: logging.Handler) -> Iterator[None]:
    """Add a handler to quantkit's loggers."""
    LOG.addHandler(handler)
    try:
        yield
    finally:
        LOG.removeHandler(handler)


def escape_record(record: logging.LogRecord) -> bool:
    """Escape the control characters of a record's message."""
    record.msg, record.args = escape_controls(record.getMessage()), None
    return True
