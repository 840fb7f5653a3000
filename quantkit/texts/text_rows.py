"""Documents from rows of text files: `.jsonl`, `.parquet`, plain text, or a folder of them.

A row is a mapping of columns; a template such as "{question}\\n{answer}" makes a document of it.
Cells that are empty or null are skipped and counted, cells of another type are refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from quantkit.errors import CalibrationError
from quantkit.io.files import is_encodable, is_file, read_bytes, read_prefix_at_most, shorten_repr
from quantkit.texts.chats import Chat, is_message_list, read_chats
from quantkit.texts.mixture_spec import list_template_columns

MAX_BYTES = 1_000_000_000
"""Size limit of a file; calibration uses thousands of times less text."""

PROBED_BYTES = 4_000_000
"""Bytes of a file in which its columns are searched."""

MAX_FOLDER_FILES = 10_000
PLAIN_SUFFIXES = (".md", ".raw", ".txt")  # wikitext's files end in .raw
SUFFIXES = (".jsonl", ".parquet", *PLAIN_SUFFIXES)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRows:
    """Documents or chats, the number of rows without any, and the sha256 of the bytes or rows read.

    One of `texts` and `chats` is empty.
    """

    texts: tuple[str, ...] = ()
    chats: tuple[Chat, ...] = ()
    skipped: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RowReader:
    """How rows are read: as chats of the column `messages`, or as documents of a template.

    skip: rows at the start of a file that are skipped. skip_unreadable: whether cells that are no
    chats are counted instead of raising an error.
    """

    template: str = "{text}"
    messages: str | None = None
    skip: int = 0
    skip_unreadable: bool = False

    def read(
        self, rows: Iterable[Mapping[str, Any]], where: str, limit: int
    ) -> tuple[list[str], list[Chat], int]:
        """Return at most `limit` documents or chats, and the number of rows without any."""
        if self.messages is not None:
            chats, skipped = read_chats(
                rows, self.messages, where, limit, skip_unreadable=self.skip_unreadable
            )
            return [], chats, skipped
        texts, skipped = fill_template(rows, self.template, where, limit)
        return texts, [], skipped


def read_text_rows(path: Path, reader: RowReader, limit: int) -> TextRows:
    """Read at most `limit` documents of a file or of a folder's files in the order of their names.

    A file of plain text has one column, `text`, and a document per paragraph (separated by blank
    lines). Raises CalibrationError with file and row.
    """
    files = list_text_files(path)
    digest, texts, chats, skipped = hashlib.sha256(), list[str](), list[Chat](), 0
    for file in files:
        data = read_bytes(file, MAX_BYTES, CalibrationError)
        digest.update(data if len(files) == 1 else hashlib.sha256(data).digest())
        remaining = limit - len(texts) - len(chats)
        documents, conversations, empty = reader.read(
            islice(iterate_rows(file, data), reader.skip, None), str(file), remaining
        )
        texts += documents
        chats += conversations
        skipped += empty
        if len(texts) + len(chats) >= limit:
            break
    return TextRows(
        texts=tuple(texts), chats=tuple(chats), skipped=skipped, sha256=digest.hexdigest()
    )


def list_text_files(path: Path) -> list[Path]:
    """Return the file itself, or the text files of a folder and its subfolders, sorted."""
    if path.is_dir():
        entries = (file for file in path.rglob("*") if not file.is_symlink())
        files = sorted(file for file in entries if file.suffix in SUFFIXES)
        if not files or len(files) > MAX_FOLDER_FILES:
            raise CalibrationError(
                f"{path}: expected 1 to {MAX_FOLDER_FILES:,} files that end in "
                f"{', '.join(SUFFIXES)}, found {len(files):,}"
            )
        return files
    if not is_file(path) or path.suffix not in SUFFIXES:
        actual = "no such file" if not is_file(path) else f"a file that ends in {path.suffix!r}"
        raise CalibrationError(
            f"{path}: expected a folder or a file that ends in {', '.join(SUFFIXES)}, found "
            f"{actual}. Correct the path"
        )
    return [path]


def iterate_first_rows(file: Path) -> Iterator[Mapping[str, object]]:
    """Yield the rows in the first bytes of a `.jsonl` file, or those of a Parquet file."""
    if file.suffix == ".parquet":
        yield from _iterate_parquet(file, str(file))
        return
    data = read_prefix_at_most(file, PROBED_BYTES)
    whole = data if len(data) < PROBED_BYTES else data.rpartition(b"\n")[0]
    yield from iterate_rows(file, whole)


def iterate_rows(file: Path, data: bytes) -> Iterator[Mapping[str, object]]:
    """Yield the rows of a file as mappings of columns."""
    if file.suffix == ".parquet":
        import pyarrow  # noqa: PLC0415  # a heavy library that only Parquet files need

        yield from _iterate_parquet(file, pyarrow.BufferReader(data))
        return
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{file}: expected UTF-8, found byte {data[error.start]:#04x} at offset {error.start}. "
            "Convert the file"
        ) from None
    if file.suffix in PLAIN_SUFFIXES:
        for paragraph in text.replace("\r\n", "\n").split("\n\n"):
            yield {"text": paragraph.strip("\n")}
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(
                f"{file}:{number}: expected a JSON object per line, found: {str(error):.100}. "
                "Correct the line"
            ) from None
        if not isinstance(row, dict):
            raise CalibrationError(
                f"{file}:{number}: expected a JSON object per line, found {shorten_repr(row)}"
            )
        yield row


def _iterate_parquet(file: Path, source: Any) -> Iterator[Mapping[str, object]]:
    import pyarrow as arrow  # noqa: PLC0415  # a heavy library that only Parquet files need
    import pyarrow.parquet as parquet  # noqa: PLC0415

    try:
        table = parquet.ParquetFile(source)
        for batch in table.iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise CalibrationError(
            f"{file}: expected a Parquet file, found: {str(error):.200}. Replace the file"
        ) from None


def fill_template(
    rows: Iterable[Mapping[str, Any]], template: str, where: str, limit: int
) -> tuple[list[str], int]:
    """Return at most `limit` documents made of rows, and the number of rows without text.

    A row with an empty or null cell is skipped. Raises CalibrationError for a column that is
    missing, and for a cell that is not text.
    """
    columns, texts, skipped = list_template_columns(template), list[str](), 0
    for number, row in enumerate(rows, start=1):
        if len(texts) >= limit:
            break
        cells = {column: row[column] for column in columns if column in row}
        missing = [column for column in columns if column not in cells]
        if missing:
            known = ", ".join(islice((shorten_repr(str(name)) for name in row), 12))
            raise CalibrationError(
                f"{where}: row {number}: expected the column {missing[0]!r} of `template`, found "
                f"{known or 'none'}. Name columns of the file in `template`"
            )
        for column, cell in cells.items():
            if cell is not None and not isinstance(cell, str):
                advice = (
                    f"Use `messages: {column}` with `packing: chats`"
                    if is_message_list(cell)
                    else "Name another column in `template`"
                )
                raise CalibrationError(
                    f"{where}: row {number}: {column}: expected text, found "
                    f"{shorten_repr(cell)}. {advice}"
                )
        if any(cell is None or not cell.strip() for cell in cells.values()):
            skipped += 1
            continue
        text = template.format(**cells)
        if not is_encodable(text):
            raise CalibrationError(
                f"{where}: row {number}: expected text, found half a surrogate pair (\\ud800 to "
                "\\udfff). Correct the row"
            )
        texts.append(text)
    return texts, skipped
