"""FP8 (E4M3) weights with scales per block, per row or per tensor.

    weight = fp8 * scale, in float32, rounded once

The scale is multiplied, despite the name "inv". Its shape gives the granularity: one value per
tensor, one per row, or one per block of `weight_block_size` (DeepSeek) or `block_structure`
(compressed-tensors). A scale of dtype F8_E8M0 or U8 is a power of two (ue8m0).

    X.weight, X.weight_scale_inv    DeepSeek; Mistral, with one scale
    X.weight, X.weight_scale        compressed-tensors float-quantized, fbgemm, modelopt
    X.weight, X.scale               DeepSeek-V4

Experts in one tensor [experts, out, in] have the same scales for each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from quantkit.checkpoint.encoding import (
    E8M0_DTYPES,
    FP8,
    SCALE_DTYPES,
    EncodedWeight,
    Encoding,
    EncodingFault,
    PartReader,
    StoredCodes,
    make_row_scheme,
)
from quantkit.contracts import TensorSpec
from quantkit.io.files import shorten_repr

if TYPE_CHECKING:
    from torch import Tensor


def list_scale_names(name: str) -> tuple[str, ...]:
    """Return the names that the scale of an FP8 weight may have."""
    short = (f"{name.removesuffix('weight')}scale",) if name.endswith(".weight") else ()
    return (f"{name}_scale_inv", f"{name}_scale", *short)


def claim(codes: StoredCodes) -> EncodedWeight | None:
    """Return the weight of FP8 codes."""
    if codes.spec.dtype == "F8_E5M2":
        raise EncodingFault("expected FP8 as F8_E4M3, found F8_E5M2; convert it to BF16")
    if codes.spec.dtype != FP8 or is_scale(codes):
        return None
    if len(codes.shape) not in (2, 3):
        raise EncodingFault(
            f"expected two or three dimensions for FP8, found shape {list(codes.shape)}; convert "
            "it to BF16"
        )
    names = list_scale_names(codes.name)
    default = names[codes.quantization.method == "compressed-tensors"]
    name = next((name for name in names if name in codes.stored), default)
    scale = codes.require(name, "scale", (*SCALE_DTYPES, *E8M0_DTYPES))
    label, block = find_granularity(codes, scale)
    has_blocks = block is not None and block[0] == block[1] and len(codes.shape) == 2
    dtype = codes.choose_dtype(scale)
    spec = TensorSpec(name=codes.name, dtype=FP8 if has_blocks else dtype, shape=codes.shape)
    return EncodedWeight(
        label=label,
        spec=spec,
        parts={"codes": codes.spec, "scale": scale},
        decode=partial(
            decode, block=block, shape=codes.shape, dtype="BF16" if has_blocks else dtype
        ),
        block=block if has_blocks else None,
        scheme=None if block else make_row_scheme("fp8", codes, scale),
    )


def is_scale(codes: StoredCodes) -> bool:
    """Return whether an FP8 tensor is the scale of other codes, as in NVFP4."""
    base = codes.name.removesuffix("_scale")
    return base != codes.name and (base in codes.stored or f"{base}_packed" in codes.stored)


def find_granularity(codes: StoredCodes, scale: TensorSpec) -> tuple[str, tuple[int, int] | None]:
    """Return the label of an FP8 weight, and its block: rows and columns that share a scale.

    None: one scale per tensor or row. Raises EncodingFault.
    """
    *experts, rows, columns = codes.shape
    count, trailing = tuple(experts), scale.shape[len(experts) :]
    power = " E8M0" if scale.dtype in E8M0_DTYPES else ""
    key, size = codes.quantization.read_block_entry(codes.name.removesuffix(".weight"))
    if size is None and scale.shape[: len(count)] == count:
        if trailing in ((), (1,), (1, 1)):
            return f"FP8 per tensor{power}", None
        if trailing in ((rows,), (rows, 1)):
            return f"FP8 per channel{power}", None
        is_group = power and len(trailing) == 2 and trailing[0] == rows and trailing[1]
        if is_group and not columns % trailing[1]:
            group = columns // trailing[1]
            return f"FP8 g{group}{power}", (1, group)
    if (
        not isinstance(size, list)
        or len(size) != 2
        or not all(type(side) is int and side > 0 for side in size)
    ):
        raise EncodingFault(
            f"{key}: expected two positive integers, as the weight {list(codes.shape)} is FP8 with "
            f"scales {list(scale.shape)}, found {shorten_repr(size)}; add the size of the blocks"
        )
    expected = (*count, -(-rows // size[0]), -(-columns // size[1]))
    if scale.shape != expected:
        raise EncodingFault(
            f"expected a scale of shape {list(expected)} for {list(codes.shape)} in blocks of "
            f"{size}, found {list(scale.shape)}; fetch the checkpoint again"
        )
    return f"FP8 {size[0]}x{size[1]}{power}", (size[0], size[1])


def decode(
    read: PartReader,
    start: int,
    stop: int,
    *,
    block: tuple[int, int] | None,
    shape: tuple[int, ...],
    dtype: str,
) -> Tensor:
    """Return rows start .. stop-1 of the weight: [stop - start, ...]."""
    import torch

    from quantkit.numerics.microscaling import decode_scale

    scale = decode_scale(read("scale", 0, None))
    if len(shape) == 2:
        return decode_matrix(partial(read, "codes"), start, stop, scale, block, shape, dtype)
    matrices = []
    for e in range(start, stop):
        codes = read("codes", e, e + 1)[0]  # [1, out, in] -> [out, in]
        own = scale if scale.numel() == 1 else scale[e]
        rows = partial(slice_rows, codes)
        matrices.append(decode_matrix(rows, 0, shape[1], own, block, shape[1:], dtype))
    return torch.stack(matrices)  # [stop - start, out, in]


def slice_rows(codes: Tensor, first: int, last: int) -> Tensor:
    """Return rows first .. last-1 of codes in memory."""
    return codes[first:last]


def decode_matrix(
    rows: Callable[[int, int], Tensor],
    start: int,
    stop: int,
    scale: Tensor,
    block: tuple[int, int] | None,
    shape: tuple[int, ...],
    dtype: str,
) -> Tensor:
    """Return rows start .. stop-1 of a matrix: [stop - start, in]. rows(i, j) reads its codes."""
    from quantkit.checkpoint.fp8 import convert_fp8, dequantize_fp8
    from quantkit.checkpoint.strips import decode_strips
    from quantkit.numerics.groups import multiply_groups

    if block is not None and block[0] > 1:
        return dequantize_fp8(rows, scale, block, start, stop, shape[1], dtype)
    if scale.numel() == 1:
        scale = scale.reshape(1, 1).expand(shape[0], 1)  # [] -> [out, 1]
    scale = scale.reshape(shape[0], -1)  # [out] -> [out, 1]

    def strip(first: int, last: int) -> Tensor:
        return multiply_groups(convert_fp8(rows(first, last)), scale[first:last])

    return decode_strips(strip, start, stop, shape[1:], dtype)


ENCODING = Encoding(title="FP8 with scales per block, row or tensor", claim=claim, claim_kept=claim)
