"""Mistral 7B and its successors with `model_type: mistral`: dense; in 0.1 every block sees a sliding window only."""

from __future__ import annotations

from quantkit.contracts import Architecture, Block, Config, Layout
from quantkit.families import anatomy


def block(config: Config, layer: int) -> Block:
    """Decoder block `layer`."""
    name = f"model.layers.{layer}"
    attention = anatomy.grouped_attention(config, name)
    return anatomy.decoder(config, name, attention, anatomy.dense_mlp(config, name))


def layout(config: Config) -> Layout:
    """Every tensor of a Mistral checkpoint."""
    return anatomy.model(config, block)


TINY = {
    **anatomy.TINY,
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "head_dim": 32,
    "sliding_window": None,
}

ARCHITECTURE = Architecture(layout=layout, tiny=TINY)
