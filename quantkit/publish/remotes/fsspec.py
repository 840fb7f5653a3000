"""Every place that fsspec knows and that has no file of its own here: `gs://bucket/prefix`, `az://...`, `sftp://...`.

Whether a file is there already is told by the MD5 that the store keeps (Google Cloud Storage), else by reading it
back. Credentials come from where fsspec's file system of that scheme looks for them. fsspec caches listings; here
they are always asked anew.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import fsspec
from fsspec.callbacks import Callback

from quantkit.errors import TransferError, UsageError
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

_NO_STORES = frozenset({
    "async_wrapper", "asynclocal", "asyncwrapper", "blockcache", "cached", "dask", "data", "dir", "dvc", "filecache",
    "generic", "gist", "git", "github", "http", "https", "jlab", "jupyter", "libarchive", "pyscript", "reference",
    "root", "simplecache", "tar", "wandb", "zip",
})  # fmt: skip
"""What fsspec knows and that wraps other places, keeps its own kinds of files, or has no listing."""

LEAST_PIECE_BYTES = 64 << 10
"""What is asked for at once behind a connection that was cut; twice as much after each piece that arrives."""


class FsspecRemote:
    """Files below a prefix of an fsspec file system."""

    def __init__(self, files: Any, root: str, where: str) -> None:
        self.where = where
        self.files, self._root = files, root.rstrip("/")
        self._sizes: dict[str, int] | None = None
        self._piece_bytes = PIECE_BYTES

    def place(self, name: str) -> str:
        """Where a file lies, as the file system calls it."""
        return f"{self._root}/{name}"

    def list_remote(self, items: Sequence[UploadFile], manifest: str) -> RemoteState:
        """Files of equal size are compared by hash."""
        present = self._listing()
        there = {i.name for i in items if present.get(i.name) == i.n_bytes and self.holds(i)}
        others = sorted(set(present) - {item.name for item in items} - {manifest})
        found = self.fetch_manifest(manifest) if manifest in present else None
        return RemoteState(there=frozenset(there), manifest=found, others=tuple(others))

    def holds(self, item: UploadFile) -> bool:
        """Whether the file there, which has the item's size, has its content."""
        with translate_errors(self.where):
            kept = self.files.info(self.place(item.name)).get("md5Hash")
        if isinstance(kept, str):
            try:
                return base64.b64decode(kept, validate=True) == compute_md5(item)
            except binascii.Error:
                pass
        digest = hashlib.sha256()
        for piece in self._pieces(item.name, 0, item.n_bytes):
            digest.update(piece)
        return digest.hexdigest() == item.sha256

    def begin_upload(self, gone: Sequence[str]) -> None:
        """Take what was there out of it, the manifest first."""
        for name in gone:
            with translate_errors(self.where):
                if self.files.exists(self.place(name)):
                    self.files.rm_file(self.place(name))

    def send(self, item: UploadFile, report_bytes: BytesCallback) -> None:
        """One upload; stores show an object when it is complete."""
        with HashedReader(item) as pieces:  # hashed first: a store would take whatever is sent
            for _ in pieces:
                pass
        heard = Callback(hooks={"arrived": lambda _size, value: report_bytes(value)})
        with translate_errors(self.where):
            self.files.put_file(str(item.path), self.place(item.name), callback=heard)

    def finalize(self, items: Sequence[UploadFile], manifest: UploadFile) -> str:
        """The manifest, after all files are found there."""
        check_sizes(self.where, items, self._listing())
        with translate_errors(self.where):
            self.files.pipe_file(self.place(manifest.name), manifest.path.read_bytes())
        return self.where

    def fetch_manifest(self, name: str) -> bytes | None:
        """The file itself; a missing bucket has none."""
        try:
            with translate_errors(self.where):
                size = int(self.files.info(self.place(name))["size"])
        except TransferError as fault:
            if isinstance(fault.__cause__, FileNotFoundError):
                return None
            raise
        if size > JSON_LIMIT_BYTES:
            raise TransferError(
                f"{self.where}: {name}: expected at most {JSON_LIMIT_BYTES} bytes, found {size}; this is no manifest"
            )
        return b"".join(self._pieces(name, 0, size))

    def sizes(self) -> Mapping[str, int]:
        """What lies below the prefix."""
        self._sizes = self._listing()
        return self._sizes

    def read(self, name: str, first: int) -> Generator[bytes, None, None]:
        """Ranges, one after the other."""
        found = self._sizes if self._sizes is not None else self.sizes()
        if name not in found:
            raise TransferError(
                f"{self.where}: {shorten_repr(name)}: expected a file, found none; publish it again"
            )
        return self._pieces(name, first, found[name])

    def close(self) -> None:
        """fsspec keeps file systems for the whole process."""

    def _pieces(self, name: str, first: int, end: int) -> Generator[bytes, None, None]:
        while first < end:
            last = min(first + self._piece_bytes, end)
            try:
                with translate_errors(f"{self.where}: {shorten_repr(name)}"):
                    piece = self.files.cat_file(self.place(name), start=first, end=last)
            except TransientError:  # a piece arrives whole or not at all
                self._piece_bytes = LEAST_PIECE_BYTES
                raise
            self._piece_bytes = min(2 * self._piece_bytes, PIECE_BYTES)
            if not piece:
                return
            first += len(piece)
            yield piece

    def _listing(self) -> dict[str, int]:
        with translate_errors(self.where):
            self.files.invalidate_cache()
            try:
                found = self.files.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
        start = len(self._root) + 1
        return {
            path[start:]: int(info["size"])
            for path, info in found.items()
            if info.get("type") == "file"
        }


def compute_md5(item: UploadFile) -> bytes:
    """What stores keep of an object beside their own checksums."""
    digest = hashlib.md5(usedforsecurity=False)
    with HashedReader(item) as pieces:
        for piece in pieces:
            digest.update(piece)
    return digest.digest()


def check_sizes(where: str, items: Sequence[UploadFile], found: Mapping[str, int]) -> None:
    """TransferError unless every item is there in its size: before an artifact is called one."""
    missing = [item for item in items if found.get(item.name) != item.n_bytes]
    if missing:
        raise TransferError(
            f"{where}: {shorten_repr(missing[0].name)}: expected the {missing[0].n_bytes} bytes that were sent, found "
            f"{found.get(missing[0].name, 'no file')}; publish again"
        )


def open_fsspec(rest: str, text: str, options: RemoteOptions) -> FsspecRemote:
    """The place that fsspec finds under a URL."""
    scheme = text.partition("://")[0].lower()
    if scheme not in fsspec.available_protocols() or scheme in _NO_STORES:
        raise UsageError(
            f"{remove_secrets(text)}: expected a place that keeps files, and {scheme}:// is none; write hf://, oci://, s3://, "
            "gs:// or a folder"
        )
    where = remove_secrets(text).rstrip("/")
    if not rest.strip("/"):
        raise UsageError(
            f"{where}: expected a place like {scheme}://bucket/prefix, found no bucket; name one"
        )
    with translate_errors(where):
        try:
            files, root = fsspec.core.url_to_fs(text)
        except ImportError as fault:
            raise UsageError(
                f"{scheme}:// needs a package that is not installed ({describe_exception(fault)}); install it, e.g. "
                "pip install 'quantkit[gcs]' for gs://"
            ) from fault
    return FsspecRemote(files, root, where)


REMOTE = RemoteScheme(open=open_fsspec)
