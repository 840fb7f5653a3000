"""Pairs of stored tensors that form one logical tensor: an FP8 weight and its block scales.

Names and shapes only, no torch.
"""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.contracts import Config, TensorSpec
from quantkit.errors import CheckpointError
from quantkit.io.files import shorten_repr

FP8 = "F8_E4M3"
SCALE_INV_SUFFIX = "_scale_inv"
SCALE_SUFFIX = "_scale"
"""Suffix of the block scales of an FP8 weight: DeepSeek's, and that of compressed-tensors."""
_SCALE_DTYPES = ("F32", "BF16", "F16")
_FETCH_AGAIN = "fetch the checkpoint again"


def get_scale_suffix(config: Config) -> str:
    """Return SCALE_INV_SUFFIX or SCALE_SUFFIX, by quantization_config.quant_method."""
    entry = config.values.get("quantization_config")
    return (
        SCALE_SUFFIX
        if isinstance(entry, dict) and entry.get("quant_method") == "compressed-tensors"
        else SCALE_INV_SUFFIX
    )


def is_scale_name(stored: Mapping[str, TensorSpec], name: str, suffix: str) -> bool:
    """Return whether a name is that of block scales.

    compressed-tensors uses the same suffix for the scales of packed codes, which have no weight.
    """
    return name.endswith(suffix) and (
        suffix == SCALE_INV_SUFFIX or name.removesuffix(suffix) in stored
    )


def select_logical_specs(stored: Mapping[str, TensorSpec], suffix: str) -> dict[str, TensorSpec]:
    """Return the stored tensors without FP8 scales, in the same order, with their stored dtypes."""
    return {name: spec for name, spec in stored.items() if not is_scale_name(stored, name, suffix)}


def read_block_size(config: Config, stored: Mapping[str, TensorSpec]) -> tuple[int, int] | None:
    """Return rows and columns of an FP8 block by quantization_config; None without FP8 weights."""
    if not any(spec.dtype == FP8 for spec in stored.values()):
        return None
    key, size = read_block_entry(config)
    if (
        not isinstance(size, list)
        or len(size) != 2
        or not all(type(n) is int and n > 0 for n in size)
    ):
        raise CheckpointError(
            f"{config.where}: {key}: expected two positive integers, as the weights "
            f"are FP8, found {shorten_repr(size)}; quantkit reads FP8 in blocks only"
        )
    return size[0], size[1]


def read_block_entry(config: Config) -> tuple[str, object]:
    """Return the config key of the FP8 block size, and its value."""
    entry = config.values.get("quantization_config")
    entry = entry if isinstance(entry, dict) else {}
    if get_scale_suffix(config) == SCALE_INV_SUFFIX:
        return "quantization_config.weight_block_size", entry.get("weight_block_size")
    groups = entry.get("config_groups")
    weights = (
        [group.get("weights") for group in groups.values()] if isinstance(groups, dict) else []
    )
    sizes = [
        arguments["block_structure"]
        for arguments in weights
        if isinstance(arguments, dict) and "block_structure" in arguments
    ]
    return "quantization_config.config_groups: block_structure", sizes[0] if sizes else None


def find_pair_faults(
    stored: Mapping[str, TensorSpec], block: tuple[int, int] | None, where: str, suffix: str
) -> list[str]:
    """Return FP8 weights without scales of the right shape, and scales without FP8 weights."""
    faults = []
    for name, spec in stored.items():
        if spec.dtype == FP8 and block is not None:
            fault = _find_weight_fault(spec, stored.get(name + suffix), name + suffix, block)
        elif spec.dtype == "F8_E5M2":
            fault = "expected FP8 as F8_E4M3, found F8_E5M2; convert it to BF16"
        elif is_scale_name(stored, name, suffix):
            fault = _find_scale_fault(
                stored.get(name.removesuffix(suffix)), name.removesuffix(suffix)
            )
        else:
            fault = None
        if fault:
            faults.append(f"{where}: tensor {shorten_repr(name)}: {fault}")
    return faults


def _find_weight_fault(
    weight: TensorSpec, scale: TensorSpec | None, name: str, block: tuple[int, int]
) -> str | None:
    if len(weight.shape) != 2:
        return (
            f"expected two dimensions for FP8 blocks, found shape {list(weight.shape)}; convert it "
            "to BF16"
        )
    if scale is None:
        return f"expected its scale {shorten_repr(name)}, found none in any file; {_FETCH_AGAIN}"
    expected = tuple(-(-size // edge) for size, edge in zip(weight.shape, block))
    if scale.shape != expected:
        return (
            f"expected a scale of shape {list(expected)} for {list(weight.shape)} in blocks of "
            f"{list(block)}, found {list(scale.shape)}; {_FETCH_AGAIN}"
        )
    if scale.dtype not in _SCALE_DTYPES:
        return (
            f"expected a scale of {', '.join(_SCALE_DTYPES)}, found {scale.dtype}; {_FETCH_AGAIN}"
        )
    return None


def _find_scale_fault(weight: TensorSpec | None, base: str) -> str | None:
    if weight is None:
        return (
            f"expected the weight {shorten_repr(base)} of this scale, found none in any file; "
            f"{_FETCH_AGAIN}"
        )
    if weight.dtype != FP8:
        return (
            f"expected {shorten_repr(base)} of this scale as {FP8}, found {weight.dtype}; "
            f"{_FETCH_AGAIN}"
        )
    return None
