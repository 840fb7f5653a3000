"""GLM-4.5, 4.5-Air and 4.6.

Grouped-query attention (the large models with a norm on queries and keys). Everything else as in
DeepSeek-V3: dense first blocks, routed and shared experts, a balancing bias in the router, MTP.
"""

from __future__ import annotations

from quantkit.architectures.components import decoder, moe
from quantkit.contracts import Architecture, Block, Config, Layout


def make_block(config: Config, layer: int) -> Block:
    """Return block `layer`: dense below `first_k_dense_replace`, MoE above and in MTP blocks."""
    name, bias = f"model.layers.{layer}", config.flag("attention_bias")
    attention = decoder.make_grouped_query_attention(
        config, name, qkv_bias=bias, qk_norm=config.flag("use_qk_norm")
    )
    if layer < config.integer("first_k_dense_replace", 1):
        return decoder.make_decoder_block(
            config, name, attention, decoder.make_dense_mlp(config, name)
        )
    return decoder.make_decoder_block(
        config, name, attention, moe.make_deepseek_moe(config, name, correction=True)
    )


def make_layout(config: Config) -> Layout:
    """Return every tensor of a GLM-4 MoE checkpoint, the MTP block included."""
    return decoder.make_layout(
        config, make_block, predictions=config.integer("num_nextn_predict_layers", 0)
    )


TINY = {
    **decoder.TINY_COMMON,
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "head_dim": 64,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
    "use_qk_norm": True,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 128,
    "num_nextn_predict_layers": 1,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}

ARCHITECTURE = Architecture(layout=make_layout, tiny=TINY, experts_only=True)
