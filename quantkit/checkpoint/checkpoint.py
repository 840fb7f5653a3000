"""A source checkpoint: checked logical tensors, read one by one, with FP8 blocks dequantized.

A logical tensor is one that the model computes with. An FP8 `X.weight` and its `X.weight_scale_inv`
(`X.weight_scale` in an artifact of format compressed_tensors) are two stored tensors and one
logical tensor; they may be in two shards. Only names and headers are kept in memory.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from quantkit.checkpoint.file_names import (
    ADAPTER_CONFIG,
    CHAT_TEMPLATES,
    CONFIG,
    GENERATION_CONFIG,
)
from quantkit.checkpoint.folder_rules import find_redirects, is_sidecar
from quantkit.checkpoint.fp8 import dequantize_fp8
from quantkit.checkpoint.fp8_pairs import (
    FP8,
    find_pair_faults,
    get_scale_suffix,
    read_block_size,
    select_logical_specs,
)
from quantkit.checkpoint.remote_code import list_code_files
from quantkit.checkpoint.shards import Shards, leads_outside, open_shards
from quantkit.checkpoint.source_config import make_source_config
from quantkit.checkpoint.stored_names import name_tensors
from quantkit.checkpoint.tensors import read_rows, read_tensor
from quantkit.contracts import Config, TensorSpec
from quantkit.errors import CheckpointError
from quantkit.io.files import is_file, join_faults, read_bytes, read_json, shorten_repr
from quantkit.progress import ProgressCallback

_SIDECAR_LIMIT_BYTES = 1_000_000_000
_CHECK_ELEMENTS = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Fp8Blocks:
    """An FP8 weight as stored and dequantized.

    codes: [out, in] float8_e4m3fn; scale: [block rows, block columns], both bit for bit; values:
    [out, in] bfloat16.
    """

    codes: Tensor
    scale: Tensor
    values: Tensor


@dataclass(frozen=True)
class Checkpoint:
    """An opened source: config, logical tensor specs, and thread-safe reads by name.

    `specs[name].dtype` is the stored dtype: "F8_E4M3" for an FP8 weight that `read` returns as
    bfloat16.
    """

    folder: Path
    config: Config
    shards: Shards
    specs: Mapping[str, TensorSpec]
    block: tuple[int, int] | None  # rows and columns of an FP8 block; None without FP8 weights
    scale_suffix: str  # what follows an FP8 weight's name in that of its scales

    @staticmethod
    def open(folder: Path) -> Checkpoint:
        """Read config.json, the index and every header.

        Raises one CheckpointError with all faults.
        """
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
        stored = shards.specs
        block, suffix = read_block_size(config, stored), get_scale_suffix(config)
        if faults := find_pair_faults(stored, block, str(folder), suffix):
            raise CheckpointError(join_faults(faults))
        return Checkpoint(
            folder, config, shards, select_logical_specs(stored, suffix), block, suffix
        )

    @cached_property
    def stored_specs(self) -> Mapping[str, TensorSpec]:
        """Specs of all stored tensors, including FP8 scales."""
        return self.shards.specs

    def read(self, names: Iterable[str], finite: bool = True) -> dict[str, Tensor]:
        """Read logical tensors: BF16, FP16, FP32 and integers as stored, FP8 blocks as bfloat16.

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
        codes = read_tensor(*self.shards.locate(name), name)
        scale = self._scale(name)
        values = self._dequantized(
            spec, lambda first, last: codes[first:last], scale, 0, spec.shape[0]
        )
        self._check_finite(name, values)
        return Fp8Blocks(codes=codes, scale=scale, values=values)

    @cached_property
    def sidecars(self) -> tuple[Path, ...]:
        """Other files that an artifact carries over: tokenizer, chat template, license, and the
        code that an auto_map names.
        """
        code = list_code_files(self.folder)
        paths = {
            path
            for path in (*self.folder.glob("*"), *self.folder.glob(f"{CHAT_TEMPLATES}/*"))
            if is_sidecar(path.relative_to(self.folder).as_posix()) and path.is_file()
        }
        paths = {path for path in paths if path.suffix != ".py" or path.name in code}
        outside = sorted(path for path in paths if leads_outside(self.folder, path))
        if outside:
            raise CheckpointError(
                f"{outside[0]}: expected a file inside the folder, found a link that leads out of "
                "it; copy the file"
            )
        return tuple(sorted(paths))

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
        spec = self._spec(name)
        file, header = self.shards.locate(name)
        if spec.dtype == FP8:
            last = spec.shape[0] if stop is None else stop
            tensor = self._dequantized(
                spec, partial(read_rows, file, header, name), self._scale(name), start, last
            )
        elif stop is None:
            tensor = read_tensor(file, header, name)
        else:
            tensor = read_rows(file, header, name, start, stop)
        if finite:
            self._check_finite(name, tensor)
        return tensor

    def _scale(self, name: str) -> Tensor:
        """Read the block scales of an FP8 weight as stored: [block rows, block columns]."""
        scale = name + self.scale_suffix
        scales = read_tensor(*self.shards.locate(scale), scale)
        self._check_finite(scale, scales)
        return scales

    def _dequantized(
        self,
        spec: TensorSpec,
        rows: Callable[[int, int], Tensor],
        scales: Tensor,
        start: int,
        stop: int,
    ) -> Tensor:
        """Dequantize rows start .. stop-1 of an FP8 weight: [stop - start, in] bfloat16.

        rows(i, j) reads rows i .. j-1 as stored.
        """
        assert self.block is not None  # `open` refuses FP8 weights without a block size
        return dequantize_fp8(rows, scales, self.block, start, stop, spec.shape[1])

    def _check_finite(self, name: str, tensor: Tensor) -> None:
        if tensor.is_floating_point():
            flat = tensor.reshape(-1)  # [...] -> [n_elements]
            for first in range(0, flat.numel(), _CHECK_ELEMENTS):
                piece = flat[first : first + _CHECK_ELEMENTS]
                if not _is_finite(piece):
                    position = first + int((~torch.isfinite(piece.to(torch.float32))).nonzero()[0])
                    raise CheckpointError(
                        f"{self.shards.locate(name)[0]}: tensor {shorten_repr(name)}: expected "
                        f"finite values, found {float(flat[position])} at element {position}; the "
                        "weights are damaged, fetch the file again"
                    )


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
        raise CheckpointError(
            f"{path}: expected a file inside the folder, found a link out of it; copy the file"
        )
    return make_source_config(read_json(path, infinite=True), str(path))


def _is_finite(flat: Tensor) -> bool:
    """Return whether all values are finite.

    NaN and infinity survive min and max, without a copy.
    """
    if flat.dtype == torch.float8_e4m3fn:  # it has NaN (all ones below the sign) and no infinity
        return not bool(((flat.view(torch.uint8) & 0x7F) == 0x7F).any())
    low, high = torch.aminmax(flat.to(torch.float32) if flat.dtype == torch.float8_e5m2 else flat)
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))
