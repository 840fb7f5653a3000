"""Qwen1.5-MoE and Qwen2-MoE (57B-A14B): biases on queries, keys and values, routed experts, and one shared expert whose
output a gate of one row weighs. That gate reads what the experts read, so it follows when their input is scaled."""

from __future__ import annotations

from quantkit.architectures.components import decoder, moe
from quantkit.contracts import Architecture, Block, Config, Layout


def block(config: Config, layer: int) -> Block:
    """Decoder block `layer`."""
    name = f"model.layers.{layer}"
    attention = decoder.grouped_attention(
        config, name, qkv_bias=config.flag("qkv_bias", default=True)
    )
    return decoder.decoder(config, name, attention, moe.qwen_mlp(config, layer, shared=True))


def layout(config: Config) -> Layout:
    """Every tensor of a Qwen2-MoE checkpoint."""
    return decoder.model(config, block)


TINY = {
    **decoder.TINY_COMMON,
    **moe.TINY_QWEN,
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "shared_expert_intermediate_size": 256,
    "norm_topk_prob": False,
}

ARCHITECTURE = Architecture(layout=layout, tiny=TINY, experts_only=True)
