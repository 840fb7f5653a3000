"""Qwen1.5-MoE and Qwen2-MoE (57B-A14B): biases on queries, keys and values, routed experts.

One shared expert, whose output is multiplied by the sigmoid of a gate with one row. The gate reads
the experts' input, so scaling that input scales its columns too.
"""

from __future__ import annotations

from quantkit.architectures.components import decoder, moe
from quantkit.contracts import Architecture, Block, Config, Layout


def make_block(config: Config, layer: int) -> Block:
    """Return decoder block `layer`."""
    name = f"model.layers.{layer}"
    attention = decoder.make_grouped_query_attention(
        config, name, qkv_bias=config.flag("qkv_bias", default=True)
    )
    return decoder.make_decoder_block(
        config, name, attention, moe.make_qwen_mlp(config, layer, shared=True)
    )


def make_layout(config: Config) -> Layout:
    """Return every tensor of a Qwen2-MoE checkpoint."""
    return decoder.make_layout(config, make_block)


TINY = {
    **decoder.TINY_COMMON,
    **moe.TINY_QWEN,
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "shared_expert_intermediate_size": 256,
    "norm_topk_prob": False,
}

ARCHITECTURE = Architecture(layout=make_layout, tiny=TINY, experts_only=True)
