"""Matrix products in float32, exact to rounding, as fast as the device gives them.

On a CPU oneDNN computes them: with AVX-512 on AMD at twice the speed of MKL, which torch takes for plain matrices (245
for 115 GFLOP/s on one core). Its sums do not depend on the number of threads (tests/test_numerics_products.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

TILE = 192
"""Rows of a symmetric product that are computed at once: what lies below the diagonal is left out tile by tile."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, what a linear layer computes: x [..., in], weight [out, in], bias [out], any dtype -> [..., out]."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not x.numel():
        return functional.linear(x, weight, bias)
    out = matmul_transposed(x.reshape(-1, x.shape[-1]), weight).reshape(
        *x.shape[:-1], -1
    )  # by [tokens, in]
    return out if bias is None else out.add_(bias)


def matmul_transposed(left: Tensor, right: Tensor) -> Tensor:
    """left [..., m, k] times the transpose of right [..., n, k], float32 -> [..., m, n]; leading dims broadcast."""
    if left.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return left @ right.mT
    if left.dim() == 2 and right.dim() == 2:
        product: Tensor = functional.linear(left.to_mkldnn(), right).to_dense()
        return product
    if right.dim() == 2:  # one matrix for all: one product
        return matmul_transposed(left.flatten(0, -2), right).view(
            *left.shape[:-1], right.shape[0]
        )  # by [.. * m, k]
    lead = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    lefts = left.expand(*lead, *left.shape[-2:]).reshape(-1, *left.shape[-2:])
    rights = right.expand(*lead, *right.shape[-2:]).reshape(-1, *right.shape[-2:])
    products = [matmul_transposed(one, other) for one, other in zip(lefts, rights, strict=True)]
    return torch.stack(products).reshape(*lead, left.shape[-2], right.shape[-2])


def add_symmetric(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Add x y^T, known to be symmetric, to total [n, n] in place: x, y [n, k] float32.

    On a CPU only the tiles on and above the diagonal are added; `mirror` completes the sum once it is done.
    """
    if total.device.type != "cpu":
        total.addmm_(x, y.mT)
        return
    for start in range(0, total.shape[0], TILE):
        here = slice(start, start + TILE)
        total[here, start:].add_(
            matmul_transposed(x[here], y[start:])
        )  # [TILE, k] @ [k, n - start]


def compute_quadratic_forms(x: Tensor, symmetric: Tensor) -> Tensor:
    """x S x^T of each row: x [..., n, k], S [..., k, k] symmetric, float32 -> [..., n] float64."""
    return matmul_transposed(x, symmetric).mul_(x).sum(dim=-1, dtype=torch.float64)


def mirror_upper_triangle(total: Tensor) -> Tensor:
    """Copy what lies above the diagonal of total [..., n, n] below it, in place."""
    for start in range(0, total.shape[-1], TILE):
        here, later = slice(start, start + TILE), slice(start + TILE, None)
        total[..., later, here] = total[..., here, later].mT
    return total
