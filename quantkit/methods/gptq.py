"""GPTQ (arXiv 2210.17323): each column makes up for the rounding before it; then codes and scales improve in turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit.contracts import InputStats, Method, Quantized, Scheme
from quantkit.errors import NumericsError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """Codes, and whether some matrix's gram needed more damping than others to have a factor."""

    quantized: Quantized
    damping_raised: bool


def round_weight(
    weight: Tensor, stats: InputStats | None, scheme: Scheme, *, once: bool = False
) -> Rounded:
    """Ranges for the feedback to come, codes with errors fed back, then (not `once`) codes and scales improved in turn.

    weight [..., out, in] float32, scaled if the recipe's method scales; stats of the input it reads, gram
    [..., in, in]. With their cross (and residual) the weight is corrected first, and what is rounded is the corrected
    one. A row that ends above RTN's error under the gram takes RTN's codes, so an input that was never seen (a gram of
    zeros) gives RTN. Raises NumericsError without statistics, or for a gram that is not finite or not positive
    semi-definite.
    """
    from quantkit.numerics import (  # torch starts when there is work for it
        affine,
        coordinate_descent,
        error_propagation,
        gptq,
        range_search,
    )

    if stats is None:
        raise NumericsError(
            "gptq rounds by calibration statistics, found none; use method rtn for this linear"
        )
    factor = gptq.feedback(stats.gram)
    damping = factor.damping
    if stats.cross is not None:
        weight = error_propagation.corrected(weight, stats.cross, factor, stats.residual)
    ranges = range_search.weighted(weight, stats.gram.diagonal(dim1=-2, dim2=-1), scheme)
    fed = gptq.gptq_round(weight, factor, ranges, scheme)
    del factor  # as large as the gram
    better = (
        fed
        if once
        else coordinate_descent.improved(
            weight, coordinate_descent.damped(stats.gram, damping), fed, scheme
        )
    )
    plain = affine.quantize(
        weight, *affine.qparams(*affine.ranges(weight, scheme.group_size), scheme), scheme
    )
    quantized = gptq.better_rows(weight, stats.gram, better, plain, scheme)
    return Rounded(quantized=quantized, damping_raised=bool((damping > gptq.DAMPING * 1.5).any()))


def solve(weight: Tensor, stats: InputStats | None, scheme: Scheme) -> Quantized:
    """What `round_weight` chose."""
    return round_weight(weight, stats, scheme).quantized


METHOD = Method(solve=solve)
