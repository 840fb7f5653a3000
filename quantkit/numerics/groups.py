"""Dequantization of codes by groups of columns: the scale and zero point of a group are shared."""

from __future__ import annotations

from torch import Tensor


def multiply_groups(values: Tensor, scale: Tensor) -> Tensor:
    """Multiply values [..., n] in place by scales [..., n_groups], one per n / n_groups columns."""
    groups = values.unflatten(-1, (scale.shape[-1], -1))  # [..., n] -> [..., n_groups, group]
    groups *= scale.unsqueeze(-1)
    return values


def dequantize_groups(
    codes: Tensor, scale: Tensor, zero: Tensor | int, index: Tensor | None = None
) -> Tensor:
    """Return (codes - zero) * scale as float32 [out, in].

    codes [out, in] of any integer dtype; scale, zero [out, n_groups]; a zero point that all groups
    share may be one number. index [in]: the group of each column, by default in order.
    """
    values, scale = codes.float(), scale.float()
    zero = zero.float() if isinstance(zero, Tensor) else zero
    if index is not None:
        scale = scale[:, index]  # [out, n_groups] -> [out, in]
        zero = zero[:, index] if isinstance(zero, Tensor) else zero
    groups = values.unflatten(-1, (scale.shape[-1], -1))  # [out, in] -> [out, n_groups, group]
    groups -= zero.unsqueeze(-1) if isinstance(zero, Tensor) else zero
    return multiply_groups(values, scale)
