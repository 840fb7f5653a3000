"""The Gram matrix of a linear's inputs, and what it says about an error in the weights.

For a weight error D [out, in] and inputs X [n, in], ||X D^T||^2 = tr(D G D^T) with G = X^T X: one [in, in] matrix
replaces every activation in the searches for scales and ranges, and in the report.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from quantkit.numerics import matmul

BLOCK_ROWS = 256
"""Rows of a weight that are worked on at once, so that temporaries stay small beside the Gram matrix."""
MAX_EXPONENT = 40
"""Exponents of two up to which a matrix's largest weight may go before its products could leave float32's range."""
MIN_NORM, MAX_NORM = 1e-12, 1e18
"""Of a row in float32: outside, squares of its weights may be 0 or infinite."""
ENERGY_WEIGHTS = 1 << 17
"""Weights of a difference that are held at once: fresh memory costs more than the sum (storage.machine)."""


def accumulate_gram(gram: Tensor, abs_sum: Tensor, x: Tensor, weight: Tensor | None = None) -> None:
    """Add tokens x [n, in] to gram [in, in] and to abs_sum [in], both float32, in place.

    On a CPU the gram's lower triangle waits for `complete`. weight [n], if given, multiplies each token's share of the
    gram: with the square of the router's weight the error under the gram is the error in what the expert adds to the
    block's output.
    """
    abs_sum.add_(x.abs().sum(dim=0, dtype=torch.float32))  # [n, in] -> [in]
    x = transpose_to_channels(x)  # [n, in] -> [in, n]
    matmul.add_symmetric(gram, x if weight is None else x * weight.float(), x)


def accumulate_cross(cross: Tensor, x: Tensor, original: Tensor) -> None:
    """Add tokens to cross [in, in] float32, sum of (o - x) x^T, in place: x and original [n, in]."""
    x = transpose_to_channels(x)  # [n, in] -> [in, n]
    cross.add_(matmul.matmul_transposed(transpose_to_channels(original) - x, x))


def accumulate_residual(residual: Tensor, x: Tensor, gap: Tensor) -> None:
    """Add tokens to residual [out, in] float32, sum of (s - r) x^T, in place: x [n, in], gap = s - r [n, out]."""
    residual.add_(
        matmul.matmul_transposed(transpose_to_channels(gap), transpose_to_channels(x))
    )  # [out, n] @ [n, in]


def transpose_to_channels(x: Tensor) -> Tensor:
    """Tokens in float32, channel by channel: [n, in] -> [in, n]. Transposed first, which moves half the bytes."""
    return x.T.contiguous().float()


def complete_gram(gram: Tensor) -> Tensor:
    """A gram [..., in, in] to which everything was added, its lower triangle filled in; in place."""
    return matmul.mirror_upper_triangle(gram)


def rescale_gram(gram: Tensor, scale: Tensor) -> Tensor:
    """The gram of x / scale: gram [..., in, in], scale [in] or [..., in] -> [..., in, in]."""
    return (gram / scale.unsqueeze(-1)).div_(
        scale.unsqueeze(-2)
    )  # by [..., in, 1] and [..., 1, in]


def extract_diagonal_blocks(gram: Tensor, group_size: int) -> Tensor:
    """The diagonal blocks of a gram: [..., in, in] -> [..., n_groups, group, group], a copy."""
    width = gram.shape[-1]
    group = width if group_size == -1 else group_size
    tiles = gram.unflatten(-1, (width // group, group)).unflatten(
        -3, (width // group, group)
    )  # [..., b, g, b, g]
    diagonal: Tensor = tiles.diagonal(dim1=-4, dim2=-2)  # [..., b, g, b, g] -> [..., g, g, b]
    return diagonal.movedim(-1, -3).contiguous()  # -> [..., b, g, g]


def compute_error(delta: Tensor, gram: Tensor) -> Tensor:
    """tr(D G D^T), the summed squared output error of a weight error, per matrix.

    delta [..., out, in], gram [..., in, in] float32 -> [...] float64. Sums run in float64: the terms of a matrix of
    millions of weights span many magnitudes.
    """
    total = torch.zeros(delta.shape[:-2], dtype=torch.float64, device=delta.device)
    for rows in delta.split(BLOCK_ROWS, dim=-2):  # [..., out, in] -> [..., ROWS, in]
        total += matmul.compute_quadratic_forms(rows, gram).sum(dim=-1)
    return total


def compute_relative_error(weight: Tensor, approximation: Tensor, gram: Tensor) -> Tensor:
    """Share of a linear's output energy that an approximate weight loses: [...] float64, 0 for no energy and no loss.

    weight, approximation [..., out, in]; gram [..., in, in]. It is ||X (W - Q)^T||^2 / ||X W^T||^2.
    """
    _, exponent = torch.frexp(
        torch.linalg.vector_norm(weight, torch.inf, dim=(-2, -1), keepdim=True)
    )  # [..., 1, 1]
    if bool(
        (exponent.abs() > MAX_EXPONENT).any()
    ):  # a power of two changes no digit, and not the share
        scale = torch.exp2(-exponent.clamp(-126, 126).float())
        weight, approximation = weight * scale, approximation * scale
    lost, energy = compute_error(weight - approximation, gram), compute_error(weight, gram)
    return torch.where(lost == 0, lost, lost / energy)


def compute_sqnr_db(weight: Tensor, approximation: Tensor) -> Tensor:
    """Signal to quantization noise of the weights alone, 10 log10(||W||^2 / ||W - Q||^2) in dB: [...] float64.

    Infinite where nothing is lost, a matrix of zeros included.
    """
    noise = compute_energy(weight, approximation)
    return 10 * torch.log10(compute_energy(weight) / noise).masked_fill(noise == 0, torch.inf)


def compute_energy(weight: Tensor, approximation: Tensor | None = None) -> Tensor:
    """||W||^2 of weight [..., out, in], or ||W - Q||^2: [...] float64.

    A row is summed in float32, rows in float64; those whose squares leave float32's range are summed in float64, too.
    """
    rows = compute_row_norms(weight, approximation, torch.float32).double()
    beyond = ~((rows > MIN_NORM) & (rows < MAX_NORM))
    if bool(beyond.any()):
        rows = torch.where(beyond, compute_row_norms(weight, approximation, torch.float64), rows)
    return rows.square().sum(dim=-1)


def compute_row_norms(weight: Tensor, approximation: Tensor | None, dtype: torch.dtype) -> Tensor:
    """||w|| of each row of weight [..., out, in], or ||w - q||, summed in `dtype`: [..., out]."""
    count = max(1, ENERGY_WEIGHTS // max(1, weight.shape[-1]))
    pieces: Iterable[Tensor] = weight.flatten(end_dim=-2).split(
        count
    )  # [..., out, in] -> [count, in]
    if approximation is not None:
        others = approximation.flatten(end_dim=-2).split(count)
        pieces = (piece - other for piece, other in zip(pieces, others))
    norms = [torch.linalg.vector_norm(piece, dim=-1, dtype=dtype) for piece in pieces]
    return torch.cat(norms).reshape(weight.shape[:-1])  # [count] -> [..., out]
