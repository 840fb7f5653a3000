"""From the tensors of an artifact, planned or stored, to the bytes that cards share or repeat.

What vLLM and SGLang divide among tensor-parallel ranks: every projection, the embedding and the head. What each rank
holds whole: norms, routers, and the two projections that make MLA's compressed vectors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass

from quantkit.checkpoint.fp8_pairs import FP8, read_block_entry
from quantkit.contracts import Config, Experts, Layout, Linear, TensorSpec
from quantkit.serve.sizing.attention import attentions
from quantkit.serve.sizing.model import (
    Attention,
    Layer,
    Mixture,
    Model,
    ReadFrom,
    ShardingConstraint,
    Weights,
)

COPIED = ("q_a_proj", "kv_a_proj_with_mqa")
BY_ROWS = frozenset({
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
"""Projections whose input is divided among ranks; of all others the output is."""

WORD = 8  # output features that a packed word of 4-bit codes holds: it cannot be cut
NAMES = {
    "mlp": "MLP width", "shared_expert": "shared experts' width", "routed_expert": "experts' width",
    "attention": "attention width",
}  # fmt: skip


@dataclass
class _Sum:
    """Weights of one place while they are added up."""

    divided: int = 0
    copied: int = 0
    parameters: int = 0
    fp8_parameters: int = 0

    def done(self) -> Weights:
        return Weights(
            divided=self.divided,
            copied=self.copied,
            parameters=self.parameters,
            fp8_parameters=self.fp8_parameters,
        )


@dataclass
class _Found:
    """What the tensors of one linear say: groups along its input, an FP8 block, codes packed along its output."""

    group: int = 1
    block: int = 1
    words: bool = False


def weigh(
    layout: Layout,
    tensors: Iterable[TensorSpec],
    config: Config,
    *,
    name: str,
    read_from: ReadFrom,
    scheme: str,
    by_row: bool = False,
) -> Model:
    """The model whose artifact holds `tensors`; `layout` says what they belong to.

    by_row: one scale per row was asked for, which no division of the input breaks; else a single group is a whole one.
    """
    places, found = added_up(layout, tensors, fp8_side(config), by_row)
    decoders = [block for block in layout.blocks if block.kind == "decoder"]
    layers = tuple(
        Layer(
            attention=attention,
            dense=places[block.name].done(),
            routed=places[(block.name, "routed")].done(),
        )
        for block, attention in zip(decoders, attentions(config), strict=True)
    )
    mtp = Weights()
    for block in (block for block in layout.blocks if block.kind == "mtp"):
        mtp = mtp + places[block.name].done() + places[(block.name, "routed")].done()
    inner = [linear for block in decoders for linear in block.linears]
    experts = [block.experts for block in decoders if block.experts]
    return Model(
        name=name,
        read_from=read_from,
        model_type=config.text("model_type"),
        config=config,
        scheme=scheme,
        layers=layers,
        embedding=places["embedding"].done(),
        head=places["head"].done(),
        outside=places["outside"].done(),
        mtp=mtp,
        mixture=_mixture(experts),
        divisions=tuple(_divisions(inner, found, layers[0].attention)),
        hidden=layout.embedding.in_features,
        widest=max(
            (x.out_features for x in inner if x.role in ("mlp", "shared_expert")), default=0
        ),
        vocabulary=layout.embedding.out_features,
        longest=config.integer("max_position_embeddings")
        if config.has("max_position_embeddings")
        else None,
    )


def added_up(
    layout: Layout, tensors: Iterable[TensorSpec], side: int, by_row: bool
) -> tuple[defaultdict[object, _Sum], Mapping[str, _Found]]:
    """Bytes by place ("embedding", "head", "outside", a block's name, (it, "routed")), and what divisions respect."""
    places, found = defaultdict[object, _Sum](_Sum), defaultdict[str, _Found](_Found)
    linears = {linear.name: linear for linear in layout.linears}
    blocks = {block.name for block in layout.blocks}
    where = dict(_where(layout))
    for spec in tensors:
        owner, local = _owner(spec.name, linears)
        linear = linears.get(owner)
        if linear is None:
            place = places[_block_of(spec.name, blocks) or "outside"]
            place.copied += spec.n_bytes
            place.parameters += spec.n_elements
            continue
        place = places[where[owner]]
        if linear.role == "router" or owner.rpartition(".")[2] in COPIED:
            place.copied += spec.n_bytes
        else:
            place.divided += spec.n_bytes
        _count(place, linear, spec, local)
        _learn(found[_kind(linear)], linear, spec, local, side, by_row)
    return places, found


def _where(layout: Layout) -> Iterator[tuple[str, object]]:
    """Each linear's place among the sums."""
    yield layout.embedding.name, "embedding"
    if layout.head:
        yield layout.head.name, "head"
    for block in layout.blocks:
        for linear in block.linears:
            yield (
                linear.name,
                (block.name, "routed") if linear.role == "routed_expert" else block.name,
            )


def _owner(tensor: str, linears: Mapping[str, Linear]) -> tuple[str, str]:
    """The linear that a tensor belongs to, and its name within: NF4's "weight.absmax" has a dot of its own."""
    module, _, local = tensor.rpartition(".")
    while module and module not in linears:
        module, _, last = module.rpartition(".")
        local = f"{last}.{local}"
    return module, local


def _block_of(tensor: str, blocks: Container[str]) -> str | None:
    """The block whose norm or bias this is."""
    parts = tensor.split(".")
    places = [n for n, part in enumerate(parts) if part.isdigit()]
    name = ".".join(parts[: places[0] + 1]) if places else ""
    return name if name in blocks else None


def _count(place: _Sum, linear: Linear, spec: TensorSpec, local: str) -> None:
    """The parameters that a tensor stands for, each once: codes and scales together are one matrix."""
    if local == "bias":
        place.parameters += spec.n_elements
    elif local in ("weight", "qweight", "weight_packed"):
        place.parameters += linear.n_parameters
        place.fp8_parameters += linear.n_parameters if spec.dtype == FP8 else 0


def _learn(
    found: _Found, linear: Linear, spec: TensorSpec, local: str, side: int, by_row: bool
) -> None:
    """Groups and words that a division must respect, from the shapes of scales and codes."""
    if local == "scales":  # awq, gptq: [n_groups, out]
        _widen(found, linear, spec.shape[0], by_row)
    elif spec.dtype == FP8:
        found.block = found.group = side
    elif local == "weight_scale" and len(spec.shape) == 2 and spec.shape[0] == linear.out_features:
        _widen(found, linear, spec.shape[1], by_row)  # [out, n_groups]
    found.words = found.words or local in ("qzeros", "weight_zero_point")


def _widen(found: _Found, linear: Linear, n_groups: int, by_row: bool) -> None:
    """Groups of one width divide the next: what respects the widest of several schemes respects all."""
    if n_groups > 1 or not by_row:
        found.group = max(found.group, linear.in_features // max(1, n_groups))


def fp8_side(config: Config) -> int:
    """Rows and columns of an FP8 block, where the config names one; else 1, which divides everything."""
    size = read_block_entry(config)[1]
    return (
        size[1]
        if isinstance(size, list) and len(size) == 2 and isinstance(size[1], int) and size[1] > 0
        else 1
    )


def _kind(linear: Linear) -> str:
    """Linears that are cut alike: their role and their last name."""
    return f"{linear.role}.{linear.name.rpartition('.')[2]}"


def _divisions(
    linears: Iterable[Linear], found: Mapping[str, _Found], attention: Attention
) -> Iterator[ShardingConstraint]:
    """What every rank needs a whole share of, each once."""
    yield ShardingConstraint(what="attention heads", size=attention.heads)
    seen = set[ShardingConstraint]()
    for linear in linears:
        last = linear.name.rpartition(".")[2]
        if linear.role not in NAMES or last in COPIED:
            continue
        learnt = found.get(_kind(linear), _Found())
        rows = last in BY_ROWS
        unit = learnt.group if rows else max(learnt.block, WORD if learnt.words else 1)
        if linear.role == "attention" and unit == 1:
            continue  # as divisible as its heads
        if (
            linear.role == "attention"
            and not rows
            and learnt.block == 1
            and last in ("k_proj", "v_proj")
        ):
            continue  # repeated, not cut, beyond their heads
        made = ShardingConstraint(
            what=NAMES[linear.role],
            size=linear.in_features if rows else linear.out_features,
            unit=unit,
        )
        if made not in seen:
            seen.add(made)
            yield made


def _mixture(experts: list[Experts]) -> Mixture | None:
    if not experts:
        return None
    widest = max(experts, key=lambda found: found.count * found.intermediate)
    return Mixture(
        count=widest.count,
        top_k=widest.top_k,
        intermediate=widest.intermediate,
        layers=len(experts),
    )
