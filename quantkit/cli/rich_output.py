"""Tables and progress bars, drawn by rich."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import click
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.segment import Segment

from quantkit.cli.console import escape_controls
from quantkit.progress import Progress

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
    """Progress with ETA on stderr: a bar per stage on a terminal, elsewhere a line per 10 %."""

    def __init__(self, bars: bool) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._bars = RichProgress(*columns, console=Console(stderr=True)) if bars else None
        self._tasks: dict[str, TaskID] = {}
        self._tenths: dict[str, int] = {}

    def __enter__(self) -> ProgressBar:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def update(self, progress: Progress) -> None:
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
