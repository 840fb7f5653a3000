"""Round to nearest: the codes that the recipe's method chooses itself, each weight by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.contracts import InputStats, RoundedWeight, Rounding, Scheme, Solve

if TYPE_CHECKING:
    from torch import Tensor


def round_weight(
    weight: Tensor, stats: InputStats | None, scheme: Scheme, solve: Solve
) -> RoundedWeight:
    """Return the codes of the method's `solve` for weight [..., out, in] float32."""
    return RoundedWeight(quantized=solve(weight, stats, scheme))


ROUNDING = Rounding(round_weight=round_weight, needs_stats=False)
