"""After rounding: every code, then every scale, goes where the error under the gram is least while all else is held.

With D = Q - W [out, in] and the gram H the error is tr(D H D^T). Moving the code of column k by c steps s adds
2 c s (D H)_k + c^2 s^2 H_kk, least at the code nearest to code - (D H)_k / (s H_kk): coordinate descent as in QuantEase
(arXiv 2309.01885, equation 12). With the codes u = codes - zero of a group held and P = (D H) on its columns, moving
the scale by t adds 2 t P u^T + t^2 u H u^T, least at t = -P u^T / (u H u^T): a second pass over the scales in closed
form. Groups are visited in turn; no step raises the error, because a scale moves, as it is stored, only where that
lowers it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.contracts import Quantized, Scheme
from quantkit.numerics import affine
from quantkit.numerics.cholesky import BLOCK_COLUMNS, compute_mean_diagonal

SWEEPS = 2
"""Visits of every group. On text that was not calibrated on (SmolLM2-135M, 4 bits) the first lowers the error by 2.2 %,
the second by 1.1 %, two more together by another 0.8 %."""


def add_damping(gram: Tensor, damping: Tensor) -> Tensor:
    """A copy of gram [..., in, in] with damping [...], a share of its mean diagonal, on its diagonal."""
    result = gram.clone()
    result.diagonal(dim1=-2, dim2=-1).add_((damping * compute_mean_diagonal(gram)).unsqueeze(-1))
    return result


def refine_codes_and_scales(
    weight: Tensor, gram: Tensor, quantized: Quantized, scheme: Scheme, sweeps: int = SWEEPS
) -> Quantized:
    """Codes and scales of weights [..., out, in] float32 after some sweeps; zero points stay.

    gram [..., in, in] float32, its diagonal positive (`damped`); one may serve a batch. The error under it never rises.
    Temporaries are three copies of the weight and two of a group of columns.
    """
    group = weight.shape[-1] // quantized.scale.shape[-1]
    # [..., out, in] -> [..., in, out]: a column is a row in memory
    delta = affine.dequantize(quantized, scheme).sub_(weight).mT.contiguous()
    codes = quantized.codes.mT.float().contiguous()
    scale = quantized.scale.mT.float().contiguous()  # [..., out, n_groups] -> [..., n_groups, out]
    zero = None if quantized.zero is None else quantized.zero.mT.float()
    for _ in range(sweeps):
        for index in range(scale.shape[-2]):
            columns = slice(index * group, (index + 1) * group)
            middle = (
                torch.full_like(scale[..., 0, :], affine.get_default_zero_point(scheme))
                if zero is None
                else zero[..., index, :]
            )
            pull = (
                gram[..., columns, :] @ delta
            )  # [..., group, in] @ [..., in, out] -> [..., group, out]
            inner, part, chosen = (
                gram[..., columns, columns],
                delta[..., columns, :],
                codes[..., columns, :],
            )
            update_codes(inner, pull, part, chosen, (scale[..., index, :], middle), scheme)
            chosen = chosen - middle.unsqueeze(-2)
            step = compute_scale_step(inner, pull, chosen, scale[..., index, :], scheme)
            part.addcmul_(chosen, step.unsqueeze(-2))
            scale[..., index, :] += step
    stored = scale.mT.contiguous().to(
        quantized.scale.dtype
    )  # exact: every step ended on a stored scale
    return Quantized(codes=codes.mT.contiguous().to(torch.uint8), scale=stored, zero=quantized.zero)


def update_codes(
    gram: Tensor,
    pull: Tensor,
    delta: Tensor,
    codes: Tensor,
    steps: tuple[Tensor, Tensor],
    scheme: Scheme,
) -> None:
    """Move the codes of one group to where the error is least, column by column; pull, delta and codes are changed.

    gram [..., group, group], the group's own; pull = (H D^T), delta and codes [..., group, out]; scale [..., out].
    LAZY columns at a time: within them a change moves on column by column, to the rest of the group in one product.
    """
    scale, _ = steps
    top = float(2**scheme.bits - 1)
    curve = gram.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * scale.unsqueeze(-2)  # [..., group, out]
    for start in range(0, codes.shape[-2], BLOCK_COLUMNS):
        here = slice(start, start + BLOCK_COLUMNS)
        seen, before, old = (
            pull[..., here, :].clone(),
            delta[..., here, :].clone(),
            codes[..., here, :].clone(),
        )
        count, changes = seen.shape[-2], torch.empty_like(seen)  # [..., LAZY, out]
        weights = gram[..., here, here].unsqueeze(-1).unbind(-3)  # LAZY times [..., LAZY, 1]
        lines = zip(
            *(x.unbind(-2) for x in (seen, curve[..., here, :], old, codes[..., here, :], changes)),
            weights,
        )
        for k, (pulled, bent, was, code, change, weight) in enumerate(lines):
            torch.sub(was, torch.div(pulled, bent, out=change), out=code).round_().clamp_(0, top)
            torch.sub(code, was, out=change).mul_(scale)
            later = seen.narrow(-2, k + 1, count - k - 1)
            later.addcmul_(weight.narrow(-2, k + 1, count - k - 1), change.unsqueeze(-2))
        delta[..., here, :] += changes
        pull += gram[..., here] @ (
            delta[..., here, :] - before
        )  # [..., group, LAZY] @ [..., LAZY, out]


def compute_scale_step(
    gram: Tensor, pull: Tensor, codes: Tensor, scale: Tensor, scheme: Scheme
) -> Tensor:
    """By how much the scale [..., out] of one group moves, 0 where no stored scale nearby lowers the error.

    gram [..., group, group]; pull and codes (zero point taken off) [..., group, out].
    """
    slope = (pull * codes).sum(dim=-2)  # [..., group, out] -> [..., out]
    curve = ((gram @ codes) * codes).sum(dim=-2)
    best = scale - torch.where(curve > 0, slope / curve, torch.zeros_like(slope))
    step = affine.round_scale(best, scheme).float() - scale
    lower = (best > 0) & (2 * step * slope + step.square() * curve < 0)
    return torch.where(lower, step, torch.zeros_like(step))
