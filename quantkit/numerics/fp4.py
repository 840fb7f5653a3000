"""Weights in FP4 with a scale per group: MXFP4 and NVFP4 (numerics/README.md).

    mxfp4  w ~ e2m1[code] * 2**(scale - 127)                 32 weights per scale, E8M0
    nvfp4  w ~ e2m1[code] * e4m3[scale] / global_scale       16 weights per scale, E4M3

The global scale is a power of two. A weight is then a product of at most six significant bits, so
that every engine computes it exactly in bfloat16 and float16, in any order of multiplications.

Scales are searched as integers: neighbouring bit patterns of a positive E4M3 or E8M0 number are
neighbouring scales. Scales are chosen before codes, codes are chosen under the scale that is
stored.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantkit.contracts import Quantized, Scheme
from quantkit.numerics import affine
from quantkit.numerics.microscaling import (
    LARGEST,
    decode_e2m1,
    decode_scale,
    encode_e2m1,
    round_to_e2m1,
)
from quantkit.numerics.range_search import split_for_cache

KINDS = ("mxfp4", "nvfp4")

STEPS: Mapping[str, tuple[int, ...]] = {"mxfp4": (-1, 1), "nvfp4": (-3, -2, -1, 1, 2, 3, 4, 5)}
"""Scales that are tried, in neighbours of the one that maps a group's maximum to 6. Five E4M3
neighbours up map it to 4 or less (arXiv 2512.02010), three down clip it by a fourth."""

BOUNDS: Mapping[str, tuple[int, int]] = {"mxfp4": (1, 254), "nvfp4": (1, 126)}
"""Bit patterns of the smallest and the largest scale: 2**-126 and 2**127; 2**-9 and 448."""

E4M3_LARGEST = 448.0
LARGEST_PLAIN_SCALE = E4M3_LARGEST / 1.5
"""The largest block scale before the search: that which maps its maximum to 4 exists too."""

SMALLEST_MAXIMUM = 2.0**-100
"""Smaller maxima of a matrix count as this one, so that 1 / global scale is a normal float32."""


def compute_maxima(weight: Tensor, scheme: Scheme) -> Tensor:
    """Return the largest |w| of each group, [..., out, in] -> [..., out, n_groups] float32.

    Raises NumericsError if a weight is not finite or the group size does not divide `in`.
    """
    low, high = affine.compute_min_max(weight, scheme.group_size)
    return torch.maximum(-low, high).float()


def compute_global_scale(maxima: Tensor, scheme: Scheme) -> Tensor | None:
    """Return the global scale [..., 1, 1] float32 of groups with these maxima; None for mxfp4.

    maxima [..., out, n_groups]. It is the largest power of two with which every scale that maps a
    group's maximum to 6 is at most LARGEST_PLAIN_SCALE; 1 for a matrix of zeros.
    """
    if scheme.kind != "nvfp4":
        return None
    largest = maxima.amax(dim=(-2, -1), keepdim=True)  # [..., out, n_groups] -> [..., 1, 1]
    ratio = LARGEST_PLAIN_SCALE * LARGEST / largest.clamp(min=SMALLEST_MAXIMUM)
    _, exponent = torch.frexp(ratio)  # 2**(exponent - 1) <= ratio < 2**exponent
    scale = torch.exp2((exponent - 1).float())
    return scale.where(largest > 0, torch.ones_like(scale))


def round_scale(scale: Tensor, global_scale: Tensor | None, scheme: Scheme) -> Tensor:
    """Return the nearest stored scales of positive float32 scales, as bit patterns: [...] uint8.

    global_scale None, or to broadcast against `scale`. Zeros get the pattern of 1.
    """
    low, high = BOUNDS[scheme.kind]
    if global_scale is None:
        bits = scale.contiguous().view(torch.int32) + (1 << 22)  # 1.5 rounds up to 2
        rounded = (bits >> 23).clamp_(low, high).to(torch.uint8)
        return rounded.masked_fill_(scale == 0, 127)
    stored = (scale * global_scale).clamp_(2.0**-9, E4M3_LARGEST).to(torch.float8_e4m3fn)
    return stored.view(torch.uint8).masked_fill_(scale == 0, 0x38)


def compute_plain_scale(maxima: Tensor, global_scale: Tensor | None, scheme: Scheme) -> Tensor:
    """Return the scales of rounding to nearest, as bit patterns: [..., out, n_groups] uint8.

    nvfp4: the group's maximum becomes 6, up to the rounding of the scale. mxfp4: it becomes 3.5 to
    7, the choice of compressed-tensors; a maximum above 6 is clipped by at most a seventh.
    """
    if global_scale is not None:
        return round_scale(maxima / LARGEST, global_scale, scheme)
    bits = maxima.contiguous().view(torch.int32) + (1 << 21)  # 1.75 rounds up to 2
    plain = ((bits >> 23) - 2).clamp_(*BOUNDS[scheme.kind]).to(torch.uint8)
    return plain.masked_fill_(maxima == 0, 127)


def store_scale(bits: Tensor, scheme: Scheme) -> Tensor:
    """Return bit patterns of scales in the scheme's dtype, uint8 or float8_e4m3fn."""
    return bits.view(torch.float8_e4m3fn) if scheme.kind == "nvfp4" else bits


def decode_steps(scale: Tensor, global_scale: Tensor | None) -> Tensor:
    """Return what a code's value is multiplied by: [..., out, n_groups] float32.

    scale as stored, global_scale [..., 1, 1] or None.
    """
    steps = decode_scale(scale)
    return steps if global_scale is None else steps / global_scale


def fake_quantize(groups: Tensor, steps: Tensor) -> Tensor:
    """Round weights [..., group] to codes and back: float32 of that shape; steps [...]."""
    step = steps.unsqueeze(-1)  # [...] -> [..., 1]
    return round_to_e2m1(groups / step).mul_(step)


def quantize(
    weight: Tensor, scale: Tensor, global_scale: Tensor | None, scheme: Scheme
) -> Quantized:
    """Round weights [..., out, in] float32 to the nearest codes under given stored scales."""
    groups = affine.split_groups(weight, scheme.group_size)  # [..., out, n_groups, group]
    steps = decode_steps(scale, global_scale)
    codes = encode_e2m1(round_to_e2m1(groups / steps.unsqueeze(-1))).flatten(-2)
    return Quantized(codes=codes, scale=scale, zero=None, global_scale=global_scale)


def quantize_rtn(weight: Tensor, scheme: Scheme) -> Quantized:
    """Round weights [..., out, in] float32 to nearest with `compute_plain_scale`."""
    maxima = compute_maxima(weight, scheme)
    global_scale = compute_global_scale(maxima, scheme)
    bits = compute_plain_scale(maxima, global_scale, scheme)
    return quantize(weight, store_scale(bits, scheme), global_scale, scheme)


def search_scales(
    weight: Tensor, importance: Tensor, scheme: Scheme
) -> tuple[Tensor, Tensor | None]:
    """Search the scale of each group by weighted squared error; return scale and global scale.

    weight [..., out, in] float32; importance [..., in] float32, not negative (the gram's diagonal)
    -> scale [..., out, n_groups] as stored, global scale [..., 1, 1] float32 or None. A tie keeps
    the scale of rounding to nearest.
    """
    maxima = compute_maxima(weight, scheme)
    global_scale = compute_global_scale(maxima, scheme)
    plain = compute_plain_scale(maxima, global_scale, scheme)
    # a gram's diagonal is strided: copied once; [..., in] -> [..., 1, n_groups, group]
    diagonal = affine.split_groups(importance.contiguous().unsqueeze(-2), scheme.group_size)
    best, first = list[Tensor](), 0
    for rows in split_for_cache(weight):
        last = first + rows.shape[-2]
        best.append(search_rows(rows, diagonal, plain[..., first:last, :], global_scale, scheme))
        first = last
    return store_scale(torch.cat(best, dim=-2), scheme), global_scale


def search_rows(
    weight: Tensor, diagonal: Tensor, plain: Tensor, global_scale: Tensor | None, scheme: Scheme
) -> Tensor:
    """Return the best bit patterns of scales: [..., out, n_groups] uint8, as `plain`.

    weight [..., out, in]; diagonal [..., 1, n_groups, group].
    """
    groups = affine.split_groups(weight, scheme.group_size)  # [..., out, n_groups, group]
    best, least = plain, torch.full(plain.shape, torch.inf, device=weight.device)
    for step in (0, *STEPS[scheme.kind]):
        bits = (plain.int() + step).clamp_(*BOUNDS[scheme.kind]).to(torch.uint8)
        delta = fake_quantize(groups, decode_steps(store_scale(bits, scheme), global_scale))
        delta.sub_(groups)
        # [..., out, n_groups, group] -> [..., out, n_groups]
        error = delta.square_().mul_(diagonal).sum(dim=-1)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, bits, best)
    return best


def dequantize(quantized: Quantized, scheme: Scheme) -> Tensor:
    """Return the weights that codes stand for: [..., out, in] float32."""
    groups = affine.split_groups(decode_e2m1(quantized.codes), scheme.group_size)
    steps = decode_steps(quantized.scale, quantized.global_scale)
    return groups.mul_(steps.unsqueeze(-1)).flatten(-2)


def count_fallbacks(quantized: Quantized, scheme: Scheme) -> dict[str, Tensor]:
    """Count the groups of each matrix that took a named fallback; [...] int64 per name.

    zero-group: every code is zero. scale-clamped: the scale is the smallest one, or mxfp4's
    largest; nvfp4's largest needs no clamping, by the choice of the global scale.
    """
    largest = affine.split_groups(quantized.codes & 7, scheme.group_size).amax(dim=-1)
    bits, (low, high) = quantized.scale.view(torch.uint8), BOUNDS[scheme.kind]
    clamped = (bits == low) | (bits == high) if scheme.kind == "mxfp4" else bits == low
    return {
        "zero-group": (largest == 0).sum(dim=(-2, -1)),  # [..., out, n_groups] -> [...]
        "scale-clamped": clamped.sum(dim=(-2, -1)),
    }
