"""Tables for a terminal, as rich renderables that fit its width. Nothing is printed here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from rich import box
from rich.console import Console, ConsoleOptions, Group
from rich.table import Table as RichTable
from rich.text import Text

from quantkit.report.table import Table

WHOLE = 14  # characters of a word that is never broken where a table can do without
_PIECE = re.compile(r"[^./_,:=|-]*[./_,:=|-]+|[^./_,:=|-]+")


def render_table(table: Table) -> Group:
    """Return title, rows and note of a table; words and numbers are folded only on narrow lines."""
    note = [Text(strip_control_characters(table.note), style="dim")] if table.note else []
    return Group(
        Text(table.title, style="bold"),
        FittedTable(_each_cell(table, strip_control_characters)),
        *note,
        Text(),
    )


@dataclass(frozen=True)
class FittedTable:
    """The rows of a table, in columns that depend on the width of the terminal.

    A table that no layout fits into the line is shown as records: one line per cell.
    """

    table: Table

    def __rich_console__(
        self, _console: Console, options: ConsoleOptions
    ) -> Iterator[RichTable | Text]:
        """Yield the table for rich."""
        fitted = fit_table(self.table, options.max_width)
        if fitted is None:
            yield Text("\n".join(format_records(self.table, options.max_width)))
            return
        layout, widths = fitted
        shown = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        for name, width in zip(layout.columns, widths, strict=True):
            justify: Literal["left", "right"] = "right" if name.startswith(">") else "left"
            heading = wrap_cell(name.removeprefix(">"), width)
            shown.add_column(Text(heading), justify=justify, overflow="fold", width=width)
        for row in layout.rows:
            shown.add_row(*(Text(wrap_cell(*cell)) for cell in zip(row, widths, strict=True)))
        yield shown


def fit_table(table: Table, line: int) -> tuple[Table, list[int]] | None:
    """Return the first layout of a table that fits into a line, with its column widths; None if
    none does.

    A layout that keeps every word whole comes before one that breaks names at their dots and
    slashes, and both before layouts with one word of a number per line.
    """
    layouts = list(iterate_layouts(table))
    n_whole = sum(layout.rows in (layouts[0].rows, layouts[1].rows) for layout in layouts)
    for group in (layouts[:n_whole], layouts[n_whole:]):
        for split in (str.split, split_names):
            for layout in group:
                widths = compute_widths(layout, line, split)
                if widths is not None:
                    return layout, widths
    return None


def split_names(text: str) -> list[str]:
    """Return the pieces into which the words of a text may be broken: long ones after dots,
    slashes, ...
    """
    return [
        piece
        for word in text.split()
        for piece in ([word] if len(word) <= WHOLE else _PIECE.findall(word))
    ]


def wrap_cell(text: str, width: int) -> str:
    """Return a cell in lines of `width` characters, broken between words; a longer word is broken
    after a dot or slash, and inside a name only if that is longer, too.
    """
    lines: list[str] = []
    for paragraph in text.split("\n"):
        current = ""
        for word in paragraph.split(" "):
            joined = f"{current} {word}" if current else word
            if len(joined) <= width:
                current = joined
                continue
            if current:
                lines.append(current)
            *full, current = _break_word(word, width)
            lines += full
        lines.append(current)
    return "\n".join(lines)


def _break_word(word: str, width: int) -> list[str]:
    """Return the lines of one word, broken after punctuation where possible."""
    lines = [""]
    for piece in _PIECE.findall(word) or [word]:
        if len(lines[-1]) + len(piece) <= width:
            lines[-1] += piece
            continue
        if lines[-1]:
            lines.append("")
        lines[-1:] = [piece[at : at + width] for at in range(0, len(piece), width)]
    return lines


def format_records(table: Table, line: int) -> Iterator[str]:
    """Yield the lines of a table without columns: "heading: cell" for each cell that has text; all
    but a row's first are indented.
    """
    for row in table.rows:
        indent, mark = "", ""
        for name, cell in zip(table.columns, row, strict=True):
            heading, text = name.removeprefix(">").strip(), " ".join(cell.split())
            if not heading:  # a column of marks
                mark = f"{text} " if text else ""
            elif text:
                entry = wrap_cell(f"{mark}{heading}: {text}", line - len(indent))
                yield from (f"{indent}{part}" for part in entry.split("\n"))
                indent, mark = "  ", ""


def iterate_layouts(table: Table) -> Iterator[Table]:
    """Yield narrower and narrower layouts of a table.

    First unchanged; then with intervals below their numbers; then with headings of numbers, then
    numbers, one word per line, in one more column each time, the column that saves most first.
    """
    yield table
    table = _each_cell(table, lambda cell: cell.replace(" [", "\n["))
    yield table
    numbers_at = [index for index, name in enumerate(table.columns) if name.startswith(">")]
    for names in (True, False):
        gains = {
            index: _width(table, index) - _width(_stacked(table, index, names), index)
            for index in numbers_at
        }
        for index in sorted(
            filter(gains.__getitem__, numbers_at), key=gains.__getitem__, reverse=True
        ):
            table = _stacked(table, index, names)
            yield table


def _stacked(table: Table, index: int, names: bool) -> Table:
    """Return the table with one word per line in the heading of a column, or in its cells."""

    def stack(cells: tuple[str, ...]) -> tuple[str, ...]:
        return (*cells[:index], cells[index].replace(" ", "\n"), *cells[index + 1 :])

    return (
        replace(table, columns=stack(table.columns))
        if names
        else replace(table, rows=tuple(map(stack, table.rows)))
    )


def _width(table: Table, index: int) -> int:
    """Return the characters of the longest line in a column."""
    cells = (table.columns[index].removeprefix(">"), *(row[index] for row in table.rows))
    return max(len(line) for cell in cells for line in cell.split("\n"))


def _each_cell(table: Table, change: Callable[[str], str]) -> Table:
    rows = tuple(tuple(map(change, row)) for row in table.rows)
    return replace(table, columns=tuple(map(change, table.columns)), rows=rows)


def strip_control_characters(text: str) -> str:
    """Return one line without control characters, so that untrusted names cannot control a
    terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def compute_widths(
    table: Table, line: int, split: Callable[[str], list[str]] = str.split
) -> list[int] | None:
    """Return characters per column: the cells' width if it fits, at least a number or the longest
    piece of a text; None if that does not fit into a line.

    split: returns the pieces of a text that stay whole.
    """
    names = [name.removeprefix(">") for name in table.columns]
    cells = [[name, *(row[index] for row in table.rows)] for index, name in enumerate(names)]
    natural = [_width(table, index) for index in range(len(names))]
    widths = [
        full
        if name.startswith(">")
        else max(len(piece) for cell in column for piece in (split(cell) or [""]))
        for name, column, full in zip(table.columns, cells, natural, strict=True)
    ]
    spare = line - sum(widths) - 2 * len(widths) + 1  # a space and a divider between columns
    if spare < 0:
        return None
    words = [
        min(full, max(len(word) for cell in column for word in (cell.split() or [""])))
        for column, full in zip(cells, natural, strict=True)
    ]
    for goal in (words, natural):  # whole words come before fewer lines
        while spare > 0 and any(width < most for width, most in zip(widths, goal, strict=True)):
            narrowest = min(
                (i for i in range(len(widths)) if widths[i] < goal[i]), key=lambda i: widths[i]
            )
            widths[narrowest] += 1
            spare -= 1
    return widths
