"""Mixtral: grouped-query attention and routed experts in every block. The checkpoint keeps the release's own names,
`block_sparse_moe` and w1, w3, w2 for gate, up and down, as do vLLM and SGLang; transformers calls the module `mlp`."""

from __future__ import annotations

from dataclasses import replace

from quantkit.architectures.components import decoder, moe
from quantkit.contracts import Architecture, Block, Config, Layout

MODULE = "block_sparse_moe"


def block(config: Config, layer: int) -> Block:
    """Decoder block `layer`."""
    name = f"model.layers.{layer}"
    found = moe.experts_of(config, f"{name}.{MODULE}", "num_local_experts", "intermediate_size")
    mlp = moe.routed_mlp(name, replace(found, gate="w1", up="w3", down="w2"))
    made = decoder.decoder(config, name, decoder.grouped_attention(config, name), mlp)
    return replace(made, renames=((MODULE, "mlp"),))


def layout(config: Config) -> Layout:
    """Every tensor of a Mixtral checkpoint."""
    return decoder.model(config, block)


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
    layout=layout,
    tiny=TINY,
    experts_only=True,
    published={
        "mistralai/Mixtral-8x7B-v0.1": "mixtral-8x7b.json",
        "mistralai/Mixtral-8x7B-Instruct-v0.1": "mixtral-8x7b.json",
    },
)
