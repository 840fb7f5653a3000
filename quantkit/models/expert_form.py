"""How transformers holds the experts of a layer: flags of its module, or its shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

BIAS = "_bias"
"""Ending of a parameter with the biases of all experts, after the name of their matrices."""


@dataclass(frozen=True, kw_only=True)
class ExpertForm:
    """Form of the tensors of an experts module.

    has_gate: gate and up are one tensor; transposed: matrices are [in, out]; interleaved: rows of
    gate and up alternate; has_bias: each matrix has a bias [experts, out].
    """

    has_gate: bool
    transposed: bool
    interleaved: bool
    has_bias: bool = False


def is_experts_module(module: nn.Module) -> bool:
    """Return whether a module holds the experts of a layer: its parameters have an expert each."""
    shapes = [x.shape for x in module._parameters.values() if x is not None]
    is_stacked = len(shapes) > 1 and all(len(x) >= 2 and x[0] == shapes[0][0] for x in shapes)
    return is_stacked and any(len(x) == 3 for x in shapes)


def read_form(module: Any) -> ExpertForm | None:
    """Return the form of an experts module; None for one that no reader here knows.

    A class without transformers' flags has gate, then up, or up alone, according to its shapes; a
    small instance is run to check that.
    """
    has_gate = bool(getattr(module, "has_gate", "gate_up_proj" in module._parameters))
    first = "gate_up_proj" if has_gate else "up_proj"
    matrices = {first, "down_proj"}
    biases = {f"{name}{BIAS}" for name in matrices}
    if set(module._parameters) not in (matrices, matrices | biases):
        return None
    into, down = module._parameters[first], module._parameters["down_proj"]
    if into.dim() != 3 or down.dim() != 3:
        return None
    factor = 2 if has_gate else 1
    is_plain = into.shape[1] == factor * down.shape[2] and into.shape[2] == down.shape[1]
    is_transposed = into.shape[2] == factor * down.shape[1] and into.shape[1] == down.shape[2]
    transposed = getattr(module, "is_transposed", is_transposed and not is_plain)
    if not (is_transposed if transposed else is_plain):
        return None
    interleaved = not getattr(module, "is_concatenated", True)
    return ExpertForm(
        has_gate=has_gate,
        transposed=transposed,
        interleaved=interleaved,
        has_bias=biases <= set(module._parameters),
    )
