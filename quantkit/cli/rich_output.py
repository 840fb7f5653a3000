"""Tables and progress bars, drawn by rich."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import click
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as RichProgress
from rich.segment import Segment
from rich.table import Column

from quantkit.cli.console import escape_controls
from quantkit.progress import Phase, Progress, TimeKeeper, TimeLeft, format_duration

BAR = 16
"""Characters of a bar, so that stage, bar and error fit into 80."""
STAGE = len("benchmarks, artifact")
TOTAL = "all phases"

WIDTH = 100
"""Columns of output that does not go to a terminal, unless COLUMNS says otherwise."""


def show(*renderables: RenderableType) -> None:
    """Print to stdout, as wide as the terminal, or as COLUMNS says, or WIDTH columns wide."""
    columns = os.environ.get("COLUMNS", "")
    has_width = sys.stdout.isatty() or (columns.isdecimal() and int(columns) > 0)
    console = Console() if has_width else Console(width=WIDTH)
    for renderable in renderables:
        console.print(EscapedRenderable(renderable), crop=False)  # a long path is shown whole


class EscapedRenderable:
    """A rich renderable whose texts come from untrusted files: control characters are escaped."""

    def __init__(self, renderable: RenderableType) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        """Yield the same segments with escaped text (rich's protocol)."""
        for segment in console.render(self._renderable, options):
            yield (
                segment
                if segment.control
                else Segment(escape_controls(segment.text), segment.style)
            )


class ProgressBar:
    """Progress on stderr with one time left over all phases: a bar per stage on a terminal,
    elsewhere a line per 10 %.
    """

    def __init__(self, bars: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._bars = RichProgress(*make_columns(), console=Console(stderr=True)) if bars else None
        self._keeper = TimeKeeper(clock)
        self._clock, self._began = clock, clock()
        self._tasks: dict[str, TaskID] = {}
        self._tenths: dict[str, int] = {}

    def __enter__(self) -> ProgressBar:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def set_phases(self, phases: Sequence[Phase]) -> None:
        """Set the stages that will follow, in their order, with their expected seconds."""
        self._keeper.set_phases(phases)

    def update(self, progress: Progress) -> None:
        """Show how far a stage is, and the time left."""
        left = self._keeper.update(progress)
        if self._bars:
            self._update_bar(TOTAL, self._compute_share(left), 1.0, describe_left(left))
            self._update_bar(progress.stage, progress.done, progress.total, progress.note)
            return
        tenth = int(10 * progress.done / progress.total) if progress.total else 10
        if tenth < self._tenths.get(progress.stage, 0):  # the stage starts once more
            self._tenths[progress.stage] = 0
        if tenth > self._tenths.get(progress.stage, 0):
            self._tenths[progress.stage] = tenth
            line = f"{progress.stage}: {10 * tenth} % {progress.note}".rstrip()
            left_text = describe_left(left)
            click.echo(escape_controls(f"{line}; {left_text}" if left_text else line), err=True)

    def _compute_share(self, left: TimeLeft | None) -> float:
        """Return the share of the command's time that has passed, if all of it is known."""
        elapsed = self._clock() - self._began
        if left is None or left.unknown:
            return 0.0
        return elapsed / (elapsed + left.seconds) if elapsed + left.seconds > 0 else 1.0

    def _update_bar(self, name: str, done: float, total: float, note: str) -> None:
        assert self._bars is not None  # checked by the caller
        task = self._tasks.get(name)
        if task is None:
            task = self._tasks[name] = self._bars.add_task(escape_controls(name), note="")
        self._bars.update(task, completed=done, total=total, note=escape_controls(note))


def make_columns() -> tuple[ProgressColumn, ...]:
    """Return the columns of the bars; red is for errors alone."""
    stage = Column(no_wrap=True, min_width=STAGE)
    note = Column(no_wrap=True, overflow="ellipsis")
    return (
        TextColumn("{task.description}", markup=False, table_column=stage),
        BarColumn(bar_width=BAR, complete_style="cyan", finished_style="green", pulse_style="cyan"),
        TextColumn("{task.percentage:>3.0f} %", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False, table_column=note),
    )


def describe_left(left: TimeLeft | None) -> str:
    """Return "4 min left", "40 s left, then benchmarks", or "" if nothing was measured."""
    if left is None:
        return ""
    then = f", then {', '.join(left.unknown)}" if left.unknown else ""
    if left.seconds < 1 and not then:
        return ""
    return f"{format_duration(left.seconds)} left{then}"
