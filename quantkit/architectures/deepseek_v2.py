"""DeepSeek-V2, V2-Lite and Coder-V2.

Multi-head latent attention (Lite without compressed queries); dense first blocks, then shared
experts and routed experts selected by softmax, from all groups or from the best ones.
"""

from __future__ import annotations

from quantkit.architectures.components import decoder, moe
from quantkit.contracts import Architecture, Block, Config, Layout


def make_block(config: Config, layer: int) -> Block:
    """Return decoder block `layer`: dense below `first_k_dense_replace`, MoE above."""
    name, bias = f"model.layers.{layer}", config.flag("mlp_bias")
    dense = layer < config.integer("first_k_dense_replace", 0)
    experts = moe.make_deepseek_moe
    mlp = (
        decoder.make_dense_mlp(config, name, bias)
        if dense
        else experts(config, name, correction=False, bias=bias)
    )
    return decoder.make_decoder_block(
        config, name, decoder.make_latent_attention(config, name), mlp
    )


def make_layout(config: Config) -> Layout:
    """Return every tensor of a DeepSeek-V2 checkpoint."""
    return decoder.make_layout(config, make_block)


TINY = {
    **decoder.TINY_COMMON,
    **moe.TINY_DEEPSEEK,
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "topk_method": "group_limited_greedy",
}

ARCHITECTURE = Architecture(layout=make_layout, tiny=TINY, experts_only=True)
