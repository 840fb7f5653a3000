"""RTN: every weight goes to the nearest code of its group's min/max range. The baseline that others must beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.contracts import InputStats, Method, Quantized, Scheme

if TYPE_CHECKING:
    from torch import Tensor


def solve(weight: Tensor, stats: InputStats | None, scheme: Scheme) -> Quantized:
    """Round weight [..., out, in] float32 to the nearest codes; statistics are not looked at.

    Raises NumericsError for a weight that is not finite, or a group size that does not divide `in`.
    """
    from quantkit.numerics import (
        affine,
    )  # torch starts when there is something to round, not when a recipe is planned

    scale, zero = affine.compute_qparams(*affine.compute_min_max(weight, scheme.group_size), scheme)
    return affine.quantize(weight, scale, zero, scheme)


METHOD = Method(solve=solve, needs_stats=False)
