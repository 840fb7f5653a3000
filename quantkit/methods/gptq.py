"""GPTQ (arXiv 2210.17323): ranges by the gram's diagonal, then each column makes up for the rounding before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.contracts import InputStats, Method, Quantized, Scheme
from quantkit.errors import NumericsError

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.numerics.rounding import Rounded


def round_weight(weight: Tensor, stats: InputStats | None, scheme: Scheme) -> Rounded:
    """Ranges by `clip.weighted`, codes by `rounding.with_feedback`, and the damping that took.

    weight [..., out, in] float32, scaled if the recipe's method scales; stats of the input it reads, gram
    [..., in, in]. The error under the gram is never above RTN's; an input that was never seen (a gram of zeros) gives
    RTN. Raises NumericsError without statistics, or for a gram that is not finite or not positive semi-definite.
    """
    from quantkit.numerics import clip, rounding  # torch starts when there is something to round

    if stats is None:
        raise NumericsError("gptq rounds by calibration statistics, found none; use method rtn for this linear")
    ranges = clip.weighted(weight, stats.gram, scheme)
    return rounding.with_feedback(weight, stats.gram, ranges, scheme)


def solve(weight: Tensor, stats: InputStats | None, scheme: Scheme) -> Quantized:
    """What `round_weight` chose, without the damping."""
    return round_weight(weight, stats, scheme).quantized


METHOD = Method(solve=solve)
