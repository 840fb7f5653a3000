"""RTN with clipped ranges: each group takes the range whose nearest codes have the least MSE.

Data-free, like RTN: a few large weights lose less than all others gain from finer steps (the MSE
observer of quantization toolkits; arXiv 1810.05723, section 3.1, on a grid and for weights).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.contracts import InputStats, Method, Quantized, Scheme

if TYPE_CHECKING:
    from torch import Tensor


def solve(weight: Tensor, stats: InputStats | None, scheme: Scheme) -> Quantized:
    """Round weight [..., out, in] float32 to nearest in the best range of a grid.

    Statistics are not used. No group's squared error is above that of its min/max range. Raises
    NumericsError if a weight is not finite or the group size does not divide `in`.
    """
    from quantkit.numerics import affine, fp4, range_search  # torch comes with the first weight

    importance = weight.new_ones(weight.shape[-1])
    if scheme.kind in fp4.KINDS:
        return fp4.quantize(weight, *fp4.search_scales(weight, importance, scheme), scheme)
    scale, zero = range_search.search_ranges_by_diagonal(weight, importance, scheme)
    return affine.quantize(weight, scale, zero, scheme)


METHOD = Method(solve=solve, needs_stats=False, kinds=("int", "mxfp4", "nvfp4"))
