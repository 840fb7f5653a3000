"""Values of FP4 (E2M1) and power-of-two scales (E8M0).

OCP Microscaling Formats v1.0: E2M1 has a sign, two bits of exponent and one of mantissa; an E8M0
byte e stands for 2**(e - 127), 255 for NaN. On a CPU tables are looked up by numpy, which is three
times as fast as torch's indexing there.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

LARGEST = 6.0
"""The largest E2M1 value."""

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, LARGEST)
_E2M1 = np.array([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], np.float32)
_PAIRS = np.stack([_E2M1[np.arange(256) & 15], _E2M1[np.arange(256) >> 4]], axis=1)
"""[256, 2] float32 of each byte: the value of its low bits comes first."""
_E8M0 = np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan).astype(np.float32)


def look_up(table: npt.NDArray[np.float32], index: Tensor) -> Tensor:
    """Return rows of a table [n, ...] for an index [...] uint8: [..., ...] float32."""
    if index.device.type == "cpu":
        return torch.from_numpy(table.take(index.numpy(), axis=0))
    rows: Tensor = torch.from_numpy(table).to(index.device)[index.int()]
    return rows


def unpack_e2m1(codes: Tensor) -> Tensor:
    """Return the float32 values [..., 2 n] of pairs of FP4 codes, [..., n] of a one-byte dtype."""
    pairs = look_up(_PAIRS, codes.view(torch.uint8))  # [..., n] -> [..., n, 2]
    values: Tensor = pairs.flatten(-2)  # [..., n, 2] -> [..., 2 n]
    return values


def pack_e2m1(codes: Tensor) -> Tensor:
    """Pack pairs of FP4 codes, the first in the low bits: [..., 2 n] uint8 -> [..., n] uint8."""
    pairs: Tensor = codes.unflatten(-1, (-1, 2))  # [..., 2 n] -> [..., n, 2]
    return pairs[..., 0] | pairs[..., 1] << 4


def decode_e2m1(codes: Tensor) -> Tensor:
    """Return the float32 values [...] of FP4 codes [...] uint8, 0 to 15."""
    return look_up(_E2M1, codes)


def encode_e2m1(values: Tensor) -> Tensor:
    """Return the FP4 codes [...] uint8 of float32 values [...] of E2M1; both zeros have code 0.

    Codes rise by one per value: by 2 |v| up to 2, then by one per 1 and per 2.
    """
    size = values.abs()
    codes = (size * 2).clamp_(max=4)
    codes += (size - 2).clamp_(0, 2)
    codes += ((size - 4) / 2).clamp_(0, 1)
    codes += (values < 0) * 8
    return codes.to(torch.uint8)


def round_to_e2m1(values: Tensor) -> Tensor:
    """Round float32 values [...] in place to the nearest E2M1 value, ties to an even code; above 6
    to 6. Returns `values`.

    The distance of neighbours is half of the power of two below |v|, at least .5. Adding and
    subtracting 1.5 * 2**23 distances leaves a multiple of the distance.
    """
    values.clamp_(-LARGEST, LARGEST)
    bits = values.view(torch.int32) & 0x7F800000  # the exponent's
    shift = bits.view(torch.float32).clamp_(min=1).mul_(1.5 * 2**22)
    return values.add_(shift).sub_(shift)


def decode_e8m0(scale: Tensor) -> Tensor:
    """Return E8M0 scales [...] of a one-byte dtype as float32; 255 becomes NaN."""
    return look_up(_E8M0, scale.contiguous().view(torch.uint8))


def decode_scale(scale: Tensor) -> Tensor:
    """Return scales [...] as float32: one-byte integers and float8_e8m0fnu are powers of two."""
    is_power = scale.dtype in (torch.uint8, torch.float8_e8m0fnu)
    return decode_e8m0(scale) if is_power else scale.to(torch.float32)
