"""NVFP4: pairs of FP4 codes (E2M1) with an FP8 scale per 16 values and one float32 per tensor.

    X.weight [out, in / 2] uint8, X.weight_scale [out, in / 16] E4M3, X.weight_scale_2 [] float32
        modelopt: weight = fp4 * (scale * scale_2)
    X.weight_packed, X.weight_scale as above, X.weight_global_scale [1] float32
        compressed-tensors: weight = fp4 * (scale / global_scale)

Both are computed in float32 and rounded once. The low bits of a byte come first.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from quantkit.checkpoint.encoding import (
    FP8,
    EncodedWeight,
    Encoding,
    PartReader,
    StoredCodes,
    check_values,
    require_fp4_groups,
    require_shape,
)
from quantkit.contracts import Scheme, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 16
SCALARS = ((), (1,))
SCHEME = Scheme(bits=4, group_size=GROUP, symmetric=True, scale_dtype="float8_e4m3fn", kind="nvfp4")
"""Of the tensors of compressed-tensors, which an artifact may hold unchanged."""


def claim(codes: StoredCodes) -> EncodedWeight | None:
    """Return the weight of NVFP4 codes."""
    base = codes.name.removesuffix("_packed")
    scale = codes.stored.get(f"{base}_scale")
    is_weight = base != codes.name or codes.name.endswith(".weight")
    if codes.spec.dtype != "U8" or not is_weight or scale is None or scale.dtype != FP8:
        return None
    rows, width = require_fp4_groups(codes, scale, GROUP)
    divides = base != codes.name
    ending = "global_scale" if divides else "scale_2"
    factor = codes.require(f"{base}_{ending}", "scale of the tensor", ("F32",))
    require_shape(factor, SCALARS, "scale of the tensor")
    dtype = codes.choose_dtype(scale)
    return EncodedWeight(
        label="NVFP4 g16",
        spec=TensorSpec(name=base, dtype=dtype, shape=(rows, width)),
        parts={"codes": codes.spec, "scale": scale, "factor": factor},
        scheme=SCHEME if divides and factor.shape == (1,) else None,
        decode=partial(decode, width=width, dtype=dtype, divides=divides, where=factor.name),
    )


def decode(
    read: PartReader, start: int, stop: int, *, width: int, dtype: str, divides: bool, where: str
) -> Tensor:
    """Return rows start .. stop-1 of the weight: [stop - start, in]."""
    from quantkit.checkpoint.fp8 import convert_fp8
    from quantkit.checkpoint.strips import decode_strips
    from quantkit.numerics.groups import multiply_groups
    from quantkit.numerics.microscaling import unpack_e2m1

    factor = read("factor", 0, None).reshape(())
    check_values(bool(factor > 0), f"{where}: expected a positive number, found {float(factor)}")

    def strip(first: int, last: int) -> Tensor:
        scale = convert_fp8(read("scale", first, last))  # [rows of the strip, n_groups]
        scale = scale.div_(factor) if divides else scale.mul_(factor)
        # [rows of the strip, in / 2] -> [rows of the strip, in]
        return multiply_groups(unpack_e2m1(read("codes", first, last)), scale)

    return decode_strips(strip, start, stop, (width,), dtype)


ENCODING = Encoding(title="NVFP4 (modelopt, compressed-tensors)", claim=claim)
