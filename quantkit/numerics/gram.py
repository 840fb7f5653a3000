"""The Gram matrix of a linear's inputs, and the output error that it gives for a weight error.

For a weight error D [out, in] and inputs X [n, in], ||X D^T||^2 = tr(D G D^T) with G = X^T X: one
[in, in] matrix replaces every activation in the searches for scales and ranges, and in the report.

`gram` is what the GPTQ paper (arXiv 2210.17323) calls the Hessian H = 2 X X^T, up to the factor 2,
which changes no code. Equations in this folder write H or G for it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from quantkit.numerics import matmul

BLOCK_ROWS = 256
"""Rows of a weight per block, so that temporaries stay small compared with the gram."""

MAX_EXPONENT = 40
"""Largest exponent of two of a matrix's largest weight without a risk of leaving float32's range
in its products."""

MIN_NORM, MAX_NORM = 1e-12, 1e18
"""Norm of a row in float32: outside this range squares of its weights may be 0 or infinite."""

ENERGY_WEIGHTS = 1 << 17
"""Weights of a difference per block: fresh memory costs more than the sum (io.host)."""


def accumulate_gram(gram: Tensor, abs_sum: Tensor, x: Tensor, weight: Tensor | None = None) -> None:
    """Add tokens x [n, in] to gram [in, in] and to abs_sum [in], both float32, in place.

    On a CPU `complete_gram` fills the gram's lower triangle afterwards. weight [n], if given,
    multiplies each token's share of the gram: with the square of the router's weight, the error
    under the gram is the error in the expert's contribution to the block's output.
    """
    abs_sum.add_(x.abs().sum(dim=0, dtype=torch.float32))  # [n, in] -> [in]
    x = transpose_to_channels(x)  # [n, in] -> [in, n]
    matmul.add_symmetric(gram, x if weight is None else x * weight.float(), x)


def accumulate_cross(cross: Tensor, x: Tensor, original: Tensor) -> None:
    """Add tokens to cross [in, in] float32, sum of (o - x) x^T, in place: x and o [n, in]."""
    x = transpose_to_channels(x)  # [n, in] -> [in, n]
    cross.add_(matmul.matmul_transposed(transpose_to_channels(original) - x, x))


def accumulate_residual(residual: Tensor, x: Tensor, gap: Tensor) -> None:
    """Add tokens to residual [out, in] float32, sum of (s - r) x^T, in place.

    x [n, in], gap = s - r [n, out].
    """
    gap, x = transpose_to_channels(gap), transpose_to_channels(x)
    residual.add_(matmul.matmul_transposed(gap, x))  # [out, n] @ [n, in]


def transpose_to_channels(x: Tensor) -> Tensor:
    """Return tokens in float32, channel by channel: [n, in] -> [in, n].

    Transposing before the cast moves half the bytes.
    """
    return x.T.contiguous().float()


def complete_gram(gram: Tensor) -> Tensor:
    """Fill the lower triangle of a finished gram [..., in, in], in place."""
    return matmul.mirror_upper_triangle(gram)


def rescale_gram(gram: Tensor, scale: Tensor) -> Tensor:
    """Return the gram of x / scale: gram [..., in, in], scale [in] or [..., in]."""
    divided = gram / scale.unsqueeze(-1)  # by [..., in, 1]
    return divided.div_(scale.unsqueeze(-2))  # by [..., 1, in]


def extract_diagonal_blocks(gram: Tensor, group_size: int) -> Tensor:
    """Copy the diagonal blocks of a gram: [..., in, in] -> [..., n_groups, group, group]."""
    width = gram.shape[-1]
    group = width if group_size == -1 else group_size
    shape = (width // group, group)
    tiles = gram.unflatten(-1, shape).unflatten(-3, shape)  # [..., b, g, b, g]
    diagonal: Tensor = tiles.diagonal(dim1=-4, dim2=-2)  # [..., b, g, b, g] -> [..., g, g, b]
    return diagonal.movedim(-1, -3).contiguous()  # -> [..., b, g, g]


def compute_error(delta: Tensor, gram: Tensor) -> Tensor:
    """Return tr(D G D^T), the summed squared output error of a weight error, per matrix.

    delta [..., out, in], gram [..., in, in] float32 -> [...] float64. Sums run in float64: the
    terms of a matrix of millions of weights span many magnitudes.
    """
    total = torch.zeros(delta.shape[:-2], dtype=torch.float64, device=delta.device)
    for rows in delta.split(BLOCK_ROWS, dim=-2):  # [..., out, in] -> [..., BLOCK_ROWS, in]
        total += matmul.compute_quadratic_forms(rows, gram).sum(dim=-1)
    return total


def shrink_gram(gram: Tensor, shrinkage: float) -> Tensor:
    """Return G + a / (1 - a) mean(diag G) I for gram [..., in, in] and shrinkage a in [0, 1).

    Up to the factor 1 - a, which changes no code, this is shrinkage towards an isotropic input,
    (1 - a) G + a mean(diag G) I (Ledoit and Wolf 2004, eq. 4, with a fixed a): text that
    calibration did not have excites directions that G does not show. Cross statistics stay as they
    are: isotropic inputs that both models share add nothing to (o - x) x^T.
    """
    if not shrinkage:
        return gram
    diagonal = gram.diagonal(dim1=-2, dim2=-1)  # [..., in]
    added = shrinkage / (1 - shrinkage) * diagonal.mean(dim=-1, keepdim=True)  # [..., 1]
    shrunk = gram.clone()
    shrunk.diagonal(dim1=-2, dim2=-1).add_(added)
    return shrunk


def compute_row_errors(delta: Tensor, gram: Tensor) -> Tensor:
    """Return d G d^T of each row: [..., out] float64.

    delta [..., out, in], gram [..., in, in].
    """
    blocks = delta.split(BLOCK_ROWS, dim=-2)  # [..., BLOCK_ROWS, in]
    return torch.cat([matmul.compute_quadratic_forms(rows, gram) for rows in blocks], dim=-1)


def compute_relative_error(weight: Tensor, approximation: Tensor, gram: Tensor) -> Tensor:
    """Return the relative error of a linear's outputs for an approximate weight.

    weight, approximation [..., out, in]; gram [..., in, in]. Result [...] float64:
    ||X (W - Q)^T|| / ||X W^T||, the norm ratio in which errors of weights and of hidden states
    are measured too, and 0 where nothing is lost.
    """
    largest = torch.linalg.vector_norm(weight, torch.inf, dim=(-2, -1), keepdim=True)
    _, exponent = torch.frexp(largest)  # [..., 1, 1]
    if bool((exponent.abs() > MAX_EXPONENT).any()):
        # a power of two changes no digit of a weight, and not the ratio
        scale = torch.exp2(-exponent.clamp(-126, 126).float())
        weight, approximation = weight * scale, approximation * scale
    lost, energy = compute_error(weight - approximation, gram), compute_error(weight, gram)
    return torch.where(lost == 0, lost, lost / energy).sqrt()


def compute_sqnr_db(weight: Tensor, approximation: Tensor) -> Tensor:
    """Return the signal to quantization noise ratio of the weights alone, in dB: [...] float64.

    It is 10 log10(||W||^2 / ||W - Q||^2), infinite where nothing is lost, a matrix of zeros
    included.
    """
    noise = compute_energy(weight, approximation)
    return 10 * torch.log10(compute_energy(weight) / noise).masked_fill(noise == 0, torch.inf)


def compute_energy(weight: Tensor, approximation: Tensor | None = None) -> Tensor:
    """Return ||W||^2 of weight [..., out, in], or ||W - Q||^2: [...] float64.

    A row is summed in float32, rows in float64. Rows whose squares leave float32's range are
    summed in float64 too.
    """
    rows = compute_row_norms(weight, approximation, torch.float32).double()
    beyond = ~((rows > MIN_NORM) & (rows < MAX_NORM))
    if bool(beyond.any()):
        exact = compute_row_norms(weight, approximation, torch.float64)
        rows = torch.where(beyond, exact, rows)
    return rows.square().sum(dim=-1)


def compute_row_norms(weight: Tensor, approximation: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return ||w|| of each row of weight [..., out, in], or ||w - q||, summed in `dtype`.

    Result: [..., out].
    """
    count = max(1, ENERGY_WEIGHTS // max(1, weight.shape[-1]))
    rows = weight.flatten(end_dim=-2)  # [..., out, in] -> [rows, in]
    pieces: Iterable[Tensor] = rows.split(count)  # [count, in]
    if approximation is not None:
        others = approximation.flatten(end_dim=-2).split(count)
        pieces = (piece - other for piece, other in zip(pieces, others))
    norms = [torch.linalg.vector_norm(piece, dim=-1, dtype=dtype) for piece in pieces]
    return torch.cat(norms).reshape(weight.shape[:-1])  # [count] -> [..., out]
