"""Mixtures of experts: the MLPs in which a router sends each token to a few of many experts, as families name them."""

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
"""What the TINY configs of DeepSeek's families have in common."""

TINY_QWEN: Mapping[str, object] = {
    "moe_intermediate_size": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
"""What the TINY configs of Qwen's families have in common."""


def make_moe_mlp(
    name: str,
    experts: Experts,
    *,
    shared: tuple[Linear, ...] = (),
    others: tuple[TensorSpec, ...] = (),
    gates: tuple[Linear, ...] = (),
) -> decoder.BlockPart:
    """Router, shared experts and routed experts of block `name`.

    `shared` is the shared experts' gated MLP, where there is one; `gates` what else reads the common input (the gate
    of a shared expert). Router and gates are readers: they must follow when that input is scaled.
    """
    hidden = experts.hidden
    router = Linear(
        name=experts.router, out_features=experts.count, in_features=hidden, role="router"
    )
    projections = (experts.gate, experts.up, experts.down)
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
        adds_to = None if gates else before  # a gated output is not added as it is
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
    """The routed experts in `module`, their number and width under these keys.

    Raises CheckpointError when the router's numbers contradict each other: its top-k would fail in the first block.
    """
    found = Experts(
        module=f"{module}.experts",
        router=f"{module}.gate",
        count=config.integer(count),
        top_k=config.integer("num_experts_per_tok"),
        hidden=config.integer("hidden_size"),
        intermediate=config.integer(width),
    )
    groups, top_groups = config.integer("n_group", 1), config.integer("topk_group", 1)
    if found.count > decoder.MAX_LINEARS:
        raise CheckpointError(
            f"{config.where}: {count}: expected at most {decoder.MAX_LINEARS:,} experts, found {found.count:,}; "
            "repair it"
        )
    if not (
        1 <= found.top_k <= found.count and 1 <= top_groups <= groups and found.count % groups == 0
    ):
        raise CheckpointError(
            f"{config.where}: expected num_experts_per_tok <= {count}, topk_group <= n_group and n_group that "
            f"divides {count}, found {found.top_k} of {found.count} experts, {top_groups} of {groups} groups; repair it"
        )
    return found


def make_deepseek_moe(
    config: Config, name: str, *, correction: bool, bias: bool = False
) -> decoder.BlockPart:
    """Routed and shared experts as DeepSeek names them, which GLM follows; `bias`: the shared ones have one.

    `correction`: the router has a bias per expert that balances their load (arXiv 2412.19437, equation 16).
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
    """Routed experts as Qwen names them; with `shared` one shared expert, weighed by a gate of its own."""
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
    """The MLP of block `layer`: experts on every `decoder_sparse_step`th layer that `mlp_only_layers` does not name."""
    name, step = f"model.layers.{layer}", config.integer("decoder_sparse_step", 1)
    sparse = step > 0 and (layer + 1) % step == 0 and config.integer("num_experts") > 0
    if layer in read_integers(config, "mlp_only_layers") or not sparse:
        return decoder.make_dense_mlp(config, name)
    return make_qwen_moe(config, name, shared=shared)


def read_integers(config: Config, key: str) -> tuple[int, ...]:
    """The list of integers under `key`, empty when it is absent or null; CheckpointError for anything else."""
    value = config.values.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise CheckpointError(
            f"{config.where}: {key}: expected a list of integers, found {value!r}"
        )
    return tuple(value)
