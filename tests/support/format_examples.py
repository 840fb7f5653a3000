"""Linears and selections for tests of formats."""

from __future__ import annotations

from quantkit.contracts import Linear, Role


def make_linear(
    name: str = "model.layers.0.mlp.up_proj", out: int = 256, width: int = 256, role: Role = "mlp"
) -> Linear:
    return Linear(name=name, out_features=out, in_features=width, role=role)


def list_block_modules(layer: int, moe: bool, experts: int = 3) -> list[str]:
    """Return the names of a DeepSeek block's linears."""
    name = f"model.layers.{layer}"
    names = [
        f"{name}.self_attn.{x}"
        for x in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    ]
    gated = ("gate_proj", "up_proj", "down_proj")
    if not moe:
        return names + [f"{name}.mlp.{x}" for x in gated]
    names += [f"{name}.mlp.gate"] + [f"{name}.mlp.shared_experts.{x}" for x in gated]
    return names + [f"{name}.mlp.experts.{e}.{x}" for e in range(experts) for x in gated]


def list_model_modules(layers: int = 24, dense_layers: int = 3) -> list[str]:
    inner = [
        name for layer in range(layers) for name in list_block_modules(layer, layer >= dense_layers)
    ]
    return ["model.embed_tokens", *inner, "lm_head"]


SELECTIONS = {
    "experts only": r"\.experts\.",
    "all linears": r"self_attn|mlp\.(?!gate$)",
    "experts and shared": r"experts\.",
    "one layer": r"layers\.10\..*\.experts\.",
    "all but layer 1": r"layers\.(?!1\.)\d+\.(self_attn|mlp\.(?!gate$))",
    "all but layers 1 and 10": r"layers\.(?!1\.|10\.)\d+\.(self_attn|mlp\.(?!gate$))",
    "mlp but attention": r"mlp\.(?!gate$)",
    "attention only": r"self_attn",
    "without o_proj": r"self_attn\.(?!o_proj)|mlp\.(?!gate$)",
    "o_proj only": r"o_proj",
    "down_proj only": r"mlp\.(shared_experts\.)?down_proj",
    "shared experts only": r"shared_experts",
}
