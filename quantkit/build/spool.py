"""Spools: hidden states in a file, read and written in ranges of rows; rows are tokens, columns are
channels.

The calibration stream of DeepSeek-V3 (a million tokens of 7168 floats) has 30 GB in float32; memory
holds a range of its rows. Positioned reads and writes are used instead of a memory map, because
mapped pages count as resident memory.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from quantkit.checkpoint.tensors import read_into, reserve_space, view_bytes, write_from
from quantkit.errors import QuantkitError
from quantkit.io.files import (
    create_file,
    describe_os_error,
    make_write_error,
    open_plain_file,
)

SpoolDtype = Literal["float32", "bfloat16"]
_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_SLICE_BYTES = 8 << 20  # bound on memory of gather and add, besides their result and argument
_GAP_BYTES = 64 << 10  # reading over a gap this small is cheaper than a second system call


class Spool:
    """A file of `rows` x `width` numbers of one dtype, zero at first, without a header: the caller
    knows the shape.

    `finite`: whether everything that this object wrote is finite.

    Any thread may read; `write` and `add` need one thread at a time. Raises QuantkitError for
    errors of the disk, ValueError for rows outside the file and tensors of another width (errors of
    the caller).
    """

    def __init__(
        self, path: Path, rows: int, width: int, dtype: SpoolDtype, descriptor: int
    ) -> None:
        self.path = path
        self.rows = rows
        self.width = width
        self.dtype = _DTYPES[dtype]
        self.finite = True
        self._descriptor = descriptor
        # a build that fails leaves its spools to the garbage collector
        self._release = weakref.finalize(self, os.close, descriptor)
        self._row_bytes = width * self.dtype.itemsize

    @classmethod
    def create(cls, path: Path, rows: int, width: int, dtype: SpoolDtype) -> Self:
        """Create a spool of zeros and reserve its space on the disk; replaces an existing file."""
        try:
            descriptor = create_file(path)
            try:
                reserve_space(descriptor, rows * width * _DTYPES[dtype].itemsize)
            except OSError:
                os.close(descriptor)
                path.unlink(missing_ok=True)
                raise
        except OSError as fault:
            raise make_write_error(path, fault) from fault
        return cls(path, rows, width, dtype, descriptor)

    @classmethod
    def open(cls, path: Path, rows: int, width: int, dtype: SpoolDtype) -> Self:
        """Open the spool of an interrupted build. Raises QuantkitError if the file has another
        size.
        """
        expected = rows * width * _DTYPES[dtype].itemsize
        try:
            descriptor = open_plain_file(path, os.O_RDWR)
        except OSError as fault:
            raise QuantkitError(
                f"{path}: expected hidden states of an earlier run, found: "
                f"{describe_os_error(fault)}; start over with --restart"
            ) from None
        n_bytes = os.fstat(descriptor).st_size
        if n_bytes != expected:
            os.close(descriptor)
            raise QuantkitError(
                f"{path}: expected {expected} bytes of hidden states [{rows}, {width}] {dtype}, "
                f"found {n_bytes}; start over with --restart"
            )
        return cls(path, rows, width, dtype, descriptor)

    def write(self, start: int, tensor: Tensor) -> None:
        """Write [n, width] of any float dtype to rows start .. start + n - 1."""
        if tensor.dim() != 2 or tensor.shape[1] != self.width:
            raise ValueError(f"{self.path}: expected [n, {self.width}], found {list(tensor.shape)}")
        self._check_rows(start, start + tensor.shape[0])
        rows = tensor.detach().to(device="cpu", dtype=self.dtype).contiguous()
        if rows.numel():  # checked in memory: reading the file again would take disk time
            self.finite = self.finite and all(map(isfinite, map(float, rows.aminmax())))
        try:
            write_from(self._descriptor, view_bytes(rows), start * self._row_bytes)
        except OSError as fault:
            raise make_write_error(self.path, fault) from fault

    def read(self, start: int, stop: int) -> Tensor:
        """Read rows start .. stop - 1: [stop - start, width]."""
        self._check_rows(start, stop)
        tensor = torch.empty(stop - start, self.width, dtype=self.dtype)
        self._fill(tensor, start)
        return tensor

    def gather(self, indices: Tensor) -> Tensor:
        """Read the rows `indices` [n], in that order, repeats allowed: [n, width]."""
        rows, order = self._sorted(indices)
        result = torch.empty(len(rows), self.width, dtype=self.dtype)
        for first, last in self._runs(rows):
            piece = self.read(int(rows[first]), int(rows[last - 1]) + 1)
            local = torch.from_numpy(rows[first:last] - rows[first])
            result[order[first:last]] = piece[local]  # [span, width] -> [last - first, width]
        return result

    def add(self, indices: Tensor, tensor: Tensor) -> None:
        """Add row i of `tensor` [n, width] to row indices[i]; repeats add up. Sums in float32,
        rounds once.
        """
        if tensor.shape != (indices.numel(), self.width):
            raise ValueError(
                f"{self.path}: expected [{indices.numel()}, {self.width}], found "
                f"{list(tensor.shape)}"
            )
        rows, order = self._sorted(indices)
        for first, last in self._runs(rows):
            start = int(rows[first])
            total = self.read(start, int(rows[last - 1]) + 1).to(torch.float32)
            local = torch.from_numpy(rows[first:last] - start)
            total.index_add_(0, local, tensor[order[first:last]].to(torch.float32))
            self.write(start, total)

    def flush(self) -> None:
        """Sync the file, so that a journal may name it."""
        try:
            os.fsync(self._descriptor)
        except OSError as fault:
            raise make_write_error(self.path, fault) from fault

    def close(self) -> None:
        """Close the file, which stays; safe to call twice."""
        self._release()
        self._descriptor = -1

    def delete(self) -> None:
        """Close and remove the file."""
        self.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _fill(self, tensor: Tensor, start: int) -> None:
        view = view_bytes(tensor)
        try:
            count = read_into(self._descriptor, view, start * self._row_bytes)
        except OSError as fault:
            raise QuantkitError(
                f"{self.path}: cannot be read: {describe_os_error(fault)}; run the same command "
                f"again"
            ) from fault
        if count != len(view):
            raise QuantkitError(
                f"{self.path}: expected {len(view)} bytes, found {count}; run the same command "
                f"again"
            )

    def _check_rows(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.rows:
            raise ValueError(
                f"{self.path}: expected rows within 0:{self.rows}, found {start}:{stop}"
            )

    def _sorted(self, indices: Tensor) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], Tensor]:
        """Return the row numbers in ascending order [n] and their former positions [n]; the sort is
        stable.
        """
        flat = indices.reshape(-1).to(device="cpu", dtype=torch.int64)
        order = torch.argsort(flat, stable=True)
        rows = flat[order].numpy()
        if len(rows):
            self._check_rows(int(rows[0]), int(rows[-1]) + 1)
        return rows, order

    def _runs(self, rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Iterator[tuple[int, int]]:
        """Return positions [first, last) of sorted rows that are close together and span at most
        _SLICE_BYTES.
        """
        gap = max(1, _GAP_BYTES // max(self._row_bytes, 1))
        span = max(1, _SLICE_BYTES // max(self._row_bytes, 1))
        breaks = np.flatnonzero(np.diff(rows) > gap) + 1
        ends = [*breaks.tolist(), len(rows)] if len(rows) else []
        first = 0
        for end in ends:
            while first < end:
                last = min(int(np.searchsorted(rows, rows[first] + span)), end)
                yield first, last
                first = last
