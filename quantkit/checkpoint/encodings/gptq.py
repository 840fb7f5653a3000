"""GPTQ: codes of 2, 3, 4 or 8 bits packed along the inputs (formats/README.md).

    X.qweight [in * bits / 32, out] int32    sequential codes, lowest first
    X.qzeros  [n_groups, out * bits / 32] int32
    X.scales  [n_groups, out]
    X.g_idx   [in] int32    the group of each input; optional

    weight[o, i] = (code[i, o] - zero[g, o]) * scale[g, o], rounded once

The form "gptq" stores zero - 1, and readers add 1 within the bits of a code; "gptq_v2" stores the
zero point itself. Shapes give the bits, so that modules may differ.
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
    read_group_index,
    require_matrix,
    require_shape,
)
from quantkit.contracts import TensorSpec
from quantkit.io.files import shorten_repr

if TYPE_CHECKING:
    from torch import Tensor

BITS = (2, 3, 4, 8)
V1_FORMS = ("", "gptq", "auto_gptq", "auto_round:auto_gptq", "auto_round:gptq")
V2_FORMS = ("gptq_v2",)


def claim(codes: StoredCodes) -> EncodedWeight | None:
    """Return the weight of GPTQ codes."""
    module = codes.name.removesuffix(".qweight")
    if codes.spec.dtype != "I32" or module == codes.name:
        return None
    require_matrix(codes)
    scale = codes.require(f"{module}.scales", "scale", SCALE_DTYPES)
    zero = codes.require(f"{module}.qzeros", "zero points", ("I32",))
    words, rows = codes.shape
    groups = scale.shape[0] if len(scale.shape) == 2 else 0
    require_shape(scale, [(max(groups, 1), rows)], "scale")
    n_bits = 32 * zero.shape[-1] // max(rows, 1) if zero.shape else 0
    if n_bits not in BITS:
        raise EncodingFault(
            f"expected zero points [{groups}, {rows} * bits / 32] of 2, 3, 4 or 8 bits, found "
            f"{list(zero.shape)}; fetch the checkpoint again"
        )
    require_shape(zero, [(groups, rows * n_bits // 32)], "zero point tensor")
    width, parts = words * 32 // n_bits, {"codes": codes.spec, "scale": scale, "zero": zero}
    if f"{module}.g_idx" in codes.stored:
        parts["g_idx"] = codes.require(f"{module}.g_idx", "group index", ("I32", "I64"))
        require_shape(parts["g_idx"], [(width,)], "group index")
    elif width % groups:
        raise EncodingFault(
            f"expected groups that divide {width} inputs, found {groups} scales per output; fetch "
            "the checkpoint again"
        )
    dtype = codes.choose_dtype(scale)
    return EncodedWeight(
        label=f"GPTQ INT{n_bits} {'per row' if groups == 1 else f'g{-(-width // groups)}'}",
        spec=TensorSpec(name=f"{module}.weight", dtype=dtype, shape=(rows, width)),
        parts=parts,
        decode=partial(
            decode,
            bits=n_bits,
            shape=(rows, width),
            n_groups=groups,
            offset=read_offset(codes),
            has_index="g_idx" in parts,
            dtype=dtype,
            where=f"{module}.g_idx",
        ),
    )


def read_offset(codes: StoredCodes) -> int:
    """Return what readers add to a stored zero point: 1, or 0 for gptq_v2; raises EncodingFault."""
    values = codes.quantization.values
    keys = ("checkpoint_format", "format", "packing_format")
    form = next((str(values[key]) for key in keys if values.get(key)), "")
    if form not in (*V1_FORMS, *V2_FORMS):
        raise EncodingFault(
            "quantization_config.checkpoint_format: expected gptq or gptq_v2, found "
            f"{shorten_repr(form)}; start from the original weights"
        )
    return 0 if form in V2_FORMS else 1


def decode(
    read: PartReader,
    start: int,
    stop: int,
    *,
    bits: int,
    shape: tuple[int, int],
    n_groups: int,
    offset: int,
    has_index: bool,
    dtype: str,
    where: str,
) -> Tensor:
    """Return rows start .. stop-1 of the weight: [stop - start, in]. The codes are read at once."""
    from quantkit.checkpoint.strips import decode_strips
    from quantkit.numerics.bitpack import unpack_first
    from quantkit.numerics.groups import dequantize_groups

    rows, width = shape
    words, scale = read("codes", 0, None), read("scale", 0, None)
    # [n_groups, words] -> [n_groups, out]
    zeros = (unpack_first(read("zero", 0, None), bits, 1, rows) + offset) & ((1 << bits) - 1)
    index = read_group_index(read, n_groups, where) if has_index else None

    def strip(first: int, last: int) -> Tensor:
        codes = unpack_first(words[:, first:last], bits, 0, width)  # -> [in, rows of the strip]
        # [in, rows] -> [rows, in]; [n_groups, rows] -> [rows, n_groups]
        return dequantize_groups(codes.T, scale[:, first:last].T, zeros[:, first:last].T, index)

    return decode_strips(strip, start, stop, (width,), dtype)


ENCODING = Encoding(title="GPTQ", claim=claim)
