"""Qwen2 and Qwen2.5 (and what is distilled into them): dense; queries, keys and values have a bias, and the blocks
from `max_window_layers` on may see a sliding window only."""

from __future__ import annotations

from quantkit.contracts import Architecture, Block, Config, Layout
from quantkit.families import anatomy


def block(config: Config, layer: int) -> Block:
    """Decoder block `layer`."""
    name = f"model.layers.{layer}"
    attention = anatomy.grouped_attention(config, name, qkv_bias=True)
    return anatomy.decoder(config, name, attention, anatomy.dense_mlp(config, name))


def layout(config: Config) -> Layout:
    """Every tensor of a Qwen2 checkpoint."""
    return anatomy.model(config, block)


TINY = {
    **anatomy.TINY,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "use_sliding_window": False,
    "sliding_window": 256,
    "max_window_layers": 1,
}

ARCHITECTURE = Architecture(
    layout=layout,
    tiny=TINY,
    published={"deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": "r1-distill-qwen-32b.json"},
)
