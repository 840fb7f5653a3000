"""AWQ (arXiv 2306.00978): scale important input channels up, then clip ranges.

Both searches run on the Gram matrix of the input alone. Rounding is to the nearest code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.contracts import InputStats, Method, Quantized, Rescale, Scheme
from quantkit.errors import NumericsError

if TYPE_CHECKING:
    from torch import Tensor


def solve(weight: Tensor, stats: InputStats | None, scheme: Scheme) -> Quantized:
    """Clip each group's range to the least error under the gram, then round to the nearest code.

    weight [..., out, in] float32, already scaled; stats of its input, gram [..., in, in]. The error
    under the gram is never above RTN's; an input that was never seen (a gram of zeros) gives RTN.
    Raises NumericsError without statistics.
    """
    from quantkit.numerics import affine, fp4, gptq, range_search  # torch with the first weight

    if stats is None:
        raise NumericsError(
            "awq chooses ranges by calibration statistics, found none; "
            "use method rtn for this linear"
        )
    if scheme.kind in fp4.KINDS:
        diagonal = stats.gram.diagonal(dim1=-2, dim2=-1)
        searched = fp4.quantize(weight, *fp4.search_scales(weight, diagonal, scheme), scheme)
        plain = fp4.quantize_rtn(weight, scheme)
        return gptq.select_better_rows(weight, stats.gram, searched, plain, scheme)
    scale, zero = range_search.search_ranges(weight, stats.gram, scheme)
    return affine.quantize(weight, scale, zero, scheme)


def compute_candidates(mean_abs: Tensor) -> Tensor:
    """Return the input scales to try: mean_abs [in] -> [n, in] float32, the first all ones."""
    from quantkit.numerics import awq_scales

    return awq_scales.compute_scale_candidates(mean_abs)


def compute_error(weight: Tensor, gram: Tensor, candidate: Tensor, scheme: Scheme | None) -> Tensor:
    """Return the error under the gram after scaling, rounding and unscaling: [...] float64."""
    from quantkit.numerics import awq_scales

    return awq_scales.compute_scaling_error(weight, gram, candidate, scheme)


METHOD = Method(
    solve=solve,
    rescale=Rescale(candidates=compute_candidates, error=compute_error),
    kinds=("int", "mxfp4", "nvfp4"),
)
