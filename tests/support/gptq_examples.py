"""A hand-computed GPTQ matrix."""

from __future__ import annotations

import numpy as np
import torch

M = torch.tensor(
    [[(3 * (8 * k + n) + 1) % 16 for n in range(8)] for k in range(8)], dtype=torch.uint8
)
"""The example of quantkit/formats/README.md, [in, out]."""


M_WORDS = [
    -1852730991,
    -993737532,
    -134744073,
    707406378,
    1566399837,
    -2139062144,
    -1280068685,
    -421075226,
]
"""M along `in`, one word per output: 0x91919191, 0xC4C4C4C4, ..."""


def as_numpy(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """numpy has no bfloat16."""
    return {
        name: (x.float() if x.dtype == torch.bfloat16 else x).numpy() for name, x in tensors.items()
    }
