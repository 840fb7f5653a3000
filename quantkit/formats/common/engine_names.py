"""Serving engines: their commands, and module names as engines know them.

Engines merge linears into fused modules, and a pattern of theirs can cover several layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

SERVERS: Mapping[str, str] = {
    "vLLM": "vllm serve {path}",
    "SGLang": "python -m sglang.launch_server --model-path {path}",
}
TRANSFORMERS: Mapping[str, str] = {"transformers": "transformers serve {path}"}
"""Engine -> the exact command that serves an artifact, as in Format.engines."""

TRIED: Mapping[str, tuple[str, frozenset[str]]] = {
    "vLLM": ("0.32.0 on a CPU", frozenset({"awq", "gptq", "compressed_tensors"})),
    "transformers": ("5.23.0", frozenset({"dense", "compressed_tensors", "bitsandbytes"})),
    "GPTQModel": ("7.6.0", frozenset({"awq", "gptq", "gptq_v2"})),
    "quantkit.load": ("transformers 5.23.0", frozenset({"bitsandbytes"})),
}
"""Engine -> the version in which the project's tests load and run small models, and their formats.
"""

DISABLE_SHARED_FUSION = "--disable-shared-experts-fusion"
"""The option that SGLang needs if shared and routed experts are stored in different formats
(`has_separate_shared_experts`): by default it loads the shared expert as one more routed expert."""

LM_HEAD = "lm_head"
"""A model's head. Tied to the embedding it has no tensor, but transformers builds a linear for it:
an artifact's config always names it among the unquantized modules."""

FUSED_MODULES: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""Fused modules that engines build from several linears. SGLang looks up the fused names in lists
of unquantized modules."""


def expand_fused_names(modules: Sequence[str]) -> list[str]:
    """Return the modules' own names and those of the fused modules that contain them."""
    names = dict.fromkeys(modules)
    for module in modules:
        parent, _, last = module.rpartition(".")
        names |= dict.fromkeys(
            f"{parent}.{fused}" for fused, members in FUSED_MODULES.items() if last in members
        )
    return list(names)


def join_lines(names: Sequence[str]) -> str:
    """Join module names into one text with line breaks on both sides of each.

    One search covers 45,000 experts.
    """
    return "\n".join(["", *names, ""])


def make_patterns(others: Sequence[str], modules: Sequence[str]) -> list[str]:
    """Return regular expressions that match `modules`, fused or not, and none of the `others`.

    They match whole names. Each module is named by its highest parent without any of the others:
    r"model\\.layers\\.0(\\..*)?$". Parents that differ only in the number of the layer share one
    expression. A module without such a parent is its escaped name and "$".
    """
    busy = {parent for name in expand_fused_names(others) for parent in list_parents(name)}
    layers: dict[tuple[str, str, str], dict[str, None]] = {}
    for name in expand_fused_names(modules):
        entry = next((parent for parent in list_parents(name) if parent not in busy), name)
        before, layer, after = split_layer(entry)
        tail = "$" if entry == name else r"(\..*)?$"
        layers.setdefault((re.escape(before), re.escape(after), tail), {})[layer] = None
    return [
        before + format_layers(list(numbers)) + after + tail
        for (before, after, tail), numbers in layers.items()
    ]


def list_parents(name: str) -> list[str]:
    """Return the modules that contain this one, the highest first: "a", "a.b" for "a.b.c"."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def split_layer(name: str) -> tuple[str, str, str]:
    """Split a name around its first number: ("model.layers.", "3", ".mlp.gate").

    Without a number: the name and two empty texts.
    """
    match = re.search(r"(?<=\.)\d+(?=\.|$)", name)
    return (name[: match.start()], match[0], name[match.end() :]) if match else (name, "", "")


def format_layers(layers: Sequence[str]) -> str:
    """Return one layer's number, or "(0|1|2)" for several."""
    return layers[0] if len(layers) == 1 else f"({'|'.join(layers)})"


def has_separate_shared_experts(names: Iterable[str]) -> bool:
    """Return whether a layer's shared experts have other tensors than its routed experts.

    `names`: tensor names. SGLang cannot fuse such experts.
    """
    tensors: dict[tuple[str, bool], set[str]] = {}
    for name in names:
        layer, separator, rest = name.partition(".mlp.shared_experts.")
        if separator:
            tensors.setdefault((layer, True), set()).add(rest)
            continue
        layer, separator, rest = name.partition(".mlp.experts.0.")
        if separator:
            tensors.setdefault((layer, False), set()).add(rest)
    return any(
        tensors.get((layer, False), rest) != rest
        for (layer, is_shared), rest in tensors.items()
        if is_shared
    )
