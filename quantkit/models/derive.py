"""Families without a table: derive the layout from transformers, check it on a small instance.

Slower than a table by seconds. Dense blocks, and mixtures whose experts run one by one. A layout
that fails a check is rejected in one sentence. The plan, plan.json and the model card list the
checks.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
import transformers

from quantkit import registry
from quantkit.checkpoint.hf_config import has_language_model, list_model_classes
from quantkit.contracts import Architecture, Block, Config, Experts, Layout
from quantkit.errors import CheckpointError, UsageError
from quantkit.io.suggestions import format_unknown_name
from quantkit.models import layout_checks, logit_checks
from quantkit.models.inspect import (
    inspect_layout,
    keep_linears,
    make_refusal,
    mark_routers,
)
from quantkit.models.layers import MetaModel, make_meta_model
from quantkit.models.layout_checks import BlockFindings
from quantkit.models.small_instance import (
    make_random_tensors,
    read_size,
    reduce_config,
)
from quantkit.models.stored_names import UnknownForm, find_stored_names, measure_parts
from quantkit.models.text_part import find_parts, name_in_model, put_parts_back


def derive_architecture(config: Config, names: Collection[str] = ()) -> Architecture:
    """Derive the architecture of a model type without a table.

    names: those of the checkpoint's tensors, which locate the text model of a wrapper.

    Raises UsageError if transformers does not know the type either, CheckpointError with the first
    check that fails.
    """
    model_type = config.text("model_type")
    if not has_language_model(model_type):
        own = (
            ", and the code of a checkpoint (auto_map) is never run"
            if config.has("auto_map")
            else ""
        )
        known = registry.list_names("architectures")
        unknown = format_unknown_name("architecture", model_type, known)
        raise UsageError(
            f"{unknown} transformers {transformers.__version__} has no language model of that type "
            f"to derive one from{own}"
        )
    layout = derive_layout(config, names)
    description = describe_layout(model_type, layout)
    return Architecture(
        layout=lambda _config: layout,
        tiny={},
        serving_notes=(f"{description} Whether an engine serves this family was not checked.",),
        dropped=("*.rotary_emb.inv_freq",),  # a buffer that old uploads carry; engines recompute it
        derived=description,
        classes=list_model_classes(model_type),
    )


def derive_layout(config: Config, names: Collection[str] = ()) -> Layout:
    """Return the layout of the real model with the groups found on the small instance."""
    meta_model = make_checked_model(config, config)
    whole = put_parts_back(meta_model.model, meta_model.left_out)
    named, converted = name_in_model(whole, names)
    disk = {path: name for name, path in named.items() if name not in converted}
    small_model = make_checked_model(config, reduce_config(config, meta_model))
    if list(small_model.model.state_dict()) != list(meta_model.model.state_dict()):
        raise make_refusal(config, "a small instance of it has other tensors")
    try:
        stored, tensors = find_stored_names(small_model, make_random_tensors(small_model), disk)
        layout = inspect_layout(config, meta_model, measure_parts(meta_model, stored))
        small = inspect_layout(config, small_model, stored, is_small=True)
    except UnknownForm as fault:
        raise make_refusal(config, str(fault)) from fault
    proof = logit_checks.prove_layout(config, small_model, small, tensors)
    blocks = tuple(
        finish_block(config, block, findings, small_block.experts, meta_model.config)
        for block, small_block, findings in zip(
            layout.blocks, proof.layout.blocks, proof.findings, strict=True
        )
    )
    try:
        parts = find_parts(whole, meta_model.left_out, named, converted, list_tensors(layout))
    except CheckpointError as fault:
        raise CheckpointError(f"{config.where}: {fault}") from fault
    return replace(
        layout,
        blocks=blocks,
        equal_lengths=proof.runs_alone,
        tables=proof.tables,
        parts=parts,
        eager_heads=count_eager_heads(meta_model),
        state_width=get_state_width(meta_model, layout),
    )


def count_eager_heads(meta_model: MetaModel) -> int:
    """Return the heads of a model that transformers runs with eager attention only, else 0."""
    is_eager = getattr(meta_model.config, "_attn_implementation", None) == "eager"
    return (read_size(meta_model.config, "num_attention_heads") or 0) * is_eager


def get_state_width(meta_model: MetaModel, layout: Layout) -> int:
    """Return the numbers per token between two blocks, 0 if they are those of an embedding."""
    width = meta_model.outer.form.width
    return 0 if width == layout.embedding.in_features else width


def finish_block(
    config: Config,
    block: Block,
    findings: BlockFindings,
    small_experts: Experts | None,
    hf_config: Any,
) -> Block:
    """Return a block of the real model with the findings on its counterpart in the small one."""
    block = keep_linears(config, mark_routers(block, findings.routers), findings.uncalled)
    if block.experts and small_experts:
        router = next((x for x in findings.routers), small_experts.router)
        block = replace(
            block,
            experts=replace(
                block.experts,
                router=router,
                top_k=small_experts.top_k,
                scales_down=small_experts.scales_down,
                inside=small_experts.inside,
                scaled_inputs=small_experts.scaled_inputs,
            ),
        )
    return replace(block, groups=layout_checks.make_groups(block, findings.readings, hf_config))


def make_checked_model(config: Config, values: Config) -> MetaModel:
    """Make the model of `values` without weights; transformers' error becomes the refusal."""
    try:
        return make_meta_model(values, torch.device("cpu"), torch.float32)
    except CheckpointError as fault:
        raise make_refusal(config, str(fault).removeprefix(f"{config.where}: ")) from fault


def list_tensors(layout: Layout) -> frozenset[str]:
    """Return the stored name of every tensor of the text model."""
    linears = (f"{x.name}.{kind}" for x in layout.linears for kind in ("weight", "bias"))
    others = (spec.name for block in layout.blocks for spec in block.others)
    stacked = (tensor.name for block in layout.blocks for tensor in block.stacked)
    final = (spec.name for spec in layout.final_tensors)
    return frozenset((*linears, *others, *stacked, *final))


def describe_layout(model_type: str, layout: Layout) -> str:
    """Return one sentence about the layout and its checks."""
    groups = [group for block in layout.blocks for group in block.groups]
    linears = sum(len(block.linears) for block in layout.blocks)
    scaled = sum(group.absorber is not None for group in groups)
    alone = "; texts of unequal length run in batches of their own" if layout.equal_lengths else ""
    mixtures = [block.experts for block in layout.blocks if block.experts]
    inside = " returned inside the layer" if any(x.inside for x in mixtures) else ""
    sums = f", the sum of experts run one by one{inside}" if mixtures else ""
    return (
        f"generic: model_type {model_type} has no table; found {linears} linears in "
        f"{len(layout.blocks)} blocks of transformers' own, reading {len(groups)} inputs, of which "
        f"{scaled} can be scaled; proven on a small random instance, whose logits block by block "
        f"equal transformers' own{sums}{alone}."
    )
