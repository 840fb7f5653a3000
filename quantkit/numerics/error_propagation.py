"""Weights that give the original output on inputs which earlier, already quantized blocks have changed.

With o the original model's input of a linear and x the one that stored weights make of the same token, the sum over
tokens of |W o - V x|^2 is least at V = W + W C G^-1, C = sum (o - x) x^T and G = sum x x^T: the target of asymmetric
calibration (GPTAQ, arXiv 2504.02692, equation 3) in the closed form of quantization error propagation (QEP, arXiv
2504.09629). A share of the step is taken, as QEP does: the whole of it fits the calibration text too closely.

A linear whose output is added to the residual stream makes up for what that stream lacks, too: with r the stream, s the
original one and E = sum (s - r) x^T, |W o + s - V x - r|^2 is least at V = W + (W C + E) G^-1. Attention and MLP of a
block each make up for a share, not knowing of the other's. Tokens with massive activations are left out of E.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.numerics.cholesky import BLOCK_COLUMNS, GptqFactor

ALPHA = 0.5
"""Share of the correction for changed inputs that is applied (QEP's alpha)."""
RESIDUAL_ALPHA = 0.35
"""Share of what the residual stream lacks that one linear makes up for. SmolLM2-135M, 4 bits: mean KL .0564 with 0.25,
.0555 with 0.35, .0559 with 0.5; with 0.6, which two of a block make 1.2, massive activations overshot: .087."""
MASSIVE_NORM_RATIO = 10.0
"""How many times the typical norm a token's state may have for a linear to make up for what it lacks."""


def compute_residual_gap(original: Tensor, stream: Tensor) -> Tensor:
    """What the residual stream lacks of the original one, s - r [tokens, hidden]; 0 for tokens of massive activations.

    Those (Sun et al., arXiv 2402.17762) have hundreds of times the norm of others, one or two of a sequence. The next
    norm divides by it, so what they lack matters no more than other tokens' shares; in a sum over tokens it is all.
    """
    norm: Tensor = torch.linalg.vector_norm(stream.float(), dim=-1, keepdim=True)  # [tokens, 1]
    return (original - stream) * (norm <= MASSIVE_NORM_RATIO * norm.median())


def correct_weight(
    weight: Tensor,
    cross: Tensor,
    factor: GptqFactor,
    residual: Tensor | None = None,
    shares: tuple[float, float] = (ALPHA, RESIDUAL_ALPHA),
) -> Tensor:
    """W + (share W C + stream_share E) G^-1: weight [..., out, in], cross [..., in, in] float32 -> [..., out, in].

    residual is E [..., out, in], None for a linear that adds to no stream. `factor` is that of the damped
    gram; its damping keeps channels that the text hardly uses as they are.
    """
    lead, width = weight.shape[:-2], weight.shape[-1]
    order = factor.order.expand(*lead, width)
    wanted = (weight @ cross).mul_(shares[0])  # [..., out, in]
    if residual is not None:
        wanted.add_(residual, alpha=shares[1])
    wanted = wanted.take_along_dim(order.unsqueeze(-2), dim=-1)  # in visiting order
    own = (
        factor.own.expand(*lead, width).take_along_dim(order, dim=-1).unsqueeze(-2)
    )  # [..., 1, in]
    step = solve_factored(wanted, factor.upper, own)
    return weight + step.take_along_dim(order.argsort(dim=-1).unsqueeze(-2), dim=-1)


def solve_factored(rows: Tensor, upper: Tensor, own: Tensor) -> Tensor:
    """rows (U diag(own) U^T)^-1: rows [..., out, in], U [..., in, in] unit upper triangular, own [..., 1, in].

    LAZY columns at a time, in products whose sums do not depend on the number of threads.
    """
    result, starts = rows.clone(), range(0, rows.shape[-1], BLOCK_COLUMNS)
    for start in reversed(starts):  # first by U^T, lower triangular: from the last column
        here, behind = slice(start, start + BLOCK_COLUMNS), slice(start + BLOCK_COLUMNS, None)
        left = result[..., here] - result[..., behind] @ upper[..., here, behind].mT
        triangle = upper[..., here, here].mT
        result[..., here] = torch.linalg.solve_triangular(
            triangle, left, upper=False, left=False, unitriangular=True
        )
    result /= own
    for start in starts:
        here, before = slice(start, start + BLOCK_COLUMNS), slice(0, start)
        left = result[..., here] - result[..., before] @ upper[..., before, here]
        triangle = upper[..., here, here]
        result[..., here] = torch.linalg.solve_triangular(
            triangle, left, upper=True, left=False, unitriangular=True
        )
    return result
