"""Schemes of fsspec that have no file of their own: `gs://bucket/prefix`, `az://...`, `sftp://...`.

Existing files are compared by the MD5 that the store keeps (Google Cloud Storage), otherwise by
reading them back. fsspec finds the credentials. Its cache of listings is always bypassed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import Any

import fsspec
from fsspec.callbacks import Callback

from quantkit.errors import TransferError, UsageError
from quantkit.io.bounded_http import (
    MIN_BYTES_PER_SECOND,
    RATE_WINDOW_SECONDS,
    call_with_deadline,
)
from quantkit.io.files import JSON_LIMIT_BYTES, shorten_repr
from quantkit.io.retry import TransientError
from quantkit.publish.hashed_upload import HashedReader
from quantkit.publish.remote import (
    PIECE_BYTES,
    BytesCallback,
    RemoteOptions,
    RemoteScheme,
    RemoteState,
    UploadFile,
    describe_exception,
    remove_secrets,
    translate_errors,
)

_UNSUPPORTED = frozenset({
    "async_wrapper",
    "asynclocal",
    "asyncwrapper",
    "blockcache",
    "cached",
    "dask",
    "data",
    "dir",
    "dvc",
    "filecache",
    "generic",
    "gist",
    "git",
    "github",
    "http",
    "https",
    "jlab",
    "jupyter",
    "libarchive",
    "pyscript",
    "reference",
    "root",
    "simplecache",
    "tar",
    "wandb",
    "zip",
})
"""fsspec protocols that wrap others, have their own kinds of files, or cannot list files."""

MAX_FILES = 100_000
"""More files than any artifact has."""
LISTING_SECONDS = 600.0
"""Time of a listing; stores list 1,000 files in a second."""

MIN_PIECE_BYTES = 64 << 10
"""First request size after a broken connection; it doubles after each piece."""


class FsspecRemote:
    """Files below a prefix of an fsspec file system."""

    def __init__(
        self,
        files: Any,
        root: str,
        where: str,
        read_range: Callable[[str, int, int], bytes] | None = None,
        list_files: Callable[[], dict[str, int]] | None = None,
    ) -> None:
        """read_range(path, first, last), list_files(): bounded ones of a scheme; default: those of
        fsspec, which hold the whole answer of the store.
        """
        self.where = where
        self.files, self._root = files, root.rstrip("/")
        self._read, self._list = read_range, list_files
        self._sizes: dict[str, int] | None = None
        self._piece_bytes = PIECE_BYTES

    def path_of(self, name: str) -> str:
        """Return the file system's path of a file."""
        return f"{self._root}/{name}"

    def list_remote(self, items: Sequence[UploadFile], manifest: str) -> RemoteState:
        """Compare files of equal size by hash."""
        present = self._listing()
        there = {i.name for i in items if present.get(i.name) == i.n_bytes and self.holds(i)}
        others = sorted(set(present) - {item.name for item in items} - {manifest})
        existing = self.fetch_manifest(manifest) if manifest in present else None
        return RemoteState(present=frozenset(there), manifest=existing, others=tuple(others))

    def holds(self, item: UploadFile) -> bool:
        """Whether the remote file, which has the item's size, has its content."""
        with translate_errors(self.where):
            md5 = self.files.info(self.path_of(item.name)).get("md5Hash")
        if isinstance(md5, str):
            try:
                return base64.b64decode(md5, validate=True) == compute_md5(item)
            except binascii.Error:
                pass
        digest = hashlib.sha256()
        for piece in self._pieces(item.name, 0, item.n_bytes):
            digest.update(piece)
        return digest.hexdigest() == item.sha256

    def begin_upload(self, gone: Sequence[str]) -> None:
        """Remove the replaced files, the manifest first."""
        for name in gone:
            with translate_errors(self.where):
                if self.files.exists(self.path_of(name)):
                    self.files.rm_file(self.path_of(name))

    def send(self, item: UploadFile, report_bytes: BytesCallback) -> None:
        """Upload a file; stores show an object only when it is complete."""
        with HashedReader(item) as pieces:  # hash first: the store does not check
            for _ in pieces:
                pass
        callback = Callback(hooks={"arrived": lambda _size, value: report_bytes(value)})
        with translate_errors(self.where):
            self.files.put_file(str(item.path), self.path_of(item.name), callback=callback)

    def finalize(self, items: Sequence[UploadFile], manifest: UploadFile) -> str:
        """Check that all files exist, then write the manifest."""
        check_sizes(self.where, items, self._listing())
        with translate_errors(self.where):
            self.files.pipe_file(self.path_of(manifest.name), manifest.path.read_bytes())
        return self.where

    def fetch_manifest(self, name: str) -> bytes | None:
        """Return the manifest, or None, also for a missing bucket."""
        try:
            with translate_errors(self.where):
                size = int(self.files.info(self.path_of(name))["size"])
        except TransferError as fault:
            if isinstance(fault.__cause__, FileNotFoundError):
                return None
            raise
        if size > JSON_LIMIT_BYTES:
            raise TransferError(
                f"{self.where}: {name}: expected at most {JSON_LIMIT_BYTES} bytes, found {size}; "
                "this is not a manifest"
            )
        return b"".join(self._pieces(name, 0, size))

    def sizes(self) -> Mapping[str, int]:
        """Return the bytes of every file below the prefix."""
        self._sizes = self._listing()
        return self._sizes

    def read(self, name: str, first: int) -> Generator[bytes, None, None]:
        """Yield a file range by range."""
        sizes = self._sizes if self._sizes is not None else self.sizes()
        if name not in sizes:
            raise TransferError(
                f"{self.where}: {shorten_repr(name)}: expected a file, found none; publish it again"
            )
        return self._pieces(name, first, sizes[name])

    def close(self) -> None:
        """Do nothing: fsspec keeps file systems for the whole process."""

    def _pieces(self, name: str, first: int, end: int) -> Generator[bytes, None, None]:
        while first < end:
            last = min(first + self._piece_bytes, end)
            try:
                with translate_errors(f"{self.where}: {shorten_repr(name)}"):
                    piece = self._read_range(name, first, last)
            except TransientError:  # a piece arrives completely or not at all
                self._piece_bytes = MIN_PIECE_BYTES
                raise
            self._piece_bytes = min(2 * self._piece_bytes, PIECE_BYTES)
            if not piece:
                return
            if len(piece) > last - first:
                raise TransferError(
                    f"{self.where}: {shorten_repr(name)}: expected {last - first:,} bytes, found "
                    f"{len(piece):,}; the store ignores ranges, or expands the file"
                )
            first += len(piece)
            yield piece

    def _read_range(self, name: str, first: int, last: int) -> bytes:
        """Read bytes `first` to `last` - 1, at MIN_BYTES_PER_SECOND or faster."""
        if self._read is not None:
            return self._read(self.path_of(name), first, last)
        read = partial(self.files.cat_file, self.path_of(name), start=first, end=last)
        return bytes(call_with_deadline(read, compute_seconds(last - first)))

    def _listing(self) -> dict[str, int]:
        with translate_errors(self.where):
            self.files.invalidate_cache()
            try:
                entries = call_with_deadline(self._find, LISTING_SECONDS)
            except FileNotFoundError:
                return {}
        return check_count(entries, self.where)

    def _find(self) -> dict[str, int]:
        """Return the bytes of every file by name."""
        if self._list is not None:
            return self._list()
        start = len(self._root) + 1
        return {
            path[start:]: int(info["size"])
            for path, info in self.files.find(self._root, detail=True).items()
            if info.get("type") == "file"
        }


def compute_seconds(n_bytes: int) -> float:
    """Return the longest time to read some bytes."""
    return RATE_WINDOW_SECONDS + n_bytes / MIN_BYTES_PER_SECOND


def check_count(files: dict[str, int], where: str) -> dict[str, int]:
    """Return a listing; raises TransferError for more than MAX_FILES files."""
    if len(files) > MAX_FILES:
        raise TransferError(
            f"{where}: expected the folder of an artifact, found more than {MAX_FILES:,} files; "
            "check the address"
        )
    return files


def compute_md5(item: UploadFile) -> bytes:
    """Return the MD5 of a file, which stores keep next to their own checksums."""
    digest = hashlib.md5(usedforsecurity=False)
    with HashedReader(item) as pieces:
        for piece in pieces:
            digest.update(piece)
    return digest.digest()


def check_sizes(where: str, items: Sequence[UploadFile], sizes: Mapping[str, int]) -> None:
    """Check that every file exists with its size; raises TransferError."""
    missing = [item for item in items if sizes.get(item.name) != item.n_bytes]
    if missing:
        raise TransferError(
            f"{where}: {shorten_repr(missing[0].name)}: expected the {missing[0].n_bytes} bytes "
            f"that were sent, found {sizes.get(missing[0].name, 'no file')}; publish again"
        )


def open_fsspec(rest: str, text: str, options: RemoteOptions) -> FsspecRemote:
    """Open the fsspec file system of a URL."""
    scheme = text.partition("://")[0].lower()
    if scheme not in fsspec.available_protocols() or scheme in _UNSUPPORTED:
        raise UsageError(
            f"{remove_secrets(text)}: expected a file store, and {scheme}:// is none; use hf://, "
            "oci://, s3://, gs:// or a folder"
        )
    where = remove_secrets(text).rstrip("/")
    if not rest.strip("/"):
        raise UsageError(
            f"{where}: expected an address like {scheme}://bucket/prefix, found no bucket; name one"
        )
    with translate_errors(where):
        try:
            files, root = fsspec.core.url_to_fs(text)
        except ImportError as fault:
            raise UsageError(
                f"{scheme}:// needs a package that is not installed ({describe_exception(fault)}); "
                "install it, e.g. pip install 'quantkit[gcs]' for gs://"
            ) from fault
    return FsspecRemote(files, root, where)


REMOTE = RemoteScheme(open=open_fsspec)
