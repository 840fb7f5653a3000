"""Staging folder of a pull: it gets the final name only after everything in it was verified.

`<folder>.pulling` is a working folder (`io.owned_dirs`): marker, journal, and `artifact/` with the
received data of an interrupted pull: complete files, and partial files as `<name>.part`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from quantkit.artifact.replace import read_replaced, remove_replaced
from quantkit.errors import ArtifactError, UsageError
from quantkit.io.files import (
    PART,
    make_folder,
    make_write_error,
    open_part,
    sha256_file,
    sync_folder,
    write_atomic,
)
from quantkit.io.journal import Journal
from quantkit.io.lock import hold_lock
from quantkit.io.owned_dirs import (
    JOURNAL,
    OWNER_KEY,
    check_work_dir,
    make_owned_dir,
    make_owner_id,
    remove_owned_dir,
)
from quantkit.publish.remote import PIECE_BYTES

REMEDY = (
    "if nothing of yours is in it, remove it and pull again, else move it away or choose another "
    "folder"
)


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
            self._file = open(open_part(self._part), "rb+")  # noqa: SIM115  # `close` closes it
            self._digest, self.n_bytes = hashlib.sha256(), 0
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
        self._file.seek(0)
        self._file.truncate()
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
    """The working folder next to `path`, of which the artifact becomes `path`; its lock allows one
    pull at a time.
    """

    def __init__(self, path: Path, journal: Journal) -> None:
        self.path, self._journal = path, journal
        self.folder = journal.path.parent / "artifact"
        self.replaced = get_replaced_path(path)

    def prepare(self, expected: Iterable[ExpectedFile]) -> ExistingFiles:
        """Remove unexpected and wrong files; return the remaining ones."""
        files = {entry.name: entry for entry in expected}
        complete, parts = set(), dict[str, int]()
        try:
            for path in sorted(self.folder.rglob("*"), reverse=True):
                name = path.relative_to(self.folder).as_posix()
                part = files.get(name.removesuffix(PART))
                if path.is_dir() and not path.is_symlink():
                    if not any(path.iterdir()):
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
        """Rename the folder to its final name; an existing artifact is replaced as a whole.

        Raises UsageError if something else is at that name.
        """
        before = find_replaced(self._journal)
        if before is not None:
            remove_replaced(self.replaced, before)
        is_empty = (
            self.path.is_dir() and not self.path.is_symlink() and not any(self.path.iterdir())
        )
        replaced = None if is_empty else read_replaced(self.path)
        if replaced is not None:
            check_free(self.replaced)
            self._journal.append({"kind": "replaces", "manifest": replaced})
        try:
            for folder in (path for path in self.folder.rglob("*") if path.is_dir()):
                sync_folder(folder)
            sync_folder(self.folder)
            if replaced is not None:
                self.path.rename(self.replaced)
            self.folder.rename(self.path)
            sync_folder(self.path.parent)
        except OSError as fault:
            raise make_write_error(self.path, fault) from fault
        if replaced is not None:
            remove_replaced(self.replaced, replaced)

    @staticmethod
    def _matches(path: Path, expected: ExpectedFile) -> bool:
        if path.is_symlink() or path.stat().st_size != expected.n_bytes or expected.sha256 is None:
            return False
        return sha256_file(path, ArtifactError) == expected.sha256


def get_replaced_path(path: Path) -> Path:
    """Return the folder that holds a replaced artifact until the new one has its name."""
    return path.with_name(path.name + ".pulling.replaced")


def check_free(path: Path) -> None:
    """Check that nothing is at a path; raises UsageError."""
    if os.path.lexists(path):
        raise UsageError(f"{path}: expected nothing, found something; move it away")


def find_replaced(journal: Journal) -> str | None:
    """Return what identifies the artifact that an earlier pull replaced; None for nothing."""
    entries = [e["manifest"] for e in journal.entries if e.get("kind") == "replaces"]
    return entries[-1] if entries else None


@contextmanager
def open_staging_dir(path: Path) -> Iterator[StagingDir]:
    """Lock and create the staging folder of `path`; raises UsageError if it is in use or not made
    by a pull.
    """
    with hold_lock(path.with_name(path.name + ".pulling.lock"), "pull", "another folder"):
        work = path.with_name(path.name + ".pulling")
        owner = check_work_dir(work, REMEDY)
        journal = open_journal(work) if owner is not None else None
        if journal is None or find_replaced(journal) is None:
            check_free(get_replaced_path(path))
        if owner is None or journal is None:
            remove_owned_dir(work, None)
            owner = make_owner_id()
            make_owned_dir(work, owner)
            journal = Journal.begin(work / JOURNAL, {"kind": "began", OWNER_KEY: owner}, owner)
        staging = StagingDir(path, journal)
        make_real_folder(staging.folder)
        try:
            yield staging
        finally:
            with suppress(OSError):  # it was renamed, or keeps received data
                if not any(entry.is_file() for entry in staging.folder.rglob("*")):
                    remove_owned_dir(work, owner)


def open_journal(work: Path) -> Journal | None:
    """Open the journal of a working folder; raises UsageError for a damaged one."""
    try:
        return Journal.open(work / JOURNAL)
    except ArtifactError as fault:
        raise UsageError(f"{work}: its journal is damaged; {REMEDY}") from fault


def make_real_folder(folder: Path) -> None:
    """Make a folder; raises UsageError for a link in its place."""
    if folder.is_symlink():
        raise UsageError(f"{folder}: expected a folder, found a link; remove it")
    make_folder(folder)


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
