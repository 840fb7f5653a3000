"""The parameters of an engine's model, as a table of slots with sizes from config.json. Pure.

Engines join linears: `qkv_proj` holds q_proj, k_proj and v_proj, `experts.w13` the gate and up
projections of all experts. A slot is a module of the engine's layer; its parts are modules of the
checkpoint, next to it in the tree. Sizes are sums of products: "kv_rank + rope", "heads * head".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from quantkit.contracts import Config
from quantkit.errors import CheckpointError

Layers = Literal["all", "dense", "sparse"]


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A module of an engine's model, and the modules of the checkpoint that it holds.

    parts: module of the checkpoint -> rows; inputs: columns, "" for a vector; bias: "always", or
    the flag of config.json; when: a key that must be set ("key"), must not ("no key") or must have
    a value ("key=value"); layers: of which kind; each: number of experts; local: the tensor's name
    in the module.
    """

    name: str
    parts: Mapping[str, str]
    inputs: str = ""
    bias: str = ""
    when: str = ""
    layers: Layers = "all"
    each: str = ""
    local: str = "weight"


@dataclass(frozen=True, kw_only=True)
class ModelMap:
    """How an engine loads one class of models.

    layer: slots of a layer; sparse: the rule by which a layer has experts, "" for none; experts,
    moe: keys of config.json with the number and the width of experts.
    """

    layer: tuple[Slot, ...]
    sparse: Literal["", "all", "first_k_dense_replace", "decoder_sparse_step"] = ""
    experts: str = ""
    moe: str = "moe_intermediate_size"


@dataclass(frozen=True, kw_only=True)
class WrapperMap:
    """How an engine loads a model with parts around its text model.

    text: the map of the text model; prefixes: of the checkpoint -> of the engine, the first match
    counts; parts: prefixes of the engine whose tensors are its own.
    """

    text: ModelMap
    prefixes: Mapping[str, str]
    parts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class EngineMaps:
    """The maps of an engine's version: class of config.json -> its file in the engine, and its map.

    file: "llama.py", the file of the engine where the table was read.
    """

    engine: str
    version: str
    models: Mapping[str, tuple[str, ModelMap | WrapperMap]]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """Where a tensor of a checkpoint goes: rows, columns (None: a vector); bias: it has one, too.

    engine: the module of the engine.
    """

    engine: str
    rows: int
    columns: int | None
    bias: bool


SIZES: Mapping[str, Callable[[Config], int]] = {
    "hidden": lambda c: c.integer("hidden_size"),
    "vocab": lambda c: c.integer("vocab_size"),
    "heads": lambda c: c.integer("num_attention_heads"),
    "kv_heads": lambda c: c.integer("num_key_value_heads", c.integer("num_attention_heads")),
    "head": lambda c: c.integer("head_dim", find_head_size(c)),
    "mlp": lambda c: c.integer("intermediate_size"),
    "shared_mlp": lambda c: c.integer("shared_expert_intermediate_size"),
    "shared_experts": lambda c: c.integer("n_shared_experts", 0),
    "q_rank": lambda c: c.integer("q_lora_rank"),
    "kv_rank": lambda c: c.integer("kv_lora_rank"),
    "nope": lambda c: c.integer("qk_nope_head_dim"),
    "rope": lambda c: c.integer("qk_rope_head_dim"),
    "value": lambda c: c.integer("v_head_dim"),
}
"""Name in a table -> its value."""


def find_head_size(config: Config) -> int:
    """Return the width of a head if config.json does not state it."""
    heads = config.integer("num_attention_heads")
    if not heads:
        raise CheckpointError(f"{config.where}: num_attention_heads: expected 1 or more, found 0")
    return config.integer("hidden_size") // heads


def compute_size(text: str, config: Config, model: ModelMap) -> int:
    """Return the value of a sum of products of names and numbers."""
    total = 0
    for term in text.split("+"):
        product = 1
        for factor in (name.strip() for name in term.split("*")):
            if factor.isdecimal():
                product *= int(factor)
            elif factor == "experts":
                product *= config.integer(model.experts)
            elif factor == "moe":
                product *= config.integer(model.moe)
            else:
                product *= SIZES[factor](config)
        total += product
    return total


def list_parameters(
    model: ModelMap, config: Config, prefix: str = "model.", head: str = "lm_head"
) -> dict[str, Parameter]:
    """Return tensor of the checkpoint, with the engine's prefixes, -> its parameter.

    Biases are part of the weight's parameter; a tied head is none. Raises CheckpointError for a
    size that config.json lacks.
    """
    vocab, hidden = (compute_size(name, config, model) for name in ("vocab", "hidden"))
    table = Parameter(engine=f"{prefix}embed_tokens", rows=vocab, columns=hidden, bias=False)
    norm = Parameter(engine=f"{prefix}norm", rows=hidden, columns=None, bias=False)
    parameters = {f"{x.engine}.weight": x for x in (table, norm)}
    if not config.flag("tie_word_embeddings", False):
        parameters[f"{head}.weight"] = replace(table, engine=head)
    for layer in range(config.integer("num_hidden_layers")):
        kind = find_kind(model, config, layer)
        for slot in model.layer:
            if slot.layers in ("all", kind) and is_present(slot, config):
                parameters |= dict(list_parts(slot, config, model, f"{prefix}layers.{layer}."))
    return parameters


def find_kind(model: ModelMap, config: Config, layer: int) -> Layers:
    """Return whether a layer has experts."""
    if model.sparse == "all":
        return "sparse"
    if model.sparse == "first_k_dense_replace":
        is_sparse = layer >= config.integer("first_k_dense_replace", 0)
        return (
            "sparse" if is_sparse and layer % config.integer("moe_layer_freq", 1) == 0 else "dense"
        )
    if model.sparse == "decoder_sparse_step":
        listed = config.values.get("mlp_only_layers") or ()
        is_dense = isinstance(listed, (list, tuple)) and layer in listed
        step = config.integer("decoder_sparse_step", 1)
        return "sparse" if not is_dense and step and (layer + 1) % step == 0 else "dense"
    return "dense"


def is_present(slot: Slot, config: Config) -> bool:
    """Return whether the engine makes a slot for this config.json: its key is set and not false."""
    key = slot.when.removeprefix("no ")
    if not key:
        return True
    name, _, value = key.partition("=")
    stated = config.values.get(name)
    is_set = str(stated) == value if value else stated not in (None, False, 0)
    return is_set != slot.when.startswith("no ")


def list_parts(
    slot: Slot, config: Config, model: ModelMap, layer: str
) -> Iterator[tuple[str, Parameter]]:
    """Yield the tensors of the checkpoint that a slot holds, in a layer or for each expert."""
    parent = slot.name.rpartition(".")[0]
    columns = compute_size(slot.inputs, config, model) if slot.inputs else None
    bias = slot.bias == "always" or (bool(slot.bias) and config.flag(slot.bias))
    for part, size in slot.parts.items():
        parameter = Parameter(
            engine=layer + slot.name,
            rows=compute_size(size, config, model),
            columns=columns,
            bias=bias,
        )
        inside = [f"{parent}."] if parent else [""]
        if slot.each:
            inside = [f"{parent}.{i}." for i in range(compute_size(slot.each, config, model))]
        for place in inside:
            yield f"{layer}{place}{part}.{slot.local}", parameter
