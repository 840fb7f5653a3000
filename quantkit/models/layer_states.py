"""The hidden states between the layers of a transformers model, and blocks that run on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.contracts import Layout
from quantkit.models.experts import run_block_batches
from quantkit.models.layers import MetaModel
from quantkit.models.outer_model import find_layers
from quantkit.models.state_rows import StateForm


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """A run of transformers' model: logits [tokens, vocabulary] of all sequences, and for each
    sequence the rows of states before every layer and after the last one [tokens, width].
    """

    logits: Tensor
    states: list[list[Tensor]]


def run_sequences(model: Any, sequences: Sequence[Tensor]) -> RecordedRun:
    """Run sequences one by one without recording states."""
    with torch.no_grad():
        logits = [model(ids[None], use_cache=False).logits[0] for ids in sequences]
    return RecordedRun(logits=torch.cat(logits), states=[])


def record_states(model: Any, form: StateForm, sequences: Sequence[Tensor]) -> RecordedRun:
    """Run sequences one by one and record the states between the layers."""
    states: list[Tensor] = []
    last: list[Tensor] = []
    text: list[Tensor] = []

    def before(_layer: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        hidden = keywords["hidden_states"] if "hidden_states" in keywords else arguments[0]
        states.append(form.pack(hidden, text[0])[0])

    def after(_layer: Any, _arguments: Any, out: Any) -> None:
        hidden = out[0] if isinstance(out, tuple) else out
        last[:] = [form.pack(hidden, text[0])[0]]

    _, layers = find_layers(model)
    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    handles.append(layers[-1].register_forward_hook(after))
    result, logits = [], []
    try:
        for ids in sequences:
            states.clear()
            text[:] = [ids[None]]
            with torch.no_grad():
                logits.append(model(ids[None], use_cache=False).logits[0])
            result.append([*states, *last])
    finally:
        for handle in handles:
            handle.remove()
    return RecordedRun(logits=torch.cat(logits), states=result)


def compare_blocks(
    meta_model: MetaModel,
    layout: Layout,
    tensors: Mapping[str, Tensor],
    states: Sequence[Sequence[Tensor]],
    batches: Sequence[tuple[int, ...]],
) -> float:
    """Return the largest relative change of a block's output, each run on transformers' own states.

    In deep mixtures rounding changes the routing of single tokens, and then everything after it.
    states: of each sequence, before each block and after the last one [tokens, width].
    """
    largest, form = 0.0, meta_model.outer.form
    for number, block in enumerate(layout.blocks):
        own = {name: x for name, x in tensors.items() if name.startswith(f"{block.name}.")}
        before, after = (join_batches(states, n, batches) for n in (number, number + 1))
        runs = run_block_batches(meta_model, block, own, before, batches)
        for run, rows in zip(runs, after, strict=True):
            out, expected = form.get_hidden(run.out), form.get_hidden(rows)
            largest = max(largest, float((out - expected).norm() / expected.norm()))
    return largest


def join_batches(
    states: Sequence[Sequence[Tensor]], number: int, batches: Sequence[tuple[int, ...]]
) -> list[Tensor]:
    """Return the rows before block `number` of the sequences of each batch: [tokens, width]."""
    rows = iter(states)
    return [torch.cat([next(rows)[number] for _ in batch]) for batch in batches]
