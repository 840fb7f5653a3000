"""One block under way: where its tensors come from, where they go, and what is noted about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantkit.building.artifact import Sink
from quantkit.building.experts import Activation
from quantkit.building.solve import ModuleRecord, Solved
from quantkit.building.streams import Stream, StreamName
from quantkit.contracts import Block, Experts, Format, LinearGroup, Rescale, Scheme
from quantkit.errors import NumericsError
from quantkit.models.fold import BFLOAT16_TOLERANCE, FLOAT32_TOLERANCE, Choice
from quantkit.models.layers import Skeleton
from quantkit.planning.decide import Decision, held_by_fp8, quantized_groups, search_of
from quantkit.planning.plan import Plan
from quantkit.registry import method
from quantkit.storage.checkpoint import Checkpoint
from quantkit.storage.logical import FP8
from quantkit.storage.spool import Spool
from quantkit.storage.tensors import TORCH_DTYPES


@dataclass(frozen=True, kw_only=True)
class Job:
    """What stays the same for every block of a build."""

    plan: Plan
    skeleton: Skeleton
    learning: Skeleton  # the same in the dtype of the calibration stream
    activation: Activation
    formats: tuple[Format, ...]  # of the plan first; with more, each has a sink
    sinks: tuple[Sink, ...]
    decisions: tuple[Mapping[str, Decision], ...]  # of each plan; they differ in what stays FP8
    reads: Iterator[dict[str, Tensor]]  # the source's tensors in the order of `requests`

    source: Checkpoint

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        """Store a tensor that is not quantized in the dtype the plans give it; the values that were stored."""
        stored = []
        for sink, output in zip(self.sinks, self.formats, strict=True):
            if sink.spec(name).dtype == FP8:
                stored.append(self.keep_blocks(name, tensor, sink, output))
                continue
            stored.append(tensor.to(TORCH_DTYPES[sink.spec(name).dtype]))
            sink.write({name: stored[-1]})
        return stored[0]

    def keep_blocks(self, name: str, tensor: Tensor, sink: Sink, output: Format) -> Tensor:
        """Copy the source's FP8 blocks of `name` bit for bit; NumericsError unless they stand for `tensor`."""
        blocks = self.source.blocks(name)
        if not torch.equal(blocks.values.to(tensor), tensor):
            raise NumericsError(
                f"{name}: expected the source's values, as its FP8 blocks are kept, found others: its input or its "
                "rows were rescaled; decide.touches_fp8 lacks a group"
            )
        beside = f"{name.removesuffix('weight')}{output.fp8_scale}"
        sink.write({name: blocks.codes, beside: blocks.scale.float()})
        return blocks.values.to(tensor.device)


@dataclass(kw_only=True)
class BlockRecord:
    """What the report says of one block. `fold_change`: how much folding moved its output, by rounding alone."""

    name: str
    seconds: float = 0.0
    modules: list[ModuleRecord] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    expert_tokens: tuple[int, ...] = ()
    output_error: float | None = None
    router_agreement: float | None = None
    fold_change: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """A block with the streams in front of it and the spools behind it.

    On the way `record` is filled in, and a spool of `targets` gives way to another when it is in `kept`: a journal
    holds on to it.
    """

    job: Job
    block: Block
    streams: Mapping[StreamName, Stream]
    targets: dict[StreamName, Spool]
    record: BlockRecord
    kept: set[StreamName] = field(default_factory=set)

    @property
    def calibration(self) -> Stream | None:
        """The stream methods learn from; None when no method of the recipe learns."""
        return self.streams.get("calibration")

    @property
    def tolerance(self) -> float:
        """How much folding may change the block by rounding in the compute dtype."""
        return FLOAT32_TOLERANCE if self.job.skeleton.dtype == torch.float32 else BFLOAT16_TOLERANCE

    @property
    def experts(self) -> Experts:
        """The routed experts; only asked of blocks that have some."""
        assert self.block.experts is not None
        return self.block.experts

    @property
    def expert_scheme(self) -> Scheme | None:
        """The scheme of the routed experts; None when they are kept or there are none."""
        experts = self.block.experts
        return self.job.plan.decisions[experts.linear(0, experts.gate)].scheme if experts else None

    @property
    def expert_group(self) -> LinearGroup | None:
        """The group whose input the routed experts read."""
        return next((group for group in self.block.groups if group.routed_experts), None)

    def quantized_groups(self) -> dict[str, LinearGroup]:
        """Groups with a reader, routed experts included, that is quantized: their grams are needed."""
        return quantized_groups(self.block, self.job.plan.decisions)

    def rescale_of(self, group: LinearGroup) -> Rescale | None:
        """The scale search of the one method that quantizes the group; None without one or without an absorber.

        None too when a format keeps bits that the scale would change.
        """
        return None if self.held(group) else self.search_of(group)

    def search_of(self, group: LinearGroup) -> Rescale | None:
        """The scale search that the group's method asks for."""
        return search_of(self.block, group, self.job.plan.decisions)

    @property
    def folds(self) -> bool:
        """Whether some input of the block may be rescaled: only then there is a fold to check."""
        return any(self.search_of(group) for group in self.quantized_groups().values())

    def held(self, group: LinearGroup) -> bool:
        """Whether the input of a group keeps its scale although its method would change it."""
        return any(held_by_fp8(self.block, group, found) for found in self.job.decisions)

    def fallbacks_of(self, module: str) -> tuple[str, ...]:
        """Fallbacks that a quantized linear takes because of what it is, whatever its weights."""
        if self.block.kind == "mtp":
            used = self.job.plan.decisions[module].method
            return ("mtp-rtn",) if used and method(used).needs_stats else ()
        experts = self.block.experts
        into = {experts.gate, experts.up} if experts and module.startswith(f"{experts.module}.") else set[str]()
        reads = (
            group
            for group in self.block.groups
            if module in group.readers or (group.routed_experts and module.rpartition(".")[2] in into)
        )
        return ("fp8-unscaled",) if any(self.held(group) for group in reads) else ()

    def write(self, solved: Solved) -> None:
        """Store a solved linear in every format, and note what became of it."""
        for sink, tensors in zip(self.job.sinks, solved.tensors, strict=True):
            sink.write(tensors)
        self.record.modules.append(solved.record)

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        """Store a tensor that is not quantized; what was stored, in float32."""
        return self.job.keep(name, tensor).float()
