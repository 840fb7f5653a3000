"""MXFP4: pairs of FP4 codes (E2M1) with a power of two (E8M0) per 32 values.

    X.weight_packed [out, in / 2] uint8, X.weight_scale [out, in / 32] uint8    compressed-tensors
    X.weight        [out, in / 2] int8,  X.scale        [out, in / 32] E8M0     DeepSeek-V4
    X_blocks [experts, out, in / 32, 16] uint8, X_scales [experts, out, in / 32] uint8    gpt-oss

    weight = fp4 * 2**(scale - 127), rounded once

The low bits of a byte come first. gpt-oss computes with X [experts, in, out], transposed.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from quantkit.checkpoint.encoding import (
    E8M0_DTYPES,
    EncodedWeight,
    Encoding,
    EncodingFault,
    PartReader,
    StoredCodes,
    require_fp4_groups,
    require_shape,
)
from quantkit.contracts import Scheme, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 32
BLOCKS = "_blocks"
LABEL = "MXFP4 g32"
SCHEME = Scheme(bits=4, group_size=GROUP, symmetric=True, scale_dtype="uint8", kind="mxfp4")
"""Of the tensors of compressed-tensors, which an artifact may hold unchanged."""


def claim(codes: StoredCodes) -> EncodedWeight | None:
    """Return the weight of MXFP4 codes."""
    if codes.spec.dtype not in ("U8", "I8"):
        return None
    name = codes.name
    if weight := claim_kept(codes):
        return weight
    packed = name.removesuffix("_packed")
    if packed != name:
        scale = codes.stored.get(f"{packed}_scale")
        logical, scale_name = packed, f"{packed}_scale"
    else:
        logical, scale_name = name, f"{name.removesuffix('weight')}scale"
        scale = codes.stored.get(scale_name) if name.endswith(".weight") else None
    if scale is None or scale.dtype not in E8M0_DTYPES:
        return None
    scale = codes.require(scale_name, "scale", E8M0_DTYPES)
    rows, width = require_fp4_groups(codes, scale, GROUP)
    dtype = codes.choose_dtype(scale)
    return EncodedWeight(
        label=LABEL,
        spec=TensorSpec(name=logical, dtype=dtype, shape=(rows, width)),
        parts={"codes": codes.spec, "scale": scale},
        scheme=SCHEME if packed != name and codes.spec.dtype == scale.dtype == "U8" else None,
        decode=partial(decode, width=width, dtype=dtype),
    )


def claim_kept(codes: StoredCodes) -> EncodedWeight | None:
    """Return the weight of gpt-oss's blocks."""
    name = codes.name.removesuffix(BLOCKS)
    if codes.spec.dtype != "U8" or name == codes.name or f"{name}_scales" not in codes.stored:
        return None
    return claim_blocks(codes)


def claim_blocks(codes: StoredCodes) -> EncodedWeight:
    """Return the experts of gpt-oss in one tensor."""
    name = codes.name.removesuffix(BLOCKS)
    if len(codes.shape) != 4 or codes.shape[3] != GROUP // 2:
        raise EncodingFault(
            f"expected blocks of shape [experts, out, groups, {GROUP // 2}], found "
            f"{list(codes.shape)}; fetch the checkpoint again"
        )
    scale = codes.require(f"{name}_scales", "scale", E8M0_DTYPES)
    require_shape(scale, [codes.shape[:3]], "scale")
    experts, rows, groups, _ = codes.shape
    dtype = codes.choose_dtype(scale)
    return EncodedWeight(
        label=LABEL,
        spec=TensorSpec(name=name, dtype=dtype, shape=(experts, groups * GROUP, rows)),
        parts={"codes": codes.spec, "scale": scale},
        decode=partial(decode_blocks, shape=(groups * GROUP, rows), dtype=dtype),
        is_copied=True,
    )


def decode(read: PartReader, start: int, stop: int, *, width: int, dtype: str) -> Tensor:
    """Return rows start .. stop-1 of the weight: [stop - start, in]."""
    from quantkit.checkpoint.strips import decode_strips
    from quantkit.numerics.groups import multiply_groups
    from quantkit.numerics.microscaling import decode_e8m0, unpack_e2m1

    def strip(first: int, last: int) -> Tensor:
        # [rows of the strip, in / 2] -> [rows of the strip, in]
        values = unpack_e2m1(read("codes", first, last))
        return multiply_groups(values, decode_e8m0(read("scale", first, last)))

    return decode_strips(strip, start, stop, (width,), dtype)


def decode_blocks(
    read: PartReader, start: int, stop: int, *, shape: tuple[int, int], dtype: str
) -> Tensor:
    """Return experts start .. stop-1: [stop - start, in, out]."""
    import torch

    from quantkit.checkpoint.tensors import TORCH_DTYPES
    from quantkit.numerics.groups import multiply_groups
    from quantkit.numerics.microscaling import decode_e8m0, unpack_e2m1

    result = torch.empty(stop - start, *shape, dtype=TORCH_DTYPES[dtype])
    for e in range(start, stop):
        codes = read("codes", e, e + 1)[0].flatten(-2)  # [1, out, groups, 16] -> [out, in / 2]
        scale = decode_e8m0(read("scale", e, e + 1)[0])  # [1, out, groups] -> [out, groups]
        result[e - start] = multiply_groups(unpack_e2m1(codes), scale).T  # -> [in, out]
    return result


ENCODING = Encoding(
    title="MXFP4 (gpt-oss, DeepSeek-V4, compressed-tensors)", claim=claim, claim_kept=claim_kept
)
