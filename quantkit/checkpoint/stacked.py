"""Experts that a checkpoint stores together: one tensor holds a matrix of every expert.

A layout says which tensors do (`contracts.StackedTensor`). Their matrices become logical tensors
with names of their own, which are read one expert at a time. No torch is imported here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit.contracts import Block, StackedTensor, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ExpertPart:
    """Where the matrix or bias of one projection of one expert lies.

    number: that of the projection; shape: [out, in], of a bias [out].
    """

    stacked: StackedTensor
    expert: int
    number: int
    shape: tuple[int, ...]

    @property
    def rows(self) -> tuple[int, int]:
        """First row of the expert in the stored tensor, and the one after its last."""
        if not self.stacked.flat:
            return self.expert, self.expert + 1
        out = self.shape[0]
        size = self.shape[1] if self.is_transposed else out * len(self.stacked.projections)
        return self.expert * size, (self.expert + 1) * size

    @property
    def is_transposed(self) -> bool:
        """Whether it is a matrix stored as [in, out]."""
        return self.stacked.transposed and self.stacked.kind == "weight"

    def take(self, rows: Tensor) -> Tensor:
        """Return the matrix [out, in] or the bias [out] from the expert's rows of the stored
        tensor.
        """
        matrix = rows if self.stacked.flat else rows[0]
        matrix = matrix.mT if self.is_transposed else matrix  # [n * out, in]
        count, out = len(self.stacked.projections), self.shape[0]
        if self.stacked.interleaved:
            return matrix[self.number :: count].contiguous()
        return matrix[self.number * out : (self.number + 1) * out].contiguous()


def find_expert_parts(blocks: Iterable[Block]) -> dict[str, ExpertPart]:
    """Return the part of each routed expert's weight and bias, by its logical name."""
    parts = {}
    for block in blocks:
        experts = block.experts
        for stacked in block.stacked if experts else ():
            assert experts is not None
            for number, projection in enumerate(stacked.projections):
                matrix = (experts.intermediate, experts.hidden)
                if projection == experts.down:
                    matrix = (experts.hidden, experts.intermediate)
                shape = matrix if stacked.kind == "weight" else matrix[:1]
                for e in range(experts.count):
                    name = f"{experts.linear(e, projection)}.{stacked.kind}"
                    parts[name] = ExpertPart(stacked=stacked, expert=e, number=number, shape=shape)
    return parts


def get_stacked_shape(stacked: StackedTensor, part: ExpertPart, count: int) -> tuple[int, ...]:
    """Return the shape of a stored tensor of `count` experts."""
    out, *into = part.shape
    matrix = (out * len(stacked.projections), *into)
    rows, *columns = reversed(matrix) if part.is_transposed else matrix
    return (count * rows, *columns) if stacked.flat else (count, rows, *columns)


def split_specs(
    specs: Mapping[str, TensorSpec], blocks: Iterable[Block]
) -> tuple[dict[str, TensorSpec], dict[str, ExpertPart]]:
    """Return the specs with those of single experts in the place of stacked tensors, and the parts.

    Stacked tensors that are absent or have another shape stay as they are: matching the layout
    reports them.
    """
    own = [block for block in blocks if block.stacked and block.experts]
    counts = {x.name: block.experts.count for block in own if block.experts for x in block.stacked}
    parts = {
        name: part
        for name, part in find_expert_parts(own).items()
        if (spec := specs.get(part.stacked.name))
        and spec.shape == get_stacked_shape(part.stacked, part, counts[part.stacked.name])
    }
    hidden = {part.stacked.name for part in parts.values()}
    result = {name: spec for name, spec in specs.items() if name not in hidden}
    for name, part in parts.items():
        dtype = specs[part.stacked.name].dtype
        result[name] = TensorSpec(name=name, dtype=dtype, shape=part.shape)
    return result, parts
