"""Rows of states: what a layer is given for each token, as one row of numbers.

Most layers are given hidden states [sequences, tokens, hidden]. Others have several streams per
token ([sequences, tokens, streams, hidden], or streams first), or also read the token ids. A build
stores one row [width] per token, whatever the shape: first the hidden states, then the ids.
`StateForm` is measured with transformers' own forward, never assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class StatePart:
    """A tensor that has a value for each token.

    axis: position of the sequences, after which the tokens come; shape: the other dimensions.
    """

    axis: int = 0
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32

    @property
    def width(self) -> int:
        """Numbers per token."""
        return prod(self.shape)

    def to_rows(self, tensor: Tensor) -> Tensor:
        """[..., sequences, tokens, ...] -> [sequences, tokens, width]."""
        moved = tensor.movedim((self.axis, self.axis + 1), (0, 1))
        return moved.reshape(*moved.shape[:2], self.width)

    def from_rows(self, rows: Tensor) -> Tensor:
        """[sequences, tokens, width] -> [..., sequences, tokens, ...]."""
        tensor = rows.to(self.dtype).reshape(*rows.shape[:2], *self.shape)
        return tensor.movedim((0, 1), (self.axis, self.axis + 1)).contiguous()


@dataclass(frozen=True, kw_only=True)
class StateForm:
    """The parts of a row: `hidden` first, then the token ids if layers read them."""

    hidden: StatePart
    has_ids: bool = False

    @property
    def width(self) -> int:
        """Numbers per token."""
        return self.hidden.width + self.has_ids

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of rows: float32, which holds ids below 2**24, where the states' does not."""
        return torch.float32 if self.has_ids else self.hidden.dtype

    def pack(self, hidden: Tensor, ids: Tensor | None) -> Tensor:
        """Return rows [sequences, tokens, width] of hidden states, and ids [sequences, tokens]."""
        rows = self.hidden.to_rows(hidden)
        if not self.has_ids or ids is None:
            return rows
        return torch.cat([rows.float(), ids.to(rows.device)[..., None].float()], -1)

    def unpack(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return hidden states, and ids [sequences, tokens], of rows [sequences, tokens, width]."""
        hidden = self.hidden.from_rows(rows[..., : self.hidden.width])
        return hidden, rows[..., self.hidden.width].long() if self.has_ids else None

    def get_hidden(self, rows: Tensor) -> Tensor:
        """Return the hidden states of rows: [..., width] -> [..., hidden width]."""
        return rows[..., : self.hidden.width]


def find_token_axes(
    shapes: Sequence[tuple[int, ...]], batches: Sequence[tuple[int, int]]
) -> int | None:
    """Return the axis of the sequences, with the tokens after it; None if there is none.

    shapes: of a tensor for batches [sequences, tokens], which differ in both.
    """
    first, *others = shapes
    for axis in range(len(first) - 1):
        rests = {(*shape[:axis], *shape[axis + 2 :]) for shape in shapes}
        fits = all(x[axis : axis + 2] == batch for x, batch in zip(shapes, batches, strict=True))
        if fits and len(rests) == 1 and all(len(x) == len(first) for x in others):
            return axis
    return None
