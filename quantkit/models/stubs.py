"""Modules in the place of layers, embedding and head: transformers' model runs without weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantkit.models.layer_calls import LayerCall
from quantkit.models.modules import freeze


class Stub(nn.Module):
    """Stands for a module without weights: other attributes are those of the module."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.__dict__["original"] = original  # no submodule, so it is neither copied nor moved

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)


class LayerStub(Stub):
    """Records the calls of a layer and returns its input, or `answer` if that is set.

    `hidden` are the states of the last call. `n_extra`: the number of outputs after the states;
    None for a layer that returns no tuple. `marks`: tensors to return there.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        self.calls: list[LayerCall] = []
        self.hidden: Tensor | None = None
        self.answer: Tensor | None = None
        self.n_extra: int | None = None
        self.marks: tuple[Tensor, ...] = ()

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Return states, in the form that the model expects."""
        by_name = "hidden_states" in keywords
        hidden = keywords.pop("hidden_states") if by_name else arguments[0]
        rest = arguments if by_name else arguments[1:]
        self.calls.append(LayerCall(arguments=rest, keywords=keywords, by_name=by_name))
        self.hidden = hidden
        out = hidden if self.answer is None else self.answer
        if self.n_extra is None:
            return out
        return (out, *(self.marks or [None] * self.n_extra))


class EmbeddingStub(Stub):
    """Returns zeros of the embedding's shape."""

    def __init__(self, original: nn.Embedding, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(original)
        self.zero = torch.zeros((), device=device, dtype=dtype)
        self.__dict__["weight"] = self.zero.expand(original.weight.shape)  # no parameter

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., hidden]."""
        return self.zero.expand(*ids.shape, self.original.weight.shape[1])


class RowEmbedding(Stub):
    """The embedding on the rows that a batch needs: its own forward, without a second copy."""

    def __init__(
        self, original: nn.Embedding, weight: Tensor, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(original)
        self.__dict__["rows"] = (weight, device, dtype)
        self.__dict__["weight"] = weight  # no parameter; some models read a row of it
        original.padding_idx = None  # of training only; the rows here have other numbers

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., hidden]."""
        weight, device, dtype = self.__dict__["rows"]
        used, number = ids.unique(return_inverse=True)  # [rows], [...]
        rows = weight[used.to(weight.device)]  # [rows, hidden]
        self.original.weight = freeze(rows.to(device=device, dtype=dtype))
        embedded: Tensor = self.original(number)  # [..., hidden]
        return embedded


class HeadStub(Stub):
    """Stands for the head in a forward whose logits are not used."""

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., 1]."""
        return hidden[..., :1]
