"""Qwen2 and Qwen2.5 (and what is distilled into them): dense; queries, keys and values have a bias, and the blocks
from `max_window_layers` on may see a sliding window only."""

from __future__ import annotations

from quantkit.architectures.components import decoder
from quantkit.contracts import Architecture, Block, Config, Layout


def block(config: Config, layer: int) -> Block:
    """Decoder block `layer`."""
    name = f"model.layers.{layer}"
    attention = decoder.grouped_attention(config, name, qkv_bias=True)
    return decoder.decoder(config, name, attention, decoder.dense_mlp(config, name))


def layout(config: Config) -> Layout:
    """Every tensor of a Qwen2 checkpoint."""
    return decoder.model(config, block)


TINY = {
    **decoder.TINY_COMMON,
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
