"""Matrix products in float32, exact to rounding, at the speed of the device's fastest library.

On a CPU oneDNN computes them: with AVX-512 on AMD at twice the speed of MKL, which torch uses for
plain matrices (245 instead of 115 GFLOP/s on one core). Its sums do not depend on the number of
threads (tests/numerics/test_matmul.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

TILE = 192
"""Rows of a symmetric product per block; tiles below the diagonal are left out."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b: x [..., in], weight [out, in], bias [out], any dtype -> [..., out]."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not x.numel():
        return functional.linear(x, weight, bias)
    out = matmul_transposed(x.reshape(-1, x.shape[-1]), weight)  # [tokens, out]
    out = out.reshape(*x.shape[:-1], -1)
    return out if bias is None else out.add_(bias)


def matmul_transposed(left: Tensor, right: Tensor) -> Tensor:
    """Return left right^T: left [..., m, k], right [..., n, k], float32 -> [..., m, n].

    Leading dimensions broadcast.
    """
    if left.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return left @ right.mT
    if left.dim() == 2 and right.dim() == 2:
        product: Tensor = functional.linear(left.to_mkldnn(), right).to_dense()
        return product
    if right.dim() == 2:  # one matrix for all: one product
        flat = matmul_transposed(left.flatten(0, -2), right)  # [.. * m, n]
        return flat.view(*left.shape[:-1], right.shape[0])
    lead = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    lefts = left.expand(*lead, *left.shape[-2:]).reshape(-1, *left.shape[-2:])
    rights = right.expand(*lead, *right.shape[-2:]).reshape(-1, *right.shape[-2:])
    products = [matmul_transposed(a, b) for a, b in zip(lefts, rights, strict=True)]
    return torch.stack(products).reshape(*lead, left.shape[-2], right.shape[-2])


def add_symmetric(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Add x y^T, which must be symmetric, to total [n, n] in place: x, y [n, k] float32.

    On a CPU only the tiles on and above the diagonal are added; `mirror_upper_triangle` completes
    the finished sum.
    """
    if total.device.type != "cpu":
        total.addmm_(x, y.mT)
        return
    for start in range(0, total.shape[0], TILE):
        tile = slice(start, start + TILE)
        total[tile, start:].add_(
            matmul_transposed(x[tile], y[start:])
        )  # [TILE, k] @ [k, n - start]


def compute_quadratic_forms(x: Tensor, symmetric: Tensor) -> Tensor:
    """Return x S x^T of each row: x [..., n, k], S [..., k, k] symmetric -> [..., n] float64."""
    return matmul_transposed(x, symmetric).mul_(x).sum(dim=-1, dtype=torch.float64)


def mirror_upper_triangle(total: Tensor) -> Tensor:
    """Copy the part above the diagonal of total [..., n, n] below it, in place."""
    for start in range(0, total.shape[-1], TILE):
        tile, later = slice(start, start + TILE), slice(start + TILE, None)
        total[..., later, tile] = total[..., tile, later].mT
    return total
