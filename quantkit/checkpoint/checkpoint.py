"""A source checkpoint: logical tensors read one by one, FP8 blocks dequantized on the way, everything checked.

A logical tensor is what the model computes with. An FP8 `X.weight` and its `X.weight_scale_inv` (`X.weight_scale` in an
artifact of format compressed_tensors) are two stored tensors and one logical one; they may lie in two shards. Nothing
is kept in memory but names and headers.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from quantkit.checkpoint.file_names import CONFIG, GENERATION_CONFIG
from quantkit.checkpoint.fp8 import dequantize_fp8
from quantkit.checkpoint.fp8_pairs import (
    FP8,
    find_pair_faults,
    get_scale_suffix,
    read_block_size,
    select_logical_specs,
)
from quantkit.checkpoint.shards import Shards, leads_outside, open_shards
from quantkit.checkpoint.tensors import read_rows, read_tensor
from quantkit.contracts import Config, TensorSpec
from quantkit.errors import CheckpointError
from quantkit.io.files import is_file, join_faults, read_bytes, read_json, shorten_repr
from quantkit.progress import ProgressCallback

_SIDECARS = (
    GENERATION_CONFIG,
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template.*",
    "*preprocessor_config.json",
    "processor_config.json",
    "*.py",
    "LICEN[CS]E*",
    "NOTICE*",
)
"""FORMATS: what an artifact carries over as it is; never weights, indexes, config.json or the model card."""

_SIDECAR_LIMIT_BYTES = 1_000_000_000
_CHECK_ELEMENTS = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Fp8Blocks:
    """An FP8 weight as stored and as computed with.

    codes [out, in] float8_e4m3fn and scale [block rows, block columns], bit for bit; values [out, in] bfloat16.
    """

    codes: Tensor
    scale: Tensor
    values: Tensor


@dataclass(frozen=True)
class Checkpoint:
    """An opened source: `config`, the logical tensors in `specs`, and reads by name that any thread may do.

    `specs[name].dtype` is the stored dtype: "F8_E4M3" for an FP8 weight that `read` returns as bfloat16.
    """

    folder: Path
    config: Config
    shards: Shards
    specs: Mapping[str, TensorSpec]
    block: tuple[int, int] | None  # rows and columns of an FP8 block; None without FP8 weights
    scale_suffix: str  # what follows an FP8 weight's name in that of its scales

    @staticmethod
    def open(folder: Path) -> Checkpoint:
        """Read config.json, the index and every header; raises one CheckpointError with all faults found."""
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
                )  # carried over as it is, and read by whoever loads the artifact
        except CheckpointError as fault:
            faults.append(str(fault))
        if config is None or shards is None or faults:
            raise CheckpointError(join_faults(list(dict.fromkeys(faults))))
        stored = shards.specs
        block, suffix = read_block_size(config, stored), get_scale_suffix(config)
        if faults := find_pair_faults(stored, block, str(folder), suffix):
            raise CheckpointError(join_faults(faults))
        return Checkpoint(
            folder, config, shards, select_logical_specs(stored, suffix), block, suffix
        )

    @cached_property
    def stored_specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor as stored, the FP8 scales included."""
        return self.shards.specs

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Logical tensors by name: BF16, FP16, FP32 and integers as stored, FP8 blocks as bfloat16.

        Raises CheckpointError for an unknown name, a file that changed, and NaN or infinity among the values.
        """
        return {name: self._read(name, 0, None) for name in names}

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start .. stop-1 of one logical tensor, [stop - start, ...]: a vocabulary in pieces. Errors as `read`."""
        return self._read(name, start, stop)

    def blocks(self, name: str) -> Fp8Blocks:
        """The FP8 blocks of a weight and what they stand for, from one read. Errors as `read`, and for other dtypes."""
        spec = self._spec(name)
        if spec.dtype != FP8:
            raise CheckpointError(
                f"{self.folder}: tensor {shorten_repr(name)}: expected {FP8} blocks, found {spec.dtype}; read it as it is"
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
        """The other files an artifact carries over: tokenizer, chat template, generation config, licence, code."""
        found = {
            path for pattern in _SIDECARS for path in self.folder.glob(pattern) if path.is_file()
        }
        out = sorted(path.name for path in found if leads_outside(self.folder, path))
        if out:
            raise CheckpointError(
                f"{self.folder / out[0]}: expected a file inside the folder, found a link that leads out of it; "
                "copy the file"
            )
        return tuple(sorted(found))

    def fingerprint(self) -> str:
        """sha256 over names, sizes and headers of the weights and the bytes of config and sidecars; cheap."""
        digest = hashlib.sha256(self.shards.fingerprint().encode())
        for path in (self.folder / CONFIG, *self.sidecars):
            content = read_bytes(path, _SIDECAR_LIMIT_BYTES)
            digest.update(f"{path.name}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()

    def hashes(self, tell: ProgressCallback | None = None) -> dict[str, str]:
        """sha256 of each weight file by name; the first call reads every byte, minutes for a large model.

        CheckpointError when a file changes meanwhile, and for headers and config.json that are not those opened.
        """
        if not self._hashes:
            before, found = self.stamps(), self.shards.hashes(tell)
            opened = (
                open_shards(self.folder) == self.shards and read_config(self.folder) == self.config
            )
            if not opened or self.stamps() != before:
                raise CheckpointError(
                    f"{self.folder}: expected files that stay as they are, found others than a moment ago; wait until "
                    "they are complete and begin again"
                )
            self._hashes.update(found)
        return dict(self._hashes)

    @cached_property
    def _hashes(self) -> dict[str, str]:
        return {}  # until somebody asks

    def take_hashes(self, hashes: Mapping[str, str]) -> None:
        """Believe hashes that were taken when the files had the `stamps` they have now."""
        self._hashes.update(hashes)

    def stamps(self) -> dict[str, list[int]]:
        """Size and times of change of every file, by name: equal stamps, equal bytes, unless somebody turns clocks.

        The second time is the kernel's own, which a program that sets the first one back cannot set.
        """
        names = (*sorted(self.shards.headers), CONFIG, *(path.name for path in self.sidecars))
        found = {
            name: (self.folder / name).stat() for name in names if (self.folder / name).is_file()
        }
        return {
            name: [state.st_size, state.st_mtime_ns, state.st_ctime_ns]
            for name, state in found.items()
        }

    def content_hash(self) -> str:
        """One sha256 for the whole checkpoint: every weight byte, config and sidecars; as slow as `hashes`."""
        lines = "".join(f"{value}  {name}\n" for name, value in self.hashes().items())
        return hashlib.sha256((lines + self.fingerprint()).encode()).hexdigest()

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
                f"{self.folder}: expected a tensor {shorten_repr(name)}, found none of that name; {hint}"
            )
        return spec

    def _read(self, name: str, start: int, stop: int | None) -> Tensor:
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
        self._check_finite(name, tensor)
        return tensor

    def _scale(self, name: str) -> Tensor:
        """The scales of an FP8 weight's blocks as stored: [block rows, block columns]."""
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
        """Rows start .. stop-1 of an FP8 weight: [stop - start, in] bfloat16; `rows` gives them strip by strip."""
        assert self.block is not None  # `open` refuses FP8 weights without a block size
        return dequantize_fp8(rows, scales, self.block, start, stop, spec.shape[1])

    def _check_finite(self, name: str, tensor: Tensor) -> None:
        if tensor.is_floating_point():
            flat = tensor.reshape(-1)  # [...] -> [n_elements]
            for first in range(0, flat.numel(), _CHECK_ELEMENTS):
                piece = flat[first : first + _CHECK_ELEMENTS]
                if not _finite(piece):
                    position = first + int((~torch.isfinite(piece.to(torch.float32))).nonzero()[0])
                    raise CheckpointError(
                        f"{self.shards.locate(name)[0]}: tensor {shorten_repr(name)}: expected finite values, "
                        f"found {float(flat[position])} at element {position}; "
                        "the weights are damaged, fetch the file again"
                    )


def read_config(folder: Path) -> Config:
    """The parsed config.json of a folder; raises CheckpointError."""
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"{path}: expected the model's configuration, found no file; check the path"
        )
    if leads_outside(folder, path):
        raise CheckpointError(
            f"{path}: expected a file inside the folder, found a link out of it; copy the file"
        )
    return Config(values=read_json(path), where=str(path))


def _finite(flat: Tensor) -> bool:
    """Whether no value is NaN or infinite; minimum and maximum carry both and need no copy."""
    if flat.dtype == torch.float8_e4m3fn:  # it has NaN (all ones below the sign) and no infinity
        return not bool(((flat.view(torch.uint8) & 0x7F) == 0x7F).any())
    low, high = torch.aminmax(flat.to(torch.float32) if flat.dtype == torch.float8_e5m2 else flat)
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))
