"""Modules of transformers' model on the meta device, made ready to run: linears and buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization

from quantkit.errors import CheckpointError
from quantkit.numerics import matmul

MAX_BUFFER_BYTES = 1 << 30
"""Largest buffers that a configuration may ask for: rotary tables have kilobytes."""


class MatmulLinear(nn.Module):
    """A linear layer on `numerics.matmul`: in float32 on a CPU up to twice as fast as torch."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = freeze(weight)
        self.bias = None if bias is None else freeze(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b: [..., in] -> [..., out]."""
        return matmul.linear(x, self.weight, self.bias)


def freeze(tensor: Tensor) -> nn.Parameter:
    """Return a parameter without gradient."""
    return nn.Parameter(tensor, requires_grad=False)


def fill_computed_buffers(model: Any, device: torch.device) -> None:
    """Compute on `device` the buffers of a meta model that no checkpoint stores, such as inv_freq.

    `_init_weights` computes them, as in transformers' own loading: that of the module itself or of
    a module around it. Raises CheckpointError for a buffer that none computes, and for too many.
    """
    owners = [
        (path, name)
        for path, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set and buffer.is_meta
    ]
    buffers = [getattr(model.get_submodule(path), name) for path, name in owners]
    if (size := sum(buffer.nbytes for buffer in buffers)) > MAX_BUFFER_BYTES:
        raise CheckpointError(
            f"expected at most {MAX_BUFFER_BYTES:,} bytes of computed buffers, found {size:,}; "
            "repair the sizes"
        )
    for path, name in owners:
        module = model.get_submodule(path)
        setattr(module, name, make_unset(getattr(module, name), device))
    around = dict.fromkeys(prefix for path, _ in owners for prefix in list_prefixes(path))
    with torch.no_grad(), initialization.guard_torch_init_functions():
        for path in sorted(around, key=len, reverse=True):  # inner modules first
            get_owner(model, path)._init_weights(model.get_submodule(path))
    for path, name in owners:
        if is_unset(getattr(model.get_submodule(path), name)):
            raise CheckpointError(f"transformers does not compute the buffer {path}.{name}")


def get_owner(model: Any, path: str) -> Any:
    """Return the innermost model of transformers around a module, whose class initializes it."""
    modules = (model.get_submodule(prefix) for prefix in reversed(list_prefixes(path)))
    return next((x for x in modules if isinstance(x, PreTrainedModel)), model.base_model)


def list_prefixes(path: str) -> list[str]:
    """Return the paths of a module and of all modules around it; the model itself is ""."""
    parts = path.split(".") if path else []
    return [".".join(parts[:n]) for n in range(len(parts) + 1)]


def make_unset(buffer: Tensor, device: torch.device) -> Tensor:
    """Return a buffer of NaN, which `is_unset` recognizes; zeros for integers."""
    value = torch.nan if buffer.is_floating_point() else 0
    return torch.full_like(buffer, value, device=device)


def is_unset(buffer: Tensor) -> bool:
    """Return whether a buffer still holds NaN."""
    return buffer.is_floating_point() and bool(buffer.isnan().any())
