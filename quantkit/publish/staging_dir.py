"""Staging folder of a pull: it gets the final name only after everything in it was verified.

`<folder>.pulling` keeps the received data of an interrupted pull: complete files, and partial files
as `<name>.part`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import ArtifactError
from quantkit.io.files import (
    PART,
    make_folder,
    make_write_error,
    sha256_file,
    sync_folder,
    write_atomic,
)
from quantkit.io.lock import hold_lock
from quantkit.io.owned_dirs import MARKER, check_owned_dir, make_owned_dir, remove_owned_dir
from quantkit.publish.remote import PIECE_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpectedFile:
    """A file to fetch; sha256 is None if only the size is known."""

    name: str
    n_bytes: int
    sha256: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExistingFiles:
    """Files of an earlier pull: names of complete files, and bytes by name, partial files
    included.
    """

    complete: frozenset[str]
    n_bytes: Mapping[str, int]


class PartialDownload:
    """A file that is received in pieces, appended to an earlier part; `n_bytes` have arrived."""

    def __init__(self, path: Path, expected: ExpectedFile) -> None:
        self._path, self._part, self._expected = path, path.with_name(path.name + PART), expected
        make_folder(path.parent)
        try:
            self._file = self._part.open("ab+")
            self._digest, self.n_bytes = hashlib.sha256(), 0
            self._file.seek(0)
            while piece := self._file.read(PIECE_BYTES):
                self._count(piece)
        except OSError as fault:
            raise make_write_error(self._path, fault) from fault

    def write(self, piece: bytes) -> None:
        """Append the next piece."""
        try:
            self._file.write(piece)
        except OSError as fault:
            raise make_write_error(self._path, fault) from fault
        self._count(piece)

    def restart(self) -> None:
        """Discard the received bytes."""
        self._file.truncate(0)
        self._digest, self.n_bytes = hashlib.sha256(), 0

    def finish(self) -> bool:
        """Rename the part to the final name if size and hash match; return whether they do."""
        right = (
            self._expected.sha256 in {None, self._digest.hexdigest()}
            and self.n_bytes == self._expected.n_bytes
        )
        if right:
            try:
                self._file.flush()
                os.fsync(self._file.fileno())
                os.replace(self._part, self._path)
                sync_folder(self._path.parent)
            except OSError as fault:
                raise make_write_error(self._path, fault) from fault
        return right

    def close(self) -> None:
        """Close the file; the received bytes stay for the next run."""
        try:
            self._file.close()
        except OSError as fault:
            raise make_write_error(self._path, fault) from fault

    def _count(self, piece: bytes) -> None:
        self._digest.update(piece)
        self.n_bytes += len(piece)


class StagingDir:
    """The staging folder next to `path`; its lock allows one pull at a time."""

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, path.with_name(path.name + ".pulling")
        self.replaced = path.with_name(path.name + ".pulling.replaced")

    def prepare(self, expected: Iterable[ExpectedFile]) -> ExistingFiles:
        """Remove unexpected and wrong files; return the remaining ones."""
        files = {entry.name: entry for entry in expected}
        complete, parts = set(), dict[str, int]()
        try:
            for path in sorted(self.folder.rglob("*"), reverse=True):
                name = path.relative_to(self.folder).as_posix()
                part = files.get(name.removesuffix(PART))
                if path.is_dir() and not path.is_symlink():
                    if name != MARKER and not any(path.iterdir()):
                        path.rmdir()
                elif name in files and self._matches(path, files[name]):
                    complete.add(name)
                elif (
                    path.is_symlink()
                    or name in files
                    or part is None
                    or path.stat().st_size > part.n_bytes
                ):
                    path.unlink()
                else:
                    parts[part.name] = path.stat().st_size
        except OSError as fault:
            raise make_write_error(self.folder, fault) from fault
        n_bytes = {name: size for name, size in parts.items() if name not in complete}
        return ExistingFiles(
            complete=frozenset(complete),
            n_bytes=n_bytes | {name: files[name].n_bytes for name in complete},
        )

    def open_download(self, expected: ExpectedFile) -> PartialDownload:
        """Open a file to receive, after an earlier part if there is one."""
        return PartialDownload(self.folder / expected.name, expected)

    def put(self, name: str, content: bytes) -> None:
        """Write a small file."""
        make_folder((self.folder / name).parent)
        write_atomic(self.folder / name, content)

    def rename_into_place(self) -> None:
        """Rename the folder to its final name; an existing folder is replaced as a whole."""
        try:
            remove_owned_dir(self.replaced)
            for folder in (path for path in self.folder.rglob("*") if path.is_dir()):
                sync_folder(folder)
            sync_folder(self.folder)
            if self.path.exists():
                self.path.rename(self.replaced)
            self.folder.rename(self.path)
            sync_folder(self.path.parent)
        except OSError as fault:
            raise make_write_error(self.path, fault) from fault
        remove_owned_dir(self.replaced)

    @staticmethod
    def _matches(path: Path, expected: ExpectedFile) -> bool:
        if path.is_symlink() or path.stat().st_size != expected.n_bytes or expected.sha256 is None:
            return False
        return sha256_file(path, ArtifactError) == expected.sha256


@contextmanager
def open_staging_dir(path: Path) -> Iterator[StagingDir]:
    """Lock and create the staging folder of `path`; raises UsageError if it is in use."""
    staging = StagingDir(path)
    with hold_lock(path.with_name(path.name + ".pulling.lock"), "pull", "another folder"):
        check_owned_dir(staging.replaced)
        check_owned_dir(staging.folder)
        make_owned_dir(staging.folder)
        try:
            yield staging
        finally:
            with suppress(OSError):  # it was renamed, or keeps received data
                if all(path.name == MARKER for path in staging.folder.iterdir()):
                    (staging.folder / MARKER).rmdir()
                    staging.folder.rmdir()


def read_existing_manifest(path: Path, manifest: str) -> bytes | None:
    """Return the manifest at `path`; empty if something else is there, None for nothing or an empty
    folder.
    """
    if path.is_dir() and not path.is_symlink():
        if not any(path.iterdir()):
            return None
        file = path / manifest
        return file.read_bytes() if file.is_file() and not file.is_symlink() else b""
    return b"" if path.exists() or path.is_symlink() else None
