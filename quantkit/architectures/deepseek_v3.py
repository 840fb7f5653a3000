"""DeepSeek-V3, V3.1 and R1: multi-head latent attention, dense first blocks, then routed and shared experts, and
multi-token-prediction (MTP) blocks behind the last one, which transformers does not run (FORMATS.md 5.1, 5.2)."""

from __future__ import annotations

from quantkit.architectures.components import decoder, moe
from quantkit.architectures.components.decoder import Part
from quantkit.contracts import Architecture, Block, Config, Layout


def expert_mlp(config: Config, name: str) -> Part:
    """The MLP from block `first_k_dense_replace` on."""
    return moe.deepseek_experts(config, name, correction=True)


def block(config: Config, layer: int) -> Block:
    """Block `layer`: dense below `first_k_dense_replace`, experts from there on, in MTP blocks too."""
    name = f"model.layers.{layer}"
    dense = layer < config.integer("first_k_dense_replace")
    mlp = decoder.dense_mlp(config, name) if dense else expert_mlp(config, name)
    return decoder.decoder(config, name, decoder.latent_attention(config, name), mlp)


def layout(config: Config) -> Layout:
    """Every tensor of a DeepSeek-V3 checkpoint, the MTP blocks included."""
    return decoder.model(config, block, predictions=config.integer("num_nextn_predict_layers", 0))


TINY = {
    **decoder.TINY_COMMON,
    **moe.TINY_DEEPSEEK,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_nextn_predict_layers": 1,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}

ARCHITECTURE = Architecture(
    layout=layout,
    tiny=TINY,
    experts_only=True,
    published={
        "deepseek-ai/DeepSeek-V3": "deepseek-v3.json",
        "deepseek-ai/DeepSeek-V3-Base": "deepseek-v3.json",
        "deepseek-ai/DeepSeek-V3-0324": "deepseek-v3.json",
        "deepseek-ai/DeepSeek-R1": "deepseek-v3.json",
        "deepseek-ai/DeepSeek-R1-0528": "deepseek-v3.json",
        "deepseek-ai/DeepSeek-V3.1": "deepseek-v3.1.json",
        "deepseek-ai/DeepSeek-V3.1-Base": "deepseek-v3.1.json",
    },
)
