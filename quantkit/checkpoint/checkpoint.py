"""A source checkpoint: checked logical tensors, read one by one, with codes dequantized.

A logical tensor is one that the model computes with. Codes and their scales, as an FP8 `X.weight`
and its `X.weight_scale_inv`, are several stored tensors and one logical tensor (`encodings/`); they
may be in several shards. Only names and headers are kept in memory.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from quantkit.checkpoint.canonical_names import name_tensors
from quantkit.checkpoint.encoding import FP8, EncodedWeight
from quantkit.checkpoint.file_names import (
    ADAPTER_CONFIG,
    CONFIG,
    GENERATION_CONFIG,
)
from quantkit.checkpoint.folder_rules import find_redirects
from quantkit.checkpoint.logical_tensors import LogicalTensors, find_logical_tensors
from quantkit.checkpoint.scan import read_small_tensor
from quantkit.checkpoint.shards import (
    OUTSIDE_LINK,
    Shards,
    find_foreign_weights,
    leads_outside,
    open_shards,
)
from quantkit.checkpoint.side_files import list_side_files
from quantkit.checkpoint.source_config import make_source_config
from quantkit.checkpoint.stacked import split_specs
from quantkit.checkpoint.tensors import read_rows, read_tensor
from quantkit.contracts import Block, Config, TensorSpec
from quantkit.errors import CheckpointError
from quantkit.io.files import is_file, join_faults, read_bytes, read_json, shorten_repr
from quantkit.numerics.microscaling import decode_e8m0
from quantkit.progress import ProgressCallback

_SIDECAR_LIMIT_BYTES = 1_000_000_000
_CHECK_ELEMENTS = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Fp8Blocks:
    """An FP8 weight as stored and dequantized.

    codes: [out, in] float8_e4m3fn; scale: [block rows, block columns], both bit for bit, but scales
    that are powers of two (E8M0) as float32; values: [out, in] bfloat16.
    """

    codes: Tensor
    scale: Tensor
    values: Tensor


@dataclass(frozen=True)
class Checkpoint:
    """An opened source: config, logical tensor specs, and thread-safe reads by name.

    `specs[name].dtype` is that of `read`, but "F8_E4M3" for a weight in FP8 blocks that `read`
    returns as bfloat16: an artifact may keep its blocks.
    """

    folder: Path
    config: Config
    shards: Shards
    logical: LogicalTensors

    @staticmethod
    def open(folder: Path, *, decode: bool = False) -> Checkpoint:
        """Read config.json, the index and every header.

        decode: of a source, whose codes are decoded in every encoding; otherwise only those that an
        artifact copies from its source. Raises one CheckpointError with all faults.
        """
        if foreign := find_foreign_weights(folder):
            raise CheckpointError(foreign)
        faults: list[str] = []
        config, shards = None, None
        try:
            config = read_config(folder)
        except CheckpointError as fault:
            faults.append(str(fault))
        try:
            shards = open_shards(folder)
            if is_file(folder / GENERATION_CONFIG):
                read_json(
                    folder / GENERATION_CONFIG
                )  # carried over unchanged, and read when the artifact is loaded
        except CheckpointError as fault:
            faults.append(str(fault))
        if config is not None:
            faults += find_redirects(config.values, str(folder / CONFIG))
            faults += find_adapter_fault(folder)
        if config is None or shards is None or faults:
            raise CheckpointError(join_faults(list(dict.fromkeys(faults))))
        shards = name_shards(shards, config)
        logical = find_logical_tensors(
            config,
            shards.specs,
            str(folder),
            decode=decode,
            read_bytes=partial(read_state, shards),
        )
        return Checkpoint(folder, config, shards, logical)

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Specs of the logical tensors."""
        return self.logical.specs

    @cached_property
    def stored_specs(self) -> Mapping[str, TensorSpec]:
        """Specs of all stored tensors, scales included."""
        return self.shards.specs

    def split_experts(self, blocks: Iterable[Block]) -> Checkpoint:
        """Return the checkpoint with the experts of stacked tensors as logical tensors."""
        specs, parts = split_specs(self.specs, blocks)
        return replace(self, logical=replace(self.logical, specs=specs, experts=parts))

    def read_parts(self, name: str) -> dict[str, Tensor]:
        """Read the stored tensors of an encoded weight, by their names. Raises as `read` does."""
        weight = self.logical.encoded[name]
        return {
            spec.name: self._read_part(weight, part, 0, None) for part, spec in weight.parts.items()
        }

    def read_stacked(self, name: str, codes: bool) -> dict[str, Tensor]:
        """Read a stored tensor with all experts of a layer, by its name.

        codes: as stored, with its scales; otherwise codes are decoded. Raises as `read` does.
        """
        if codes and name in self.logical.encoded:
            return self.read_parts(name)
        return {name: self._read_stored(name, 0, None)}

    def list_parts(self, name: str) -> tuple[str, ...]:
        """Return the stored tensors of a logical one: its own name, or codes and scales."""
        part = self.logical.experts.get(name)
        stored = part.stacked.name if part else name
        weight = self.logical.encoded.get(stored)
        return tuple(part.name for part in weight.parts.values()) if weight else (stored,)

    def read(self, names: Iterable[str], finite: bool = True) -> dict[str, Tensor]:
        """Read logical tensors: BF16, FP16, FP32 and integers as stored, codes dequantized.

        Raises CheckpointError for an unknown name, a changed file, and, if values must be `finite`,
        NaN or infinity.
        """
        return {name: self._read(name, 0, None, finite) for name in names}

    def read_rows(self, name: str, start: int, stop: int, finite: bool = True) -> Tensor:
        """Read rows start .. stop-1 of a logical tensor: [stop - start, ...]. Raises as `read`
        does.
        """
        return self._read(name, start, stop, finite)

    def read_fp8_blocks(self, name: str) -> Fp8Blocks:
        """Read an FP8 weight once, as stored and dequantized.

        Raises as `read` does, and for other dtypes.
        """
        spec = self._spec(name)
        if spec.dtype != FP8:
            raise CheckpointError(
                f"{self.folder}: tensor {shorten_repr(name)}: expected {FP8} blocks, found "
                f"{spec.dtype}; read it as it is"
            )
        weight = self.logical.encoded[name]
        codes, scale = (self._read_part(weight, part, 0, None) for part in ("codes", "scale"))

        def read(part: str, start: int, stop: int | None) -> Tensor:
            return codes[start:stop] if part == "codes" else scale

        values = weight.decode(read, 0, spec.shape[0])
        self._check_finite(name, values)
        is_power = scale.dtype in (torch.uint8, torch.float8_e8m0fnu)
        return Fp8Blocks(
            codes=codes, scale=decode_e8m0(scale) if is_power else scale, values=values
        )

    @cached_property
    def sidecars(self) -> tuple[Path, ...]:
        """Other files that an artifact carries over: tokenizer, chat templates, licenses, other
        data, and the code that an auto_map names.
        """
        return list_side_files(self.folder)

    def compute_fingerprint(self) -> str:
        """Return the sha256 of names, sizes and headers of the weights and of config and sidecars;
        cheap.
        """
        digest = hashlib.sha256(self.shards.compute_fingerprint().encode())
        for path in (self.folder / CONFIG, *self.sidecars):
            content = read_bytes(path, _SIDECAR_LIMIT_BYTES)
            name = path.relative_to(self.folder).as_posix()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()

    def compute_hashes(self, progress: ProgressCallback | None = None) -> dict[str, str]:
        """Return the sha256 of each weight file by name.

        The first call reads every byte, which takes minutes for a large model. Raises
        CheckpointError if a file changes meanwhile, or if headers or config.json differ from the
        opened ones.
        """
        if not self._hashes:
            stamps, digests = self.read_stamps(), self.shards.compute_hashes(progress)
            config, shards = read_config(self.folder), open_shards(self.folder)
            is_unchanged = config == self.config and name_shards(shards, config) == self.shards
            if not is_unchanged or self.read_stamps() != stamps:
                raise CheckpointError(
                    f"{self.folder}: expected files that stay as they are while they are hashed, "
                    "found changed ones; wait until they are complete and run the command again"
                )
            self._hashes.update(digests)
        return dict(self._hashes)

    @cached_property
    def _hashes(self) -> dict[str, str]:
        return {}  # filled by compute_hashes and trust_hashes

    def trust_hashes(self, hashes: Mapping[str, str]) -> None:
        """Trust hashes that were computed when the files had the same stamps as now."""
        self._hashes.update(hashes)

    def read_stamps(self) -> dict[str, list[int]]:
        """Return size, mtime and ctime of every file: equal stamps mean equal bytes.

        The kernel sets ctime; a program that resets mtime cannot reset it. Setting the clock back
        defeats both.
        """
        sidecars = (path.relative_to(self.folder).as_posix() for path in self.sidecars)
        names = (*sorted(self.shards.headers), CONFIG, *sidecars)
        states = {
            name: (self.folder / name).stat() for name in names if (self.folder / name).is_file()
        }
        return {
            name: [state.st_size, state.st_mtime_ns, state.st_ctime_ns]
            for name, state in states.items()
        }

    def compute_content_hash(self) -> str:
        """Return one sha256 of the whole checkpoint: weights, config and sidecars; as slow as
        `hashes`.
        """
        lines = "".join(f"{value}  {name}\n" for name, value in self.compute_hashes().items())
        return hashlib.sha256((lines + self.compute_fingerprint()).encode()).hexdigest()

    def _spec(self, name: str) -> TensorSpec:
        spec = self.specs.get(name)
        if spec is None:
            near = difflib.get_close_matches(name, self.specs, n=1)
            hint = (
                f"did you mean {shorten_repr(near[0])}?"
                if near
                else "check the architecture and the config"
            )
            raise CheckpointError(
                f"{self.folder}: expected a tensor {shorten_repr(name)}, found none of that name; "
                f"{hint}"
            )
        return spec

    def _read(self, name: str, start: int, stop: int | None, finite: bool = True) -> Tensor:
        self._spec(name)  # it must be known
        if part := self.logical.experts.get(name):
            tensor = part.take(self._read_stored(part.stacked.name, *part.rows))[start:stop]
        else:
            tensor = self._read_stored(name, start, stop)
        if finite:
            self._check_finite(name, tensor)
        return tensor

    def _read_stored(self, name: str, start: int, stop: int | None) -> Tensor:
        """Read rows of a stored tensor, or of the weight that codes of that name stand for."""
        weight = self.logical.encoded.get(name)
        if weight is not None:
            shape = weight.spec.shape
            last = shape[0] if stop is None else stop
            if not 0 <= start <= last <= shape[0]:
                raise CheckpointError(
                    f"{self.folder}: tensor {shorten_repr(name)}: expected rows within "
                    f"{shape}, found {start}:{last}"
                )
            return weight.decode(partial(self._read_part, weight), start, last)
        if stop is None:
            return read_tensor(*self.shards.locate(name), name)
        return read_rows(*self.shards.locate(name), name, start, stop)

    def _read_part(self, weight: EncodedWeight, part: str, start: int, stop: int | None) -> Tensor:
        """Read rows of a stored part of an encoded weight, all of them for stop None."""
        stored = weight.parts[part].name
        file, header = self.shards.locate(stored)
        if stop is not None:
            return read_rows(file, header, stored, start, stop)
        tensor = read_tensor(file, header, stored)
        if part != "codes":
            self._check_finite(stored, tensor)
        return tensor

    def _locate(self, name: str) -> Path:
        """Return the file of a stored tensor, or of the codes of an encoded one."""
        part = self.logical.experts.get(name)
        name = part.stacked.name if part else name
        weight = self.logical.encoded.get(name)
        return self.shards.locate(weight.parts["codes"].name if weight else name)[0]

    def _check_finite(self, name: str, tensor: Tensor) -> None:
        if tensor.is_floating_point():
            flat = tensor.reshape(-1)  # [...] -> [n_elements]
            for first in range(0, flat.numel(), _CHECK_ELEMENTS):
                piece = flat[first : first + _CHECK_ELEMENTS]
                if not _is_finite(piece):
                    position = first + int((~torch.isfinite(piece.to(torch.float32))).nonzero()[0])
                    raise CheckpointError(
                        f"{self._locate(name)}: tensor {shorten_repr(name)}: expected "
                        f"finite values, found {float(flat[position])} at element {position}; the "
                        "weights are damaged, fetch the file again"
                    )


def read_state(shards: Shards, name: str) -> bytes:
    """Return the bytes of a small stored tensor."""
    return read_small_tensor(*shards.locate(name), name)


def name_shards(shards: Shards, config: Config) -> Shards:
    """Return shards whose tensors have the names that transformers expects.

    Raises CheckpointError.
    """
    named = name_tensors(shards.headers, shards.files, config)
    return replace(
        shards,
        headers=named.headers,
        files=named.files,
        notes=(*shards.notes, *named.notes),
    )


def find_adapter_fault(folder: Path) -> Iterator[str]:
    """Yield why a folder with an adapter is no source: engines differ about adding it."""
    if is_file(folder / ADAPTER_CONFIG):
        yield (
            f"{folder / ADAPTER_CONFIG}: expected a model alone, found an adapter next to it, "
            "which transformers adds where peft is installed; merge it into the weights, or "
            "remove it"
        )


def read_config(folder: Path) -> Config:
    """Read the config.json of a folder; raises CheckpointError."""
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"{path}: expected the model's configuration, found no file; check the path"
        )
    if leads_outside(folder, path):
        raise CheckpointError(f"{path}: {OUTSIDE_LINK}")
    return make_source_config(read_json(path, infinite=True), str(path))


def _is_finite(flat: Tensor) -> bool:
    """Return whether all values are finite.

    NaN and infinity survive min and max, without a copy.
    """
    if flat.dtype == torch.float8_e8m0fnu:  # it has NaN (all ones) and no infinity
        return not bool((flat.view(torch.uint8) == 0xFF).any())
    if flat.dtype == torch.float8_e4m3fn:  # it has NaN (all ones below the sign) and no infinity
        return not bool(((flat.view(torch.uint8) & 0x7F) == 0x7F).any())
    low, high = torch.aminmax(flat.to(torch.float32) if flat.dtype == torch.float8_e5m2 else flat)
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))
