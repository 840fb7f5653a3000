"""Slots of model families, which vLLM and SGLang name alike but for latent attention. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.verify.engines.model_map import Layers, ModelMap, Slot

QKV = {"q_proj": "heads * head", "k_proj": "kv_heads * head", "v_proj": "kv_heads * head"}
NORMS = (
    Slot(name="input_layernorm", parts={"input_layernorm": "hidden"}),
    Slot(name="post_attention_layernorm", parts={"post_attention_layernorm": "hidden"}),
)
FEEDFORWARD_NORMS = (
    Slot(name="pre_feedforward_layernorm", parts={"pre_feedforward_layernorm": "hidden"}),
    Slot(name="post_feedforward_layernorm", parts={"post_feedforward_layernorm": "hidden"}),
)


def make_attention(qkv_bias: str = "", output_bias: str = "") -> tuple[Slot, ...]:
    """Return the slots of attention with one joined projection; biases as in Slot.bias."""
    return (
        Slot(name="self_attn.qkv_proj", parts=QKV, inputs="hidden", bias=qkv_bias),
        Slot(
            name="self_attn.o_proj",
            parts={"o_proj": "hidden"},
            inputs="heads * head",
            bias=output_bias,
        ),
    )


def make_head_norms(when: str = "") -> tuple[Slot, ...]:
    """Return the norms of the heads of queries and keys."""
    return (
        Slot(name="self_attn.q_norm", parts={"q_norm": "head"}, when=when),
        Slot(name="self_attn.k_norm", parts={"k_norm": "head"}, when=when),
    )


def make_mlp(
    parent: str = "mlp", size: str = "mlp", layers: Layers = "dense", bias: str = "", when: str = ""
) -> tuple[Slot, ...]:
    """Return the slots of a gated feed-forward part: gate and up joined, and down."""
    return (
        Slot(
            name=f"{parent}.gate_up_proj",
            parts={"gate_proj": size, "up_proj": size},
            inputs="hidden",
            layers=layers,
            bias=bias,
            when=when,
        ),
        Slot(
            name=f"{parent}.down_proj",
            parts={"down_proj": "hidden"},
            inputs=size,
            layers=layers,
            bias=bias,
            when=when,
        ),
    )


def make_experts(
    parent: str = "mlp.experts",
    router: str = "mlp.gate",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    size: str = "moe",
) -> tuple[Slot, ...]:
    """Return the router and the joined experts; names: of gate, up and down in the checkpoint."""
    gate, up, down = names
    return (
        Slot(
            name=router,
            parts={router.rpartition(".")[2]: "experts"},
            inputs="hidden",
            layers="sparse",
        ),
        Slot(
            name=f"{parent}.w13",
            parts={gate: size, up: size},
            inputs="hidden",
            layers="sparse",
            each="experts",
        ),
        Slot(
            name=f"{parent}.w2",
            parts={down: "hidden"},
            inputs=size,
            layers="sparse",
            each="experts",
        ),
    )


def make_latent_attention(fused: str) -> tuple[Slot, ...]:
    """Return the slots of multi-head latent attention.

    fused: the engine's name of the module that joins q_a_proj and kv_a_proj_with_mqa.
    """
    low, plain = "q_lora_rank", "no q_lora_rank"
    query = "heads * nope + heads * rope"
    inside: Mapping[str, str] = {"kv_a_proj_with_mqa": "kv_rank + rope"}
    return (
        Slot(
            name=f"self_attn.{fused}",
            parts={"q_a_proj": "q_rank", **inside},
            inputs="hidden",
            when=low,
        ),
        Slot(name="self_attn.q_a_layernorm", parts={"q_a_layernorm": "q_rank"}, when=low),
        Slot(name="self_attn.q_b_proj", parts={"q_b_proj": query}, inputs="q_rank", when=low),
        Slot(name="self_attn.q_proj", parts={"q_proj": query}, inputs="hidden", when=plain),
        Slot(name="self_attn.kv_a_proj_with_mqa", parts=inside, inputs="hidden", when=plain),
        Slot(name="self_attn.kv_a_layernorm", parts={"kv_a_layernorm": "kv_rank"}),
        Slot(
            name="self_attn.kv_b_proj",
            parts={"kv_b_proj": "heads * nope + heads * value"},
            inputs="kv_rank",
        ),
        Slot(name="self_attn.o_proj", parts={"o_proj": "hidden"}, inputs="heads * value"),
    )


def make_correction(when: str = "") -> tuple[Slot, ...]:
    """Return the bias by which a router corrects its scores."""
    return (
        Slot(
            name="mlp.gate",
            parts={"gate": "experts"},
            layers="sparse",
            local="e_score_correction_bias",
            when=when,
        ),
    )


LLAMA = ModelMap(
    layer=(
        *make_attention("attention_bias", "attention_bias"),
        *make_mlp(bias="mlp_bias"),
        *NORMS,
    )
)
MIXTRAL = ModelMap(
    layer=(
        *make_attention(),
        *make_experts(
            "block_sparse_moe.experts", "block_sparse_moe.gate", ("w1", "w3", "w2"), "mlp"
        ),
        *NORMS,
    ),
    sparse="all",
    experts="num_local_experts",
)
QWEN2 = ModelMap(layer=(*make_attention("always"), *make_mlp(), *NORMS))
QWEN3 = ModelMap(layer=(*make_attention("attention_bias"), *make_head_norms(), *make_mlp(), *NORMS))
QWEN2_MOE = ModelMap(
    layer=(
        *make_attention("always"),
        *make_mlp(),
        *make_experts(),
        *make_mlp("mlp.shared_expert", "shared_mlp", "sparse"),
        Slot(
            name="mlp.shared_expert_gate",
            parts={"shared_expert_gate": "1"},
            inputs="hidden",
            layers="sparse",
        ),
        *NORMS,
    ),
    sparse="decoder_sparse_step",
    experts="num_experts",
)
QWEN3_MOE = ModelMap(
    layer=(
        *make_attention("attention_bias"),
        *make_head_norms(),
        *make_mlp(),
        *make_experts(),
        *NORMS,
    ),
    sparse="decoder_sparse_step",
    experts="num_experts",
)
GLM4_MOE = ModelMap(
    layer=(
        *make_attention("attention_bias"),
        *make_head_norms("use_qk_norm"),
        *make_mlp(),
        *make_experts(),
        *make_correction(),
        *make_mlp("mlp.shared_experts", "moe * shared_experts", "sparse", when="n_shared_experts"),
        *NORMS,
    ),
    sparse="first_k_dense_replace",
    experts="n_routed_experts",
)
GEMMA = ModelMap(layer=(*make_attention(), *make_mlp(), *NORMS))
GEMMA2 = ModelMap(
    layer=(
        *make_attention("attention_bias", "attention_bias"),
        *make_mlp(),
        *NORMS,
        *FEEDFORWARD_NORMS,
    )
)
GEMMA3 = ModelMap(
    layer=(
        *make_attention("attention_bias", "attention_bias"),
        *make_head_norms(),
        *make_mlp(),
        *NORMS,
        *FEEDFORWARD_NORMS,
    )
)


def make_deepseek(fused: str) -> ModelMap:
    """Return the map of DeepSeek-V2 and V3; fused: see make_latent_attention."""
    return ModelMap(
        layer=(
            *make_latent_attention(fused),
            *make_mlp(),
            *make_experts(),
            *make_correction("topk_method=noaux_tc"),
            *make_mlp(
                "mlp.shared_experts", "moe * shared_experts", "sparse", when="n_shared_experts"
            ),
            *NORMS,
        ),
        sparse="first_k_dense_replace",
        experts="n_routed_experts",
    )
