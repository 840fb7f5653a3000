"""A whole model in memory, from source or artifact files, as an ordinary transformers model of plain weights.

For benchmarks on models that fit, and for tests: every quantized linear is unpacked from the tensors on disk, so what
answers is what ships.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from quantkit import registry
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.contracts import Block, Layout, Scheme
from quantkit.models.layers import MetaModel, get_layer_name, load_tensors

TensorReader = Callable[[str], Tensor]
"""Full name of a logical tensor ("model.layers.0.mlp.up_proj.weight") -> its values, unpacked."""


def make_reader(
    checkpoint: Checkpoint, format_name: str | None = None, schemes: dict[str, Scheme] | None = None
) -> TensorReader:
    """Reads logical tensors of a source, or of an artifact whose `schemes` say what is packed in which format."""
    packed = schemes or {}
    parts: dict[str, list[str]] = {}
    for name in checkpoint.specs:
        module = name.rpartition(".")[0]
        while module and module not in packed:  # a format may store P.weight and P.weight.absmax
            module = module.rpartition(".")[0]
        parts.setdefault(module, []).append(name)

    def read(name: str) -> Tensor:
        module, _, kind = name.rpartition(".")
        if kind != "weight" or module not in packed or format_name is None:
            return checkpoint.read([name])[name]
        tensors = {
            full.removeprefix(f"{module}."): tensor
            for full, tensor in checkpoint.read(parts[module]).items()
        }
        return registry.get_format(format_name).dequantize(tensors, packed[module])

    return read


def count_parameters(layout: Layout) -> int:
    """Weights of the model that transformers runs."""
    skipped = sum(
        linear.n_parameters
        for block in layout.blocks
        if block.kind == "mtp"
        for linear in block.linears
    )
    return sum(linear.n_parameters for linear in layout.linears) - skipped


def make_model(skeleton: MetaModel, layout: Layout, read: TensorReader) -> Any:
    """The model with its weights, in the skeleton's dtype and on its device."""
    return fill_model(
        make_empty_model(skeleton), skeleton, layout, iterate_state_dict(layout, read)
    )


def make_empty_model(skeleton: MetaModel) -> Any:
    """The model without weights."""
    whole = copy.deepcopy(skeleton.model)
    whole.base_model.rotary_emb = skeleton.rotary
    return whole


def fill_model(
    whole: Any,
    skeleton: MetaModel,
    layout: Layout,
    tensors: Iterable[tuple[str, Tensor]],
    beside: Mapping[str, Tensor] = {},
) -> Any:
    """An `empty` model with its weights, ready to run: `tensors` are cast, those `beside` them taken as they are."""
    load_tensors(
        whole, {**cast_tensors(whole, skeleton, layout, tensors), **beside}, "the whole model"
    )
    return whole.eval()


def cast_tensors(
    whole: Any, skeleton: MetaModel, layout: Layout, tensors: Iterable[tuple[str, Tensor]]
) -> dict[str, Tensor]:
    """Tensors in the skeleton's dtype and on its device, buffers in float32; a head that is tied is the embedding."""
    buffers = {name for name, _ in whole.named_buffers()}
    state = {
        name: tensor.to(
            device=skeleton.device, dtype=torch.float32 if name in buffers else skeleton.dtype
        )
        for name, tensor in tensors
    }
    if layout.head is None:
        head = next(
            name
            for name, module in whole.named_modules()
            if module is whole.get_output_embeddings()
        )
        state[f"{head}.weight"] = state[f"{layout.embedding.name}.weight"]
    return state


def iterate_state_dict(
    layout: Layout, read: TensorReader, without: Collection[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under the name transformers gives it: the experts of a block are stacked.

    But for the weights of the linears in `without`: all routed experts of a block, or none.
    """
    yield f"{layout.embedding.name}.weight", read(f"{layout.embedding.name}.weight")
    for block in layout.blocks:
        if block.kind == "decoder":
            yield from iterate_block_state(block, read, without)
    for spec in layout.final_tensors:
        yield spec.name, read(spec.name)
    if layout.head:
        yield f"{layout.head.name}.weight", read(f"{layout.head.name}.weight")


def iterate_block_state(
    block: Block, read: TensorReader, without: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    """A block's tensors as transformers names them; gate and up of all experts are one [experts, 2 * width, hidden]."""
    names = [spec.name for spec in block.others]
    plain = [
        linear
        for linear in block.linears
        if linear.role != "routed_expert" and linear.name not in without
    ]
    names += [f"{linear.name}.weight" for linear in plain]
    names += [f"{linear.name}.bias" for linear in block.linears if linear.bias]
    for name in names:
        yield f"{block.name}.{get_layer_name(block, name)}", read(name)
    experts = block.experts
    if experts is None or experts.linear(0, experts.gate) in without:
        return

    def weight(e: int, projection: str) -> Tensor:
        return read(f"{experts.linear(e, projection)}.weight")

    both = [
        torch.cat([weight(e, experts.gate), weight(e, experts.up)]) for e in range(experts.count)
    ]
    called = f"{block.name}.{get_layer_name(block, experts.module)}"
    yield f"{called}.gate_up_proj", torch.stack(both)  # [experts, 2 * intermediate, hidden]
    yield (
        f"{called}.down_proj",
        torch.stack([weight(e, experts.down) for e in range(experts.count)]),
    )
