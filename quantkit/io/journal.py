"""The journal of a long job: one line of JSON per finished step, safe against any crash.

    {"sha256": "<of the previous line's sha256 and this entry>", "entry": {...}}

The file is written next to its place and renamed with its first entry; later entries are appended
and synced. A last line with a wrong hash was being written when the process ended and is dropped.
Any other line with a wrong hash is damage. A link in place of the file is an error.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from quantkit.errors import ArtifactError
from quantkit.io.files import make_write_error, open_plain_file, write_all, write_atomic

Entry = Mapping[str, Any]

MAX_BYTES = 4 << 30
"""Largest journal: records of DeepSeek-V3's 45,000 modules, several times over, have 300 MB."""
MAX_FIRST_BYTES = 16 << 20
"""Largest first line: it names a few hundred files and packages."""

_HEAD, _MIDDLE, _END = b'{"sha256":"', b'","entry":', b"}\n"
_HASH_LENGTH = 64  # characters of a sha256


class Journal:
    """The entries of one file, oldest first; `append` returns when its entry is on disk."""

    def __init__(self, path: Path, entries: list[Entry], last_hash: str) -> None:
        self.path = path
        self.entries = entries
        self._last_hash = last_hash

    @classmethod
    def begin(cls, path: Path, first: Entry, token: str | None = None) -> Self:
        """Start a new file with one entry, replacing an old file; raises QuantkitError.

        `token` names the unfinished file, as in `write_atomic`.
        """
        line, digest = _format_line("", first)
        write_atomic(path, line, token)
        return cls(path, [first], digest)

    @classmethod
    def open(cls, path: Path) -> Self | None:
        """Read the entries of an earlier process, without a torn last one; None without a file.

        Raises ArtifactError for a damaged file, QuantkitError if the disk refuses.
        """
        text = _read(path, MAX_BYTES + 1)
        if text is None:
            return None
        if len(text) > MAX_BYTES:
            raise ArtifactError(
                f"{path}: expected at most {MAX_BYTES} bytes, found more; the journal is damaged, "
                "start over with --restart"
            )
        entries, last_hash, n_good = list[Entry](), "", 0
        while n_good < len(text):
            end = text.find(b"\n", n_good) + 1
            parsed = _parse_line(last_hash, text[n_good:end])
            if parsed is None:
                break
            entry, last_hash = parsed
            entries.append(entry)
            n_good = end
        torn = text[n_good:]
        if not entries or b"\n" in torn[:-1]:
            raise ArtifactError(
                f"{path}: line {len(entries) + 1}: expected an entry with its sha256, found "
                "another; the journal is damaged, start over with --restart"
            )
        if torn:
            _truncate(path, n_good)
        return cls(path, entries, last_hash)

    def append(self, entry: Entry) -> None:
        """Store one more entry; raises QuantkitError and keeps the old ones if the disk refuses."""
        line, digest = _format_line(self._last_hash, entry)
        try:
            descriptor = open_plain_file(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                write_all(descriptor, line)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as fault:
            raise make_write_error(self.path, fault) from fault
        self._last_hash = digest
        self.entries.append(entry)


def read_first_entry(path: Path) -> Entry | None:
    """Return the first entry of a journal, whatever follows it; None without a file or a good
    first line.

    Raises QuantkitError if the disk refuses.
    """
    text = _read(path, MAX_FIRST_BYTES) or b""
    parsed = _parse_line("", text[: text.find(b"\n") + 1])
    return parsed[0] if parsed else None


def _read(path: Path, n_bytes: int) -> bytes | None:
    """Return at most `n_bytes` bytes of a file; None without one."""
    try:
        with open(open_plain_file(path, os.O_RDONLY), "rb") as file:
            return file.read(min(n_bytes, os.fstat(file.fileno()).st_size))
    except FileNotFoundError:
        return None
    except OSError as fault:
        raise make_write_error(path, fault) from fault


def _format_line(last_hash: str, entry: Entry) -> tuple[bytes, str]:
    """Return the line of an entry, and its sha256."""
    text = json.dumps(entry, ensure_ascii=False, separators=(",", ":")).encode()
    return _frame(last_hash, text)


def _frame(last_hash: str, text: bytes) -> tuple[bytes, str]:
    digest = hashlib.sha256(last_hash.encode() + text).hexdigest()
    return _HEAD + digest.encode() + _MIDDLE + text + _END, digest


def _parse_line(last_hash: str, line: bytes) -> tuple[Entry, str] | None:
    """Return the entry of a line and its sha256; None for an incomplete or damaged line."""
    text = line[len(_HEAD) + _HASH_LENGTH + len(_MIDDLE) : -len(_END)]
    framed, digest = _frame(last_hash, text)
    if framed != line:
        return None
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):  # another program's line with a right hash
        return None
    return (entry, digest) if isinstance(entry, dict) else None


def _truncate(path: Path, n_bytes: int) -> None:
    """Cut a file after its first `n_bytes` bytes."""
    try:
        descriptor = open_plain_file(path, os.O_WRONLY)
        try:
            os.ftruncate(descriptor, n_bytes)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as fault:
        raise make_write_error(path, fault) from fault
