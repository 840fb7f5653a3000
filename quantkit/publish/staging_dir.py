"""Where an artifact arrives: a folder beside its place, which takes the name only when everything in it was checked.

`<folder>.pulling` keeps what arrived when a pull breaks off; files are there whole or as `<name>.part`.
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
    """A file to fetch; without a sha256 only its size is known."""

    name: str
    n_bytes: int
    sha256: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExistingFiles:
    """What an earlier pull left: files that are whole and right, and bytes by name, of parts too."""

    whole: frozenset[str]
    n_bytes: Mapping[str, int]


class PartialDownload:
    """A file that arrives piece by piece behind what an earlier try left; `have` bytes are there."""

    def __init__(self, path: Path, wanted: ExpectedFile) -> None:
        self._path, self._part, self._wanted = path, path.with_name(path.name + PART), wanted
        make_folder(path.parent)
        try:
            self._file = self._part.open("ab+")
            self._digest, self.have = hashlib.sha256(), 0
            self._file.seek(0)
            while piece := self._file.read(PIECE_BYTES):
                self._count(piece)
        except OSError as fault:
            raise make_write_error(self._path, fault) from fault

    def write(self, piece: bytes) -> None:
        """Take what came next."""
        try:
            self._file.write(piece)
        except OSError as fault:
            raise make_write_error(self._path, fault) from fault
        self._count(piece)

    def forget(self) -> None:
        """Begin anew: what is there is wrong."""
        self._file.truncate(0)
        self._digest, self.have = hashlib.sha256(), 0

    def finish(self) -> bool:
        """Whether it is the wanted file, which then has its name."""
        right = (
            self._wanted.sha256 in {None, self._digest.hexdigest()}
            and self.have == self._wanted.n_bytes
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
        """Keep what arrived for the next time."""
        try:
            self._file.close()
        except OSError as fault:
            raise make_write_error(self._path, fault) from fault

    def _count(self, piece: bytes) -> None:
        self._digest.update(piece)
        self.have += len(piece)


class StagingDir:
    """The folder beside `path`, locked: one pull at a time."""

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, path.with_name(path.name + ".pulling")
        self.replaced = path.with_name(path.name + ".pulling.replaced")

    def prepare(self, wanted: Iterable[ExpectedFile]) -> ExistingFiles:
        """Remove what is not wanted or wrong; what is left."""
        files = {entry.name: entry for entry in wanted}
        whole, parts = set(), dict[str, int]()
        try:
            for path in sorted(self.folder.rglob("*"), reverse=True):
                name = path.relative_to(self.folder).as_posix()
                part = files.get(name.removesuffix(PART))
                if path.is_dir() and not path.is_symlink():
                    if name != MARKER and not any(path.iterdir()):
                        path.rmdir()
                elif name in files and self._is(path, files[name]):
                    whole.add(name)
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
        n_bytes = {name: size for name, size in parts.items() if name not in whole}
        return ExistingFiles(
            whole=frozenset(whole), n_bytes=n_bytes | {name: files[name].n_bytes for name in whole}
        )

    def open_download(self, wanted: ExpectedFile) -> PartialDownload:
        """A file, to be written."""
        return PartialDownload(self.folder / wanted.name, wanted)

    def put(self, name: str, content: bytes) -> None:
        """A small file at once."""
        make_folder((self.folder / name).parent)
        write_atomic(self.folder / name, content)

    def rename_into_place(self) -> None:
        """Rename the folder; what lies there is replaced as a whole."""
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
    def _is(path: Path, wanted: ExpectedFile) -> bool:
        if path.is_symlink() or path.stat().st_size != wanted.n_bytes or wanted.sha256 is None:
            return False
        return sha256_file(path, ArtifactError) == wanted.sha256


@contextmanager
def open_staging_dir(path: Path) -> Iterator[StagingDir]:
    """The place where an artifact named `path` arrives; UsageError when it is not free for that."""
    place = StagingDir(path)
    with hold_lock(path.with_name(path.name + ".pulling.lock"), "pull", "another folder"):
        check_owned_dir(place.replaced)
        check_owned_dir(place.folder)
        make_owned_dir(place.folder)
        try:
            yield place
        finally:
            with suppress(OSError):  # it has its name, or keeps what arrived
                if all(path.name == MARKER for path in place.folder.iterdir()):
                    (place.folder / MARKER).rmdir()
                    place.folder.rmdir()


def read_existing_manifest(path: Path, manifest: str) -> bytes | None:
    """The manifest of the artifact at `path`, empty for something else there; None for nothing or an empty folder."""
    if path.is_dir() and not path.is_symlink():
        if not any(path.iterdir()):
            return None
        place = path / manifest
        return place.read_bytes() if place.is_file() and not place.is_symlink() else b""
    return b"" if path.exists() or path.is_symlink() else None
