"""Calls of decoder layers without their states, and the tensors in their arguments by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.models.state_rows import StateForm


@dataclass(frozen=True, kw_only=True)
class LayerCall:
    """One call of a layer without its hidden states.

    `by_name`: the hidden states are passed as `hidden_states=`, not as the first argument; `ids`:
    names (`name_tensors`) of the arguments that are the token ids.
    """

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    by_name: bool
    ids: frozenset[str] = frozenset()

    def run(self, layer: nn.Module, form: StateForm, rows: Tensor) -> Tensor:
        """Call `layer` with rows of states [sequences, tokens, width]; return those after it."""
        hidden, ids = form.unpack(rows)
        arguments, keywords = self.arguments, dict(self.keywords)
        if ids is not None and self.ids:
            arguments = replace_tensors(arguments, dict.fromkeys(self.ids, ids))
            keywords = replace_tensors(keywords, dict.fromkeys(self.ids, ids))
        if self.by_name:
            out = layer(*arguments, **{**keywords, "hidden_states": hidden})
        else:
            out = layer(hidden, *arguments, **keywords)
        return form.pack(out[0] if isinstance(out, tuple) else out, ids)


def name_tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in arguments, each with a name that is the same in every call."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, LayerCall):
        yield from name_tensors(value.arguments, path)
        yield from name_tensors(value.keywords, path)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from name_tensors(part, f"{path}.{key}")
    elif isinstance(value, tuple | list):
        for number, part in enumerate(value):
            yield from name_tensors(part, f"{path}.{number}")


def replace_tensors(value: Any, changes: Mapping[str, Tensor], path: str = "") -> Any:
    """Return arguments with the tensors of `changes` in place of those with these names."""
    if path in changes:
        return changes[path]
    if not any(name.startswith(path) for name in changes):
        return value
    if isinstance(value, Mapping):
        return {key: replace_tensors(x, changes, f"{path}.{key}") for key, x in value.items()}
    if isinstance(value, tuple | list):
        parts = [replace_tensors(x, changes, f"{path}.{n}") for n, x in enumerate(value)]
        return parts if isinstance(value, list) else tuple(parts)
    return value


def is_ids(tensor: Tensor | None, ids: Tensor) -> bool:
    """Return whether an argument is the token ids [sequences, tokens]."""
    if tensor is None or tensor.is_floating_point() or tensor.shape != ids.shape:
        return False
    return torch.equal(tensor.to(ids), ids)


def count_bytes(value: Any) -> int:
    """Return the bytes of the tensors in arguments; those that layers share count once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for _, tensor in name_tensors(value)
    }
    return sum(storages.values())
