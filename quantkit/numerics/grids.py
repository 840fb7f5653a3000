"""Rounding to nearest and dequantization by the kind of a scheme: integers, MXFP4 and NVFP4.

NF4 has its own (`nf4.py`).
"""

from __future__ import annotations

from torch import Tensor

from quantkit.contracts import Quantized, Scheme
from quantkit.numerics import affine, fp4


def quantize_rtn(weight: Tensor, scheme: Scheme) -> Quantized:
    """Round weights [..., out, in] float32 to nearest; see `affine` and `fp4`."""
    quantize = fp4.quantize_rtn if scheme.kind in fp4.KINDS else affine.quantize_rtn
    return quantize(weight, scheme)


def dequantize(quantized: Quantized, scheme: Scheme) -> Tensor:
    """Return the weights that codes stand for: [..., out, in] float32."""
    decode = fp4.dequantize if scheme.kind in fp4.KINDS else affine.dequantize
    return decode(quantized, scheme)


def count_fallbacks(quantized: Quantized, scheme: Scheme) -> dict[str, Tensor]:
    """Count the groups of each matrix that took a named fallback; [...] int64 per name."""
    count = fp4.count_fallbacks if scheme.kind in fp4.KINDS else affine.count_fallbacks
    return count(quantized, scheme)
