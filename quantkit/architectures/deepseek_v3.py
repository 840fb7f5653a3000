"""DeepSeek-V3, V3.1 and R1: MLA, dense first blocks, then routed and shared experts, then MTP
blocks (which transformers does not run). Checkpoints are FP8 (formats/README.md, FP8 blocks)."""

from __future__ import annotations

from quantkit.architectures.components import decoder, moe
from quantkit.contracts import Architecture, Block, Config, Layout


def make_moe_mlp(config: Config, name: str) -> decoder.BlockPart:
    """Return the MLP of the blocks from `first_k_dense_replace`."""
    return moe.make_deepseek_moe(config, name, correction=True)


def make_block(config: Config, layer: int) -> Block:
    """Return block `layer`: dense below `first_k_dense_replace`, MoE above and in MTP blocks."""
    name, is_dense = f"model.layers.{layer}", layer < config.integer("first_k_dense_replace")
    attention = decoder.make_latent_attention(config, name)
    mlp = decoder.make_dense_mlp(config, name) if is_dense else make_moe_mlp(config, name)
    return decoder.make_decoder_block(config, name, attention, mlp)


def make_layout(config: Config) -> Layout:
    """Return every tensor of a DeepSeek-V3 checkpoint, the MTP blocks included."""
    mtp_blocks = config.integer("num_nextn_predict_layers", 0)
    return decoder.make_layout(config, make_block, predictions=mtp_blocks)


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
    layout=make_layout,
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
