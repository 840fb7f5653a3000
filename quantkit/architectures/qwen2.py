"""Qwen2, Qwen2.5 and models distilled into them: dense, with biases on queries, keys and values.

Blocks from `max_window_layers` may have sliding-window attention.
"""

from __future__ import annotations

from quantkit.architectures.components import decoder
from quantkit.contracts import Architecture, Block, Config, Layout


def make_block(config: Config, layer: int) -> Block:
    """Return decoder block `layer`."""
    name = f"model.layers.{layer}"
    attention = decoder.make_grouped_query_attention(config, name, qkv_bias=True)
    return decoder.make_decoder_block(config, name, attention, decoder.make_dense_mlp(config, name))


def make_layout(config: Config) -> Layout:
    """Return every tensor of a Qwen2 checkpoint."""
    return decoder.make_layout(config, make_block)


TINY = {
    **decoder.TINY_COMMON,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "use_sliding_window": False,
    "sliding_window": 256,
    "max_window_layers": 1,
}

ARCHITECTURE = Architecture(
    layout=make_layout,
    tiny=TINY,
    published={"deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": "r1-distill-qwen-32b.json"},
)
