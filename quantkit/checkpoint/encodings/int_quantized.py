"""8-bit integers, one per byte: compressed-tensors "int-quantized" (W8A8) and LLM.int8.

X.weight             [out, in] int8
X.weight_scale       [out, 1], [out], [1] or [out, n_groups]
X.weight_zero_point  the same shape, int8; asymmetric only
X.SCB                [out] float32; bitsandbytes LLM.int8: weight = code * SCB / 127

weight = (code - zero) * scale, rounded once
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from quantkit.checkpoint.encoding import (
    SCALE_DTYPES,
    EncodedWeight,
    Encoding,
    EncodingFault,
    PartReader,
    StoredCodes,
    make_row_scheme,
    require_matrix,
)
from quantkit.contracts import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

LLM_INT8 = 127


def claim(codes: StoredCodes) -> EncodedWeight | None:
    """Return the weight of 8-bit integers."""
    name, module = codes.name, codes.name.removesuffix(".weight")
    if codes.spec.dtype != "I8" or module == name or f"{module}.scale" in codes.stored:
        return None
    require_matrix(codes)
    is_llm_int8 = f"{module}.SCB" in codes.stored
    scale_name = f"{module}.SCB" if is_llm_int8 else f"{name}_scale"
    scale = codes.require(scale_name, "scale", SCALE_DTYPES)
    rows, columns = codes.shape
    n_groups = check_scale(scale, rows, columns)
    parts = {"codes": codes.spec, "scale": scale}
    if f"{name}_zero_point" in codes.stored:
        parts["zero"] = codes.require(f"{name}_zero_point", "zero points", ("I8",))
        if parts["zero"].shape != scale.shape:
            raise EncodingFault(
                f"expected zero points of the shape of the scale, {list(scale.shape)}, found "
                f"{list(parts['zero'].shape)}; fetch the checkpoint again"
            )
    dtype = codes.choose_dtype(scale)
    group = {0: "per tensor", 1: "per row"}.get(n_groups, f"g{columns // max(n_groups, 1)}")
    return EncodedWeight(
        label="LLM.int8 per row"
        if is_llm_int8
        else f"INT8 {group} {'asymmetric' if 'zero' in parts else 'symmetric'}",
        spec=TensorSpec(name=name, dtype=dtype, shape=codes.shape),
        parts=parts,
        scheme=None if "zero" in parts else make_row_scheme("int8", codes, scale),
        decode=partial(
            decode,
            shape=codes.shape,
            dtype=dtype,
            divisor=LLM_INT8 if is_llm_int8 else 1,
            has_zero="zero" in parts,
        ),
    )


def check_scale(scale: TensorSpec, rows: int, columns: int) -> int:
    """Return the scales per row, 0 for one scale per tensor; raises EncodingFault."""
    if scale.shape in ((), (1,), (1, 1)):
        return 0
    if scale.shape == (rows,):
        return 1
    has_rows = len(scale.shape) == 2 and scale.shape[0] == rows and scale.shape[1]
    if has_rows and columns % scale.shape[1] == 0:
        return scale.shape[1]
    raise EncodingFault(
        f"expected one scale per tensor, row or group for [{rows}, {columns}], found shape "
        f"{list(scale.shape)}; fetch the checkpoint again"
    )


def decode(
    read: PartReader,
    start: int,
    stop: int,
    *,
    shape: tuple[int, ...],
    dtype: str,
    divisor: int,
    has_zero: bool,
) -> Tensor:
    """Return rows start .. stop-1 of the weight: [stop - start, in]."""
    from quantkit.checkpoint.strips import decode_strips
    from quantkit.numerics.groups import dequantize_groups

    scale = expand_rows(read("scale", 0, None).float(), shape[0])
    zero = expand_rows(read("zero", 0, None).float(), shape[0]) if has_zero else None

    def strip(first: int, last: int) -> Tensor:
        shift = 0 if zero is None else zero[first:last]
        values = dequantize_groups(read("codes", first, last), scale[first:last], shift)
        # bitsandbytes multiplies by the float32 nearest to 1 / 127
        return values if divisor == 1 else values.mul_(1 / divisor)

    return decode_strips(strip, start, stop, shape[1:], dtype)


def expand_rows(values: Tensor, rows: int) -> Tensor:
    """Return one value per tensor, row or group as [out, n_groups]."""
    if values.numel() == 1:
        return values.reshape(1, 1).expand(rows, 1)  # [] -> [out, 1]
    return values.reshape(rows, -1)  # [out] -> [out, 1]


ENCODING = Encoding(
    title="8-bit integers (compressed-tensors int-quantized, LLM.int8)", claim=claim
)
