"""DeepSeek-V3, V3.1 and R1: multi-head latent attention, dense first blocks, then routed and shared experts, and
multi-token-prediction (MTP) blocks behind the last one, which transformers does not run (FORMATS.md 5.1, 5.2)."""

from __future__ import annotations

from quantkit.anatomy import gated_mlp, norm, routed_experts
from quantkit.contracts import (
    Absorber,
    Architecture,
    Block,
    Config,
    Experts,
    HeadRows,
    Layout,
    Linear,
    LinearGroup,
    TensorSpec,
)
from quantkit.errors import CheckpointError


def attention_linears(config: Config, module: str) -> tuple[Linear, ...]:
    """MLA projections; with `q_lora_rank` null one q_proj takes the place of q_a_proj and q_b_proj."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    nope, rope = config.integer("qk_nope_head_dim"), config.integer("qk_rope_head_dim")
    value, rank = config.integer("v_head_dim"), config.integer("kv_lora_rank")
    bias = config.flag("attention_bias")

    def linear(name: str, out: int, into: int, has_bias: bool = False) -> Linear:
        return Linear(name=f"{module}.{name}", out_features=out, in_features=into, role="attention", bias=has_bias)

    if config.has("q_lora_rank"):
        q_rank = config.integer("q_lora_rank")
        queries = [linear("q_a_proj", q_rank, hidden, bias), linear("q_b_proj", heads * (nope + rope), q_rank)]
    else:
        queries = [linear("q_proj", heads * (nope + rope), hidden)]
    return (
        *queries,
        linear("kv_a_proj_with_mqa", rank + rope, hidden, bias),
        linear("kv_b_proj", heads * (nope + value), rank),
        linear("o_proj", hidden, heads * value, bias),
    )


def attention_groups(config: Config, name: str) -> tuple[LinearGroup, ...]:
    """Who reads what in MLA. o_proj's input scale goes into the value rows of kv_b_proj."""
    module, compressed = f"{name}.self_attn", config.has("q_lora_rank")
    heads, value = config.integer("num_attention_heads"), config.integer("v_head_dim")
    nope = config.integer("qk_nope_head_dim")
    first = f"{module}.q_a_proj" if compressed else f"{module}.q_proj"
    groups = [
        LinearGroup(
            name=f"{module}.in",
            readers=(first, f"{module}.kv_a_proj_with_mqa"),
            absorber=Absorber(module=f"{name}.input_layernorm"),
        ),
        LinearGroup(
            name=f"{module}.kv_b",
            readers=(f"{module}.kv_b_proj",),
            absorber=Absorber(module=f"{module}.kv_a_layernorm"),
        ),
        LinearGroup(
            name=f"{module}.o",
            readers=(f"{module}.o_proj",),
            absorber=Absorber(
                module=f"{module}.kv_b_proj",
                rows=HeadRows(heads=heads, kv_heads=heads, width=value, stride=nope + value, offset=nope),
            ),
        ),
    ]
    if compressed:
        absorber = Absorber(module=f"{module}.q_a_layernorm")
        groups.insert(1, LinearGroup(name=f"{module}.q_b", readers=(f"{module}.q_b_proj",), absorber=absorber))
    return tuple(groups)


def dense_mlp(config: Config, name: str) -> tuple[tuple[Linear, ...], tuple[LinearGroup, ...]]:
    """The MLP of the first `first_k_dense_replace` blocks."""
    mlp = f"{name}.mlp"
    return gated_mlp(mlp, config.integer("hidden_size"), config.integer("intermediate_size"), "mlp"), (
        LinearGroup(
            name=f"{mlp}.in",
            readers=(f"{mlp}.gate_proj", f"{mlp}.up_proj"),
            absorber=Absorber(module=f"{name}.post_attention_layernorm"),
        ),
        LinearGroup(name=f"{mlp}.down", readers=(f"{mlp}.down_proj",), absorber=Absorber(module=f"{mlp}.up_proj")),
    )


def check_routing(config: Config) -> None:
    """CheckpointError when the router's numbers contradict each other: its top-k would fail in the first block."""
    count, top_k = config.integer("n_routed_experts"), config.integer("num_experts_per_tok")
    groups, top_groups = config.integer("n_group", 1), config.integer("topk_group", 1)
    if not (1 <= top_k <= count and 1 <= top_groups <= groups and count % groups == 0):
        raise CheckpointError(
            f"{config.where}: expected num_experts_per_tok <= n_routed_experts, topk_group <= n_group and n_group that "
            f"divides n_routed_experts, found {top_k} of {count} experts, {top_groups} of {groups} groups; repair it"
        )


def expert_mlp(config: Config, name: str) -> tuple[tuple[Linear, ...], tuple[LinearGroup, ...], Experts]:
    """Router, shared experts and routed experts. The router reads the same input as they do, so it is a reader."""
    check_routing(config)
    mlp, hidden = f"{name}.mlp", config.integer("hidden_size")
    count, width = config.integer("n_routed_experts"), config.integer("moe_intermediate_size")
    shared = gated_mlp(f"{mlp}.shared_experts", hidden, width * config.integer("n_shared_experts", 1), "shared_expert")
    linears = (
        Linear(name=f"{mlp}.gate", out_features=count, in_features=hidden, role="router"),
        *shared,
        *routed_experts(f"{mlp}.experts", count, hidden, width),
    )
    groups = (
        LinearGroup(
            name=f"{mlp}.in",
            readers=(f"{mlp}.gate", shared[0].name, shared[1].name),
            absorber=Absorber(module=f"{name}.post_attention_layernorm"),
            routed_experts=True,
        ),
        LinearGroup(
            name=f"{mlp}.shared_experts.down",
            readers=(shared[2].name,),
            absorber=Absorber(module=shared[1].name),
        ),
    )
    experts = Experts(
        module=f"{mlp}.experts",
        router=f"{mlp}.gate",
        count=count,
        top_k=config.integer("num_experts_per_tok"),
        hidden=hidden,
        intermediate=width,
    )
    return linears, groups, experts


def block(config: Config, layer: int) -> Block:
    """Decoder block `layer`: dense below `first_k_dense_replace`, experts from there on; MTP behind the last."""
    name, hidden = f"model.layers.{layer}", config.integer("hidden_size")
    module, experts = f"{name}.self_attn", None
    if layer < config.integer("first_k_dense_replace"):
        mlp, mlp_groups = dense_mlp(config, name)
        merged: list[tuple[str, ...]] = [(mlp[0].name, mlp[1].name)]
    else:
        mlp, mlp_groups, experts = expert_mlp(config, name)
        merged = [(mlp[1].name, mlp[2].name), tuple(linear.name for linear in mlp if linear.role == "routed_expert")]
    others = [norm(f"{name}.input_layernorm", hidden), norm(f"{name}.post_attention_layernorm", hidden)]
    others.append(norm(f"{module}.kv_a_layernorm", config.integer("kv_lora_rank")))
    if config.has("q_lora_rank"):
        others.append(norm(f"{module}.q_a_layernorm", config.integer("q_lora_rank")))
        merged.append((f"{module}.q_a_proj", f"{module}.kv_a_proj_with_mqa"))
    if experts:
        bias = TensorSpec(name=f"{experts.router}.e_score_correction_bias", dtype="F32", shape=(experts.count,))
        others.append(bias)
    decoder = Block(
        name=name,
        kind="decoder",
        linears=(*attention_linears(config, module), *mlp),
        others=tuple(others),
        groups=(*attention_groups(config, name), *mlp_groups),
        fused=tuple(merged),
        experts=experts,
    )
    return decoder if layer < config.integer("num_hidden_layers") else prediction_block(config, decoder)


def prediction_block(config: Config, decoder: Block) -> Block:
    """An MTP block: a decoder block with an embedding, a projection of [embedding, hidden] and a head of its own."""
    name, hidden, vocabulary = decoder.name, config.integer("hidden_size"), config.integer("vocab_size")
    extra = (
        Linear(name=f"{name}.embed_tokens", out_features=vocabulary, in_features=hidden, role="embedding"),
        Linear(name=f"{name}.eh_proj", out_features=hidden, in_features=2 * hidden, role="mtp_projection"),
        Linear(name=f"{name}.shared_head.head", out_features=vocabulary, in_features=hidden, role="head"),
    )
    norms = (norm(f"{name}.{module}", hidden) for module in ("enorm", "hnorm", "shared_head.norm"))
    return Block(
        name=name,
        kind="mtp",
        linears=(*extra, *decoder.linears),
        others=(*norms, *decoder.others),
        groups=decoder.groups,
        fused=decoder.fused,
        experts=decoder.experts,
    )


def layout(config: Config) -> Layout:
    """Every tensor of a DeepSeek-V3 checkpoint, the MTP blocks included."""
    hidden, vocabulary = config.integer("hidden_size"), config.integer("vocab_size")
    count = config.integer("num_hidden_layers") + config.integer("num_nextn_predict_layers", 0)
    head = Linear(name="lm_head", out_features=vocabulary, in_features=hidden, role="head")
    return Layout(
        embedding=Linear(name="model.embed_tokens", out_features=vocabulary, in_features=hidden, role="embedding"),
        blocks=tuple(block(config, layer) for layer in range(count)),
        final_norm=norm("model.norm", hidden),
        head=None if config.flag("tie_word_embeddings") else head,
    )


TINY = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "kv_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "vocab_size": 768,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "attention_bias": False,
}

ARCHITECTURE = Architecture(
    layout=layout,
    tiny=TINY,
    experts_only=True,
    published={
        "deepseek-ai/DeepSeek-V3": "deepseek-v3.json",
        "deepseek-ai/DeepSeek-V3-Base": "deepseek-v3.json",
        "deepseek-ai/DeepSeek-V3-0324": "deepseek-v3.json",
        "deepseek-ai/DeepSeek-R1": "deepseek-v3.json",
    },
    serving_notes=(
        "SGLang: pass --disable-shared-experts-fusion, because the shared experts are not stored like the routed ones.",
    ),
)
