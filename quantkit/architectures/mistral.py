"""Mistral 7B and later models with `model_type: mistral`: dense; 0.1 has sliding windows."""

from __future__ import annotations

from quantkit.architectures.components import decoder
from quantkit.contracts import Architecture, Block, Config, Layout


def make_block(config: Config, layer: int) -> Block:
    """Return decoder block `layer`."""
    name = f"model.layers.{layer}"
    attention = decoder.make_grouped_query_attention(config, name)
    return decoder.make_decoder_block(config, name, attention, decoder.make_dense_mlp(config, name))


def make_layout(config: Config) -> Layout:
    """Return every tensor of a Mistral checkpoint."""
    return decoder.make_layout(config, make_block)


TINY = {
    **decoder.TINY_COMMON,
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "head_dim": 32,
    "sliding_window": None,
}

ARCHITECTURE = Architecture(layout=make_layout, tiny=TINY)
