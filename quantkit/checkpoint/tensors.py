"""Reading and writing tensors of safetensors files, by positioned reads and writes of slices.

No memory maps: mapped pages count as resident memory, and a build must stay within its budget.
Every read opens the file, reads its slice and closes it, so any number of threads may read at once.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from quantkit.checkpoint.header import Header, build_header, parse_header
from quantkit.contracts import TensorSpec
from quantkit.errors import ArtifactError, CheckpointError
from quantkit.io.files import (
    PART,
    create_file,
    describe_os_error,
    make_write_error,
    open_plain_file,
    shorten_repr,
    sync_folder,
)

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_IO_BYTES = 16 << 20  # one system call; Linux moves at most 2 GiB in one
_NO_FALLOCATE = (
    errno.EOPNOTSUPP,
    errno.EINVAL,
    errno.ENOSYS,
)  # file systems that cannot reserve space


def get_dtype_name(dtype: torch.dtype) -> str:
    """Return the safetensors name of a torch dtype; raises ArtifactError for unsupported ones."""
    for name, known in TORCH_DTYPES.items():
        if known == dtype:
            return name
    raise ArtifactError(
        f"expected a tensor of one of {', '.join(TORCH_DTYPES)}, found {dtype}; convert it"
    )


def view_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor of any dtype, shared and not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data  # [...] -> [n_bytes]


def read_into(descriptor: int, view: memoryview, offset: int) -> int:
    """Fill `view` from `offset` on.

    Return the number of bytes, fewer only at the end of the file.
    """
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done : done + _IO_BYTES]], offset + done)
        if count == 0:
            break
        done += count
    return done


def write_from(descriptor: int, view: memoryview, offset: int) -> None:
    """Write all of `view` at `offset`; raises OSError."""
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done : done + _IO_BYTES], offset + done)


def read_tensor(file: Path, header: Header, name: str) -> Tensor:
    """Read the tensor `name` as stored; raises CheckpointError if the file changed since its
    header.
    """
    spec = header.specs[name]
    return _read(file, header, spec, spec.shape, 0)


def read_rows(file: Path, header: Header, name: str, start: int, stop: int) -> Tensor:
    """Read rows start .. stop-1 as stored: [stop - start, ...]; raises as `read_tensor` does."""
    spec = header.specs[name]
    if not spec.shape or not 0 <= start <= stop <= spec.shape[0]:
        raise CheckpointError(
            f"{file}: tensor {shorten_repr(name)}: expected rows within {spec.shape}, found "
            f"{start}:{stop}"
        )
    row_bytes = spec.n_bytes // max(spec.shape[0], 1)
    return _read(file, header, spec, (stop - start, *spec.shape[1:]), start * row_bytes)


def _read(
    file: Path, header: Header, spec: TensorSpec, shape: tuple[int, ...], skip: int
) -> Tensor:
    tensor = torch.empty(shape, dtype=TORCH_DTYPES[spec.dtype])
    view = view_bytes(tensor)
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            count = read_into(
                descriptor, view, header.data_start + header.offsets[spec.name][0] + skip
            )
        finally:
            os.close(descriptor)
    except OSError as fault:
        raise CheckpointError(
            f"{file}: expected a readable file, found: {describe_os_error(fault)}; check the path"
        ) from None
    if count != len(view):
        raise CheckpointError(
            f"{file}: tensor {shorten_repr(spec.name)}: expected {len(view)} bytes, found {count}; "
            "the file became shorter while it was read, fetch it again"
        )
    return tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenFile:
    """A finished file: its hexadecimal sha256 and its size."""

    sha256: str
    n_bytes: int


class ShardWriter:
    """Writes one safetensors file of known tensors, in any order, into `<path>.part`.

    `finish` renames it. The header is written and the space reserved at once, so that a full disk
    shows before the work is done. `written` names tensors that an interrupted writer of the same
    specs has flushed into the part file: they are kept. Without `finish` (a `with` block left by an
    error) no file of the final name appears.

    Raises ArtifactError for tensors that differ from their specs, QuantkitError if the disk
    refuses.
    """

    def __init__(
        self, path: Path, specs: Iterable[TensorSpec], written: Collection[str] = ()
    ) -> None:
        self.path = path
        self._part = path.with_name(path.name + PART)
        planned = list(specs)
        text = build_header(planned)
        self._header = parse_header(text[8:], str(path), sum(spec.n_bytes for spec in planned))
        self._size = len(text) + self._header.n_data_bytes
        self._written = set(written)
        self._hash = hashlib.sha256(
            text
        )  # of the first `_hashed` bytes: complete when tensors come in file order
        self._hashed = len(text)
        try:
            self._descriptor = self._continue(text) if written else self._begin(text)
        except OSError as fault:
            raise make_write_error(self._part, fault) from fault

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor at its place, once; dtype and shape must be those of its spec."""
        spec = self._header.specs.get(name)
        if spec is None:
            raise ArtifactError(
                f"{self.path}: tensor {shorten_repr(name)}: expected a planned tensor, found one "
                "not in the plan"
            )
        if name in self._written:
            raise ArtifactError(
                f"{self.path}: tensor {shorten_repr(name)}: expected once, found a second time"
            )
        actual = (get_dtype_name(tensor.dtype), tuple(tensor.shape))
        if actual != (spec.dtype, spec.shape):
            raise ArtifactError(
                f"{self.path}: tensor {shorten_repr(name)}: expected {spec.dtype} "
                f"{list(spec.shape)}, found {actual[0]} {list(actual[1])}; the plan and the "
                "format's pack disagree"
            )
        view = view_bytes(tensor.detach().to("cpu").contiguous())
        offset = self._header.data_start + self._header.offsets[name][0]
        try:
            write_from(self._descriptor, view, offset)
        except OSError as fault:
            raise make_write_error(self._part, fault) from fault
        self._written.add(name)
        if offset == self._hashed:
            self._hash.update(view)
            self._hashed += len(view)

    def read(self, name: str) -> Tensor:
        """Read a written tensor back from the disk, so that the shipped bytes are measured."""
        if name not in self._written:
            raise ArtifactError(
                f"{self.path}: tensor {shorten_repr(name)}: expected one that was written, found "
                "none"
            )
        return read_tensor(self._part, self._header, name)

    def flush(self) -> None:
        """Make the written tensors survive a crash, so that a journal may record them."""
        try:
            os.fsync(self._descriptor)
        except OSError as fault:
            raise make_write_error(self._part, fault) from fault

    def finish(self) -> WrittenFile:
        """Check that no tensor is missing, sync, rename and sync the folder.

        Return hash and size.
        """
        missing = [name for name in self._header.specs if name not in self._written]
        if missing:
            raise ArtifactError(
                f"{self.path}: expected {len(self._header.specs)} tensors, found {len(missing)} "
                f"not written, the first {shorten_repr(missing[0])}"
            )
        try:
            digest = self._digest()
            os.fsync(self._descriptor)
            self.close()
            os.replace(self._part, self.path)
            sync_folder(self.path.parent)
        except OSError as fault:
            raise make_write_error(self.path, fault) from fault
        return WrittenFile(sha256=digest, n_bytes=self._size)

    def close(self) -> None:
        """Stop writing; the part file stays for a later writer to continue. Safe to call twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def discard(self) -> None:
        """Stop writing and delete the part file."""
        self.close()
        self._part.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _begin(self, text: bytes) -> int:
        descriptor = create_file(self._part)
        try:
            reserve_space(descriptor, self._size)
            write_from(descriptor, memoryview(text), 0)
        except OSError:
            os.close(descriptor)
            self._part.unlink(missing_ok=True)
            raise
        return descriptor

    def _continue(self, text: bytes) -> int:
        unknown = sorted(self._written - set(self._header.specs))
        if unknown:
            raise ArtifactError(
                f"{self._part}: expected a part of the same plan, found {shorten_repr(unknown[0])} "
                "written; start again"
            )
        if (
            self.path.exists() and not self._part.exists()
        ):  # finished by a writer that died before it could say so
            os.replace(self.path, self._part)
        descriptor = open_plain_file(self._part, os.O_RDWR)
        if os.pread(descriptor, len(text), 0) != text or os.fstat(descriptor).st_size != self._size:
            os.close(descriptor)
            raise ArtifactError(
                f"{self._part}: expected the part of this plan, found another file; start again"
            )
        return descriptor

    def _digest(self) -> str:
        """Return the sha256 of the part file.

        Bytes that were written out of order are read again.
        """
        piece = memoryview(bytearray(min(_IO_BYTES, self._size)))
        while self._hashed < self._size:
            count = read_into(self._descriptor, piece[: self._size - self._hashed], self._hashed)
            if count == 0:
                raise ArtifactError(
                    f"{self._part}: expected {self._size} bytes, found {self._hashed}; start again"
                )
            self._hash.update(piece[:count])
            self._hashed += count
        return self._hash.hexdigest()


def reserve_space(descriptor: int, n_bytes: int) -> None:
    """Set a file's size and reserve its space; raises OSError if the disk is too small."""
    os.ftruncate(descriptor, n_bytes)
    if n_bytes:
        try:
            os.posix_fallocate(descriptor, 0, n_bytes)
        except OSError as fault:
            if fault.errno not in _NO_FALLOCATE:
                raise
