"""Dequantization of FP8 weights in blocks, as DeepSeek-V3 stores them, to BF16.

    weight[n, k] = fp8[n, k] * scale_inv[n // block_rows, k // block_columns]

The scale is multiplied, despite "inv". The last block of a row or column may be partial.
DeepSeek-V3 report (arXiv:2412.19437) section 3.3.2; the arithmetic is that of DeepSeek's own cast
to BF16: FP8 to float32, one multiplication in float32, one rounding to bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantkit.checkpoint.tensors import TORCH_DTYPES

# float32 of each of the 256 bytes: a table lookup is three times as fast as torch's conversion on
# a CPU
_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32).numpy()
_STRIP_ELEMENTS = (
    1 << 17
)  # a strip and its float32 copy stay in the cache: twice as fast as whole rows of blocks


def convert_fp8(codes: Tensor) -> Tensor:
    """Return float8_e4m3fn codes [...] as float32."""
    return torch.from_numpy(_VALUES.take(codes.view(torch.uint8).numpy()))


def dequantize_fp8(
    rows: Callable[[int, int], Tensor],
    scale_inv: Tensor,
    block: tuple[int, int],
    start: int,
    stop: int,
    width: int,
    dtype: str = "BF16",
) -> Tensor:
    """Dequantize rows start .. stop-1 of a weight: [stop - start, width] of a safetensors dtype.

    rows(i, j) reads rows i .. j-1 as stored, [j - i, width] float8_e4m3fn; it is called for strips
    within one row of blocks, so that memory holds little more than the result. scale_inv: [block
    rows, block columns], any floating dtype.
    """
    result = torch.empty(stop - start, width, dtype=TORCH_DTYPES[dtype])
    scales = scale_inv.to(torch.float32)
    first = start
    while first < stop:
        strip = first // block[0]
        last = min((strip + 1) * block[0], stop, first + max(1, _STRIP_ELEMENTS // max(width, 1)))
        values = convert_fp8(rows(first, last))  # [rows of the strip, width]
        factors = scales[strip].repeat_interleave(block[1])[:width]  # [block columns] -> [width]
        result[first - start : last - start] = values.mul_(factors)
        first = last
    return result
