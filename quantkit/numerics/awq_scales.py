"""AWQ's search for input scales (arXiv 2306.00978, equations 4 and 5), entirely on the Gram matrix.

Channel c of the input is divided by s_c and column c of every weight that reads it multiplied by s_c: nothing changes
in full precision, but the columns that matter are rounded more finely. s = mean|x| ** ratio, over a grid of ratios;
the paper's loss ||Q(W diag(s)) diag(s)^-1 X - W X||^2 is a trace with the gram, so no forward pass is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.contracts import Scheme
from quantkit.numerics import affine, gram, range_search

RATIOS = tuple(step / 20 for step in range(20))
"""AWQ's grid; ratio 0 leaves the input as it is."""
MIN_MEAN_ABS_RATIO = 1e-4
"""Share of the largest mean |x| below which a channel counts as this share: a dead channel must not make s 0."""

CLIP_RATIOS = (1, 0.9, 0.8, 0.7, 0.6)
"""Shares of the min/max range that a candidate is judged with."""
SAMPLED_ROWS = 128
"""Rows of a matrix that judge a scale: a sixteenth of DeepSeek-V3's experts, and of the cost."""


def compute_scale_candidates(mean_abs: Tensor) -> Tensor:
    """Scales to try for an input: mean_abs [in] -> [n, in] float32, or [..., in] -> [n, ..., in]; the first all ones.

    Each is divided by sqrt(max * min), as in AWQ's published code, so that scales lie around 1 and neither the
    absorbing tensor nor the reading one leaves its range. An input that is always zero gets ones throughout.
    """
    largest = mean_abs.float().amax(dim=-1, keepdim=True)  # [..., in] -> [..., 1]
    share = torch.where(largest > 0, mean_abs.float() / largest, 1.0).clamp(min=MIN_MEAN_ABS_RATIO)
    tried = [share**ratio for ratio in RATIOS]
    return torch.stack([
        scale / (scale.amax(-1, keepdim=True) * scale.amin(-1, keepdim=True)).sqrt()
        for scale in tried
    ])


def round_to_powers_of_two(scale: Tensor) -> Tensor:
    """Positive scales rounded to the nearest power of two, on a logarithmic scale; same shape and dtype.

    Such a scale changes exponents alone: a norm divided by it and a kept matrix multiplied by it are exact in any float
    dtype, so the fold costs nothing where nothing is quantized, and a router picks the very same experts.
    """
    return torch.exp2(torch.round(torch.log2(scale)))


def compute_scaling_error(
    weight: Tensor, stats: Tensor, candidate: Tensor, scheme: Scheme | None
) -> Tensor:
    """Output error of a weight that is scaled, rounded and unscaled: [...] float64, tr(D G D^T).

    weight [..., out, in] float32; stats [..., in, in], the gram of the unscaled input; candidate [in] or [..., in].
    With a scheme, each group's range is shrunk to what loses least by the gram's diagonal, a coarse version of what the
    method does in the end: judged on min/max ranges, the scales would compensate for what clipping does better. Scheme
    None is a matrix kept in bfloat16, whose rounding counts too. Of a matrix with more than JUDGES rows as many, evenly
    spread, stand for all. Extra memory: about 8 * JUDGES * in float32 values per matrix.
    """
    judges = weight[
        ..., sample_row_indices(weight.shape[-2]).to(weight.device), :
    ]  # [..., out, in] -> [..., JUDGES, in]
    scale = candidate.unsqueeze(-2)  # [in] -> [1, in]; [..., in] -> [..., 1, in]
    diagonal = stats.diagonal(dim1=-2, dim2=-1).unsqueeze(-2) / scale.square()  # [..., 1, in]
    lost = [
        compute_unscaled_delta(rows, scale, diagonal, scheme)
        for rows in range_search.split_for_cache(judges)
    ]
    return gram.compute_error(torch.cat(lost, dim=-2), stats) * (
        weight.shape[-2] / judges.shape[-2]
    )


def sample_row_indices(rows: int) -> Tensor:
    """Numbers of the rows that judge a scale: all, or JUDGES of them, evenly spread; int64."""
    return (
        torch.arange(rows)
        if rows <= SAMPLED_ROWS
        else torch.arange(SAMPLED_ROWS) * rows // SAMPLED_ROWS
    )


def compute_unscaled_delta(
    weight: Tensor, scale: Tensor, diagonal: Tensor, scheme: Scheme | None
) -> Tensor:
    """What scaling, rounding and unscaling does to rows [..., rows, in]; scale and diagonal [..., 1, in]."""
    wide = weight * scale
    if scheme is None:
        return wide.bfloat16().float().div_(scale).sub_(weight)
    weighing = affine.split_groups(
        diagonal, scheme.group_size
    )  # [..., 1, in] -> [..., 1, n_groups, group]
    groups = affine.split_groups(wide, scheme.group_size)
    ranges = affine.compute_qparams(*affine.compute_min_max(wide, scheme.group_size), scheme)
    none = torch.full_like(ranges[0], torch.inf, dtype=torch.float32)
    best, _ = range_search.select_scales_and_zeros(
        groups, weighing, (ranges, none), CLIP_RATIOS, (0,), scheme
    )
    return (
        affine.fake_quantize(groups, *best, scheme).flatten(-2).div_(scale).sub_(weight)
    )  # -> [..., rows, in]
