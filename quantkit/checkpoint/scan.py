"""Single-pass reading of a file: its hash, and a visit of every tensor's bytes.

A thread hashes one piece while the next is read and visited, at the speed of the disk or of sha256;
memory is BUFFERS pieces for any file size. Links and pipes (which would never end) are not opened.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from stat import S_ISREG

from quantkit.checkpoint.header import Header
from quantkit.dtypes import DTYPE_BYTES
from quantkit.errors import ArtifactError
from quantkit.io.files import describe_os_error

Visit = Callable[[str, int, memoryview], None]
"""Arguments: a tensor's name, the offset in it, and whole elements, which are valid during the
call.
"""

PIECE_BYTES = 4 << 20
BUFFERS = 3
FEW_BYTES = 1 << 20
"""Files up to this size are hashed in one go: a thread would cost more."""


class TensorRanges:
    """The byte ranges of a file's tensors."""

    def __init__(self, header: Header | None) -> None:
        self._ranges: list[tuple[int, int, str, int]] = []  # begin, end, name, bytes of an element
        if header is not None:
            start = header.data_start
            self._ranges = sorted(
                (start + begin, start + end, name, DTYPE_BYTES[header.specs[name].dtype])
                for name, (begin, end) in header.offsets.items()
                if end > begin
            )
        self._begins = [begin for begin, *_ in self._ranges]

    def cut(self, position: int) -> int:
        """Return the last position up to `position` that does not divide an element."""
        index = bisect_right(self._begins, position) - 1
        if index < 0:
            return position
        begin, end, _, width = self._ranges[index]
        return position if position >= end else position - (position - begin) % width

    def visit_piece(self, position: int, piece: memoryview, visit: Visit) -> None:
        """Visit every tensor with bytes in a piece of the file that begins at `position`."""
        last = position + len(piece)
        first_index = max(bisect_right(self._begins, position) - 1, 0)
        for begin, end, name, _ in self._ranges[first_index : bisect_left(self._begins, last)]:
            first, stop = max(begin, position), min(end, last)
            if first < stop:
                visit(name, first - begin, piece[first - position : stop - position])


def scan_file(path: Path, header: Header | None = None, visit: Visit | None = None) -> str:
    """Return the hexadecimal sha256 of a file; `visit` gets every tensor's bytes in file order.

    Raises ArtifactError for an unreadable file, a link and anything but a regular file.
    """
    ranges = TensorRanges(header if visit else None)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            state = os.fstat(descriptor)
            if not S_ISREG(state.st_mode):
                raise ArtifactError(f"{path}: expected a file, found something else; remove it")
            if state.st_size <= FEW_BYTES:
                return _scan_whole(descriptor, ranges, visit)
            return _scan_pieces(descriptor, ranges, visit)
        finally:
            os.close(descriptor)
    except OSError as fault:
        raise ArtifactError(
            f"{path}: expected a readable file, found: {describe_os_error(fault)}; check the path"
        ) from None


def _scan_whole(descriptor: int, ranges: TensorRanges, visit: Visit | None) -> str:
    """Scan a small file; it may have grown since its size was read, so the rest is read too."""
    parts = []
    while part := os.read(descriptor, FEW_BYTES):
        parts.append(part)
    content = b"".join(parts)
    if visit:
        ranges.visit_piece(0, memoryview(content), visit)
    return hashlib.sha256(content).hexdigest()


def _scan_pieces(descriptor: int, ranges: TensorRanges, visit: Visit | None) -> str:
    """Scan a large file piece by piece."""
    digest = hashlib.sha256()
    buffers: Sequence[bytearray] = [bytearray(PIECE_BYTES) for _ in range(BUFFERS)]
    hashing: list[Future[None]] = []
    position = 0
    with ThreadPoolExecutor(1) as hasher:
        for number in range(1 << 62):
            if number >= BUFFERS:
                hashing[number - BUFFERS].result()  # its buffer is read into again
            n_bytes = ranges.cut(position + PIECE_BYTES) - position
            piece = memoryview(buffers[number % BUFFERS])[:n_bytes]
            count = _read_into(descriptor, piece)
            hashing.append(hasher.submit(digest.update, piece[:count]))
            if visit:
                ranges.visit_piece(position, piece[:count], visit)
            position += count
            if count < n_bytes:
                break
        for pending in hashing[-BUFFERS:]:
            pending.result()
    return digest.hexdigest()


def _read_into(descriptor: int, piece: memoryview) -> int:
    """Fill a piece and return the number of bytes; fewer only at the end of the file."""
    done = 0
    while done < len(piece):
        count = os.readv(descriptor, [piece[done:]])
        if count == 0:
            break
        done += count
    return done


def read_small_tensor(path: Path, header: Header, name: str, limit_bytes: int = FEW_BYTES) -> bytes:
    """Read a small tensor; return no bytes if it is larger than the limit or unreadable."""
    begin, end = header.offsets[name]
    if end - begin > limit_bytes:
        return b""
    try:
        with path.open("rb") as file:
            file.seek(header.data_start + begin)
            return file.read(end - begin)
    except OSError:
        return b""
