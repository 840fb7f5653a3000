"""Routed experts one by one: the function between their projections, and a block with its experts.

transformers keeps the experts of a layer in 3-D tensors and flags how they are used
(`use_experts_implementation`). quantkit runs expert after expert: `make_gating` takes from the
module what lies between the projections, a clamp or another activation included, and the layout
checks compare the sum with the module's own output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import moe as transformers_moe

from quantkit.contracts import Block, Experts
from quantkit.models.layers import (
    DecoderLayer,
    MetaModel,
    RouterOutput,
    get_layer_name,
    make_decoder_layer,
    run_layer,
    run_layer_with_sum,
    select_expert_tokens,
)

DEFAULT_GATE = getattr(transformers_moe, "_default_apply_gate", None)
"""transformers' own act(gate) * up, which needs no copy of both."""
ACTIVATIONS = ("act_fn", "activation_fn")
"""Attributes of experts modules."""


@dataclass(frozen=True, kw_only=True)
class Gating:
    """The function between the projections of transformers' experts module.

    interleaved: the module expects gate and up row by row in turn, not one after the other.
    """

    module: Any
    interleaved: bool = False

    def __call__(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """Return the input of the down projection: gate, up [tokens, n] -> [tokens, n]."""
        module = self.module
        if gate is None:
            result: Tensor = find_activation(module)(up)
        elif getattr(type(module), "_apply_gate", DEFAULT_GATE) is DEFAULT_GATE:
            result = find_activation(module)(gate) * up
        elif self.interleaved:
            # [tokens, n, 2] -> [tokens, 2 n]
            result = module._apply_gate(torch.stack([gate, up], -1).flatten(-2))
        else:
            result = module._apply_gate(torch.cat([gate, up], -1))
        return result


def find_activation(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the activation of an experts module, or of a child of it.

    Raises AttributeError for a module without one.
    """
    for owner in (module, *module.children()):
        for name in ACTIVATIONS:
            activation: Callable[[Tensor], Tensor] | None = getattr(owner, name, None)
            if activation is not None:
                return activation
    raise AttributeError(f"{type(module).__name__} has none of {', '.join(ACTIVATIONS)}")


def make_gating(meta_model: MetaModel, block: Block) -> Gating | None:
    """Return the function of a block's experts; None without experts that transformers runs."""
    if block.experts is None or block.kind != "decoder":
        return None
    return make_module_gating(find_experts_module(meta_model.model, block, block.experts))


def make_module_gating(module: nn.Module) -> Gating:
    """Return the function between the projections of an experts module."""
    return Gating(module=module, interleaved=not getattr(module, "is_concatenated", True))


def find_experts_module(model: Any, block: Block, experts: Experts) -> nn.Module:
    """Return transformers' module of a block's experts."""
    path = get_layer_name(block, experts.module)
    module: nn.Module = model.get_submodule(f"{block.path}.{path}")
    return module


# ------------------------------------------------------------------- blocks of a small instance


@dataclass(frozen=True, kw_only=True)
class BlockRun:
    """A block run with its experts, in the layer's padded positions.

    out: rows of states after the block [tokens, width]; routed: the input of the experts, None
    without experts; total: their sum [positions, hidden].
    """

    out: Tensor
    routed: RouterOutput | None = None
    total: Tensor | None = None


def sum_experts(
    experts: Experts, tensors: Mapping[str, Tensor], routed: RouterOutput, gating: Gating
) -> Tensor:
    """Return the weighted sum of experts, one by one: [positions, hidden]."""
    total = torch.zeros_like(routed.hidden)
    for e in range(experts.count):
        rows, weight = select_expert_tokens(routed.index, routed.weight, e)
        if not len(rows):
            continue
        x = routed.hidden[rows]  # [n, hidden]
        into = [project(x, tensors, experts.linear(e, p)) for p in experts.inputs]
        inner = gating(into[0] if len(into) > 1 else None, into[-1])  # [n, intermediate]
        y = project(inner, tensors, experts.linear(e, experts.down))
        total.index_add_(0, rows, y * weight[:, None].to(y))
    return total


def run_router(
    meta_model: MetaModel,
    block: Block,
    tensors: Mapping[str, Tensor],
    rows: Tensor,
    lengths: Sequence[int],
) -> RouterOutput | None:
    """Return the input of a block's experts and their routing, None for a block without experts.

    tensors: of the block without its experts, by full name; rows [tokens, width].
    """
    layer = make_decoder_layer(meta_model, block, tensors)
    run_layer(meta_model, layer, rows, lengths)
    return layer.tap.last if layer.tap else None


def project(x: Tensor, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the output [n, out] of the linear `name` among `tensors`, with its bias if any."""
    y = x @ tensors[f"{name}.weight"].T
    bias = tensors.get(f"{name}.bias")
    return y if bias is None else y + bias


def select_dense_tensors(block: Block, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a block's tensors without those of routed experts."""
    routed = {x.name for x in block.linears if x.role == "routed_expert"}
    return {name: x for name, x in tensors.items() if name.rpartition(".")[0] not in routed}


def run_block(
    meta_model: MetaModel,
    block: Block,
    tensors: Mapping[str, Tensor],
    rows: Tensor,
    lengths: Sequence[int],
) -> BlockRun:
    """Run a block as a build does, with all its experts in memory: rows [tokens, width].

    tensors: of the block, by full name.
    """
    return next(run_block_batches(meta_model, block, tensors, (rows,), (lengths,)))


def run_block_batches(
    meta_model: MetaModel,
    block: Block,
    tensors: Mapping[str, Tensor],
    rows: Sequence[Tensor],
    lengths: Sequence[Sequence[int]],
) -> Iterator[BlockRun]:
    """Run a block as `run_block` does, on several batches; the layer is made once."""
    layer = make_decoder_layer(meta_model, block, select_dense_tensors(block, tensors))
    gating = make_gating(meta_model, block)
    for batch, sizes in zip(rows, lengths, strict=True):
        yield run_made_block(meta_model, block, layer, gating, tensors, batch, sizes)


def run_made_block(
    meta_model: MetaModel,
    block: Block,
    layer: DecoderLayer,
    gating: Gating | None,
    tensors: Mapping[str, Tensor],
    rows: Tensor,
    lengths: Sequence[int],
) -> BlockRun:
    """Run a block whose layer is made; see `run_block`."""
    experts = block.experts
    out, valid = run_layer(meta_model, layer, rows, lengths)
    if experts is None or gating is None or layer.tap is None or layer.tap.last is None:
        return BlockRun(out=out)
    routed = layer.tap.last
    total = sum_experts(experts, tensors, routed, gating)
    if experts.inside:
        out = run_layer_with_sum(meta_model, layer, rows, lengths, total[valid])
    else:
        out = out.clone()
        out[:, : experts.hidden] += total[valid].to(out)  # ids follow the states
    return BlockRun(out=out, routed=routed, total=total)


def keep_inside(block: Block) -> Block:
    """Return the block with experts whose sum is returned inside the layer."""
    assert block.experts is not None  # the caller has experts
    return replace(block, experts=replace(block.experts, inside=True))
