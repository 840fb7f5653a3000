"""Weights that give the original output on inputs which earlier, already quantized blocks have changed.

With o the original model's input of a linear and x the one that stored weights make of the same token, the sum over
tokens of |W o - V x|^2 is least at V = W + W C G^-1, C = sum (o - x) x^T and G = sum x x^T: the target of asymmetric
calibration (GPTAQ, arXiv 2504.02692, equation 3) in the closed form of quantization error propagation (QEP, arXiv
2504.09629). A share of the step is taken, as QEP does: the whole of it fits the calibration text too closely.

A linear whose output is added to the residual stream makes up for what that stream lacks, too: with r the stream, s the
original one and E = sum (s - r) x^T, |W o + s - V x - r|^2 is least at V = W + (W C + E) G^-1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.numerics.rounding import LAZY, Feedback

SHARE = 0.5
"""Share of the correction that is applied (QEP's alpha)."""


def corrected(
    weight: Tensor, cross: Tensor, factor: Feedback, share: float = SHARE, residual: Tensor | None = None
) -> Tensor:
    """W + share (W C + E) G^-1: weight [..., out, in], cross [..., in, in] float32 -> [..., out, in] float32.

    residual is E [..., out, in], None for a linear that adds to no stream. `factor` is that of the
    damped gram; its damping keeps channels that the text hardly uses as they are.
    """
    lead, width = weight.shape[:-2], weight.shape[-1]
    order = factor.order.expand(*lead, width)
    wanted = weight @ cross  # [..., out, in]
    if residual is not None:
        wanted += residual
    wanted = wanted.take_along_dim(order.unsqueeze(-2), dim=-1)  # in visiting order
    own = factor.own.expand(*lead, width).take_along_dim(order, dim=-1).unsqueeze(-2)  # [..., 1, in]
    step = divided(wanted, factor.upper, own)
    return weight + share * step.take_along_dim(order.argsort(dim=-1).unsqueeze(-2), dim=-1)


def divided(rows: Tensor, upper: Tensor, own: Tensor) -> Tensor:
    """rows (U diag(own) U^T)^-1: rows [..., out, in], U [..., in, in] unit upper triangular, own [..., 1, in].

    LAZY columns at a time, in products whose sums do not depend on the number of threads.
    """
    result, starts = rows.clone(), range(0, rows.shape[-1], LAZY)
    for start in reversed(starts):  # first by U^T, lower triangular: from the last column
        here, behind = slice(start, start + LAZY), slice(start + LAZY, None)
        left = result[..., here] - result[..., behind] @ upper[..., here, behind].mT
        triangle = upper[..., here, here].mT
        result[..., here] = torch.linalg.solve_triangular(triangle, left, upper=False, left=False, unitriangular=True)
    result /= own
    for start in starts:
        here, before = slice(start, start + LAZY), slice(0, start)
        left = result[..., here] - result[..., before] @ upper[..., before, here]
        triangle = upper[..., here, here]
        result[..., here] = torch.linalg.solve_triangular(triangle, left, upper=True, left=False, unitriangular=True)
    return result
