"""Serving engines: their commands, and module names as they know them, merged linears and layers in one pattern."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

SERVERS: Mapping[str, str] = {
    "vLLM": "vllm serve {path}",
    "SGLang": "python -m sglang.launch_server --model-path {path}",
}
TRANSFORMERS: Mapping[str, str] = {"transformers": "transformers serve {path}"}
"""Engine -> the exact command that serves an artifact, as Format.engines has it."""

DISABLE_SHARED_FUSION = "--disable-shared-experts-fusion"
"""What SGLang must be told where shared and routed experts are stored `apart`: it counts them among one another."""

LM_HEAD = "lm_head"
"""A model's head. Tied to the embedding it has no tensor, and loaders take it for a linear all the same: an artifact's
config names it among those that are not quantized."""

FUSED_MODULES: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""Modules that engines make of several at load. SGLang looks for their own names among those left unquantized."""


def expand_fused_names(modules: Sequence[str]) -> list[str]:
    """Names under which engines know these modules: their own, and those of the fused modules they end up in."""
    found = dict.fromkeys(modules)
    for module in modules:
        parent, _, last = module.rpartition(".")
        found |= dict.fromkeys(
            f"{parent}.{fused}" for fused, members in FUSED_MODULES.items() if last in members
        )
    return list(found)


def lines(names: Sequence[str]) -> str:
    """Module names as one text, each between line breaks: 45,000 experts are searched at once."""
    return "\n".join(["", *names, ""])


def kept_patterns(quantized: Sequence[str], kept: Sequence[str]) -> list[str]:
    """Regular expressions that match every kept module, fused or not, from its name's start to its end, and no other.

    Each kept linear is named by its highest parent under which nothing is quantized: r"model\\.layers\\.0(\\..*)?$".
    Parents that differ in the layer's number only share one expression. A module alone is its escaped name and "$".
    """
    busy = {parent for name in expand_fused_names(quantized) for parent in parents(name)}
    found: dict[tuple[str, str, str], dict[str, None]] = {}
    for name in expand_fused_names(kept):
        entry = next((parent for parent in parents(name) if parent not in busy), name)
        before, layer, after = split_layer(entry)
        tail = "$" if entry == name else r"(\..*)?$"
        found.setdefault((re.escape(before), re.escape(after), tail), {})[layer] = None
    return [
        before + either(list(layers)) + after + tail
        for (before, after, tail), layers in found.items()
    ]


def parents(name: str) -> list[str]:
    """The modules that hold this one, the highest first: "a.b.c" is in "a" and "a.b"."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def split_layer(name: str) -> tuple[str, str, str]:
    """("model.layers.", "3", ".mlp.gate"): around the first number; without one, the name and two empty texts."""
    found = re.search(r"(?<=\.)\d+(?=\.|$)", name)
    return (name[: found.start()], found[0], name[found.end() :]) if found else (name, "", "")


def either(layers: Sequence[str]) -> str:
    """One layer's number, or "(0|1|2)" for any of several."""
    return layers[0] if len(layers) == 1 else f"({'|'.join(layers)})"


def has_separate_shared_experts(names: Iterable[str]) -> bool:
    """Whether a layer's shared experts are stored in other tensors than its routed ones, as SGLang would fuse them."""
    kinds: dict[tuple[str, bool], set[str]] = {}
    for name in names:
        layer, found, rest = name.partition(".mlp.shared_experts.")
        if found:
            kinds.setdefault((layer, True), set()).add(rest)
            continue
        layer, found, rest = name.partition(".mlp.experts.0.")
        if found:
            kinds.setdefault((layer, False), set()).add(rest)
    return any(
        kinds.get((layer, False), rest) != rest for (layer, shared), rest in kinds.items() if shared
    )
