"""The safetensors header: strict parsing, and writing with the bytes of the `safetensors` library.

    8 bytes   length of the JSON, little-endian
    JSON      {"__metadata__": {str: str}, name: {"dtype", "shape", "data_offsets": [begin, end]}},
              padded with spaces
    data      every tensor's bytes, without holes, offsets counted from here

No torch: `quantkit verify` and `quantkit plan` read headers only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from quantkit.contracts import TensorSpec
from quantkit.dtypes import DTYPE_BYTES
from quantkit.errors import CheckpointError
from quantkit.io.files import describe_os_error, parse_json, shorten_repr

HEADER_LIMIT_BYTES = 100_000_000
"""The limit of the `safetensors` library, which refuses longer headers."""

MAX_TENSORS = 500_000
"""Tensors in one file; DeepSeek-V3 has 92,000 in all of its 163 files."""

PREFIX_BYTES = 8
_MAX_INTEGER = 2**63 - 1
_MAX_DIMENSIONS = 64  # torch refuses more
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_WRITE_ORDER = (
    "I64",
    "F64",
    "F32",
    "I32",
    "BF16",
    "F16",
    "I16",
    "F8_E8M0",
    "F8_E4M3",
    "F8_E5M2",
    "I8",
    "U8",
    "BOOL",
)
"""Wide dtypes first, as the library sorts them: each tensor is aligned to its element size."""

_DAMAGED = "the file is damaged, fetch or write it again"


@dataclass(frozen=True, kw_only=True)
class Header:
    """Contents of a safetensors file: specs and [begin, end) byte offsets by name, from
    `data_start`.

    metadata: the file's own strings, such as tensors that share the bytes of another.
    """

    specs: Mapping[str, TensorSpec]
    offsets: Mapping[str, tuple[int, int]]
    data_start: int
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def n_data_bytes(self) -> int:
        """Bytes of all tensors together."""
        return max((end for _, end in self.offsets.values()), default=0)


def read_header(path: Path) -> Header:
    """Read and check the header of a file; raises CheckpointError for the first fault."""
    try:
        with path.open("rb") as file:
            n_file_bytes = os.fstat(file.fileno()).st_size
            length = parse_header_length(file.read(PREFIX_BYTES), n_file_bytes, str(path))
            text = file.read(length)
    except OSError as fault:
        raise CheckpointError(
            f"{path}: expected a readable file, found: {describe_os_error(fault)}; check the path"
        ) from None
    if len(text) != length:
        raise CheckpointError(
            f"{path}: header: expected {length} bytes, found {len(text)}; {_DAMAGED}"
        )
    return parse_header(text, str(path), n_file_bytes - PREFIX_BYTES - length)


def parse_header(text: bytes, where: str, n_data_bytes: int) -> Header:
    """Check a header's JSON against the number of data bytes after it; raises CheckpointError."""
    if not text.startswith(b"{"):
        raise CheckpointError(
            f"{where}: header: expected to start with '{{', found {shorten_repr(text[:1])}; "
            f"{_DAMAGED}"
        )
    entries = parse_json(text, f"{where}: header")
    if len(entries) > MAX_TENSORS:
        raise CheckpointError(
            f"{where}: header: expected at most {MAX_TENSORS:,} tensors in one file, found "
            f"{len(entries):,}; {_DAMAGED}"
        )
    metadata = _check_metadata(entries.get("__metadata__"), where)
    specs: dict[str, TensorSpec] = {}
    offsets: dict[str, tuple[int, int]] = {}
    for name, entry in entries.items():
        if name != "__metadata__":
            specs[name], offsets[name] = _parse_entry(name, entry, where)
    _check_cover(offsets, where, n_data_bytes)
    return Header(
        specs=specs, offsets=offsets, data_start=PREFIX_BYTES + len(text), metadata=metadata
    )


def build_header(specs: Iterable[TensorSpec]) -> bytes:
    """Return length, JSON and padding for a file of these tensors; the data starts 8-byte aligned.

    The order on disk is by dtype, then by name, so that the same tensors in any order give the same
    bytes. Raises CheckpointError for duplicate names, an unknown dtype or a header beyond the
    limit.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    planned = list(specs)
    for spec in planned:
        _check_name(spec.name, "new file")
        _check_dtype(spec.name, spec.dtype, "new file")
    for spec in sorted(planned, key=lambda spec: (_WRITE_ORDER.index(spec.dtype), spec.name)):
        if spec.name in entries:
            raise CheckpointError(
                f"new file: tensor {shorten_repr(spec.name)}: expected once, found twice; rename "
                "one of them"
            )
        end = begin + spec.n_bytes
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % PREFIX_BYTES)
    if len(text) > HEADER_LIMIT_BYTES:
        raise CheckpointError(
            f"new file: header: expected at most {HEADER_LIMIT_BYTES} bytes, found {len(text)}; "
            "use smaller shards"
        )
    return len(text).to_bytes(PREFIX_BYTES, "little") + text


def parse_header_length(prefix: bytes, n_file_bytes: int, where: str) -> int:
    """Return the length of the JSON by a file's first 8 bytes; raises CheckpointError."""
    if len(prefix) < PREFIX_BYTES:
        raise CheckpointError(
            f"{where}: expected at least {PREFIX_BYTES} bytes of header length, found "
            f"{len(prefix)}; {_DAMAGED}"
        )
    length = int.from_bytes(prefix, "little")
    if length > HEADER_LIMIT_BYTES:
        raise CheckpointError(
            f"{where}: header length: expected at most {HEADER_LIMIT_BYTES}, found {length}; "
            "this is not a safetensors file"
        )
    if length > n_file_bytes - PREFIX_BYTES:
        raise CheckpointError(
            f"{where}: header length: expected at most {n_file_bytes - PREFIX_BYTES} (the rest of "
            f"the file), found {length}; {_DAMAGED}"
        )
    return length


def _check_metadata(metadata: object, where: str) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise CheckpointError(
            f"{where}: __metadata__: expected an object of strings, found "
            f"{shorten_repr(metadata)}; write the file again"
        )
    return metadata


def _check_name(name: str, where: str) -> None:
    if not name or name == "__metadata__":
        raise CheckpointError(
            f"{where}: expected a tensor name, found {shorten_repr(name)}; write the file again"
        )
    try:
        name.encode()
    except UnicodeEncodeError:
        raise CheckpointError(
            f"{where}: tensor {shorten_repr(name)}: expected a name in UTF-8, found half a "
            f"surrogate pair; {_DAMAGED}"
        ) from None


def _check_dtype(name: str, dtype: object, where: str) -> str:
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(
            f"{where}: tensor {shorten_repr(name)}: dtype: expected one of "
            f"{', '.join(DTYPE_BYTES)}, found {shorten_repr(dtype)}; convert the tensor"
        )
    return dtype


def _parse_entry(name: str, entry: object, where: str) -> tuple[TensorSpec, tuple[int, int]]:
    """Check one tensor's entry on its own; return its spec and byte offsets."""
    _check_name(name, where)
    at = f"{where}: tensor {shorten_repr(name)}"
    if not isinstance(entry, dict) or set(entry) != _ENTRY_KEYS:
        content = sorted(entry) if isinstance(entry, dict) else entry
        raise CheckpointError(
            f"{at}: expected an object of dtype, shape, data_offsets, found "
            f"{shorten_repr(content)}; {_DAMAGED}"
        )
    dtype = _check_dtype(name, entry["dtype"], where)
    shape = _parse_integers(entry["shape"], f"{at}: shape")
    offsets = _parse_integers(entry["data_offsets"], f"{at}: data_offsets")
    if len(shape) > _MAX_DIMENSIONS:
        raise CheckpointError(
            f"{at}: shape: expected at most {_MAX_DIMENSIONS} dimensions, found {len(shape)}; "
            f"{_DAMAGED}"
        )
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{at}: data_offsets: expected [begin, end], found {shorten_repr(list(offsets))}; "
            f"{_DAMAGED}"
        )
    if (
        prod(max(n, 1) for n in shape) > _MAX_INTEGER
    ):  # torch multiplies strides before it meets a zero
        raise CheckpointError(
            f"{at}: shape: expected fewer than 2**63 elements, found {shorten_repr(list(shape))}; "
            f"{_DAMAGED}"
        )
    begin, end = offsets
    spec = TensorSpec(name=name, dtype=dtype, shape=shape)
    if spec.n_bytes != end - begin:
        raise CheckpointError(
            f"{at}: expected {shorten_repr(spec.n_bytes)} bytes for {dtype} "
            f"{shorten_repr(list(shape))}, found data_offsets of {end - begin} bytes; {_DAMAGED}"
        )
    return spec, (begin, end)


def _parse_integers(values: object, at: str) -> tuple[int, ...]:
    """Check a list of integers 0 .. 2**63 - 1; JSON's true and 1.0 are refused."""
    if not isinstance(values, list) or not all(
        type(v) is int and 0 <= v <= _MAX_INTEGER for v in values
    ):
        raise CheckpointError(
            f"{at}: expected whole numbers from 0 to 2**63 - 1, found {shorten_repr(values)}; "
            f"{_DAMAGED}"
        )
    return tuple(values)


def _check_cover(offsets: Mapping[str, tuple[int, int]], where: str, n_data_bytes: int) -> None:
    """Check that the tensors cover the data from 0 to its end, each byte once."""
    expected = 0
    for name, (begin, end) in sorted(offsets.items(), key=lambda item: item[1]):
        if begin != expected:
            kind = (
                "overlaps the tensor before it" if begin < expected else "leaves a hole before it"
            )
            raise CheckpointError(
                f"{where}: tensor {shorten_repr(name)}: data_offsets: expected to begin at "
                f"{expected}, found {begin}, which {kind}; {_DAMAGED}"
            )
        expected = end
    if expected != n_data_bytes:
        kind = "truncated" if n_data_bytes < expected else "longer than its header says"
        raise CheckpointError(
            f"{where}: expected {expected} bytes of tensor data, found {n_data_bytes}; "
            f"the file is {kind}, fetch or write it again"
        )
