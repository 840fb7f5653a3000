"""GPTQ rounding (arXiv 2210.17323): columns in turn, later columns compensate earlier errors.

For an error d = w - q of a row the output error is d H d^T. With the factor of `cholesky`,
H = R R^T and U = R / diag(R), that is the sum over columns k of
R_kk^2 (d_k + sum over j < k of d_j U_jk)^2. Column k is therefore rounded at

    w_k + sum over j < k of (w_j - q_j) U_jk

which is GPTQ's update written on the factor of H itself: equation 3 there, on the Cholesky factor
of H's inverse, gives the same codes (the LDLQ form, arXiv 2307.13304, theorem 6).

Scales belong to groups of the original column order and are chosen before rounding, on the
original weights, so engines need no g_idx. The final cost of a column's own rounding error is
R_kk^2, because later columns compensate the rest. Ranges are weighted with H_kk all the same: with
R_kk^2 the error under the gram was 6 % lower and the model's KL 19 % higher (SmolLM2-135M).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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
    fp4,
    grids,
    range_search,
)
from quantkit.numerics import gram as grams
from quantkit.numerics.cholesky import BLOCK_COLUMNS, GptqFactor
from quantkit.numerics.microscaling import encode_e2m1, round_to_e2m1


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnRounding:
    """How the columns of one block become codes.

    round_column(values [..., out], k): round column k, divided by its scale, in place to the values
    of codes; encode(values [..., n, out]): the codes of these values, float32 or uint8.
    """

    round_column: Callable[[Tensor, int], Tensor]
    encode: Callable[[Tensor], Tensor]


def quantize_gptq(
    weight: Tensor, stats: InputStats | None, scheme: Scheme, *, refine: bool = True
) -> RoundedWeight:
    """Search ranges, round with GPTQ, then (with `refine`) run coordinate descent on the result.

    weight [..., out, in] float32, scaled if the recipe's method scales; stats of its input, gram
    [..., in, in]. If the stats have cross (and residual), the weight is first corrected for errors
    of earlier blocks, and the corrected weight is rounded. A row whose error under the gram ends
    above RTN's takes RTN's codes, so an input that was never seen (a gram of zeros) gives RTN.
    Fallback "damping-raised": a gram needed more than DAMPING.

    Raises NumericsError without statistics, or if a gram is not finite or not positive
    semi-definite.
    """
    if stats is None:
        raise NumericsError(
            "gptq rounds by calibration statistics, found none; use method rtn for this linear"
        )
    factor = cholesky.factorize_gram(stats.gram)
    damping = factor.damping
    if stats.cross is not None:
        weight = error_propagation.correct_weight(weight, stats.cross, factor, stats.residual)
    diagonal = stats.gram.diagonal(dim1=-2, dim2=-1)
    if scheme.kind in fp4.KINDS:
        rounded = round_fp4_with_feedback(
            weight, factor, fp4.search_scales(weight, diagonal, scheme)
        )
    else:
        ranges = range_search.search_ranges_by_diagonal(weight, diagonal, scheme)
        rounded = round_with_feedback(weight, factor, ranges, scheme)
    del factor  # as large as the gram
    if refine:
        damped = coordinate_descent.add_damping(stats.gram, damping)
        refined = coordinate_descent.refine_codes_and_scales(weight, damped, rounded, scheme)
        del damped
    else:
        refined = rounded
    plain = grids.quantize_rtn(weight, scheme)
    quantized = select_better_rows(weight, stats.gram, refined, plain, scheme)
    is_raised = bool((damping > cholesky.DAMPING * 1.5).any())
    return RoundedWeight(quantized=quantized, fallbacks=("damping-raised",) if is_raised else ())


def select_rows(matrix: Tensor, index: Tensor) -> Tensor:
    """Return rows of matrices in another order, or several times.

    matrix [..., n, m], index [..., k] -> [..., k, m]. Whole rows are selected: a gather would read
    an index for every value.
    """
    lead, (n, m) = matrix.shape[:-2], matrix.shape[-2:]
    first = torch.arange(prod(lead), device=index.device).reshape(*lead, 1) * n
    rows = matrix.reshape(-1, m).index_select(0, (index + first).flatten())  # [.. * k, m]
    return rows.reshape(*lead, -1, m)


def expand_to_columns(values: Tensor, order: Tensor, group: int) -> Tensor:
    """Expand values of groups to columns in act-order.

    values [..., out, n_groups] -> [..., in, out] float32.
    """
    return select_rows(values.float().mT, order // group)


def round_with_feedback(
    weight: Tensor, factor: GptqFactor, ranges: tuple[Tensor, Tensor | None], scheme: Scheme
) -> Quantized:
    """Round weights [..., out, in] float32 with GPTQ under given ranges.

    ranges are scale and zero [..., out, n_groups]. `factor` is that of the input's gram; one may
    serve a batch. Temporaries are fewer than four copies of the weight.
    """
    (scale, zero), group = ranges, weight.shape[-1] // ranges[0].shape[-1]

    def make_rounding(order: Tensor) -> ColumnRounding:
        if zero is None:
            return make_integer_rounding(affine.get_default_zero_point(scheme), scheme)
        return make_integer_rounding(expand_to_columns(zero, order, group), scheme)

    codes = choose_codes(weight, factor, scale, make_rounding)
    return Quantized(codes=codes, scale=scale, zero=zero)


def make_integer_rounding(offset: Tensor | int, scheme: Scheme) -> ColumnRounding:
    """Return the rounding of a block to integer codes with zero points [..., n, out], or one."""
    low, high = -offset, 2**scheme.bits - 1 - offset
    if not isinstance(low, Tensor) or not isinstance(high, Tensor):
        return ColumnRounding(
            round_column=lambda values, k: values.round_().clamp_(low, high),
            encode=lambda values: values.add_(offset),
        )
    least, most = low.unbind(-2), high.unbind(-2)  # n times [..., out]
    return ColumnRounding(
        round_column=lambda values, k: values.round_().clamp_(least[k], most[k]),
        encode=lambda values: values.add_(offset),
    )


FP4_ROUNDING = ColumnRounding(
    round_column=lambda values, k: round_to_e2m1(values), encode=encode_e2m1
)


def round_fp4_with_feedback(
    weight: Tensor, factor: GptqFactor, scales: tuple[Tensor, Tensor | None]
) -> Quantized:
    """Round weights [..., out, in] float32 to FP4 with GPTQ under given scales.

    scales are those of groups [..., out, n_groups] and the global one [..., 1, 1] or None.
    """
    scale, global_scale = scales
    steps = fp4.decode_steps(scale, global_scale)
    codes = choose_codes(weight, factor, steps, lambda order: FP4_ROUNDING)
    return Quantized(codes=codes, scale=scale, zero=None, global_scale=global_scale)


def choose_codes(
    weight: Tensor,
    factor: GptqFactor,
    steps: Tensor,
    make_rounding: Callable[[Tensor], ColumnRounding],
) -> Tensor:
    """Return the codes [..., out, in] uint8 of weights [..., out, in] float32.

    steps [..., out, n_groups]: what codes are multiplied by; make_rounding: of a block, from the
    order [..., n] of its columns.
    """
    lead, width = weight.shape[:-2], weight.shape[-1]
    upper, order = factor.upper.expand(*lead, width, width), factor.order.expand(*lead, width)
    # [..., out, in] -> [..., in, out], in act-order: a column is a row in memory
    columns = select_rows(weight.mT, order)
    codes = round_blocks(columns, upper, order, steps, make_rounding)
    codes = select_rows(codes, order.argsort(dim=-1))
    return codes.mT.contiguous()  # [..., in, out] -> [..., out, in]


def select_better_rows(
    weight: Tensor, gram: Tensor, first: Quantized, second: Quantized, scheme: Scheme
) -> Quantized:
    """Select row by row the quantization with the smaller error under the gram.

    A tie takes the second.
    """
    errors = [
        grams.compute_row_errors(grids.dequantize(quantized, scheme).sub_(weight), gram)
        for quantized in (first, second)
    ]
    better = (errors[0] < errors[1]).unsqueeze(-1)  # [..., out] -> [..., out, 1]
    zero = None
    if first.zero is not None and second.zero is not None:
        zero = torch.where(better, first.zero, second.zero)
    codes = torch.where(better, first.codes, second.codes)
    scale = torch.where(better, first.scale, second.scale)
    return replace(first, codes=codes, scale=scale, zero=zero)


def round_blocks(
    columns: Tensor,
    upper: Tensor,
    order: Tensor,
    steps: Tensor,
    make_rounding: Callable[[Tensor], ColumnRounding],
) -> Tensor:
    """Return codes [..., in, out] uint8 of columns in act-order.

    columns [..., in, out], upper [..., in, in], steps [..., out, n_groups]. BLOCK_COLUMNS columns
    at a time: within a block errors move column by column, to later blocks in one product (lazy
    batch updates).
    """
    group = columns.shape[-2] // steps.shape[-1]
    errors, codes = torch.empty_like(columns), torch.empty_like(columns, dtype=torch.uint8)
    for start in range(0, columns.shape[-2], BLOCK_COLUMNS):
        block = slice(start, start + BLOCK_COLUMNS)
        # [..., BLOCK_COLUMNS, out]
        target = columns[..., block, :] + upper[..., :start, block].mT @ errors[..., :start, :]
        rounding = make_rounding(order[..., block])
        rounded = round_columns(
            columns[..., block, :],
            target,
            upper[..., block, block],
            expand_to_columns(steps, order[..., block], group),
            errors[..., block, :],
            rounding.round_column,
        )
        codes[..., block, :] = rounding.encode(rounded)
    return codes


def round_columns(
    columns: Tensor,
    target: Tensor,
    upper: Tensor,
    steps: Tensor,
    errors: Tensor,
    round_column: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """Round the columns of one block in turn; return the values of their codes.

    columns, target, steps and errors [..., n, out]; upper [..., n, n]; round_column as in
    ColumnRounding. The result, float32, replaces `target`; `errors` is filled in. A column takes a
    few calls that write into place: on a CPU a call costs as much as its arithmetic.
    """
    count = columns.shape[-2]
    weights = upper.unsqueeze(-1).unbind(-3)  # [..., n, n] -> n times [..., n, 1]
    lines = (x.unbind(-2) for x in (columns, target, steps, errors))
    dequantized = torch.empty_like(target[..., 0, :])
    for k, (original, code, step, error, weight) in enumerate(zip(*lines, weights)):
        round_column(code.div_(step), k)
        torch.sub(original, torch.mul(code, step, out=dequantized), out=error)
        later = target.narrow(-2, k + 1, count - k - 1)
        later.addcmul_(weight.narrow(-2, k + 1, count - k - 1), error.unsqueeze(-2))
    return target
