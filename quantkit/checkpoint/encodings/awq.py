"""AWQ "gemm": 4-bit codes packed along the outputs in AutoAWQ's order (formats/README.md).

X.qweight [in, out / 8] int32, X.qzeros [n_groups, out / 8] int32, X.scales [n_groups, out]

weight[o, i] = (code[i, o] - zero[g, o]) * scale[g, o], rounded once
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
    require_shape,
)
from quantkit.contracts import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

BITS = 4
PER_WORD = 8


def claim(codes: StoredCodes) -> EncodedWeight | None:
    """Return the weight of AWQ codes; GPTQ's have as many columns as scales."""
    module = codes.name.removesuffix(".qweight")
    scale = codes.stored.get(f"{module}.scales")
    if codes.spec.dtype != "I32" or module == codes.name or len(codes.shape) != 2:
        return None
    columns, words = codes.shape
    if scale is None or len(scale.shape) != 2 or scale.shape[1] != words * PER_WORD:
        return None
    scale = codes.require(f"{module}.scales", "scale", SCALE_DTYPES)
    version = str(codes.quantization.values.get("version") or "gemm").lower()
    if version != "gemm":
        raise EncodingFault(
            f"expected AWQ of version gemm, found quantization_config.version {version}; start "
            "from the original weights"
        )
    groups, rows = scale.shape
    if not groups or columns % groups:
        raise EncodingFault(
            f"expected scales [groups, {rows}] whose groups divide {columns} inputs, found "
            f"{list(scale.shape)}; fetch the checkpoint again"
        )
    zero = codes.require(f"{module}.qzeros", "zero points", ("I32",))
    require_shape(zero, [(groups, words)], "zero point tensor")
    dtype = codes.choose_dtype(scale)
    return EncodedWeight(
        label=f"AWQ INT4 g{columns // groups}",
        spec=TensorSpec(name=f"{module}.weight", dtype=dtype, shape=(rows, columns)),
        parts={"codes": codes.spec, "scale": scale, "zero": zero},
        decode=partial(decode, width=columns, dtype=dtype),
    )


def decode(read: PartReader, start: int, stop: int, *, width: int, dtype: str) -> Tensor:
    """Return rows start .. stop-1 of the weight: [stop - start, in]. The codes are read at once."""
    from quantkit.checkpoint.strips import decode_strips
    from quantkit.numerics.bitpack import AWQ_ORDER, unpack
    from quantkit.numerics.groups import dequantize_groups

    words, scale = read("codes", 0, None), read("scale", 0, None)
    zeros = unpack(read("zero", 0, None), BITS, 1, AWQ_ORDER)  # -> [n_groups, out]

    def strip(first: int, last: int) -> Tensor:
        begin, end = first // PER_WORD, -(-last // PER_WORD)
        # [in, words of the strip] -> [in, outputs of these words]
        codes = unpack(words[:, begin:end], BITS, 1, AWQ_ORDER)
        own = codes[:, first - begin * PER_WORD : last - begin * PER_WORD]
        # [in, outputs] -> [outputs, in]; [n_groups, outputs] -> [outputs, n_groups]
        return dequantize_groups(own.T, scale[:, first:last].T, zeros[:, first:last].T)

    return decode_strips(strip, start, stop, (width,), dtype)


ENCODING = Encoding(title="AWQ gemm", claim=claim)
