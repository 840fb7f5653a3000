"""From the tensors of an artifact, planned or stored, to bytes that GPUs share or replicate.

vLLM and SGLang shard every projection, the embedding and the head over tensor-parallel ranks. Each
rank holds a whole copy of norms, routers, and the two projections to MLA's compressed vectors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass

from quantkit.checkpoint.encoding import FP8, SourceQuantization
from quantkit.contracts import Config, Experts, Layout, Linear, TensorSpec
from quantkit.serve.sizing.attention import read_attention
from quantkit.serve.sizing.model import (
    Attention,
    Layer,
    Model,
    MoeConfig,
    ReadFrom,
    ShardingConstraint,
    Weights,
)

REPLICATED = ("q_a_proj", "kv_a_proj_with_mqa")
ROW_PARALLEL = frozenset({
    "o_proj",
    "down_proj",
    "w2",
    "fc2",
    "c_proj",
    "dense",
    "out_proj",
    "wo",
    "dense_4h_to_h",
})
"""Projections whose input is split over ranks; of all others the output is (column-parallel)."""

PACKED_OUTPUTS = 8  # output features in a packed word of 4-bit codes, which cannot be split
ROLE_LABELS = {
    "mlp": "MLP width",
    "shared_expert": "shared expert width",
    "routed_expert": "expert width",
    "attention": "attention width",
}


@dataclass
class _WeightSum:
    """A sum of weights. Mutable."""

    sharded: int = 0
    replicated: int = 0
    parameters: int = 0
    fp8_parameters: int = 0

    def to_weights(self) -> Weights:
        return Weights(
            sharded=self.sharded,
            replicated=self.replicated,
            parameters=self.parameters,
            fp8_parameters=self.fp8_parameters,
        )


@dataclass
class _ShardingUnits:
    """Sizes that a split of a linear must respect. Mutable.

    group: inputs per scale. block: side of an FP8 block. is_packed: codes packed along the output.
    """

    group: int = 1
    block: int = 1
    is_packed: bool = False


def make_model(
    layout: Layout,
    tensors: Iterable[TensorSpec],
    config: Config,
    *,
    name: str,
    read_from: ReadFrom,
    scheme: str,
    by_row: bool = False,
) -> Model:
    """Make the model whose artifact holds `tensors`; `layout` says which linear each belongs to.

    by_row: the scheme has one scale per row, which any split of the input respects. Otherwise a
    single group is as wide as the input.
    """
    sums, units = sum_tensors(layout, tensors, get_fp8_block_size(config), by_row)
    decoders = [block for block in layout.blocks if block.kind == "decoder"]
    layers = tuple(
        Layer(
            attention=attention,
            dense=sums[block.name].to_weights(),
            routed=sums[(block.name, "routed")].to_weights(),
        )
        for block, attention in zip(decoders, read_attention(config), strict=True)
    )
    mtp = Weights()
    for block in (block for block in layout.blocks if block.kind == "mtp"):
        mtp = mtp + sums[block.name].to_weights() + sums[(block.name, "routed")].to_weights()
    linears = [linear for block in decoders for linear in block.linears]
    experts = [block.experts for block in decoders if block.experts]
    mlp_roles = ("mlp", "shared_expert")
    return Model(
        name=name,
        read_from=read_from,
        model_type=config.text("model_type"),
        config=config,
        scheme=scheme,
        layers=layers,
        embedding=sums["embedding"].to_weights(),
        head=sums["head"].to_weights(),
        other=sums["other"].to_weights(),
        mtp=mtp,
        moe=_make_moe_config(experts),
        sharding_constraints=tuple(_iterate_constraints(linears, units, layers[0].attention)),
        hidden_size=layout.embedding.in_features,
        max_intermediate_size=max(
            (linear.out_features for linear in linears if linear.role in mlp_roles), default=0
        ),
        vocab_size=layout.embedding.out_features,
        max_context=config.integer("max_position_embeddings")
        if config.has("max_position_embeddings")
        else None,
    )


def sum_tensors(
    layout: Layout, tensors: Iterable[TensorSpec], fp8_block: int, by_row: bool
) -> tuple[defaultdict[object, _WeightSum], Mapping[str, _ShardingUnits]]:
    """Sum the bytes by component, and collect the sizes that splits must respect.

    A component is "embedding", "head", "other", a block's name, or (a block's name, "routed").
    """
    sums = defaultdict[object, _WeightSum](_WeightSum)
    units = defaultdict[str, _ShardingUnits](_ShardingUnits)
    linears = {linear.name: linear for linear in layout.linears}
    blocks = {block.name for block in layout.blocks}
    components = dict(_iterate_components(layout))
    for spec in tensors:
        owner, suffix = _split_tensor_name(spec.name, linears)
        linear = linears.get(owner)
        if linear is None:
            total = sums[_find_block(spec.name, blocks) or "other"]
            total.replicated += spec.n_bytes
            total.parameters += spec.n_elements
            continue
        total = sums[components[owner]]
        if linear.role == "router" or owner.rpartition(".")[2] in REPLICATED:
            total.replicated += spec.n_bytes
        else:
            total.sharded += spec.n_bytes
        _count_parameters(total, linear, spec, suffix)
        _update_units(units[_get_kind(linear)], linear, spec, suffix, fp8_block, by_row)
    return sums, units


def _iterate_components(layout: Layout) -> Iterator[tuple[str, object]]:
    """Yield each linear's name and component."""
    yield layout.embedding.name, "embedding"
    if layout.head:
        yield layout.head.name, "head"
    for block in layout.blocks:
        for linear in block.linears:
            is_routed = linear.role == "routed_expert"
            yield linear.name, (block.name, "routed") if is_routed else block.name


def _split_tensor_name(tensor: str, linears: Mapping[str, Linear]) -> tuple[str, str]:
    """Split a tensor's name into its linear and the rest, which may have a dot.

    NF4 has "weight.absmax".
    """
    module, _, suffix = tensor.rpartition(".")
    while module and module not in linears:
        module, _, last = module.rpartition(".")
        suffix = f"{last}.{suffix}"
    return module, suffix


def _find_block(tensor: str, blocks: Container[str]) -> str | None:
    """Return the block of a norm or bias; None if it belongs to none."""
    parts = tensor.split(".")
    indices = [n for n, part in enumerate(parts) if part.isdigit()]
    name = ".".join(parts[: indices[0] + 1]) if indices else ""
    return name if name in blocks else None


def _count_parameters(total: _WeightSum, linear: Linear, spec: TensorSpec, suffix: str) -> None:
    """Count the parameters of a tensor, each once: codes and scales together are one matrix."""
    if suffix == "bias":
        total.parameters += spec.n_elements
    elif suffix in ("weight", "qweight", "weight_packed"):
        total.parameters += linear.n_parameters
        total.fp8_parameters += linear.n_parameters if spec.dtype == FP8 else 0


def _update_units(
    units: _ShardingUnits,
    linear: Linear,
    spec: TensorSpec,
    suffix: str,
    fp8_block: int,
    by_row: bool,
) -> None:
    """Update the sizes that a split must respect, from the shapes of scales and codes."""
    if suffix == "scales":  # awq, gptq: [n_groups, out]
        _widen_group(units, linear, spec.shape[0], by_row)
    elif spec.dtype == FP8:
        units.block = units.group = fp8_block
    elif suffix == "weight_scale" and len(spec.shape) == 2 and spec.shape[0] == linear.out_features:
        _widen_group(units, linear, spec.shape[1], by_row)  # [out, n_groups]
    units.is_packed = units.is_packed or suffix in ("qzeros", "weight_zero_point")


def _widen_group(units: _ShardingUnits, linear: Linear, n_groups: int, by_row: bool) -> None:
    """Widen the group. Group sizes divide each other: the widest of several schemes counts."""
    if n_groups > 1 or not by_row:
        units.group = max(units.group, linear.in_features // max(1, n_groups))


def get_fp8_block_size(config: Config) -> int:
    """Return the side of an FP8 block; 1, which divides everything, if the config names none."""
    size = SourceQuantization(config=config).read_block_entry()[1]
    return (
        size[1]
        if isinstance(size, list) and len(size) == 2 and isinstance(size[1], int) and size[1] > 0
        else 1
    )


def _get_kind(linear: Linear) -> str:
    """Return the key of linears that are split in the same way: role and last name."""
    return f"{linear.role}.{linear.name.rpartition('.')[2]}"


def _iterate_constraints(
    linears: Iterable[Linear], units: Mapping[str, _ShardingUnits], attention: Attention
) -> Iterator[ShardingConstraint]:
    """Yield the sizes that ranks split, each once."""
    yield ShardingConstraint(name="attention heads", size=attention.heads)
    seen = set[ShardingConstraint]()
    for linear in linears:
        last = linear.name.rpartition(".")[2]
        if linear.role not in ROLE_LABELS or last in REPLICATED:
            continue
        own_units = units.get(_get_kind(linear), _ShardingUnits())
        is_row_parallel = last in ROW_PARALLEL
        packed = PACKED_OUTPUTS if own_units.is_packed else 1
        unit = own_units.group if is_row_parallel else max(own_units.block, packed)
        if linear.role == "attention" and unit == 1:
            continue  # as divisible as its heads
        if (
            linear.role == "attention"
            and not is_row_parallel
            and own_units.block == 1
            and last in ("k_proj", "v_proj")
        ):
            continue  # replicated, not split, over more ranks than KV heads
        constraint = ShardingConstraint(
            name=ROLE_LABELS[linear.role],
            size=linear.in_features if is_row_parallel else linear.out_features,
            unit=unit,
        )
        if constraint not in seen:
            seen.add(constraint)
            yield constraint


def _make_moe_config(experts: list[Experts]) -> MoeConfig | None:
    if not experts:
        return None
    widest = max(experts, key=lambda layer: layer.count * layer.intermediate)
    return MoeConfig(
        num_experts=widest.count,
        top_k=widest.top_k,
        intermediate_size=widest.intermediate,
        num_layers=len(experts),
    )
