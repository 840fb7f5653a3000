"""Muon: momentum, orthogonalized by Newton-Schulz iterations.

Keller Jordan et al. 2024, "Muon: an optimizer for the hidden layers in neural networks".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalize(gradient: Tensor) -> Tensor:
    """Return the gradient [..., out, in] with singular values near 1, float32.

    The iteration runs in bfloat16.
    """
    a, b, c = COEFFICIENTS
    x: Tensor = gradient.to(torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.transpose(-1, -2)  # [..., in, out], so that the products are small
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.transpose(-1, -2)  # [..., short, short]
        x = a * x + (b * square + c * (square @ square)) @ x
    return (x.transpose(-1, -2) if tall else x).float()


class Muon:
    """An optimizer of matrices [..., out, in]; the leading dimensions are a batch."""

    def __init__(self, matrices: Sequence[Tensor]) -> None:
        self.matrices = list(matrices)
        self.momentum = [torch.zeros_like(matrix) for matrix in self.matrices]

    @torch.no_grad()
    def step(self, rate: float, momentum: float, weight_decay: float = 0.01) -> None:
        """Take one step from the gradients of the matrices, with Nesterov momentum."""
        for matrix, average in zip(self.matrices, self.momentum):
            if matrix.grad is None:
                continue
            average.lerp_(matrix.grad, 1 - momentum)
            update = orthogonalize(matrix.grad.lerp(average, momentum))
            update *= max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
            matrix.mul_(1 - rate * weight_decay).add_(update, alpha=-rate)
