"""Qwen3-MoE (30B-A3B, 235B-A22B, Coder): grouped-query attention with a norm on queries and keys, routed experts
without a shared one, dense MLPs where `mlp_only_layers` and `decoder_sparse_step` say so."""

from __future__ import annotations

from quantkit.architectures.components import decoder, moe
from quantkit.contracts import Architecture, Block, Config, Layout


def block(config: Config, layer: int) -> Block:
    """Decoder block `layer`."""
    name, bias = f"model.layers.{layer}", config.flag("attention_bias")
    attention = decoder.grouped_attention(config, name, qkv_bias=bias, o_bias=bias, qk_norm=True)
    return decoder.decoder(config, name, attention, moe.qwen_mlp(config, layer, shared=False))


def layout(config: Config) -> Layout:
    """Every tensor of a Qwen3-MoE checkpoint."""
    return decoder.model(config, block)


TINY = {
    **decoder.TINY_COMMON,
    **moe.TINY_QWEN,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 64,
    "norm_topk_prob": True,
}

ARCHITECTURE = Architecture(
    layout=layout,
    tiny=TINY,
    experts_only=True,
    published={"Qwen/Qwen3-30B-A3B": "qwen3-30b-a3b.json"},
)
