"""GPTQ (arXiv 2210.17323): columns are rounded one after the other, each making up for the errors of those before it.

For an error d = w - q of a row the output loses d H d^T. With H = R R^T, R upper triangular, U = R / diag(R) column by
column, that is the sum over columns k of R_kk^2 (d_k + sum over j < k of d_j U_jk)^2. Column k is therefore rounded at

    w_k + sum over j < k of (w_j - q_j) U_jk

which is GPTQ's update written on the factor of H itself: equation 3 there on the Cholesky factor of H's inverse gives
the same codes (the LDLQ form, arXiv 2307.13304, theorem 6). R is the Cholesky factor of H with its rows and columns
reversed; nothing is inverted.

Columns are visited by falling diagonal of H, so that what matters is rounded while much is left to make up for it.
Scales belong to groups of the original order and are chosen before, on the original weights: engines need no g_idx.
What a column's own rounding costs in the end is R_kk^2: later columns make up for the rest. Ranges are weighted with
H_kk all the same: with R_kk^2 the error under the gram was 6 % lower and the model's KL 19 % higher (SmolLM2-135M).
"""

from __future__ import annotations

from itertools import repeat
from math import prod

import torch
from torch import Tensor

from quantkit.contracts import InputStats, Quantized, RoundedWeight, Scheme
from quantkit.errors import NumericsError
from quantkit.numerics import (
    affine,
    cholesky,
    coordinate_descent,
    error_propagation,
    matmul,
    range_search,
)
from quantkit.numerics import gram as grams
from quantkit.numerics.cholesky import BLOCK_COLUMNS, GptqFactor


def quantize_gptq(
    weight: Tensor, stats: InputStats | None, scheme: Scheme, *, refine: bool = True
) -> RoundedWeight:
    """Search ranges, round with GPTQ, then (with `refine`) improve codes and scales by coordinate descent.

    weight [..., out, in] float32, scaled if the recipe's method scales; stats of the input it reads, gram
    [..., in, in]. With their cross (and residual) the weight is first corrected for errors of earlier blocks, and the
    corrected weight is rounded. A row whose error under the gram ends above RTN's takes RTN's codes, so an input that
    was never seen (a gram of zeros) gives RTN. Fallback "damping-raised": a gram needed more than DAMPING.

    Raises NumericsError without statistics, or for a gram that is not finite or not positive semi-definite.
    """
    if stats is None:
        raise NumericsError(
            "gptq rounds by calibration statistics, found none; use method rtn for this linear"
        )
    factor = cholesky.factorize_gram(stats.gram)
    damping = factor.damping
    if stats.cross is not None:
        weight = error_propagation.correct_weight(weight, stats.cross, factor, stats.residual)
    ranges = range_search.search_ranges_by_diagonal(
        weight, stats.gram.diagonal(dim1=-2, dim2=-1), scheme
    )
    rounded = round_with_feedback(weight, factor, ranges, scheme)
    del factor  # as large as the gram
    if refine:
        damped = coordinate_descent.add_damping(stats.gram, damping)
        refined = coordinate_descent.refine_codes_and_scales(weight, damped, rounded, scheme)
        del damped
    else:
        refined = rounded
    plain = affine.quantize(
        weight,
        *affine.compute_qparams(*affine.compute_min_max(weight, scheme.group_size), scheme),
        scheme,
    )
    quantized = select_better_rows(weight, stats.gram, refined, plain, scheme)
    is_raised = bool((damping > cholesky.DAMPING * 1.5).any())
    return RoundedWeight(quantized=quantized, fallbacks=("damping-raised",) if is_raised else ())


def select_rows(matrix: Tensor, index: Tensor) -> Tensor:
    """Rows of matrices in another order, or several times: matrix [..., n, m], index [..., k] -> [..., k, m].

    As one selection of whole rows: a gather would read an index for every value.
    """
    lead, (n, m) = matrix.shape[:-2], matrix.shape[-2:]
    first = torch.arange(prod(lead), device=index.device).reshape(*lead, 1) * n
    return (
        matrix.reshape(-1, m).index_select(0, (index + first).flatten()).reshape(*lead, -1, m)
    )  # by [.. * n, m]


def expand_to_columns(values: Tensor, order: Tensor, group: int) -> Tensor:
    """Values of groups, for columns in visiting order: [..., out, n_groups] -> [..., in, out] float32."""
    return select_rows(values.float().mT, order // group)


def round_with_feedback(
    weight: Tensor, fed: GptqFactor, ranges: tuple[Tensor, Tensor | None], scheme: Scheme
) -> Quantized:
    """Round weights [..., out, in] float32 under given scale and zero [..., out, n_groups], errors fed back.

    `fed` is of the gram of their input; one may serve a batch. Temporaries are fewer than four copies of the weight.
    """
    scale, zero = ranges
    lead, width = weight.shape[:-2], weight.shape[-1]
    upper, order = fed.upper.expand(*lead, width, width), fed.order.expand(*lead, width)
    # [..., out, in] -> [..., in, out], in visiting order: a column is a row in memory
    visited = select_rows(weight.mT, order)
    chosen = round_blocks(visited, upper, order, ranges, width // scale.shape[-1], scheme)
    codes = select_rows(
        chosen, order.argsort(dim=-1)
    ).mT.contiguous()  # [..., in, out] -> [..., out, in]
    return Quantized(codes=codes, scale=scale, zero=zero)


def select_better_rows(
    weight: Tensor, gram: Tensor, first: Quantized, second: Quantized, scheme: Scheme
) -> Quantized:
    """Row by row the one that loses less under the gram, the second where both lose the same."""
    lost = [
        compute_row_errors(affine.dequantize(each, scheme).sub_(weight), gram)
        for each in (first, second)
    ]
    better = (lost[0] < lost[1]).unsqueeze(-1)  # [..., out] -> [..., out, 1]
    zero = None
    if first.zero is not None and second.zero is not None:
        zero = torch.where(better, first.zero, second.zero)
    codes, scale = (
        torch.where(better, first.codes, second.codes),
        torch.where(better, first.scale, second.scale),
    )
    return Quantized(codes=codes, scale=scale, zero=zero)


def round_blocks(
    visited: Tensor,
    upper: Tensor,
    order: Tensor,
    ranges: tuple[Tensor, Tensor | None],
    group: int,
    scheme: Scheme,
) -> Tensor:
    """Codes [..., in, out] uint8 of columns in visiting order: visited [..., in, out], upper [..., in, in].

    LAZY columns at a time: within them errors move on column by column, to the columns behind them in one product.
    """
    scale, zero = ranges
    errors, codes = torch.empty_like(visited), torch.empty_like(visited, dtype=torch.uint8)
    for start in range(0, visited.shape[-2], BLOCK_COLUMNS):
        here = slice(start, start + BLOCK_COLUMNS)
        target = (
            visited[..., here, :] + upper[..., :start, here].mT @ errors[..., :start, :]
        )  # [..., LAZY, out]
        step = expand_to_columns(scale, order[..., here], group)
        offset = (
            affine.get_default_zero_point(scheme)
            if zero is None
            else expand_to_columns(zero, order[..., here], group)
        )
        chosen = round_columns(
            visited[..., here, :],
            target,
            upper[..., here, here],
            (step, offset),
            errors[..., here, :],
            scheme,
        )
        codes[..., here, :] = chosen.add_(offset)
    return codes


def round_columns(
    visited: Tensor,
    target: Tensor,
    upper: Tensor,
    steps: tuple[Tensor, Tensor | int],
    errors: Tensor,
    scheme: Scheme,
) -> Tensor:
    """Codes without their zero points [..., n, out] float32, in the place of `target`; `errors` is filled in.

    visited, target and errors [..., n, out]; upper [..., n, n]; steps are scale and zero [..., n, out]. A column is
    a few calls that write where their result belongs: on a CPU a call costs as much as its arithmetic.
    """
    (scale, offset), count = steps, visited.shape[-2]
    low, high = -offset, 2**scheme.bits - 1 - offset
    bounds = (
        zip(low.unbind(-2), high.unbind(-2)) if isinstance(low, Tensor) else repeat((low, high))
    )
    weights = upper.unsqueeze(-1).unbind(-3)  # [..., n, n] -> n times [..., n, 1]
    lines, back = (
        (x.unbind(-2) for x in (visited, target, scale, errors)),
        torch.empty_like(target[..., 0, :]),
    )
    for k, (original, code, step, error, weight, (least, most)) in enumerate(
        zip(*lines, weights, bounds)
    ):
        code.div_(step).round_().clamp_(least, most)
        torch.sub(original, torch.mul(code, step, out=back), out=error)
        later = target.narrow(-2, k + 1, count - k - 1)
        later.addcmul_(weight.narrow(-2, k + 1, count - k - 1), error.unsqueeze(-2))
    return target


def compute_row_errors(delta: Tensor, gram: Tensor) -> Tensor:
    """d G d^T of each row: delta [..., out, in], gram [..., in, in] -> [..., out] float64."""
    rows = delta.split(grams.BLOCK_ROWS, dim=-2)  # [..., ROWS, in]
    return torch.cat([matmul.compute_quadratic_forms(part, gram) for part in rows], dim=-1)
