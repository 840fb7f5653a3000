"""Mixture-of-experts MLPs: a router sends each token to a few of many experts."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.architectures.components import decoder
from quantkit.contracts import Absorber, Config, Experts, Linear, LinearGroup, TensorSpec
from quantkit.errors import CheckpointError

TINY_DEEPSEEK: Mapping[str, object] = {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "kv_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}
"""Keys that the TINY configs of DeepSeek's families share."""

TINY_QWEN: Mapping[str, object] = {
    "moe_intermediate_size": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
"""Keys that the TINY configs of Qwen's families share."""


def make_moe_mlp(
    name: str,
    experts: Experts,
    *,
    shared: tuple[Linear, ...] = (),
    others: tuple[TensorSpec, ...] = (),
    gates: tuple[Linear, ...] = (),
) -> decoder.BlockPart:
    """Return router, shared experts and routed experts of block `name`.

    `shared`: the gated MLP of the shared experts, if any; `gates`: further readers of the input,
    such as the gate of a shared expert. Router and gates are readers: scaling the input scales
    their columns too.
    """
    hidden = experts.hidden
    router = Linear(
        name=experts.router, out_features=experts.count, in_features=hidden, role="router"
    )
    projections = (experts.inputs[0], experts.up, experts.down)
    routed = tuple(
        linear
        for e in range(experts.count)
        for linear in decoder.make_gated_mlp(
            f"{experts.module}.{e}",
            hidden,
            experts.intermediate,
            "routed_expert",
            projections=projections,
        )
    )
    before = f"{name}.post_attention_layernorm"
    into = LinearGroup(
        name=f"{experts.module.rpartition('.')[0]}.in",
        readers=tuple(linear.name for linear in (router, *shared[:2], *gates)),
        absorber=Absorber(module=before),
        routed_experts=True,
    )
    groups, fused = [into], [tuple(linear.name for linear in routed)]
    if shared:
        gate, up, down = (linear.name for linear in shared)
        owner = down.rpartition(".")[0]
        adds_to = None if gates else before  # a gated output is multiplied before it is added
        groups.append(
            LinearGroup(
                name=f"{owner}.down", readers=(down,), absorber=Absorber(module=up), adds_to=adds_to
            )
        )
        fused.insert(0, (gate, up))
    return decoder.BlockPart(
        linears=(router, *shared, *gates, *routed),
        others=others,
        groups=tuple(groups),
        fused=tuple(fused),
        experts=experts,
    )


def make_experts(
    config: Config, module: str, count: str, width: str = "moe_intermediate_size"
) -> Experts:
    """Return the routed experts in `module`; `count` and `width` are keys of the config.

    Raises CheckpointError if the router's numbers contradict each other: its top-k would fail in
    the first block.
    """
    experts = Experts(
        module=f"{module}.experts",
        router=f"{module}.gate",
        count=config.integer(count),
        top_k=config.integer("num_experts_per_tok"),
        hidden=config.integer("hidden_size"),
        intermediate=config.integer(width),
    )
    groups, top_groups = config.integer("n_group", 1), config.integer("topk_group", 1)
    if experts.count > decoder.MAX_LINEARS:
        raise CheckpointError(
            f"{config.where}: {count}: expected at most {decoder.MAX_LINEARS:,} experts, "
            f"found {experts.count:,}; repair it"
        )
    if not (
        1 <= experts.top_k <= experts.count
        and 1 <= top_groups <= groups
        and experts.count % groups == 0
    ):
        raise CheckpointError(
            f"{config.where}: expected num_experts_per_tok <= {count}, topk_group <= n_group and "
            f"n_group that divides {count}, found {experts.top_k} of {experts.count} experts, "
            f"{top_groups} of {groups} groups; repair it"
        )
    return experts


def make_deepseek_moe(
    config: Config, name: str, *, correction: bool, bias: bool = False
) -> decoder.BlockPart:
    """Return routed and shared experts under DeepSeek's names, which GLM uses too.

    `bias`: the shared experts have biases. `correction`: the router has a bias per expert that
    balances their load (arXiv 2412.19437, equation 16).
    """
    module = f"{name}.mlp"
    experts = make_experts(config, module, "n_routed_experts")
    width = experts.intermediate * config.integer("n_shared_experts", 1)
    balance = TensorSpec(
        name=f"{experts.router}.e_score_correction_bias", dtype="F32", shape=(experts.count,)
    )
    return make_moe_mlp(
        name,
        experts,
        shared=decoder.make_gated_mlp(
            f"{module}.shared_experts", experts.hidden, width, "shared_expert", bias
        ),
        others=(balance,) if correction else (),
    )


def make_qwen_moe(config: Config, name: str, *, shared: bool) -> decoder.BlockPart:
    """Return routed experts under Qwen's names; with `shared`, one shared expert with a gate."""
    module = f"{name}.mlp"
    experts = make_experts(config, module, "num_experts")
    if not shared:
        return make_moe_mlp(name, experts)
    width = config.integer("shared_expert_intermediate_size")
    gate = Linear(
        name=f"{module}.shared_expert_gate",
        out_features=1,
        in_features=experts.hidden,
        role="router",
    )
    mlp = decoder.make_gated_mlp(f"{module}.shared_expert", experts.hidden, width, "shared_expert")
    return make_moe_mlp(name, experts, shared=mlp, gates=(gate,))


def make_qwen_mlp(config: Config, layer: int, *, shared: bool) -> decoder.BlockPart:
    """Return the MLP of block `layer`.

    Every `decoder_sparse_step`th layer has experts, unless `mlp_only_layers` lists it.
    """
    name, step = f"model.layers.{layer}", config.integer("decoder_sparse_step", 1)
    is_sparse = step > 0 and (layer + 1) % step == 0 and config.integer("num_experts") > 0
    if layer in read_integers(config, "mlp_only_layers") or not is_sparse:
        return decoder.make_dense_mlp(config, name)
    return make_qwen_moe(config, name, shared=shared)


def read_integers(config: Config, key: str) -> tuple[int, ...]:
    """Return the list of integers under `key`, empty if absent or null.

    Raises CheckpointError for anything else.
    """
    value = config.values.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise CheckpointError(
            f"{config.where}: {key}: expected a list of integers, found {value!r}"
        )
    return tuple(value)
