"""A text file as a set of its own: the path of a `.jsonl`, `.parquet` or `.txt` file, or a folder.

    chats.jsonl                          the column `messages`, `conversations` or `text`
    chats.jsonl?column=dialogue          another column: messages, or text
    chats.jsonl?count=all                prompts count, too, not only the assistant's answers
    chats.jsonl?refused=skip             chats that cannot be used are counted, not an error

It is read as a mixture of one part. The column decides: a list of messages goes through the model's
chat template, text is cut into windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from urllib.parse import parse_qsl

from quantkit.errors import CalibrationError, UsageError
from quantkit.io.files import is_file, shorten_repr
from quantkit.texts.chats import is_message_list
from quantkit.texts.mixture_spec import Count, MixtureFile, PartFile, Refused
from quantkit.texts.text_rows import PLAIN_SUFFIXES, SUFFIXES, iterate_first_rows, list_text_files

CHAT_COLUMNS = ("messages", "conversations", "conversation", "dialog")
TEXT_COLUMNS = ("text", "content")
COUNTS: Mapping[str, Count] = {"answers": "answers", "all": "all"}
REFUSED: Mapping[str, Refused] = {"stop": "stop", "skip": "skip"}
KEYS = ("column", "count", "refused")
UNKNOWN_LICENSE = "not stated"
PROBED_ROWS = 100
"""Rows in which the first cell of a column is searched."""


@dataclass(frozen=True, kw_only=True)
class PlainFile:
    """A path and its query: the column, the tokens of chats that count, and how unusable chats are
    treated.
    """

    path: Path
    column: str | None
    count: Count
    refused: Refused = "stop"


def parse_plain_file(name: str) -> PlainFile | None:
    """Return the file that the name of a set stands for; None for a spec or a shipped set.

    Raises UsageError for a query that is none.
    """
    path_text, _, query = name.partition("?")
    path = Path(path_text)
    is_folder = "/" in path_text and path.is_dir()
    if path.suffix not in SUFFIXES and not is_folder:
        return None
    values = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := [key for key in values if key not in KEYS] or (query and not values):
        raise UsageError(
            f"set {shorten_repr(name)}: expected {', '.join(KEYS)} after the question mark, "
            f"found {shorten_repr(unknown[0] if isinstance(unknown, list) else query)}; write "
            "?column=NAME&count=all"
        )
    count, refused = values.get("count", "answers"), values.get("refused", "stop")
    choices: tuple[tuple[str, str, Mapping[str, object]], ...] = (
        ("count", count, COUNTS),
        ("refused", refused, REFUSED),
    )
    for key, value, known in choices:
        if value not in known:
            raise UsageError(
                f"set {shorten_repr(name)}: {key}: expected {' or '.join(known)}, found "
                f"{shorten_repr(value)}"
            )
    if not is_file(path) and not is_folder:
        raise UsageError(f"{path}: expected a text file, found no such file. Correct the path")
    return PlainFile(
        path=path, column=values.get("column"), count=COUNTS[count], refused=REFUSED[refused]
    )


def make_plain_mixture(plain: PlainFile) -> MixtureFile:
    """Return a file as a mixture of one part; reads its first rows.

    Raises CalibrationError if no column has text or messages.
    """
    column, is_chat = find_column(plain)
    part = PartFile(
        name="text",
        kind="text",
        licence=UNKNOWN_LICENSE,
        file=plain.path.name,
        packing="chats" if is_chat else "windows",
        template="{text}" if is_chat else f"{{{column}}}",
        messages=column if is_chat else None,
        count=plain.count,
        refused=plain.refused,
    )
    return MixtureFile(version=2, name=plain.path.name, parts=(part,))


def find_column(plain: PlainFile) -> tuple[str, bool]:
    """Return the column to read, and whether it holds messages."""
    file = list_text_files(plain.path)[0]
    if file.suffix in PLAIN_SUFFIXES:
        if plain.column not in {None, "text"}:
            raise CalibrationError(
                f"{file}: column: expected none for plain text, found {shorten_repr(plain.column)}"
            )
        return "text", False
    rows = list(islice(iterate_first_rows(file), PROBED_ROWS))
    known = list(dict.fromkeys(str(name) for row in rows for name in row))
    names = (plain.column,) if plain.column is not None else (*CHAT_COLUMNS, *TEXT_COLUMNS)
    for name in names:
        cells = (row[name] for row in rows if row.get(name) is not None)
        cell = next(cells, None)
        if is_message_list(cell):
            return name, True
        if isinstance(cell, str) and name.isidentifier():
            return name, False
        if cell is not None and plain.column is not None:
            raise CalibrationError(
                f"{file}: {name}: expected text or a list of messages, found {shorten_repr(cell)}. "
                "Name another column after ?column="
            )
    wanted = plain.column or ", ".join((*CHAT_COLUMNS, *TEXT_COLUMNS))
    raise CalibrationError(
        f"{file}: expected a column {wanted} with text or messages, found "
        f"{', '.join(map(shorten_repr, known[:12])) or 'no rows'}. Name a column after ?column=, "
        "or write a spec with a `template`"
    )
