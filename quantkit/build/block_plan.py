"""The steps of a build for each block, decided before it starts; pure and printable.

The build loop follows a `BlockPlan` and decides nothing again: which groups are quantized together,
whether their input is scaled, which fallbacks are known in advance, how routed experts are cut into
slices and how often they are read, and the names of the tensors to read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from quantkit import registry
from quantkit.checkpoint.encoding import FP8
from quantkit.checkpoint.tensors import TORCH_DTYPES
from quantkit.contracts import Block, Experts, LinearGroup, Rescale, Scheme
from quantkit.plan.decisions import (
    Decision,
    find_rescale,
    is_unscaled_for_kept_bits,
    keeps_stacked,
    select_quantized_groups,
)
from quantkit.plan.memory import choose_slice_size
from quantkit.plan.plan import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadRequest:
    """Source tensors that are read together; `name` says which for people:
    "model.layers.3.mlp.experts.0:16". NaN and infinity are refused if values must be `finite`.
    """

    name: str
    tensors: tuple[str, ...]
    finite: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertRange:
    """Routed experts first .. stop - 1 of a block: the unit of work on experts."""

    first: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.first


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearPlan:
    """What happens to one linear.

    `fallbacks` are those known before its weight is read; `stored_dtype` is that of a kept weight,
    None when it keeps its values (FP8 blocks) or is quantized; `bias_dtype` that of its bias.
    """

    decision: Decision
    fallbacks: tuple[str, ...] = ()
    stored_dtype: torch.dtype | None = None
    bias_dtype: torch.dtype | None = None

    @property
    def is_quantized(self) -> bool:
        return self.decision.action == "quantize"


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupPlan:
    """Linears that read one input, of which at least one is quantized.

    `readers` are the dense linears that are quantized, solved as one matrix per scheme, method and
    rounding; `others` the dense linears that are kept; `scale_method` is the method that searches a
    scale for the input, None for an input that keeps its scale.
    """

    group: LinearGroup
    readers: tuple[str, ...]
    others: tuple[str, ...]
    scale_method: str | None

    @property
    def rescale(self) -> Rescale | None:
        """The scale search of the input."""
        return get_rescale(self.scale_method)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsPlan:
    """The routed experts of a block.

    `scheme` is None when they are kept; `down_scale_method` is the method that searches a scale for
    the input of each down projection; `needs_search` says that one scale for the input of all gate
    and up projections is searched, which takes the statistics of every expert before any is
    quantized. `slices` do not depend on `memory:`; `slices_at_once` does: it is how many are in
    memory at once (a wave), and changes no byte. `are_together`: kept in the stored tensors that
    hold all of them.
    """

    experts: Experts
    scheme: Scheme | None
    down_scale_method: str | None
    needs_search: bool
    slices: tuple[ExpertRange, ...]
    slices_at_once: int
    are_together: bool = False

    @property
    def down_rescale(self) -> Rescale | None:
        """The scale search of the down projections' inputs."""
        return get_rescale(self.down_scale_method)

    @property
    def is_one_wave(self) -> bool:
        """Whether all slices are in memory at once: they are then read once, even for a search."""
        return len(self.slices) <= self.slices_at_once

    def waves(self, done: int = 0) -> tuple[tuple[ExpertRange, ...], ...]:
        """Cut the slices after the first `done` experts into waves."""
        rest = [part for part in self.slices if part.first >= done]
        size = self.slices_at_once
        return tuple(tuple(rest[i : i + size]) for i in range(0, len(rest), size))

    def read_request(self, wave: Sequence[ExpertRange]) -> ReadRequest:
        """Return the request for the weights of a wave."""
        names, first, stop = self.experts, wave[0].first, wave[-1].stop
        tensors = (
            f"{names.linear(e, projection)}.{kind}"
            for e in range(first, stop)
            for projection in names.projections
            for kind in names.kinds
        )
        return ReadRequest(name=f"{names.module}.{first}:{stop}", tensors=tuple(tensors))


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockPlan:
    """What happens to one block.

    `mode`: "drop" leaves it out; "store" quantizes or keeps its tensors without statistics, because
    no stream runs through it; "run" moves the streams through it. `linears` has every linear of the
    block, routed experts included; `dense_reads` are the requests for all tensors but those of
    routed experts.
    """

    block: Block
    mode: Literal["drop", "store", "run"]
    linears: Mapping[str, LinearPlan]
    groups: Mapping[str, GroupPlan]
    experts: ExpertsPlan | None
    dense_reads: tuple[ReadRequest, ...]
    may_scale: bool  # whether some input may be scaled, in the block or in its experts

    @property
    def expert_group(self) -> GroupPlan | None:
        """The group whose input the routed experts read; None when none of its readers is
        quantized.
        """
        return next((group for group in self.groups.values() if group.group.routed_experts), None)

    @property
    def target_width(self) -> int:
        """The channels of the sums of experts that the layer takes inside; 0: those of states."""
        experts = self.block.experts
        return experts.hidden if experts and experts.inside else 0

    def iterate_reads(self, searched: int = 0, quantized: int = 0) -> Iterator[ReadRequest]:
        """Yield the requests in the order in which the build takes them.

        `searched`, `quantized`: experts that an interrupted build has finished in each pass.
        """
        if self.mode == "drop":
            return
        yield from self.dense_reads
        if self.experts is None:
            return
        if self.mode == "run" and self.experts.needs_search:
            yield from map(self.experts.read_request, self.experts.waves(searched))
            if self.experts.is_one_wave and not searched:
                return  # kept in memory for the second pass
        yield from map(self.experts.read_request, self.experts.waves(quantized))

    def describe(self) -> str:
        """Format the plan as lines of text."""
        lines = [f"{self.block.name}: {self.mode}"]
        for name, group in self.groups.items():
            scale = f"scaled by {group.scale_method}" if group.scale_method else "not scaled"
            lines.append(
                f"  group {name}: {scale}; quantized: {', '.join(group.readers) or 'experts'}"
            )
        if self.experts:
            sizes, plan = [len(part) for part in self.experts.slices], self.experts
            passes = "twice" if plan.needs_search and not plan.is_one_wave else "once"
            lines.append(
                f"  experts {plan.experts.module}: {sum(sizes)} in {len(sizes)} slices of "
                f"{max(sizes)}, {plan.slices_at_once} slices in memory at once, read {passes}"
            )
        for name, linear in self.linears.items():
            if linear.fallbacks:
                lines.append(f"  fallback {', '.join(linear.fallbacks)}: {name}")
        return "\n".join(lines)


def get_rescale(method: str | None) -> Rescale | None:
    """Return the scale search of a method by name; None without a method."""
    return None if method is None else registry.get_method(method).rescale


def plan_blocks(plans: Sequence[Plan]) -> tuple[BlockPlan, ...]:
    """Plan every block of a model for a build that the plans share; they differ in their format
    alone.
    """
    dtypes = {spec.name: spec.dtype for shard in plans[0].shards for spec in shard.tensors}
    parts = plans[0].expert_parts
    dtypes |= {x: dtypes[y.stacked.name] for x, y in parts.items() if y.stacked.name in dtypes}
    return tuple(plan_block(plans, block, dtypes) for block in plans[0].layout.blocks)


def plan_block(plans: Sequence[Plan], block: Block, dtypes: Mapping[str, str]) -> BlockPlan:
    """Plan one block; `dtypes` are those of the output tensors by name."""
    plan, decisions = plans[0], plans[0].decisions
    held = frozenset(
        group.name
        for group in block.groups
        if any(is_unscaled_for_kept_bits(block, group, each.decisions) for each in plans)
    )
    mode = block_mode(plan, block)
    quantized = select_quantized_groups(block, decisions)
    groups = {
        name: plan_group(block, group, decisions, name in held) for name, group in quantized.items()
    }
    return BlockPlan(
        block=block,
        mode=mode,
        linears={
            x.name: plan_linear(block, decisions[x.name], held, dtypes) for x in block.linears
        },
        groups=groups,
        experts=plan_experts(plan, block, groups) if block.experts else None,
        dense_reads=dense_reads(block, mode),
        may_scale=any(find_rescale(block, group, decisions) for group in quantized.values()),
    )


def block_mode(plan: Plan, block: Block) -> Literal["drop", "store", "run"]:
    """Return what happens to a block: no stream runs through an MTP block, nor any block of a
    recipe that neither calibrates nor measures.
    """
    if plan.decisions[block.linears[0].name].action == "drop":
        return "drop"
    return "store" if block.kind == "mtp" or not plan.needs_forward else "run"


def plan_group(
    block: Block, group: LinearGroup, decisions: Mapping[str, Decision], is_held: bool
) -> GroupPlan:
    """Plan a group; `is_held`: some format keeps FP8 bits that a scale of its input would
    change.
    """
    readers = tuple(name for name in group.readers if decisions[name].action == "quantize")
    others = tuple(name for name in group.readers if name not in readers)
    method = None if is_held else find_scale_method(block, group, decisions)
    return GroupPlan(group=group, readers=readers, others=others, scale_method=method)


def find_scale_method(
    block: Block, group: LinearGroup, decisions: Mapping[str, Decision]
) -> str | None:
    """Return the one method of a group's quantized readers, experts included, if it searches
    scales.
    """
    if find_rescale(block, group, decisions) is None:
        return None
    experts = block.experts
    gate = (experts.first,) if group.routed_experts and experts else ()
    return next(m for reader in (*group.readers, *gate) if (m := decisions[reader].method))


def plan_experts(plan: Plan, block: Block, groups: Mapping[str, GroupPlan]) -> ExpertsPlan:
    """Plan the routed experts of a block."""
    experts = block.experts
    assert experts is not None  # the caller has checked
    count, size = experts.count, choose_slice_size(experts.count)
    scheme = plan.decisions[experts.first].scheme
    group = next((group for group in groups.values() if group.group.routed_experts), None)
    down = None
    if group and scheme and experts.scales_down:
        down = find_scale_method(block, group.group, plan.decisions)
    return ExpertsPlan(
        experts=experts,
        scheme=scheme,
        down_scale_method=down,
        needs_search=group is not None and group.scale_method is not None and scheme is not None,
        slices=tuple(
            ExpertRange(first=first, stop=min(first + size, count))
            for first in range(0, count, size)
        ),
        slices_at_once=max(1, -(-min(plan.memory.wave_experts, count) // size)),
        are_together=keeps_stacked(block, plan.decisions),
    )


def plan_linear(
    block: Block, decision: Decision, held: frozenset[str], dtypes: Mapping[str, str]
) -> LinearPlan:
    """Plan one linear; held: groups whose input keeps its scale because stored bits are kept."""
    bias = dtypes.get(f"{decision.linear.name}.bias")
    plan = LinearPlan(decision=decision, bias_dtype=None if bias is None else TORCH_DTYPES[bias])
    if decision.action == "quantize":
        return replace(plan, fallbacks=known_fallbacks(block, decision, held))
    dtype = dtypes.get(f"{decision.linear.name}.weight", FP8)
    return replace(plan, stored_dtype=None if dtype == FP8 else TORCH_DTYPES[dtype])


def known_fallbacks(block: Block, decision: Decision, held: frozenset[str]) -> tuple[str, ...]:
    """Return the fallbacks that a quantized linear takes whatever its weight is."""
    if block.kind == "mtp":
        needs_stats = decision.method and registry.get_method(decision.method).needs_stats
        return ("mtp-rtn",) if needs_stats else ()
    name, experts = decision.linear.name, block.experts
    is_expert = experts is not None and name.startswith(f"{experts.module}.")
    reads_input = is_expert and experts and name.rpartition(".")[2] in experts.inputs
    groups = (
        group.name
        for group in block.groups
        if name in group.readers or (group.routed_experts and reads_input)
    )
    return ("fp8-unscaled",) if any(group in held for group in groups) else ()


def dense_reads(block: Block, mode: str) -> tuple[ReadRequest, ...]:
    """Return the requests for everything but routed experts: one, or one per tensor where nothing
    runs the block.

    An MTP block carries an embedding and a head as large as the model's own, so its tensors come
    one by one.
    """
    linears = [linear for linear in block.linears if linear.role != "routed_expert"]
    weights = [f"{linear.name}.weight" for linear in linears]
    biases = [f"{linear.name}.bias" for linear in linears if linear.bias]
    names = (*(spec.name for spec in block.others), *weights, *biases)
    if mode == "store":
        return tuple(ReadRequest(name=name, tensors=(name,)) for name in names)
    return (ReadRequest(name=block.name, tensors=names),)


def embedding_read(plan: Plan) -> ReadRequest:
    """Return the request for the embedding, which the build reads before the blocks.

    The tensors outside the blocks come with it: some models add positions or a norm to it.
    """
    name, others = plan.layout.embedding.name, (spec.name for spec in plan.layout.final_tensors)
    return ReadRequest(name=name, tensors=(f"{name}.weight", *others))


def final_read(plan: Plan) -> ReadRequest:
    """Return the request for the tensors after the blocks: in most models final norm and head."""
    head = (f"{plan.layout.head.name}.weight",) if plan.layout.head else ()
    names = tuple(spec.name for spec in plan.layout.final_tensors)
    return ReadRequest(name="final tensors", tensors=(*names, *head))


def part_reads(plan: Plan) -> tuple[ReadRequest, ...]:
    """Return the requests for the parts that are copied, tensor by tensor.

    Their values may be infinite: some encoders store bounds that do not bind.
    """
    names = (name for part in plan.layout.parts for name in part.tensors)
    return tuple(ReadRequest(name=name, tensors=(name,), finite=False) for name in names)
