"""Ranges that lose least under the Gram matrix: the clip search of AWQ (arXiv 2306.00978, section 4), done on G alone.

Each group's scale is tried smaller (and a little larger) than min/max gives it, its zero point one code to either side,
and what lowers the row's output error d G d^T is kept. With d_k the error of group k and the other groups held, the
part that group k decides is

    d_k G_kk d_k^T + 2 d_k (sum over j != k of G_kj d_j^T)

so groups are visited in turn (Gauss-Seidel), twice. Every accepted step lowers the error of the whole row, which hence
never ends above the error of the unclipped ranges.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.contracts import Scheme
from quantkit.numerics import affine

COARSE_RATIOS = tuple(1 - 0.05 * step for step in range(11))
"""Shares of the min/max scale: 1, 0.95 ... 0.5."""
FINE_RATIOS = tuple(1 + 0.01 * step for step in range(-4, 5))
"""Shares of the best scale so far: 0.96 ... 1.04. bfloat16 resolves 0.4 %."""
ZERO_SHIFTS = (0, -1, 1)
"""Zero points tried around the current one."""
WIDE_RATIOS = (1, 0.92, 0.85, 0.78, 0.71, 0.64, 0.57)
HALVING_STEPS = (0.035, 0.018, 0.01)
"""The search by the diagonal: shares of the min/max scale, then steps to both sides. Its error is 0.7 % above that of
COARSE, FINE and FINE with all zero points, a third of which it tries."""
CACHED_WEIGHTS = 1 << 17
"""Weights that are searched at once: with their temporaries they stay in a core's cache."""
SWEEPS = 2
"""Visits of every group. On tiny-v3 the second lowers the error by 4 %, a third by another 0.9 %."""


def search_ranges(weight: Tensor, gram: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of each group, chosen to lower tr(D G D^T).

    weight [..., out, in] float32, gram [..., in, in] float32 of the input it reads -> scale [..., out, n_groups] in
    scheme.scale_dtype, zero uint8 of that shape or None.
    """
    groups = affine.split_groups(weight, scheme.group_size)
    width = groups.shape[-1]
    scale, zero = affine.compute_qparams(*affine.compute_min_max(weight, scheme.group_size), scheme)
    delta = affine.fake_quantize(groups, scale, zero, scheme).sub_(
        groups
    )  # [..., out, n_groups, group]
    for sweep in range(SWEEPS):
        for index in range(groups.shape[-2]):
            columns = slice(index * width, (index + 1) * width)
            delta[..., index, :] = 0
            pull = (
                delta.flatten(-2) @ gram[..., columns]
            )  # [..., out, in] @ [..., in, group] -> [..., out, group]
            target, block = groups[..., index, :], gram[..., columns, columns]
            best = (scale[..., index], None if zero is None else zero[..., index])
            for shares in (COARSE_RATIOS, FINE_RATIOS) if sweep == 0 else (FINE_RATIOS,):
                best = search_group(target, block, pull, best, shares, scheme)
            scale[..., index] = best[0]
            if zero is not None and best[1] is not None:
                zero[..., index] = best[1]
            delta[..., index, :] = affine.fake_quantize(target, *best, scheme).sub_(target)
    return scale, zero


def search_ranges_by_diagonal(
    weight: Tensor, columns: Tensor, scheme: Scheme
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of each group by the squared error of its weights, each column's times what it counts.

    weight [..., out, in] and columns [..., in] float32, none negative (the gram's diagonal); result as in `search`. For
    rounding with error feedback, which settles by itself what columns do to one another: on tiny-v3 its error under the
    gram ends below that with the ranges of `search`.
    """
    columns = columns.contiguous().unsqueeze(
        -2
    )  # [..., in] -> [..., 1, in]; a gram's diagonal lies far apart
    diagonal = affine.split_groups(
        columns, scheme.group_size
    )  # [..., in] -> [..., 1, n_groups, group]
    scales, zeros = list[Tensor](), list[Tensor]()
    for rows in split_for_cache(weight):
        scale, zero = search_rows_by_diagonal(
            rows,
            diagonal,
            affine.compute_qparams(*affine.compute_min_max(rows, scheme.group_size), scheme),
            scheme,
        )
        scales.append(scale)
        zeros += [] if zero is None else [zero]
    return torch.cat(scales, dim=-2), torch.cat(
        zeros, dim=-2
    ) if zeros else None  # -> [..., out, n_groups]


def split_for_cache(weight: Tensor) -> tuple[Tensor, ...]:
    """The rows of weight [..., out, in] in parts of at most IN_CACHE values, one row at least."""
    per_row = weight.numel() // max(weight.shape[-2], 1)
    parts: tuple[Tensor, ...] = weight.split(max(1, CACHED_WEIGHTS // max(per_row, 1)), dim=-2)
    return parts


def search_rows_by_diagonal(
    weight: Tensor, diagonal: Tensor, start: tuple[Tensor, Tensor | None], scheme: Scheme
) -> tuple[Tensor, Tensor | None]:
    """Ranges of weight [..., out, in] by squared errors weighted with diagonal [..., 1, n_groups, group].

    start and result are scale and zero [..., out, n_groups]. WIDE shares with every zero point, then steps around the
    best that halve.
    """
    groups, none = (
        affine.split_groups(weight, scheme.group_size),
        torch.full_like(start[0], torch.inf, dtype=torch.float32),
    )
    best, least = select_scales_and_zeros(
        groups, diagonal, (start, none), WIDE_RATIOS, ZERO_SHIFTS, scheme
    )
    for step in HALVING_STEPS:
        best, least = select_scales_and_zeros(
            groups, diagonal, (best, least), (1 - step, 1 + step), (0,), scheme
        )
    return best


def select_scales_and_zeros(
    groups: Tensor,
    diagonal: Tensor,
    start: tuple[tuple[Tensor, Tensor | None], Tensor],
    shares: Sequence[float],
    shifts: Sequence[int],
    scheme: Scheme,
) -> tuple[tuple[Tensor, Tensor | None], Tensor]:
    """The best of scale * share and zero + shift for all groups at once, each by itself.

    groups [..., out, n_groups, group]; diagonal [..., 1, n_groups, group]; start and result are (scale, zero) and what
    they lose, [..., out, n_groups] each.
    """
    (scale, zero), least = start
    best_scale, best_zero, most = scale, zero, 2**scheme.bits - 1
    lost = torch.empty_like(
        groups
    )  # written again for each zero point: fresh memory costs as much as the arithmetic
    for share in shares:
        tried = affine.round_scale(scale.float() * share, scheme)
        step = tried.float()
        exact = groups / step.unsqueeze(
            -1
        )  # the code less its zero point, had it room for fractions
        whole = torch.round(exact)
        for shift in (0,) if zero is None else shifts:
            moved = None if zero is None else (zero.short() + shift).clamp_(0, most).to(torch.uint8)
            clamp_codes(whole, -affine.expand_zero_point(moved, scheme), most, lost).sub_(
                exact
            ).square_().mul_(diagonal)
            value = lost.sum(dim=-1).mul_(
                step.square()
            )  # [..., n_groups, group] -> [..., n_groups]
            better = value < least
            least = torch.where(better, value, least)
            best_scale = torch.where(better, tried, best_scale)
            best_zero = (
                None
                if moved is None or best_zero is None
                else torch.where(better, moved, best_zero)
            )
    return (best_scale, best_zero), least


def clamp_codes(whole: Tensor, low: Tensor | float, steps: int, out: Tensor) -> Tensor:
    """Whole numbers [..., group] held within low .. low + steps, low [..., 1] or one number; in the place of `out`."""
    if isinstance(low, Tensor):  # torch's clamp by tensors takes four times as long
        return torch.minimum(torch.maximum(whole, low, out=out), low + steps, out=out)
    return torch.clamp(whole, low, low + steps, out=out)


def search_group(
    target: Tensor,
    block: Tensor,
    pull: Tensor | None,
    start: tuple[Tensor, Tensor | None],
    shares: Sequence[float],
    scheme: Scheme,
    shifts: Sequence[int] = ZERO_SHIFTS,
) -> tuple[Tensor, Tensor | None]:
    """The best of scale * share and zero + shift around `start`, which is kept where nothing is better.

    target [..., out, group]; block [..., group, group]; pull [..., out, group], what the other groups' errors weigh on
    this one, or None; start and result are scale and zero, [..., out] each.
    """
    scale, zero = start
    best_scale, best_zero = start
    least = compute_group_error(target, block, pull, start, scheme)
    for share in shares:
        tried = affine.round_scale(scale.float() * share, scheme)
        for shift in (0,) if zero is None else shifts:
            moved = (
                None
                if zero is None
                else (zero.short() + shift).clamp_(0, 2**scheme.bits - 1).to(torch.uint8)
            )
            value = compute_group_error(target, block, pull, (tried, moved), scheme)
            better = value < least
            least = torch.where(better, value, least)
            best_scale = torch.where(better, tried, best_scale)
            best_zero = (
                None
                if moved is None or best_zero is None
                else torch.where(better, moved, best_zero)
            )
    return best_scale, best_zero


def compute_group_error(
    target: Tensor,
    block: Tensor,
    pull: Tensor | None,
    chosen: tuple[Tensor, Tensor | None],
    scheme: Scheme,
) -> Tensor:
    """What one group adds to its row's output error: target [..., out, group] -> [..., out] float32."""
    delta = affine.fake_quantize(target, *chosen, scheme).sub_(target)
    seen = delta @ block
    if pull is not None:
        seen.add_(pull, alpha=2)
    return seen.mul_(delta).sum(dim=-1)  # [..., out, group] -> [..., out]
