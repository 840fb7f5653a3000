"""Families without an architecture table, sized by transformers' modules on the meta device.

Slower than a table by seconds. Engine-specific fusion and sharding are unknown; the behaviour of
most families is assumed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch

from quantkit import registry
from quantkit.checkpoint.encoding import FP8
from quantkit.checkpoint.hf_config import (
    find_text_key,
    get_auto_class,
    get_text_config,
    has_language_model,
    hide_warnings,
    make_hf_config,
)
from quantkit.contracts import Config, TensorSpec
from quantkit.errors import CheckpointError, UsageError
from quantkit.io.files import make_config_error
from quantkit.io.suggestions import format_unknown_name
from quantkit.models.text_part import leave_out_parts
from quantkit.serve.sizing.attention import read_attention
from quantkit.serve.sizing.group_sizes import get_split_unit
from quantkit.serve.sizing.model import (
    Attention,
    Layer,
    Model,
    MoeConfig,
    ReadFrom,
    ShardingConstraint,
    Weights,
)

BLOCK = re.compile(r"\.(?:layers|h|blocks|block)\.(\d+)\.")
OTHER_MODALITY = re.compile(r"vision|visual|audio|image|speech")
EXPERTS = re.compile(r"\bexperts\b")
KEYS_VALUES = re.compile(r"\b(?:k_proj|v_proj|key|value|k_lin|v_lin)\.weight$")
FUSED = re.compile(r"\b(?:qkv_proj|query_key_value|c_attn|Wqkv|qkv|att_proj|in_proj)\.weight$")
EMBEDDING = re.compile(r"\b(?:embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\b")

ALIASES: Mapping[str, tuple[str, ...]] = {
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"),
    "width": ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size"),
}
KEYS = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "sliding_window", "layer_types", "attention_chunk_size", "kv_lora_rank", "qk_rope_head_dim",
    "qk_nope_head_dim", "v_head_dim", "max_position_embeddings", "vocab_size", "intermediate_size",
)  # fmt: skip
"""Names that transformers' configurations share over all families, whatever config.json has."""

Component = int | str  # a layer, "embedding", "head" or "other"; routed experts are separate


def size_with_transformers(
    config: Config,
    name: str,
    read_from: ReadFrom,
    scheme: str,
    specs: Iterable[TensorSpec] | None = None,
) -> Model:
    """Make the model of a family without a table.

    specs: its stored tensors; by default those that transformers would create.

    Raises UsageError for a model type that transformers does not know, CheckpointError for a model
    that cannot be sized.
    """
    hf_config, meta_model = make_meta_model(config)
    parameters = {label: p.shape for label, p in meta_model.named_parameters()}
    values = {"model_type": hf_config.model_type, **read_config_values(hf_config)}
    plain = Config(values=values, where=config.where)
    if not plain.has("num_attention_heads"):
        raise CheckpointError(
            f"{config.where}: num_attention_heads: expected a model with attention, whose cache "
            f"size is known, found {hf_config.model_type}, which has none; size this model with "
            "its engine"
        )
    attention = tuple(
        measure_attention(plain, kind, n, parameters)
        for n, kind in enumerate(read_attention(plain))
    )
    if specs is None and any(map(OTHER_MODALITY.search, config.values)):
        scheme += " (language model only)"
    stored = make_specs(parameters) if specs is None else list(specs)
    sums = sum_weights(parameters, stored, len(attention))
    num_moe_layers = sum((layer, True) in sums for layer in range(len(attention)))
    moe = read_moe_config(hf_config, num_moe_layers)
    hidden_size = plain.integer("hidden_size")
    return Model(
        name=name,
        read_from=read_from,
        model_type=hf_config.model_type,
        config=plain,
        scheme=scheme,
        layers=tuple(
            Layer(attention=kind, dense=sums[n, False], routed=sums[n, True])
            for n, kind in enumerate(attention)
        ),
        embedding=sums["embedding", False],
        head=sums["head", False],
        other=sums["other", False],
        mtp=Weights(),
        moe=moe,
        sharding_constraints=tuple(
            iterate_sharding_constraints(plain, moe, attention[0], get_split_unit(config))
        ),
        hidden_size=hidden_size,
        max_intermediate_size=plain.integer("intermediate_size", 4 * hidden_size),
        vocab_size=plain.integer("vocab_size"),
        max_context=plain.integer("max_position_embeddings", 0) or None,
    )


def make_specs(parameters: Mapping[str, Sequence[int]]) -> list[TensorSpec]:
    """Return the tensors that transformers would create, in BF16."""
    return [
        TensorSpec(name=name, dtype="BF16", shape=tuple(shape))
        for name, shape in parameters.items()
    ]


def make_meta_model(config: Config) -> tuple[Any, Any]:
    """Return transformers' configuration of the language model, and the model on meta.

    In a wrapper the language model is a part.
    """
    model_type = str(config.values.get("model_type"))
    if not has_language_model(model_type):
        families = registry.list_names("architectures")
        raise UsageError(
            f"{config.where}: model_type: {format_unknown_name('family', model_type, families)} "
            "transformers has no language model of that type either"
        )
    hf_config = make_hf_config(config)
    try:
        with torch.device("meta"), hide_warnings():
            # a config may name a kernel of the Hub, which transformers would load
            model = get_auto_class(hf_config).from_config(
                hf_config, dtype=torch.bfloat16, attn_implementation="eager"
            )
        if find_text_key(model.config):
            leave_out_parts(model)
        return get_text_config(hf_config), model
    except Exception as fault:
        raise make_config_error(config.where, model_type, fault) from fault


def measure_attention(
    config: Config, attention: Attention, layer: int, parameters: Mapping[str, Sequence[int]]
) -> Attention:
    """Return the attention of a layer with KV sizes from its projections' shapes.

    Families name their KV heads in many ways, or not at all. Raises CheckpointError if no
    projection has a known name.
    """
    if attention.kind == "latent":
        return attention
    hidden_size = config.integer("hidden_size")
    own = [name for name in parameters if get_component(name, layer + 1) == (layer, False)]
    outputs = {
        name: prod(parameters[name]) // hidden_size for name in own if len(parameters[name]) == 2
    }
    separate = [size for name, size in outputs.items() if KEYS_VALUES.search(name)]
    fused = [size for name, size in outputs.items() if FUSED.search(name)]
    if len(separate) == 2:
        elements = sum(separate)
    elif len(fused) == 1:
        elements = fused[0] - attention.heads * attention.qk_head_dim
    else:
        raise CheckpointError(
            f"{config.where}: layer {layer}: expected projections of keys and values, found none "
            "with a known name; size this model with its engine"
        )
    kv_heads = max(1, elements // (attention.qk_head_dim + attention.v_head_dim))
    return replace(attention, kv_elements=elements, kv_heads=kv_heads)


def read_config_values(hf_config: Any) -> dict[str, object]:
    """Return the configuration under the names that all families share, without absent ones."""
    values = {key: read_key(hf_config, key) for key in KEYS}
    return {key: value for key, value in values.items() if value is not None}


def read_key(hf_config: Any, key: str) -> object:
    """Return a value of a configuration; None if it has none, or one for each layer."""
    try:
        return getattr(hf_config, key, None)
    except RuntimeError:  # transformers' own for a value that layers do not share
        return None


def sum_weights(
    parameters: Mapping[str, Sequence[int]], stored: Iterable[TensorSpec], num_layers: int
) -> defaultdict[tuple[Component, bool], Weights]:
    """Sum weights by (component, is routed expert).

    Parameters are counted as in transformers, bytes as they are stored.
    """
    sums = defaultdict[tuple[Component, bool], Weights](Weights)
    for name, shape in parameters.items():
        sums[get_component(name, num_layers)] += Weights(parameters=prod(shape))
    for spec in stored:
        is_sharded = len(spec.shape) > 1 and not is_router(spec.name)
        fp8 = spec.n_elements if spec.dtype == FP8 else 0
        weights = (
            Weights(sharded=spec.n_bytes, fp8_parameters=fp8)
            if is_sharded
            else Weights(replicated=spec.n_bytes)
        )
        sums[get_component(spec.name, num_layers)] += weights
    return sums


def get_component(name: str, num_layers: int) -> tuple[Component, bool]:
    """Return the component of a tensor, and whether it belongs to routed experts."""
    block = BLOCK.search(f".{name}")
    if OTHER_MODALITY.search(name):
        return "other", False
    if block and int(block[1]) < num_layers:
        return int(block[1]), EXPERTS.search(name) is not None
    if EMBEDDING.search(name):
        return "embedding", False
    return ("head" if "lm_head" in name or "embed_out" in name else "other"), False


def is_router(name: str) -> bool:
    """Return whether a tensor is the gate that selects experts, which every rank holds."""
    return re.search(r"\b(?:router|gate)\.(?:weight|wg\.weight|bias)$", name) is not None


def read_moe_config(hf_config: Any, num_layers: int) -> MoeConfig | None:
    """Return the routed experts; None if no tensor belongs to them."""
    if not num_layers:
        return None
    values = {
        name: next(
            (v for key in keys if isinstance(v := getattr(hf_config, key, None), int) and v > 0),
            None,
        )
        for name, keys in ALIASES.items()
    }
    num_experts, top_k, width = values["experts"], values["top_k"], values["width"]
    if num_experts is None or top_k is None or width is None:
        raise CheckpointError(
            f"{hf_config.model_type}: expected number, top k and width of its experts under known "
            "names, found others; size this model with its engine"
        )
    return MoeConfig(
        num_experts=num_experts, top_k=top_k, intermediate_size=width, num_layers=num_layers
    )


def iterate_sharding_constraints(
    config: Config, moe: MoeConfig | None, attention: Attention, group: int
) -> Iterator[ShardingConstraint]:
    """Yield the sizes that ranks split, as far as the config has them."""
    yield ShardingConstraint(name="attention heads", size=attention.heads)
    if config.has("intermediate_size"):
        yield ShardingConstraint(
            name="MLP width", size=config.integer("intermediate_size"), unit=group
        )
    if moe:
        yield ShardingConstraint(name="expert width", size=moe.intermediate_size, unit=group)
