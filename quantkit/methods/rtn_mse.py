"""RTN with shrunk ranges: each group's range is the one whose nearest codes lose least in plain squared error.

Data-free, as RTN is: what a few large weights give up is less than what all others gain from finer steps (the MSE
observer of quantization toolkits; arXiv 1810.05723, section 3.1, on a grid and for weights).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.contracts import InputStats, Method, Quantized, Scheme

if TYPE_CHECKING:
    from torch import Tensor


def solve(weight: Tensor, stats: InputStats | None, scheme: Scheme) -> Quantized:
    """Round weight [..., out, in] float32 to nearest in the best range of a grid; statistics are not looked at.

    No group's squared error is above that of its min/max range. Raises NumericsError for a weight that is not finite,
    or a group size that does not divide `in`.
    """
    from quantkit.numerics import (
        affine,
        range_search,
    )  # torch starts when there is something to round

    scale, zero = range_search.search_ranges_by_diagonal(
        weight, weight.new_ones(weight.shape[-1]), scheme
    )
    return affine.quantize(weight, scale, zero, scheme)


METHOD = Method(solve=solve, needs_stats=False)
