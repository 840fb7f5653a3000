"""A local or mounted folder: `file:///folder`, or its path."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from urllib.parse import unquote

from quantkit.errors import ArtifactError, TransferError, UsageError
from quantkit.io.files import (
    JSON_LIMIT_BYTES,
    PART,
    describe_os_error,
    expand_home,
    make_folder,
    make_write_error,
    open_part,
    read_bytes,
    sha256_file,
    shorten_repr,
    sync_folder,
)
from quantkit.io.lock import hold_lock
from quantkit.io.path_safety import check_no_link
from quantkit.publish.hashed_upload import HashedReader
from quantkit.publish.remote import (
    PIECE_BYTES,
    BytesCallback,
    RemoteOptions,
    RemoteScheme,
    RemoteState,
    UploadFile,
)

_MOST_FILES = 100_000
"""More files than any artifact has; the limit stops a listing of `/` early."""


class FolderRemote:
    """A folder with an artifact's files; a lock allows one publication at a time."""

    def __init__(self, path: Path, jobs: int) -> None:
        self.where = str(path)
        self._path, self._jobs = path, jobs
        self._open = ExitStack()

    def list_remote(self, items: Sequence[UploadFile], manifest: str) -> RemoteState:
        """Compare files of equal size by hash; raises UsageError for a folder inside the
        artifact.
        """
        source = items[0].path.parents[items[0].name.count("/")].resolve()
        if source in self._path.resolve().parents:
            raise UsageError(
                f"{self.where}: expected a folder outside the artifact {source}; choose another "
                "folder"
            )
        present = self._present()
        same = [item for item in items if present.get(item.name) == item.n_bytes]
        with ThreadPoolExecutor(max_workers=self._jobs) as pool:
            hashes = list(pool.map(self._hash, [item.name for item in same]))
        there = {item.name for item, sha256 in zip(same, hashes) if sha256 == item.sha256}
        others = (
            set(present)
            - {i.name for i in items}
            - {i.name + PART for i in items}
            - {manifest, manifest + PART}
        )
        return RemoteState(
            present=frozenset(there),
            manifest=self.fetch_manifest(manifest),
            others=tuple(sorted(others)),
        )

    def begin_upload(self, gone: Sequence[str]) -> None:
        """Lock and create the folder, and remove the replaced files."""
        lock = self._path.with_name(self._path.name + ".publishing.lock")
        self._open.enter_context(hold_lock(lock, "publication", "another folder"))
        make_folder(self._path)
        try:
            for name in gone:
                check_no_link(self._path, name).unlink(missing_ok=True)
                sync_folder((self._path / name).parent)
        except OSError as fault:
            raise make_write_error(self._path, fault) from fault

    def send(self, item: UploadFile, report_bytes: BytesCallback) -> None:
        """Write a part and rename it; an earlier part is compared with the file and continued."""
        target = check_no_link(self._path, item.name)
        part = target.with_name(target.name + PART)
        make_folder(target.parent)
        try:
            with HashedReader(item) as pieces, open(open_part(part), "r+b") as file:
                for piece in pieces:
                    if file.read(len(piece)) != piece:
                        file.seek(pieces.sent - len(piece))
                        file.truncate()
                        file.write(piece)
                    report_bytes(pieces.sent)
                file.truncate(item.n_bytes)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
            sync_folder(target.parent)
        except OSError as fault:
            raise make_write_error(target, fault) from fault

    def finalize(self, items: Sequence[UploadFile], manifest: UploadFile) -> str:
        """Check that all files exist, then write the manifest."""
        present = self._present()
        for item in items:
            if present.get(item.name) != item.n_bytes:
                raise TransferError(
                    f"{self.where}: {shorten_repr(item.name)}: expected the {item.n_bytes} bytes "
                    f"that were written, found {present.get(item.name, 'no file')}; publish again"
                )
        self.send(manifest, lambda _: None)
        return self.where

    def fetch_manifest(self, name: str) -> bytes | None:
        """Return the content of the manifest, or None."""
        path = self._path / name
        if path.is_symlink() or not path.is_file():
            return None
        return read_bytes(path, JSON_LIMIT_BYTES, ArtifactError)

    def sizes(self) -> Mapping[str, int]:
        """Return the bytes of regular files; links count as absent."""
        return {
            name: size
            for name, size in self._present().items()
            if not (self._path / name).is_symlink()
        }

    def read(self, name: str, first: int) -> Generator[bytes, None, None]:
        """Yield the bytes of a file; raises TransferError if a link leads out of the folder."""
        path = self._path / name
        if not path.resolve().is_relative_to(self._path.resolve()) or path.is_symlink():
            raise TransferError(
                f"{path}: expected a file in this folder, found a link out of it; remove it"
            )
        try:
            with path.open("rb") as file:
                file.seek(first)
                while piece := file.read(PIECE_BYTES):
                    yield piece
        except OSError as fault:
            raise TransferError(
                f"{path}: expected a readable file, found: {describe_os_error(fault)}; check it"
            ) from fault

    def close(self) -> None:
        """Release the lock."""
        self._open.close()

    def _present(self) -> dict[str, int]:
        """Return the size of every file and link below the folder."""
        paths = (path for path in self._path.rglob("*") if path.is_symlink() or not path.is_dir())
        sizes = {
            path.relative_to(self._path).as_posix(): path.lstat().st_size
            for path in islice(paths, _MOST_FILES)
        }
        if len(sizes) == _MOST_FILES:
            raise UsageError(
                f"{self.where}: expected the folder of an artifact, found {_MOST_FILES} files; "
                "check the path"
            )
        return sizes

    def _hash(self, name: str) -> str | None:
        path = self._path / name
        return None if path.is_symlink() else sha256_file(path, ArtifactError)


def open_folder(rest: str, text: str, options: RemoteOptions) -> FolderRemote:
    """Open the folder of a path or file URL; raises UsageError for another machine's URL."""
    if text != rest:
        host, slash, tail = rest.partition("/")
        if not slash or host not in {"", "localhost"}:
            raise UsageError(
                f"{text}: expected a folder of this machine like file:///folder, found "
                f"{shorten_repr(host)}"
            )
        rest = "/" + unquote(tail)
    path = expand_home(rest).absolute()
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path}: expected a folder or nothing, found a file; choose another path")
    return FolderRemote(path, options.jobs)


REMOTE = RemoteScheme(open=open_folder)
