"""Damped Cholesky factorization of Gram matrices, the factor that GPTQ and error propagation solve with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import NumericsError

DAMPING = 0.01
"""Share of the gram's mean diagonal that is added to its diagonal: GPTQ's own."""


DAMPING_GROWTH = 10.0
"""What the damping is multiplied with after each factorization that fails."""


MAX_DAMPING = 1e4
"""A gram that needs more is no sum of x x^T."""


BLOCK_COLUMNS = 128
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


def factorize_gram(gram: Tensor) -> GptqFactor:
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
    unit = compute_mean_diagonal(gram)
    # reversed: Cholesky gives a lower factor, and what is lower in the reversed order is upper in this one
    lower, damping = factorize_damped(gram, order.flip(-1), unit)
    upper = lower.flip((-2, -1))
    roots = upper.diagonal(dim1=-2, dim2=-1).clone()  # [..., in]
    upper.div_(roots.unsqueeze(-2))  # column by column
    own = torch.empty_like(roots).scatter_(-1, order, roots.square())
    return GptqFactor(upper=upper, order=order, own=own, damping=damping)


def compute_mean_diagonal(gram: Tensor) -> Tensor:
    """What damping is a share of: the mean diagonal of gram [..., in, in], 1 where that is 0; [...] float32."""
    mean = gram.diagonal(dim1=-2, dim2=-1).double().mean(dim=-1).float()  # [..., in, in] -> [...]
    return torch.where(mean > 0, mean, torch.ones_like(mean))


def permute_gram(gram: Tensor, order: Tensor) -> Tensor:
    """A gram [..., in, in] with rows and columns in another order [..., in], a copy."""
    width = gram.shape[-1]
    pairs = zip(gram.reshape(-1, width, width), order.reshape(-1, width), strict=True)
    # one by one: gathering a batch would need its indices in full, twice the size of the gram
    return torch.stack([one.index_select(0, i).index_select(1, i) for one, i in pairs]).reshape(
        gram.shape
    )


def factorize_damped(gram: Tensor, order: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factor of a gram [..., in, in] in another order [..., in], with damping * unit [...] on its diagonal.

    The damping starts at DAMPING and grows by GROWTH, for the matrices that need it alone. Result: lower [..., in, in]
    and damping [...].
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
                f"a Gram matrix is far from positive semi-definite: {MAX_DAMPING:g} times its mean diagonal was added "
                "and it still has no Cholesky factor; check the calibration of this block, or use rounding nearest"
            )
        damping = torch.where(failed, damping * DAMPING_GROWTH, damping)


def cholesky_in_place(matrix: Tensor) -> Tensor:
    """Replace symmetric matrices [..., n, n] by their lower Cholesky factor; [...] bool, true where there is none.

    LAZY columns at a time, each in products whose sums do not depend on the number of threads, which LAPACK's
    factorization of a whole matrix does not promise. It takes no second matrix, either.
    """
    failed = torch.zeros(matrix.shape[:-2], dtype=torch.bool, device=matrix.device)
    for start in range(0, matrix.shape[-1], BLOCK_COLUMNS):
        here, before = slice(start, start + BLOCK_COLUMNS), slice(0, start)
        panel = matrix[..., start:, here]  # [..., n - start, LAZY]
        panel -= matrix[..., start:, before] @ matrix[..., here, before].mT
        lower, status = torch.linalg.cholesky_ex(panel[..., :BLOCK_COLUMNS, :])
        failed |= status != 0
        panel[..., :BLOCK_COLUMNS, :] = lower
        below = panel[..., BLOCK_COLUMNS:, :]
        below.copy_(torch.linalg.solve_triangular(lower.mT, below, upper=True, left=False))
    matrix.tril_()
    return failed
