"""GPTQ rounding (arXiv 2210.17323), followed by coordinate descent on codes and scales."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.contracts import InputStats, RoundedWeight, Rounding, Scheme, Solve

if TYPE_CHECKING:
    from torch import Tensor


def round_weight(
    weight: Tensor, stats: InputStats | None, scheme: Scheme, solve: Solve
) -> RoundedWeight:
    """Return the codes of `numerics.gptq.quantize_gptq`; the method's `solve` is not called."""
    from quantkit.numerics import gptq  # torch is imported with the first weight

    return gptq.quantize_gptq(weight, stats, scheme)


ROUNDING = Rounding(round_weight=round_weight)
