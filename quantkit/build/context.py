"""One block under way: where its tensors come from, where they go, and what is noted about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantkit.artifact.records import BlockRecord
from quantkit.artifact.writer import ArtifactWriter
from quantkit.build.expert_ops import Activation
from quantkit.build.hidden_states import Stream, StreamName
from quantkit.build.quantize_linear import QuantizedLinear
from quantkit.build.spool import Spool
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.checkpoint.fp8_pairs import FP8
from quantkit.checkpoint.tensors import TORCH_DTYPES
from quantkit.contracts import Block, Experts, Format, LinearGroup, Rescale, Scheme
from quantkit.errors import NumericsError
from quantkit.models.layers import MetaModel
from quantkit.models.scaling import BFLOAT16_TOLERANCE, FLOAT32_TOLERANCE
from quantkit.plan.decisions import (
    Decision,
    find_rescale,
    is_unscaled_for_fp8,
    select_quantized_groups,
)
from quantkit.plan.plan import Plan
from quantkit.registry import get_method


@dataclass(frozen=True, kw_only=True)
class BuildContext:
    """What stays the same for every block of a build."""

    plan: Plan
    skeleton: MetaModel
    learning: MetaModel  # the same in the dtype of the calibration stream
    activation: Activation
    formats: tuple[Format, ...]  # of the plan first; with more, each has a sink
    sinks: tuple[ArtifactWriter, ...]
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

    def keep_blocks(
        self, name: str, tensor: Tensor, sink: ArtifactWriter, output: Format
    ) -> Tensor:
        """Copy the source's FP8 blocks of `name` bit for bit; NumericsError unless they stand for `tensor`."""
        blocks = self.source.read_fp8_blocks(name)
        if not torch.equal(blocks.values.to(tensor), tensor):
            raise NumericsError(
                f"{name}: expected the source's values, as its FP8 blocks are kept, found others: its input or its "
                "rows were rescaled; decide.touches_fp8 lacks a group"
            )
        beside = f"{name.removesuffix('weight')}{output.fp8_scale}"
        sink.write({name: blocks.codes, beside: blocks.scale.float()})
        return blocks.values.to(tensor.device)


@dataclass(frozen=True, kw_only=True)
class BlockContext:
    """A block with the streams in front of it and the spools behind it.

    On the way `record` is filled in, and a spool of `targets` gives way to another when it is in `kept`: a journal
    holds on to it.
    """

    job: BuildContext
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
        return select_quantized_groups(self.block, self.job.plan.decisions)

    def rescale_of(self, group: LinearGroup) -> Rescale | None:
        """The scale search of the one method that quantizes the group; None without one or without an absorber.

        None too when a format keeps bits that the scale would change.
        """
        return None if self.held(group) else self.search_of(group)

    def search_of(self, group: LinearGroup) -> Rescale | None:
        """The scale search that the group's method asks for."""
        return find_rescale(self.block, group, self.job.plan.decisions)

    @property
    def folds(self) -> bool:
        """Whether some input of the block may be rescaled: only then there is a fold to check."""
        return any(self.search_of(group) for group in self.quantized_groups().values())

    def held(self, group: LinearGroup) -> bool:
        """Whether the input of a group keeps its scale although its method would change it."""
        return any(is_unscaled_for_fp8(self.block, group, found) for found in self.job.decisions)

    def fallbacks_of(self, module: str) -> tuple[str, ...]:
        """Fallbacks that a quantized linear takes because of what it is, whatever its weights."""
        if self.block.kind == "mtp":
            used = self.job.plan.decisions[module].method
            return ("mtp-rtn",) if used and get_method(used).needs_stats else ()
        experts = self.block.experts
        into = (
            {experts.gate, experts.up}
            if experts and module.startswith(f"{experts.module}.")
            else set[str]()
        )
        reads = (
            group
            for group in self.block.groups
            if module in group.readers
            or (group.routed_experts and module.rpartition(".")[2] in into)
        )
        return ("fp8-unscaled",) if any(self.held(group) for group in reads) else ()

    def write(self, solved: QuantizedLinear) -> None:
        """Store a solved linear in every format, and note what became of it."""
        for sink, tensors in zip(self.job.sinks, solved.tensors, strict=True):
            sink.write(tensors)
        self.record.modules.append(solved.record)

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        """Store a tensor that is not quantized; what was stored, in float32."""
        return self.job.keep(name, tensor).float()
