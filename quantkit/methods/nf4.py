"""NF4: each block of 64 weights takes the nearest of 16 values made for normal distributions. It needs no data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.contracts import InputStats, Method, Quantized, Scheme
from quantkit.errors import NumericsError

if TYPE_CHECKING:
    from torch import Tensor


def solve(weight: Tensor, stats: InputStats | None, scheme: Scheme) -> Quantized:
    """NF4 codes of weight [..., out, in] float32, with absmax per block as scale; statistics are not looked at.

    The codes are bitsandbytes' to the bit (numerics.codebook). Raises NumericsError for a weight that is not finite, a
    row that is no whole number of blocks, or a scheme that is not NF4.
    """
    from quantkit.numerics import nf4  # torch starts when there is something to round

    if scheme.kind != "nf4":
        raise NumericsError(
            f"method nf4 has no codes of {scheme.bits}-bit integers; use method rtn for this linear"
        )
    codes, absmax = nf4.quantize_nf4(weight)
    return Quantized(codes=codes, scale=absmax, zero=None)


METHOD = Method(solve=solve, needs_stats=False)
