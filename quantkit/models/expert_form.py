"""How transformers holds the experts of a layer: flags of its module, or its shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

BIAS = "_bias"
"""Ending of a parameter with the biases of all experts, after the name of their matrices."""
GLU = {"w1": "gate", "v1": "up", "w2": "down"}
"""Parameters [experts * intermediate, hidden] of a child of DBRX's experts."""


@dataclass(frozen=True, kw_only=True)
class ExpertParameter:
    """A parameter with the matrices or biases of all experts.

    Of each expert it has [n * out, in], of biases [n * out]: the rows of its n `projections`
    ("gate", "up", "down") follow one another, or alternate if `interleaved`. transposed: matrices
    are [in, n * out]. flat: experts follow one another along the first dimension; otherwise they
    have a dimension of their own in front.
    """

    name: str  # in the module: "gate_up_proj", "mlp.w1"
    projections: tuple[str, ...]
    transposed: bool = False
    interleaved: bool = False
    flat: bool = False
    kind: Literal["weight", "bias"] = "weight"

    def split(self, tensor: Tensor, count: int) -> dict[str, Tensor]:
        """Return each projection of all experts: [experts, out, in], of biases [experts, out]."""
        x = tensor.unflatten(0, (count, -1)) if self.flat else tensor
        x = x.mT if self.transposed else x  # [experts, n * out, ...]
        n = len(self.projections)
        pieces = [x[:, i::n] for i in range(n)] if self.interleaved else x.chunk(n, dim=1)
        return dict(zip(self.projections, pieces, strict=True))

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """Return the parameter of its projections, each [experts, out, in] or [experts, out]."""
        parts = list(pieces)
        x = torch.stack(parts, 2).flatten(1, 2) if self.interleaved else torch.cat(parts, 1)
        x = x.mT.contiguous() if self.transposed else x
        return x.flatten(0, 1) if self.flat else x


@dataclass(frozen=True, kw_only=True)
class ExpertForm:
    """Sizes of an experts module, and its parameters in their order."""

    count: int
    hidden: int
    intermediate: int
    parameters: tuple[ExpertParameter, ...]

    @property
    def has_gate(self) -> bool:
        """Whether gate and up are multiplied."""
        return any("gate" in x.projections for x in self.parameters)

    @property
    def has_bias(self) -> bool:
        """Whether each projection has a bias."""
        return any(x.kind == "bias" for x in self.parameters)

    def split(
        self, values: Mapping[str, Tensor], kind: Literal["weight", "bias"]
    ) -> dict[str, Tensor]:
        """Return the matrices or biases of all experts by projection.

        values: parameters by their names in the module.
        """
        pieces: dict[str, Tensor] = {}
        for parameter in self.parameters:
            if parameter.kind == kind:
                pieces |= parameter.split(values[parameter.name], self.count)
        return {x: pieces[x] for x in ("gate", "up", "down") if x in pieces}


def is_experts_module(module: nn.Module) -> bool:
    """Return whether a module holds the experts of a layer: its parameters have an expert each."""
    shapes = [x.shape for x in module._parameters.values() if x is not None]
    is_stacked = len(shapes) > 1 and all(len(x) >= 2 and x[0] == shapes[0][0] for x in shapes)
    return (is_stacked and any(len(x) == 3 for x in shapes)) or read_flat_form(module) is not None


def read_form(module: Any) -> ExpertForm | None:
    """Return the form of an experts module; None for one that no reader here knows.

    A class without transformers' flags has gate, then up, or up alone, as its shapes show; whether
    it runs so is checked on a small instance.
    """
    if flat := read_flat_form(module):
        return flat
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
    members = {first: ("gate", "up") if has_gate else ("up",), "down_proj": ("down",)}
    members |= {f"{name}{BIAS}": projections for name, projections in members.items()}
    count, *sizes = down.shape
    hidden, intermediate = reversed(sizes) if transposed else sizes
    return ExpertForm(
        count=count,
        hidden=hidden,
        intermediate=intermediate,
        parameters=tuple(
            ExpertParameter(
                name=name,
                projections=members[name],
                transposed=transposed and name in matrices,
                interleaved=interleaved and len(members[name]) > 1,
                kind="weight" if name in matrices else "bias",
            )
            for name in module._parameters
        ),
    )


def read_flat_form(module: Any) -> ExpertForm | None:
    """Return the form of experts in matrices [experts * intermediate, hidden], as DBRX has them."""
    count = getattr(module, "num_experts", None)
    children = [name for name, x in module.named_children() if set(x._parameters) == {*GLU}]
    if module._parameters or len(children) != 1 or not isinstance(count, int):
        return None
    tensors = module.get_submodule(children[0])._parameters
    rows, hidden = tensors["w1"].shape
    if any(x.shape != (rows, hidden) for x in tensors.values()) or rows % count:
        return None
    return ExpertForm(
        count=count,
        hidden=hidden,
        intermediate=rows // count,
        parameters=tuple(
            ExpertParameter(
                name=f"{children[0]}.{name}",
                projections=(projection,),
                transposed=projection == "down",
                flat=True,
            )
            for name, projection in GLU.items()
        ),
    )
