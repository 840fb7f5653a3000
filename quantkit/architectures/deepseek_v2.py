"""DeepSeek-V2, V2-Lite and Coder-V2: multi-head latent attention (Lite without compressed queries), dense first blocks,
then routed experts picked by softmax, from all groups or from the best ones, and shared experts."""

from __future__ import annotations

from quantkit.architectures.components import decoder, moe
from quantkit.contracts import Architecture, Block, Config, Layout


def block(config: Config, layer: int) -> Block:
    """Decoder block `layer`: dense below `first_k_dense_replace`, experts from there on."""
    name, bias = f"model.layers.{layer}", config.flag("mlp_bias")
    dense = layer < config.integer("first_k_dense_replace", 0)
    experts = moe.deepseek_experts
    mlp = (
        decoder.dense_mlp(config, name, bias)
        if dense
        else experts(config, name, correction=False, bias=bias)
    )
    return decoder.decoder(config, name, decoder.latent_attention(config, name), mlp)


def layout(config: Config) -> Layout:
    """Every tensor of a DeepSeek-V2 checkpoint."""
    return decoder.model(config, block)


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

ARCHITECTURE = Architecture(layout=layout, tiny=TINY, experts_only=True)
