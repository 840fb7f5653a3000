"""NF4 (arXiv 2305.14314): the nearest of 16 values per block of 64 weights; needs no data.

The values are made for normal distributions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.contracts import InputStats, Method, Quantized, Scheme
from quantkit.errors import NumericsError

if TYPE_CHECKING:
    from torch import Tensor


def solve(weight: Tensor, stats: InputStats | None, scheme: Scheme) -> Quantized:
    """Return NF4 codes of weight [..., out, in] float32, the absmax of each block as scale.

    Statistics are not used. The codes equal bitsandbytes' bit for bit (numerics.nf4). Raises
    NumericsError if a weight is not finite, a row is not a whole number of blocks, or the scheme is
    not NF4.
    """
    from quantkit.numerics import nf4  # torch is imported with the first weight

    if scheme.kind != "nf4":
        raise NumericsError(
            f"method nf4 has no codes of {scheme.bits}-bit integers; use method rtn for this linear"
        )
    codes, absmax = nf4.quantize_nf4(weight)
    return Quantized(codes=codes, scale=absmax, zero=None)


METHOD = Method(solve=solve, needs_stats=False, kinds=("nf4",))
