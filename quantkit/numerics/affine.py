"""Affine quantization of weights in groups along the input dimension: w ~ (code - zero) * scale.

The order matters and is kept everywhere: range -> scale -> scale rounded to its stored dtype -> zero -> codes -> clamp.
A scale that was rounded after the codes were chosen, or a code that was not clamped, is a different weight than the one
that was measured.
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

    Raises NumericsError when the group size does not divide `in`.
    """
    width = weight.shape[-1]
    group = width if group_size == -1 else group_size
    if group < 1 or width % group:
        raise NumericsError(
            f"group size {group_size} does not divide {width} input features; choose a divisor or -1"
        )
    groups: Tensor = weight.unflatten(
        -1, (width // group, group)
    )  # [..., in] -> [..., n_groups, group]
    return groups


def compute_min_max(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of each group, with zero forced into the range.

    weight [..., out, in] -> low <= 0 and high >= 0, each [..., out, n_groups]. Without zero in the range a group such
    as 1 .. 2 has no valid unsigned zero point and all its weights collapse into one. Raises NumericsError when a
    weight is NaN or infinite.
    """
    groups = split_groups(weight, group_size)
    low, high = (
        groups.amin(dim=-1),
        groups.amax(dim=-1),
    )  # two passes: torch's aminmax takes ten times as long
    if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
        raise NumericsError(
            "a weight to be quantized is NaN or infinite; every weight must be finite: check the source "
            "tensor and the scale that was folded into it"
        )
    return low.clamp(max=0), high.clamp(min=0)


def compute_qparams(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point for ranges of any shape.

    low, high float32 -> scale in scheme.scale_dtype, zero uint8 (None when symmetric: the middle code). Asymmetric
    spreads 2**bits - 1 steps over [low, high]; symmetric over [-max, max], as compressed-tensors does. A group of
    zeros gets scale 1, a scale that leaves the normal range of its dtype is clamped into it: `fallbacks` counts both.
    """
    if scheme.bits not in BITS:
        raise NumericsError(
            f"bits = {scheme.bits}: integer codes have {BITS[0]} to {BITS[-1]} bits; choose one of them"
        )
    steps = 2**scheme.bits - 1
    width = 2 * torch.maximum(-low, high) if scheme.symmetric else high - low
    scale = round_scale(width / steps, scheme)
    if scheme.symmetric:
        return scale, None
    # zero is a code too: when low is 0 it is 0, when high is 0 it is the last one
    zero = torch.round(-low / scale.float()).clamp_(0, steps).to(torch.uint8)
    return scale, zero.masked_fill_(width == 0, get_default_zero_point(scheme))


def get_default_zero_point(scheme: Scheme) -> int:
    """The code that means zero in a symmetric scheme, and in a group of zeros."""
    return 1 << (scheme.bits - 1)


def round_scale(scale: Tensor, scheme: Scheme) -> Tensor:
    """Round float32 scales to the dtype they are stored in; 0 becomes 1, the rest is clamped to its normal range."""
    dtype = get_scale_dtype(scheme)
    limits = torch.finfo(dtype)
    clamped = scale.float().clamp(limits.tiny, limits.max)
    return clamped.where(scale > 0, torch.ones_like(clamped)).to(dtype)


def get_scale_dtype(scheme: Scheme) -> torch.dtype:
    """The torch dtype that scheme.scale_dtype names."""
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[
        scheme.scale_dtype
    ]


def expand_zero_point(zero: Tensor | None, scheme: Scheme) -> Tensor | float:
    """The zero point [...] as float32 [..., 1], or the middle code as one number: ready to broadcast over a group."""
    return (
        float(get_default_zero_point(scheme)) if zero is None else zero.unsqueeze(-1).float()
    )  # [...] -> [..., 1]


def round_to_codes(groups: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """Nearest codes of weights [..., group], as float32 integers in 0 .. 2**bits - 1, same shape.

    scale and zero [...]. The codes stay float32 so that a search can multiply them at once.
    """
    step = scale.float().unsqueeze(-1)  # [...] -> [..., 1]
    return (
        (groups / step).round_().add_(expand_zero_point(zero, scheme)).clamp_(0, 2**scheme.bits - 1)
    )


def fake_quantize(groups: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """Weights [..., group] after rounding to codes and back, float32 of the same shape; scale and zero [...]."""
    return (
        round_to_codes(groups, scale, zero, scheme)
        .sub_(expand_zero_point(zero, scheme))
        .mul_(scale.float().unsqueeze(-1))
    )


def quantize(weight: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Quantized:
    """Round weights [..., out, in] float32 to the nearest code under given scale and zero [..., out, n_groups]."""
    chosen = round_to_codes(
        split_groups(weight, scheme.group_size), scale, zero, scheme
    )  # [..., out, n_groups, group]
    return Quantized(codes=chosen.flatten(-2).to(torch.uint8), scale=scale, zero=zero)


def dequantize(quantized: Quantized, scheme: Scheme) -> Tensor:
    """The weights that codes stand for: [..., out, in] float32."""
    groups = split_groups(quantized.codes, scheme.group_size).float()
    return (
        groups
        .sub_(expand_zero_point(quantized.zero, scheme))
        .mul_(quantized.scale.float().unsqueeze(-1))
        .flatten(-2)
    )


def count_fallbacks(quantized: Quantized, scheme: Scheme) -> dict[str, Tensor]:
    """How many groups of each matrix took a named fallback; [...] int64 per name, 0 where none.

    zero-group: every code is the zero point, so the group is stored as exact zeros.
    scale-clamped: the scale is the smallest normal or the largest finite number of its dtype.
    """
    groups, limits = (
        split_groups(quantized.codes, scheme.group_size),
        torch.finfo(quantized.scale.dtype),
    )
    zero = (
        get_default_zero_point(scheme) if quantized.zero is None else quantized.zero.unsqueeze(-1)
    )
    same = (groups == zero).view(
        torch.uint8
    )  # bytes: their minimum takes a third of the time of `all`
    empty = same.amin(dim=-1)  # [..., out, n_groups, group] -> [..., out, n_groups]
    clamped = (quantized.scale == limits.tiny) | (quantized.scale == limits.max)
    return {
        "zero-group": empty.sum(dim=(-2, -1)),
        "scale-clamped": clamped.sum(dim=(-2, -1)),
    }  # -> [...]
