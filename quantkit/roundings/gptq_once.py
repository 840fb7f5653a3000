"""GPTQ rounding (arXiv 2210.17323) alone: one pass over the columns, without coordinate descent after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.contracts import InputStats, RoundedWeight, Rounding, Scheme, Solve

if TYPE_CHECKING:
    from torch import Tensor


def round_weight(
    weight: Tensor, stats: InputStats | None, scheme: Scheme, solve: Solve
) -> RoundedWeight:
    """Return the codes of `numerics.gptq.quantize_gptq` before refinement, instead of those of `solve`."""
    from quantkit.numerics import gptq  # torch is imported when there is a weight to round

    return gptq.quantize_gptq(weight, stats, scheme, refine=False)


ROUNDING = Rounding(round_weight=round_weight)
