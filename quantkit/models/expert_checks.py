"""Checks of derived experts on a small random instance.

For each block with experts, transformers' own layer with its experts runs next to the layer with a
tap and the experts one by one (`experts`). Checked: the experts' module is called once with states,
selected experts and weights; both give the same sum, so that order of gate and up, activation and
clamps are right; and both give the same states after the layer, with the sum added to its output
or, if that fails, returned inside the layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantkit.contracts import Block, Experts, Layout
from quantkit.models import full_model
from quantkit.models.experts import BlockRun, Gating, keep_inside, make_gating, run_block
from quantkit.models.layers import (
    DecoderLayer,
    MetaModel,
    copy_module,
    get_layer_name,
    load_tensors,
    make_random_rows,
    run_layer,
    split_scaled_inputs,
)
from quantkit.models.stored_names import UnknownForm

TOLERANCE = 1e-4
"""Largest relative difference of sums in float32; a wrong order of gate and up causes 1."""


@dataclass(frozen=True, kw_only=True)
class FullRun:
    """transformers' layer with its experts: rows after it [tokens, width], and each call of the
    experts' module with its answer.
    """

    out: Tensor
    calls: Sequence[tuple[tuple[Any, ...], Tensor]]


def check_experts(
    meta_model: MetaModel,
    layout: Layout,
    tensors: Mapping[str, Tensor],
    lengths: Sequence[int],
) -> Layout:
    """Return the layout of the instance with the checked experts of each block.

    tensors: of the instance, by full name. Raises UnknownForm.
    """
    rows = make_random_rows(meta_model.outer, lengths, seed=4)  # [tokens, width]
    blocks = tuple(
        check_block(meta_model, block, tensors, rows, lengths) if block.experts else block
        for block in layout.blocks
    )
    return replace(layout, blocks=blocks)


def check_block(
    meta_model: MetaModel,
    block: Block,
    tensors: Mapping[str, Tensor],
    rows: Tensor,
    lengths: Sequence[int],
) -> Block:
    """Return a block with checked experts; raises UnknownForm."""
    experts, gating = block.experts, make_gating(meta_model, block)
    assert experts is not None and gating is not None  # the caller has checked
    module, own = experts.module, {k: x for k, x in tensors.items() if is_in(k, block)}
    full = run_full_layer(meta_model, block, own, rows, lengths)
    positions = len(lengths) * max(lengths)
    if len(full.calls) != 1:
        raise UnknownForm(f"its experts {module} are called {len(full.calls)} times in a layer")
    [(arguments, answer)] = full.calls
    # some modules get [sequences, tokens, hidden]
    arguments = (arguments[0].reshape(-1, arguments[0].shape[-1]), *arguments[1:])
    if len(arguments) == 1 and len(arguments[0]) == experts.count * positions:
        experts = replace(experts, scaled_inputs=True)
        routed = split_scaled_inputs(arguments[0], experts.count)
        arguments = (routed.hidden, routed.index, routed.weight)
        answer = answer.reshape(experts.count, positions, -1).sum(0)
    if not is_routed(arguments, positions, experts):
        raise UnknownForm(
            f"its experts {module} are not called with the states of every token, the selected "
            "experts and their weights"
        )
    form = meta_model.outer.form
    block = replace(block, experts=replace(experts, top_k=arguments[1].shape[1]))
    if form.hidden.width != experts.hidden:  # several streams, or a projection after the experts
        block = keep_inside(block)
    run = run_block(meta_model, block, own, rows, lengths)
    check_sum(module, run, arguments, answer)
    if not is_close(form.get_hidden(run.out), form.get_hidden(full.out)):
        block = keep_inside(block)
        run = run_block(meta_model, block, own, rows, lengths)
        if not is_close(form.get_hidden(run.out), form.get_hidden(full.out)):
            raise UnknownForm(
                f"with the sum of {module} returned by a tap, its layer gives other states than "
                "transformers' own"
            )
    assert block.experts is not None
    return replace(
        block, experts=replace(block.experts, scales_down=is_linear_in_up(gating, experts))
    )


def is_in(name: str, block: Block) -> bool:
    """Return whether a tensor belongs to a block."""
    return name.startswith(f"{block.name}.")


def run_full_layer(
    meta_model: MetaModel,
    block: Block,
    tensors: Mapping[str, Tensor],
    rows: Tensor,
    lengths: Sequence[int],
) -> FullRun:
    """Run transformers' layer with its own experts; record their inputs and outputs."""
    assert block.experts is not None  # the caller has checked
    layer = copy_module(meta_model.model.get_submodule(block.path))
    state = full_model.iterate_block_state(meta_model, block, tensors.__getitem__, ())
    load_tensors(layer, {k.removeprefix(f"{block.path}."): x for k, x in state}, block.name)
    calls: list[tuple[tuple[Any, ...], Tensor]] = []

    def hook(_module: Any, arguments: Any, keywords: Any, answer: Tensor) -> None:
        calls.append(((*arguments, *keywords.values()), answer))

    module = layer.get_submodule(get_layer_name(block, block.experts.module))
    module.register_forward_hook(hook, with_kwargs=True)
    whole = DecoderLayer(name=block.path, module=layer, tap=None)
    out, _ = run_layer(meta_model, whole, rows, lengths)
    return FullRun(out=out, calls=calls)


def is_routed(arguments: tuple[Any, ...], positions: int, experts: Experts) -> bool:
    """Return whether a call has states [positions, hidden], experts and weights [positions, k]."""
    if len(arguments) != 3 or not all(isinstance(x, Tensor) for x in arguments):
        return False
    hidden, index, weight = arguments
    return (
        tuple(hidden.shape) == (positions, experts.hidden)
        and index.dim() == 2
        and index.shape == weight.shape
        and len(index) == positions
        and not index.is_floating_point()
        and int(index.max()) < experts.count
    )


def check_sum(module: str, run: BlockRun, arguments: tuple[Any, ...], answer: Tensor) -> None:
    """Check router's output and experts' sum against transformers' own; raises UnknownForm."""
    assert run.routed is not None and run.total is not None  # the block has experts
    hidden, index, weight = arguments
    if not (
        torch.equal(run.routed.index, index)
        and is_close(run.routed.weight, weight)
        and is_close(run.routed.hidden, hidden)
    ):
        raise UnknownForm(f"the router of {module} decides otherwise without the experts' sum")
    if not is_close(run.total, answer.reshape(run.total.shape)):
        raise UnknownForm(
            f"run one by one, the experts {module} give another sum than transformers' module"
        )


def is_close(actual: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors agree but for rounding."""
    difference = float((actual.float() - expected.float()).norm())
    return difference <= TOLERANCE * float(expected.float().norm())


def is_linear_in_up(gating: Gating, experts: Experts) -> bool:
    """Return whether scaling the rows of up scales the input of down, large values included."""
    generator = torch.Generator().manual_seed(5)
    gate, up = (30 * torch.randn(64, experts.intermediate, generator=generator) for _ in range(2))
    exponent = torch.randint(-2, 3, (experts.intermediate,), generator=generator)
    scale = 2.0**exponent
    first = None if experts.gate is None else gate
    return is_close(gating(first, up * scale), gating(first, up) * scale)
