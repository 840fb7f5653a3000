"""Mistral 7B and its successors with `model_type: mistral`: dense; in 0.1 every block sees a sliding window only."""

from __future__ import annotations

from quantkit.architectures.components import decoder
from quantkit.contracts import Architecture, Block, Config, Layout


def block(config: Config, layer: int) -> Block:
    """Decoder block `layer`."""
    name = f"model.layers.{layer}"
    attention = decoder.grouped_attention(config, name)
    return decoder.decoder(config, name, attention, decoder.dense_mlp(config, name))


def layout(config: Config) -> Layout:
    """Every tensor of a Mistral checkpoint."""
    return decoder.model(config, block)


TINY = {
    **decoder.TINY_COMMON,
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "head_dim": 32,
    "sliding_window": None,
}

ARCHITECTURE = Architecture(layout=layout, tiny=TINY)
