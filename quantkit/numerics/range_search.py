"""Range search under the gram: AWQ's clip search (arXiv 2306.00978, section 4) without activations.

Each group's scale is tried smaller (and slightly larger) than its min/max scale, its zero point
one code to either side, and a candidate that lowers the row's output error d G d^T is kept. With
d_k the error of group k and the other groups fixed, the part of the error that group k decides is

    d_k G_kk d_k^T + 2 d_k (sum over j != k of G_kj d_j^T)

so groups are visited in turn (Gauss-Seidel), twice. Every accepted step lowers the error of the
whole row, which therefore never ends above the error of the unclipped ranges.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.contracts import Scheme
from quantkit.numerics import affine

COARSE_RATIOS = tuple(1 - 0.05 * step for step in range(11))
"""Ratios to the min/max scale: 1, 0.95 ... 0.5."""

FINE_RATIOS = tuple(1 + 0.01 * step for step in range(-4, 5))
"""Ratios to the best scale so far: 0.96 ... 1.04. bfloat16 resolves 0.4 %."""

ZERO_SHIFTS = (0, -1, 1)
"""Zero points tried, relative to the current one."""

WIDE_RATIOS = (1, 0.92, 0.85, 0.78, 0.71, 0.64, 0.57)
HALVING_STEPS = (0.035, 0.018, 0.01)
"""Search by the diagonal: ratios to the min/max scale, then steps to both sides of the best. Its
error is 0.7 % above that of COARSE_RATIOS, FINE_RATIOS and FINE_RATIOS with all zero points, of
which it tries a third."""

CACHED_WEIGHTS = 1 << 17
"""Weights that are searched at once: with their temporaries they stay in a core's cache."""

SWEEPS = 2
"""Visits of every group. On tiny-v3 the second lowers the error by 4 %, a third by 0.9 % more."""


def search_ranges(weight: Tensor, gram: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Search the scale and zero point of each group that lower tr(D G D^T).

    weight [..., out, in] float32, gram [..., in, in] float32 of its input -> scale
    [..., out, n_groups] in scheme.scale_dtype, zero uint8 of that shape or None.
    """
    size = scheme.group_size
    groups = affine.split_groups(weight, size)
    width = groups.shape[-1]
    scale, zero = affine.compute_qparams(*affine.compute_min_max(weight, size), scheme)
    delta = affine.fake_quantize(groups, scale, zero, scheme)
    delta.sub_(groups)  # [..., out, n_groups, group]
    for sweep in range(SWEEPS):
        for index in range(groups.shape[-2]):
            columns = slice(index * width, (index + 1) * width)
            delta[..., index, :] = 0
            # [..., out, in] @ [..., in, group] -> [..., out, group]
            pull = delta.flatten(-2) @ gram[..., columns]
            target, block = groups[..., index, :], gram[..., columns, columns]
            best = (scale[..., index], None if zero is None else zero[..., index])
            for ratios in (COARSE_RATIOS, FINE_RATIOS) if sweep == 0 else (FINE_RATIOS,):
                best = search_group(target, block, pull, best, ratios, scheme)
            scale[..., index] = best[0]
            if zero is not None and best[1] is not None:
                zero[..., index] = best[1]
            delta[..., index, :] = affine.fake_quantize(target, *best, scheme).sub_(target)
    return scale, zero


def search_ranges_by_diagonal(
    weight: Tensor, importance: Tensor, scheme: Scheme
) -> tuple[Tensor, Tensor | None]:
    """Search the scale and zero point of each group by weighted squared error.

    weight [..., out, in] and importance [..., in] float32, not negative (the gram's diagonal): the
    factor of each column's squared error. Result as in `search_ranges`. For rounding with error
    feedback, which handles the interaction of columns itself: on tiny-v3 its error under the gram
    ends below that with the ranges of `search_ranges`.
    """
    size = scheme.group_size
    # a gram's diagonal is strided: copied once; [..., in] -> [..., 1, in]
    importance = importance.contiguous().unsqueeze(-2)
    diagonal = affine.split_groups(importance, size)  # [..., in] -> [..., 1, n_groups, group]
    scales, zeros = list[Tensor](), list[Tensor]()
    for rows in split_for_cache(weight):
        start = affine.compute_qparams(*affine.compute_min_max(rows, size), scheme)
        scale, zero = search_rows_by_diagonal(rows, diagonal, start, scheme)
        scales.append(scale)
        zeros += [] if zero is None else [zero]
    # -> [..., out, n_groups]
    return torch.cat(scales, dim=-2), torch.cat(zeros, dim=-2) if zeros else None


def split_for_cache(weight: Tensor) -> tuple[Tensor, ...]:
    """Split the rows of weight [..., out, in] into parts of at most CACHED_WEIGHTS values.

    A part has at least one row.
    """
    per_row = weight.numel() // max(weight.shape[-2], 1)
    parts: tuple[Tensor, ...] = weight.split(max(1, CACHED_WEIGHTS // max(per_row, 1)), dim=-2)
    return parts


def search_rows_by_diagonal(
    weight: Tensor, diagonal: Tensor, start: tuple[Tensor, Tensor | None], scheme: Scheme
) -> tuple[Tensor, Tensor | None]:
    """Search ranges of weight [..., out, in] by squared errors times diagonal.

    diagonal [..., 1, n_groups, group]; start and result are scale and zero [..., out, n_groups].
    First WIDE_RATIOS with every zero point, then halving steps around the best.
    """
    groups = affine.split_groups(weight, scheme.group_size)
    errors = torch.full_like(start[0], torch.inf, dtype=torch.float32)
    best, errors = select_scales_and_zeros(
        groups, diagonal, (start, errors), WIDE_RATIOS, ZERO_SHIFTS, scheme
    )
    for step in HALVING_STEPS:
        best, errors = select_scales_and_zeros(
            groups, diagonal, (best, errors), (1 - step, 1 + step), (0,), scheme
        )
    return best


def select_scales_and_zeros(
    groups: Tensor,
    diagonal: Tensor,
    start: tuple[tuple[Tensor, Tensor | None], Tensor],
    ratios: Sequence[float],
    shifts: Sequence[int],
    scheme: Scheme,
) -> tuple[tuple[Tensor, Tensor | None], Tensor]:
    """Select the best of scale * ratio and zero + shift, for each group independently.

    groups [..., out, n_groups, group]; diagonal [..., 1, n_groups, group]; start and result are
    (scale, zero) and their error, [..., out, n_groups] each.
    """
    (scale, zero), least = start
    best_scale, best_zero, top = scale, zero, 2**scheme.bits - 1
    moved = shift_zero_points(zero, shifts, top)
    # each lowest unrounded code, [..., out, n_groups, 1] or one number
    lows = [-affine.expand_zero_point(shifted, scheme) for shifted in moved]
    base = scale.float()
    # written again for each zero point: fresh memory costs as much as the arithmetic
    error = torch.empty_like(groups)
    for ratio in ratios:
        stored = affine.round_scale(base * ratio, scheme)
        step = stored.float()
        exact = groups / step.unsqueeze(-1)  # unrounded code minus its zero point
        whole, area = torch.round(exact), step.square()
        for shifted, low in zip(moved, lows, strict=True):
            clamp_codes(whole, low, top, error)
            error.sub_(exact).square_().mul_(diagonal)
            # [..., n_groups, group] -> [..., n_groups]
            value = error.sum(dim=-1).mul_(area)
            better = value < least
            least = torch.where(better, value, least)
            best_scale = torch.where(better, stored, best_scale)
            if best_zero is not None and shifted is not None and shifted is not best_zero:
                best_zero = torch.where(better, shifted, best_zero)
    return (best_scale, best_zero), least


def shift_zero_points(
    zero: Tensor | None, shifts: Sequence[int], top: int
) -> tuple[Tensor | None, ...]:
    """Return zero + shift for each shift, uint8 clamped to codes 0 .. top.

    None once for a symmetric scheme; a shift of 0 is `zero` itself.
    """
    if zero is None:
        return (None,)
    return tuple(
        zero if shift == 0 else (zero.short() + shift).clamp_(0, top).to(torch.uint8)
        for shift in shifts
    )


def clamp_codes(whole: Tensor, low: Tensor | float, steps: int, out: Tensor) -> Tensor:
    """Clamp whole numbers [..., group] to low .. low + steps, written to `out`.

    low [..., 1] or one number.
    """
    if isinstance(low, Tensor):  # torch's clamp by tensors takes four times as long
        return torch.minimum(torch.maximum(whole, low, out=out), low + steps, out=out)
    return torch.clamp(whole, low, low + steps, out=out)


def search_group(
    target: Tensor,
    block: Tensor,
    pull: Tensor | None,
    start: tuple[Tensor, Tensor | None],
    ratios: Sequence[float],
    scheme: Scheme,
    shifts: Sequence[int] = ZERO_SHIFTS,
) -> tuple[Tensor, Tensor | None]:
    """Select the best of scale * ratio and zero + shift of one group, `start` on a tie.

    target [..., out, group]; block [..., group, group]; pull [..., out, group], the other groups'
    errors times the gram's columns of this group, or None; start and result are scale and zero,
    [..., out] each.
    """
    scale, zero = start
    best_scale, best_zero, top = scale, zero, 2**scheme.bits - 1
    least = compute_group_error(affine.fake_quantize(target, *start, scheme), target, block, pull)
    moved = shift_zero_points(zero, shifts, top)
    offsets = [affine.expand_zero_point(shifted, scheme) for shifted in moved]
    base = scale.float()
    for ratio in ratios:
        stored = affine.round_scale(base * ratio, scheme)
        step = stored.float().unsqueeze(-1)  # [..., out] -> [..., out, 1]
        whole = (target / step).round_()  # codes minus their zero point
        for shifted, offset in zip(moved, offsets, strict=True):
            # as affine.fake_quantize, operation by operation
            rounded = (whole + offset).clamp_(0, top).sub_(offset).mul_(step)
            value = compute_group_error(rounded, target, block, pull)
            better = value < least
            least = torch.where(better, value, least)
            best_scale = torch.where(better, stored, best_scale)
            if shifted is not None and best_zero is not None:
                best_zero = torch.where(better, shifted, best_zero)
    return best_scale, best_zero


def compute_group_error(
    rounded: Tensor, target: Tensor, block: Tensor, pull: Tensor | None
) -> Tensor:
    """Return one group's part of its row's output error: [..., out] float32.

    rounded [..., out, group] is target after rounding; it is overwritten.
    """
    delta = rounded.sub_(target)
    projected = delta @ block
    if pull is not None:
        projected.add_(pull, alpha=2)
    return projected.mul_(delta).sum(dim=-1)  # [..., out, group] -> [..., out]
