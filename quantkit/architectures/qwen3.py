"""Qwen3, dense: a norm on the queries and keys of each head, small models tie their head to the embedding."""

from __future__ import annotations

from quantkit.architectures.components import decoder
from quantkit.contracts import Architecture, Block, Config, Layout


def block(config: Config, layer: int) -> Block:
    """Decoder block `layer`."""
    name = f"model.layers.{layer}"
    bias = config.flag("attention_bias")
    attention = decoder.grouped_attention(config, name, qkv_bias=bias, o_bias=bias, qk_norm=True)
    return decoder.decoder(config, name, attention, decoder.dense_mlp(config, name))


def layout(config: Config) -> Layout:
    """Every tensor of a Qwen3 checkpoint."""
    return decoder.model(config, block)


TINY = {
    **decoder.TINY_COMMON,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 64,
}

ARCHITECTURE = Architecture(layout=layout, tiny=TINY)
