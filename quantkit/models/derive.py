"""Families without a table: the layout is read off transformers' modules and proven on a small random instance.

Slower than a table by seconds and narrower: dense blocks of `nn.Linear` with rotary position embeddings. Whatever
cannot be proven is refused in one sentence. What was proven is told by the plan, plan.json and the model card.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from quantkit import registry
from quantkit.contracts import Architecture, Config, Layout
from quantkit.errors import CheckpointError, UsageError
from quantkit.io.suggestions import format_unknown_name
from quantkit.models import layout_checks
from quantkit.models.inspect import inspect_layout, make_refusal
from quantkit.models.layers import MetaModel, make_meta_model

UNSUPPORTED: Mapping[str, str] = {
    "gpt_oss": "its experts are stored in MXFP4 with biases, gate and up interleaved and clamped, which no reader here "
    "knows, and at 4.25 bits a weight there is nothing to gain from 4 bits; serve the release as it is",
}
"""Model types that transformers knows and that will not work, with what to do."""


def derive_architecture(config: Config) -> Architecture:
    """What can be proven of a model type without a table; UsageError when transformers does not know it either.

    Raises CheckpointError with the first thing that cannot be proven.
    """
    model_type = config.text("model_type")
    if model_type in UNSUPPORTED:
        raise make_refusal(config, UNSUPPORTED[model_type])
    if model_type not in CONFIG_MAPPING or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        own = (
            ", and the code of a checkpoint (auto_map) is never run"
            if config.has("auto_map")
            else ""
        )
        raise UsageError(
            f"{format_unknown_name('architecture', model_type, registry.list_names('architectures'))} transformers "
            f"{transformers.__version__} has no language model of that type to derive one from{own}"
        )
    layout = derive_layout(config)
    told = describe_layout(model_type, layout)
    return Architecture(
        layout=lambda _config: layout,
        tiny={},
        serving_notes=(f"{told} Whether an engine serves this family was not checked.",),
        dropped=("*.rotary_emb.inv_freq",),  # a buffer that old uploads carry; engines recompute it
        derived=told,
    )


def derive_layout(config: Config) -> Layout:
    """The layout of the real model with what the small instance proved."""
    bones = make_checked_model(config, config)
    layout = inspect_layout(config, bones)
    small_config = layout_checks.reduce_config(config, bones.config)
    small_bones = make_checked_model(config, small_config)
    small = inspect_layout(config, small_bones)
    if list_tensor_names(small) != list_tensor_names(layout):
        raise make_refusal(config, "a small instance of it has other tensors")
    tensors = layout_checks.make_random_tensors(small_bones)
    layout_checks.check_logits(config, small_bones, small, tensors)
    readings = layout_checks.find_readings(config, small_bones, small, tensors)
    blocks = tuple(
        replace(block, groups=layout_checks.make_groups(block, found, bones.config))
        for block, found in zip(layout.blocks, readings, strict=True)
    )
    return replace(layout, blocks=blocks)


def make_checked_model(config: Config, values: Config) -> MetaModel:
    """The model of `values` without weights; transformers' complaint as a reason to refuse."""
    try:
        return make_meta_model(values, torch.device("cpu"), torch.float32)
    except CheckpointError as fault:
        raise make_refusal(config, str(fault).removeprefix(f"{config.where}: ")) from fault


def list_tensor_names(layout: Layout) -> list[str]:
    """Every module and tensor of a layout."""
    inside = [spec.name for block in layout.blocks for spec in block.others]
    return [
        *(linear.name for linear in layout.linears),
        *inside,
        *(spec.name for spec in layout.final_tensors),
    ]


def describe_layout(model_type: str, layout: Layout) -> str:
    """One sentence of what was found and proven."""
    groups = [group for block in layout.blocks for group in block.groups]
    linears = sum(len(block.linears) for block in layout.blocks)
    scaled = sum(group.absorber is not None for group in groups)
    return (
        f"generic: model_type {model_type} has no table; found {linears} linears in {len(layout.blocks)} blocks of "
        f"transformers' own, reading {len(groups)} inputs, of which {scaled} can be scaled; proven on a small random "
        "instance, whose logits block by block equal transformers' own."
    )
