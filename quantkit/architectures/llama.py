"""Llama 2 and 3, and other models with `model_type: llama`: dense, grouped-query attention."""

from __future__ import annotations

from quantkit.architectures.components import decoder
from quantkit.contracts import Architecture, Block, Config, Layout


def make_block(config: Config, layer: int) -> Block:
    """Return decoder block `layer`."""
    name, bias = f"model.layers.{layer}", config.flag("attention_bias")
    attention = decoder.make_grouped_query_attention(config, name, qkv_bias=bias, o_bias=bias)
    return decoder.make_decoder_block(
        config, name, attention, decoder.make_dense_mlp(config, name, config.flag("mlp_bias"))
    )


def make_layout(config: Config) -> Layout:
    """Return every tensor of a Llama checkpoint."""
    return decoder.make_layout(config, make_block)


ARCHITECTURE = Architecture(
    layout=make_layout,
    tiny={**decoder.TINY_COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    published={"HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2-135m.json"},
    # a buffer in old Llama 1 and 2 uploads; engines recompute it
    dropped=("*.self_attn.rotary_emb.inv_freq",),
)
