"""Llama 2 and 3 (and whatever shares `model_type: llama`): dense, grouped-query attention."""

from __future__ import annotations

from quantkit.architectures.components import decoder
from quantkit.contracts import Architecture, Block, Config, Layout


def block(config: Config, layer: int) -> Block:
    """Decoder block `layer`."""
    name, bias = f"model.layers.{layer}", config.flag("attention_bias")
    attention = decoder.grouped_attention(config, name, qkv_bias=bias, o_bias=bias)
    return decoder.decoder(
        config, name, attention, decoder.dense_mlp(config, name, config.flag("mlp_bias"))
    )


def layout(config: Config) -> Layout:
    """Every tensor of a Llama checkpoint."""
    return decoder.model(config, block)


ARCHITECTURE = Architecture(
    layout=layout,
    tiny={**decoder.TINY_COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    published={"HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2-135m.json"},
    dropped=(
        "*.self_attn.rotary_emb.inv_freq",
    ),  # a buffer that old Llama 1/2 uploads carry; engines recompute it
)
