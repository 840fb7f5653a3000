"""RTN: round every weight to the nearest code of its group's min/max range; the baseline.

FP4 has the range of the group's largest weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.contracts import InputStats, Method, Quantized, Scheme

if TYPE_CHECKING:
    from torch import Tensor


def solve(weight: Tensor, stats: InputStats | None, scheme: Scheme) -> Quantized:
    """Round weight [..., out, in] float32 to the nearest codes; statistics are not used.

    Raises NumericsError if a weight is not finite or the group size does not divide `in`.
    """
    from quantkit.numerics import grids  # torch is imported with the first weight

    return grids.quantize_rtn(weight, scheme)


METHOD = Method(solve=solve, needs_stats=False, kinds=("int", "mxfp4", "nvfp4"))
