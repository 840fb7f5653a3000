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

from dataclasses import dataclass
from itertools import repeat
from math import prod

import torch
from torch import Tensor

from quantkit.contracts import Quantized, Scheme
from quantkit.errors import NumericsError
from quantkit.numerics import affine, matmul
from quantkit.numerics import gram as grams

DAMPING = 0.01
"""Share of the gram's mean diagonal that is added to its diagonal: GPTQ's own."""
GROWTH = 10.0
"""What the damping is multiplied with after each factorization that fails."""
MOST_DAMPING = 1e4
"""A gram that needs more is no sum of x x^T."""
LAZY = 128
"""Columns rounded before their errors reach the columns behind them, in one product."""


@dataclass(frozen=True, kw_only=True)
class GptqFactor:
    """How the error of an earlier column moves a later one, from one gram.

    upper [..., in, in] float32, U above the diagonal in visiting order; order [..., in] int64; own [..., in] float32,
    R_kk^2 by the gram's own order: what a column's squared rounding error costs; damping [...] float32, a share of the
    mean diagonal.
    """

    upper: Tensor
    order: Tensor
    own: Tensor
    damping: Tensor


def feedback(gram: Tensor) -> GptqFactor:
    """The factor of a gram [..., in, in] float32.

    Columns that were never used (diagonal 0) come last and neither give nor take: they are rounded to nearest. Raises
    NumericsError for a gram that is not finite or not positive semi-definite.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)  # [..., in, in] -> [..., in]
    if not bool(torch.isfinite(gram.sum(dim=-1)).all()):
        raise NumericsError(
            "a Gram matrix holds NaN or infinity, every value must be finite: check the calibration text and the "
            "activations of this block, or use rounding nearest"
        )
    order = diagonal.argsort(dim=-1, descending=True, stable=True)
    unit = damping_unit(gram)
    # reversed: Cholesky gives a lower factor, and what is lower in the reversed order is upper in this one
    lower, damping = damped_factor(gram, order.flip(-1), unit)
    upper = lower.flip((-2, -1))
    roots = upper.diagonal(dim1=-2, dim2=-1).clone()  # [..., in]
    upper.div_(roots.unsqueeze(-2))  # column by column
    own = torch.empty_like(roots).scatter_(-1, order, roots.square())
    return GptqFactor(upper=upper, order=order, own=own, damping=damping)


def damping_unit(gram: Tensor) -> Tensor:
    """What damping is a share of: the mean diagonal of gram [..., in, in], 1 where that is 0; [...] float32."""
    mean = gram.diagonal(dim1=-2, dim2=-1).double().mean(dim=-1).float()  # [..., in, in] -> [...]
    return torch.where(mean > 0, mean, torch.ones_like(mean))


def ordered(gram: Tensor, order: Tensor) -> Tensor:
    """A gram [..., in, in] with rows and columns in another order [..., in], a copy."""
    width = gram.shape[-1]
    pairs = zip(gram.reshape(-1, width, width), order.reshape(-1, width), strict=True)
    # one by one: gathering a batch would need its indices in full, twice the size of the gram
    return torch.stack([one.index_select(0, i).index_select(1, i) for one, i in pairs]).reshape(
        gram.shape
    )


def damped_factor(gram: Tensor, order: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factor of a gram [..., in, in] in another order [..., in], with damping * unit [...] on its diagonal.

    The damping starts at DAMPING and grows by GROWTH, for the matrices that need it alone. Result: lower [..., in, in]
    and damping [...].
    """
    damping = torch.full_like(unit, DAMPING)
    while True:
        work = ordered(gram, order)
        work.diagonal(dim1=-2, dim2=-1).add_((damping * unit).unsqueeze(-1))
        failed = cholesky(work)
        if not bool(failed.any()):
            return work, damping
        if bool((damping > MOST_DAMPING).any()):
            raise NumericsError(
                f"a Gram matrix is far from positive semi-definite: {MOST_DAMPING:g} times its mean diagonal was added "
                "and it still has no Cholesky factor; check the calibration of this block, or use rounding nearest"
            )
        damping = torch.where(failed, damping * GROWTH, damping)


def cholesky(matrix: Tensor) -> Tensor:
    """Replace symmetric matrices [..., n, n] by their lower Cholesky factor; [...] bool, true where there is none.

    LAZY columns at a time, each in products whose sums do not depend on the number of threads, which LAPACK's
    factorization of a whole matrix does not promise. It takes no second matrix, either.
    """
    failed = torch.zeros(matrix.shape[:-2], dtype=torch.bool, device=matrix.device)
    for start in range(0, matrix.shape[-1], LAZY):
        here, before = slice(start, start + LAZY), slice(0, start)
        panel = matrix[..., start:, here]  # [..., n - start, LAZY]
        panel -= matrix[..., start:, before] @ matrix[..., here, before].mT
        lower, status = torch.linalg.cholesky_ex(panel[..., :LAZY, :])
        failed |= status != 0
        panel[..., :LAZY, :] = lower
        below = panel[..., LAZY:, :]
        below.copy_(torch.linalg.solve_triangular(lower.mT, below, upper=True, left=False))
    matrix.tril_()
    return failed


def rows_at(matrix: Tensor, index: Tensor) -> Tensor:
    """Rows of matrices in another order, or several times: matrix [..., n, m], index [..., k] -> [..., k, m].

    As one selection of whole rows: a gather would read an index for every value.
    """
    lead, (n, m) = matrix.shape[:-2], matrix.shape[-2:]
    first = torch.arange(prod(lead), device=index.device).reshape(*lead, 1) * n
    return (
        matrix.reshape(-1, m).index_select(0, (index + first).flatten()).reshape(*lead, -1, m)
    )  # by [.. * n, m]


def per_column(values: Tensor, order: Tensor, group: int) -> Tensor:
    """Values of groups, for columns in visiting order: [..., out, n_groups] -> [..., in, out] float32."""
    return rows_at(values.float().mT, order // group)


def gptq_round(
    weight: Tensor, fed: GptqFactor, ranges: tuple[Tensor, Tensor | None], scheme: Scheme
) -> Quantized:
    """Round weights [..., out, in] float32 under given scale and zero [..., out, n_groups], errors fed back.

    `fed` is of the gram of their input; one may serve a batch. Temporaries are fewer than four copies of the weight.
    """
    scale, zero = ranges
    lead, width = weight.shape[:-2], weight.shape[-1]
    upper, order = fed.upper.expand(*lead, width, width), fed.order.expand(*lead, width)
    # [..., out, in] -> [..., in, out], in visiting order: a column is a row in memory
    visited = rows_at(weight.mT, order)
    chosen = visited_codes(visited, upper, order, ranges, width // scale.shape[-1], scheme)
    codes = rows_at(
        chosen, order.argsort(dim=-1)
    ).mT.contiguous()  # [..., in, out] -> [..., out, in]
    return Quantized(codes=codes, scale=scale, zero=zero)


def better_rows(
    weight: Tensor, gram: Tensor, first: Quantized, second: Quantized, scheme: Scheme
) -> Quantized:
    """Row by row the one that loses less under the gram, the second where both lose the same."""
    lost = [
        row_error(affine.dequantize(each, scheme).sub_(weight), gram) for each in (first, second)
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


def visited_codes(
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
    for start in range(0, visited.shape[-2], LAZY):
        here = slice(start, start + LAZY)
        target = (
            visited[..., here, :] + upper[..., :start, here].mT @ errors[..., :start, :]
        )  # [..., LAZY, out]
        step = per_column(scale, order[..., here], group)
        offset = (
            affine.get_default_zero_point(scheme)
            if zero is None
            else per_column(zero, order[..., here], group)
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


def row_error(delta: Tensor, gram: Tensor) -> Tensor:
    """d G d^T of each row: delta [..., out, in], gram [..., in, in] -> [..., out] float64."""
    rows = delta.split(grams.ROWS, dim=-2)  # [..., ROWS, in]
    return torch.cat([matmul.row_forms(part, gram) for part in rows], dim=-1)
