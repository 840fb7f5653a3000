"""GPTQ (arXiv 2210.17323): range search, GPTQ rounding, then coordinate descent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.contracts import InputStats, Method, Quantized, Scheme

if TYPE_CHECKING:
    from torch import Tensor


def solve(weight: Tensor, stats: InputStats | None, scheme: Scheme) -> Quantized:
    """Quantize weight [..., out, in] float32 with `numerics.gptq.quantize_gptq`."""
    from quantkit.numerics import gptq  # torch is imported with the first weight

    return gptq.quantize_gptq(weight, stats, scheme).quantized


METHOD = Method(solve=solve, kinds=("int", "mxfp4", "nvfp4"))
