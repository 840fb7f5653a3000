"""The small random instance of a configuration, on which a derived layout is checked.

It has all blocks of the real model and every switch of its config.json, with small widths and few
experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.hf_config import find_text_key, get_auto_class
from quantkit.contracts import Config
from quantkit.models.expert_form import is_experts_module, read_form
from quantkit.models.layers import MetaModel

WINDOW = 8
VOCABULARY = 96
EXPERTS = 16
"""Experts of a block, rounded up to whole groups of the router."""
EXPERT_WIDTH = 48
"""Inner width of experts: all blocks are in memory at once."""
EXPERT_COUNTS = (
    "num_experts",
    "n_routed_experts",
    "num_local_experts",
    "moe_num_experts",
    "moe_num_primary_experts",
)
EXPERT_WIDTHS = (
    "moe_intermediate_size",
    "expert_ffn_hidden_size",
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "shared_intermediate_size",
    "expert_hidden_dim",
    "intermediate_size_mlp",
    "dense_intermediate_size",
)


def reduce_config(config: Config, meta_model: MetaModel) -> Config:
    """Return the configuration with few heads and experts, small widths, vocabulary and window.

    That of a wrapper is the same but for its text model.
    """
    hf_config = meta_model.config
    heads, hidden = read_size(hf_config, "num_attention_heads") or 1, hf_config.hidden_size
    kv_heads = count_kv_heads(hf_config)
    width = read_size(hf_config, "head_dim") or hidden // heads
    n_kv_heads = min(kv_heads, 2)
    n_heads = n_kv_heads * min(heads // kv_heads, 2)
    small_hidden = n_heads * width + (0 if hidden == heads * width else 64)
    sizes = {
        "hidden_size": small_hidden,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "num_kv_heads": n_kv_heads,
        "intermediate_size": small_hidden + 32,
        "vocab_size": VOCABULARY,
        "sliding_window": WINDOW,
        "attention_chunk_size": WINDOW,
        "word_embed_proj_dim": small_hidden,
    }
    names = {key: hf_config.attribute_map.get(key, key) for key in sizes}
    changes: dict[str, object] = {
        names[key]: value for key, value in sizes.items() if read_size(hf_config, key) is not None
    }
    changes |= reduce_state_space(hf_config)
    changes |= reduce_experts(hf_config, meta_model.model)
    changes |= reduce_linear_attention(config, hf_config)
    changes |= reduce_nested(hf_config, n_kv_heads)
    tokens: dict[str, int | None] = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1}
    key = find_text_key(meta_model.full_config)
    if key is None:
        return Config(values={**config.values, **changes, **tokens}, where=config.where)
    whole = meta_model.full_config.to_dict()
    if hf_config.pad_token_id is not None:  # some wrappers put it in the place of images
        tokens["pad_token_id"] = 0
    values = {**whole, key: {**whole[key], **changes, **tokens}}
    return Config(values=values, where=config.where)


def reduce_experts(hf_config: Any, model: Any) -> dict[str, int]:
    """Return a small number of experts, and small inner widths."""
    changes = {}
    counts, widths = count_experts(model), list_expert_widths(model)
    if read_size(hf_config, "intermediate_size") in widths:
        key = hf_config.attribute_map.get("intermediate_size", "intermediate_size")
        changes[key] = EXPERT_WIDTH
    for key in EXPERT_COUNTS:
        groups = read_size(hf_config, "n_group") or read_size(hf_config, "num_expert_group") or 1
        size, few = read_size(hf_config, key), -(-EXPERTS // groups) * groups
        if size is not None and size in counts and size > few:
            changes[hf_config.attribute_map.get(key, key)] = few
    for key in EXPERT_WIDTHS:
        size = read_size(hf_config, key) if counts else None
        if size:
            changes[hf_config.attribute_map.get(key, key)] = EXPERT_WIDTH
    return changes


def reduce_nested(hf_config: Any, n_kv_heads: int) -> dict[str, object]:
    """Return the nested configurations of DBRX with few heads of keys and experts."""
    attention: Any = getattr(hf_config, "attn_config", None)
    experts: Any = getattr(hf_config, "ffn_config", None)
    if not hasattr(attention, "kv_n_heads") or not hasattr(experts, "moe_num_experts"):
        return {}
    count, width = min(EXPERTS, experts.moe_num_experts), EXPERT_WIDTH
    changes = {"moe_num_experts": count, "ffn_hidden_size": width}
    return {
        "attn_config": {**attention.to_dict(), "kv_n_heads": n_kv_heads},
        "ffn_config": {**experts.to_dict(), **changes},
    }


def reduce_linear_attention(config: Config, hf_config: Any) -> dict[str, object]:
    """Return few heads of linear attention, whose reference code loops over tokens."""
    changes: dict[str, object] = {}
    keys, values = (read_size(hf_config, f"linear_num_{x}_heads") for x in ("key", "value"))
    if keys and values and values % keys == 0:
        changes = {"linear_num_key_heads": 2, "linear_num_value_heads": 2 * (values // keys)}
    if read_size(hf_config, "linear_num_heads") and read_size(hf_config, "linear_head_dim"):
        changes |= {"linear_num_heads": 3, "linear_head_dim": 16}
        nested = config.values.get("linear_attn_config")  # where published configs have them
        if isinstance(nested, dict):
            changes["linear_attn_config"] = {**nested, "num_heads": 3, "head_dim": 16}
    return changes


def list_expert_widths(model: Any) -> frozenset[int]:
    """Return the inner widths of the experts of a model's blocks."""
    widths = set[int]()
    for module in model.modules():
        form = read_form(module) if is_experts_module(module) else None
        if form is not None:
            widths.add(form.intermediate)
    return frozenset(widths)


def count_experts(model: Any) -> frozenset[int]:
    """Return the numbers of experts of a model's blocks."""
    modules = (module for module in model.modules() if is_experts_module(module))
    return frozenset(
        form.count if (form := read_form(x)) else len(next(iter(x._parameters.values())))
        for x in modules
    )


def reduce_state_space(hf_config: Any) -> dict[str, int]:
    """Return small widths of a model of state spaces alone, whose heads must fit its width."""
    keys = ("expand", "num_heads", "head_dim", "n_groups")
    sizes = {key: size for key in keys if (size := read_size(hf_config, key))}
    if len(sizes) < len(keys) or read_size(hf_config, "num_attention_heads"):
        return {}
    count = max(2, sizes["n_groups"])
    return {"num_heads": sizes["expand"] * count, "hidden_size": sizes["head_dim"] * count}


def count_kv_heads(hf_config: Any) -> int:
    """Return the key/value heads of a configuration: as many as heads if it has no key for them."""
    sizes = (read_size(hf_config, key) for key in ("num_key_value_heads", "num_kv_heads"))
    return next(filter(None, sizes), read_size(hf_config, "num_attention_heads") or 1)


def read_size(hf_config: Any, key: str) -> int | None:
    """Return an integer of a configuration; None if it has none, or one for each layer."""
    try:
        value = getattr(hf_config, key, None)
    except RuntimeError:  # transformers' own for a value that layers do not share
        return None
    return value if isinstance(value, int) else None


def make_random_tensors(meta_model: MetaModel) -> dict[str, Tensor]:
    """Return random tensors by their names in transformers' model: matrices that keep their input's
    scale, norms around 1, biases.
    """
    generator = torch.Generator().manual_seed(0)
    tensors, integers = {}, make_integers(meta_model)
    for name, tensor in meta_model.model.state_dict().items():
        if name in integers:
            tensors[name] = integers[name]
            continue
        value = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() > 1:
            tensors[name] = value * tensor.shape[-1] ** -0.5
        else:
            tensors[name] = 0.1 * value + (0 if name.endswith(".bias") else 1)
    return tensors


def make_integers(meta_model: MetaModel) -> dict[str, Tensor]:
    """Return the integer tensors of the instance by name: those that transformers computes, such as
    multipliers of a hash; in the place of zeros, numbers of experts for each token id.
    """
    names = [x for x, y in meta_model.model.state_dict().items() if not y.is_floating_point()]
    if not names:
        return {}
    model = get_auto_class(meta_model.full_config).from_config(meta_model.full_config)
    state = model.state_dict()
    generator = torch.Generator().manual_seed(6)
    count = min(count_experts(meta_model.model), default=2)
    result = {}
    for name in names:
        value = state[name]
        if not value.any():
            first = torch.randint(0, count, (*value.shape[:-1], 1), generator=generator)
            value = (first + torch.arange(value.shape[-1])).remainder(count).to(value.dtype)
        result[name] = value
    return result
