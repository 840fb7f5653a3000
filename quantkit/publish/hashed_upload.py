"""Reads a file for upload and hashes it on the way, so that only the verified bytes are sent."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from types import TracebackType

from quantkit.errors import ArtifactError
from quantkit.io.files import describe_os_error
from quantkit.publish.remote import PIECE_BYTES, UploadFile


class HashedReader:
    """The bytes of a file in pieces of at most `size` bytes.

    Raises ArtifactError after the last piece, before the upload completes, if the file differs from
    the verified one.
    """

    def __init__(self, item: UploadFile, size: int = PIECE_BYTES) -> None:
        self._item, self._size = item, size
        self.sent = 0

    def __enter__(self) -> HashedReader:
        try:
            self._file = self._item.path.open("rb")
        except OSError as fault:
            raise ArtifactError(
                f"{self._item.path}: expected a readable file, found: {describe_os_error(fault)}; "
                "check it"
            ) from fault
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: object, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[bytes]:
        digest = hashlib.sha256()
        while piece := self._read():
            digest.update(piece)
            self.sent += len(piece)
            if self.sent > self._item.n_bytes:
                break
            yield piece
        if self.sent != self._item.n_bytes or digest.hexdigest() != self._item.sha256:
            raise ArtifactError(
                f"{self._item.path}: changed during publication; verify it and publish it again"
            )

    def _read(self) -> bytes:
        try:
            return self._file.read(self._size)
        except OSError as fault:
            raise ArtifactError(
                f"{self._item.path}: expected a readable file, found: {describe_os_error(fault)}; "
                "check it"
            ) from fault
