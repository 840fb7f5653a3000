"""Llama 2 and 3 (and whatever shares `model_type: llama`): dense, grouped-query attention."""

from __future__ import annotations

from quantkit.anatomy import gated_mlp, norm
from quantkit.contracts import Absorber, Architecture, Block, Config, HeadRows, Layout, Linear, LinearGroup


def block(config: Config, layer: int) -> Block:
    """Decoder block `layer`."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    width = config.integer("head_dim", hidden // heads)
    name, bias = f"model.layers.{layer}", config.flag("attention_bias")
    attention, mlp = f"{name}.self_attn", f"{name}.mlp"
    shapes = {"q_proj": (heads * width, hidden), "k_proj": (kv_heads * width, hidden)}
    shapes |= {"v_proj": (kv_heads * width, hidden), "o_proj": (hidden, heads * width)}
    values = HeadRows(heads=heads, kv_heads=kv_heads, width=width, stride=width, offset=0)
    return Block(
        name=name,
        kind="decoder",
        linears=(
            *(
                Linear(name=f"{attention}.{n}", out_features=o, in_features=i, role="attention", bias=bias)
                for n, (o, i) in shapes.items()
            ),
            *gated_mlp(mlp, hidden, config.integer("intermediate_size"), "mlp", config.flag("mlp_bias")),
        ),
        others=(norm(f"{name}.input_layernorm", hidden), norm(f"{name}.post_attention_layernorm", hidden)),
        groups=(
            LinearGroup(
                name=f"{attention}.qkv",
                readers=(f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
                absorber=Absorber(module=f"{name}.input_layernorm"),
            ),
            LinearGroup(
                name=f"{attention}.o",
                readers=(f"{attention}.o_proj",),
                absorber=Absorber(module=f"{attention}.v_proj", rows=values),
            ),
            LinearGroup(
                name=f"{mlp}.in",
                readers=(f"{mlp}.gate_proj", f"{mlp}.up_proj"),
                absorber=Absorber(module=f"{name}.post_attention_layernorm"),
            ),
            LinearGroup(name=f"{mlp}.down", readers=(f"{mlp}.down_proj",), absorber=Absorber(module=f"{mlp}.up_proj")),
        ),
        fused=(
            (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
            (f"{mlp}.gate_proj", f"{mlp}.up_proj"),
        ),
    )


def layout(config: Config) -> Layout:
    """Every tensor of a Llama checkpoint."""
    hidden, vocabulary = config.integer("hidden_size"), config.integer("vocab_size")
    head = Linear(name="lm_head", out_features=vocabulary, in_features=hidden, role="head")
    return Layout(
        embedding=Linear(name="model.embed_tokens", out_features=vocabulary, in_features=hidden, role="embedding"),
        blocks=tuple(block(config, layer) for layer in range(config.integer("num_hidden_layers"))),
        final_norm=norm("model.norm", hidden),
        head=None if config.flag("tie_word_embeddings") else head,
    )


TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 768,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}

ARCHITECTURE = Architecture(
    layout=layout,
    tiny=TINY,
    dropped=("*.self_attn.rotary_emb.inv_freq",),  # a buffer that old Llama 1/2 uploads carry; engines recompute it
)
