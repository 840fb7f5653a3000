"""Damped Cholesky factor of a Gram matrix, as GPTQ rounding and error propagation use it.

GPTQ (arXiv 2210.17323) inverts the Hessian H and factorizes the inverse. The same update follows
from a factor of H itself: H = R R^T with R upper triangular, U = R / diag(R) column by column.
R is the Cholesky factor of H with its rows and columns reversed; nothing is inverted.

Columns are ordered by falling diagonal of H ("act-order"): important columns are rounded first,
while many later columns can still compensate their errors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import NumericsError
from quantkit.numerics import matmul

DAMPING = 0.01
"""Share of the gram's mean diagonal that is added to its diagonal: GPTQ's `percdamp`."""

DAMPING_GROWTH = 10.0
"""Factor by which the damping grows after a factorization that fails."""

MAX_DAMPING = 1e4
"""Largest damping before giving up: a sum of x x^T never needs more."""

BLOCK_COLUMNS = 128
"""Columns of a block: their errors reach all later columns in one product (GPTQ's lazy batch)."""


@dataclass(frozen=True, kw_only=True)
class GptqFactor:
    """How the rounding error of a column moves later columns; computed from one gram.

    upper [..., in, in] float32, U above the diagonal in act-order; order [..., in] int64; own
    [..., in] float32, R_kk^2 in the gram's own order: the cost of a column's squared rounding
    error; damping [...] float32, a share of the mean diagonal.
    """

    upper: Tensor
    order: Tensor
    own: Tensor
    damping: Tensor


def factorize_gram(gram: Tensor) -> GptqFactor:
    """Factorize a gram [..., in, in] float32.

    Columns that were never used (diagonal 0) come last, neither send nor receive errors, and are
    rounded to nearest. Raises NumericsError if a gram is not finite or not positive semi-definite.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)  # [..., in, in] -> [..., in]
    if not bool(torch.isfinite(gram.sum(dim=-1)).all()):
        raise NumericsError(
            "a Gram matrix holds NaN or infinity, every value must be finite: check the "
            "calibration text and the activations of this block, or use rounding nearest"
        )
    order = diagonal.argsort(dim=-1, descending=True, stable=True)
    unit = compute_mean_diagonal(gram)
    # Cholesky gives a lower factor: lower in the reversed order is upper in this one
    lower, damping = factorize_damped(gram, order.flip(-1), unit)
    upper = lower.flip((-2, -1))
    roots = upper.diagonal(dim1=-2, dim2=-1).clone()  # [..., in]
    upper.div_(roots.unsqueeze(-2))  # column by column
    own = torch.empty_like(roots).scatter_(-1, order, roots.square())
    return GptqFactor(upper=upper, order=order, own=own, damping=damping)


def compute_mean_diagonal(gram: Tensor) -> Tensor:
    """Return the mean diagonal of gram [..., in, in], the unit of damping; [...] float32.

    It is 1 where the mean is 0.
    """
    mean = gram.diagonal(dim1=-2, dim2=-1).double().mean(dim=-1).float()  # [..., in, in] -> [...]
    return torch.where(mean > 0, mean, torch.ones_like(mean))


def permute_gram(gram: Tensor, order: Tensor) -> Tensor:
    """Return a copy of a gram [..., in, in] with rows and columns in `order` [..., in]."""
    width = gram.shape[-1]
    pairs = zip(gram.reshape(-1, width, width), order.reshape(-1, width), strict=True)
    # one by one: gathering a batch needs its indices in full, twice the size of the gram
    permuted = [matrix.index_select(0, i).index_select(1, i) for matrix, i in pairs]
    return torch.stack(permuted).reshape(gram.shape)


def factorize_damped(gram: Tensor, order: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Cholesky factor of gram [..., in, in] in `order` [..., in], and its damping.

    damping * unit [...] is added to the diagonal. The damping starts at DAMPING and grows by
    DAMPING_GROWTH for the matrices that need it. Result: lower [..., in, in] and damping [...].
    Raises NumericsError above MAX_DAMPING.
    """
    damping = torch.full_like(unit, DAMPING)
    while True:
        work = permute_gram(gram, order)
        work.diagonal(dim1=-2, dim2=-1).add_((damping * unit).unsqueeze(-1))
        failed = cholesky_in_place(work)
        if not bool(failed.any()):
            return work, damping
        if bool((damping > MAX_DAMPING).any()):
            raise NumericsError(
                f"a Gram matrix is far from positive semi-definite: {MAX_DAMPING:g} times its mean "
                "diagonal was added and it still has no Cholesky factor; check the calibration of "
                "this block, or use rounding nearest"
            )
        damping = torch.where(failed, damping * DAMPING_GROWTH, damping)


def cholesky_in_place(matrix: Tensor) -> Tensor:
    """Replace symmetric matrices [..., n, n] by their lower Cholesky factors.

    Returns [...] bool, true where a matrix has no factor. No second matrix is allocated.
    """
    failed = factorize_lower_triangle(matrix)
    matrix.tril_()
    return failed


def factorize_lower_triangle(matrix: Tensor) -> Tensor:
    """Write the Cholesky factors of symmetric matrices [..., n, n] over their lower triangles.

    Above the diagonal, values change only in the diagonal blocks of BLOCK_COLUMNS columns. Returns
    [...] bool, true where a matrix has no factor. BLOCK_COLUMNS columns at a time, in products
    whose sums do not depend on the number of threads; LAPACK's factorization of a whole matrix does
    not promise that.
    """
    failed = torch.zeros(matrix.shape[:-2], dtype=torch.bool, device=matrix.device)
    for start in range(0, matrix.shape[-1], BLOCK_COLUMNS):
        block, before = slice(start, start + BLOCK_COLUMNS), slice(0, start)
        panel = matrix[..., start:, block]  # [..., n - start, BLOCK_COLUMNS]
        panel -= matrix[..., start:, before] @ matrix[..., block, before].mT
        lower, status = torch.linalg.cholesky_ex(panel[..., :BLOCK_COLUMNS, :])
        failed |= status != 0
        panel[..., :BLOCK_COLUMNS, :] = lower
        below = panel[..., BLOCK_COLUMNS:, :]
        below.copy_(torch.linalg.solve_triangular(lower.mT, below, upper=True, left=False))
    return failed


def solve_lower_in_place(matrix: Tensor, rows: Tensor) -> Tensor:
    """Replace each row x of rows [k, n] by L^-1 x, with L in the lower triangle of matrix [n, n].

    Forward substitution, BLOCK_COLUMNS columns at a time; values above the diagonal are not read.
    """
    for start in range(0, matrix.shape[0], BLOCK_COLUMNS):
        block, before = slice(start, start + BLOCK_COLUMNS), slice(0, start)
        panel = rows[:, block]  # [k, BLOCK_COLUMNS]
        if start:
            panel -= matmul.matmul_transposed(rows[:, before], matrix[block, before])
        diagonal = matrix[block, block].tril()
        panel.copy_(torch.linalg.solve_triangular(diagonal.mT, panel, upper=True, left=False))
    return rows
