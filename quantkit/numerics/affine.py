"""Affine quantization of weights in groups along the input dimension: w ~ (code - zero) * scale.

The order of the steps is the same everywhere: range, scale, scale rounded to its stored dtype,
zero point, codes, clamp. A scale that is rounded after the codes are chosen, or a code that is not
clamped, gives another weight than the measured one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.contracts import Quantized, Scheme
from quantkit.errors import NumericsError

BITS = range(2, 9)
"""Code widths that fit uint8 and have a middle code with room on both sides."""


def split_groups(weight: Tensor, group_size: int) -> Tensor:
    """View [..., out, in] as [..., out, n_groups, group]; group_size -1 is one group per row.

    Raises NumericsError if the group size does not divide `in`.
    """
    width = weight.shape[-1]
    group = width if group_size == -1 else group_size
    if group < 1 or width % group:
        raise NumericsError(
            f"group size {group_size} does not divide {width} input features; "
            "choose a divisor or -1"
        )
    shape = (width // group, group)
    groups: Tensor = weight.unflatten(-1, shape)  # [..., in] -> [..., n_groups, group]
    return groups


def compute_min_max(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest weight of each group, with zero forced into the range.

    weight [..., out, in] -> low <= 0 and high >= 0, each [..., out, n_groups]. Without zero in the
    range a group such as 1 .. 2 has no valid unsigned zero point and all its weights collapse into
    one. Raises NumericsError if a weight is NaN or infinite.
    """
    groups = split_groups(weight, group_size)
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)  # torch's aminmax takes ten times as long
    if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
        raise NumericsError(
            "a weight to be quantized is NaN or infinite; every weight must be finite: check the "
            "source tensor and the scale that was folded into it"
        )
    return low.clamp(max=0), high.clamp(min=0)


def compute_qparams(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Return scale and zero point for ranges of any shape.

    low, high float32 -> scale in scheme.scale_dtype, zero uint8 (None if symmetric: the middle
    code). Asymmetric spreads 2**bits - 1 steps over [low, high]; symmetric over [-max, max], as
    compressed-tensors does. A group of zeros gets scale 1; a scale outside the normal range of its
    dtype is clamped into it. `count_fallbacks` counts both.
    """
    if scheme.bits not in BITS:
        raise NumericsError(
            f"bits = {scheme.bits}: integer codes have {BITS[0]} to {BITS[-1]} bits; "
            "choose one of them"
        )
    steps = 2**scheme.bits - 1
    width = 2 * torch.maximum(-low, high) if scheme.symmetric else high - low
    scale = round_scale(width / steps, scheme)
    if scheme.symmetric:
        return scale, None
    # zero is a code too: 0 if low is 0, the last code if high is 0
    zero = torch.round(-low / scale.float()).clamp_(0, steps).to(torch.uint8)
    return scale, zero.masked_fill_(width == 0, get_default_zero_point(scheme))


def get_default_zero_point(scheme: Scheme) -> int:
    """Return the code that means zero in a symmetric scheme, and in a group of zeros."""
    return 1 << (scheme.bits - 1)


def round_scale(scale: Tensor, scheme: Scheme) -> Tensor:
    """Round float32 scales to their stored dtype; 0 becomes 1, the rest stays in normal range."""
    dtype = get_scale_dtype(scheme)
    limits = torch.finfo(dtype)
    clamped = scale.float().clamp(limits.tiny, limits.max)
    return clamped.where(scale > 0, torch.ones_like(clamped)).to(dtype)


def get_scale_dtype(scheme: Scheme) -> torch.dtype:
    """Return the torch dtype that scheme.scale_dtype names."""
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    return dtypes[scheme.scale_dtype]


def expand_zero_point(zero: Tensor | None, scheme: Scheme) -> Tensor | float:
    """Return the zero point [...] as float32 [..., 1], to broadcast over a group.

    For None it is the middle code, one number.
    """
    if zero is None:
        return float(get_default_zero_point(scheme))
    return zero.unsqueeze(-1).float()  # [...] -> [..., 1]


def round_to_codes(groups: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """Return the nearest codes of weights [..., group]: float32 integers in 0 .. 2**bits - 1.

    scale and zero [...]. The codes stay float32, so that a search can multiply them at once.
    """
    step = scale.float().unsqueeze(-1)  # [...] -> [..., 1]
    offset = expand_zero_point(zero, scheme)
    return (groups / step).round_().add_(offset).clamp_(0, 2**scheme.bits - 1)


def fake_quantize(groups: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """Round weights [..., group] to codes and back: float32 of that shape; scale and zero [...]."""
    codes = round_to_codes(groups, scale, zero, scheme)
    return codes.sub_(expand_zero_point(zero, scheme)).mul_(scale.float().unsqueeze(-1))


def quantize(weight: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Quantized:
    """Round weights [..., out, in] float32 to the nearest code under given scale and zero.

    scale and zero [..., out, n_groups].
    """
    groups = split_groups(weight, scheme.group_size)  # [..., out, n_groups, group]
    codes = round_to_codes(groups, scale, zero, scheme)
    return Quantized(codes=codes.flatten(-2).to(torch.uint8), scale=scale, zero=zero)


def quantize_rtn(weight: Tensor, scheme: Scheme) -> Quantized:
    """Round weights [..., out, in] float32 to the nearest code of each group's min/max range."""
    scale, zero = compute_qparams(*compute_min_max(weight, scheme.group_size), scheme)
    return quantize(weight, scale, zero, scheme)


def dequantize(quantized: Quantized, scheme: Scheme) -> Tensor:
    """Return the weights that codes stand for: [..., out, in] float32."""
    groups = split_groups(quantized.codes, scheme.group_size).float()
    scale = quantized.scale.float().unsqueeze(-1)
    return groups.sub_(expand_zero_point(quantized.zero, scheme)).mul_(scale).flatten(-2)


def count_fallbacks(quantized: Quantized, scheme: Scheme) -> dict[str, Tensor]:
    """Count the groups of each matrix that took a named fallback; [...] int64 per name.

    zero-group: every code is the zero point, so the group is stored as exact zeros.
    scale-clamped: the scale is the smallest normal or the largest finite number of its dtype.
    """
    groups = split_groups(quantized.codes, scheme.group_size)
    limits = torch.finfo(quantized.scale.dtype)
    stored = quantized.zero
    zero = get_default_zero_point(scheme) if stored is None else stored.unsqueeze(-1)
    same = (groups == zero).view(torch.uint8)  # bytes: their minimum takes a third of `all`'s time
    empty = same.amin(dim=-1)  # [..., out, n_groups, group] -> [..., out, n_groups]
    clamped = (quantized.scale == limits.tiny) | (quantized.scale == limits.max)
    return {
        "zero-group": empty.sum(dim=(-2, -1)),  # -> [...]
        "scale-clamped": clamped.sum(dim=(-2, -1)),
    }
