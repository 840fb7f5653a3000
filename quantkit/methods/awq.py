"""AWQ (arXiv 2306.00978): scale input channels so that those that matter are rounded finely, then clip ranges.

Both searches run on the Gram matrix of the input alone. Rounding is to the nearest code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.contracts import InputStats, Method, Quantized, Rescale, Scheme
from quantkit.errors import NumericsError

if TYPE_CHECKING:
    from torch import Tensor

TEMPORARIES = 8
"""float32 values per weight of one group that the range search holds at its peak."""
SEARCHED_ROWS = 128
"""Rows of a matrix that judge a scale (numerics.rescale.JUDGES)."""


def solve(weight: Tensor, stats: InputStats | None, scheme: Scheme) -> Quantized:
    """Clip the range of each group to what loses least under the gram, then round to the nearest code.

    weight [..., out, in] float32, already scaled; stats of the input it reads, gram [..., in, in]. The error under the
    gram is never above RTN's; an input that was never seen (a gram of zeros) gives RTN. Raises NumericsError without
    statistics.
    """
    from quantkit.numerics import affine, clip  # torch starts when there is something to round

    if stats is None:
        raise NumericsError("awq chooses ranges by calibration statistics, found none; use method rtn for this linear")
    scale, zero = clip.search(weight, stats.gram, scheme)
    return affine.quantize(weight, scale, zero, scheme)


def candidates(mean_abs: Tensor) -> Tensor:
    """Input scales to try: mean_abs [in] -> [n, in] float32, the first all ones (numerics.rescale)."""
    from quantkit.numerics import rescale

    return rescale.candidates(mean_abs)


def error(weight: Tensor, gram: Tensor, candidate: Tensor, scheme: Scheme | None) -> Tensor:
    """Error under the gram after scaling, rounding and unscaling: [...] float64 (numerics.rescale)."""
    from quantkit.numerics import rescale

    return rescale.error(weight, gram, candidate, scheme)


def workspace_bytes(out_features: int, in_features: int, group_size: int) -> int:
    """Most bytes that `solve` or `error` hold for one matrix beside its weight, its gram and the result.

    solve: the error of the whole matrix and TEMPORARIES values per weight of the group being searched; rounding
    afterwards needs no more. error: TEMPORARIES copies of SEARCHED_ROWS rows.
    """
    group = in_features if group_size == -1 else group_size
    solving = out_features * in_features + TEMPORARIES * out_features * group
    searching = TEMPORARIES * min(out_features, SEARCHED_ROWS) * in_features
    return 4 * max(solving, searching)


METHOD = Method(solve=solve, rescale=Rescale(candidates=candidates, error=error))
