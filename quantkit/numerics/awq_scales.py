"""AWQ's candidates for input scales (arXiv 2306.00978, equations 4 and 5) and their error.

Channel c of the input is divided by s_c, and column c of every weight that reads it is multiplied
by s_c: nothing changes in full precision, but important columns are rounded more finely.
s = mean|x| ** ratio, over a grid of ratios. The paper's loss ||Q(W diag(s)) diag(s)^-1 X - W X||^2
is a trace with the gram, so no forward pass is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.contracts import Scheme
from quantkit.numerics import affine, fp4, gram, range_search

RATIOS = tuple(step / 20 for step in range(20))
"""AWQ's grid; ratio 0 does not scale the input."""

MIN_MEAN_ABS_RATIO = 1e-4
"""Smallest mean |x| of a channel as a share of the largest: a dead channel must not make s 0."""

CLIP_RATIOS = (1, 0.9, 0.8, 0.7, 0.6)
"""Shares of the min/max range with which the error of a candidate is computed."""

SAMPLED_ROWS = 128
"""Rows of a matrix on which a scale is judged: a sixteenth of DeepSeek-V3's experts, and of the
cost."""


def compute_scale_candidates(mean_abs: Tensor) -> Tensor:
    """Return the candidate scales of an input; the first is all ones.

    mean_abs [in] -> [n, in] float32, or [..., in] -> [n, ..., in]. Each is divided by
    sqrt(max * min), as in AWQ's published code, so that scales lie around 1 and neither the
    absorbing tensor nor the reading one leaves its range. An input that is always zero gets ones.
    """
    largest = mean_abs.float().amax(dim=-1, keepdim=True)  # [..., in] -> [..., 1]
    ratio = torch.where(largest > 0, mean_abs.float() / largest, 1.0).clamp(min=MIN_MEAN_ABS_RATIO)
    scales = [ratio**exponent for exponent in RATIOS]
    return torch.stack([
        scale / (scale.amax(-1, keepdim=True) * scale.amin(-1, keepdim=True)).sqrt()
        for scale in scales
    ])


def round_to_powers_of_two(scale: Tensor) -> Tensor:
    """Round positive scales to the nearest power of two on a logarithmic scale.

    Such a scale changes exponents only: a norm divided by it and a kept matrix multiplied by it are
    exact in any float dtype, so the scaling costs nothing where nothing is quantized, and a router
    selects exactly the same experts.
    """
    return torch.exp2(torch.round(torch.log2(scale)))


def compute_scaling_error(
    weight: Tensor, stats: Tensor, candidate: Tensor, scheme: Scheme | None
) -> Tensor:
    """Return the output error of a weight that is scaled, rounded and unscaled: [...] float64.

    It is tr(D G D^T). weight [..., out, in] float32; stats [..., in, in], the gram of the unscaled
    input; candidate [in] or [..., in].

    With a scheme, each group's range is clipped to the least error by the gram's diagonal, a coarse
    version of the method's final range search: on min/max ranges the scales would compensate for
    what clipping does better. Scheme None is a matrix kept in bfloat16, whose rounding counts too.
    SAMPLED_ROWS evenly spaced rows represent a taller matrix. Extra memory: about
    8 * SAMPLED_ROWS * in float32 values per matrix.
    """
    indices = sample_row_indices(weight.shape[-2]).to(weight.device)
    sample = weight[..., indices, :]  # [..., out, in] -> [..., SAMPLED_ROWS, in]
    scale = candidate.unsqueeze(-2)  # [in] -> [1, in]; [..., in] -> [..., 1, in]
    diagonal = stats.diagonal(dim1=-2, dim2=-1).unsqueeze(-2) / scale.square()  # [..., 1, in]
    deltas = [
        compute_unscaled_delta(rows, scale, diagonal, scheme)
        for rows in range_search.split_for_cache(sample)
    ]
    error = gram.compute_error(torch.cat(deltas, dim=-2), stats)
    return error * (weight.shape[-2] / sample.shape[-2])


def sample_row_indices(rows: int) -> Tensor:
    """Return all row indices, or SAMPLED_ROWS evenly spaced ones; int64."""
    if rows <= SAMPLED_ROWS:
        return torch.arange(rows)
    return torch.arange(SAMPLED_ROWS) * rows // SAMPLED_ROWS


def compute_unscaled_delta(
    weight: Tensor, scale: Tensor, diagonal: Tensor, scheme: Scheme | None
) -> Tensor:
    """Return the change of rows [..., rows, in] by scaling, rounding and unscaling.

    scale and diagonal [..., 1, in].
    """
    scaled = weight * scale
    if scheme is None:
        return scaled.bfloat16().float().div_(scale).sub_(weight)
    if scheme.kind in fp4.KINDS:
        best = fp4.search_scales(scaled, diagonal.squeeze(-2), scheme)
        quantized = fp4.quantize(scaled, *best, scheme)
        return fp4.dequantize(quantized, scheme).div_(scale).sub_(weight)
    size = scheme.group_size
    importance = affine.split_groups(diagonal, size)  # [..., 1, in] -> [..., 1, n_groups, group]
    groups = affine.split_groups(scaled, size)
    ranges = affine.compute_qparams(*affine.compute_min_max(scaled, size), scheme)
    errors = torch.full_like(ranges[0], torch.inf, dtype=torch.float32)
    ranges, _ = range_search.select_scales_and_zeros(
        groups, importance, (ranges, errors), CLIP_RATIOS, (0,), scheme
    )
    rounded = affine.fake_quantize(groups, *ranges, scheme).flatten(-2)  # -> [..., rows, in]
    return rounded.div_(scale).sub_(weight)
