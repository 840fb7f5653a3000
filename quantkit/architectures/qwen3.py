"""Qwen3, dense: a norm on the queries and keys of each head; small models have a tied head."""

from __future__ import annotations

from quantkit.architectures.components import decoder
from quantkit.contracts import Architecture, Block, Config, Layout


def make_block(config: Config, layer: int) -> Block:
    """Return decoder block `layer`."""
    name = f"model.layers.{layer}"
    bias = config.flag("attention_bias")
    attention = decoder.make_grouped_query_attention(
        config, name, qkv_bias=bias, o_bias=bias, qk_norm=True
    )
    return decoder.make_decoder_block(config, name, attention, decoder.make_dense_mlp(config, name))


def make_layout(config: Config) -> Layout:
    """Return every tensor of a Qwen3 checkpoint."""
    return decoder.make_layout(config, make_block)


TINY = {
    **decoder.TINY_COMMON,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 64,
}

ARCHITECTURE = Architecture(layout=make_layout, tiny=TINY)
