"""What every command says and how: data to stdout, progress to stderr, errors as one message with their exit code."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar

import click

from quantkit.errors import QuantkitError
from quantkit.io.files import describe_os_error

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    from quantkit.progress import Progress

MOST_CHARACTERS = 1500
"""In a line of an error message."""
MOST_LINES = 40
"""In an error message; a recipe has a line for every fault."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Terminated(KeyboardInterrupt):
    """Somebody asked the process to end (SIGTERM); treated as Ctrl-C is, with an exit code of its own."""


def handle_errors(command: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Turn quantkit's own errors into one message and their exit code, and so Ctrl-C (130) and SIGTERM (143)."""

    @wraps(command)
    def run(
        *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:  # a decorator's relay, typed by ParamSpec
        try:
            with terminable():
                return command(*args, **kwargs)
        except QuantkitError as error:
            leave(f"error: {error}", error, error.exit_code)
        except BrokenPipeError:
            raise  # click ends quietly when nobody reads on
        except OSError as error:  # of a file that nothing below expected to fail
            leave(f"error: {format_os_error(error)}", error, 1)
        except MemoryError as error:
            leave(
                "error: expected enough memory, found none left; lower `memory` or free some",
                error,
                1,
            )
        except Terminated as error:
            leave("terminated", error, 128 + signal.SIGTERM)
        except KeyboardInterrupt as error:
            leave("interrupted", error, 128 + signal.SIGINT)

    return run


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does; only the main thread may say so."""

    def terminate(_number: int, _frame: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def leave(message: str, error: BaseException, code: int) -> NoReturn:
    """Say why the command ends, and below it what was noted on the way out."""
    for line in (message, *getattr(error, "__notes__", ())):
        click.echo(format_message(line), err=True)
    sys.exit(code)


def format_os_error(error: OSError) -> str:
    """What the operating system would not do, and with which file."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}the operating system refused: {describe_os_error(error)}; check the path, its permissions and the free space"


def format_message(message: str) -> str:
    """A message as the terminal gets it: `printable`, and a name of thousands of characters in it is cut short."""
    lines = printable(message).split("\n")
    cut = [
        line if len(line) <= MOST_CHARACTERS else f"{line[: MOST_CHARACTERS - 1]}…"
        for line in lines[:MOST_LINES]
    ]
    return "\n".join([
        *cut,
        *([f"and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []),
    ])


def printable(text: str) -> str:
    """Text of unknown origin without what a terminal would obey: all but line ends is shown as Python escapes it."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def show(*renderables: RenderableType) -> None:
    """Print to stdout, 100 columns wide when it is not a terminal."""
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=100)
    for renderable in renderables:
        console.print(EscapedRenderable(renderable))


class EscapedRenderable:
    """A rich renderable whose texts come from files that anybody may have written: made `printable`."""

    def __init__(self, renderable: RenderableType) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        """rich's protocol: the same segments with other text."""
        from rich.segment import Segment

        for segment in console.render(self._renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def as_json_list(found: list[Any]) -> None:
    """Print what a recipe gives: one object, or a list of them when it names several formats."""
    as_json(found[0] if len(found) == 1 else found)


def as_json(values: Any) -> None:
    """Print JSON to stdout; in its texts too a terminal finds nothing to obey."""
    text = json.dumps(values, indent=1, ensure_ascii=False)
    click.echo("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))


class ProgressBar:
    """Progress with ETA on stderr: a bar per stage on a terminal, a line per tenth of a stage elsewhere."""

    def __init__(self, bars: bool) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            TaskID,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
        )
        times = (
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        self._bars = (
            Bars(*columns, *times, TextColumn("{task.fields[note]}"), console=console)
            if bars
            else None
        )
        self._tasks: dict[str, TaskID] = {}
        self._tenths: dict[str, int] = {}

    def __enter__(self) -> ProgressBar:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def tell(self, progress: Progress) -> None:
        """Show how far a stage is."""
        if self._bars:
            task = self._tasks.get(progress.stage)
            if task is None:
                task = self._tasks[progress.stage] = self._bars.add_task(progress.stage, note="")
            self._bars.update(
                task, completed=progress.done, total=progress.total, note=progress.note
            )
            return
        tenth = int(10 * progress.done / progress.total) if progress.total else 10
        if tenth > self._tenths.get(progress.stage, 0):
            self._tenths[progress.stage] = tenth
            click.echo(f"{progress.stage}: {10 * tenth} % {progress.note}".rstrip(), err=True)
