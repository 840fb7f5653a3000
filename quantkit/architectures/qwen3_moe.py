"""Qwen3-MoE (30B-A3B, 235B-A22B, Coder): grouped-query attention with a norm on queries and keys.

Routed experts without a shared one; `mlp_only_layers` and `decoder_sparse_step` select dense MLPs.
"""

from __future__ import annotations

from quantkit.architectures.components import decoder, moe
from quantkit.contracts import Architecture, Block, Config, Layout


def make_block(config: Config, layer: int) -> Block:
    """Return decoder block `layer`."""
    name, bias = f"model.layers.{layer}", config.flag("attention_bias")
    attention = decoder.make_grouped_query_attention(
        config, name, qkv_bias=bias, o_bias=bias, qk_norm=True
    )
    return decoder.make_decoder_block(
        config, name, attention, moe.make_qwen_mlp(config, layer, shared=False)
    )


def make_layout(config: Config) -> Layout:
    """Return every tensor of a Qwen3-MoE checkpoint."""
    return decoder.make_layout(config, make_block)


TINY = {
    **decoder.TINY_COMMON,
    **moe.TINY_QWEN,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 64,
    "norm_topk_prob": True,
}

ARCHITECTURE = Architecture(
    layout=make_layout,
    tiny=TINY,
    experts_only=True,
    published={"Qwen/Qwen3-30B-A3B": "qwen3-30b-a3b.json"},
)
