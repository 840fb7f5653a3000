"""Full models in memory: transformers models with the dequantized weights of source or artifact.

For benchmarks on models that fit, and for tests. Every quantized linear is unpacked from the
tensors on disk, so the evaluated weights are those that ship.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from quantkit import registry
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.contracts import Block, Experts, Layout, Scheme
from quantkit.models import layers
from quantkit.models.expert_form import read_form
from quantkit.models.experts import find_experts_module
from quantkit.models.layers import MetaModel, get_layer_name, join_parts, load_tensors
from quantkit.models.outer_model import get_head, get_module_name

TensorReader = Callable[[str], Tensor]
"""Full name of a logical tensor ("model.layers.0.mlp.up_proj.weight") -> its values."""


def make_reader(
    checkpoint: Checkpoint, format_name: str | None = None, schemes: dict[str, Scheme] | None = None
) -> TensorReader:
    """Return a reader of logical tensors of a source, or of an artifact.

    `schemes` gives the scheme of each packed module of an artifact.
    """
    packed = schemes or {}
    parts: dict[str, list[str]] = {}
    for name in checkpoint.specs:
        module = name.rpartition(".")[0]
        while module and module not in packed:  # a format may store P.weight and P.weight.absmax
            module = module.rpartition(".")[0]
        parts.setdefault(module, []).append(name)

    def read(name: str) -> Tensor:
        module, _, kind = name.rpartition(".")
        is_decoded = name in checkpoint.logical.encoded  # FP8, also of a packed module
        if kind != "weight" or module not in packed or format_name is None or is_decoded:
            return checkpoint.read([name])[name]
        tensors = {
            full.removeprefix(f"{module}."): tensor
            for full, tensor in checkpoint.read(parts[module]).items()
        }
        return registry.get_format(format_name).dequantize(tensors, packed[module])

    return read


def make_model(meta_model: MetaModel, layout: Layout, read: TensorReader) -> Any:
    """Make the model with its weights, in the meta model's dtype and on its device."""
    return fill_model(
        make_empty_model(meta_model),
        meta_model,
        layout,
        iterate_state_dict(meta_model, layout, read),
    )


def make_empty_model(meta_model: MetaModel) -> Any:
    """Make the model without weights."""
    return copy.deepcopy(meta_model.model)


def fill_model(
    model: Any,
    meta_model: MetaModel,
    layout: Layout,
    tensors: Iterable[tuple[str, Tensor]],
    uncast: Mapping[str, Tensor] = {},
) -> Any:
    """Load weights into an empty model and return it ready to run.

    `tensors` are cast; tensors of `uncast` are loaded unchanged.
    """
    load_tensors(
        model, {**cast_tensors(model, meta_model, layout, tensors), **uncast}, "the whole model"
    )
    return model.eval()


def cast_tensors(
    model: Any, meta_model: MetaModel, layout: Layout, tensors: Iterable[tuple[str, Tensor]]
) -> dict[str, Tensor]:
    """Cast tensors to the meta model's dtype and device, `layers.list_float32_buffers` to float32.

    A tied head is the embedding.
    """
    exact = layers.list_float32_buffers(model, layout.blocks, model)
    state = layers.cast_tensors(model, tensors, meta_model, exact)
    stored, name = name_head(meta_model, layout)
    if layout.head is None:
        state[name] = state[layout.get_path(stored)]
    else:
        state[name] = state.pop(stored)
    return state


def name_head(meta_model: MetaModel, layout: Layout) -> tuple[str, str]:
    """Return the names of the head's weight in the checkpoint and in transformers' model.

    A tied head is the embedding in the checkpoint.
    """
    module = get_module_name(meta_model.model, get_head(meta_model.model))
    return f"{(layout.head or layout.embedding).name}.weight", f"{module}.weight"


def iterate_state_dict(
    meta_model: MetaModel, layout: Layout, read: TensorReader, without: Collection[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor under transformers' name; the experts of a block are stacked.

    Weights of the linears in `without` are left out: all routed experts of a block, or none.
    """
    embedding = f"{layout.embedding.name}.weight"
    yield layout.get_path(embedding), read(embedding)
    for block in layout.blocks:
        if block.kind == "decoder":
            yield from iterate_block_state(meta_model, block, read, without)
    for spec in layout.final_tensors:
        yield layout.get_path(spec.name), read(spec.name)
    if layout.head:
        yield f"{layout.head.name}.weight", read(f"{layout.head.name}.weight")


def iterate_block_state(
    meta_model: MetaModel, block: Block, read: TensorReader, without: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield a block's tensors under transformers' names."""
    names = [spec.name for spec in block.others]
    plain = [
        linear
        for linear in block.linears
        if linear.role != "routed_expert" and linear.name not in without
    ]
    names += [f"{linear.name}.weight" for linear in plain]
    experts = block.experts
    is_stacked = experts is not None and experts.first not in without
    names += [
        f"{linear.name}.bias"
        for linear in block.linears
        if linear.bias and not (is_stacked and linear.role == "routed_expert")
    ]
    for name, tensor in join_parts(block, ((name, read(name)) for name in names)):
        yield f"{block.path}.{name}", tensor
    if experts is None or not is_stacked:
        return
    module = find_experts_module(meta_model.model, block, experts)
    path = f"{block.path}.{get_layer_name(block, experts.module)}"
    for kind, tensor in stack_experts(experts, read, module):
        yield f"{path}.{kind}", tensor


def stack_experts(
    experts: Experts, read: TensorReader, module: Any
) -> Iterator[tuple[str, Tensor]]:
    """Yield the two tensors of transformers' experts module by local name, and those of biases.

    Gate and up of all experts are one tensor [experts, 2 * intermediate, hidden], in the order of
    the module; up alone without a gate.
    """
    form = read_form(module)
    assert form is not None  # the layout has experts in it
    names = {"gate": experts.gate, "up": experts.up, "down": experts.down}
    for parameter in form.parameters:
        pieces = [
            torch.stack([
                read(f"{experts.linear(e, names[x] or '')}.{parameter.kind}")
                for e in range(experts.count)
            ])  # [experts, out, in], of biases [experts, out]
            for x in parameter.projections
        ]
        yield parameter.name, parameter.join(pieces)
