"""Source encodings: stored codes, the weight that they represent, and its decoder.

An encoding is one file of `encodings/` that sets `ENCODING`. It recognizes its codes by names,
dtypes and shapes of stored tensors, without reading data; config.json gives what headers leave
open. No torch: plans read headers only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from quantkit.contracts import Config, Scheme, TensorSpec
from quantkit.dtypes import FLOAT_DTYPES, FLOAT_NAMES
from quantkit.errors import ArtifactError, CheckpointError
from quantkit.formats.common.checks import check_pattern, compile_any
from quantkit.io.files import shorten_repr

if TYPE_CHECKING:
    from torch import Tensor

FP8 = "F8_E4M3"
E8M0_DTYPES = ("F8_E8M0", "U8")
"""Dtypes of scales that are powers of two: a byte e stands for 2**(e - 127)."""
SCALE_DTYPES = tuple(FLOAT_DTYPES)
FETCH_AGAIN = "fetch the checkpoint again"

PartReader = Callable[[str, int, int | None], "Tensor"]
"""Part of an encoded weight ("scale"), first row, row after the last (None: all) -> the rows as
stored.
"""

Decode = Callable[[PartReader, int, int], "Tensor"]
"""Reader, first row, row after the last -> these rows of the weight in its logical dtype."""


class EncodingFault(Exception):
    """Why codes are malformed: the message after the name of the tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedWeight:
    """A weight that the checkpoint stores in an encoding.

    label: the encoding for people, "FP8 128x128"; spec: the logical tensor; parts: its stored
    tensors; scheme: of codes whose tensors format compressed_tensors stores unchanged;
    block: rows and columns of an FP8 block, which an artifact may keep; is_copied: whether experts
    stored together in this encoding are copied if a rule keeps them.
    """

    label: str
    spec: TensorSpec
    parts: Mapping[str, TensorSpec]
    decode: Decode
    scheme: Scheme | None = None
    block: tuple[int, int] | None = None
    is_copied: bool = False

    @property
    def n_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.n_bytes for part in self.parts.values())


@dataclass(frozen=True, kw_only=True)
class SourceQuantization:
    """The quantization that config.json states; `method` is "" without one."""

    config: Config

    @cached_property
    def values(self) -> Mapping[str, object]:
        """The entry quantization_config; empty without one."""
        entry = find_entry(self.config.values)
        return entry if isinstance(entry, dict) else {}

    @property
    def method(self) -> str:
        """The quantization method that config.json states, "" without one."""
        entry = find_entry(self.config.values)
        if not isinstance(entry, dict):
            return shorten_repr(entry) if entry else ""
        return str(entry.get("quant_method") or ("no method" if entry else ""))

    @property
    def where(self) -> str:
        """Where the entry stands, for messages."""
        return f"{self.config.where}: quantization_config"

    @cached_property
    def model_dtype(self) -> str:
        """The dtype that the model computes in, "" if config.json states none."""
        nested = self.config.values.get("text_config")
        places = (self.config.values, nested if isinstance(nested, dict) else {})
        names = (place.get(key) for place in places for key in ("dtype", "torch_dtype"))
        return next((FLOAT_NAMES[str(x)] for x in names if x in FLOAT_NAMES), "")

    @cached_property
    def groups(self) -> tuple[Mapping[str, object], ...]:
        """The groups of compressed-tensors that quantize weights."""
        entry = self.values.get("config_groups")
        groups = list(entry.values()) if isinstance(entry, dict) else []
        return tuple(
            group
            for group in groups
            if isinstance(group, dict) and isinstance(group.get("weights"), dict)
        )

    def list_arguments(self, module: str) -> list[Mapping[str, object]]:
        """Return the weight arguments that may apply to a module: of the groups that name it, else
        of those that select all linears, else all.
        """
        named = [group for group in self.groups if _selects(group, module)]
        general = [group for group in self.groups if "Linear" in _list_targets(group)]
        arguments = [group["weights"] for group in named or general or self.groups]
        return [entry for entry in arguments if isinstance(entry, dict)]

    def read_block_entry(self, module: str = "") -> tuple[str, object]:
        """Return the config key of a module's FP8 block size, and its value; None: no blocks."""
        if self.method != "compressed-tensors":
            return "quantization_config.weight_block_size", self.values.get("weight_block_size")
        entries = [*self.list_arguments(module), *(group["weights"] for group in self.groups)]
        sizes = [
            entry["block_structure"]
            for entry in entries
            if isinstance(entry, dict) and entry.get("block_structure") is not None
        ]
        size = sizes[0] if sizes else None
        if isinstance(size, str) and size.replace("x", "").isdecimal():  # of old versions: "2x4"
            size = [int(side) for side in size.split("x") if side]
        return "quantization_config.config_groups: block_structure", size


def find_entry(values: Mapping[str, object]) -> object:
    """Return the quantization_config of a model, which wrappers may keep in their text_config."""
    nested = values.get("text_config")
    own = values.get("quantization_config")
    return nested.get("quantization_config") if not own and isinstance(nested, dict) else own


def remove_quantization(values: Mapping[str, object]) -> dict[str, object]:
    """Return a config.json without quantization_config, also in nested configurations."""
    return {
        key: remove_quantization(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key != "quantization_config"
    }


def _list_targets(group: Mapping[str, object]) -> list[str]:
    targets = group.get("targets")
    return [str(target) for target in targets] if isinstance(targets, list) else []


def _selects(group: Mapping[str, object], module: str) -> bool:
    """Return whether a group names a module.

    Expressions that could take exponential time are skipped: shapes then decide between groups.
    """
    for target in _list_targets(group):
        if target == module:
            return True
        if target.startswith("re:"):
            try:
                pattern = check_pattern(target.removeprefix("re:"), "config_groups")
                if compile_any((pattern,)).match(module):
                    return True
            except (ArtifactError, re.error):
                continue
    return False


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredCodes:
    """A stored tensor that an encoding may claim, and the tensors next to it.

    read_bytes: reads a small tensor; None where only headers are at hand.
    """

    spec: TensorSpec
    stored: Mapping[str, TensorSpec]
    quantization: SourceQuantization
    read_bytes: Callable[[str], bytes] | None = None

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    def require(self, name: str, kind: str, dtypes: Sequence[str]) -> TensorSpec:
        """Return the spec of a tensor that belongs to the codes; raises EncodingFault."""
        spec = self.stored.get(name)
        if spec is None:
            raise EncodingFault(
                f"expected its {kind} {shorten_repr(name)}, found none in any file; {FETCH_AGAIN}"
            )
        if spec.dtype not in dtypes:
            raise EncodingFault(
                f"expected a {kind} of {', '.join(dtypes)}, found {spec.dtype}; {FETCH_AGAIN}"
            )
        return spec

    def choose_dtype(self, scale: TensorSpec) -> str:
        """Return the dtype of the decoded weight: the model's, else that of the scales.

        Engines compute in the model's dtype, so that another one would be rounded a second time.
        """
        own = scale.dtype if scale.dtype in ("BF16", "F16") else "BF16"
        return self.quantization.model_dtype or own


def require_shape(spec: TensorSpec, shapes: Sequence[tuple[int, ...]], kind: str) -> None:
    """Raise EncodingFault unless a tensor has one of these shapes."""
    if spec.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise EncodingFault(
            f"expected a {kind} of shape {expected}, found {list(spec.shape)}; {FETCH_AGAIN}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoding:
    """An encoding of weights.

    claim: the weight of stored codes; None if they are not in this encoding; raises EncodingFault
    for malformed ones. claim_kept: the same for codes that an artifact holds next to those of its
    format, copied from its source.
    """

    title: str  # for messages: "compressed-tensors pack-quantized"
    claim: Callable[[StoredCodes], EncodedWeight | None]
    claim_kept: Callable[[StoredCodes], EncodedWeight | None] | None = None


def require_matrix(codes: StoredCodes) -> None:
    """Raise EncodingFault for codes that are no matrix."""
    if len(codes.shape) != 2:
        raise EncodingFault(f"expected two dimensions, found shape {list(codes.shape)}")


def require_fp4_groups(codes: StoredCodes, scale: TensorSpec, group: int) -> tuple[int, int]:
    """Return the shape [out, in] of a weight in FP4, two codes per byte of [out, in / 2].

    Raises EncodingFault unless there is one scale per `group` columns.
    """
    require_matrix(codes)
    rows, width = codes.shape[0], 2 * codes.shape[1]
    n_groups = width // group if width % group == 0 else -1  # -1: no shape fits
    require_shape(scale, [(rows, n_groups)], "scale")
    return rows, width


def read_group_index(read: PartReader, n_groups: int, name: str) -> Tensor:
    """Return the group of each input, [in] int64, of the part g_idx, whose tensor is `name`.

    Raises CheckpointError for a group that does not exist.
    """
    index = read("g_idx", 0, None).long()
    check_values(
        bool((index >= 0).all() & (index < n_groups).all()),
        f"{name}: expected groups 0 to {n_groups - 1}, found others",
    )
    return index


def make_row_scheme(
    kind: Literal["fp8", "int8"], codes: StoredCodes, scale: TensorSpec
) -> Scheme | None:
    """Return the scheme of 8-bit codes with one scale per row; None if compressed-tensors would
    store their tensors under other names or shapes.
    """
    is_own = scale.name == f"{codes.name}_scale" and scale.shape == (codes.shape[0], 1)
    if not is_own or len(codes.shape) != 2 or scale.dtype not in FLOAT_DTYPES:
        return None
    return Scheme(
        bits=8,
        group_size=-1,
        symmetric=True,
        scale_dtype=FLOAT_DTYPES[scale.dtype],
        kind=kind,
    )


def check_values(is_valid: bool, message: str) -> None:
    """Raise CheckpointError for data that contradicts the headers."""
    if not is_valid:
        raise CheckpointError(f"{message}; {FETCH_AGAIN}")
