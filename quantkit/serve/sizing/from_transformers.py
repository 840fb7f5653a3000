"""Families without a table of their own, sized by transformers' modules on the meta device and the names of tensors.

Slower than a table by seconds. Of what engines merge, cut or repeat nothing is known here but what most families do.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from quantkit import registry
from quantkit.checkpoint.fp8_pairs import FP8
from quantkit.contracts import Config, TensorSpec
from quantkit.errors import CheckpointError, UsageError
from quantkit.io.files import make_config_error
from quantkit.io.suggestions import format_unknown_name
from quantkit.serve.sizing.attention import attentions
from quantkit.serve.sizing.model import (
    Attention,
    Layer,
    Mixture,
    Model,
    ReadFrom,
    ShardingConstraint,
    Weights,
)

BLOCK = re.compile(r"\.(?:layers|h|blocks|block)\.(\d+)\.")
APART = re.compile(r"vision|visual|audio|image|speech")
EXPERTS = re.compile(r"\bexperts\b")
KEYS_VALUES = re.compile(r"\b(?:k_proj|v_proj|key|value|k_lin|v_lin)\.weight$")
FUSED = re.compile(r"\b(?:qkv_proj|query_key_value|c_attn|Wqkv|qkv|att_proj|in_proj)\.weight$")
EMBEDDING = re.compile(r"\b(?:embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\b")

MOST_LAYERS = 10_000  # no model has more; transformers would make modules for hours

ALIASES: Mapping[str, tuple[str, ...]] = {
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"),
    "width": ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size"),
}
KEYS = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window",
    "layer_types", "attention_chunk_size", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim",
    "max_position_embeddings", "vocab_size", "intermediate_size",
)  # fmt: skip
"""What transformers calls alike in all families, whatever their config.json does."""

Place = int | str  # a layer, "embedding", "head" or "outside"; routed experts apart


def stranger(
    config: Config,
    name: str,
    read_from: ReadFrom,
    scheme: str,
    specs: Iterable[TensorSpec] | None = None,
) -> Model:
    """The model of a family without a table; `specs`: its stored tensors, else those that transformers would make.

    Raises UsageError for a model type that transformers does not know, CheckpointError for what cannot be sized.
    """
    known, model = built(config)
    parameters = {label: p.shape for label, p in model.named_parameters()}
    plain = Config(values={"model_type": known.model_type, **values_of(known)}, where=config.where)
    if not plain.has("num_attention_heads"):
        raise CheckpointError(
            f"{config.where}: num_attention_heads: expected a model with attention, whose cache is known here, found "
            f"{known.model_type}, which has none; size this model with its engine"
        )
    kinds = tuple(as_built(plain, kind, n, parameters) for n, kind in enumerate(attentions(plain)))
    if specs is None:
        scheme += " (the language model alone)" if any(map(APART.search, config.values)) else ""
        stored = [
            TensorSpec(name=label, dtype="BF16", shape=tuple(shape))
            for label, shape in parameters.items()
        ]
    else:
        stored = list(specs)
    sums = summed(parameters, stored, len(kinds))
    mixture = mixture_of(known, sum((count, True) in sums for count in range(len(kinds))))
    return Model(
        name=name,
        read_from=read_from,
        model_type=known.model_type,
        config=plain,
        scheme=scheme,
        layers=tuple(
            Layer(attention=attention, dense=sums[n, False], routed=sums[n, True])
            for n, attention in enumerate(kinds)
        ),
        embedding=sums["embedding", False],
        head=sums["head", False],
        outside=sums["outside", False],
        mtp=Weights(),
        mixture=mixture,
        divisions=tuple(divisions(plain, mixture, kinds[0], group_of(config))),
        hidden=plain.integer("hidden_size"),
        widest=plain.integer("intermediate_size", 4 * plain.integer("hidden_size")),
        vocabulary=plain.integer("vocab_size"),
        longest=plain.integer("max_position_embeddings")
        if plain.has("max_position_embeddings")
        else None,
    )


def built(config: Config) -> tuple[Any, Any]:
    """transformers' configuration, of the language model where there are others beside it, and its model, empty."""
    values = {
        key: value
        for key, value in config.values.items()
        if key not in {"quantization_config", "auto_map"}
    }
    inner = values.get("text_config")
    if isinstance(inner, dict) and isinstance(inner.get("model_type"), str):
        values = inner
    model_type = str(values.get("model_type"))
    if model_type not in CONFIG_MAPPING or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UsageError(
            f"{config.where}: model_type: {format_unknown_name('family', model_type, registry.list_names('architectures'))} "
            "transformers has no language model of that type either"
        )
    for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        count = values.get(key)
        if isinstance(count, int) and count > MOST_LAYERS:
            raise CheckpointError(
                f"{config.where}: {key}: expected at most {MOST_LAYERS:,}, found {count:,}; repair it"
            )
    try:
        known = CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(values))
        with torch.device("meta"):
            return known, AutoModelForCausalLM.from_config(known, dtype=torch.bfloat16)
    except Exception as fault:
        raise make_config_error(config.where, model_type, fault) from fault


def as_built(
    config: Config, attention: Attention, layer: int, parameters: Mapping[str, Sequence[int]]
) -> Attention:
    """The attention of a layer as its projections are: families name their KV heads in many ways, or not at all.

    Raises CheckpointError where no projection tells what is kept of a token.
    """
    if attention.kind == "latent":
        return attention
    hidden, own = (
        config.integer("hidden_size"),
        [n for n in parameters if place_of(n, layer + 1) == (layer, False)],
    )
    out = {name: prod(parameters[name]) // hidden for name in own if len(parameters[name]) == 2}
    keys = [size for name, size in out.items() if KEYS_VALUES.search(name)]
    fused = [size for name, size in out.items() if FUSED.search(name)]
    if len(keys) == 2:
        elements = sum(keys)
    elif len(fused) == 1:
        elements = fused[0] - attention.heads * attention.qk_width
    else:
        raise CheckpointError(
            f"{config.where}: layer {layer}: expected projections of keys and values, found none under a name known "
            "here; size this model with its engine"
        )
    kv_heads = max(1, elements // (attention.qk_width + attention.v_width))
    return replace(attention, elements=elements, kv_heads=kv_heads)


def values_of(known: Any) -> dict[str, object]:
    """The configuration under the names that all families share; absent ones are left out."""
    found = {key: getattr(known, key, None) for key in KEYS}
    return {key: value for key, value in found.items() if value is not None}


def summed(
    parameters: Mapping[str, Sequence[int]], stored: Iterable[TensorSpec], layers: int
) -> defaultdict[tuple[Place, bool], Weights]:
    """Weights by place, routed experts apart: parameters as transformers counts them, bytes as they are stored."""
    sums = defaultdict[tuple[Place, bool], Weights](Weights)
    for name, shape in parameters.items():
        sums[place_of(name, layers)] += Weights(parameters=prod(shape))
    for spec in stored:
        cut = len(spec.shape) > 1 and not is_router(spec.name)
        fp8 = spec.n_elements if spec.dtype == FP8 else 0
        size = (
            Weights(divided=spec.n_bytes, fp8_parameters=fp8)
            if cut
            else Weights(copied=spec.n_bytes)
        )
        sums[place_of(spec.name, layers)] += size
    return sums


def place_of(name: str, layers: int) -> tuple[Place, bool]:
    """Where a tensor belongs, and whether it is of routed experts."""
    found = BLOCK.search(f".{name}")
    if APART.search(name):
        return "outside", False
    if found and int(found[1]) < layers:
        return int(found[1]), EXPERTS.search(name) is not None
    if EMBEDDING.search(name):
        return "embedding", False
    return ("head" if "lm_head" in name or "embed_out" in name else "outside"), False


def is_router(name: str) -> bool:
    """Whether a tensor is the gate that picks experts, which every rank holds."""
    return re.search(r"\b(?:router|gate)\.(?:weight|wg\.weight|bias)$", name) is not None


def mixture_of(known: Any, layers: int) -> Mixture | None:
    """The routed experts; None where no tensor is one of them."""
    if not layers:
        return None
    found = {
        name: next(
            (v for key in keys if isinstance(v := getattr(known, key, None), int) and v > 0), None
        )
        for name, keys in ALIASES.items()
    }
    count, top_k, width = found["experts"], found["top_k"], found["width"]
    if count is None or top_k is None or width is None:
        raise CheckpointError(
            f"{known.model_type}: the number, choice and width of its experts are not under names known here; "
            "size this model with its engine"
        )
    return Mixture(count=count, top_k=top_k, intermediate=width, layers=layers)


def group_of(config: Config) -> int:
    """Weights that one scale is shared by, along what tensor parallelism cuts; 1 where nothing is quantized."""
    entry = config.values.get("quantization_config")
    size = entry.get("group_size") if isinstance(entry, Mapping) else None
    return size if isinstance(size, int) and size > 0 else 1


def divisions(
    config: Config, mixture: Mixture | None, attention: Attention, group: int
) -> Iterator[ShardingConstraint]:
    """What ranks share, as far as the config says."""
    yield ShardingConstraint(what="attention heads", size=attention.heads)
    if config.has("intermediate_size"):
        yield ShardingConstraint(
            what="MLP width", size=config.integer("intermediate_size"), unit=group
        )
    if mixture:
        yield ShardingConstraint(what="experts' width", size=mixture.intermediate, unit=group)
