"""Checks of a plan that need transformers: whether its layers take the plan's tensors, whether the
embedding has a row for every token.

A family without a table was checked when its layout was derived. No weight is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from quantkit.contracts import Block
from quantkit.errors import CheckpointError
from quantkit.io.files import shorten_repr
from quantkit.models.layers import get_layer_name, make_meta_model
from quantkit.plan.match_checkpoint import make_linear_specs
from quantkit.plan.plan import Plan

MAX_SHOWN = 4


def check_model(plan: Plan) -> None:
    """Check that transformers makes the model of config.json with the tensors of the plan.

    Raises CheckpointError, as the build would do with its first block.
    """
    if plan.architecture.derived is not None or not plan.needs_forward:
        return
    model = make_meta_model(plan.source.config, torch.device("cpu"), torch.float32).model
    faults = [
        fault
        for block in plan.layout.blocks
        if block.kind == "decoder"
        for fault in find_layer_faults(block, model.get_submodule(block.name).state_dict())
    ]
    if faults:
        more = f" and {len(faults) - MAX_SHOWN} more" if len(faults) > MAX_SHOWN else ""
        raise CheckpointError(
            f"{plan.source.where}: expected the tensors of transformers' model of this "
            f"config.json, found others: {'; '.join(faults[:MAX_SHOWN])}{more}; check that "
            "config.json belongs to the weights"
        )


def find_layer_faults(block: Block, state: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Yield how a block's tensors, but the routed experts', differ from those of its layer.

    state: the layer's state dict, on the meta device.
    """
    specs = [*block.others]
    for linear in block.linears:
        if linear.role != "routed_expert":
            specs += make_linear_specs(linear, "BF16")
    shapes = {get_layer_name(block, spec.name): spec.shape for spec in specs}
    experts = f"{get_layer_name(block, block.experts.module)}." if block.experts else None
    for name in state:
        if name not in shapes and not (experts and name.startswith(experts)):
            yield f"{block.name}.{name} is missing"
    for name, shape in shapes.items():
        if name not in state:
            yield f"{block.name}.{name} is not in transformers' layer"
        elif tuple(state[name].shape) != shape:
            yield f"{block.name}.{name} is {list(shape)}, not {list(state[name].shape)}"


def check_token_ids(plan: Plan, largest: Sequence[int]) -> None:
    """Check that the embedding has a row for each token. largest: the largest id of each text.

    Raises CheckpointError.
    """
    rows = plan.layout.embedding.out_features
    if wrong := [number for number in largest if number >= rows]:
        raise CheckpointError(
            f"{plan.source.where}: tokenizer: expected token ids below {rows}, the rows of "
            f"{shorten_repr(plan.layout.embedding.name)}, found {wrong[0]}; the tokenizer belongs "
            "to another model; copy this model's tokenizer files into the folder"
        )
