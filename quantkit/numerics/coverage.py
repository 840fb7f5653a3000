"""Coverage: the share of a token's activation energy that calibration did not span.

For the gram G = X^T X of the calibration tokens at an input, D = diag(G), and a token x, with
d = DAMPING,

    u(x) = d x^T (G + d D)^-1 x / x^T D^-1 x = d ||L^-1 x||^2 / ||D^-1/2 x||^2,   L L^T = G + d D

lies in 0 .. 1. Energy is measured in units of each channel's energy in calibration: massive
activations of a few channels do not hide the others, and the share does not depend on the scale of
channels. With C = D^-1/2 G D^-1/2, whose eigenvalues are 1 on average, a direction of eigenvalue m
has u = d / (m + d), near 0 where calibration excites it and 1 where it does not: one minus the
ridge leverage. The effective rank of the gram counts directions by the same measure,

    r = tr(C (C + d I)^-1) = n - d ||L^-1 D^1/2||_F^2

the degrees of freedom of ridge regression on X (Hastie, Tibshirani and Friedman 2009, equation
3.50). The factor L serves both. The exponential of the spectrum's entropy (Roy and Vetterli 2007)
needs an eigendecomposition.

L is written over the lower triangle of the gram, which only repeats the upper one, so no second
matrix is allocated. `restore_gram` gives the gram back, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

import torch
from torch import Tensor

from quantkit.numerics.cholesky import (
    BLOCK_COLUMNS,
    compute_mean_diagonal,
    factorize_lower_triangle,
    solve_lower_in_place,
)
from quantkit.numerics.gram import complete_gram
from quantkit.numerics.matmul import TILE

DAMPING = 0.1
"""d: a direction with a tenth of the average energy counts half."""

LEAST_ENERGY = 1e-8
"""Energy of a channel that calibration never excites, as a share of the mean diagonal."""

SAVED_COLUMNS = lcm(BLOCK_COLUMNS, TILE)
"""Columns of a diagonal block that is copied. Factorizing changes the upper triangle of blocks of
BLOCK_COLUMNS, and the two triangles of a tile of TILE columns may differ in the last digit.
"""


@dataclass(frozen=True, kw_only=True)
class CoverageFactor:
    """A gram [n, n] whose lower triangle holds the factor L until `restore_gram`.

    `blocks` are copies of the gram's diagonal blocks [m, m], m = SAVED_COLUMNS but for the last;
    energy [n] float32 is the diagonal D.
    """

    gram: Tensor
    blocks: tuple[Tensor, ...]
    energy: Tensor


def factorize_coverage(gram: Tensor) -> CoverageFactor | None:
    """Write the factor of gram [n, n] float32, both triangles filled, over its lower triangle.

    Returns None, and the gram as it was, if the gram is not finite or has no factor.
    """
    if not bool(torch.isfinite(gram.sum(dim=-1)).all()):
        return None
    least = LEAST_ENERGY * compute_mean_diagonal(gram)  # [n, n] -> []
    energy = torch.maximum(gram.diagonal(), least)  # [n, n] -> [n]
    blocks = tuple(block.clone() for block in list_diagonal_blocks(gram))
    factor = CoverageFactor(gram=gram, blocks=blocks, energy=energy)
    gram.diagonal().add_(DAMPING * energy)
    if bool(factorize_lower_triangle(gram)):
        restore_gram(factor)
        return None
    return factor


def list_diagonal_blocks(gram: Tensor) -> list[Tensor]:
    """Return views of the diagonal blocks of gram [n, n]: [m, m], m = SAVED_COLUMNS but for the
    last.
    """
    return [
        gram[start : start + SAVED_COLUMNS, start : start + SAVED_COLUMNS]
        for start in range(0, len(gram), SAVED_COLUMNS)
    ]


def restore_gram(factor: CoverageFactor) -> None:
    """Put the gram back in the place of its factor."""
    for block, saved in zip(list_diagonal_blocks(factor.gram), factor.blocks, strict=True):
        block.copy_(saved)
    complete_gram(factor.gram)


def compute_unspanned_shares(factor: CoverageFactor, tokens: Tensor) -> Tensor:
    """Return u(x) of each token: tokens [k, n], any dtype -> [k] float64 in 0 .. 1.

    A token of zeros has no energy, and the share 0.
    """
    rows = tokens.to(torch.float32, copy=True)
    energy = sum_squares(rows * factor.energy.rsqrt())  # [k, n] -> [k]
    outside = DAMPING * sum_squares(solve_lower_in_place(factor.gram, rows))  # [k, n] -> [k]
    return torch.where(energy > 0, outside / energy, 0.0).clamp(max=1.0)


def compute_effective_rank(factor: CoverageFactor) -> float:
    """Return r, the number of directions that calibration excites: 0 .. n.

    BLOCK_COLUMNS columns of D^1/2 at a time: above them, their solution is zero.
    """
    gram, roots, total = factor.gram, factor.energy.sqrt(), 0.0
    for start in range(0, len(gram), BLOCK_COLUMNS):
        rest = gram[start:, start:]  # [n - start, n - start]
        width = min(BLOCK_COLUMNS, len(rest))
        rows = torch.zeros(width, len(rest), device=gram.device)
        rows.diagonal().copy_(roots[start : start + width])
        total += float(sum_squares(solve_lower_in_place(rest, rows)).sum())
    return max(0.0, len(gram) - DAMPING * total)


def sum_squares(rows: Tensor) -> Tensor:
    """Return the squared norm of each row: [k, n] float32 -> [k] float64."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)
    return norms.square()
