"""Random problems for GPTQ tests."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.contracts import Scheme


def scheme(bits: int = 4, group: int = 32, symmetric: bool = False) -> Scheme:
    return Scheme(bits=bits, group_size=group, symmetric=symmetric, scale_dtype="bfloat16")


def make_correlated_inputs(
    out: int, width: int, tokens: int = 300, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return weights [out, in] and inputs [tokens, in] with correlated, a few large channels."""
    g = torch.Generator().manual_seed(seed)
    x = (
        torch.randn(tokens, width, generator=g)
        @ torch.randn(width, width, generator=g)
        / width**0.5
    )
    x[:, :3] *= 10
    return torch.randn(out, width, generator=g) * 0.02, x
