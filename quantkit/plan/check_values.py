"""Checks of values that decide whether a stored tensor may be left out: equal to another, zeros.

A tensor is read in pieces, and reading ends at the first difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.checkpoint.tensors import read_rows
from quantkit.io.files import shorten_repr
from quantkit.plan.left_out import ValueCheck

PIECE_ELEMENTS = 1 << 24


def find_value_faults(source: Checkpoint, checks: Sequence[ValueCheck]) -> Iterator[str]:
    """Yield a sentence per tensor that cannot be left out because of its values."""
    for check in checks:
        if check.kind == "equal" and (row := find_different_row(source, check)) is not None:
            yield (
                f"{source.folder}: tensors {shorten_repr(check.name)} and "
                f"{shorten_repr(check.other)}: expected equal values, as config.json ties them, "
                f"found another value in row {row}; set tie_word_embeddings to false in "
                "config.json if the head was trained on its own, or remove the wrong one"
            )
        elif check.kind == "zero" and (index := find_nonzero(source, check.name)) is not None:
            yield (
                f"{source.folder}: tensor {shorten_repr(check.name)}: expected zeros, as the "
                "module that transformers makes of this config.json has no bias, found another "
                f"value at element {index}; set the bias in config.json, or remove the tensor"
            )


def find_different_row(source: Checkpoint, check: ValueCheck) -> int | None:
    """Return the first row in which two tensors of one shape differ; None if they are equal."""
    plain = not {check.name, check.other} & set(source.logical.encoded)
    if plain and source.shards.locate(check.name)[0] == source.shards.locate(check.other)[0]:
        header = source.shards.locate(check.name)[1]
        if header.offsets[check.name] == header.offsets[check.other]:
            return None
    rows, *rest = source.specs[check.name].shape
    step = max(1, PIECE_ELEMENTS // max(1, torch.Size(rest).numel()))
    for first in range(0, rows, step):
        last = min(rows, first + step)
        one = read_stored(source, check.name, first, last)
        other = read_stored(source, check.other, first, last)
        if one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8)):
            continue
        one, other = one.to(torch.float32), other.to(torch.float32)
        if not torch.equal(one, other):
            different = (one != other).reshape(last - first, -1).any(1)  # [rows, ...] -> [rows]
            return first + int(different.nonzero()[0])
    return None


def read_stored(source: Checkpoint, name: str, first: int, last: int) -> Tensor:
    """Read rows first .. last-1 as stored; a build checks for itself that they are finite."""
    file, header = source.shards.locate(name)
    return read_rows(file, header, name, first, last)


def find_nonzero(source: Checkpoint, name: str) -> int | None:
    """Return the first element that is not zero; None if all are."""
    positions = source.read([name])[name].reshape(-1).nonzero()  # [...] -> [n_elements] -> [k, 1]
    return int(positions[0]) if len(positions) else None
