"""Routed experts with a hand-written gradient: one matrix product per expert, on its own rows.

Autograd over indexing would copy every expert's weights and activations several times, which is
most of a training step on one CPU core. A test compares forward and gradients with the formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROW_MULTIPLE = 128
"""Rows of an expert are padded to a multiple of this: oneDNN compiles a kernel for each shape."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dispatch:
    """The token of each row, with rows sorted by expert and padded."""

    tokens: Tensor  # [rows] token of each row; padding repeats token 0
    slots: Tensor  # [tokens * top_k] row of each choice
    segments: tuple[tuple[int, int], ...]  # rows of each expert, as first and end


def make_dispatch(chosen: Tensor, n_experts: int) -> Dispatch:
    """Sort the choices [tokens, top_k] by expert."""
    flat = chosen.reshape(-1)  # [tokens * top_k]
    order = flat.argsort(stable=True)  # choices, sorted by expert
    counts = torch.bincount(flat, minlength=n_experts)  # [experts]
    padded = (counts + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE  # [experts]
    first = padded.cumsum(0) - padded  # first row of each expert
    shift = first - (counts.cumsum(0) - counts)  # offset by padding of each expert's rows
    rows = torch.arange(len(flat)) + shift[flat[order]]  # [tokens * top_k] row per sorted choice
    slots = torch.empty_like(order)
    slots[order] = rows
    n_rows = int(padded.sum())
    tokens = torch.zeros(n_rows, dtype=torch.long)
    tokens[rows] = order // chosen.shape[1]
    ends = (first + padded).tolist()
    return Dispatch(tokens=tokens, slots=slots, segments=tuple(zip(first.tolist(), ends)))


class RoutedExperts(torch.autograd.Function):
    """y = sum over the chosen experts of w * down(silu(gate x) * up x).

    x [tokens, hidden]; w [tokens, top_k] float32; chosen [tokens, top_k] int64; gate_up [experts,
    2 * inner, hidden]; down [experts, hidden, inner]; x and both matrices in the dtype of the
    computation. Returns [tokens, hidden].
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        plan = make_dispatch(chosen, len(gate_up))
        inner = down.shape[-1]
        xs = x.index_select(0, plan.tokens)  # [rows, hidden]
        projected = xs.new_empty(len(xs), 2 * inner)  # [rows, 2 * inner]
        out = torch.empty_like(xs)  # [rows, hidden]
        for expert, (first, end) in enumerate(plan.segments):
            torch.mm(xs[first:end], gate_up[expert].t(), out=projected[first:end])
        active = F.silu(projected[:, :inner]) * projected[:, inner:]  # [rows, inner]
        for expert, (first, end) in enumerate(plan.segments):
            torch.mm(active[first:end], down[expert].t(), out=out[first:end])
        # [tokens, top_k, hidden]
        per_choice = out.index_select(0, plan.slots).view(*chosen.shape, -1)
        ctx.save_for_backward(w, xs, projected, active, per_choice, gate_up, down)
        ctx.plan = plan
        return (per_choice * w[..., None].to(x.dtype)).sum(1)  # [tokens, hidden]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, Tensor, Tensor]:
        (gradient,) = gradients  # [tokens, hidden]
        w, xs, projected, active, per_choice, gate_up, down = ctx.saved_tensors
        plan: Dispatch = ctx.plan
        inner = down.shape[-1]
        w_gradient = (per_choice @ gradient.unsqueeze(-1)).squeeze(-1).float()  # [tokens, top_k]
        row_weight = w.new_zeros(len(xs))  # [rows], zero for padding, which then adds nothing
        row_weight[plan.slots] = w.reshape(-1)
        # [rows, hidden]
        out = gradient.index_select(0, plan.tokens) * row_weight[:, None].to(xs.dtype)
        active_gradient = torch.empty_like(active)
        down_gradient, gate_up_gradient = torch.zeros_like(down), torch.zeros_like(gate_up)
        for expert, (first, end) in enumerate(plan.segments):
            torch.mm(out[first:end], down[expert], out=active_gradient[first:end])
            torch.mm(out[first:end].t(), active[first:end], out=down_gradient[expert])
        gate, up = projected[:, :inner], projected[:, inner:]
        silu, sigmoid = F.silu(gate), torch.sigmoid(gate)
        through = torch.cat(  # [rows, 2 * inner]
            [active_gradient * up * (sigmoid + silu * (1 - sigmoid)), active_gradient * silu], dim=1
        )
        xs_gradient = torch.empty_like(xs)
        for expert, (first, end) in enumerate(plan.segments):
            torch.mm(through[first:end], gate_up[expert], out=xs_gradient[first:end])
            torch.mm(through[first:end].t(), xs[first:end], out=gate_up_gradient[expert])
        x_gradient = (
            xs_gradient.index_select(0, plan.slots).view(*w.shape, -1).sum(1)
        )  # [tokens, hidden]
        return x_gradient, w_gradient, None, gate_up_gradient, down_gradient
