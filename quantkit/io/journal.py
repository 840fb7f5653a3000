"""What a long job has finished, one line of JSON per step, in a file that survives whatever ends the process.

    {"sha256": "<of the previous line's sha256 and this entry>", "entry": {...}}

The file is written beside its place and renamed with its first entry; further ones are appended and synced. A last line
that does not fit its sum was being written when the process ended: it is as if it had never been. Any other such line
is damage.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from quantkit.errors import ArtifactError
from quantkit.io.files import make_write_error, write_atomic

Entry = Mapping[str, Any]

_HEAD, _MIDDLE, _END = b'{"sha256":"', b'","entry":', b"}\n"
_SUM = 64  # characters of a sha256


class Journal:
    """The entries of one file, oldest first; `append` returns when its entry is on disk."""

    def __init__(self, path: Path, entries: list[Entry], last: str) -> None:
        self.path = path
        self.entries = entries
        self._last = last

    @classmethod
    def begin(cls, path: Path, first: Entry) -> Self:
        """A new file with one entry, in place of an old one; raises QuantkitError when the disk refuses."""
        line, digest = _line("", first)
        write_atomic(path, line)
        return cls(path, [first], digest)

    @classmethod
    def open(cls, path: Path) -> Self | None:
        """The entries of an earlier process, without a torn last one; None where there is no file.

        Raises ArtifactError for a file that is damaged, QuantkitError when the disk refuses.
        """
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as fault:
            raise make_write_error(path, fault) from fault
        entries, last, good = list[Entry](), "", 0
        while good < len(text):
            end = text.find(b"\n", good) + 1
            found = _entry(last, text[good:end])
            if found is None:
                break
            entry, last = found
            entries.append(entry)
            good = end
        torn = text[good:]
        if not entries or b"\n" in torn[:-1]:
            raise ArtifactError(
                f"{path}: line {len(entries) + 1}: expected an entry with its sha256, found another; the journal is "
                "damaged, begin anew with --restart"
            )
        if torn:
            _cut(path, good)
        return cls(path, entries, last)

    def append(self, entry: Entry) -> None:
        """Store one more entry; raises QuantkitError when the disk refuses, and the entry then counts as not made."""
        line, digest = _line(self._last, entry)
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            try:
                while line:
                    line = line[os.write(descriptor, line) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as fault:
            raise make_write_error(self.path, fault) from fault
        self._last = digest
        self.entries.append(entry)


def _line(before: str, entry: Entry) -> tuple[bytes, str]:
    return _framed(before, json.dumps(entry, ensure_ascii=False, separators=(",", ":")).encode())


def _framed(before: str, text: bytes) -> tuple[bytes, str]:
    digest = hashlib.sha256(before.encode() + text).hexdigest()
    return _HEAD + digest.encode() + _MIDDLE + text + _END, digest


def _entry(before: str, line: bytes) -> tuple[Entry, str] | None:
    """The entry of a line and its sum; None for a line that is not whole."""
    text = line[len(_HEAD) + _SUM + len(_MIDDLE) : -len(_END)]
    framed, digest = _framed(before, text)
    return (json.loads(text), digest) if framed == line else None


def _cut(path: Path, n_bytes: int) -> None:
    """Drop what stands behind the first bytes of a file."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.ftruncate(descriptor, n_bytes)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as fault:
        raise make_write_error(path, fault) from fault
