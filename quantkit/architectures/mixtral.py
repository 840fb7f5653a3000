"""Mixtral: grouped-query attention and routed experts in every block.

The checkpoint, vLLM and SGLang use the names of the release: `block_sparse_moe`, and w1, w3, w2 for
gate, up and down. transformers calls the module `mlp`.
"""

from __future__ import annotations

from dataclasses import replace

from quantkit.architectures.components import decoder, moe
from quantkit.contracts import Architecture, Block, Config, Layout

MODULE = "block_sparse_moe"


def make_block(config: Config, layer: int) -> Block:
    """Return decoder block `layer`."""
    name = f"model.layers.{layer}"
    experts = moe.make_experts(config, f"{name}.{MODULE}", "num_local_experts", "intermediate_size")
    mlp = moe.make_moe_mlp(name, replace(experts, gate="w1", up="w3", down="w2"))
    block = decoder.make_decoder_block(
        config, name, decoder.make_grouped_query_attention(config, name), mlp
    )
    return replace(block, renames=((MODULE, "mlp"),))


def make_layout(config: Config) -> Layout:
    """Return every tensor of a Mixtral checkpoint."""
    return decoder.make_layout(config, make_block)


TINY = {
    **decoder.TINY_COMMON,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "intermediate_size": 128,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}

ARCHITECTURE = Architecture(
    layout=make_layout,
    tiny=TINY,
    experts_only=True,
    published={
        "mistralai/Mixtral-8x7B-v0.1": "mixtral-8x7b.json",
        "mistralai/Mixtral-8x7B-Instruct-v0.1": "mixtral-8x7b.json",
    },
)
