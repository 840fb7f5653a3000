"""AWQ's search for input scales (arXiv 2306.00978, equations 4 and 5), entirely on the Gram matrix.

Channel c of the input is divided by s_c and column c of every weight that reads it multiplied by s_c: nothing changes
in full precision, but the columns that matter are rounded more finely. s = mean|x| ** ratio, over a grid of ratios;
the paper's loss ||Q(W diag(s)) diag(s)^-1 X - W X||^2 is a trace with the gram, so no forward pass is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.contracts import Scheme
from quantkit.numerics import affine, clip, gram

RATIOS = tuple(step / 20 for step in range(20))
"""AWQ's grid; ratio 0 leaves the input as it is."""
SMALLEST = 1e-4
"""Share of the largest mean |x| below which a channel counts as this share: a dead channel must not make s 0."""


def candidates(mean_abs: Tensor) -> Tensor:
    """Scales to try for an input: mean_abs [in] -> [n, in] float32, or [..., in] -> [n, ..., in]; the first all ones.

    Each is divided by sqrt(max * min), as in AWQ's published code, so that scales lie around 1 and neither the
    absorbing tensor nor the reading one leaves its range. An input that is always zero gets ones throughout.
    """
    largest = mean_abs.float().amax(dim=-1, keepdim=True)  # [..., in] -> [..., 1]
    share = torch.where(largest > 0, mean_abs.float() / largest, 1.0).clamp(min=SMALLEST)
    tried = [share**ratio for ratio in RATIOS]
    return torch.stack([
        scale / (scale.amax(-1, keepdim=True) * scale.amin(-1, keepdim=True)).sqrt() for scale in tried
    ])


def powers_of_two(scale: Tensor) -> Tensor:
    """Positive scales rounded to the nearest power of two, on a logarithmic scale; same shape and dtype.

    Such a scale changes exponents alone: a norm divided by it and a kept matrix multiplied by it are exact in any float
    dtype, so the fold costs nothing where nothing is quantized, and a router picks the very same experts.
    """
    return torch.exp2(torch.round(torch.log2(scale)))


def error(weight: Tensor, stats: Tensor, candidate: Tensor, scheme: Scheme | None) -> Tensor:
    """Output error of a weight that is scaled, rounded and unscaled: [...] float64, tr(D G D^T).

    weight [..., out, in] float32; stats [..., in, in], the gram of the unscaled input; candidate [in] or [..., in].
    With a scheme, each group's range is shrunk to what loses least under its own block of the gram, a coarse version of
    what the method does in the end: judged on min/max ranges, the scales would compensate for what clipping does
    better. Scheme None is a matrix kept in bfloat16, whose rounding counts too. Rows are worked on in chunks: extra
    memory is about TEMPORARIES * gram.ROWS * in float32 values per matrix.
    """
    scale = candidate.unsqueeze(-2)  # [in] -> [1, in]; [..., in] -> [..., 1, in]
    blocks = None if scheme is None else scaled_blocks(stats, candidate, scheme)
    total = torch.zeros(weight.shape[:-2], dtype=torch.float64, device=weight.device)
    for rows in weight.split(gram.ROWS, dim=-2):  # [..., out, in] -> [..., ROWS, in]
        wide = rows * scale
        if scheme is None or blocks is None:
            back = wide.bfloat16().float()
        else:
            back = round_coarsely(wide, blocks, scheme)
        total += gram.error(back.div_(scale).sub_(rows), stats)
    return total


def scaled_blocks(stats: Tensor, candidate: Tensor, scheme: Scheme) -> Tensor:
    """Diagonal blocks of the gram of x / candidate: [..., in, in] -> [..., n_groups, group, group]."""
    inverse = affine.split(candidate, scheme.group_size).reciprocal()  # [..., in] -> [..., n_groups, group]
    return gram.blocks(stats, scheme.group_size) * (inverse.unsqueeze(-1) * inverse.unsqueeze(-2))


def round_coarsely(weight: Tensor, blocks: Tensor, scheme: Scheme) -> Tensor:
    """Weights [..., out, in] after rounding with ranges shrunk on blocks [..., n_groups, group, group]; same shape."""
    groups = affine.split(weight, scheme.group_size).transpose(
        -3, -2
    )  # [..., out, n_groups, group] -> [..., n_groups, out, group]
    low, high = affine.ranges(weight, scheme.group_size)
    scale, zero = affine.qparams(low.mT, high.mT, scheme)  # [..., out, n_groups] -> [..., n_groups, out]
    scale, zero = clip.improve(groups, blocks, None, (scale, zero), clip.COARSE, scheme, shifts=(0,))
    return affine.fake(groups, scale, zero, scheme).transpose(-3, -2).flatten(-2)  # -> [..., out, in]
