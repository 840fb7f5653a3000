"""Which stored tensors make one logical tensor: an FP8 weight and its block scales. Names and shapes only, no torch."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.contracts import Config, TensorSpec
from quantkit.errors import CheckpointError
from quantkit.storage.files import brief

FP8 = "F8_E4M3"
_SUFFIX = "_scale_inv"
_SCALE_DTYPES = ("F32", "BF16", "F16")
_AGAIN = "fetch the checkpoint again"


def scale_name(name: str) -> str:
    """The stored name of the block scales of an FP8 weight."""
    return name + _SUFFIX


def logical_specs(stored: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The stored tensors without the scales of FP8 weights, in the same order, dtypes as stored."""
    return {name: spec for name, spec in stored.items() if not name.endswith(_SUFFIX)}


def block_size(config: Config, stored: Mapping[str, TensorSpec]) -> tuple[int, int] | None:
    """Rows and columns of an FP8 block by quantization_config.weight_block_size; None without FP8 weights."""
    if not any(spec.dtype == FP8 for spec in stored.values()):
        return None
    entry = config.values.get("quantization_config")
    size = entry.get("weight_block_size") if isinstance(entry, dict) else None
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise CheckpointError(
            f"{config.where}: quantization_config.weight_block_size: expected two positive integers, as the weights "
            f"are FP8, found {brief(size)}; quantkit reads FP8 in blocks only"
        )
    return size[0], size[1]


def pair_faults(stored: Mapping[str, TensorSpec], block: tuple[int, int] | None, where: str) -> list[str]:
    """FP8 weights without a scale of the right shape, and scales without an FP8 weight; one sentence each."""
    faults = []
    for name, spec in stored.items():
        if spec.dtype == FP8 and block is not None:
            fault = _weight_fault(spec, stored.get(scale_name(name)), block)
        elif spec.dtype == "F8_E5M2":
            fault = "expected FP8 as F8_E4M3, found F8_E5M2; convert it to BF16"
        elif name.endswith(_SUFFIX):
            fault = _scale_fault(stored.get(name.removesuffix(_SUFFIX)), name)
        else:
            fault = None
        if fault:
            faults.append(f"{where}: tensor {brief(name)}: {fault}")
    return faults


def _weight_fault(weight: TensorSpec, scale: TensorSpec | None, block: tuple[int, int]) -> str | None:
    if len(weight.shape) != 2:
        return f"expected two dimensions for FP8 blocks, found shape {list(weight.shape)}; convert it to BF16"
    if scale is None:
        return f"expected its scale {brief(scale_name(weight.name))}, found none in any file; {_AGAIN}"
    expected = tuple(-(-size // edge) for size, edge in zip(weight.shape, block))
    if scale.shape != expected:
        return (
            f"expected a scale of shape {list(expected)} for {list(weight.shape)} in blocks of {list(block)}, "
            f"found {list(scale.shape)}; {_AGAIN}"
        )
    if scale.dtype not in _SCALE_DTYPES:
        return f"expected a scale of {', '.join(_SCALE_DTYPES)}, found {scale.dtype}; {_AGAIN}"
    return None


def _scale_fault(weight: TensorSpec | None, name: str) -> str | None:
    base = brief(name.removesuffix(_SUFFIX))
    if weight is None:
        return f"expected the weight {base} of this scale, found none in any file; {_AGAIN}"
    if weight.dtype != FP8:
        return f"expected {base} of this scale as {FP8}, found {weight.dtype}; {_AGAIN}"
    return None
